"""Counters of attempts in the database, which no transaction of the caller takes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from datetime import datetime

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.expressions import Q

from tortoise_auth.database import (
    connection_for,
    is_transaction,
    root_of,
    run_statement,
    wait_uncancelled,
)
from tortoise_auth.models import AttemptCount

MAX_RACES = 100
"""How often a counter that somebody else was faster with is read again."""

_INSERT = """
INSERT INTO tortoise_auth_attempts (key, count, failures, last_at)
VALUES ({key}, {count}, {failures}, {at})
ON CONFLICT (key) DO NOTHING RETURNING key
"""


@dataclass(frozen=True, slots=True, eq=False)
class Count:
    """A counter as it was read; a new one is not in the table yet."""

    key: str
    last_at: datetime
    count: int = 0
    failures: int = 0
    is_new: bool = False


class Counters:
    """The table of counters, which no transaction of the caller takes back.

    On PostgreSQL it is written through a connection outside of that transaction. SQLite has one
    connection: there, what is counted within a transaction is kept in memory until it is over.
    """

    def __init__(self) -> None:
        self._unsaved: dict[str, _Unsaved] = {}
        self._saving: dict[str, asyncio.Task[None]] = {}

    async def read(self, key: str, now: datetime) -> Count:
        """Return a counter; a new one begins *now*."""
        connection = _connection()
        if not is_transaction(connection):
            await self.save()
        elif key in self._unsaved:
            return self._unsaved[key].now
        return await _read(connection, key, now)

    async def swap(self, row: Count, changed: Count) -> bool:
        """Write a counter if it is still as it was read."""
        connection = _connection()
        if not is_transaction(connection):
            return await _swap(connection, row, changed)
        unsaved = self._unsaved.get(row.key, _Unsaved(row, row))
        if unsaved.now is not row:
            return False
        self._unsaved[row.key] = _Unsaved(unsaved.then, replace(changed, is_new=False))
        return True

    async def save(self) -> None:
        """Write what was counted within a transaction, now that it is over."""
        if self._unsaved and not is_transaction(_connection()):
            for key in tuple(self._unsaved):
                await self._save(key)

    async def purge(self, quiet: datetime, forgotten: datetime, locked: int) -> int:
        """Delete the counters that nobody has touched for long.

        Args:
            quiet: Before it, those without failures in a row.
            forgotten: Before it, those with fewer than *locked* of them.
            locked: Failures in a row that are kept for good.
        """
        await self.save()
        counters = AttemptCount.all().using_db(_connection())
        stale = Q(last_at__lt=quiet, failures=0) | Q(last_at__lt=forgotten, failures__lt=locked)
        return await counters.filter(stale).delete()

    async def _save(self, key: str) -> None:
        """Write one of them, once, however many ask for it and whoever of them hangs up."""
        task = self._saving.get(key)
        if task is None:
            task = asyncio.create_task(self._add_unsaved(key, _connection()))
            self._saving[key] = task
            task.add_done_callback(lambda _: self._saving.pop(key, None))
        await wait_uncancelled(task)
        task.result()

    async def _add_unsaved(self, key: str, connection: BaseDBAsyncClient) -> None:
        """Add what was counted to what the counter is by now: another process may have counted, too."""
        for _ in range(MAX_RACES):
            unsaved = self._unsaved[key]
            row = await _read(connection, key, unsaved.now.last_at)
            unsaved = self._unsaved[key]
            if await _swap(connection, row, unsaved.added_to(row)):
                later = self._unsaved.pop(key).now
                if later is not unsaved.now:
                    self._unsaved[key] = _Unsaved(unsaved.now, later)
                return


@dataclass(frozen=True, slots=True, eq=False)
class _Unsaved:
    """A counter as it was before a transaction, and as it is within."""

    then: Count
    now: Count

    def added_to(self, row: Count) -> Count:
        return replace(
            row,
            count=max(row.count + self.now.count - self.then.count, 0),
            failures=max(row.failures + self.now.failures - self.then.failures, 0),
            last_at=max(row.last_at, self.now.last_at),
        )


def _connection() -> BaseDBAsyncClient:
    """Return where counts are written: in a transaction of the caller only if there is no other way."""
    connection = connection_for(AttemptCount)
    if is_transaction(connection) and connection.capabilities.dialect != "sqlite":
        return root_of(connection)
    return connection


async def _read(connection: BaseDBAsyncClient, key: str, now: datetime) -> Count:
    row = await AttemptCount.filter(key=key).using_db(connection).first()
    if row is None:
        return Count(key, now, is_new=True)
    return Count(key, row.last_at, row.count, row.failures)


async def _swap(connection: BaseDBAsyncClient, row: Count, changed: Count) -> bool:
    """Write a counter if it is still as it was read: one statement, whether it is new or not.

    The time is compared, too: after a quiet time a counter of 1 becomes 1 again.
    """
    count, failures, at = changed.count, changed.failures, changed.last_at
    if row.is_new:
        values = {"key": row.key, "count": count, "failures": failures, "at": at}
        return bool(await run_statement(connection, _INSERT, values))
    unchanged = AttemptCount.filter(
        key=row.key, count=row.count, failures=row.failures, last_at=row.last_at
    )
    return bool(
        await unchanged.using_db(connection).update(count=count, failures=failures, last_at=at)
    )
