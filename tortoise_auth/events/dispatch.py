"""Who listens, in what order, and what happens when a handler fails."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from tortoise_auth.events.catalog import Event
from tortoise_auth.exceptions import EventError, describe

logger = logging.getLogger("tortoise_auth.events")

Handler: TypeAlias = Callable[..., Any]
HandlerT = TypeVar("HandlerT", bound=Handler)

_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


class EventEmitter:
    """Calls the handlers of an event, one after the other, in the order they were registered.

    Args:
        propagate_errors: By default the failure of a handler is logged, with its traceback, and
            the next one runs. With ``True`` the first failure stops the emit and is raised as
            `EventError`.
    """

    def __init__(self, *, propagate_errors: bool = False) -> None:
        self.propagate_errors = propagate_errors
        self._handlers: dict[str, tuple[Handler, ...]] = {}

    def on(self, event_name: str) -> Callable[[HandlerT], HandlerT]:
        """Register the decorated function, and return it unchanged."""

        def register(handler: HandlerT) -> HandlerT:
            self.add_listener(event_name, handler)
            return handler

        return register

    def add_listener(self, event_name: str, handler: Handler) -> None:
        """Register *handler* after those that are there."""
        self._handlers[event_name] = (*self._handlers.get(event_name, ()), handler)

    def remove_listener(self, event_name: str, handler: Handler) -> None:
        """Remove *handler*.

        Raises:
            ValueError: It is not registered for this event.
        """
        remaining = self.listeners(event_name)
        remaining.remove(handler)
        if remaining:
            self._handlers[event_name] = tuple(remaining)
        else:
            del self._handlers[event_name]

    def listeners(self, event_name: str) -> list[Handler]:
        """Return the registered functions, in order, as a new list."""
        return list(self._handlers.get(event_name, ()))

    def clear(self, event_name: str | None = None) -> None:
        """Remove every handler of one event, or of all."""
        if event_name is None:
            self._handlers.clear()
        else:
            self._handlers.pop(event_name, None)

    async def emit(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Call every handler of *event*.

        Args:
            event: A name, with the arguments for its handlers, or an event object.

        Raises:
            EventError: A handler failed, and ``propagate_errors`` is on.
        """
        if isinstance(event, Event):
            args, kwargs = event.arguments()
            event = event.name
        for handler in self._handlers.get(event, ()):
            try:
                await handler(*args, **kwargs)
            except Exception as failure:  # noqa: BLE001 - whatever a handler raises is the handler's failure
                self._report(EventError(event, handler_name(handler), failure), failure)

    def _report(self, error: EventError, failure: Exception) -> None:
        if self.propagate_errors:
            raise error from failure
        logger.error(
            "%s",
            describe(error).translate(_CONTROL_CHARACTERS),
            exc_info=(type(failure), failure, failure.__traceback__),
        )


def handler_name(handler: Handler) -> str:
    """Return what to call *handler* in messages; partials and callable objects have no name."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return str(getattr(handler, "__name__", None) or type(handler).__name__)


emitter = EventEmitter()
"""The emitter that models and services use unless they are given another."""

on = emitter.on
emit = emitter.emit
add_listener = emitter.add_listener
remove_listener = emitter.remove_listener
