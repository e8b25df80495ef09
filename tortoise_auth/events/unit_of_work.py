"""The one way in which a change and its events happen: together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.database import (
    attach,
    is_transaction,
    pending_effects,
    root_of,
    transaction,
)
from tortoise_auth.events import outbox
from tortoise_auth.events.catalog import Event
from tortoise_auth.events.event_emitter import EventEmitter, deliverer_of
from tortoise_auth.events.serialization import require_storable
from tortoise_auth.events.subscription import Delivery, Subscription
from tortoise_auth.legible import describe, logger_of

logger = logger_of("tortoise_auth.events")


class UnitOfWork:
    """A transaction, and the events that become true when it commits.

    Example::

        async with UnitOfWork(connection_for(Order), emitter) as unit:
            await Order.filter(id=7).using_db(unit.connection).update(paid=True)
            unit.set_on_commit(order, paid=True)
            unit.record(OrderPaid(order_id=7))
        # committed, and the inline handlers have run

    Before the commit, handlers with ``delivery="transaction"`` run and may veto, and the rows of
    durable deliveries are written. After it live objects are changed, inline handlers run, and
    background deliveries are handed over. Inside a transaction of the caller all of that waits for
    the outermost commit, which awaits the inline handlers, and none of it follows a rollback, be it
    of a savepoint in between.

    Attributes:
        connection: The transaction; pass it as ``using_db=`` to every statement.
        committed: The change is kept, whatever is raised: a cancellation, a failure of a handler.
            Inside a transaction of the caller it is kept as far as that is.
    """

    connection: BaseDBAsyncClient

    def __init__(
        self, connection: BaseDBAsyncClient, emitter: EventEmitter, *, clock: Clock = utc_now
    ) -> None:
        self._emitter = emitter
        self._clock = clock
        self._outcome = Outcome(emitter)
        self._transaction = transaction(connection, apply=self._outcome.apply)

    @property
    def committed(self) -> bool:
        """Whether the change is kept."""
        return self._transaction.committed

    def record(self, event: Event) -> None:
        """Emit *event* once the change is committed, and not at all if it is not.

        Raises:
            ValueError: A field holds text, or a number, that not every database can store.
        """
        require_storable(event)
        self._outcome.events.append(event)

    def set_on_commit(self, instance: object, **values: object) -> None:
        """Set attributes of a live object after the outermost commit, before any handler of it."""
        self._outcome.values.append((instance, values))

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
        nested = self._transaction.nested
        try:
            await self._transaction.__aexit__(None, None, None)
        except BaseException:
            # Cancelled, or cut off from the database, too late: it happened all the same.
            # A nested one hangs on the commit of the caller: it is delivered there, and not twice.
            if self.committed and not nested:
                self._outcome.deliver_detached()
            raise
        if not nested:
            await self._outcome.deliver_or_raise()

    async def _before_commit(self) -> None:
        outcome = self._outcome
        for event in outcome.events:
            for subscription in self._emitter.subscriptions(event.name, "transaction"):
                await deliverer_of(self._emitter).call(event, subscription)
            durable = self._emitter.subscriptions(event.name, "durable")
            if durable:
                await outbox.write(self.connection, event, durable, self._clock())
                outcome.wakes_relays = True
        # Inside the savepoint, so that its rollback drops it; and not for nothing: it costs one or
        # two statements, 0.2 to 0.5 ms.
        if self._transaction.nested and not outcome.is_empty():
            await attach(self.connection, outcome)


class Outcome:
    """What follows when a unit of work is committed.

    Attributes:
        events: What happened, in order.
        values: Live objects, and the attributes that they get.
        wakes_relays: Durable rows were written.
    """

    def __init__(self, emitter: EventEmitter) -> None:
        self.events: list[Event] = []
        self.values: list[tuple[object, dict[str, object]]] = []
        self.wakes_relays = False
        self._emitter = emitter

    @property
    def awaited(self) -> bool:
        """Whether there are inline handlers."""
        return any(self._subscriptions(event, "inline") for event in self.events)

    def is_empty(self) -> bool:
        """Return whether nothing follows."""
        return not (self.values or self.wakes_relays or self.awaited) and not any(
            self._subscriptions(event, "background") for event in self.events
        )

    def apply(self) -> None:
        """Bring live objects up to date with what was committed."""
        for instance, values in self.values:
            for name, value in values.items():
                setattr(instance, name, value)

    async def deliver_or_raise(self) -> None:
        """Run the inline handlers by the error policy of the emitter; hand the rest over."""
        pending = deque((event, self._subscriptions(event, "inline")) for event in self.events)
        try:
            while pending:
                await deliverer_of(self._emitter).run(*pending.popleft())
        finally:  # one event's failure does not silence the next
            self._hand_over(pending)

    async def deliver(self) -> None:
        """Do the same, and log what fails: the commit is the caller's, and it stands."""
        pending = deque(
            (event, group) for event in self.events for group in self._inline_groups(event)
        )
        try:
            while pending:
                try:
                    await deliverer_of(self._emitter).run(*pending.popleft())
                except Exception as failure:
                    # With `errors="group"` it is one `EventErrorGroup`: each handler gets a line of
                    # its own.
                    for each in getattr(failure, "exceptions", [failure]):
                        logger.error("%s", describe(each), exc_info=each)
        finally:
            self._hand_over(pending)

    def deliver_detached(self) -> None:
        """Do the same in tasks of their own, for a caller that was cancelled."""
        self._hand_over((event, self._subscriptions(event, "inline")) for event in self.events)

    def _hand_over(self, inline: Iterable[tuple[Event, Sequence[Subscription]]]) -> None:
        for event, subscriptions in inline:
            deliverer_of(self._emitter).run_spawned(event, subscriptions)
        for event in self.events:
            deliverer_of(self._emitter).submit(event, self._subscriptions(event, "background"))
        if self.wakes_relays:
            deliverer_of(self._emitter).wake_relays()

    def _inline_groups(self, event: Event) -> list[Sequence[Subscription]]:
        """Return the inline handlers of *event*, those together that run at the same time.

        One by one, because with ``errors="raise"`` a failure would keep those behind it from running.
        """
        subscriptions = self._subscriptions(event, "inline")
        if self._emitter.concurrent:
            return [subscriptions]
        return [[subscription] for subscription in subscriptions]

    def _subscriptions(self, event: Event, delivery: Delivery) -> Sequence[Subscription]:
        return self._emitter.subscriptions(event.name, delivery)


async def pending_values(instance: object) -> frozenset[str]:
    """Return the attributes of *instance* that change when the transaction that is open here commits."""
    return frozenset(
        name
        for effect in await pending_effects(take=False)
        if isinstance(effect, Outcome)
        for changed, values in effect.values
        if changed is instance
        for name in values
    )


async def emit_failure(
    *events: Event,
    connection: BaseDBAsyncClient,
    emitter: EventEmitter,
    clock: Clock = utc_now,
) -> None:
    """Emit what happened although no change of ours did: a login failed.

    Inside a transaction of the caller no delivery waits for it, and all survive its rollback: a
    failure happened even if what was tried around it did not. A cancelled caller, or a handler that
    raises, silences none of the events.

    Raises:
        EventError: A handler in the transaction, or an inline one if the emitter says so, failed.
    """
    pending = deque(events)
    try:
        while pending:
            await _emit_failure(pending.popleft(), connection, emitter, clock)
    except BaseException:
        emit_failure_detached(*pending, connection=connection, emitter=emitter, clock=clock)
        raise


def emit_failure_detached(
    *events: Event, connection: BaseDBAsyncClient, emitter: EventEmitter, clock: Clock = utc_now
) -> None:
    """Emit the same in a task of its own, for a caller that was cancelled."""
    for event in events:
        outside = root_of(connection)
        deliverer_of(emitter).spawn(
            _emit_failure(event, outside, emitter, clock), f"emission of event '{event.name}'"
        )


async def _emit_failure(
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
                emit_failure_detached(event, connection=connection, emitter=emitter, clock=clock)
            raise
        return
    if transactional:
        # A savepoint: after a statement of a handler that failed PostgreSQL refuses all others of
        # the caller.
        async with transaction(connection):
            for subscription in transactional:
                await deliverer_of(emitter).call(event, subscription)
    if durable:
        # Another connection, in a task that is not awaited: in the caller's transaction the row
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
