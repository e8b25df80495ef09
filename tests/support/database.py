"""Databases for the tests: SQLite, and the servers that listen, by each driver."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncmy
import asyncpg
import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext

from tests.support.services import (
    MARIADB_URL,
    POSTGRES_URL,
    PSYCOPG_URL,
    needs_mariadb,
    needs_postgres,
)
from tortoise_auth.database import root_of

MODULES = ["tests.support.app", "tortoise_auth.models"]


_memory, _file = pytest.param("memory", id="memory"), pytest.param("file", id="file")
_postgres = pytest.param("postgres", id="postgres", marks=needs_postgres)
_psycopg = pytest.param("psycopg", id="psycopg", marks=needs_postgres)
_mariadb = pytest.param("mariadb", id="mariadb", marks=needs_mariadb)
SERVERS = [_postgres, _psycopg, _mariadb]

BOTH_BY_POSTGRES = [_postgres, _psycopg]
"""Both drivers of PostgreSQL, for what it alone has: notifications."""

ONE_BY_EACH_DIALECT = [_postgres, _mariadb]
"""One driver of each server, for long tests of SQL that the driver does not change."""

DATABASES = [_memory, *SERVERS]
"""One database of each dialect and driver, for what SQL and drivers can change."""

DIALECTS = [_memory, *ONE_BY_EACH_DIALECT]
"""One database of each dialect, for many tests of the same statements: drivers are tried elsewhere."""

SHARED_DATABASES = [_file, *SERVERS]
"""Databases that a second connection can open, for what is committed, locked or done by processes.

One connection sees no difference between an SQLite file and one in memory.
"""

_connect = asyncpg.connect  # which some tests replace

ON_POSTGRES = {"postgres", "psycopg"}


@asynccontextmanager
async def place(kind: str, folder: Path, *, maxsize: int = 5) -> AsyncIterator[str]:
    """Make an empty database, on PostgreSQL a schema; yield its URL, and drop it afterwards."""
    name = f"t_{secrets.token_hex(8)}"
    if kind == "memory":
        yield "sqlite://:memory:"
    elif kind == "file":
        # Survives the death of a process, which the tests cause, and no loss of power: fsync is slow.
        yield f"sqlite://{folder / name}.sqlite3?synchronous=OFF"
    elif kind in ON_POSTGRES:
        url = POSTGRES_URL if kind == "postgres" else PSYCOPG_URL
        size = "maxsize" if kind == "postgres" else "max_size"
        await _on_postgres(f'CREATE SCHEMA "{name}"')
        try:
            yield f"{url}?schema={name}&{size}={maxsize}"
        finally:
            await _on_postgres(f'DROP SCHEMA "{name}" CASCADE')
    else:
        await on_mariadb(f"CREATE DATABASE {name}")
        try:
            yield f"{MARIADB_URL.rpartition('/')[0]}/{name}?maxsize={maxsize}"
        finally:
            await on_mariadb(f"DROP DATABASE {name}")


async def _on_postgres(statement: str) -> None:
    own = await _connect(POSTGRES_URL)
    try:
        await own.execute(statement)
    finally:
        await own.close()


async def on_mariadb(statement: str, *, database: str | None = None) -> list[tuple[Any, ...]]:
    """Run a statement on a connection of its own."""
    own = await asyncmy.connect(**of_mariadb(database))
    async with own, own.cursor() as cursor:
        await cursor.execute(statement)
        return list(await cursor.fetchall())


def of_mariadb(database: str | None) -> dict[str, Any]:
    """Return what asyncmy needs to connect to a database of MariaDB."""
    server = urlsplit(MARIADB_URL)
    return {
        **{"host": server.hostname, "port": server.port, "user": server.username},
        **{"password": server.password or "", "db": database, "autocommit": True},
    }


@asynccontextmanager
async def database(
    kind: str, folder: Path, *, modules: list[str] | None = None, maxsize: int = 5, **options: Any
) -> AsyncIterator[TortoiseContext]:
    """Open an empty database with every table; on PostgreSQL in a schema of its own."""
    async with place(kind, folder, maxsize=maxsize) as url, TortoiseContext() as context:
        config = {
            # Tortoise caches statements by connection name, so each dialect has its own.
            "connections": {kind: url},
            "apps": {"models": {"models": modules or MODULES, "default_connection": kind}},
        }
        await context.init(config=config, **options)
        await context.generate_schemas()
        yield context


def address(context: TortoiseContext, *, maxsize: int = 5) -> str:
    """Return the URL of a test's database, for a program that uses it, too."""
    client: Any = root(context)
    kind = client.connection_name
    if client.capabilities.dialect == "sqlite":
        return f"sqlite://{client.filename}"
    if client.capabilities.dialect == "mysql":
        return f"{MARIADB_URL.rpartition('/')[0]}/{client.database}?maxsize={maxsize}"
    url = POSTGRES_URL if kind == "postgres" else PSYCOPG_URL
    size = "maxsize" if kind == "postgres" else "max_size"
    return f"{url}?schema={client.schema}&{size}={maxsize}"


def connection_of(context: TortoiseContext) -> BaseDBAsyncClient:
    """Return the only connection of a test's database."""
    (connection,) = context.connections.all()
    return connection


def root(context: TortoiseContext) -> BaseDBAsyncClient:
    """Return the database itself, whatever transaction the test is in."""
    return root_of(connection_of(context))


def kind_of(context: TortoiseContext) -> str:
    """Return which of the databases a test has: ``memory``, ``postgres``, ``psycopg``, ``mariadb``..."""
    return connection_of(context).connection_name


async def until_idle(pool: Any) -> None:
    """Wait until no connection of a pool is in use: one of psycopg replaces a lost one by itself."""
    async with asyncio.timeout(10):
        while pool is not None and not all_idle(pool):  # noqa: ASYNC110 - it sets no event
            await asyncio.sleep(0.005)


def transaction_class(client: BaseDBAsyncClient) -> Any:
    """Return the class of the transactions of a database."""
    block: Any = client._in_transaction()
    return type(getattr(block, "client", None) or block.connection)


def assert_no_connection_is_held(context: TortoiseContext) -> None:
    """Check that every connection of the pool is idle, and on SQLite that the lock is free."""
    for connection in context.connections.all():
        client: Any = connection
        if client.capabilities.dialect == "sqlite":
            assert not client._lock.locked()
        elif client._pool is not None:
            assert all_idle(client._pool)


def all_idle(pool: Any) -> bool:
    """Return whether no connection of the pool of a driver is in use."""
    if hasattr(pool, "get_idle_size"):
        return bool(pool.get_idle_size() == pool.get_size())
    if hasattr(pool, "get_stats"):
        stats = pool.get_stats()
        return bool(stats["pool_available"] == stats["pool_size"])
    return bool(pool.freesize == pool.size)


async def look(context: TortoiseContext, sql: str) -> list[tuple[Any, ...]]:
    """Read what is committed, through a connection of its own where the database can have two."""
    client: Any = root(context)
    if client.capabilities.dialect == "postgres":
        own = await asyncpg.connect(POSTGRES_URL, server_settings={"search_path": client.schema})
        try:
            return [tuple(row) for row in await own.fetch(sql)]
        finally:
            await own.close()
    if client.capabilities.dialect == "mysql":
        return await on_mariadb(sql, database=client.database)
    if client.filename == ":memory:":
        return [tuple(row.values()) for row in await client.execute_query_dict(sql)]
    with closing(sqlite3.connect(client.filename)) as second:
        return second.execute(sql).fetchall()
