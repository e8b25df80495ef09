"""`EventEmitter`: subscribing, emitting from wherever the program is, and finishing at its end.

Its name is not ``emitter``: ``tortoise_auth.events.emitter`` is the emitter of the application, and
``import tortoise_auth.events.emitter as module`` would bind that object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from operator import length_hint
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from typing_extensions import Unpack

from tortoise_auth.events.background import Backend, BackgroundQueue
from tortoise_auth.events.checks import Decorator, Naming, Options, split_call
from tortoise_auth.events.delivery import Deliverer, ErrorPolicy
from tortoise_auth.events.event import Event
from tortoise_auth.events.invocation import (
    Emitted,
    end_threads,
    is_handler_failure,
    is_inside_another,
)
from tortoise_auth.events.observer import Observer
from tortoise_auth.events.registry import Listening, Registry, Table
from tortoise_auth.events.subscription import Delivery, Handler, Subscription
from tortoise_auth.events.without_loop import OwnLoop, deliver_here
from tortoise_auth.exceptions import EventError
from tortoise_auth.legible import quoted

HandlerT = TypeVar("HandlerT", bound=Handler)
ReturnT = TypeVar("ReturnT")
FirstT = TypeVar("FirstT", bound=Event)
SecondT = TypeVar("SecondT", bound=Event)


class EventEmitter:
    """Calls handlers when something happened.

    By default handlers run one after the other, lower ``priority`` first, ties in the order of
    registration; each sees what the one before did to a mutable payload. A handler that fails is
    logged with its traceback, and the next one runs. Subscriptions may change from any thread.

    Example::

        emitter = EventEmitter()

        @emitter.on("user_login", timeout=2)
        async def audit(user): ...

        @emitter.on(UserLogin, delivery="background")
        async def greet(event: UserLogin[User]): ...

    Args:
        propagate_errors: The same as ``errors="raise"``.
        errors: ``"log"`` failures and go on (default), ``"raise"`` the first as `EventError` and
            stop, or run all and raise them as one `EventErrorGroup` (``"group"``).
        concurrent: Run the handlers of an event at the same time: plain functions are called one
            after the other, then all that is to be awaited is awaited together. No failure cancels
            another handler. Inside a transaction they run one by one, because savepoints of one
            connection cannot overlap.
        strict: Refuse handlers that need arguments which their event never has, and warn of names
            that are nearly those of known events.
        on_error: Called with every `EventError`, whatever the policy: for metrics.
        observer: Called with a `Delivered` after each call of a handler, in every delivery; what it
            raises is logged. It is called where the handler ended, so it must not block.
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
        observer: Observer | None = None,
        backend: Backend | None = None,
    ) -> None:
        if propagate_errors and errors == "log":
            raise ValueError('errors="log" does not fit propagate_errors=True')
        self._registry = Registry(strict=strict)
        self._tables = self._registry.tables
        self._deliverer = Deliverer(
            self._registry,
            concurrent=concurrent,
            backend=backend,
            on_error=on_error,
            observer=observer,
        )
        self.errors = errors if errors is not None else "raise" if propagate_errors else "log"

    # ---- settings ---------------------------------------------------------------------------

    @property
    def errors(self) -> ErrorPolicy:
        """What becomes of a failure: ``"log"``, ``"raise"`` or ``"group"``. It may be changed."""
        return self._deliverer.errors

    @errors.setter
    def errors(self, policy: ErrorPolicy) -> None:
        if policy not in ("log", "raise", "group"):
            raise ValueError(f'errors must be "log", "raise" or "group", not {quoted(policy)}')
        self._deliverer.errors = policy
        self._choose_path()

    @property
    def propagate_errors(self) -> bool:
        """Whether the first failure is raised. It may be changed."""
        return self.errors == "raise"

    @propagate_errors.setter
    def propagate_errors(self, raised: bool) -> None:
        self.errors = "raise" if raised else "log"

    @property
    def observer(self) -> Observer | None:
        """Called with a `Delivered` after each call of a handler. It may be changed."""
        return self._deliverer.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._deliverer.observer = observer
        self._choose_path()

    @property
    def concurrent(self) -> bool:
        """Whether the handlers of an event run at the same time."""
        return self._deliverer.concurrent

    @property
    def strict(self) -> bool:
        """Whether handlers are checked against their events when they are registered."""
        return self._registry.strict

    @property
    def backend(self) -> Backend:
        """What carries out background deliveries."""
        return self._deliverer.backend

    def _choose_path(self) -> None:
        plainly = self.errors != "group" and self.observer is None and not self.concurrent
        self._registry.set_plainly(plainly)

    # ---- subscribing ------------------------------------------------------------------------

    @overload
    def on(
        self, event: type[FirstT], /, **options: Unpack[Options]
    ) -> Callable[[Callable[[FirstT], ReturnT]], Callable[[FirstT], ReturnT]]: ...
    @overload
    def on(
        self,
        event: type[FirstT],
        handler: Callable[[FirstT], ReturnT],
        /,
        **options: Unpack[Options],
    ) -> Callable[[FirstT], ReturnT]: ...
    @overload
    def on(
        self, event: type[FirstT], second: type[SecondT], /, **options: Unpack[Options]
    ) -> Callable[
        [Callable[[FirstT | SecondT], ReturnT]], Callable[[FirstT | SecondT], ReturnT]
    ]: ...
    @overload
    def on(
        self,
        event: type[Event],
        second: type[Event],
        third: type[Event],
        /,
        *more: type[Event],
        **options: Unpack[Options],
    ) -> Callable[[HandlerT], HandlerT]: ...
    @overload
    def on(self, *events: str, **options: Unpack[Naming]) -> Callable[[HandlerT], HandlerT]: ...
    @overload
    def on(self, event: str, handler: HandlerT, /, **options: Unpack[Options]) -> HandlerT: ...
    def on(self, *events: Any, **options: Unpack[Naming]) -> Any:
        """Register a handler: as a decorator, or directly when a function comes last.

        Example::

            @emitter.on("user_login", "user_logout")         # by name: it gets the arguments
            async def audit(user): ...

            @emitter.on(UserLogin)                           # by class: it gets the event
            async def greet(event: UserLogin[User]): ...

            @emitter.on("order.*")                           # by pattern: as by name
            async def count(order_id): ...

            emitter.on("*", record_everything)               # every event, as an object

        A handler names only the arguments it needs: those of the event, any field of its class,
        or ``event`` itself. A class stands for its events and those of every subclass, also of one
        that is declared later. A name with ``*``, ``?`` or ``[`` in it is a pattern, matched as by
        `fnmatch.fnmatchcase`.

        Args:
            *events: Names, patterns, classes, or ``"*"``; then perhaps the handler. Where several
                of them match one event, the handler runs once.
            priority: Lower runs first; 10 by default.
            once: Remove it before its first call.
            delivery: ``"inline"`` (default), ``"transaction"``, ``"background"`` or ``"durable"``.
            timeout: Seconds it may take; a failure after that.
            name: Identifies it, over restarts too; ``module:qualname`` by default.
            thread: Plain functions run on a worker thread unless this is False.

        Returns:
            The function, unchanged.

        Raises:
            SubscriptionError: A `TypeError`; says which handler, which event and what is wrong. On
                a strict emitter also for a pattern that matches no declared name, and for an
                abstract class without a subclass.
        """
        return self._on(events, options)

    @overload
    def once(
        self, event: type[FirstT], /, **options: Unpack[Options]
    ) -> Callable[[Callable[[FirstT], ReturnT]], Callable[[FirstT], ReturnT]]: ...
    @overload
    def once(
        self,
        event: type[FirstT],
        handler: Callable[[FirstT], ReturnT],
        /,
        **options: Unpack[Options],
    ) -> Callable[[FirstT], ReturnT]: ...
    @overload
    def once(
        self, event: type[FirstT], second: type[SecondT], /, **options: Unpack[Options]
    ) -> Callable[
        [Callable[[FirstT | SecondT], ReturnT]], Callable[[FirstT | SecondT], ReturnT]
    ]: ...
    @overload
    def once(
        self,
        event: type[Event],
        second: type[Event],
        third: type[Event],
        /,
        *more: type[Event],
        **options: Unpack[Options],
    ) -> Callable[[HandlerT], HandlerT]: ...
    @overload
    def once(self, *events: str, **options: Unpack[Naming]) -> Callable[[HandlerT], HandlerT]: ...
    @overload
    def once(self, event: str, handler: HandlerT, /, **options: Unpack[Options]) -> HandlerT: ...
    def once(self, *events: Any, **options: Unpack[Naming]) -> Any:
        """Register a handler for one call, as `on` does with ``once=True``.

        It is removed before that call, so that two emits at the same time run it once, and a
        failure does not bring it back.
        """
        return self._on(events, {**options, "once": True})

    def add_listener(
        self, event_name: str | type[Event], handler: Handler, **options: Unpack[Options]
    ) -> None:
        """Register *handler*; see `on` for the options."""
        self._registry.add([event_name], handler, options)

    def remove_listener(self, event_name: str | type[Event], handler: Handler) -> None:
        """Remove the first registration of *handler*.

        Raises:
            ValueError: It is not registered for this event.
        """
        self._registry.remove(event_name, handler)

    def off(self, event_name: str | type[Event], handler: Handler | None = None) -> None:
        """Remove every registration of *handler*, or all handlers of the event; silently."""
        self._registry.off(event_name, handler)

    def clear(self, event_name: str | type[Event] | None = None) -> None:
        """Remove every handler of one event, or of all."""
        self._registry.clear(event_name)

    def listeners(self, event_name: str | type[Event]) -> list[Handler]:
        """Return the functions that an emit would run, in order, as a new list."""
        return [each.handler for each in self._registry.subscriptions(event_name)]

    def subscriptions(
        self, event_name: str | type[Event], delivery: Delivery | None = None
    ) -> tuple[Subscription, ...]:
        """Return the subscriptions that an emit would serve, in order."""
        return self._registry.subscriptions(event_name, delivery)

    def events(self) -> list[str]:
        """Return what there are subscriptions for, sorted: names, patterns, names of classes, ``*``.

        Every subscription is among ``subscriptions(each)`` of these.
        """
        return self._registry.events()

    def known_events(self) -> list[str]:
        """Return the names of all declared events: the library's, and subclasses of `Event`."""
        return self._registry.known_events()

    def describe(self) -> list[Listening]:
        """Return a table of the subscriptions of each event, in the order in which they run."""
        return self._registry.describe()

    def _on(self, events: tuple[Any, ...], options: Naming) -> Any:  # noqa: ANN401 - see the overloads
        named, keywords = split_call(events, options)
        if len(named) < len(events):
            self._registry.add(named, events[-1], keywords)
            return events[-1]

        return Decorator(lambda handler: self._registry.add(named, handler, keywords), named)

    # ---- emitting ---------------------------------------------------------------------------

    async def emit(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run the handlers of *event*, and hand background deliveries over.

        An event without subscriptions costs nothing. Handlers registered or removed meanwhile
        count from the next emit on. If the caller is cancelled, handlers that had not started
        still run, in a task of their own, before or after the cancellation arrives.

        Example:
            ``await emitter.emit("order_paid", order_id=7)`` or ``await emitter.emit(OrderPaid(7))``

        Raises:
            EventError: A handler failed and ``errors`` is ``"raise"``; or one in the transaction.
            EventErrorGroup: Handlers failed and ``errors`` is ``"group"``.
            TypeError: It is neither; or it is a name, and a durable subscription needs an object.
            ConfigurationError: A durable subscription needs a database, and there is none.
            ServiceUnavailableError: The database did not take the row of a durable subscription.
            BackgroundQueueFull: The queue is full and was made to raise.
        """
        if event.__class__ is str:
            table = self._tables.get(event) or self._registry.table(event)
            if table is None:
                return
            # From here to the end this is as flat as it is because every emit pays for it.
            if not kwargs and len(args) <= table.takes_plainly:
                remaining = iter(table.plain)
                for handler in remaining:
                    try:
                        await handler(*args)
                    except BaseException as failure:  # noqa: BLE001 - sorted out in _after
                        self._after(failure, Emitted(event, None, args, kwargs), table, remaining)
                return
            if table.plain:
                calls = iter(table.calls(len(args), kwargs))
                for call in calls:
                    try:
                        await call(args, kwargs)
                    except BaseException as failure:  # noqa: BLE001 - sorted out in _after
                        self._after(failure, Emitted(event, None, args, kwargs), table, calls)
                return
        await self.collect(event, *args, **kwargs)

    async def collect(self, event: str | Event, /, *args: Any, **kwargs: Any) -> list[object]:  # noqa: ANN401
        """Run the handlers of *event* as `emit` does, and return what they returned.

        Background and durable deliveries are handed over as by `emit`, and return nothing here.
        Where failures are logged, a handler that fails is left out; the errors are those of `emit`.

        Returns:
            The results, in the order of the handlers.
        """
        emitted = Emitted.of(event, args, kwargs)
        subscriptions = self._registry.subscriptions(emitted.name)
        return await self._deliverer.deliver(emitted, subscriptions) if subscriptions else []

    def emit_nowait(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run all handlers of *event* in the background; return at once.

        Each handler runs after its calls by earlier emits; different handlers do not wait.

        Warning: it waits for no transaction that is open here, and nothing can be vetoed: what it
        reports must have happened. `emit` waits for the commit with its background handlers.

        Raises:
            RuntimeError: No event loop is running: use `emit_sync`, or `emit_threadsafe` from a
                thread beside it.
            BackgroundQueueFull: There is no room, and the queue was made to raise.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "emit_nowait() needs a running event loop. Use emit_sync() where there is none, or "
                "emit_threadsafe(loop, ...) from another thread."
            ) from None
        emitted = Emitted.of(event, args, kwargs)
        self._deliverer.hand_over(emitted, self._registry.subscriptions(emitted.name))

    def emit_sync(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run all handlers of *event*, async ones too, from code without an event loop.

        It returns when they are done; a backend of your own may take longer for background ones.
        Plain functions run on this thread. An event loop is made only for handlers that need one,
        and is never the current one of the thread.

        Raises:
            RuntimeError: An event loop is running in this thread; await `emit`.
            EventError: As `emit` does.
        """
        if asyncio._get_running_loop() is not None:
            raise RuntimeError(
                "emit_sync() would block the running event loop. Use `await emit(...)`, or "
                "emit_nowait(...)."
            )
        if event.__class__ is str and not (self._tables.get(event) or self._registry.table(event)):
            return
        emitted = Emitted.of(event, args, kwargs)
        with OwnLoop(self._finish_loop) as loop:
            deliver_here(self._deliverer, emitted, self._registry.subscriptions(emitted.name), loop)

    def emit_threadsafe(
        self,
        loop: asyncio.AbstractEventLoop,
        event: str | Event,
        /,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Future[None]:
        """Run `emit` on *loop* from another thread; ``result()`` of the future waits for it."""
        return asyncio.run_coroutine_threadsafe(self.emit(event, *args, **kwargs), loop)

    # ---- finishing --------------------------------------------------------------------------

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

        The emitter works as before afterwards.

        Args:
            timeout: Seconds; after that the rest is cancelled.

        Returns:
            Descriptions of the deliveries that were lost; they have been logged, too.
        """
        return await self._deliverer.finish(timeout)

    async def _finish_loop(self) -> None:
        """Finish what is under way in a loop that `emit_sync` made."""
        if isinstance(self.backend, BackgroundQueue):
            await self.aclose()
        else:  # which may be running in another loop
            await self._deliverer.finish_tasks(None)
        end_threads()

    def _after(
        self,
        failure: BaseException,
        emitted: Emitted,
        table: Table,
        remaining: Iterator[object],
    ) -> None:
        """Handle the failure of a handler on the short path of `emit`."""
        left = length_hint(remaining)
        if not is_handler_failure(failure):
            if isinstance(failure, asyncio.CancelledError):
                list(remaining)  # which ends the loop of `emit`
                rest = table.subscriptions[len(table.subscriptions) - left :]
                self._deliverer.rescue(emitted, rest)
            raise failure
        if isinstance(failure, RecursionError) and is_inside_another(EventEmitter.emit.__code__):
            raise failure  # reported once, by the outermost
        handler = table.plain[len(table.plain) - left - 1]
        error = self._deliverer.failed(emitted.name, handler, failure)
        if self.errors == "raise":
            raise error from failure


def deliverer_of(emitter: EventEmitter) -> Deliverer:
    """Return the inside of *emitter*, for the parts of this library that deliver events themselves."""
    return emitter._deliverer
