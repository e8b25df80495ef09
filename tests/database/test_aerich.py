"""A host that migrates with aerich: from an empty database, our tables added, its own model changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.projects import (
    GENERATE_SCHEMAS,
    NEW_DATABASES,
    OWN_ENTRY,
    EmptyDatabase,
    Host,
    NewDatabase,
    Registration,
    SqliteFile,
)

pytestmark = pytest.mark.slow

HOST_ALONE = Registration('"models": {"models": ["shop.models", "aerich.models"]}, ', "models")
WITH_OURS = Registration(
    '"models": {"models": ["shop.models", "tortoise_auth.models", "aerich.models"]}, ', "models"
)
BOTH_WAYS = Registration(WITH_OURS.apps + OWN_ENTRY, "models")

PLAIN = """
from tortoise import fields
from tortoise.models import Model

class User(Model):
    id = fields.IntField(primary_key=True)
    email = fields.CharField(max_length=255, unique=True)
"""
ADOPTED = PLAIN.replace("User(Model)", "User(AbstractUser)").replace(
    "from tortoise.models import Model", "from tortoise_auth import AbstractUser"
)
CHANGED = ADOPTED + "    nickname = fields.CharField(max_length=50, null=True)\n"

# The page about migrations names them: aerich 0.10.1 leaves out the defaults of the database.
NOW = {
    "sqlite": "'1970-01-01 00:00:00+00:00'",
    "postgres": "CURRENT_TIMESTAMP",
    "mariadb": "(UTC_TIMESTAMP(6))",
}


def add_defaults(host: Host, database: EmptyDatabase) -> None:
    """Edit the newest migration as the page says."""
    newest = max((host.folder / "migrations/models").glob("[0-9]*.py"))
    text = newest.read_text()
    for column, default in (
        ("session_version", "0"),
        ("created_at", NOW[database.kind]),
        ("updated_at", NOW[database.kind]),
    ):
        line = rf"""(ALTER TABLE ["`]user["`] ADD ["`]{column}["`] \S+ NOT NULL)( DEFAULT NULL)?;"""
        text, edited = re.subn(line, rf"\1 DEFAULT {default};", text)
        assert edited == 1, text
    newest.write_text(text)


@pytest.fixture(params=NEW_DATABASES)
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """Opens an empty database of one kind."""
    open_empty: NewDatabase = request.param
    return open_empty


def test_from_plain_users_to_ours(new_database: NewDatabase, tmp_path: Path) -> None:
    """aerich adds our tables beside rows, follows the host's models, and makes an empty database."""
    host = Host(tmp_path, HOST_ALONE)
    library = host.library_files()
    with new_database(tmp_path) as old, new_database(tmp_path) as new:
        host.write("shop/models.py", PLAIN)
        host.aerich(old.url, "init", "-t", "settings.TORTOISE_ORM")
        host.aerich(old.url, "init-db")
        users = "`user`" if old.kind == "mariadb" else '"user"'
        old.execute(f"INSERT INTO {users} (email) VALUES ('ada@example.com')")

        host.register(WITH_OURS)
        host.write("shop/models.py", ADOPTED)
        assert "Success" in host.aerich(old.url, "migrate", "--name", "accounts")
        add_defaults(host, old)
        assert "accounts" in host.aerich(old.url, "upgrade")

        host.write("shop/models.py", CHANGED)
        assert "Success" in host.aerich(old.url, "migrate", "--name", "nickname")
        assert "nickname" in host.aerich(old.url, "upgrade")
        assert "No changes detected" in host.aerich(old.url, "migrate", "--name", "nothing")

        host.aerich(new.url, "upgrade")
        columns = "email, password, session_version, nickname"
        assert old.execute(f"SELECT {columns} FROM {users}") == [("ada@example.com", "", 0, None)]
        assert old.tables() == new.tables()
        with new_database(tmp_path) as generated:
            host.run(generated.url, GENERATE_SCHEMAS)
            assert new.tables() == generated.tables()
    assert host.library_files() == library


def test_new_project(new_database: NewDatabase, tmp_path: Path) -> None:
    """``init-db`` makes our tables at once, and finds nothing more to migrate."""
    host = Host(tmp_path, WITH_OURS)
    with new_database(tmp_path) as database, new_database(tmp_path) as generated:
        host.aerich(database.url, "init", "-t", "settings.TORTOISE_ORM")
        host.aerich(database.url, "init-db")
        assert "No changes detected" in host.aerich(database.url, "migrate")
        host.run(generated.url, GENERATE_SCHEMAS)
        assert database.tables() == generated.tables()


def test_both_ways(tmp_path: Path) -> None:
    """aerich refuses both registration ways at once, before it writes a file or a table."""
    host = Host(tmp_path, BOTH_WAYS)
    database = SqliteFile(tmp_path / "test.sqlite3")
    refusal = "ConfigurationError: The tables of tortoise_auth are registered twice"
    host.aerich(database.url, "init", "-t", "settings.TORTOISE_ORM")
    assert refusal in host.refused(database.url, "aerich", "init-db")
    assert (files_of(host), database.tables()) == ([], {})

    host.register(WITH_OURS)
    host.aerich(database.url, "init-db")
    files, tables = files_of(host), database.tables()
    host.register(BOTH_WAYS)
    assert refusal in host.refused(database.url, "aerich", "migrate")
    assert refusal in host.refused(database.url, "aerich", "upgrade")
    assert (files_of(host), database.tables()) == (files, tables)


def files_of(host: Host) -> list[Path]:
    """Return the migrations of the host."""
    return sorted(host.folder.glob("migrations/**/*.py"))
