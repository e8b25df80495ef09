"""A second connection to a test's database on a server: what is committed, and what waits for a lock."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncmy
import asyncpg
from asyncmy.cursors import DictCursor
from tortoise.context import TortoiseContext

from tests.support.database import kind_of, of_mariadb, root
from tests.support.services import POSTGRES_URL

LIMIT = 60
"""Seconds after which what a test waits for has not happened."""


class Second:
    """A second connection to the database of a test, which reads only what is committed."""

    language: str

    async def rows(self, sql: str) -> list[dict[str, Any]]:
        """Run a statement and return its rows."""
        raise NotImplementedError

    async def value(self, sql: str) -> Any:
        """Return the single value of a query."""
        ((value,),) = [each.values() for each in await self.rows(sql)]
        return value

    async def waiting(self) -> int:
        """Return how many connections wait for a row of this database that another one has locked."""
        raise NotImplementedError

    async def until_waiting(self, connections: int = 1) -> None:
        """Return when so many connections wait for a row."""
        async with asyncio.timeout(LIMIT):
            while await self.waiting() < connections:
                pass

    async def kill(self, process: int) -> None:
        """End another connection; see `process_of`."""
        raise NotImplementedError

    async def lock(self, table: str) -> None:
        """Let whoever writes a row of *table* wait until `unlock`; reading goes on."""
        raise NotImplementedError

    async def unlock(self) -> None:
        """End the transaction of `lock`."""
        await self.rows("COMMIT")

    async def live_sessions(self) -> int:
        """Return how many sessions of `User` are live."""
        return int(
            await self.value("""
                SELECT count(*) FROM tortoise_auth_session s
                JOIN app_user u ON concat(u.id, '') = s.user_id
                WHERE s.revoked_at IS NULL AND u.is_active AND u.session_version = s.session_version
            """)
        )


class OnPostgres(Second):
    """One to PostgreSQL, by asyncpg whatever the driver of the test."""

    language = "postgres"

    def __init__(self, connection: asyncpg.Connection, schema: str) -> None:
        self._connection = connection
        self._schema = schema

    async def rows(self, sql: str) -> list[dict[str, Any]]:
        """Run a statement by asyncpg."""
        return [dict(row) for row in await self._connection.fetch(sql)]

    async def waiting(self) -> int:
        """Ask for the locks that are not granted."""
        # Tests that run at the same time have schemas of their own in the same database. Who waits
        # for a row has a lock of its table, and who waits for a table asks for one.
        return int(
            await self.value(f"""
                SELECT count(DISTINCT waits.pid) FROM pg_locks waits
                WHERE NOT waits.granted AND EXISTS (
                    SELECT 1 FROM pg_locks held JOIN pg_class ON pg_class.oid = held.relation
                    WHERE held.pid = waits.pid AND relnamespace = '{self._schema}'::regnamespace
                )
            """)
        )

    async def kill(self, process: int) -> None:
        """End the backend."""
        await self.rows(f"SELECT pg_terminate_backend({process})")

    async def lock(self, table: str) -> None:
        """Lock the table."""
        await self.rows("BEGIN")
        await self.rows(f"LOCK TABLE {table} IN EXCLUSIVE MODE")


class OnMariaDb(Second):
    """One to MariaDB or MySQL."""

    language = "mysql"

    def __init__(self, connection: Any, database: str) -> None:
        self._connection = connection
        self._waits = re.compile(rf"of table `{database}`\.\S+ trx id (\d+) lock.mode .*waiting")

    async def rows(self, sql: str) -> list[dict[str, Any]]:
        """Run a statement by asyncmy."""
        async with self._connection.cursor(DictCursor) as cursor:
            await cursor.execute(sql)
            return list(await cursor.fetchall())

    async def waiting(self) -> int:
        """Read it from the status of InnoDB."""
        # Not INNODB_LOCK_WAITS: it stays as it is while anybody reads it more often than each 0.1 s.
        (status,) = await self.rows("SHOW ENGINE INNODB STATUS")
        return len(set(self._waits.findall(status["Status"])))

    async def kill(self, process: int) -> None:
        """End the thread."""
        await self.rows(f"KILL {process}")

    async def lock(self, table: str) -> None:
        """Lock every row, and the gaps between them: LOCK TABLES would let readers wait."""
        await self.rows("SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        await self.rows("BEGIN")
        await self.rows(f"SELECT * FROM {table} FOR UPDATE")


@asynccontextmanager
async def second(context: TortoiseContext) -> AsyncIterator[Second]:
    """Open a second connection to the database of a test."""
    client: Any = root(context)
    if client.capabilities.dialect == "postgres":
        postgres = await asyncpg.connect(
            POSTGRES_URL, server_settings={"search_path": client.schema}
        )
        try:
            yield OnPostgres(postgres, client.schema)
        finally:
            await postgres.close()
    else:
        async with await asyncmy.connect(**of_mariadb(client.database)) as mariadb:
            yield OnMariaDb(mariadb, client.database)


def processes_of(context: TortoiseContext) -> set[int]:
    """Return the numbers of the connections that are idle in the pool of a test's database."""
    client: Any = root(context)
    if kind_of(context) == "postgres":
        held = [holder._con for holder in client._pool._holders]
        idle = [each for each in held if each is not None and not each.is_closed()]
    else:
        idle = client._pool._pool if kind_of(context) == "psycopg" else client._pool._free
    return {process_of(each) for each in idle}


def process_of(connection: Any) -> int:
    """Return by which number the server knows a connection of one of the drivers."""
    if hasattr(connection, "get_server_pid"):
        return int(connection.get_server_pid())
    if hasattr(connection, "thread_id"):
        return int(connection.thread_id())
    return int(connection.info.backend_pid)
