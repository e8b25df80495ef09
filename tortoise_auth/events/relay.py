"""Carries due outbox rows to their handlers: at least once, in order per user, however many relays."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Generic, Self

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.context import sanitize_text
from tortoise_auth.database import (
    Listener,
    connection_for,
    context_outside_transactions,
    in_caller_transaction,
    root_of,
    translates_database_errors,
)
from tortoise_auth.events import outbox
from tortoise_auth.events.catalog import Event, UserEvent, UserT
from tortoise_auth.events.event_emitter import EventEmitter, deliverer_of
from tortoise_auth.events.outbox import Claimed
from tortoise_auth.events.subscription import Subscription
from tortoise_auth.exceptions import EventError
from tortoise_auth.legible import describe, logger_of
from tortoise_auth.models import OutboxEntry, primary_key, user_table

logger = logger_of("tortoise_auth.relay")

_MAX_ERROR_LENGTH = 2000

_RECORD_EVERY = 0.1
"""Seconds. What was delivered is recorded at least so often, however slow the rest of a batch is."""

_PATIENCE = 1.0
"""Seconds. A batch that takes longer goes on by itself, while other rows are delivered."""


class UnreadableRowError(ValueError):
    """The row is no event, and no other program can read it either."""


class UserGoneError(LookupError):
    """The handler needs the user of the event, and the account was deleted meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySettings:
    """How a relay works.

    Attributes:
        batch_size: Rows claimed at once.
        concurrency: How many rows are delivered at the same time: those of one handler and user
            come one after the other.
        max_attempts: Failures after which a row becomes a dead letter.
        lease: How long a claimed row is left alone by other relays; after it the rows of a relay
            that was killed come again. A handler that has not begun within its first half is not
            called; one that has not ended with it has failed.
        backoff: The pause after the first failure; it doubles with each, with jitter.
        max_backoff: The longest pause.
        poll_interval: How often to look without being woken.
        stop_timeout: How long running handlers may go on when the relay stops.

    Raises:
        ValueError: A number or duration is not positive.
    """

    batch_size: int = 100
    concurrency: int = 10
    max_attempts: int = 10
    lease: timedelta = timedelta(seconds=60)
    backoff: timedelta = timedelta(seconds=1)
    max_backoff: timedelta = timedelta(hours=1)
    poll_interval: timedelta = timedelta(seconds=1)
    stop_timeout: timedelta = timedelta(seconds=10)

    def __post_init__(self) -> None:
        for name in ("batch_size", "concurrency", "max_attempts"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"relay: {name} must be a whole number of at least 1")
        for name in ("lease", "backoff", "max_backoff", "poll_interval", "stop_timeout"):
            value = getattr(self, name)
            if not isinstance(value, timedelta) or value <= timedelta(0):
                raise ValueError(f"relay: {name} must be a positive timedelta(seconds=...)")


class Relay(Generic[UserT]):
    """Delivers outbox rows to the durable subscriptions of one emitter.

    Example::

        async with auth.relay():       # in the lifespan of the app
            yield

        delivered = await auth.relay().drain()

    Rows whose subscription this program does not know stay in the table, for the relay that does.

    Args:
        emitter: Whose durable subscriptions are served.
        user_model: Reloaded for handlers by ``event.subject_id``.
        settings: How it works.
        clock: The time.
    """

    def __init__(
        self,
        emitter: EventEmitter,
        user_model: type[UserT],
        settings: RelaySettings | None = None,
        *,
        clock: Clock = utc_now,
    ) -> None:
        self.settings = settings or RelaySettings()
        self.name = f"{socket.gethostname()[:64]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._claims = itertools.count(1)
        self._emitter = emitter
        self._user_model = user_model
        self._clock = clock
        self._woken = asyncio.Event()
        self._running = False
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._places = asyncio.Semaphore(self.settings.concurrency)
        self._batches: set[asyncio.Task[int]] = set()
        self._calls: set[asyncio.Task[None]] = set()

    @translates_database_errors
    async def drain(self) -> int:
        """Deliver everything that is due now; return how many rows were delivered.

        Raises:
            ServiceUnavailableError: The database failed. What was delivered stays delivered.
            ConfigurationError: Tortoise or the tables are not set up.
            RuntimeError: A transaction is open here: it might hold the very rows, and the lock.
        """
        if in_caller_transaction():
            raise RuntimeError("drain() was called inside a transaction; call it when that is over")
        if not self._running:
            self._stopping = False
        delivered = 0
        while batch := await self._claim():
            delivered += await batch.deliver()
            if self._stopping:
                break
        return delivered

    async def run(self) -> None:
        """Deliver until `stop` is called; survive a database that is down."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._woken.set)

        deliverer_of(self._emitter).relays.add(wake)
        self._running = True
        failures = 0
        try:
            async with Listener(connection_for(OutboxEntry), outbox.CHANNEL, wake):
                while not self._stopping:
                    self._woken.clear()
                    try:
                        found = await self._deliver_some()
                        failures = 0
                    except Exception:  # the database is down or restarts: so does everything else
                        logger.exception("Relay %s could not work; it will try again", self.name)
                        found, failures = False, failures + 1
                    if not found:
                        await self._pause(failures)
                await self._end_batches()
        finally:
            deliverer_of(self._emitter).relays.discard(wake)
            for batch in self._batches:
                batch.cancel()
            await self._end_batches()
            self._running = self._stopping = False

    def stop(self) -> None:
        """Claim no more rows and begin no more; `run` returns when the running handlers have.

        Called before `run`, it ends that at once.
        """
        self._stopping = True
        self._woken.set()

    async def __aenter__(self) -> Self:
        """Run in the background of this program.

        Raises:
            ConfigurationError: Tortoise or the models are not set up.
        """
        connection_for(OutboxEntry)
        self._stopping = False  # a stop before it ran was meant for another run
        self._task = asyncio.get_running_loop().create_task(
            self.run(), name=f"relay {self.name}", context=context_outside_transactions()
        )
        self._task.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop within ``stop_timeout``; rows under way are left to their lease."""
        task, self._task = self._task, None
        if task is None:
            return
        self.stop()
        try:
            await asyncio.wait([task], timeout=self.settings.stop_timeout.total_seconds())
        finally:
            if not task.done():
                logger.warning(
                    "Relay %s stopped with handlers running; their rows will come again", self.name
                )
                task.cancel()
        await asyncio.wait([task], timeout=1)

    async def join(self) -> None:
        """Wait until the relay that ``async with`` runs has ended, and raise what ended it.

        It ends by itself only if it can do nothing else: handlers and a database that is down do
        not end it.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
            self._task.result()

    def _ended(self, task: asyncio.Task[None]) -> None:
        asked = self._stopping or self._task is not task
        if task.cancelled() and not asked:
            logger.error("Relay %s was cancelled: it delivers nothing any more", self.name)
        elif not task.cancelled() and (failure := task.exception()) is not None:
            logger.error("Relay %s failed and has ended", self.name, exc_info=failure)

    async def _pause(self, failures: int) -> None:
        seconds = self.settings.poll_interval.total_seconds() * min(2**failures, 30)
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return

    async def _deliver_some(self) -> bool:
        """Deliver a batch, or let it go on by itself if it is slow; false if there is none."""
        async with self._places:  # as long as all are taken, more rows would only wait claimed
            pass
        batch = await self._claim()
        if batch is None:
            return False
        delivering = asyncio.create_task(batch.deliver(), name=f"batch of relay {self.name}")
        self._batches.add(delivering)
        over, _ = await asyncio.wait([delivering], timeout=_PATIENCE)
        if over:
            self._batches.discard(delivering)
            delivering.result()
        else:
            delivering.add_done_callback(self._end_batch)
        return True

    def _end_batch(self, batch: asyncio.Task[int]) -> None:
        self._batches.discard(batch)
        failure = None if batch.cancelled() else batch.exception()
        if failure is not None:
            logger.error("Relay %s could not end a batch", self.name, exc_info=failure)

    async def _end_batches(self) -> None:
        if self._batches:
            await asyncio.wait(self._batches)

    async def _claim(self) -> _Batch[UserT] | None:
        """Claim rows, or set aside what waits behind others until there is something to claim."""
        connection = root_of(connection_for(OutboxEntry))
        known = {
            each.name: each
            for event in self._emitter.events()
            for each in self._emitter.subscriptions(event, "durable")
        }
        loop = asyncio.get_running_loop()
        while True:
            number, began, now = next(self._claims), loop.time(), self._clock()
            # Not the name alone: of two batches of this relay, too, the later must not be disturbed.
            holder = f"{self.name}:{number}"
            rows, set_aside = await outbox.claim(
                connection,
                holder=holder,
                subscriptions=_rotated(sorted(known), number),
                user_table=user_table(self._user_model),
                now=now,
                lease_ends=now + self.settings.lease,
                limit=self.settings.batch_size,
            )
            if rows:
                users = await self._users_of(rows, connection)
                return _Batch(self, connection, holder, known, users, rows, began)
            if not set_aside or self._stopping:
                return None
            await asyncio.sleep(loop.time() - began)  # others may want the database as well

    async def _users_of(
        self, rows: Sequence[Claimed], connection: BaseDBAsyncClient
    ) -> dict[str, UserT]:
        ids = {row.subject_id for row in rows if row.subject_id is not None}
        keys = [key for each in ids if (key := primary_key(self._user_model, each)) is not None]
        users = await self._user_model.filter(pk__in=keys).using_db(connection) if keys else []
        return {str(user.pk): user for user in users}


class _Batch(Generic[UserT]):
    """Rows that one relay claimed together."""

    def __init__(
        self,
        relay: Relay[UserT],
        connection: BaseDBAsyncClient,
        holder: str,
        known: Mapping[str, Subscription],
        users: Mapping[str, UserT],
        rows: Sequence[Claimed],
        began: float,
    ) -> None:
        self._relay = relay
        self._settings = relay.settings
        self._connection = connection
        self._holder = holder
        self._known = known
        self._users = users
        self._now = asyncio.get_running_loop().time
        lease = self._settings.lease.total_seconds()
        self._last_call, self._ends = began + lease / 2, began + lease
        self._rows = rows
        self._delivered: list[Claimed] = []
        self._recorded = 0

    async def deliver(self) -> int:
        """Deliver the rows, those of one line one by one; return the successes."""
        lines: dict[object, list[Claimed]] = {}
        for row in self._rows:
            line = (
                row.id
                if row.subject_id is None
                else (row.subscription, row.user_table, row.subject_id)
            )
            lines.setdefault(line, []).append(row)
        tasks = {asyncio.ensure_future(self._deliver_in_order(each)) for each in lines.values()}
        for task in tasks:  # if `_record` fails, their exceptions are read nowhere else
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        waiting = tasks
        try:
            while waiting:
                _, waiting = await asyncio.wait(waiting, timeout=_RECORD_EVERY)
                await self._record()
        finally:  # with some left if it was cancelled, or the database is down
            for task in waiting:
                task.cancel()
            await self._record()
        for failure in [task.exception() for task in tasks]:
            if failure is not None:
                raise failure
        return self._recorded

    async def _deliver_in_order(self, rows: Sequence[Claimed]) -> None:
        """Deliver rows until one fails; give the rest back, which wait behind it."""
        async with self._relay._places:
            for position, row in enumerate(rows, 1):
                if self._relay._stopping or self._now() > self._last_call:
                    return await self._give_back(rows[position - 1 :])
                try:
                    await self._within_the_lease(row)
                except BaseException as failure:
                    if not _is_failure(failure):
                        raise
                    await self._failed(row, failure)
                    return await self._give_back(rows[position:])
                self._delivered.append(row)

    async def _give_back(self, rows: Sequence[Claimed]) -> None:
        await outbox.release(self._connection, rows, self._holder, self._relay._clock())

    async def _record(self) -> None:
        delivered, self._delivered = self._delivered, []
        await outbox.delete_delivered(self._connection, delivered, self._holder)
        self._recorded += len(delivered)
        if delivered:
            self._relay._woken.set()  # rows behind these have become due

    async def _within_the_lease(self, row: Claimed) -> None:
        task = asyncio.ensure_future(self._call(row))
        self._relay._calls.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._relay._calls.discard)
        try:
            done, _ = await asyncio.wait([task], timeout=self._ends - self._now())
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()  # and not awaited: a handler may refuse to be cancelled
            raise TimeoutError(f"took longer than the lease of {self._settings.lease}")
        await task

    async def _call(self, row: Claimed) -> None:
        subscription = self._subscription(row)
        if row.unreadable is not None:
            raise UnreadableRowError(row.unreadable)
        event = Event.from_dict(row.payload)
        if isinstance(event, UserEvent):
            user = self._users.get(row.subject_id or "")
            if user is None and subscription.requires_user(type(event)):
                raise UserGoneError(f"the user {row.subject_id} was deleted")
            event = replace(event, user=user)
        await deliverer_of(self._relay._emitter).call(event, subscription, attempt=row.attempts)

    def _subscription(self, row: Claimed) -> Subscription:
        """Return the subscription of a row: of several with its name, the one of its event."""
        subscribed = self._relay._emitter.subscriptions(row.event_name, "durable")
        mine = (each for each in subscribed if each.name == row.subscription)
        return next(mine, self._known[row.subscription])

    async def _failed(self, row: Claimed, failure: BaseException) -> None:
        cause = failure.original if isinstance(failure, EventError) else failure
        error = sanitize_text(f"{type(cause).__name__}: {describe(cause)}", _MAX_ERROR_LENGTH)
        now = self._relay._clock()
        hopeless = isinstance(failure, UserGoneError | UnreadableRowError)
        if hopeless or row.attempts >= self._settings.max_attempts:
            logger.error(
                "Outbox row %s (%s for %s) is a dead letter after %s attempts: %r",
                *(row.id, row.event_name, row.subscription, row.attempts, error),
            )
            await outbox.dead_letter(self._connection, row, self._holder, at=now, error=error)
        else:
            logger.warning(
                "Outbox row %s (%s for %s) failed, attempt %s: %r",
                *(row.id, row.event_name, row.subscription, row.attempts, error),
            )
            due_at = now + self._pause_after(row.attempts)
            await outbox.reschedule(self._connection, row, self._holder, due_at=due_at, error=error)

    def _pause_after(self, attempts: int) -> timedelta:
        """Return the back-off: doubled with each attempt, bounded, and spread by up to half."""
        longest = self._settings.max_backoff
        pause = longest
        if attempts < 32:  # beyond that the product would overflow
            pause = min(self._settings.backoff * (1 << (attempts - 1)), longest)
        return pause * (1 - secrets.SystemRandom().random() / 2)


def _rotated(names: Sequence[str], turn: int) -> Sequence[str]:
    """Return *names* from another one on at each turn, so that each is the first at times."""
    at = turn % max(len(names), 1)
    return [*names[at:], *names[:at]]


def _is_failure(failure: BaseException) -> bool:
    """Return whether a handler failed, and not the program or this batch is to end."""
    if isinstance(failure, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() == 0
    return not isinstance(failure, KeyboardInterrupt | SystemExit)
