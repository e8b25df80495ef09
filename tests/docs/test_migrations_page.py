"""The page about migrations, typed word for word into a scratch project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import PACKAGE, SqliteFile
from tests.support.snippets import ROOT

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "migrations.md").read_text()
SECTIONS = dict(re.findall(r"^##? (.+)\n((?:(?!## ).*\n)*)", PAGE, re.MULTILINE))

STRING, APP = "Our tables in your migrations", "Our tables by our migrations"
PLAIN_USER = """
from tortoise import fields
from tortoise.models import Model

class User(Model):
    email = fields.CharField(max_length=255, unique=True)
    display_name = fields.CharField(max_length=100, default="")
"""


class Project:
    """A folder in which a reader follows the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = SqliteFile(folder / "test.sqlite3")
        (folder / "shop").mkdir()
        (folder / "shop" / "__init__.py").touch()
        self.write_files("Migrations")

    def write_files(self, section: str) -> None:
        """Write the files of a section; each names itself in its first line."""
        for name, source in re.findall(
            r"^```\w+\n# (\S+)\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL
        ):
            (self.folder / name).write_text(source)

    def type_commands(self, section: str) -> None:
        """Type the commands of a section; each line that the page shows is printed, in this order."""
        blocks = re.findall(r"^```console\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
        assert blocks
        for command, shown in re.findall(
            r"^\$ (.+)\n((?:[^$].*\n)*)", "".join(blocks), re.MULTILINE
        ):
            printed = self._type(command)
            for line in shown.splitlines():
                before, found, printed = printed.partition(line)
                assert found, f"$ {command}\n{before}"

    def _type(self, command: str) -> str:
        finished = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=os.environ
            | {
                "DATABASE_URL": self.database.url,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(PACKAGE.parent),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, f"$ {command}\n{finished.stdout}{finished.stderr}"
        return finished.stdout


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project with the files from the head of the page."""
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("first", "recipe", "then"),
    [(STRING, "From the string to the app", APP), (APP, "From the app to the string", STRING)],
    ids=["to-the-app", "to-the-string"],
)
def test_one_way_and_then_the_other(project: Project, first: str, recipe: str, then: str) -> None:
    """Each way works from an empty database, and changes to the other one without losing a row."""
    project.write_files(first)
    project.type_commands(first)
    project.database.execute(
        "INSERT INTO tortoise_auth_attempts "
        "(key, count, failures, in_flight, counted_at, previous_at, reserved_at) "
        "VALUES ('k', 1, 1, 0, 1, 1, 1)"
    )
    project.write_files(then)
    project.type_commands(recipe)
    assert project.database.execute("SELECT key FROM tortoise_auth_attempts") == [("k",)]


def test_table_with_rows(project: Project) -> None:
    """A model with rows becomes an `AbstractUser`, and its rows get what the table of the page says."""
    ours = (project.folder / "shop" / "models.py").read_text()
    (project.folder / "shop" / "models.py").write_text(PLAIN_USER)
    project.write_files(APP)
    project.type_commands(APP)
    project.database.execute(
        "INSERT INTO user (email, display_name) VALUES ('ada@example.com', 'Ada')"
    )
    (project.folder / "shop" / "models.py").write_text(ours)
    project.type_commands("A table of users that has rows")
    columns = "password, is_active, session_version, created_at, last_login, password_locked_at"
    assert project.database.execute(f"SELECT {columns} FROM user") == [
        ("", 1, 0, "1970-01-01 00:00:00+00:00", None, None)
    ]


def test_aerich(project: Project) -> None:
    """The commands for aerich work from an empty database."""
    project.write_files("aerich")
    project.type_commands("aerich")
    assert "tortoise_auth_session" in project.database.tables()
