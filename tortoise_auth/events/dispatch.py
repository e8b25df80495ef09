"""Calling handlers: in order or at once, awaited or not, and what happens when one fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from operator import length_hint
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

from tortoise_auth.database import context_outside_transactions, in_caller_transaction
from tortoise_auth.events.background import Backend, BackgroundQueue
from tortoise_auth.events.catalog import Event, NamedEvent
from tortoise_auth.events.registry import Registry, Table
from tortoise_auth.events.subscription import (
    EVERYTHING,
    Arguments,
    Handler,
    Subscription,
    describe_handler,
)
from tortoise_auth.exceptions import EventError, describe

logger = logging.getLogger("tortoise_auth.events")

ReturnT = TypeVar("ReturnT")

ErrorPolicy: TypeAlias = Literal["log", "raise", "group"]

_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


class EventEmitter(Registry):
    """Calls handlers when something happened.

    By default handlers run one after the other, lower ``priority`` first, ties in the order of
    registration; each sees what the one before did to a mutable payload. A handler that fails is
    logged with its traceback, and the next one runs.

    Example::

        emitter = EventEmitter()

        @emitter.on("user_login", timeout=2)
        async def audit(user): ...

        @emitter.on(UserLogin, delivery="background")
        async def greet(event: UserLogin[User]): ...

    Args:
        propagate_errors: The same as ``errors="raise"``.
        errors: ``"log"`` failures and go on (default), ``"raise"`` the first as `EventError` and
            stop, or run all and raise one ``ExceptionGroup`` of them (``"group"``).
        concurrent: Run the async handlers of an event at the same time, after the plain functions.
            No failure cancels another handler. Inside a transaction they run one by one, because
            savepoints of one connection cannot overlap.
        strict: Refuse handlers that need arguments which their event never has, and warn of names
            that are nearly those of known events.
        on_error: Called with every `EventError`, whatever the policy: for metrics.
        backend: Carries out background deliveries; by default a `BackgroundQueue` in memory.

    Raises:
        ValueError: ``errors`` is unknown, or contradicts ``propagate_errors``.
    """

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
        self._stragglers: set[asyncio.Task[Any]] = set()

    @property
    def propagate_errors(self) -> bool:
        """Whether the first failure is raised."""
        return self.errors == "raise"

    # ---- emitting ---------------------------------------------------------------------------

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
            EventError: A handler failed and ``errors`` is ``"raise"``.
            ExceptionGroup: Handlers failed and ``errors`` is ``"group"``.
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
                        self._after(failure, _Payload(event, None, args, kwargs), table, remaining)
                return
            if table.plain:
                calls = iter(table.calls(len(args), kwargs))
                for call in calls:
                    try:
                        await call(args, kwargs)
                    except BaseException as failure:  # noqa: BLE001 - sorted out in _after
                        self._after(failure, _Payload(event, None, args, kwargs), table, calls)
                return
        payload = _Payload.of(event, args, kwargs)
        table = self._table(payload.name)
        if table is not None:
            await self._deliver(payload, table.subscriptions)

    def emit_nowait(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run all handlers of *event* in the background, after those of earlier calls; return at once.

        Raises:
            RuntimeError: No event loop is running: use `emit_sync`, or `emit_threadsafe` from a
                thread beside it.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "emit_nowait() needs a running event loop. Use emit_sync() where there is none, or "
                "emit_threadsafe(loop, ...) from another thread."
            ) from None
        payload = _Payload.of(event, args, kwargs)
        self._submit(payload, self.subscriptions(payload.name))

    def emit_sync(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run all handlers of *event*, async ones too, from code without an event loop.

        Returns when they are done, those in the background included.

        Raises:
            RuntimeError: An event loop is running in this thread; await `emit`.
            EventError: As `emit` does.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._emit_and_drain(event, args, kwargs))
        else:
            raise RuntimeError(
                "emit_sync() would block the running event loop. Use `await emit(...)`, or "
                "emit_nowait(...)."
            )

    def emit_threadsafe(
        self,
        loop: asyncio.AbstractEventLoop,
        event: str | Event,
        /,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> concurrent.futures.Future[None]:
        """Run `emit` on *loop* from another thread.

        Returns:
            A future of that thread's world; ``result()`` waits for the handlers.
        """
        return asyncio.run_coroutine_threadsafe(self.emit(event, *args, **kwargs), loop)

    # ---- background -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start the backend, where it has something to start; the built-in one has not."""
        await self.backend.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self, timeout: float | None = None) -> list[str]:  # noqa: ASYNC109 - the deadline is the feature
        """Finish what is under way in the background, also what that emits; then stop.

        The emitter works on as before afterwards.

        Args:
            timeout: Seconds; after that the rest is cancelled.

        Returns:
            Descriptions of the deliveries that were lost; they have been logged, too.
        """
        lost: list[str] = []
        others = self._stragglers - {asyncio.current_task()}
        if others:
            _, late = await asyncio.wait(others, timeout=timeout)
            for task in late:
                task.cancel()
                lost.append(task.get_name())
        if isinstance(self.backend, BackgroundQueue):
            return lost + await self.backend.drain(timeout)
        async with asyncio.timeout(timeout):
            await self.backend.__aexit__(None, None, None)
        return lost

    # ---- for the unit of work ---------------------------------------------------------------

    async def run(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run the handlers of some subscriptions to *event* now, by this emitter's error policy."""
        await self._deliver(_Payload.of(event, (), {}), subscriptions)

    def submit(self, event: Event, subscriptions: Sequence[Subscription]) -> None:
        """Run the handlers of some subscriptions to *event* in the background."""
        self._submit(_Payload.of(event, (), {}), subscriptions)

    async def call(self, event: Event, subscription: Subscription) -> None:
        """Call one handler.

        Raises:
            EventError: It failed.
        """
        payload = _Payload.of(event, (), {})
        try:
            await self._call(payload, subscription)
        except BaseException as failure:
            if not _is_handler_failure(failure):
                raise
            raise EventError(
                payload.name, describe_handler(subscription.handler), failure
            ) from failure

    # ---- inside -----------------------------------------------------------------------------

    async def _deliver(self, payload: _Payload, subscriptions: Sequence[Subscription]) -> None:
        background = [each for each in subscriptions if each.delivery == "background"]
        awaited = [each for each in subscriptions if each.delivery != "background"]
        try:
            if self.concurrent and not in_caller_transaction():
                await self._run_concurrently(payload, awaited)
            else:
                await self._run_in_order(payload, awaited)
        finally:
            if background:
                self._submit(payload, background)

    async def _run_in_order(
        self, payload: _Payload, subscriptions: Iterable[Subscription], *, rescue: bool = True
    ) -> None:
        remaining = iter(subscriptions)
        failures: list[EventError] = []
        for subscription in remaining:
            try:
                await self._call(payload, subscription)
            except BaseException as failure:
                if not _is_handler_failure(failure):
                    if rescue and isinstance(failure, asyncio.CancelledError):
                        self._rescue(payload, list(remaining))
                    raise
                error = self._failed(payload.name, subscription.handler, failure)
                if self.errors == "raise":
                    raise error from failure
                failures.append(error)
        self._raise_group(payload, failures)

    async def _run_concurrently(
        self, payload: _Payload, subscriptions: Sequence[Subscription]
    ) -> None:
        first = [each for each in subscriptions if each.threaded]
        together = [each for each in subscriptions if not each.threaded]
        failures = [
            failed for each in first if (failed := await self._settle(payload, each)) is not None
        ]
        if len(together) == 1:
            outcomes = [await self._settle(payload, together[0])]
        else:
            tasks = [
                self._track(asyncio.create_task(self._settle(payload, each), name=payload.text))
                for each in together
            ]
            if tasks:
                await asyncio.wait(tasks)  # cancelled, it leaves them running, and tracked
            outcomes = [task.result() for task in tasks]
        failures += [failed for failed in outcomes if failed is not None]
        if failures and self.errors == "raise":
            raise failures[0] from failures[0].original
        self._raise_group(payload, failures)

    async def _settle(self, payload: _Payload, subscription: Subscription) -> EventError | None:
        try:
            await self._call(payload, subscription)
        except BaseException as failure:
            if not _is_handler_failure(failure):
                raise
            return self._failed(payload.name, subscription.handler, failure)
        return None

    async def _call(self, payload: _Payload, subscription: Subscription) -> None:
        if subscription.once and not self._consume(subscription):
            return
        args, kwargs = payload.arguments_for(subscription)
        if subscription.timeout is None:
            await _invoke(subscription, args, kwargs)
            return
        task = self._track(
            asyncio.create_task(_invoke(subscription, args, kwargs), name=payload.text)
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
        payload: _Payload,
        table: Table,
        remaining: Iterator[object],
    ) -> None:
        """Deal with the failure of a handler on the short path of `emit`."""
        if _is_handler_failure(failure):
            position = len(table.plain) - length_hint(remaining) - 1
            error = self._failed(payload.name, table.plain[position], failure)
            if self.errors == "raise":
                raise error from failure
        else:
            if isinstance(failure, asyncio.CancelledError):
                left = len(list(remaining))
                self._rescue(payload, table.subscriptions[len(table.subscriptions) - left :])
            raise failure

    def _failed(self, event: str, handler: Handler, failure: BaseException) -> EventError:
        if isinstance(failure, RecursionError) and _inside_another_emit():
            raise failure  # reported once, by the outermost
        error = EventError(event, describe_handler(handler), failure)
        error.__cause__ = failure
        if self.errors == "log":
            logger.error(
                "%s",
                describe(error).translate(_CONTROL_CHARACTERS),
                exc_info=(type(failure), failure, failure.__traceback__),
            )
        if self._on_error is not None:
            try:
                self._on_error(error)
            except Exception:  # the error path must not be able to fail
                logger.exception("on_error failed for event %r", event)
        return error

    def _raise_group(self, payload: _Payload, failures: list[EventError]) -> None:
        if failures and self.errors == "group":
            raise ExceptionGroup(f"Handlers for event '{payload.name}' failed", failures)

    def _rescue(self, payload: _Payload, rest: Sequence[Subscription]) -> None:
        """Run the handlers that had not started when the caller was cancelled."""
        if rest:
            self._track(
                asyncio.get_running_loop().create_task(
                    self._run_quietly(payload, rest),
                    name=payload.text,
                    context=context_outside_transactions(),
                )
            )

    async def _run_quietly(self, payload: _Payload, subscriptions: Sequence[Subscription]) -> None:
        """Run handlers for nobody who could catch what they raise."""
        for subscription in subscriptions:
            failed = await self._settle(payload, subscription)
            if failed is not None and self.errors != "log":
                logger.error("%s", describe(failed).translate(_CONTROL_CHARACTERS), exc_info=failed)

    def _submit(self, payload: _Payload, subscriptions: Sequence[Subscription]) -> None:
        if subscriptions:
            self.backend.submit(_BackgroundJob(self, payload, subscriptions))

    async def _emit_and_drain(
        self, event: str | Event, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            await self.emit(event, *args, **kwargs)
        finally:
            await self.aclose()

    def _track(self, task: asyncio.Task[ReturnT]) -> asyncio.Task[ReturnT]:
        self._stragglers.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._untrack)
        return task

    def _untrack(self, task: asyncio.Task[Any]) -> None:
        self._stragglers.discard(task)
        if not task.cancelled():
            task.exception()  # what a timed-out handler raises later has been reported as timeout


class _Payload:
    """What is emitted: an event object, or a name and arguments."""

    __slots__ = ("args", "event", "kwargs", "name")

    def __init__(
        self, name: str, event: Event | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.name = name
        self.event = event
        self.args = args
        self.kwargs = kwargs

    @classmethod
    def of(cls, event: str | Event, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Payload:
        if isinstance(event, str):
            return cls(event, None, args, kwargs)
        if not isinstance(event, Event):
            raise TypeError(f"emit() takes the name of an event or an event object, not {event!r}")
        if args or kwargs:
            raise TypeError("emit() takes an event object alone: its fields are the payload")
        return cls(event.name, event, args, kwargs)

    @property
    def text(self) -> str:
        return f"event '{self.name}'"

    def arguments_for(self, subscription: Subscription) -> Arguments:
        if self.event is not None:
            return subscription.arguments_from(self.event)
        if subscription.event == EVERYTHING:
            return [NamedEvent.of(self.name, self.args, self.kwargs)], {}
        if subscription.wants_event:
            raise TypeError(
                f"it listens to the class of '{self.name}' and needs an event object, but the "
                "event was emitted by name"
            )
        count, names = subscription.takes.fit(len(self.args), tuple(self.kwargs))
        return self.args[:count], {name: self.kwargs[name] for name in names}


class _BackgroundJob:
    """Some handlers to run for one payload."""

    __slots__ = ("_emitter", "_payload", "_subscriptions", "description")

    def __init__(
        self, emitter: EventEmitter, payload: _Payload, subscriptions: Sequence[Subscription]
    ) -> None:
        self._emitter = emitter
        self._payload = payload
        self._subscriptions = subscriptions
        handlers = ", ".join(describe_handler(each.handler) for each in subscriptions)
        self.description = f"{payload.text} for {handlers}"

    def __call__(self) -> Awaitable[None]:
        return self._emitter._run_quietly(self._payload, self._subscriptions)


async def _invoke(subscription: Subscription, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if subscription.threaded:
        result = await asyncio.to_thread(subscription.handler, *args, **kwargs)
    else:
        result = subscription.handler(*args, **kwargs)
    if result is not None and inspect.isawaitable(result):
        await result


def _is_handler_failure(failure: BaseException) -> bool:
    """Tell what a handler did wrong from what is done to its caller."""
    if isinstance(failure, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() == 0
    return isinstance(failure, Exception)


def _inside_another_emit() -> bool:
    running = {
        code.__code__
        for code in (EventEmitter.emit, EventEmitter._run_in_order, EventEmitter._run_concurrently)
    }
    frame, found = inspect.currentframe(), 0
    while frame is not None and found < 2:
        found += frame.f_code in running
        frame = frame.f_back
    return found > 1


emitter = EventEmitter(strict=True)
"""The emitter that models and services use unless they are given another."""

on = emitter.on
once = emitter.once
off = emitter.off
emit = emitter.emit
emit_nowait = emitter.emit_nowait
emit_sync = emitter.emit_sync
add_listener = emitter.add_listener
remove_listener = emitter.remove_listener
