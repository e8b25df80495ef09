"""What the tests of delivery share: a handler of each kind, a second look, a cancellation anywhere."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Coroutine, Generator, Iterator
from contextlib import closing, contextmanager
from types import coroutine
from typing import Any, Generic, TypeVar

import asyncpg
import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext

from tests.app import AuditRow
from tests.conftest import POSTGRES_URL
from tests.probes import connection_of, statements
from tortoise_auth import EventEmitter
from tortoise_auth.database import root_of, transactions
from tortoise_auth.events import Event
from tortoise_auth.events.relay import Relay

ReturnT = TypeVar("ReturnT")

Outcome = dict[str, list[str]]
"""The names of the events that reached the handlers of each delivery, in order."""


class Undo(Exception):
    """Raised to roll a transaction back."""


class Ears:
    """A handler of each delivery for some events, and what became of each.

    The handler in the transaction leaves a row, without naming a connection: what counts is
    whether the row stays.
    """

    def __init__(self, emitter: EventEmitter, *events: type[Event]) -> None:
        self.inline: list[Event] = []
        self.background: list[Event] = []
        self.durable: list[Event] = []
        self._emitter = emitter
        for event in events:
            emitter.on(event, self._leave_a_row, delivery="transaction", name=f"{event.name}:row")
            emitter.on(event, self.inline.append, thread=False, name=f"{event.name}:inline")
            emitter.on(
                event,
                self.background.append,
                delivery="background",
                thread=False,
                name=f"{event.name}:background",
            )
            emitter.on(
                event,
                self.durable.append,
                delivery="durable",
                thread=False,
                name=f"{event.name}:durable",
            )

    async def _leave_a_row(self, event: Event) -> None:
        await AuditRow.create(event=event.name, subject=str(event.id))

    async def outcome(self, relay: Relay[Any]) -> Outcome:
        """Let everything arrive that ever will; return it, and forget it.

        Whatever reached a handler is checked to be one and the same event for all of them.
        """
        await quiet(self._emitter)
        await relay.drain()
        kept = await AuditRow.filter(subject__not="").order_by("id")
        heard = [self.inline, self.background, self.durable]
        ids = [[str(event.id) for event in events] for events in heard]
        ids.append([row.subject for row in kept])
        assert all(len(set(each)) == len(each) for each in ids)
        assert all(set(each) <= set(ids[0]) for each in ids)
        outcome = {
            "transaction": [row.event for row in kept],
            "inline": [event.name for event in self.inline],
            "background": [event.name for event in self.background],
            "durable": [event.name for event in self.durable],
        }
        await AuditRow.filter(subject__not="").delete()
        for events in heard:
            events.clear()
        return outcome


def everywhere(*names: str) -> Outcome:
    """Every handler heard these."""
    return {kind: list(names) for kind in ("transaction", "inline", "background", "durable")}


def inline_alone(*names: str) -> Outcome:
    """The inline handlers ran in a transaction of the caller, which was not kept."""
    return everywhere() | {"inline": list(names)}


async def quiet(emitter: EventEmitter) -> None:
    """Wait until nothing is under way: neither handlers nor transactions that are being undone."""
    while transactions._background:
        await asyncio.wait(list(transactions._background))
    await emitter.aclose()


def assert_no_connection_is_held(context: TortoiseContext) -> None:
    """Every connection of the pool is idle; on SQLite nobody holds the lock."""
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


def transaction_class(context: TortoiseContext) -> Any:
    """Return the class of the transactions of a test's database."""
    block: Any = root(context)._in_transaction()
    return type(getattr(block, "client", None) or block.connection)


@contextmanager
def every_statement(context: TortoiseContext) -> Iterator[list[str]]:
    """Note every statement, those that write many rows at once in a transaction too."""
    wrapper = transaction_class(context)
    execute_many = wrapper.execute_many

    async def noted(self: object, query: str, values: list[Any]) -> None:
        seen.append(query)
        await execute_many(self, query, values)

    with statements(context) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper, "execute_many", noted)
        yield seen


def root(context: TortoiseContext) -> BaseDBAsyncClient:
    """Return the database itself, whatever transaction the test is in."""
    return root_of(connection_of(context))


class Cancelled(Generic[ReturnT]):
    """Runs *work* in a task that is cancelled where it awaits for the *step*-th time.

    Args:
        work: What to run.
        step: Counted from 1. If *work* awaits less often, or at 0, it is not cancelled.
        late: Cancel when that for which it waits has come, and before it hears of it.
    """

    def __init__(
        self, work: Coroutine[Any, Any, ReturnT], step: int, *, late: bool = False
    ) -> None:
        self._work = work
        self._step = step
        self._late = late
        self._seen = 0

    @property
    def reached(self) -> bool:
        """Whether *work* awaited as often as that."""
        return 0 < self._step <= self._seen

    async def run(self) -> asyncio.Task[ReturnT]:
        """Return the task when it is over: cancelled if the step was reached."""
        task = asyncio.ensure_future(self._stepping())
        await asyncio.wait([task])
        assert task.cancelled() is self.reached, task
        return task

    async def _stepping(self) -> ReturnT:
        return await self._steps()

    @coroutine
    def _steps(self) -> Generator[Any, Any, ReturnT]:
        resume, value = self._work.send, None
        try:
            while True:
                waited_for = resume(value)
                self._seen += 1
                if self._seen == self._step:
                    self._cancel(waited_for)
                try:
                    resume, value = self._work.send, (yield waited_for)
                except BaseException as error:  # noqa: BLE001 - handed on, as `await` does
                    resume, value = self._work.throw, error
        except StopIteration as stop:
            result: ReturnT = stop.value
            return result

    def _cancel(self, waited_for: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._late and asyncio.isfuture(waited_for):
            waited_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


async def finished(work: Awaitable[ReturnT]) -> ReturnT:
    """Await *work*, and fail rather than hang if it never ends."""
    async with asyncio.timeout(30):
        return await work
