"""Which subscriptions are refused when they are made, and with which words."""

from __future__ import annotations

import difflib
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypedDict, TypeVar, cast

from tortoise_auth.events.event import Event, declared_events
from tortoise_auth.events.subscription import (
    EVERYTHING,
    Delivery,
    Handler,
    Subscription,
    available_names,
    describe_handler,
    event_class,
    event_name,
    is_pattern,
)
from tortoise_auth.exceptions import SubscriptionError
from tortoise_auth.legible import listed, named, quoted

HandlerT = TypeVar("HandlerT", bound=Handler)

_MAX_NAME = 100
"""Characters of a name that are compared with declared ones, which takes quadratic time."""


class SubscriptionWarning(UserWarning):
    """A subscription is probably a mistake: the event name is nearly a declared one."""


class Options(TypedDict, total=False):
    """How a handler is called; see `Registry.on`."""

    priority: int
    once: bool
    delivery: Delivery
    timeout: float | None
    name: str | None
    thread: bool | None


class Naming(Options, total=False):
    """The options of ``on`` and ``once``, with the event as a keyword, as older emitters took it."""

    event_name: str


def split_call(
    arguments: Sequence[object], options: Naming
) -> tuple[list[str | type[Event]], Options]:
    """Return the events and the options of a call of ``on``, without a handler that comes last.

    Raises:
        SubscriptionError: No event is named, or one by something else than text or a class.
    """
    keywords: dict[str, Any] = {**options}
    if "event_name" in keywords:
        arguments = [keywords.pop("event_name"), *arguments]
    last = arguments[-1] if arguments else None
    direct = not isinstance(last, str) and event_class(last) is None
    given = arguments[:-1] if direct and (callable(last) or len(arguments) > 1) else arguments
    if not given:
        raise SubscriptionError('Say which event to subscribe to: @on("user_login")')
    for each in given:
        event_name(cast("str", each))
    return cast("list[str | type[Event]]", list(given)), cast("Options", keywords)


class Decorator:
    """What ``on`` returns without a handler. It warns if it is dropped without having got one.

    ``on("user_login", "audit")`` names two events, and no function.
    """

    __slots__ = ("_events", "_register", "_used")

    def __init__(
        self, register: Callable[[Handler], None], events: Sequence[str | type[Event]]
    ) -> None:
        self._register = register
        self._events = events
        self._used = False

    def __call__(self, handler: HandlerT) -> HandlerT:
        """Register *handler*, and return it unchanged."""
        self._used = True
        self._register(handler)
        return handler

    def __del__(self) -> None:
        if not self._used and not sys.is_finalizing():
            warnings.warn(
                f"on({listed(map(quoted, self._events))}) was given no handler, and registers none. "
                "Use it as a decorator, or pass the function last: a name is an event.",
                SubscriptionWarning,
                stacklevel=2,
            )


def check_call(events: Sequence[object], handler: object, options: Mapping[str, object]) -> None:
    """Check that there are events and a handler, and that the options are known.

    Raises:
        SubscriptionError: One is missing or unknown.
    """
    if not events:
        raise SubscriptionError('Say which event to subscribe to: @on("user_login")')
    if not callable(handler):
        raise SubscriptionError(
            f"A handler is a function or another callable, not {quoted(handler)}"
        )
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise SubscriptionError(
            f"Handler '{describe_handler(handler)}': unknown option {listed(sorted(unknown))}. "
            f"There are {', '.join(Options.__annotations__)}."
        )


def check_declared(subscription: Subscription) -> None:
    """Compare a subscription with the declared events, as a strict emitter does.

    Events may be declared later, so that a class is accepted as soon as it, or one class derived
    from it, can be instantiated. A pattern has to match a declared name when it is registered: later
    nothing would report a spelling mistake in it.

    Raises:
        SubscriptionError: No event can reach the handler, or one has not what the handler requires.
    """
    called, selector = describe_handler(subscription.handler), subscription.event
    if subscription.base is not None:
        _check_class(called, subscription.base)
    elif is_pattern(selector):
        _check_pattern(called, subscription)
    else:
        matching = [each for each in declared_events() if each.name == selector]
        if not matching:
            _warn_of_near_miss(called, selector)
        for event in matching[-1:]:
            _check_arguments(called, subscription, event)


def _check_class(called: str, base: type[Event]) -> None:
    derived = (each for each in declared_events() if issubclass(each, base))
    if not any(not inspect.isabstract(each) for each in derived):
        raise SubscriptionError(
            f"Handler '{called}' for {base.__name__}: the class is abstract, and no class of events "
            "is derived from it, so that no event can reach the handler. Import the module that "
            "declares the events before this line."
        )


def _check_pattern(called: str, subscription: Subscription) -> None:
    pattern = subscription.event
    if pattern == EVERYTHING:
        return
    matching = [each for each in declared_events() if fnmatchcase(each.name, pattern)]
    if not matching:
        raise SubscriptionError(
            f"Handler '{called}' for event '{named(pattern)}': no declared event has a name that matches "
            "this pattern, so that no event can reach the handler. Import the module that declares "
            "the events before this line, or use an emitter that is not strict."
        )
    for event in matching:
        _check_arguments(called, subscription, event)


def _check_arguments(called: str, subscription: Subscription, event: type[Event]) -> None:
    if subscription.wants_event:
        return
    missing = subscription.takes.never_supplied_by(event)
    if missing:
        raise SubscriptionError(
            f"Handler '{called}' for event '{named(event.name)}' requires "
            f"{listed(map(repr, missing))}, which this event never has. "
            f"It may name: {listed(sorted(available_names(event)))}."
        )


def _warn_of_near_miss(called: str, name: str) -> None:
    near = _nearest(name, {each.name for each in declared_events()})
    if near:
        warnings.warn(
            f"Handler '{called}' subscribes to '{named(name)}', which is not declared. "
            f"Did you mean '{near}'?",
            SubscriptionWarning,
            stacklevel=_level_of_caller(),
        )


def _nearest(name: str, declared: Collection[str]) -> str | None:
    """Return the declared name that *name* is probably meant to be.

    That is another spelling, such as the name of the class; one without ``user_`` in front; or one
    with a slip of the pen. Two names that only share a word, such as ``password_reset`` and
    ``password_rehashed``, are two events: the words that differ are compared alone, too.
    """
    spelt = _letters(name)
    for each in sorted(declared):
        if spelt in (_letters(each), _letters(each.removeprefix("user_"))):
            return each
    for each in difflib.get_close_matches(name[:_MAX_NAME], declared, 3, 0.8):
        mine, others = name.split("_"), each.split("_")
        left = "_".join(word for word in mine if word not in others)
        right = "_".join(word for word in others if word not in mine)
        if not (left and right) or difflib.SequenceMatcher(None, left, right).ratio() >= 0.7:
            return each
    return None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name[:_MAX_NAME])).lower()


def _level_of_caller() -> int:
    """Return the ``stacklevel`` at which a function here warns of the line that called the package."""
    frame, level = inspect.currentframe(), 0
    package = __name__.rpartition(".")[0]
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(f"{package}."):
        frame, level = frame.f_back, level + 1
    return level
