"""Scratch projects of a host, with Tortoise's own command line, and empty databases for them."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import urlsplit

import asyncmy
import asyncpg
import pytest

import tortoise_auth
from tests.support.services import MARIADB_URL, POSTGRES_URL, needs_mariadb, needs_postgres

PACKAGE = Path(tortoise_auth.__file__).parent
SILENT = "No changes detected\n"
"""What ``makemigrations`` prints when it writes nothing."""

MODELS = """
from tortoise import fields
from tortoise_auth import AbstractUser

class User(AbstractUser):
    display_name = fields.CharField(max_length=100, default="")
"""

SETTINGS = """
import os
from tortoise_auth import app_config

TORTOISE_ORM = {{
    "connections": {{"default": os.environ["DATABASE_URL"]}},
    "apps": {{{apps}}},
}}
"""

GENERATE_SCHEMAS = """
from settings import TORTOISE_ORM
from tortoise import Tortoise, run_async

async def main():
    await Tortoise.init(config=TORTOISE_ORM)
    await Tortoise.generate_schemas()

run_async(main())
"""


@dataclass(frozen=True)
class Registration:
    """One way to register our tables.

    Attributes:
        apps: The source of ``TORTOISE_ORM["apps"]``.
        label: The app that has our tables.
    """

    apps: str
    label: str

    @property
    def is_shipped(self) -> bool:
        """Whether our tables come from our migrations, and not from those of the host."""
        return self.label != "models"


HOST_ENTRY = '"models": {"models": ["shop.models"], "migrations": "shop.migrations"}, '
OWN_ENTRY = '"tortoise_auth": app_config()'

APP_ENTRY = Registration(HOST_ENTRY + OWN_ENTRY, "tortoise_auth")
OTHER_LABEL = Registration(HOST_ENTRY + '"accounts": app_config()', "accounts")
ONE_STRING = Registration(HOST_ENTRY.replace("]", ', "tortoise_auth.models"]'), "models")
BOTH_WAYS = Registration(ONE_STRING.apps + OWN_ENTRY, "models")
BOTH_WAYS_TURNED = Registration(f"{OWN_ENTRY}, {ONE_STRING.apps}", "models")


class Host:
    """A scratch project, with a copy of the library instead of ``site-packages``."""

    def __init__(self, folder: Path, registration: Registration) -> None:
        self.folder = folder / "host"
        self.package = folder / "site-packages" / "tortoise_auth"
        self.migrations = self.folder / "shop" / "migrations"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self.write("shop/__init__.py", "")
        self.write("shop/models.py", MODELS)
        self.register(registration)

    def tortoise(self, url: str, *arguments: str) -> str:
        """Run Tortoise's command line on the database at *url*; return what it printed."""
        return self._succeed(url, "-m", "tortoise", "-c", "settings.TORTOISE_ORM", *arguments)

    def aerich(self, url: str, *arguments: str) -> str:
        """Run aerich's command line on the database at *url*; return what it printed."""
        return self._succeed(url, "-m", "aerich", *arguments)

    def refused(self, url: str, module: str, *arguments: str) -> str:
        """Run a command line that fails, ``tortoise`` or ``aerich``; return its error."""
        options = ["-c", "settings.TORTOISE_ORM"] if module == "tortoise" else []
        finished = self._run(url, "-m", module, *options, *arguments)
        assert finished.returncode != 0, finished.stdout
        return finished.stderr

    def run(self, url: str, script: str) -> str:
        """Run a script of the project; return what it printed."""
        self.write("script.py", script)
        return self._succeed(url, "script.py")

    def register(self, registration: Registration) -> None:
        """Register our tables in another way."""
        self.registration = registration
        self.write("settings.py", SETTINGS.format(apps=registration.apps))

    def write(self, name: str, content: str) -> None:
        """Write a file of the project."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def library_files(self) -> dict[str, bytes]:
        """Return the content of every file of the library's package."""
        return {
            str(path.relative_to(self.package)): path.read_bytes()
            for path in sorted(self.package.rglob("*"))
            if path.is_file()
        }

    def own_migrations(self) -> list[str]:
        """Return the names of the host's migrations."""
        return sorted(path.stem for path in self.migrations.glob("0*.py"))

    def _succeed(self, url: str, *arguments: str) -> str:
        finished = self._run(url, *arguments)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def _run(self, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=os.environ
            | {
                "DATABASE_URL": url,
                "PYTHONPATH": str(self.package.parent),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )


Tables: TypeAlias = dict[str, set[tuple[object, ...]]]
"""The columns and indexes of each table."""


class EmptyDatabase(Protocol):
    """A database of one kind, empty at first."""

    url: str
    kind: str

    def tables(self) -> Tables:
        """Return the columns and indexes of each table."""

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement, and return its rows."""


class SqliteFile:
    """An SQLite database."""

    kind = "sqlite"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = f"sqlite://{path}"

    def tables(self) -> Tables:
        """Return the columns and indexes of each table."""
        names = self.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {name: self._columns(name) | self._indexes(name) for (name,) in names}

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement, and return its rows."""
        with closing(sqlite3.connect(self._path)) as connection, connection:
            return connection.execute(sql).fetchall()

    def _columns(self, table: str) -> set[tuple[object, ...]]:
        return {("column", *row[1:]) for row in self.execute(f'PRAGMA table_info("{table}")')}

    def _indexes(self, table: str) -> set[tuple[object, ...]]:
        return {
            ("index", name, unique, origin, partial, *self._index_columns(name))
            for _, name, unique, origin, partial in self.execute(f'PRAGMA index_list("{table}")')
        }

    def _index_columns(self, index: str) -> list[str]:
        return [row[2] for row in self.execute(f'PRAGMA index_info("{index}")')]


class PostgresSchema:
    """A schema in the PostgreSQL of the tests."""

    kind = "postgres"

    def __init__(self, name: str) -> None:
        self._name = name
        self.url = f"{POSTGRES_URL}?schema={name}"

    def tables(self) -> Tables:
        """Return the columns and indexes of each table."""
        return _by_table(
            self.execute(
                "SELECT table_name, 'column', column_name, data_type, character_maximum_length, "
                "numeric_precision, datetime_precision, is_nullable, is_identity, "
                "replace(column_default, table_schema || '.', '') "
                f"FROM information_schema.columns WHERE table_schema = '{self._name}'"
            ),
            self.execute(
                "SELECT tablename, 'index', indexname, replace(indexdef, schemaname || '.', '') "
                f"FROM pg_indexes WHERE schemaname = '{self._name}'"
            ),
        )

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement, and return its rows."""
        return asyncio.run(self._execute(sql))

    async def _execute(self, sql: str) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(
            POSTGRES_URL, server_settings={"search_path": f'"{self._name}"'}
        )
        try:
            return [tuple(row) for row in await connection.fetch(sql)]
        finally:
            await connection.close()


class MariadbDatabase:
    """A database in the MariaDB of the tests."""

    kind = "mariadb"

    def __init__(self, name: str) -> None:
        self._name = name
        self.url = urlsplit(MARIADB_URL)._replace(path=f"/{name}").geturl()

    def tables(self) -> Tables:
        """Return the columns and indexes of each table."""
        return _by_table(
            self.execute(
                "SELECT table_name, 'column', column_name, column_type, is_nullable, "
                "column_default, extra, collation_name "
                f"FROM information_schema.columns WHERE table_schema = '{self._name}'"
            ),
            self.execute(
                "SELECT table_name, 'index', index_name, non_unique, seq_in_index, column_name "
                f"FROM information_schema.statistics WHERE table_schema = '{self._name}'"
            ),
        )

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run one statement, and return its rows."""
        return asyncio.run(self._execute(sql))

    async def _execute(self, sql: str) -> list[tuple[Any, ...]]:
        server = urlsplit(MARIADB_URL)
        connection = await asyncmy.connect(
            host=server.hostname,
            port=server.port,
            user=server.username,
            password=server.password or "",
            database=self._name,
            autocommit=True,
        )
        try:
            async with connection.cursor() as cursor:
                await cursor.execute(sql)
                return [tuple(row) for row in await cursor.fetchall()]
        finally:
            await connection.ensure_closed()


def _by_table(*facts: list[tuple[Any, ...]]) -> Tables:
    tables: Tables = {}
    for table, *fact in chain(*facts):
        tables.setdefault(table, set()).add(tuple(fact))
    return tables


@contextmanager
def sqlite_file(folder: Path) -> Iterator[EmptyDatabase]:
    """Open an empty SQLite file."""
    yield SqliteFile(folder / f"{secrets.token_hex(4)}.sqlite3")


@contextmanager
def postgres_schema(folder: Path) -> Iterator[EmptyDatabase]:
    """Make an empty schema in PostgreSQL, and drop it afterwards."""
    name = f"t_{secrets.token_hex(8)}"
    schema = PostgresSchema(name)
    schema.execute(f'CREATE SCHEMA "{name}"')
    try:
        yield schema
    finally:
        schema.execute(f'DROP SCHEMA "{name}" CASCADE')


@contextmanager
def mariadb_database(folder: Path) -> Iterator[EmptyDatabase]:
    """Make an empty database in MariaDB, and drop it afterwards."""
    name = f"t_{secrets.token_hex(8)}"
    server = MariadbDatabase(urlsplit(MARIADB_URL).path.strip("/"))
    server.execute(f"CREATE DATABASE {name}")
    try:
        yield MariadbDatabase(name)
    finally:
        server.execute(f"DROP DATABASE {name}")


NewDatabase: TypeAlias = Callable[[Path], AbstractContextManager[EmptyDatabase]]

NEW_DATABASES = [
    pytest.param(sqlite_file, id="sqlite"),
    pytest.param(postgres_schema, id="postgres", marks=needs_postgres),
    pytest.param(mariadb_database, id="mariadb", marks=needs_mariadb),
]
"""What opens an empty database of each kind."""


def needs_our_statements(database: EmptyDatabase) -> None:
    """Skip the rest of a test where our hand-written statements do not work yet."""
    if database.kind == "mariadb":
        pytest.skip("migrated; our own statements do not run on MariaDB yet")
