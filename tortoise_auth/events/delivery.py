"""Delivering: handlers called in order or at once, and what happens when one fails.

`Deliverer` is the inside of an `EventEmitter`. The unit of work, the relay and the flows, which
deliver events in other ways than `emit`, reach it by ``deliverer_of(emitter)``; applications do not
need it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

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
from tortoise_auth.events.background import Backend, BackgroundJob, BackgroundQueue
from tortoise_auth.events.event import Event
from tortoise_auth.events.invocation import (
    Emitted,
    Nested,
    invoke,
    is_handler_failure,
    lane_of,
)
from tortoise_auth.events.observer import Observed, Observer
from tortoise_auth.events.outbox_watch import OutboxWatch
from tortoise_auth.events.registry import Registry
from tortoise_auth.events.serialization import require_storable
from tortoise_auth.events.subscription import Handler, Subscription, describe_handler
from tortoise_auth.exceptions import (
    ConfigurationError,
    EventError,
    EventErrorGroup,
    ServiceUnavailableError,
)
from tortoise_auth.legible import describe, logger_of, named
from tortoise_auth.models import OutboxEntry
from tortoise_auth.threads import ThreadsStuckError

logger = logger_of("tortoise_auth.events")

ReturnT = TypeVar("ReturnT")

ErrorPolicy: TypeAlias = Literal["log", "raise", "group"]

_UNOBSERVED = nullcontext()


class Settled(NamedTuple):
    """What became of a call: its result, or how it failed; neither for a spent ``once``."""

    results: list[object]
    failure: EventError | None = None


class Deliverer:
    """Runs handlers, each in the way that its subscription asked for."""

    def __init__(
        self,
        registry: Registry,
        *,
        concurrent: bool,
        backend: Backend | None,
        on_error: Callable[[EventError], object] | None,
        observer: Observer | None,
    ) -> None:
        self.registry = registry
        self.errors: ErrorPolicy = "log"
        self.concurrent = concurrent
        self.backend: Backend = backend if backend is not None else BackgroundQueue()
        self.observer = observer
        self.relays: set[Callable[[], None]] = set()
        self._watch = OutboxWatch()
        self._on_error = on_error
        self._tasks: set[asyncio.Task[Any]] = set()

    # ---- for the unit of work, the relay and the flows --------------------------------------

    async def run(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run some handlers of *event* now, by the error policy."""
        await self._run(Emitted.of(event), subscriptions)

    async def call(self, event: Event, subscription: Subscription, *, attempt: int = 1) -> None:
        """Call one handler.

        Raises:
            EventError: It failed.
        """
        await self._call_or_raise(Emitted.of(event), subscription, attempt=attempt)

    def submit(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run some handlers of *event* in the background, for a caller that is not to fail by it.

        What happened has happened: a backend that takes no more is logged, whatever its policy.
        """
        try:
            self.hand_over(Emitted.of(event), subscriptions)
        except Exception:
            logger.exception("event '%s' was not delivered in the background", named(event.name))

    def run_spawned(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run some handlers of *event* in a task of their own, outside any transaction."""
        self.rescue(Emitted.of(event), subscriptions)

    def spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Do *work* in a task of its own, outside any transaction; `finish` waits for it."""
        self._track(
            asyncio.get_running_loop().create_task(
                _logged(work, what), name=what, context=context_outside_transactions()
            )
        )

    def wake_relays(self) -> None:
        """Wake the relays of this process: there may be rows to deliver."""
        self._watch.begin()  # there may be no relay
        for wake in tuple(self.relays):
            wake()

    # ---- for the emitter --------------------------------------------------------------------

    async def deliver(
        self, emitted: Emitted, subscriptions: Sequence[Subscription]
    ) -> list[object]:
        """Deliver to each subscription in its way; return what the awaited handlers returned."""
        by_delivery: dict[str, list[Subscription]] = {}
        for subscription in subscriptions:
            by_delivery.setdefault(subscription.delivery, []).append(subscription)
        results: list[object] = []
        for subscription in by_delivery.get("transaction", ()):
            results += await self._call_or_raise(emitted, subscription)
        if "durable" in by_delivery:
            await self._store(emitted, by_delivery["durable"])
        try:
            results += await self._run(emitted, by_delivery.get("inline", ()))
        finally:
            if "background" in by_delivery:
                await self._hand_over_on_commit(emitted, by_delivery["background"])
        return results

    def hand_over(self, emitted: Emitted, subscriptions: Sequence[Subscription]) -> None:
        """Submit a job for each subscription, also after one that the backend did not take.

        Raises:
            Exception: What the backend raised first.
        """
        refused: list[Exception] = []
        for each in subscriptions:
            job = BackgroundJob(
                partial(self._run_quietly, emitted, [each]),
                lane_of(each),
                f"{emitted.text} for {describe_handler(each.handler)}",
            )
            try:
                self.backend.submit(job)
            except Exception as error:  # noqa: BLE001 - raised below
                refused.append(error)
        if refused:
            raise refused[0]

    def rescue(self, emitted: Emitted, rest: Sequence[Subscription]) -> None:
        """Run handlers that had not started when the caller was cancelled."""
        if rest:
            self.spawn(self._run_quietly(emitted, rest), emitted.text)

    def conclude(self, emitted: Emitted, settled: Sequence[Settled]) -> list[object]:
        """Return the results of handlers, or raise their failures, by the error policy."""
        failures = [each.failure for each in settled if each.failure is not None]
        if failures and self.errors == "group":
            raise EventErrorGroup(emitted.name, failures)
        if failures and self.errors == "raise":
            self._log(failures[1:])
            raise failures[0] from failures[0].original
        return [result for each in settled for result in each.results]

    def failed(self, event: str, handler: Handler, failure: BaseException) -> EventError:
        """Return the error for the failure of a handler, having reported it."""
        if isinstance(failure, RecursionError) and Nested.depth() > 0:
            raise failure  # reported once, by the outermost
        error = EventError(event, describe_handler(handler), failure)
        error.__cause__ = failure
        if self.errors == "log":
            self._log([error])
        if self._on_error is not None:
            try:
                self._on_error(error)
            except BaseException as reporting:  # the error path must not be able to fail
                if not is_handler_failure(reporting):
                    raise
                logger.exception("on_error failed for event '%s'", named(event))
        return error

    async def finish(self, timeout: float | None) -> list[str]:  # noqa: ASYNC109 - the deadline is the feature
        """Finish what is under way in this loop, also what that begins.

        Returns:
            Descriptions of what was lost; it has been logged, too.
        """
        now = asyncio.get_running_loop().time
        ends = None if timeout is None else now() + timeout

        def left() -> float | None:
            return None if ends is None else max(0.0, ends - now())

        lost = await self.finish_tasks(left())
        if not isinstance(self.backend, BackgroundQueue):
            lost += await self._leave_backend(left())
            return lost + await self.finish_tasks(left())
        lost += await self.backend.drain(left())
        while not lost and self._under_way():  # what the background began, which may fill it again
            lost += await self.finish_tasks(left())
            lost += await self.backend.drain(left())
        return lost

    async def finish_tasks(self, timeout: float | None) -> list[str]:  # noqa: ASYNC109 - as above
        """Wait for the tasks of handlers in this loop; cancel those that are late, and name them."""
        waiting = self._under_way()
        if not waiting:
            return []
        _, late = await asyncio.wait(waiting, timeout=timeout)
        for task in late:
            task.cancel()
            logger.error("%s was not over when the emitter was closed", task.get_name())
        return [task.get_name() for task in late]

    # ---- inside -----------------------------------------------------------------------------

    async def _store(self, emitted: Emitted, durable: Sequence[Subscription]) -> None:
        """Write the rows of a durable delivery where the caller is, in its transaction or not."""
        connection = current_connection(OutboxEntry)
        if connection is None:
            raise ConfigurationError(
                f"{emitted.text} has durable subscriptions, which need a database: call "
                'Tortoise.init with "tortoise_auth.models" among the modules'
            )
        if emitted.event is None:
            raise TypeError(
                f"{emitted.text} has durable subscriptions, which need an event object: emit an "
                "instance of a class of events, not a name"
            )
        require_storable(emitted.event)
        await outbox.write(connection, emitted.event, durable, utc_now())
        await on_commit(connection, self.wake_relays)

    async def _hand_over_on_commit(
        self, emitted: Emitted, background: Sequence[Subscription]
    ) -> None:
        """Submit to the background: now, or when the transaction of the caller is committed."""
        connection = current_connection(OutboxEntry) if in_caller_transaction() else None
        if connection is None or not is_transaction(connection):
            self.hand_over(emitted, background)
        else:
            await on_commit(connection, partial(self.hand_over, emitted, background))

    async def _run(self, emitted: Emitted, subscriptions: Sequence[Subscription]) -> list[object]:
        """Run handlers by the error policy; return their results."""
        if self.concurrent and len(subscriptions) > 1 and not in_caller_transaction():
            settled = await self._together(emitted, subscriptions)
        else:
            settled = await self._in_order(emitted, subscriptions)
        return self.conclude(emitted, settled)

    async def _in_order(
        self, emitted: Emitted, subscriptions: Iterable[Subscription]
    ) -> list[Settled]:
        remaining = iter(subscriptions)
        settled: list[Settled] = []
        for subscription in remaining:
            try:
                settled.append(await self.settle(emitted, subscription))
            except asyncio.CancelledError:
                self.rescue(emitted, list(remaining))
                raise
            if settled[-1].failure is not None and self.errors == "raise":
                break
        return settled

    async def _together(
        self, emitted: Emitted, subscriptions: Sequence[Subscription]
    ) -> list[Settled]:
        """Call plain functions one after the other, and await all that is to be awaited at once."""
        together = len(subscriptions)
        order = sorted(subscriptions, key=lambda each: each.is_async)  # plain ones first
        tasks: dict[Subscription, asyncio.Task[Settled]] = {}
        try:
            for each in order:
                returned = asyncio.get_running_loop().create_future()
                done = partial(_set, returned)
                settle = self.settle(emitted, each, together=together, returned=done)
                tasks[each] = self._create_task(emitted, settle)
                tasks[each].add_done_callback(done)
                if not each.is_async:
                    await returned
            await asyncio.wait(tasks.values())
        except asyncio.CancelledError:  # they go on, and no caller is left to raise failures to
            for task in tasks.values():
                task.add_done_callback(self._log_orphan)
            self.rescue(emitted, [each for each in order if each not in tasks])
            raise
        return [tasks[each].result() for each in subscriptions]

    async def settle(
        self,
        emitted: Emitted,
        subscription: Subscription,
        *,
        together: int = 1,
        returned: Callable[..., object] = lambda: None,
    ) -> Settled:
        """Call a handler; return what became of it."""
        try:
            results = await self._call(emitted, subscription, together=together, returned=returned)
        except BaseException as failure:
            if not is_handler_failure(failure):
                raise
            return Settled([], self.failed(emitted.name, subscription.handler, failure))
        return Settled(results)

    async def _call_or_raise(
        self, emitted: Emitted, subscription: Subscription, *, attempt: int = 1
    ) -> list[object]:
        try:
            return await self._call(emitted, subscription, attempt=attempt)
        except BaseException as failure:
            if not is_handler_failure(failure):
                raise
            called = describe_handler(subscription.handler)
            raise EventError(emitted.name, called, failure) from failure

    async def _call(
        self,
        emitted: Emitted,
        subscription: Subscription,
        *,
        together: int = 1,
        returned: Callable[..., object] = lambda: None,
        attempt: int = 1,
    ) -> list[object]:
        """Call a handler; return its result, and nothing for a ``once`` that had its call."""
        if subscription.once and not self.registry.consume(subscription):
            return []
        with self.observing(emitted, subscription, attempt):
            args, kwargs = emitted.arguments_for(subscription)
            spawn = partial(self._create_task, emitted)
            result = await invoke(
                subscription, args, kwargs, spawn, together=together, returned=returned
            )
            return [result]

    def observing(
        self, emitted: Emitted, subscription: Subscription, attempt: int = 1
    ) -> AbstractContextManager[None]:
        """Return a block for the call of a handler, whose end the observer gets, if there is one."""
        if self.observer is None:
            return _UNOBSERVED
        return Observed(self.observer, emitted, subscription, attempt)

    async def _run_quietly(self, emitted: Emitted, subscriptions: Sequence[Subscription]) -> None:
        """Run handlers in a context of their own, with no caller to raise failures to.

        An outbox that takes no row is a failure like that of a handler, and keeps no other from
        running.
        """
        Nested.forget()
        settled: list[Settled] = []
        others = [each for each in subscriptions if each.delivery != "durable"]
        for each in subscriptions:
            if each.delivery == "durable":
                try:
                    await self._store(emitted, [each])
                except Exception as failure:  # noqa: BLE001 - whatever it is
                    settled.append(Settled([], self.failed(emitted.name, each.handler, failure)))
        if self.concurrent and len(others) > 1:
            settled += await self._together(emitted, others)
        else:
            for each in others:
                settled.append(await self.settle(emitted, each))
        if self.errors != "log":
            self._log([each.failure for each in settled if each.failure is not None])

    def _log(self, failures: Iterable[EventError]) -> None:
        for error in failures:
            cause = error.original
            if isinstance(cause, ThreadsStuckError) and not cause.first:
                continue  # a handler that hangs is called often: once is enough
            logger.error(
                "%s",
                describe(error),
                exc_info=(type(cause), cause, cause.__traceback__),
            )

    def _log_orphan(self, task: asyncio.Task[Settled]) -> None:
        if self.errors != "log" and not task.cancelled() and task.exception() is None:
            failure = task.result().failure
            self._log([failure] if failure is not None else [])

    def _create_task(
        self,
        emitted: Emitted,
        work: Coroutine[Any, Any, ReturnT],
        context: Context | None = None,
    ) -> asyncio.Task[ReturnT]:
        loop = asyncio.get_running_loop()
        return self._track(loop.create_task(work, name=emitted.text, context=context))

    def _track(self, task: asyncio.Task[ReturnT]) -> asyncio.Task[ReturnT]:
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._untrack)
        return task

    def _untrack(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # what a timed-out handler raises later has been reported as timeout

    def _under_way(self) -> list[asyncio.Task[Any]]:
        """Return the tasks of handlers in this loop, but the one that asks."""
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        return [
            task
            for task in tuple(self._tasks)  # other loops, in other threads, add theirs
            if task.get_loop() is loop and task is not current
        ]

    async def _leave_backend(self, timeout: float | None) -> list[str]:  # noqa: ASYNC109 - as above
        try:
            async with asyncio.timeout(timeout) as scope:
                await self.backend.__aexit__(None, None, None)
        except TimeoutError:
            if not scope.expired():
                raise
            lost = f"what {type(self.backend).__name__} had not finished"
            logger.error("Closed with deliveries lost: %s", lost)
            return [lost]
        return []


def _set(returned: asyncio.Future[None], *_: object) -> None:
    if not returned.done():
        returned.set_result(None)


async def _logged(work: Coroutine[Any, Any, None], what: str) -> None:
    try:
        await work
    except Exception as error:  # nothing awaits it that could
        if not is_database_failure(error):
            logger.exception("%s failed", what)
            return
        failure = translated(error, what)  # and logged, if it is an outage
        if not isinstance(failure, ServiceUnavailableError):
            logger.error("%s failed: %s", what, failure)
