"""One registered handler: its options, its stable name, and which arguments it takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args, get_origin

from tortoise_auth.events.event import Event, NamedEvent, classes_named
from tortoise_auth.events.signatures import signature_of
from tortoise_auth.exceptions import SubscriptionError
from tortoise_auth.legible import named, quoted

Delivery: TypeAlias = Literal["inline", "transaction", "background", "durable"]
Handler: TypeAlias = Callable[..., Any]
Arguments: TypeAlias = tuple[Sequence[Any], dict[str, Any]]

EVERYTHING = "*"
"""Subscribes to every event; the handler receives the event object."""

_WILDCARDS = frozenset("*?[")
_UNLIMITED = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Subscription:
    """A handler and how it wants to be called.

    Attributes:
        event: The event name, the pattern of names, or ``*``; of a class its name.
        handler: The function as it was registered.
        name: Identifies the subscription over restarts: ``module:qualname`` unless it was given.
        priority: Lower runs first.
        once: It is removed before its first call.
        delivery: When and how it runs.
        timeout: Seconds it may take.
        is_async: It is a coroutine function.
        threaded: It is a plain function and runs on a worker thread.
        wants_event: It is called with the event object and nothing else.
        base: It was made by class, for the events of this class and of every subclass.
        registration: Increases in the order of registration. Subscriptions to several events that
            were made by one call share it, so that one emit runs the handler once.
    """

    event: str
    handler: Handler
    name: str
    priority: int = 10
    once: bool = False
    delivery: Delivery = "inline"
    timeout: float | None = None
    is_async: bool = False
    threaded: bool = False
    wants_event: bool = False
    base: type[Event] | None = None
    registration: int = 0
    takes: Parameters = field(repr=False, kw_only=True)

    def arguments_from(self, event: Event) -> Arguments:
        """Return what to call the handler with for an event object."""
        return ([event], {}) if self.wants_event else self.takes.pick(event)

    def requires_user(self, event: type[Event]) -> bool:
        """Return whether the handler cannot be called for *event* without its user."""
        return not self.wants_event and self.takes.requires("user", event)

    @property
    def is_wide(self) -> bool:
        """Whether it may be for events of other names than its own."""
        return self.base is not None or is_pattern(self.event)

    def matches(self, name: str) -> bool:
        """Return whether it is for the events of a name."""
        if name == self.event or self.event == EVERYTHING:
            return True
        if self.base is not None:
            return any(issubclass(each, self.base) for each in classes_named(name))
        return is_pattern(self.event) and fnmatchcase(name, self.event)

    @property
    def is_plain(self) -> bool:
        """Whether calling and awaiting the handler is all there is to do."""
        special = self.once or self.timeout or self.wants_event
        return self.is_async and not special and self.delivery == "inline"


def subscribe(
    event: str | type[Event],
    handler: Handler,
    *,
    priority: int = 10,
    once: bool = False,
    delivery: Delivery = "inline",
    timeout: float | None = None,
    name: str | None = None,
    thread: bool | None = None,
    registration: int = 0,
) -> Subscription:
    """Check the options and make a subscription.

    Raises:
        SubscriptionError: An option is wrong; the message says which and why.
    """
    called = describe_handler(handler)
    if _is_generator_function(handler):
        raise SubscriptionError(
            f"Handler '{called}' is a generator function: a call would make a generator that nothing "
            "runs. Return a list, or write a coroutine function."
        )
    _check_options(called, priority, delivery, timeout, name, once=once)
    is_async = is_coroutine_function(handler)
    if thread and is_async:
        raise SubscriptionError(
            f"Handler '{called}' is a coroutine function; thread=True is for plain functions"
        )
    key, cls = event_name(event), event_class(event)
    wants_event = not isinstance(event, str) or event == EVERYTHING
    takes = Parameters.of(handler)
    if wants_event and not takes.one_argument:
        raise SubscriptionError(
            f"Handler '{called}' for event '{named(key)}' is called with the event object alone "
            "and must take one positional argument"
        )
    return Subscription(
        event=key,
        handler=handler,
        name=name or default_name(handler),
        priority=priority,
        once=once,
        delivery=delivery,
        timeout=timeout,
        is_async=is_async,
        threaded=not is_async and thread is not False,
        wants_event=wants_event,
        base=None if cls is Event else cls,
        registration=registration,
        takes=takes,
    )


def event_name(event: str | type[Event]) -> str:
    """Return the name for which subscriptions are kept: the text itself, or the name of a class.

    `Event` is ``*``.

    Raises:
        SubscriptionError: It is neither a name nor a class of events, or it is `NamedEvent`, which
            stands for names without a class.
    """
    cls = event_class(event)
    if cls is NamedEvent:
        raise SubscriptionError(
            "A NamedEvent has the name that it was emitted by. Subscribe to that name, to a "
            'pattern such as "order.*", or to every event: @on(Event).'
        )
    if cls is not None:
        return EVERYTHING if cls is Event else cls.name
    if isinstance(event, str) and event:
        return event
    raise SubscriptionError(
        f"An event is named by text or by its class, not by {quoted(event)}. "
        'Write @on("user_login") or @on(UserLogin).'
    )


def is_pattern(name: str) -> bool:
    """Return whether *name* selects names by ``*``, ``?`` or ``[...]``, as `fnmatch` does."""
    return not _WILDCARDS.isdisjoint(name)


def event_class(event: object) -> type[Event] | None:
    """Return the class that *event* is: ``UserLogin``, also for ``UserLogin[User]``."""
    cls = get_origin(event) or event
    return cls if isinstance(cls, type) and issubclass(cls, Event) else None


@dataclass(frozen=True, slots=True)
class Parameters:
    """Which arguments a handler takes: inspected once, when it is registered.

    Attributes:
        positional: Names of the parameters that can be given by position, in order.
        keyword_only: Names of those that cannot.
        required: Those of both without a default.
        positional_only: Names of those that cannot be given as keywords.
        supplied: Those that a wrapper around the handler may supply.
        any_positional: It has ``*args``.
        any_keyword: It has ``**kwargs``.
        known: False for callables that cannot be inspected, which get everything.
    """

    positional: tuple[str, ...] = ()
    keyword_only: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    positional_only: frozenset[str] = frozenset()
    supplied: frozenset[str] = frozenset()
    any_positional: bool = True
    any_keyword: bool = True
    known: bool = False

    @classmethod
    def of(cls, handler: Handler) -> Parameters:
        """Inspect *handler*."""
        try:
            signature, supplied = signature_of(handler)
        except (TypeError, ValueError):
            return cls()
        parameters, kinds = signature.parameters.values(), inspect.Parameter
        return cls(
            positional=tuple(
                p.name
                for p in parameters
                if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
            ),
            keyword_only=tuple(p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY),
            required=frozenset(
                p.name
                for p in parameters
                if p.default is p.empty and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
            ),
            positional_only=frozenset(
                p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY
            ),
            supplied=supplied,
            any_positional=any(p.kind is kinds.VAR_POSITIONAL for p in parameters),
            any_keyword=any(p.kind is kinds.VAR_KEYWORD for p in parameters),
            known=True,
        )

    @property
    def most_positional(self) -> int:
        """How many arguments can be given by position."""
        return _UNLIMITED if self.any_positional else len(self.positional)

    @property
    def one_argument(self) -> bool:
        """Whether the handler can be called with one positional argument."""
        return self.most_positional > 0 and self._demanded <= set(self.positional[:1])

    @property
    def _demanded(self) -> frozenset[str]:
        """What every call has to give: nothing else can."""
        return self.required - self.supplied

    @property
    def keywords(self) -> frozenset[str] | None:
        """The names that can be given as keywords; ``None`` if any can."""
        if self.any_keyword:
            return None
        return frozenset(self.positional) - self.positional_only | frozenset(self.keyword_only)

    def fit(self, count: int, names: Sequence[str]) -> tuple[int, tuple[str, ...]]:
        """Return how many positional arguments and which keywords of a payload are passed on.

        Surplus ones are left out. Nothing is reordered, renamed or made up.
        """
        passed = min(count, self.most_positional)
        taken = set(self.positional[:passed])
        accepted = self.keywords
        if accepted is None:
            return passed, tuple(names)
        return passed, tuple(name for name in names if name in accepted and name not in taken)

    def pick(self, event: Event) -> Arguments:
        """Return the arguments for an event object.

        A parameter named like a field gets that field, one named ``event`` the event itself; other
        positional parameters get the event's positional arguments in turn, and ``**kwargs`` those
        that are left, by their names.
        """
        args, kwargs = event.arguments()
        if not self.known:
            return args, kwargs
        available = available_names(type(event))
        named = {*self.positional, *self.keyword_only}
        given = dict(zip(type(event).positional, args, strict=True))
        unnamed = [name for name in given if name not in named]
        chosen: list[Any] = []
        for parameter in self.positional:
            if parameter in available:
                chosen.append(_value(event, parameter))
            elif unnamed:
                chosen.append(given[unnamed.pop(0)])
            else:
                break
        if self.any_positional and len(chosen) == len(self.positional):
            chosen += [given[name] for name in unnamed]
            unnamed = []
        rest = [*self.positional[len(chosen) :], *self.keyword_only]
        picked = {
            name: _value(event, name)
            for name in rest
            if name in available and name not in self.positional_only
        }
        if self.any_keyword:
            kwargs |= {name: given[name] for name in unnamed}
            taken = {*self.positional[: len(chosen)], *picked}
            picked |= {name: value for name, value in kwargs.items() if name not in taken}
        return chosen, picked

    def requires(self, field_name: str, event: type[Event]) -> bool:
        """Return whether a parameter without a default gets this positional field of *event*."""
        if field_name in (*self.positional, *self.keyword_only):
            return field_name in self.required
        available = available_names(event)
        unnamed = [name for name in self.positional if name not in available]
        return field_name in event.positional and bool(unnamed) and unnamed[0] in self.required

    def never_supplied_by(self, event: type[Event]) -> list[str]:
        """Return the required parameters that this event has nothing for."""
        if not self.known:
            return []
        available = available_names(event)
        named = {*self.positional, *self.keyword_only}
        by_position = sum(name not in named for name in event.positional)
        missing = [
            name for name in self.positional if name in self._demanded and name not in available
        ]
        missing = missing[by_position:]
        return missing + [
            name for name in self.keyword_only if name in self._demanded and name not in available
        ]


def available_names(event: type[Event]) -> frozenset[str]:
    """Return what a handler of *event* may name: its fields, and ``event``."""
    return frozenset({"event", *(each.name for each in fields(event))})


def default_name(handler: Handler) -> str:
    """Return ``module:qualname`` of the function behind *handler*."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    owner = handler if hasattr(handler, "__qualname__") else type(handler)
    module = getattr(owner, "__module__", None) or type(owner).__module__  # builtins may have none
    return f"{module}:{owner.__qualname__}"


def describe_handler(handler: Handler) -> str:
    """Return what to call *handler* in messages; partials and callable objects have no name."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return named(getattr(handler, "__name__", None) or type(handler).__name__)


def is_coroutine_function(handler: Handler) -> bool:
    """Return whether calling *handler* gives a coroutine and does nothing else."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
        getattr(type(handler), "__call__", None)  # noqa: B004 - its kind is asked for, not whether it is there
    )


def _is_generator_function(handler: Handler) -> bool:
    while isinstance(handler, functools.partial):
        handler = handler.func
    called = getattr(type(handler), "__call__", None)  # noqa: B004 - as above
    return any(
        inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each)
        for each in (handler, called)
    )


def _value(event: Event, name: str) -> object:
    return event if name == "event" else getattr(event, name)


def _check_options(
    called: str,
    priority: object,
    delivery: object,
    timeout: object,
    name: object,
    *,
    once: bool,
) -> None:
    if delivery not in get_args(Delivery):
        raise SubscriptionError(
            f"Handler '{called}': unknown delivery {quoted(delivery)}. "
            f"Use one of {', '.join(map(repr, get_args(Delivery)))}."
        )
    if not isinstance(priority, int):
        raise SubscriptionError(f"Handler '{called}': priority must be an int, lower runs first")
    if timeout is not None and (not isinstance(timeout, int | float) or not timeout > 0):
        raise SubscriptionError(f"Handler '{called}': timeout must be a positive number of seconds")
    if name is not None and (not isinstance(name, str) or not 0 < len(name) <= 255):
        raise SubscriptionError(f"Handler '{called}': name must be text of 1 to 255 characters")
    if once and delivery == "durable":
        raise SubscriptionError(
            f"Handler '{called}': once=True cannot be kept by a durable delivery, which may repeat"
        )
