"""Migrations: a scratch host with Tortoise's own command line, on each database."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
from tortoise.fields.relational import RelationalField
from tortoise.migrations import Migration
from tortoise.migrations import operations as ops

from tests.support.projects import (
    APP_ENTRY,
    BOTH_WAYS,
    BOTH_WAYS_TURNED,
    GENERATE_SCHEMAS,
    MODELS,
    NEW_DATABASES,
    ONE_STRING,
    OTHER_LABEL,
    OWN_ENTRY,
    SILENT,
    EmptyDatabase,
    Host,
    NewDatabase,
    Registration,
    SqliteFile,
    needs_our_statements,
    postgres_schema,
)
from tests.support.services import needs_postgres
from tortoise_auth import migrations
from tortoise_auth.migrations import OwnMigration

pytestmark = pytest.mark.slow

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


REGISTRATIONS = [
    pytest.param(APP_ENTRY, id="app-entry"),
    pytest.param(OTHER_LABEL, id="label"),
    pytest.param(ONE_STRING, id="one-string"),
]


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
    database: EmptyDatabase
    generated: EmptyDatabase
    before: dict[str, bytes]
    first: str


@pytest.fixture(scope="module", params=NEW_DATABASES)
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
        needs_our_statements(story.database)
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

COLUMNS = (
    "event_id, event_name, subscription, user_table, subject_id, payload, created_at, due_at, "
    "attempts, dead_at"
)
ROW = (
    "('00000000-0000-4000-8000-000000000000', 'user_login', 's', 'user', '7', '{{}}', "
    "'2026-01-01 00:00:00{zone}', {due_at}, {attempts}, {dead_at})"
)


def fill_outbox(database: EmptyDatabase) -> None:
    """Write six rows into the outbox of before, two of which are dead."""
    zone = "" if database.kind == "mariadb" else "+00:00"
    time = f"'2026-01-02 00:00:00{zone}'"
    rows = [
        ROW.format(zone=zone, attempts=10, due_at="NULL", dead_at=time)
        if n in (1, 5)
        else ROW.format(zone=zone, attempts=n, due_at=time, dead_at="NULL")
        for n in range(6)
    ]
    database.execute(f"INSERT INTO tortoise_auth_outbox ({COLUMNS}) VALUES {', '.join(rows)}")


def test_rows_of_the_outbox(new_database: NewDatabase, tmp_path: Path) -> None:
    """Dead letters move to their table with their ids, which no new row gets, and back again."""
    host, label = Host(tmp_path, APP_ENTRY), APP_ENTRY.label
    with new_database(tmp_path) as database:
        host.tortoise(database.url, "makemigrations")
        host.tortoise(database.url, "migrate", label, "0006_session_network")
        fill_outbox(database)
        host.tortoise(database.url, "migrate", label)
        assert database.execute("SELECT id FROM tortoise_auth_dead_letter ORDER BY id") == [
            (2,),
            (6,),
        ]
        host.tortoise(database.url, "downgrade", label, "0006_session_network")
        assert database.execute(
            "SELECT id FROM tortoise_auth_outbox "
            "WHERE dead_at IS NOT NULL AND due_at IS NULL ORDER BY id"
        ) == [(2,), (6,)]
        host.tortoise(database.url, "migrate", label)
        needs_our_statements(database)
        assert host.run(database.url, SHOW_OUTBOX).splitlines() == [
            "[(1, 0), (3, 2), (4, 3), (5, 4)]",
            "[(2, 10), (6, 10)]",
            "7",
            "2 6",
        ]


@needs_postgres
def test_psycopg(tmp_path: Path) -> None:
    """Migrated through asyncpg, a host finds nothing left to migrate through psycopg.

    Tortoise 1.1.9 cannot migrate through psycopg: it makes the tables and fails to record that. When
    this test fails, the page about migrations may drop its warning.
    """
    host = Host(tmp_path, APP_ENTRY)
    with postgres_schema(tmp_path) as broken, postgres_schema(tmp_path) as database:
        host.tortoise(by_psycopg(broken), "makemigrations")
        said = host.refused(by_psycopg(broken), "tortoise", "migrate")
        assert "the query has 0 placeholders but 3 parameters were passed" in said
        host.tortoise(database.url, "migrate")
        assert host.tortoise(by_psycopg(database), "makemigrations") == SILENT
        assert "No migrations to apply" in host.tortoise(by_psycopg(database), "migrate")


def by_psycopg(database: EmptyDatabase) -> str:
    """Return the URL by which psycopg opens a database."""
    return f"psycopg://{database.url.partition('://')[2]}"


IMPORTING = """
from tortoise_auth.models import Session

async def sessions_of(user) -> int:
    return await Session.filter(user_id=str(user.pk)).count()
"""

# The host's app has our module first, and names no migrations: Tortoise derives ours from that.
NO_OWN_MIGRATIONS = Registration(
    '"models": {"models": ["tortoise_auth.models", "shop.models"]}', ""
)
OUR_MIGRATIONS = ', "migrations": "tortoise_auth.migrations"'


class TestMistakes:
    @pytest.mark.parametrize("registration", [BOTH_WAYS, BOTH_WAYS_TURNED], ids=["last", "first"])
    def test_both_ways(self, registration: Registration, tmp_path: Path) -> None:
        """Every command that reads models refuses both ways at once, and writes nothing at all."""
        host = Host(tmp_path, ONE_STRING)
        database = SqliteFile(tmp_path / "test.sqlite3")
        host.tortoise(database.url, "makemigrations")
        host.tortoise(database.url, "migrate")
        made, tables, library = host.own_migrations(), database.tables(), host.library_files()
        host.register(registration)
        for command in ("makemigrations", "migrate", "sqlmigrate models 0001_initial", "history"):
            said = host.refused(database.url, "tortoise", *command.split())
            assert "ConfigurationError: The tables of tortoise_auth are registered twice" in said
        assert host.own_migrations() == made
        assert database.tables() == tables
        assert host.library_files() == library

    def test_our_migrations_for_the_host(self, tmp_path: Path) -> None:
        """No migration of the host is written into our package, if its settings lead there."""
        host = Host(tmp_path, NO_OWN_MIGRATIONS)
        database = SqliteFile(tmp_path / "test.sqlite3")
        library = host.library_files()
        said = host.refused(database.url, "tortoise", "makemigrations")
        assert "ConfigurationError: The app 'models' has the migrations of tortoise_auth" in said
        assert "shop.models.User" in said
        assert host.library_files() == library
        host.register(Registration(NO_OWN_MIGRATIONS.apps[:-1] + OUR_MIGRATIONS + "}", ""))
        assert "shop.models.User" in host.refused(database.url, "tortoise", "migrate")
        assert database.tables() == {}


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_import_in_the_models_of_the_host(registration: Registration, tmp_path: Path) -> None:
    """A module of the host that imports a model of ours makes no migration for it."""
    host = Host(tmp_path, registration)
    database = SqliteFile(tmp_path / "test.sqlite3")
    host.tortoise(database.url, "makemigrations")
    host.tortoise(database.url, "migrate")
    library = host.library_files()
    host.write("shop/models.py", MODELS + IMPORTING)
    assert host.tortoise(database.url, "makemigrations") == SILENT
    assert host.tortoise(database.url, "makemigrations", "models") == SILENT
    assert host.library_files() == library
    assert host.run(database.url, LOG_IN) == "ada@example.com\n"


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
        host = Host(tmp_path, Registration(OWN_ENTRY, "tortoise_auth"))
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
