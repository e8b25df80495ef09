"""The command ``tortoise-auth``: run a relay, look after the outbox, adopt a table of users.

It finds the host's `AuthService` as uvicorn finds an app (``myapp.main:auth``, also in the current
folder), and the database where Tortoise's own command does: ``--config``, ``$TORTOISE_ORM``, then
``[tool.tortoise]`` in ``pyproject.toml``.

Exit codes: 0, done (also a relay that was stopped by a signal); 1, it could not be done: the database
failed, a row is not there, an account needs a decision; 2, what was typed is wrong, or something that
it names.
"""

try:
    from tortoise_auth.cli.app import main
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    if package not in ("typer", "rich"):
        raise
    raise SystemExit(f"The command tortoise-auth needs {package}: pip install typer rich") from None

__all__ = ["main"]
