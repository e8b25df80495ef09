"""From one way to register our tables to the other: the recipes of the page, with rows that stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.projects import (
    APP_ENTRY,
    GENERATE_SCHEMAS,
    NEW_DATABASES,
    ONE_STRING,
    SILENT,
    EmptyDatabase,
    Host,
    NewDatabase,
    sqlite_file,
)

pytestmark = pytest.mark.slow

OURS = ("Session", "OutboxEntry", "DeadLetter", "AttemptCount")


def fill(database: EmptyDatabase) -> None:
    """Write a session, a waiting row of the outbox, a dead letter and a counter."""
    time = "'2026-01-01 00:00:00" + ("'" if database.kind == "mariadb" else "+00:00'")
    key = "`key`" if database.kind == "mariadb" else '"key"'
    uuid = "'00000000-0000-4000-8000-000000000000'"
    event = f"{uuid}, 'user_login', 's', 'user', '{{}}', {time}, 0"
    columns = "event_id, event_name, subscription, user_table, payload, created_at, attempts"
    database.execute(
        "INSERT INTO tortoise_auth_session (id, user_table, user_id, session_version, family_hash, "
        "refresh_hash, generation, created_at, last_used_at, refresh_expires_at, expires_at) "
        f"VALUES ({uuid}, 'user', '1', 1, 'f', 'r', 0, {time}, {time}, {time}, {time})"
    )
    database.execute(f"INSERT INTO tortoise_auth_outbox ({columns}) VALUES ({event})")
    database.execute(
        f"INSERT INTO tortoise_auth_dead_letter (id, dead_at, {columns}) VALUES (7, {time}, {event})"
    )
    database.execute(
        f"INSERT INTO tortoise_auth_attempts ({key}, count, failures, in_flight, counted_at, "
        "previous_at, reserved_at) VALUES ('k', 1, 1, 0, 1, 1, 1)"
    )


def rows_of(database: EmptyDatabase) -> list[object]:
    """Return what is in our tables."""
    names = ("session", "outbox", "dead_letter", "attempts")
    return [database.execute(f"SELECT * FROM tortoise_auth_{name}") for name in names]


def newest_migration(host: Host) -> str:
    """Return the source of the newest migration of the host."""
    return (host.migrations / f"{host.own_migrations()[-1]}.py").read_text()


@pytest.fixture(params=NEW_DATABASES)
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """Opens an empty database of one kind."""
    open_empty: NewDatabase = request.param
    return open_empty


def test_from_the_string_to_the_app(new_database: NewDatabase, tmp_path: Path) -> None:
    """The host's migration drops our tables in its records alone, and ours are recorded as applied."""
    host = Host(tmp_path, ONE_STRING)
    with new_database(tmp_path) as old, new_database(tmp_path) as new:
        host.tortoise(old.url, "makemigrations")
        host.tortoise(old.url, "migrate")
        fill(old)
        rows, tables = rows_of(old), old.tables()

        host.register(APP_ENTRY)
        host.tortoise(old.url, "makemigrations")
        made = newest_migration(host)
        assert made.count("ops.") == made.count("ops.DeleteModel") == len(OURS)
        host.tortoise(old.url, "migrate", "models", "--fake")
        host.tortoise(old.url, "migrate", "tortoise_auth", "--fake")
        assert (rows_of(old), old.tables()) == (rows, tables)
        settled(host, old, new)


def test_from_the_app_to_the_string(new_database: NewDatabase, tmp_path: Path) -> None:
    """The host's migration makes our tables in its records alone."""
    host = Host(tmp_path, APP_ENTRY)
    with new_database(tmp_path) as old, new_database(tmp_path) as new:
        host.tortoise(old.url, "makemigrations")
        host.tortoise(old.url, "migrate")
        fill(old)
        rows, tables = rows_of(old), old.tables()

        host.register(ONE_STRING)
        host.tortoise(old.url, "makemigrations")
        made = newest_migration(host)
        assert made.count("ops.") == made.count("ops.CreateModel") == len(OURS)
        host.tortoise(old.url, "migrate", "models", "--fake")
        assert (rows_of(old), old.tables()) == (rows, tables)
        settled(host, old, new)


def test_there_and_back(tmp_path: Path) -> None:
    """A database may go to the other way and back again."""
    host = Host(tmp_path, APP_ENTRY)
    with sqlite_file(tmp_path) as database:
        host.tortoise(database.url, "makemigrations")
        host.tortoise(database.url, "migrate")
        fill(database)
        rows = rows_of(database)
        for registration in (ONE_STRING, APP_ENTRY, ONE_STRING):
            host.register(registration)
            host.tortoise(database.url, "makemigrations", "--name", "other_way")
            host.tortoise(database.url, "migrate", "--fake")
        assert host.tortoise(database.url, "makemigrations") == SILENT
        assert rows_of(database) == rows


def settled(host: Host, old: EmptyDatabase, new: EmptyDatabase) -> None:
    """Check that nothing is left to do, and that a new database gets the same tables as ever."""
    assert host.tortoise(old.url, "makemigrations") == SILENT
    assert "No migrations to apply" in host.tortoise(old.url, "migrate")
    host.tortoise(new.url, "migrate")
    assert new.tables() == old.tables()
    host.run(new.url, GENERATE_SCHEMAS)
    assert new.tables() == old.tables()
