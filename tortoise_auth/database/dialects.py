"""Everything that is written in the SQL of one database."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.database.wrappers import root_of
from tortoise_auth.legible import logger_of

logger = logger_of("tortoise_auth.database")


async def run_statement(
    connection: BaseDBAsyncClient, statement: str, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Run a statement of PostgreSQL or SQLite with *values* for the names in its braces.

    Building SQL costs Tortoise more than running it.
    """
    return await connection.execute_query_dict(*_placed(connection, statement, values))


async def count_changed(
    connection: BaseDBAsyncClient, statement: str, values: Mapping[str, Any]
) -> int:
    """Run an UPDATE or DELETE like `run_statement`; return how many rows it changed."""
    changed, _ = await connection.execute_query(*_placed(connection, statement, values))
    return changed


def _placed(
    connection: BaseDBAsyncClient, statement: str, values: Mapping[str, Any]
) -> tuple[str, list[Any]]:
    """Return *statement* with the marks of the database for its names, and the values in order."""
    numbered = connection.capabilities.dialect == "postgres"
    given: list[Any] = []
    placed: dict[str, str] = {}

    def place(name: re.Match[str]) -> str:
        if not numbered or name[1] not in placed:
            given.append(_in_utc(values[name[1]]))
            placed[name[1]] = f"${len(given)}" if numbered else "?"
        return placed[name[1]]

    return re.sub(r"\{(\w+)\}", place, statement), given


def _in_utc(value: object) -> object:
    """Return a time in UTC, as columns hold it: SQLite compares the text."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value


async def notify(connection: BaseDBAsyncClient, channel: str) -> None:
    """Wake every listener on *channel*, on PostgreSQL when the transaction commits."""
    if connection.capabilities.dialect == "postgres":
        await connection.execute_query_dict("SELECT pg_notify($1, '')", [channel])


async def set_mark(transaction: BaseDBAsyncClient, mark: int) -> int | None:
    """Set a number that is rolled back with the innermost open savepoint; return the one before.

    No row is written. PostgreSQL rolls back the settings of a session that are local to the
    transaction, and SQLite the header of its temporary database, with every savepoint.
    """
    if transaction.capabilities.dialect == "postgres":
        statement = f"SELECT {_MARK} AS mark, set_config('tortoise_auth.mark', $1, true)"
        return _as_mark(await transaction.execute_query_dict(statement, [str(mark)]))
    before = await mark_of(transaction)
    await transaction.execute_query_dict(f"PRAGMA temp.user_version = {mark:d}")
    return before


async def mark_of(transaction: BaseDBAsyncClient) -> int | None:
    """Return the number that was set last and has not been rolled back.

    Raises:
        TransactionManagementError: On PostgreSQL a statement failed, so that COMMIT will roll back.
    """
    postgres = transaction.capabilities.dialect == "postgres"
    statement = f"SELECT {_MARK} AS mark" if postgres else "PRAGMA temp.user_version"
    return _as_mark(await transaction.execute_query_dict(statement))


_MARK = "current_setting('tortoise_auth.mark', true)"


def _as_mark(rows: list[dict[str, Any]]) -> int | None:
    value = next(iter(rows[0].values()))
    return int(value) if value else None


class Listener:
    """Calls *wake* when *channel* is notified, on PostgreSQL through asyncpg; else does nothing.

    A convenience that may fail: its user polls as well. It listens on a connection of its
    own, so that no pool is one short. A connection that is lost is opened again; *wake* is called
    then, too, for what was notified meanwhile.
    """

    def __init__(
        self, connection: BaseDBAsyncClient, channel: str, wake: Callable[[], object]
    ) -> None:
        self._client = root_of(connection)
        self._channel = channel
        self._wake = wake
        self._task: asyncio.Task[None] | None = None
        self._listening: Any = None
        self._tried = asyncio.Event()
        self._lost = asyncio.Event()

    async def __aenter__(self) -> Listener:
        if type(self._client).__module__ == "tortoise.backends.asyncpg.client":
            self._task = asyncio.create_task(self._keep_listening())
            try:
                await self._tried.wait()
            except BaseException:
                self._task.cancel()
                raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _keep_listening(self) -> None:
        pauses = _pauses()
        while True:
            self._lost.clear()
            try:
                await self._listen()
                if self._tried.is_set():
                    logger.info("Listening to %s again", self._channel)
                    self._wake()
                self._tried.set()
                pauses = _pauses()
                await self._lost.wait()
                logger.warning("Lost the connection that listens to %s", self._channel)
            except Exception as error:  # noqa: BLE001 - a convenience
                if not self._tried.is_set():
                    logger.warning("Cannot listen to %s (%s)", self._channel, type(error).__name__)
                self._tried.set()
            finally:
                if self._listening is not None:
                    with suppress(Exception):
                        await self._listening.close(timeout=2)
            await asyncio.sleep(next(pauses))

    async def _listen(self) -> None:
        client: Any = self._client
        self._listening = await importlib.import_module("asyncpg").connect(
            host=client.host,
            port=client.port,
            user=client.user,
            password=client.password,
            database=client.database,
            ssl=client.extra.get("ssl"),
            timeout=5,
        )
        self._listening.add_termination_listener(lambda _: self._lost.set())
        await self._listening.add_listener(self._channel, lambda *_: self._wake())


def _pauses() -> Iterator[float]:
    """Return seconds before each further attempt to connect."""
    return itertools.chain((0.1, 1, 2, 5, 10), itertools.repeat(30.0))
