"""A table of users with rows becomes one of ours by the migration that Tortoise makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.projects import (
    APP_ENTRY,
    GENERATE_SCHEMAS,
    NEW_DATABASES,
    SILENT,
    EmptyDatabase,
    Host,
    NewDatabase,
    SqliteFile,
)

pytestmark = pytest.mark.slow

PLAIN = """
from tortoise import fields
from tortoise.models import Model

class User(Model):
    id = fields.IntField(primary_key=True)
    email = fields.CharField(max_length=255, unique=True)
    nickname = fields.CharField(max_length=100, default="", db_index=True)

class Purchase(Model):
    id = fields.IntField(primary_key=True)
    buyer = fields.ForeignKeyField("models.User", on_delete=fields.CASCADE)
"""

# The column of the host stays as it is.
ADOPTED = PLAIN.replace("User(Model)", "User(AbstractUser)").replace(
    "from tortoise.models", "from tortoise_auth import AbstractUser\nfrom tortoise.models"
)
# The column becomes ours: shorter by one character, and another class.
WITH_OUR_EMAIL = ADOPTED.replace("    email = fields.CharField(max_length=255, unique=True)\n", "")

# What a model was before its columns had defaults in the database.
WITHOUT_DEFAULTS = """
from datetime import datetime
from tortoise import fields
from tortoise_auth import AbstractUser
from tortoise_auth.fields import PasswordField, UtcDatetimeField

class User(AbstractUser):
    password = PasswordField(max_length=255, default="")
    is_active = fields.BooleanField(default=True)
    session_version = fields.IntField(default=1)
    created_at = UtcDatetimeField(auto_now_add=True)
    updated_at = UtcDatetimeField(auto_now=True)
"""
WITH_DEFAULTS = """
from tortoise_auth import AbstractUser

class User(AbstractUser):
    pass
"""

SHOW = """
from settings import TORTOISE_ORM
from shop.models import User
from tortoise import Tortoise, run_async

async def main():
    await Tortoise.init(config=TORTOISE_ORM)
    for user in await User.all().order_by("id"):
        print(
            user.email, repr(user.password), user.is_active, user.session_version,
            user.created_at.tzinfo, user.updated_at.tzinfo,
        )

run_async(main())
"""


def quoted(database: EmptyDatabase, table: str) -> str:
    """Return the name of a table as the database quotes it."""
    return f"`{table}`" if database.kind == "mariadb" else f'"{table}"'


def fill(host: Host, database: EmptyDatabase) -> None:
    """Migrate the plain models, and write two users with a purchase each."""
    host.write("shop/models.py", PLAIN)
    host.tortoise(database.url, "makemigrations")
    host.tortoise(database.url, "migrate")
    users = "('ada@example.com', 'ada'), ('eve@example.com', 'eve')"
    database.execute(f"INSERT INTO {quoted(database, 'user')} (email, nickname) VALUES {users}")
    database.execute("INSERT INTO purchase (buyer_id) VALUES (1), (2)")


@pytest.fixture(params=NEW_DATABASES)
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """Opens an empty database of one kind."""
    open_empty: NewDatabase = request.param
    return open_empty


def test_table_with_rows(new_database: NewDatabase, tmp_path: Path) -> None:
    """The generated migration runs on a full table, and gives the schema of a new one."""
    host = Host(tmp_path, APP_ENTRY)
    with new_database(tmp_path) as database, new_database(tmp_path) as generated:
        fill(host, database)
        host.write("shop/models.py", ADOPTED)
        host.tortoise(database.url, "makemigrations")
        host.tortoise(database.url, "migrate")
        assert host.tortoise(database.url, "makemigrations") == SILENT
        host.run(generated.url, GENERATE_SCHEMAS)
        migrated = database.tables()
        migrated.pop("tortoise_migrations")
        assert migrated == generated.tables()
        assert database.execute("SELECT count(*) FROM purchase") == [(2,)]
        assert host.run(database.url, SHOW).splitlines() == [
            "ada@example.com '' True 0 UTC UTC",
            "eve@example.com '' True 0 UTC UTC",
        ]


def test_our_email_column(new_database: NewDatabase, tmp_path: Path) -> None:
    """A column of the host may become ours; SQLite, which copies the table, is told to keep the rest."""
    host = Host(tmp_path, APP_ENTRY)
    with new_database(tmp_path) as database:
        fill(host, database)
        host.write("shop/models.py", WITH_OUR_EMAIL)
        host.tortoise(database.url, "makemigrations")
        if database.kind == "mariadb":
            # Tortoise 1.1.9 writes PostgreSQL's SQL for a type that changes. When this fails, the
            # page about migrations may drop its warning.
            with pytest.raises(AssertionError, match="1064"):
                host.tortoise(database.url, "migrate")
            return
        is_sqlite = database.kind == "sqlite"
        host.tortoise(database.url + "?foreign_keys=OFF" * is_sqlite, "migrate")
        assert host.tortoise(database.url, "makemigrations") == SILENT
        users = f"SELECT email FROM {quoted(database, 'user')} ORDER BY email"
        assert database.execute(users) == [("ada@example.com",), ("eve@example.com",)]
        assert database.execute("SELECT count(*) FROM purchase") == [(2,)]


def test_why_sqlite_is_told(tmp_path: Path) -> None:
    """Without ``foreign_keys=OFF`` an altered column costs the rows that refer to the table.

    Tortoise 1.1.9 drops the old table with foreign keys enforced, and forgets its indexes. When this
    test fails, the page about migrations may drop its warning.
    """
    host = Host(tmp_path, APP_ENTRY)
    database = SqliteFile(tmp_path / "test.sqlite3")
    fill(host, database)
    host.write("shop/models.py", WITH_OUR_EMAIL)
    host.tortoise(database.url, "makemigrations")
    host.tortoise(database.url, "migrate")
    assert database.execute("SELECT count(*) FROM purchase") == [(0,)]
    index = "SELECT count(*) FROM sqlite_master WHERE name LIKE 'idx_user_nicknam%'"
    assert database.execute(index) == [(0,)]
    host.run(database.url, GENERATE_SCHEMAS)
    assert database.execute(index) == [(1,)]


def test_upgrade(new_database: NewDatabase, tmp_path: Path) -> None:
    """A host of before the defaults gets one migration that alters these columns, and no other."""
    host = Host(tmp_path, APP_ENTRY)
    with new_database(tmp_path) as database, new_database(tmp_path) as generated:
        host.write("shop/models.py", WITHOUT_DEFAULTS)
        host.tortoise(database.url, "makemigrations")
        host.tortoise(database.url, "migrate")
        host.write("shop/models.py", WITH_DEFAULTS)
        host.tortoise(database.url, "makemigrations")
        made = (host.migrations / f"{host.own_migrations()[-1]}.py").read_text()
        columns = ("created_at", "is_active", "password", "session_version", "updated_at")
        assert made.count("ops.") == made.count("ops.AlterField") == len(columns)
        assert [f"name='{column}'" in made for column in columns] == [True] * len(columns)
        host.tortoise(database.url, "migrate")
        assert host.tortoise(database.url, "makemigrations") == SILENT
        host.run(generated.url, GENERATE_SCHEMAS)
        migrated = database.tables()
        migrated.pop("tortoise_migrations")
        assert migrated == generated.tables()
