"""One thing that is emitted, and how a handler is called with it."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from tortoise_auth.events.catalog import Event, NamedEvent
from tortoise_auth.events.subscription import EVERYTHING, Arguments, Handler, Subscription
from tortoise_auth.threads import Threads

MAX_NESTED = 100
"""How many handlers may be inside one another, each called by an emit of the one around it."""

_THREADS = min(32, (os.cpu_count() or 1) + 4)
_threads_of: WeakKeyDictionary[asyncio.AbstractEventLoop, Threads] = WeakKeyDictionary()
_threads_lock = threading.Lock()


class Emission:
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
    def of(
        cls, event: str | Event, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Emission:
        """Return an emission of a name with arguments, or of an event object.

        Raises:
            TypeError: It is neither, or an event object with further arguments.
        """
        if isinstance(event, str):
            return cls(event, None, args, kwargs or {})
        if not isinstance(event, Event):
            raise TypeError(f"emit() takes the name of an event or an event object, not {event!r}")
        if args or kwargs:
            raise TypeError("emit() takes an event object alone: its fields are the payload")
        if isinstance(event, NamedEvent):
            return cls(event.name, None, *event.arguments())
        return cls(event.name, event, (), {})

    @property
    def text(self) -> str:
        """What to call it in messages."""
        return f"event '{self.name}'"

    def as_event(self) -> Event:
        """Return the event object, or one that stands for a name and arguments."""
        return self.event or NamedEvent.of(self.name, self.args, self.kwargs)

    def arguments_for(self, subscription: Subscription) -> Arguments:
        """Return what to call a handler with.

        Raises:
            TypeError: It listens to a class, but there is only a name.
        """
        if self.event is not None:
            return subscription.arguments_from(self.event)
        if subscription.event == EVERYTHING:
            return [self.as_event()], {}
        if subscription.wants_event:
            raise TypeError(
                f"it listens to the class of '{self.name}' and needs an event object, but the "
                "event was emitted by name"
            )
        count, names = subscription.takes.fit(len(self.args), tuple(self.kwargs))
        return self.args[:count], {name: self.kwargs[name] for name in names}


async def invoke(
    subscription: Subscription,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    left_behind: Callable[[asyncio.Future[object]], object] = lambda call: None,
) -> None:
    """Call a handler to its end: a plain function on a worker thread, unless it wants otherwise.

    A call on a thread goes on though whoever waits for it is cancelled, or begins only then: it is
    given to *left_behind*.
    """
    with Nested():
        if subscription.threaded:
            context = contextvars.copy_context()
            work = functools.partial(context.run, _called, subscription.handler, args, kwargs)
            call: asyncio.Future[object] = _threads().submit(work)
            try:
                result = await asyncio.shield(call)
            except asyncio.CancelledError:
                left_behind(call)
                raise
        else:
            result = subscription.handler(*args, **kwargs)
        if result is not None and inspect.isawaitable(result):
            await result


def _threads() -> Threads:
    """Return the threads of this event loop for handlers.

    Not those that the loop has for itself: handlers that hang must not keep it from looking up host
    names. Each loop has its own, because a handler on a thread may run a loop there and wait for it.
    """
    loop = asyncio.get_running_loop()
    with _threads_lock:
        return _threads_of.setdefault(loop, Threads(_THREADS, "tortoise_auth_handler"))


def _called(handler: Handler, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    try:
        return handler(*args, **kwargs)
    except StopIteration as stop:
        # No future can hold one: whoever awaits it would wait for ever.
        raise RuntimeError("the handler raised StopIteration") from stop


class Nested:
    """A call of a handler, as emits inside it find it.

    Tasks and threads share no stack that could overflow when handlers emit in a circle, so what is
    inside what is counted.

    Raises:
        RecursionError: There are `MAX_NESTED` around it already.
    """

    __slots__ = ("_depth", "_outer", "_over")

    def __enter__(self) -> None:
        self._outer = _innermost.get()
        self._depth = self.depth() + 1
        self._over = False
        if self._depth > MAX_NESTED:
            raise RecursionError(f"more than {MAX_NESTED} emits are inside one another")
        _innermost.set(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _innermost.set(self._outer)
        self._over, self._outer = True, None  # tasks that it leaves behind are not inside it

    @staticmethod
    def depth() -> int:
        """Return how many calls of handlers are around this one."""
        innermost = _innermost.get()
        return 0 if innermost is None or innermost._over else innermost._depth

    @staticmethod
    def forget() -> None:
        """Begin anew, in a context of its own."""
        _innermost.set(None)


_innermost: ContextVar[Nested | None] = ContextVar("tortoise_auth_nested", default=None)


def is_handler_failure(failure: BaseException) -> bool:
    """Tell what a handler did wrong from what is done to its caller."""
    if isinstance(failure, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or task.cancelling() == 0
    return isinstance(failure, Exception)
