"""The page about existing users: each of its ways, word for word, on a thousand rows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.accounts import PASSWORD, SECRET
from tests.support.former_tables import (
    Former,
    django,
    fastapi_users,
    passlib_or_werkzeug,
)
from tests.support.projects import (
    NEW_DATABASES,
    EmptyDatabase,
    NewDatabase,
    SqliteFile,
)
from tests.support.snippets import ROOT

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "existing-users.md"
NEEDS_A_DECISION = "tortoise-auth: Some accounts need a decision of yours: they are listed above"

LOG_IN = """
import asyncio, json, os, sys
from tortoise import Tortoise
from myapp.main import User
from myapp.settings import TORTOISE_ORM
from tortoise_auth import AuthConfig, AuthenticationError, AuthService
from tortoise_auth.testing import cheap_hasher

auth = AuthService(User, AuthConfig(secret=os.environ["AUTH_SECRET"]), passwords=cheap_hasher())

at_once = asyncio.Semaphore(5)

async def logs_in(typed, password):
    async with at_once:
        try:
            result = await auth.login(typed, password)
        except AuthenticationError:
            return None
        return str((await auth.authenticate(result.access_token)).pk)

async def main():
    await Tortoise.init(config=TORTOISE_ORM, _enable_global_fallback=True)
    people = json.load(sys.stdin)
    print(json.dumps(await asyncio.gather(*(logs_in(*each) for each in people))))
    await Tortoise.close_connections()

asyncio.run(main())
"""


class Project:
    """A project in a folder, in which a reader follows the page.

    Attributes:
        folder: Where it is.
        url: Its database.
    """

    def __init__(self, folder: Path, database: EmptyDatabase) -> None:
        self.folder = folder
        self.url = database.url
        self._database = database
        self._is_mended = database.kind != "mariadb"
        if database.kind == "sqlite":
            self.url += "?synchronous=OFF"  # no test survives a loss of power; fsync is slow
        (folder / "myapp").mkdir()
        (folder / "myapp" / "__init__.py").touch()

    def follow(self, section: str) -> None:
        """Do what a section of the page says: write its files, apply its changes, run its commands."""
        for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            if kind == "console":
                for command, output in _commands(text):
                    self.type(command, output)
                continue
            path = self.folder / text.partition("\n")[0].removeprefix("# ")
            path.write_text(_changed(path.read_text(), text) if kind == "diff" else text)

    def type(self, command: str, output: str) -> None:
        """Run a command of the page, and compare what it prints."""
        program, *arguments = shlex.split(command)
        modules = {"tortoise": "tortoise", "tortoise-auth": "tortoise_auth.cli"}
        if program == "tortoise-auth" and not self._is_mended:
            self._mend(arguments)
        finished = self.run("-m", modules[program], *arguments)
        printed = finished.stdout.strip("\n")
        assert re.fullmatch(_pattern(output), printed, re.DOTALL), f"{command}\n{printed}"
        assert finished.returncode == int(NEEDS_A_DECISION in output), command

    def _mend(self, arguments: list[str]) -> None:
        """Run the statements that the command stops with."""
        finished = self.run("-m", "tortoise_auth.cli", *arguments)
        statements = re.findall(r"ALTER TABLE .+?;", " ".join(finished.stdout.split()))
        assert finished.returncode == 2 and statements, finished.stdout
        for statement in statements:
            self._database.execute(statement)
        self._is_mended = True

    def log_in(self, people: list[tuple[str, str]]) -> list[str | None]:
        """Return the key of the account that each pair of identifier and password logs in to."""
        finished = self.run("-c", LOG_IN, stdin=json.dumps(people))
        assert finished.returncode == 0, finished.stdout
        *_, last = finished.stdout.splitlines()  # after warnings of hashes that are none
        keys: list[str | None] = json.loads(last)
        return keys

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run Python in the folder; the standard output has the errors, too."""
        inherited = {name: value for name, value in os.environ.items() if name != "TORTOISE_ORM"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=inherited
            | {
                "DATABASE_URL": self.url,
                "AUTH_SECRET": SECRET,
                "PYTHONPATH": str(ROOT),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )


def _commands(text: str) -> Iterator[tuple[str, str]]:
    for each in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = each.partition("\n")
        yield command, output.strip("\n")


def _pattern(output: str) -> str:
    """Return a pattern for an output: ``…`` stands for anything, a line of it for lines or none."""
    escaped = re.escape(output.replace("\n  …", "\0"))
    return escaped.replace("\0", r"(?:\n.*)?").replace("…", ".*")


def _changed(source: str, difference: str) -> str:
    """Apply a difference: each run of removed lines is replaced by the added lines after it."""
    hunks = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", difference, re.MULTILINE)
    assert hunks
    for removed, added in hunks:
        old, new = (re.sub(r"^[-+]", "", lines, flags=re.MULTILINE) for lines in (removed, added))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def sections() -> dict[str, str]:
    """Return the sections of the page by their headings."""
    parts = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


WAYS = {
    "Django": django,
    "FastAPI Users": fastapi_users,
    "passlib or Werkzeug in a Tortoise app": passlib_or_werkzeug,
}


@pytest.mark.parametrize("new_database", NEW_DATABASES)
@pytest.mark.parametrize("way", WAYS)
def test_word_for_word(way: str, new_database: NewDatabase, tmp_path: Path) -> None:
    """Every command prints what the page shows; then each account whose hash is supported logs in."""
    make: Callable[[str], Former] = WAYS[way]
    with new_database(tmp_path) as database:
        former = make(database.kind)
        project = Project(tmp_path, database)
        project.follow(sections()["Set up"])
        models, section = re.split(r"(?<=^```\n)", sections()[way], maxsplit=1, flags=re.MULTILINE)
        project.follow(models)
        if former.definitions:
            former.create(database)
        else:  # the reader's own migrations made it
            project.type("tortoise makemigrations", "…")
            project.type("tortoise migrate models", "…")
        former.fill(database)
        project.follow(section)
        made = (tmp_path / "myapp" / "migrations" / "0002_abstract_user.py").read_text()
        assert made.count("ops.") == made.count("ops.AddField")
        people = [each for each in former.accounts if each.password is not None]
        assert len(people) > 950
        keys = project.log_in([(each.typed, each.password or "") for each in people])
        assert [each.key for each, key in zip(people, keys, strict=True) if each.key != key] == []
        others = [(each.typed, PASSWORD) for each in former.accounts if each.password is None]
        wrong = [(each.typed, "another password") for each in people[:10]]
        assert set(project.log_in(others + wrong)) == {None}


def test_why_nothing_is_renamed(tmp_path: Path) -> None:
    """A model without the old column, as one would write it, drops the hashes.

    When this test fails, Tortoise has learned to rename the column, and the page may say so.
    """
    project = Project(tmp_path, SqliteFile(tmp_path / "test.sqlite3"))
    project.follow(sections()["Set up"])
    models, *_ = re.split(r"(?<=^```\n)", sections()[list(WAYS)[-1]], flags=re.MULTILINE)
    project.follow(models)
    project.type("tortoise makemigrations", "…")
    path = tmp_path / "myapp" / "models.py"
    renamed = re.sub(r"    password_hash = .*\n", "", path.read_text())
    path.write_text(renamed.replace("User(Model)", "User(AbstractUser)"))
    project.type("tortoise makemigrations --name renamed", "…")
    made = (tmp_path / "myapp" / "migrations" / "0002_renamed.py").read_text()
    assert re.search(r"ops\.RemoveField\(\s*model_name='User',\s*name='password_hash'", made)


def test_every_way_is_followed() -> None:
    """Each section with commands is one of the ways, or the set-up."""
    with_commands = {heading for heading, text in sections().items() if "```" in text}
    assert with_commands == {*WAYS, "Set up"}
