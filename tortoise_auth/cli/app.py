"""The command ``tortoise-auth`` and its parts, put together."""

from __future__ import annotations

import io
import sys
import traceback
from pathlib import Path

import typer

from tortoise_auth.cli import adopt, relay
from tortoise_auth.cli import outbox as outbox_commands
from tortoise_auth.cli.loading import CommandError
from tortoise_auth.cli.output import printable

app = typer.Typer(
    help="Look after the events and accounts of tortoise_auth.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.command()(relay.relay)
app.command()(relay.events)
app.command()(adopt.adopt)
app.add_typer(outbox_commands.commands, name="outbox", help="Look into the outbox, and mend it.")


def main() -> None:
    """Run the command line, and end the process."""
    # As uvicorn does: the installed command does not look into the current folder.
    sys.path.insert(0, str(Path.cwd()))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # In a locale of ASCII a name in an event must not end the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="tortoise-auth")
    except CommandError as error:
        if error.__cause__ is not None:
            # A module of the host failed at its import, for which its author needs more than our
            # line.
            traceback.print_exception(error.__cause__)
        print(f"tortoise-auth: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
