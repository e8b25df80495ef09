"""Migrations: a scratch host with Tortoise's own command line, on an SQLite file and PostgreSQL."""

from __future__ import annotations

import asyncio
import importlib
import os
import pkgutil
import secrets
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, TypeAlias

import asyncpg
import pytest
from tortoise.fields.relational import RelationalField
from tortoise.migrations import Migration
from tortoise.migrations import operations as ops

import tortoise_auth
from tests.support.services import POSTGRES_URL, needs_postgres
from tortoise_auth import migrations
from tortoise_auth.migrations import OwnMigration

pytestmark = pytest.mark.slow

PACKAGE = Path(tortoise_auth.__file__).parent
SILENT = "No changes detected\n"

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

LOG_IN = """
import secrets
from settings import TORTOISE_ORM
from shop.models import User
from tortoise import Tortoise, run_async
from tortoise_auth import AuthConfig, AuthService
from tortoise_auth.testing import cheap_hasher

User.password_hasher = cheap_hasher()

async def main():
    await Tortoise.init(config=TORTOISE_ORM)
    await User.create_user(email="ada@example.com", password="correct horse battery staple")
    auth = AuthService(User, AuthConfig(secret=secrets.token_urlsafe(48)))
    result = await auth.login("ada@example.com", "correct horse battery staple")
    print((await auth.authenticate(result.access_token)).email)

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


APP_ENTRY = '"models": {"models": ["shop.models"], "migrations": "shop.migrations"}, '
REGISTRATIONS = [
    pytest.param(
        Registration(APP_ENTRY + '"tortoise_auth": app_config()', "tortoise_auth"), id="app-entry"
    ),
    pytest.param(Registration(APP_ENTRY + '"accounts": app_config()', "accounts"), id="label"),
    pytest.param(
        Registration(APP_ENTRY.replace("]", ', "tortoise_auth.models"]'), "models"), id="one-string"
    ),
]


class Host:
    """A scratch project, with a copy of the library instead of ``site-packages``."""

    def __init__(self, folder: Path, registration: Registration) -> None:
        self.folder = folder / "host"
        self.package = folder / "site-packages" / "tortoise_auth"
        self.migrations = self.folder / "shop" / "migrations"
        self.registration = registration
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self._write("shop/__init__.py", "")
        self._write("shop/models.py", MODELS)
        self._write("settings.py", SETTINGS.format(apps=registration.apps))

    def tortoise(self, url: str, *arguments: str) -> str:
        """Run Tortoise's command line on the database at *url*; return what it printed."""
        return self._run(url, "-m", "tortoise", "-c", "settings.TORTOISE_ORM", *arguments)

    def run(self, url: str, script: str) -> str:
        """Run a script of the project; return what it printed."""
        self._write("script.py", script)
        return self._run(url, "script.py")

    def library_files(self) -> dict[str, bytes]:
        """Return the content of every file of the library's package."""
        return {
            str(path.relative_to(self.package)): path.read_bytes()
            for path in sorted(self.package.rglob("*"))
            if path.is_file()
        }

    def _write(self, name: str, content: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def _run(self, url: str, *arguments: str) -> str:
        finished = subprocess.run(
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
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout


class SqliteFile:
    """An empty SQLite database."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.url = f"sqlite://{path}"

    def tables(self) -> dict[str, set[tuple[object, ...]]]:
        """Return the columns and indexes of each table."""
        connection = sqlite3.connect(self._path)
        try:
            names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            return {
                name: self._columns(connection, name) | self._indexes(connection, name)
                for (name,) in names.fetchall()
            }
        finally:
            connection.close()

    @staticmethod
    def _columns(connection: sqlite3.Connection, table: str) -> set[tuple[object, ...]]:
        rows = connection.execute(f'PRAGMA table_info("{table}")')
        return {("column", *row[1:]) for row in rows}

    @staticmethod
    def _indexes(connection: sqlite3.Connection, table: str) -> set[tuple[object, ...]]:
        rows = connection.execute(f'PRAGMA index_list("{table}")').fetchall()
        return {
            ("index", name, unique, origin, partial, *_index_columns(connection, name))
            for _, name, unique, origin, partial in rows
        }


def _index_columns(connection: sqlite3.Connection, index: str) -> list[str]:
    return [row[2] for row in connection.execute(f'PRAGMA index_info("{index}")')]


class PostgresSchema:
    """An empty schema in the PostgreSQL of the tests."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.url = f"{POSTGRES_URL}?schema={name}"

    def tables(self) -> dict[str, set[tuple[object, ...]]]:
        """Return the columns and indexes of each table."""
        tables: dict[str, set[tuple[object, ...]]] = {}
        for table, *facts in [*self._columns(), *self._indexes()]:
            tables.setdefault(str(table), set()).add(tuple(facts))
        return tables

    def _columns(self) -> list[list[object]]:
        return _fetch(
            "SELECT table_name, 'column', column_name, data_type, character_maximum_length, "
            "numeric_precision, datetime_precision, is_nullable, is_identity, "
            "replace(column_default, table_schema || '.', '') "
            "FROM information_schema.columns WHERE table_schema = $1",
            self._name,
        )

    def _indexes(self) -> list[list[object]]:
        return _fetch(
            "SELECT tablename, 'index', indexname, replace(indexdef, schemaname || '.', '') "
            "FROM pg_indexes WHERE schemaname = $1",
            self._name,
        )


def _fetch(sql: str, *arguments: str) -> list[list[object]]:
    async def fetch() -> list[list[object]]:
        connection = await asyncpg.connect(POSTGRES_URL)
        try:
            return [list(row) for row in await connection.fetch(sql, *arguments)]
        finally:
            await connection.close()

    return asyncio.run(fetch())


@contextmanager
def sqlite_file(folder: Path) -> Iterator[SqliteFile]:
    yield SqliteFile(folder / f"{secrets.token_hex(4)}.sqlite3")


@contextmanager
def postgres_schema(folder: Path) -> Iterator[PostgresSchema]:
    name = f"t_{secrets.token_hex(8)}"
    _fetch(f'CREATE SCHEMA "{name}"')
    try:
        yield PostgresSchema(name)
    finally:
        _fetch(f'DROP SCHEMA "{name}" CASCADE')


NewDatabase: TypeAlias = Callable[[Path], AbstractContextManager["SqliteFile | PostgresSchema"]]


@dataclass(frozen=True)
class Story:
    """A host that made its migrations and applied all of them.

    Attributes:
        host: The project.
        database: Where it migrated to.
        generated: Another database, made by ``generate_schemas``.
        before: The files of the library before anything ran.
        first: What the first ``makemigrations`` printed.
    """

    host: Host
    database: SqliteFile | PostgresSchema
    generated: SqliteFile | PostgresSchema
    before: dict[str, bytes]
    first: str


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(sqlite_file, id="sqlite"),
        pytest.param(postgres_schema, id="postgres", marks=needs_postgres),
    ],
)
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """Opens an empty database of one kind."""
    open_empty: NewDatabase = request.param
    return open_empty


@pytest.fixture(scope="module", params=REGISTRATIONS)
def story(
    request: pytest.FixtureRequest,
    new_database: NewDatabase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    """A host for every kind of database and registration: ``makemigrations``, then ``migrate``."""
    folder = tmp_path_factory.mktemp("story")
    host = Host(folder, request.param)
    before = host.library_files()
    with new_database(folder) as database, new_database(folder) as generated:
        first = host.tortoise(database.url, "makemigrations")
        host.tortoise(database.url, "migrate")
        host.run(generated.url, GENERATE_SCHEMAS)
        yield Story(host, database, generated, before, first)


class TestHost:
    def test_first_makemigrations(self, story: Story) -> None:
        """The host's migrations make its own table; ours only where it registered the one string."""
        assert "Created models.0001_initial" in story.first
        made = (story.host.migrations / "0001_initial.py").read_text()
        assert "name='User'" in made
        assert ("name='Session'" in made) is not story.host.registration.is_shipped

    def test_second_makemigrations(self, story: Story) -> None:
        """After the first run nothing is left to migrate, neither in the host's app nor in ours."""
        assert story.host.tortoise(story.database.url, "makemigrations") == SILENT

    def test_login(self, story: Story) -> None:
        """A login works on the migrated tables."""
        assert story.host.run(story.database.url, LOG_IN) == "ada@example.com\n"

    def test_same_schema(self, story: Story) -> None:
        """``migrate`` and ``generate_schemas`` make the same columns and indexes."""
        migrated = story.database.tables()
        assert "id" in {fact[1] for fact in migrated.pop("tortoise_migrations")}
        assert {"user", "tortoise_auth_session"} <= migrated.keys()
        generated = story.generated.tables()
        assert migrated.keys() == generated.keys()
        for table, facts in migrated.items():
            assert facts ^ generated[table] == set(), table

    def test_library_is_left_alone(self, story: Story) -> None:
        """Nothing was written into the library's package."""
        story.host.tortoise(story.database.url, "makemigrations")
        assert story.host.library_files() == story.before

    def test_downgrade(self, story: Story) -> None:
        """A downgrade drops the tables of that app and no other; ``migrate`` brings them back."""
        registration, whole = story.host.registration, story.database.tables()
        story.host.tortoise(story.database.url, "downgrade", registration.label)
        kept = story.database.tables()
        assert not [name for name in kept if name.startswith("tortoise_auth_")]
        assert kept.get("user") == (whole["user"] if registration.is_shipped else None)
        story.host.tortoise(story.database.url, "migrate")
        assert story.database.tables() == whole


FILL_OUTBOX = """
from settings import TORTOISE_ORM
from tortoise import Tortoise, connections, run_async

COLUMNS = (
    "event_id, event_name, subscription, user_table, subject_id, payload, created_at, due_at, "
    "attempts, dead_at"
)
ROW = (
    "('00000000-0000-4000-8000-000000000000', 'user_login', 's', 'user', '7', '{}', "
    "'2026-01-01 00:00:00+00:00', %s, %d, %s)"
)
TIME = "'2026-01-02 00:00:00+00:00'"

async def main():
    await Tortoise.init(config=TORTOISE_ORM)
    rows = [ROW % ("NULL", 10, TIME) if n in (1, 5) else ROW % (TIME, n, "NULL") for n in range(6)]
    await connections.get("default").execute_script(
        f"INSERT INTO tortoise_auth_outbox ({COLUMNS}) VALUES {', '.join(rows)}"
    )

run_async(main())
"""

SHOW_OUTBOX = """
from settings import TORTOISE_ORM
from tortoise import Tortoise, connections, run_async
from tortoise_auth.clock import utc_now
from tortoise_auth.events import outbox
from tortoise_auth.models import OutboxEntry

async def main():
    await Tortoise.init(config=TORTOISE_ORM)
    database = connections.get("default")
    print([(row.id, row.attempts) for row in await outbox.entries(database)])
    print([(row.id, row.attempts) for row in await outbox.entries(database, dead=True)])
    new = (await outbox.entries(database))[0]
    new = await OutboxEntry.create(
        event_id=new.event_id, event_name="x", subscription="s", payload={}, created_at=utc_now()
    )
    print(new.id)
    await new.delete()
    print(await outbox.retry_dead(database, utc_now()), await OutboxEntry.all().count())

run_async(main())
"""

COUNT_DEAD = """
from settings import TORTOISE_ORM
from tortoise import Tortoise, connections, run_async

async def main():
    await Tortoise.init(config=TORTOISE_ORM)
    rows = await connections.get("default").execute_query_dict(
        "SELECT id FROM tortoise_auth_outbox WHERE dead_at IS NOT NULL AND due_at IS NULL ORDER BY id"
    )
    print([row["id"] for row in rows])

run_async(main())
"""


def test_rows_of_the_outbox(new_database: NewDatabase, tmp_path: Path) -> None:
    """Dead letters move to their table with their ids, which no new row gets, and back again."""
    label = "tortoise_auth"
    host = Host(tmp_path, Registration(APP_ENTRY + f'"{label}": app_config()', label))
    with new_database(tmp_path) as database:
        host.tortoise(database.url, "makemigrations")
        host.tortoise(database.url, "migrate", label, "0006_session_network")
        host.run(database.url, FILL_OUTBOX)
        host.tortoise(database.url, "migrate", label)
        host.tortoise(database.url, "downgrade", label, "0006_session_network")
        assert host.run(database.url, COUNT_DEAD) == "[2, 6]\n"
        host.tortoise(database.url, "migrate", label)
        assert host.run(database.url, SHOW_OUTBOX).splitlines() == [
            "[(1, 0), (3, 2), (4, 3), (5, 4)]",
            "[(2, 10), (6, 10)]",
            "7",
            "2 6",
        ]


class TestShipped:
    ALLOWED: ClassVar = (
        *(ops.CreateModel, ops.DeleteModel, ops.AddField, ops.AlterField, ops.RemoveField),
        *(ops.AddIndex, ops.RemoveIndex, ops.RunSQL),
    )

    @pytest.fixture
    def shipped(self) -> list[Migration]:
        """Our migrations, as an app with another label."""
        names = sorted(name for _, name, _ in pkgutil.iter_modules(migrations.__path__))
        modules = [importlib.import_module(f"{migrations.__name__}.{name}") for name in names]
        return [
            module.Migration(name, "accounts") for name, module in zip(names, modules, strict=True)
        ]

    def test_up_to_date(self, tmp_path: Path) -> None:
        """Our models and our migrations agree; if not, the message is the missing migration."""
        host = Host(tmp_path, Registration('"tortoise_auth": app_config()', "tortoise_auth"))
        before = host.library_files()
        said = host.tortoise("sqlite://:memory:", "makemigrations")
        after = host.library_files()
        missing = [after[name].decode() for name in sorted(after.keys() - before.keys())]
        assert said == SILENT, "\n".join(missing)

    def test_numbers(self, shipped: list[Migration]) -> None:
        """Migrations are numbered without a gap, and each depends on the one before."""
        numbers = [int(migration.name.partition("_")[0]) for migration in shipped]
        assert numbers == list(range(1, len(shipped) + 1))
        assert shipped[0].dependencies == []
        for earlier, later in pairwise(shipped):
            assert later.dependencies == [("accounts", earlier.name)]

    def test_only_what_works_everywhere(self, shipped: list[Migration]) -> None:
        """Migrations use no relation, constraint, label or operation that some database or host lacks."""
        operations = [operation for each in shipped for operation in each.operations]
        assert [each for each in operations if not isinstance(each, self.ALLOWED)] == []
        for operation in operations:
            if isinstance(operation, ops.CreateModel):
                assert not {"app", "constraints"} & (operation.options or {}).keys()
                assert not [f for _, f in operation.fields if isinstance(f, RelationalField)]

    def test_dependencies_use_the_label(self) -> None:
        """A dependency is written for our label and read for the host's."""

        class Later(OwnMigration):
            dependencies = [("tortoise_auth", "0001_initial")]  # noqa: RUF012

        assert Later("0002_later", "accounts").dependencies == [("accounts", "0001_initial")]
        assert Later("0002_later", "tortoise_auth").dependencies == Later.dependencies
