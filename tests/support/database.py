"""Databases for the tests: SQLite in memory, an SQLite file, and PostgreSQL where one listens."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext

from tests.support.services import POSTGRES_URL, needs_postgres
from tortoise_auth.database import root_of

MODULES = ["tests.support.app", "tortoise_auth.models"]


_memory, _file = pytest.param("memory", id="memory"), pytest.param("file", id="file")
_postgres = pytest.param("postgres", id="postgres", marks=needs_postgres)

DATABASES = [_memory, _postgres]
"""One database of each dialect, for what SQL can change."""

SHARED_DATABASES = [_file, _postgres]
"""Databases that a second connection can open, for what is committed, locked or done by processes.

One connection sees no difference between an SQLite file and one in memory.
"""


@asynccontextmanager
async def database(
    kind: str, folder: Path, *, modules: list[str] | None = None, maxsize: int = 5, **options: Any
) -> AsyncIterator[TortoiseContext]:
    """Open an empty database with every table; on PostgreSQL in a schema of its own."""
    schema = f"t_{secrets.token_hex(8)}"
    urls = {
        "memory": "sqlite://:memory:",
        # Survives the death of a process, which the tests cause, and no loss of power: fsync is slow.
        "file": f"sqlite://{folder / 'test.sqlite3'}?synchronous=OFF",
        "postgres": f"{POSTGRES_URL}?schema={schema}&maxsize={maxsize}",
    }
    config = {
        # Tortoise caches statements by connection name, so each dialect has its own.
        "connections": {kind: urls[kind]},
        "apps": {"models": {"models": modules or MODULES, "default_connection": kind}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config, **options)
        connection = context.connections.get(kind)
        if kind == "postgres":
            await connection.execute_script(f'CREATE SCHEMA "{schema}"')
        try:
            await context.generate_schemas()
            yield context
        finally:
            if kind == "postgres":
                await connection.execute_script(f'DROP SCHEMA "{schema}" CASCADE')


def connection_of(context: TortoiseContext) -> BaseDBAsyncClient:
    """Return the only connection of a test's database."""
    (connection,) = context.connections.all()
    return connection


def root(context: TortoiseContext) -> BaseDBAsyncClient:
    """Return the database itself, whatever transaction the test is in."""
    return root_of(connection_of(context))


def assert_no_connection_is_held(context: TortoiseContext) -> None:
    """Check that every connection of the pool is idle, and on SQLite that the lock is free."""
    for connection in context.connections.all():
        client: Any = connection
        if connection.capabilities.dialect == "sqlite":
            assert not client._lock.locked()
        elif client._pool is not None:
            assert client._pool.get_idle_size() == client._pool.get_size()


async def look(context: TortoiseContext, sql: str) -> list[tuple[Any, ...]]:
    """Read what is committed, through a connection of its own where the database can have two."""
    client: Any = root(context)
    if client.capabilities.dialect == "postgres":
        settings = {"search_path": client.schema}
        own = await asyncpg.connect(POSTGRES_URL, server_settings=settings)
        try:
            return [tuple(row) for row in await own.fetch(sql)]
        finally:
            await own.close()
    if client.filename == ":memory:":
        return [tuple(row.values()) for row in await client.execute_query_dict(sql)]
    with closing(sqlite3.connect(client.filename)) as second:
        return second.execute(sql).fetchall()
