"""Calling handlers: in order or at once, awaited or not, and what happens when one fails."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from operator import length_hint
from typing import Any, Literal, TypeAlias, TypeVar

from tortoise_auth.clock import utc_now
from tortoise_auth.database import (
    context_outside_transactions,
    current_connection,
    in_caller_transaction,
    is_database_failure,
    is_transaction,
    on_commit,
    translated,
)
from tortoise_auth.events import outbox
from tortoise_auth.events.background import Backend, BackgroundQueue
from tortoise_auth.events.catalog import Event
from tortoise_auth.events.emission import Emission, Nested, invoke, is_handler_failure
from tortoise_auth.events.registry import Registry, Table
from tortoise_auth.events.subscription import Handler, Subscription, describe_handler
from tortoise_auth.exceptions import ConfigurationError, EventError, describe
from tortoise_auth.models import OutboxEntry

logger = logging.getLogger("tortoise_auth.events")

ReturnT = TypeVar("ReturnT")

ErrorPolicy: TypeAlias = Literal["log", "raise", "group"]

_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}

_MAX_CONCURRENT = 3
"""Emits inside more calls of handlers than this run one by one: those in a circle would double."""


class Dispatcher(Registry):
    """Calls the handlers of an event, each in the way it asked for. See `EventEmitter`."""

    def __init__(
        self,
        *,
        propagate_errors: bool = False,
        errors: ErrorPolicy | None = None,
        concurrent: bool = False,
        strict: bool = False,
        on_error: Callable[[EventError], object] | None = None,
        backend: Backend | None = None,
    ) -> None:
        if errors not in (None, "log", "raise", "group") or (propagate_errors and errors == "log"):
            raise ValueError('errors must be "log", "raise" or "group", and fit propagate_errors')
        self.errors: ErrorPolicy = errors or ("raise" if propagate_errors else "log")
        super().__init__(strict=strict)
        self.concurrent = concurrent
        self.backend: Backend = backend if backend is not None else BackgroundQueue()
        self._on_error = on_error
        self._may_run_plainly = not concurrent and self.errors != "group"
        self.relays: set[Callable[[], None]] = set()
        self._stragglers: set[asyncio.Task[Any]] = set()

    @property
    def propagate_errors(self) -> bool:
        """Whether the first failure is raised."""
        return self.errors == "raise"

    async def emit(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run the handlers of *event*, and hand background deliveries over.

        An event that nobody listens to costs nothing. Handlers registered or removed meanwhile
        count from the next emit on. If the caller is cancelled, handlers that had not started
        still run, in a task of their own, before or after the cancellation arrives.

        Example:
            ``await emitter.emit("order_paid", order_id=7)`` or ``await emitter.emit(OrderPaid(7))``

        Args:
            event: A name, with any payload for its handlers, or an event object.

        Raises:
            EventError: A handler failed and ``errors`` is ``"raise"``; or one in the transaction.
            ExceptionGroup: Handlers failed and ``errors`` is ``"group"``.
            TypeError: It is neither; or it is a name, and a durable subscription needs an object.
            ConfigurationError: A durable subscription needs a database, and there is none.
            ServiceUnavailableError: The database did not take the row of a durable subscription.
            BackgroundQueueFull: The queue is full and was made to raise.
        """
        if event.__class__ is str:
            table = self._tables.get(event) or self._table(event)
            if table is None:
                return
            # From here to the end this is as flat as it is because every emit pays for it.
            if not kwargs and len(args) <= table.takes_plainly:
                remaining = iter(table.plain)
                for handler in remaining:
                    try:
                        await handler(*args)
                    except BaseException as failure:  # noqa: BLE001 - sorted out in _after
                        self._after(failure, Emission(event, None, args, kwargs), table, remaining)
                return
            if table.plain:
                calls = iter(table.calls(len(args), kwargs))
                for call in calls:
                    try:
                        await call(args, kwargs)
                    except BaseException as failure:  # noqa: BLE001 - sorted out in _after
                        self._after(failure, Emission(event, None, args, kwargs), table, calls)
                return
        emission = Emission.of(event, args, kwargs)
        table = self._table(emission.name)
        if table is not None:
            await self._deliver(emission, table.subscriptions)

    # ---- for the unit of work and the relay -------------------------------------------------

    async def run(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run some handlers of *event* now, by the error policy of this emitter."""
        emission = Emission.of(event)
        if self.concurrent and not in_caller_transaction():
            await self._run_concurrently(emission, subscriptions)
        else:
            await self._run_in_order(emission, subscriptions)

    async def call(self, event: Event, subscription: Subscription) -> None:
        """Call one handler.

        Raises:
            EventError: It failed.
        """
        await self._call_or_raise(Emission.of(event), subscription)

    def run_detached(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run some handlers of *event* in a task of their own, outside any transaction."""
        self._rescue(Emission.of(event), subscriptions)

    def submit(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run some handlers of *event* in the background, for somebody who has other things to do.

        What happened has happened: a backend that takes no more is logged, whatever its policy.
        """
        try:
            self._submit(Emission.of(event), subscriptions)
        except Exception:
            logger.exception("event '%s' was not delivered in the background", event.name)

    def detach(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Do *work* in a task of its own, outside any transaction; `aclose` waits for it."""
        self._track(
            asyncio.get_running_loop().create_task(
                _logged(work, what), name=what, context=context_outside_transactions()
            )
        )

    def wake_relays(self) -> None:
        """Tell the relays of this process that there may be rows to deliver."""
        for wake in tuple(self.relays):
            wake()

    # ---- inside -----------------------------------------------------------------------------

    async def _deliver(self, emission: Emission, subscriptions: Sequence[Subscription]) -> None:
        by_delivery: dict[str, list[Subscription]] = {}
        for subscription in subscriptions:
            by_delivery.setdefault(subscription.delivery, []).append(subscription)
        for subscription in by_delivery.get("transaction", ()):
            await self._call_or_raise(emission, subscription)
        if "durable" in by_delivery:
            await self._store(emission, by_delivery["durable"])
        inline = by_delivery.get("inline", ())
        try:
            if self.concurrent and not in_caller_transaction():
                await self._run_concurrently(emission, inline)
            else:
                await self._run_in_order(emission, inline)
        finally:
            if "background" in by_delivery:
                await self._hand_over(emission, by_delivery["background"])

    async def _store(self, emission: Emission, durable: Sequence[Subscription]) -> None:
        """Write the rows of a durable delivery where the caller is, in its transaction or not."""
        connection = current_connection(OutboxEntry)
        if connection is None:
            raise ConfigurationError(
                f"{emission.text} has durable subscriptions, which need a database: call "
                'Tortoise.init with "tortoise_auth.models" among the modules'
            )
        if emission.event is None:
            raise TypeError(
                f"{emission.text} has durable subscriptions, which need an event object: emit an "
                "instance of a class of events, not a name"
            )
        await outbox.write(connection, emission.event, durable, utc_now())
        await on_commit(connection, self.wake_relays)

    async def _hand_over(self, emission: Emission, background: Sequence[Subscription]) -> None:
        """Submit to the background: now, or when the transaction of the caller is committed."""
        connection = current_connection(OutboxEntry) if in_caller_transaction() else None
        if connection is None or not is_transaction(connection):
            self._submit(emission, background)
        else:
            await on_commit(connection, lambda: self._submit(emission, background))

    async def _run_in_order(
        self, emission: Emission, subscriptions: Iterable[Subscription], *, rescue: bool = True
    ) -> None:
        remaining = iter(subscriptions)
        failures: list[EventError] = []
        for subscription in remaining:
            try:
                await self._call(emission, subscription)
            except BaseException as failure:
                if not is_handler_failure(failure):
                    if rescue and isinstance(failure, asyncio.CancelledError):
                        self._rescue(emission, list(remaining))
                    raise
                error = self._failed(emission.name, subscription.handler, failure)
                if self.errors == "raise":
                    raise error from failure
                failures.append(error)
        self._raise_group(emission, failures)

    async def _run_concurrently(
        self, emission: Emission, subscriptions: Sequence[Subscription]
    ) -> None:
        if Nested.depth() >= _MAX_CONCURRENT:
            return await self._run_in_order(emission, subscriptions)
        plain = iter([each for each in subscriptions if not each.is_async])
        together = [each for each in subscriptions if each.is_async]
        failures: list[EventError] = []
        try:
            for subscription in plain:
                failures += await self._settle(emission, subscription)
        except asyncio.CancelledError:
            self._rescue(emission, [*plain, *together])
            raise
        failures += await self._settle_together(emission, together)
        if failures and self.errors == "raise":
            self._log(failures[1:])
            raise failures[0] from failures[0].original
        self._raise_group(emission, failures)

    async def _settle_together(
        self, emission: Emission, subscriptions: Sequence[Subscription]
    ) -> list[EventError]:
        if len(subscriptions) == 1:
            return await self._settle(emission, subscriptions[0])
        tasks = [
            self._track(asyncio.create_task(self._settle(emission, each), name=emission.text))
            for each in subscriptions
        ]
        try:
            if tasks:
                await asyncio.wait(tasks)
        except asyncio.CancelledError:  # they go on, and nobody is left to raise their failures to
            for task in tasks:
                task.add_done_callback(self._log_orphan)
            raise
        return [failed for task in tasks for failed in task.result()]

    async def _settle(self, emission: Emission, subscription: Subscription) -> list[EventError]:
        """Call a handler and return its failure, if it failed."""
        try:
            await self._call(emission, subscription)
        except BaseException as failure:
            if not is_handler_failure(failure):
                raise
            return [self._failed(emission.name, subscription.handler, failure)]
        return []

    async def _call_or_raise(self, emission: Emission, subscription: Subscription) -> None:
        try:
            await self._call(emission, subscription)
        except BaseException as failure:
            if not is_handler_failure(failure):
                raise
            raise EventError(
                emission.name, describe_handler(subscription.handler), failure
            ) from failure

    async def _call(self, emission: Emission, subscription: Subscription) -> None:
        if subscription.once and not self._consume(subscription):
            return
        args, kwargs = emission.arguments_for(subscription)
        if subscription.timeout is None:
            await invoke(
                subscription,
                args,
                kwargs,
                lambda call: self.detach(_outlasting(call), emission.text),
            )
            return
        task = self._track(
            asyncio.create_task(invoke(subscription, args, kwargs), name=emission.text)
        )
        try:
            done, _ = await asyncio.wait([task], timeout=subscription.timeout)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()  # and not awaited: a handler may refuse to be cancelled
            raise TimeoutError(f"took longer than {subscription.timeout} s")
        await task

    def _after(
        self,
        failure: BaseException,
        emission: Emission,
        table: Table,
        remaining: Iterator[object],
    ) -> None:
        """Deal with the failure of a handler on the short path of `emit`."""
        if is_handler_failure(failure):
            position = len(table.plain) - length_hint(remaining) - 1
            error = self._failed(emission.name, table.plain[position], failure)
            if self.errors == "raise":
                raise error from failure
        else:
            if isinstance(failure, asyncio.CancelledError):
                left = len(list(remaining))
                self._rescue(emission, table.subscriptions[len(table.subscriptions) - left :])
            raise failure

    def _failed(self, event: str, handler: Handler, failure: BaseException) -> EventError:
        if isinstance(failure, RecursionError) and _inside_another_emit():
            raise failure  # reported once, by the outermost
        error = EventError(event, describe_handler(handler), failure)
        error.__cause__ = failure
        if self.errors == "log":
            self._log([error])
        if self._on_error is not None:
            try:
                self._on_error(error)
            except Exception:  # the error path must not be able to fail
                logger.exception("on_error failed for event %r", event)
        return error

    def _log(self, failures: Iterable[EventError]) -> None:
        for error in failures:
            cause = error.original
            logger.error(
                "%s",
                describe(error).translate(_CONTROL_CHARACTERS),
                exc_info=(type(cause), cause, cause.__traceback__),
            )

    def _log_orphan(self, task: asyncio.Task[list[EventError]]) -> None:
        if self.errors != "log" and not task.cancelled() and task.exception() is None:
            self._log(task.result())

    def _raise_group(self, emission: Emission, failures: list[EventError]) -> None:
        if failures and self.errors == "group":
            raise ExceptionGroup(f"Handlers for event '{emission.name}' failed", failures)

    def _rescue(self, emission: Emission, rest: Sequence[Subscription]) -> None:
        """Run the handlers that had not started when the caller was cancelled."""
        if rest:
            self._track(
                asyncio.get_running_loop().create_task(
                    self._run_quietly(emission, rest),
                    name=emission.text,
                    context=context_outside_transactions(),
                )
            )

    async def _run_quietly(self, emission: Emission, subscriptions: Sequence[Subscription]) -> None:
        """Run handlers for nobody who could catch what they raise, in a context of their own.

        An outbox that takes no row is a failure like that of a handler, and silences no other.
        """
        Nested.forget()
        failures: list[EventError] = []
        together: list[Subscription] = []
        for subscription in subscriptions:
            if subscription.delivery == "durable":
                try:
                    await self._store(emission, [subscription])
                except Exception as failure:  # noqa: BLE001 - whatever it is
                    failures.append(self._failed(emission.name, subscription.handler, failure))
            elif self.concurrent and subscription.is_async:
                together.append(subscription)
            else:
                failures += await self._settle(emission, subscription)
        failures += await self._settle_together(emission, together)
        if self.errors != "log":
            self._log(failures)

    def _submit(self, emission: Emission, subscriptions: Sequence[Subscription]) -> None:
        if subscriptions:
            self.backend.submit(_BackgroundJob(self, emission, subscriptions))

    def _track(self, task: asyncio.Task[ReturnT]) -> asyncio.Task[ReturnT]:
        self._stragglers.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._untrack)
        return task

    def _untrack(self, task: asyncio.Task[Any]) -> None:
        self._stragglers.discard(task)
        if not task.cancelled():
            task.exception()  # what a timed-out handler raises later has been reported as timeout


class _BackgroundJob:
    """Some handlers to run for one emission."""

    __slots__ = ("_emission", "_emitter", "_subscriptions", "description")

    def __init__(
        self, emitter: Dispatcher, emission: Emission, subscriptions: Sequence[Subscription]
    ) -> None:
        self._emitter = emitter
        self._emission = emission
        self._subscriptions = subscriptions
        handlers = ", ".join(describe_handler(each.handler) for each in subscriptions)
        self.description = f"{emission.text} for {handlers}"

    async def __call__(self) -> None:
        await self._emitter._run_quietly(self._emission, self._subscriptions)


async def _outlasting(call: asyncio.Future[object]) -> None:
    await call


async def _logged(work: Coroutine[Any, Any, None], what: str) -> None:
    try:
        await work
    except Exception as error:  # nobody awaits it who could
        if not is_database_failure(error):
            logger.exception("%s failed", what)
            return
        failure = translated(error, what)  # drivers put values into their messages
        logger.error("%s failed: %s", what, failure)


def _inside_another_emit() -> bool:
    frame, found = inspect.currentframe(), 0
    while frame is not None and found < 2:
        found += frame.f_code is Dispatcher.emit.__code__
        frame = frame.f_back
    return found > 1 or Nested.depth() > 0
