"""The one way in which a change and its events happen: together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.database import is_transaction, root_of, transaction, when_committed
from tortoise_auth.events import outbox
from tortoise_auth.events.catalog import Event
from tortoise_auth.events.event_emitter import EventEmitter, deliverer_of


class UnitOfWork:
    """A transaction, and the events that become true when it commits.

    Example::

        async with UnitOfWork(connection_for(Order), emitter) as unit:
            await Order.filter(id=7).using_db(unit.connection).update(paid=True)
            unit.record(OrderPaid(order_id=7))
        # committed, and the inline handlers have run

    Before the commit, handlers with ``delivery="transaction"`` run and may veto, and the rows of
    durable deliveries are written. After it inline handlers run, and background deliveries are
    handed over; inside a transaction of the caller those wait for its commit, and vanish with it.

    Attributes:
        connection: The transaction; pass it as ``using_db=`` to every statement.
        committed: The change is kept, whatever is raised: a cancellation, a failure of a handler.
    """

    connection: BaseDBAsyncClient

    def __init__(
        self, connection: BaseDBAsyncClient, emitter: EventEmitter, *, clock: Clock = utc_now
    ) -> None:
        self._outside = connection
        self._emitter = emitter
        self._deliverer = deliverer_of(emitter)
        self._clock = clock
        self._transaction = transaction(connection)
        self._recorded: list[Event] = []
        self._effects: list[Callable[[], object]] = []
        self._handovers: list[Callable[[], None]] = []

    @property
    def committed(self) -> bool:
        """Whether the change is kept."""
        return self._transaction.committed

    def record(self, event: Event) -> None:
        """Emit *event* once the change is committed, and not at all if it is not."""
        self._recorded.append(event)

    def when_committed(self, effect: Callable[[], object]) -> None:
        """Call *effect* after the commit and before any handler: to bring live objects up to date."""
        self._effects.append(effect)

    async def __aenter__(self) -> Self:
        self.connection = await self._transaction.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            await self._transaction.__aexit__(kind, error, traceback)
            return
        try:
            await self._before_commit()
        except BaseException as refusal:
            await self._transaction.__aexit__(type(refusal), refusal, refusal.__traceback__)
            raise
        try:
            await self._transaction.__aexit__(None, None, None)
        except BaseException:
            # Cancelled, or cut off from the database, too late: what happened is told all the same.
            if self.committed:
                self._take_effect()
                self._run_detached(deque(self._recorded))
                self._hand_over()
            raise
        self._take_effect()
        try:
            await self._run_inline()
        finally:
            self._hand_over()

    async def _before_commit(self) -> None:
        for event in self._recorded:
            for subscription in self._emitter.subscriptions(event.name, "transaction"):
                await self._deliverer.call(event, subscription)
            durable = self._emitter.subscriptions(event.name, "durable")
            if durable:
                await outbox.write(self.connection, event, durable, self._clock())
                self._handovers.append(self._deliverer.wake_relays)
            background = self._emitter.subscriptions(event.name, "background")
            if background:
                mark = (
                    await outbox.mark(self.connection, event, self._clock())
                    if self._transaction.nested
                    else None
                )
                self._handovers.append(partial(self._deliverer.submit, event, background, mark))

    def _take_effect(self) -> None:
        for effect in self._effects:
            effect()

    async def _run_inline(self) -> None:
        pending = deque(self._recorded)
        try:
            while pending:
                event = pending.popleft()
                await self._deliverer.run(event, self._emitter.subscriptions(event.name, "inline"))
        except BaseException:
            self._run_detached(pending)  # one event's failure does not silence the next
            raise

    def _run_detached(self, events: deque[Event]) -> None:
        for event in events:
            self._deliverer.run_spawned(event, self._emitter.subscriptions(event.name, "inline"))

    def _hand_over(self) -> None:
        for handover in self._handovers:
            when_committed(self._outside, handover)


async def report(
    *events: Event,
    connection: BaseDBAsyncClient,
    emitter: EventEmitter,
    clock: Clock = utc_now,
) -> None:
    """Tell what happened although no change of ours did: a login failed.

    Inside a transaction of the caller, durable and background deliveries do not wait for it and
    survive its rollback: a failure happened even if what was tried around it did not. A caller who
    hangs up, or a handler that raises, silences none of the events.

    Raises:
        EventError: A handler in the transaction, or an inline one if the emitter says so, failed.
    """
    pending = deque(events)
    try:
        while pending:
            await _report(pending.popleft(), connection, emitter, clock)
    except BaseException:
        report_detached(*pending, connection=connection, emitter=emitter, clock=clock)
        raise


def report_detached(
    *events: Event, connection: BaseDBAsyncClient, emitter: EventEmitter, clock: Clock = utc_now
) -> None:
    """Tell the same in a task of its own, for a caller who is gone."""
    for event in events:
        outside = root_of(connection)
        deliverer_of(emitter).spawn(
            _report(event, outside, emitter, clock), f"report of {event.name}"
        )


async def _report(
    event: Event, connection: BaseDBAsyncClient, emitter: EventEmitter, clock: Clock
) -> None:
    transactional = emitter.subscriptions(event.name, "transaction")
    durable = emitter.subscriptions(event.name, "durable")
    if (transactional or durable) and not is_transaction(connection):
        unit = UnitOfWork(connection, emitter, clock=clock)
        try:
            async with unit:
                unit.record(event)
        except asyncio.CancelledError:
            if not unit.committed:
                report_detached(event, connection=connection, emitter=emitter, clock=clock)
            raise
        return
    if transactional:
        async with transaction(connection):
            for subscription in transactional:
                await deliverer_of(emitter).call(event, subscription)
    if durable:
        # Another connection, in a task that nobody waits for: in the caller's transaction the row
        # would go with a rollback, and to wait for a second connection here is a deadlock.
        deliverer_of(emitter).spawn(
            _write(event, connection, emitter, clock), f"outbox row of {event.name}"
        )
    try:
        await deliverer_of(emitter).run(event, emitter.subscriptions(event.name, "inline"))
    finally:
        deliverer_of(emitter).submit(event, emitter.subscriptions(event.name, "background"))


async def _write(
    event: Event, connection: BaseDBAsyncClient, emitter: EventEmitter, clock: Clock
) -> None:
    durable = emitter.subscriptions(event.name, "durable")
    async with transaction(root_of(connection)) as own:
        await outbox.write(own, event, durable, clock())
    deliverer_of(emitter).wake_relays()
