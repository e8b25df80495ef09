"""Subscriptions: which handlers an event reaches, and in what order."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tortoise_auth.events.checks import Options, check_call, check_declared
from tortoise_auth.events.event import (
    Event,
    class_names,
    declared_events,
    observe_declarations,
)
from tortoise_auth.events.subscription import (
    EVERYTHING,
    Delivery,
    Handler,
    Subscription,
    default_name,
    describe_handler,
    event_name,
    is_pattern,
    subscribe,
)
from tortoise_auth.exceptions import SubscriptionError
from tortoise_auth.legible import named

_TURNS: Sequence[Delivery] = ("transaction", "inline", "background", "durable")
"""The deliveries in the order in which they run."""
_MAX_SHAPES = 64
_MAX_MADE_UP = 64
"""How many names, of those that only patterns match, have a table kept: there may be any number."""

Call: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Calls one handler with what it takes of a payload."""


@dataclass(frozen=True, slots=True)
class Listening:
    """One row of ``EventEmitter.describe()``.

    Attributes:
        event: The event, the pattern of names, or ``*``; of a class its name.
        position: When its turn is, from 1: those in the transaction first, then the inline ones,
            those in the background, and the durable ones.
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
    """Subscriptions, and for each event a table of them. Safe to change from any thread.

    Tables are made when an event is emitted for the first time, and dropped when a subscription or a
    class of events is added that may belong into them.
    """

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._names: Counter[str] = Counter()
        self._registrations = itertools.count(1)
        self._wide: tuple[Subscription, ...] | None = ()
        self._patterns: set[str] = set()
        self.tables: dict[str, Table | None] = {}
        self._made_up: dict[str, Table | None] = {}
        self._lock = threading.RLock()
        self._plainly = True
        observe_declarations(self)

    def add(self, events: Sequence[str | type[Event]], handler: Handler, options: Options) -> None:
        """Register *handler* for each of *events*; see `EventEmitter.on` for the options."""
        check_call(events, handler, options)
        registration = next(self._registrations)
        subscriptions = [
            subscribe(event, handler, registration=registration, **options) for event in events
        ]
        with self._lock:
            if options.get("name") or options.get("delivery") == "durable":
                self._refuse_duplicate(subscriptions[0], of_any=bool(options.get("name")))
            if self.strict:
                for subscription in subscriptions:
                    check_declared(subscription)
            for subscription in subscriptions:
                self._subscriptions.setdefault(subscription.event, []).append(subscription)
                self._names[subscription.name] += 1
                if is_pattern(subscription.event) and subscription.event != EVERYTHING:
                    self._patterns.add(subscription.event)
                self._forget_tables(subscription)

    def remove(self, event_name: str | type[Event], handler: Handler) -> None:
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
            f"'{named(_key(event_name))}'"
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

    def subscriptions(
        self, event_name: str | type[Event], delivery: Delivery | None = None
    ) -> tuple[Subscription, ...]:
        """Return the subscriptions that an emit would serve, in order."""
        table = self.table(_key(event_name))
        every = table.subscriptions if table is not None else ()
        return every if delivery is None else tuple(s for s in every if s.delivery == delivery)

    def events(self) -> list[str]:
        """Return what there are subscriptions for, sorted: names, patterns, names of classes, ``*``.

        Every subscription is among ``subscriptions(each)`` of these.
        """
        return sorted(self._subscriptions)

    def known_events(self) -> list[str]:
        """Return the names of all declared events: the library's, and subclasses of `Event`."""
        return sorted({each.name for each in declared_events()})

    def describe(self) -> list[Listening]:
        """Return a table of handlers: for which event, in which order, by which delivery.

        Those in the transaction run first, then inline ones, then the background begins, and a
        relay delivers last; the priority decides among those of one delivery.
        """
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
            for position, each in enumerate(self._in_turn(event), 1)
        ]

    def _in_turn(self, event: str) -> list[Subscription]:
        return sorted(self.subscriptions(event), key=lambda each: _TURNS.index(each.delivery))

    def set_plainly(self, plainly: bool) -> None:
        """Set whether handlers may be called without the detour that observes or groups them."""
        with self._lock:
            self._plainly = plainly
            self._forget_all_tables()

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
            self._patterns = {event for event in snapshot if is_pattern(event)} - {EVERYTHING}
            self._forget_all_tables()

    # ---- inside -----------------------------------------------------------------------------

    def _refuse_duplicate(self, new: Subscription, *, of_any: bool) -> None:
        if new.name not in self._names:
            return
        for subscription in (each for every in self._subscriptions.values() for each in every):
            if subscription.name == new.name and (of_any or subscription.delivery == "durable"):
                raise SubscriptionError(
                    f"Handler '{describe_handler(new.handler)}' for event '{named(new.event)}': the name "
                    f"'{named(new.name)}' is taken by a handler for '{named(subscription.event)}'. "
                    "Give another one with name=."
                )

    def _remove(self, subscription: Subscription) -> None:
        remaining = self._subscriptions[subscription.event]
        remaining.remove(subscription)
        if not remaining:
            del self._subscriptions[subscription.event]
            self._patterns.discard(subscription.event)
        self._names[subscription.name] -= 1
        if not self._names[subscription.name]:
            del self._names[subscription.name]
        self._forget_tables(subscription)

    def event_declared(self) -> None:
        """Take note of a new class of events, which wide subscriptions may be for."""
        with self._lock:
            self._forget_all_tables()

    def _forget_tables(self, subscription: Subscription) -> None:
        if subscription.is_wide:
            self._forget_all_tables()
        else:
            self.tables.pop(subscription.event, None)
            self._made_up.pop(subscription.event, None)

    def _forget_all_tables(self) -> None:
        self._wide = None
        self.tables.clear()
        self._made_up.clear()

    def table(self, name: str) -> Table | None:
        """Return the subscriptions for *name*, if there are any.

        Names that are neither subscribed to nor declared leave nothing behind, however many are
        emitted: where no pattern is, they share the table of subscriptions to everything; else the
        last few are kept.
        """
        table = self.tables.get(name)
        if table is not None or not self._subscriptions:
            return table
        if name in self._subscriptions or name in class_names:
            return self._table_in(self.tables, name)
        if self._patterns:
            return self._table_in(self._made_up, name)
        if EVERYTHING in self._subscriptions:
            return self._table_in(self.tables, EVERYTHING)
        return None

    def _table_in(self, tables: dict[str, Table | None], name: str) -> Table | None:
        try:
            return tables[name]
        except KeyError:
            pass
        with self._lock:
            if len(self._made_up) >= _MAX_MADE_UP:
                self._made_up.clear()
            table = tables[name] = self._make_table(name)
            return table

    def _make_table(self, name: str) -> Table | None:
        if self._wide is None:
            every = itertools.chain.from_iterable(self._subscriptions.values())
            self._wide = tuple(each for each in every if each.is_wide)
        matching = list(self._subscriptions.get(name, ()))
        if name != EVERYTHING:
            matching += (each for each in self._wide if each.event != name and each.matches(name))
        once_each = {each.registration: each for each in reversed(matching)}
        if not once_each:
            return None
        in_order = sorted(once_each.values(), key=lambda each: (each.priority, each.registration))
        return Table(in_order, plainly=self._plainly)

    def consume(self, subscription: Subscription) -> bool:
        """Remove a subscription for one call; false if another emit was first."""
        with self._lock:
            if subscription not in self._subscriptions.get(subscription.event, ()):
                return False
            self._remove(subscription)
            return True


class Table:
    """The subscriptions for one name, in order. It is replaced when they change, never changed.

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


def _key(event: str | type[Event]) -> str:
    return event if isinstance(event, str) else event_name(event)
