"""Who listens to what, and in what order."""

from __future__ import annotations

import difflib
import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, TypeVar, overload

from typing_extensions import Unpack

from tortoise_auth.events.event import Event, declared_events
from tortoise_auth.events.subscription import (
    EVERYTHING,
    Delivery,
    Handler,
    Subscription,
    available_names,
    default_name,
    describe_handler,
    event_class,
    event_name,
    subscribe,
)
from tortoise_auth.exceptions import SubscriptionError

HandlerT = TypeVar("HandlerT", bound=Handler)
ReturnT = TypeVar("ReturnT")
FirstT = TypeVar("FirstT", bound=Event)
SecondT = TypeVar("SecondT", bound=Event)

_MAX_SHAPES = 64

Call: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Calls one handler with what it takes of a payload."""


class SubscriptionWarning(UserWarning):
    """A subscription is probably not what was meant: the event name is nearly a known one."""


class Options(TypedDict, total=False):
    """How a handler is called; see `Registry.on`."""

    priority: int
    once: bool
    delivery: Delivery
    timeout: float | None
    name: str | None
    thread: bool | None


@dataclass(frozen=True, slots=True)
class Listening:
    """One row of ``EventEmitter.describe()``.

    Attributes:
        event: The event, or ``*``.
        position: When its turn is, from 1.
        handler: ``module:qualname``.
        name: The name of the subscription.
        delivery: ``inline``, ``transaction``, ``background`` or ``durable``.
        priority: Lower runs first.
        once: It runs one time.
        timeout: Seconds, or ``None``.
        threaded: It runs on a worker thread.
    """

    event: str
    position: int
    handler: str
    name: str
    delivery: Delivery
    priority: int
    once: bool
    timeout: float | None
    threaded: bool


class Registry:
    """Subscriptions, and for each event the table of who hears it. Safe to change from any thread."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._names: Counter[str] = Counter()
        self._tables: dict[str, Table] = {}
        self._lock = threading.RLock()
        self._may_run_plainly = True

    # ---- registering -------------------------------------------------------------------------

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
    def on(self, *events: str, **options: Unpack[Options]) -> Callable[[HandlerT], HandlerT]: ...
    @overload
    def on(self, event: str, handler: HandlerT, /, **options: Unpack[Options]) -> HandlerT: ...
    def on(self, *events: Any, **options: Unpack[Options]) -> Any:
        """Register a handler: as a decorator, or directly when a function comes last.

        Example::

            @emitter.on("user_login", "user_logout")         # by name: it gets the arguments
            async def audit(user): ...

            @emitter.on(UserLogin)                           # by class: it gets the event
            async def greet(event: UserLogin[User]): ...

            emitter.on("*", record_everything)               # every event, as an object

        A handler names only the arguments it needs: those of the event, any field of its class,
        or ``event`` itself.

        Args:
            *events: Names, classes, or ``"*"``; then perhaps the handler.
            priority: Lower runs first; 10 by default.
            once: Remove it before its first call.
            delivery: ``"inline"`` (default), ``"transaction"``, ``"background"`` or ``"durable"``.
            timeout: Seconds it may take; a failure after that.
            name: Identifies it, over restarts too; ``module:qualname`` by default.
            thread: Plain functions run on a worker thread unless this is False.

        Returns:
            The function, unchanged.

        Raises:
            SubscriptionError: A `TypeError`; says which handler, which event and what is wrong.
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
    def once(self, *events: str, **options: Unpack[Options]) -> Callable[[HandlerT], HandlerT]: ...
    @overload
    def once(self, event: str, handler: HandlerT, /, **options: Unpack[Options]) -> HandlerT: ...
    def once(self, *events: Any, **options: Unpack[Options]) -> Any:
        """Register a handler for one call, as `on` does with ``once=True``.

        It is removed before that call, so that two emits at the same time run it once, and a
        failure does not bring it back.
        """
        return self._on(events, {**options, "once": True})

    def add_listener(
        self, event_name: str | type[Event], handler: Handler, **options: Unpack[Options]
    ) -> None:
        """Register *handler*; see `on` for the options."""
        self._register([event_name], handler, options)

    def remove_listener(self, event_name: str | type[Event], handler: Handler) -> None:
        """Remove the first registration of *handler*.

        Raises:
            ValueError: It is not registered for this event.
        """
        with self._lock:
            for subscription in self._subscriptions.get(_key(event_name), ()):
                if subscription.handler == handler:
                    return self._remove(subscription)
        raise ValueError(
            f"Handler '{describe_handler(handler)}' is not registered for event "
            f"'{_key(event_name)}'"
        )

    def off(self, event_name: str | type[Event], handler: Handler | None = None) -> None:
        """Remove every registration of *handler*, or all handlers of the event; silently."""
        with self._lock:
            for subscription in list(self._subscriptions.get(_key(event_name), ())):
                if handler is None or subscription.handler == handler:
                    self._remove(subscription)

    def clear(self, event_name: str | type[Event] | None = None) -> None:
        """Remove every handler of one event, or of all."""
        with self._lock:
            for event in self.events() if event_name is None else [event_name]:
                self.off(event)

    # ---- looking ----------------------------------------------------------------------------

    def listeners(self, event_name: str | type[Event]) -> list[Handler]:
        """Return the functions that an emit would run, in order, as a new list."""
        return [each.handler for each in self.subscriptions(event_name)]

    def subscriptions(
        self, event_name: str | type[Event], delivery: Delivery | None = None
    ) -> tuple[Subscription, ...]:
        """Return the subscriptions that an emit would serve, in order."""
        table = self._table(_key(event_name))
        every = table.subscriptions if table is not None else ()
        return every if delivery is None else tuple(s for s in every if s.delivery == delivery)

    def events(self) -> list[str]:
        """Return the names that somebody listens to, sorted; ``*`` among them."""
        return sorted(self._subscriptions)

    def known_events(self) -> list[str]:
        """Return the names of all declared events: the library's, and subclasses of `Event`."""
        return sorted({each.name for each in declared_events()})

    def describe(self) -> list[Listening]:
        """Return a table of who hears what, in which order, by which delivery."""
        return [
            Listening(
                event=event,
                position=position,
                handler=default_name(each.handler),
                name=each.name,
                delivery=each.delivery,
                priority=each.priority,
                once=each.once,
                timeout=each.timeout,
                threaded=each.threaded,
            )
            for event in self.events()
            for position, each in enumerate(self.subscriptions(event), 1)
        ]

    # ---- for tests --------------------------------------------------------------------------

    def snapshot(self) -> dict[str, list[Subscription]]:
        """Return a copy of all subscriptions, for `restore`."""
        with self._lock:
            return {event: list(each) for event, each in self._subscriptions.items()}

    def restore(self, snapshot: dict[str, list[Subscription]]) -> None:
        """Put the subscriptions back as they were."""
        with self._lock:
            self._subscriptions = {event: list(each) for event, each in snapshot.items()}
            self._names = Counter(each.name for every in snapshot.values() for each in every)
            self._tables.clear()

    # ---- inside -----------------------------------------------------------------------------

    def _on(self, events: tuple[Any, ...], options: Options) -> Any:  # noqa: ANN401 - see the overloads
        if events and callable(events[-1]) and event_class(events[-1]) is None:
            *named, handler = events
            self._register(named, handler, options)
            return handler

        def register(handler: HandlerT) -> HandlerT:
            self._register(events, handler, options)
            return handler

        return register

    def _register(
        self, events: Sequence[str | type[Event]], handler: Handler, options: Options
    ) -> None:
        _check_call(events, handler, options)
        subscriptions = [subscribe(event, handler, **options) for event in events]
        with self._lock:
            if options.get("name") or options.get("delivery") == "durable":
                self._refuse_duplicate(subscriptions[0], of_any=bool(options.get("name")))
            if self.strict:
                for subscription in subscriptions:
                    _check_against_catalogue(subscription)
            for subscription in subscriptions:
                self._subscriptions.setdefault(subscription.event, []).append(subscription)
                self._names[subscription.name] += 1
                self._forget_tables(subscription.event)

    def _refuse_duplicate(self, new: Subscription, *, of_any: bool) -> None:
        if new.name not in self._names:
            return
        for subscription in (each for every in self._subscriptions.values() for each in every):
            if subscription.name == new.name and (of_any or subscription.delivery == "durable"):
                raise SubscriptionError(
                    f"Handler '{describe_handler(new.handler)}' for event '{new.event}': the name "
                    f"'{new.name}' is taken by a handler for '{subscription.event}'. "
                    "Give another one with name=."
                )

    def _remove(self, subscription: Subscription) -> None:
        remaining = self._subscriptions[subscription.event]
        remaining.remove(subscription)
        if not remaining:
            del self._subscriptions[subscription.event]
        self._names[subscription.name] -= 1
        if not self._names[subscription.name]:
            del self._names[subscription.name]
        self._forget_tables(subscription.event)

    def _forget_tables(self, event: str) -> None:
        if event == EVERYTHING:
            self._tables.clear()
        else:
            self._tables.pop(event, None)

    def _table(self, name: str) -> Table | None:
        """Return who listens to *name*.

        Names that nobody listens to leave nothing behind; those that only listeners to everything
        hear share one table.
        """
        if name not in self._subscriptions:
            name = EVERYTHING
        table = self._tables.get(name)
        if table is None and name in self._subscriptions:
            with self._lock:
                listening = list(self._subscriptions.get(name, ()))
                if name != EVERYTHING:
                    listening += self._subscriptions.get(EVERYTHING, ())
                if listening:
                    # Sorting keeps the order of equals, and each list is in order of registration.
                    listening.sort(key=lambda each: each.priority)
                    table = self._tables[name] = Table(listening, plainly=self._may_run_plainly)
        return table

    def _consume(self, subscription: Subscription) -> bool:
        """Remove a subscription for one call; false if another emit was first."""
        with self._lock:
            if subscription not in self._subscriptions.get(subscription.event, ()):
                return False
            self._remove(subscription)
            return True


class Table:
    """Who listens to one name, in order: made once, replaced when that changes, never changed.

    Attributes:
        subscriptions: In the order in which they run.
        plain: Their handlers, if calling and awaiting each is all there is to do; else empty.
        takes_plainly: Up to how many positional arguments every plain handler takes; -1 if there
            are others.
    """

    __slots__ = ("_calls", "plain", "subscriptions", "takes_plainly")

    def __init__(self, subscriptions: Iterable[Subscription], *, plainly: bool) -> None:
        self.subscriptions = tuple(subscriptions)
        self.plain: tuple[Handler, ...] = ()
        self.takes_plainly = -1
        if plainly and all(each.is_plain for each in self.subscriptions):
            self.plain = tuple(each.handler for each in self.subscriptions)
            self.takes_plainly = min(each.takes.most_positional for each in self.subscriptions)
        self._calls: dict[tuple[object, ...], tuple[Call, ...]] = {}

    def calls(self, count: int, kwargs: Mapping[str, object]) -> tuple[Call, ...]:
        """Return how to call each plain handler with a payload of this shape."""
        shape = (count, *kwargs)
        calls = self._calls.get(shape)
        if calls is None:
            if len(self._calls) >= _MAX_SHAPES:  # made-up names must not fill memory
                self._calls.clear()
            calls = self._calls[shape] = tuple(
                _call_for(each, count, tuple(kwargs)) for each in self.subscriptions
            )
        return calls


def _call_for(subscription: Subscription, count: int, names: tuple[str, ...]) -> Call:
    """Return how to give a handler of a payload what it takes, as cheaply as can be."""
    handler = subscription.handler
    passed, taken = subscription.takes.fit(count, names)
    if passed < count:
        return lambda args, kwargs: handler(
            *args[:passed], **{name: kwargs[name] for name in taken}
        )
    if taken == names:
        return lambda args, kwargs: handler(*args, **kwargs)
    if not taken:
        return lambda args, kwargs: handler(*args)
    if len(taken) == 1:
        (only,) = taken
        return lambda args, kwargs: handler(*args, **{only: kwargs[only]})
    if len(taken) == 2:
        first, second = taken
        return lambda args, kwargs: handler(*args, **{first: kwargs[first], second: kwargs[second]})
    return lambda args, kwargs: handler(*args, **{name: kwargs[name] for name in taken})


def _check_call(events: Sequence[object], handler: object, options: Mapping[str, object]) -> None:
    if not events:
        raise SubscriptionError('Say which event to listen to: @on("user_login")')
    if not callable(handler):
        raise SubscriptionError(f"A handler is a function or another callable, not {handler!r}")
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise SubscriptionError(
            f"Handler '{describe_handler(handler)}': unknown option {', '.join(sorted(unknown))}. "
            f"There are {', '.join(Options.__annotations__)}."
        )


def _key(event: str | type[Event]) -> str:
    return event if isinstance(event, str) else event_name(event)


def _level_of_caller() -> int:
    """Return the ``stacklevel`` at which a function here warns of the line that called the module."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame, level = frame.f_back, level + 1
    return level


def _check_against_catalogue(subscription: Subscription) -> None:
    declared = {each.name: each for each in declared_events()}
    event = declared.get(subscription.event)
    called = describe_handler(subscription.handler)
    if event is None:
        near = difflib.get_close_matches(subscription.event, declared, n=1, cutoff=0.8)
        if near:
            warnings.warn(
                f"Handler '{called}' listens to '{subscription.event}', which nobody declared. "
                f"Did you mean '{near[0]}'?",
                SubscriptionWarning,
                stacklevel=_level_of_caller(),
            )
        return
    if subscription.wants_event:
        return
    missing = subscription.takes.never_supplied_by(event)
    if missing:
        raise SubscriptionError(
            f"Handler '{called}' for event '{subscription.event}' requires "
            f"{', '.join(map(repr, missing))}, which this event never has. "
            f"It may name: {', '.join(sorted(available_names(event)))}."
        )
