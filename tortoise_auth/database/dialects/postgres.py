"""PostgreSQL, through asyncpg or psycopg."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

from tortoise.backends.base.client import (
    BaseDBAsyncClient,
    PoolConnectionWrapper,
    TransactionalDBClient,
    resolve_password,
)

from tortoise_auth.database.dialects.dialect import Dialect

_MARK = "current_setting('tortoise_auth.mark', true)"


class Postgres(Dialect):
    """PostgreSQL, whatever the driver."""

    language: ClassVar[str] = "postgres"

    async def notify(self, connection: BaseDBAsyncClient, channel: str) -> None:
        """Wake every listener on *channel* when the transaction commits."""
        await self.rows(connection, "SELECT pg_notify({channel}, '')", {"channel": channel})

    def notifying(self, statement: str, channel: str) -> str:
        """Return one statement that does the same and notifies."""
        return f"WITH written AS ({statement}) SELECT pg_notify('{channel}', '')"

    async def set_mark(self, transaction: TransactionalDBClient, mark: int) -> int | None:
        """Set a setting that is local to the transaction, which savepoints roll back."""
        statement = f"SELECT {_MARK} AS mark, set_config('tortoise_auth.mark', {{mark}}, true)"
        (row,) = await self.rows(transaction, statement, {"mark": str(mark)})
        return int(row["mark"]) if row["mark"] else None

    async def mark_of(self, transaction: TransactionalDBClient) -> int | None:
        """Return that setting."""
        (row,) = await transaction.execute_query_dict(f"SELECT {_MARK} AS mark")
        return int(row["mark"]) if row["mark"] else None

    async def refuse_if_failed(self, transaction: TransactionalDBClient) -> None:
        """Ask: PostgreSQL answers the COMMIT of a failed transaction with a rollback and no error."""
        await transaction.execute_script("SELECT 1")


class Asyncpg(Postgres):
    """PostgreSQL, through asyncpg."""

    placeholder: ClassVar[str] = "${}"

    @asynccontextmanager
    async def listening(
        self, client: BaseDBAsyncClient, channel: str, wake: Callable[[], object]
    ) -> AsyncIterator[Callable[[], Awaitable[object]]]:
        """Open a connection on which *wake* is called at each notification."""
        lost = asyncio.Event()
        settings: Any = client
        connection = await importlib.import_module("asyncpg").connect(
            host=settings.host,
            port=settings.port,
            user=settings.user,
            password=settings.password,
            database=settings.database,
            ssl=settings.extra.get("ssl"),
            timeout=5,
        )
        try:
            connection.add_termination_listener(lambda _: lost.set())
            await connection.add_listener(channel, lambda *_: wake())
            yield lost.wait
        finally:
            with suppress(Exception):
                await connection.close(timeout=2)


class Psycopg(Postgres):
    """PostgreSQL, through psycopg 3."""

    placeholder: ClassVar[str] = "%s"

    def prepare(self, client: BaseDBAsyncClient) -> None:
        """Let every connection reach the pool again."""
        pooled: Any = client
        client.acquire_connection = lambda: _Pooled(client, pooled._pool_init_lock)  # type: ignore[method-assign]

    @asynccontextmanager
    async def listening(
        self, client: BaseDBAsyncClient, channel: str, wake: Callable[[], object]
    ) -> AsyncIterator[Callable[[], Awaitable[object]]]:
        """Open a connection on which *wake* is called at each notification."""
        psycopg = importlib.import_module("psycopg")
        settings: Any = client
        ssl = settings.extra.get("ssl")
        # As Tortoise reads the setting.
        mode = "verify-full" if getattr(ssl, "check_hostname", False) else "require"
        connection = await psycopg.AsyncConnection.connect(
            host=settings.host,
            port=settings.port,
            user=settings.user,
            password=await resolve_password(settings.password),
            dbname=settings.database,
            connect_timeout=5,
            autocommit=True,
            **({"sslmode": mode} if ssl else {}),
        )

        async def until_lost() -> None:
            with suppress(psycopg.OperationalError):
                async for _ in connection.notifies():
                    wake()

        try:
            await connection.execute(f"LISTEN {channel}")
            yield until_lost
        finally:
            with suppress(Exception):
                await connection.close()


_returning: set[asyncio.Future[None]] = set()


class _Pooled(PoolConnectionWrapper[Any]):
    """A connection of the pool, for one statement.

    If giving it back is cancelled, psycopg's pool loses it, and with it whoever waits for it.
    """

    __slots__ = ()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:  # noqa: ANN401
        returning = asyncio.ensure_future(super().__aexit__(kind, error, traceback))
        _returning.add(returning)  # the loop itself keeps only weak references
        returning.add_done_callback(_returning.discard)
        await asyncio.shield(returning)
