"""Which subscriptions are refused when they are made, and with which words."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypedDict

from tortoise_auth.events.event import Event, declared_events
from tortoise_auth.events.subscription import (
    EVERYTHING,
    Delivery,
    Subscription,
    available_names,
    describe_handler,
    is_pattern,
)
from tortoise_auth.exceptions import SubscriptionError
from tortoise_auth.legible import listed, named, quoted


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
    near = difflib.get_close_matches(name, {each.name for each in declared_events()}, 1, 0.8)
    if near:
        warnings.warn(
            f"Handler '{called}' subscribes to '{named(name)}', which is not declared. "
            f"Did you mean '{near[0]}'?",
            SubscriptionWarning,
            stacklevel=_level_of_caller(),
        )


def _level_of_caller() -> int:
    """Return the ``stacklevel`` at which a function here warns of the line that called the package."""
    frame, level = inspect.currentframe(), 0
    package = __name__.rpartition(".")[0]
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(f"{package}."):
        frame, level = frame.f_back, level + 1
    return level
