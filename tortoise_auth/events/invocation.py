"""How one handler is called: with what, on which thread, for how long, and inside how many others."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextvars import ContextVar
from types import CodeType, TracebackType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from tortoise_auth.database import leave_transactions
from tortoise_auth.events.event import Event, NamedEvent
from tortoise_auth.events.subscription import EVERYTHING, Arguments, Handler, Subscription
from tortoise_auth.legible import named, quoted
from tortoise_auth.threads import Threads

Spawn: TypeAlias = Callable[
    [Coroutine[Any, Any, Any], contextvars.Context | None], asyncio.Task[Any]
]
"""Begins a task, in a context, that is kept, and waited for at the end."""

MAX_NESTED = 100
"""How many handlers may be inside one another, each called by an emit of the one around it."""

MAX_TOGETHER = 1000
"""How many calls at once a circle of concurrent handlers may have grown to, from its fourth level."""

THREADS_PER_HANDLER = 8

_TOO_LATE = "the handler took too long"
"""What a call that ran out of time is cancelled with, unlike one whose caller is cancelled."""

_threads: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, Threads]] = (
    WeakKeyDictionary()
)
_threads_lock = threading.Lock()


class Emitted:
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
    ) -> Emitted:
        """Return what is emitted by a name with arguments, or by an event object.

        Raises:
            TypeError: It is neither, or an event object with further arguments.
        """
        if isinstance(event, str):
            return cls(event, None, args, kwargs or {})
        if not isinstance(event, Event):
            raise TypeError(
                f"emit() takes the name of an event or an event object, not {quoted(event)}"
            )
        if args or kwargs:
            raise TypeError("emit() takes an event object alone: its fields are the payload")
        if isinstance(event, NamedEvent):
            return cls(event.name, None, *event.arguments())
        return cls(event.name, event, (), {})

    @property
    def text(self) -> str:
        """What to call it in messages."""
        return f"event '{named(self.name)}'"

    def arguments_for(self, subscription: Subscription) -> Arguments:
        """Return what to call a handler with.

        Raises:
            TypeError: It listens to a class, but there is only a name.
        """
        if self.event is not None:
            return subscription.arguments_from(self.event)
        if subscription.event == EVERYTHING:
            return [NamedEvent.of(self.name, self.args, self.kwargs)], {}
        if subscription.wants_event:
            raise TypeError(
                f"it listens to the class of '{named(self.name)}' and needs an event object, but the "
                "event was emitted by name"
            )
        count, names = subscription.takes.fit(len(self.args), tuple(self.kwargs))
        return self.args[:count], {name: self.kwargs[name] for name in names}


class Nested:
    """A call of a handler, as the emits inside it see it.

    Tasks and threads share no stack that could overflow when handlers emit in a circle, so depth
    is counted. Concurrent handlers multiply from level to level, so the product is bounded, too.

    Args:
        together: How many handlers of the same emit run at the same time.

    Raises:
        RecursionError: `MAX_NESTED` or `MAX_TOGETHER` is exceeded.
    """

    __slots__ = ("_depth", "_outer", "_over", "_together")

    def __init__(self, together: int = 1) -> None:
        self._together = together
        self._over = False

    def __enter__(self) -> None:
        self._outer = outer = _innermost.get()
        self._depth = 1
        if outer is not None and not outer._over:
            self._depth += outer._depth
            self._together *= outer._together
        if self._depth > MAX_NESTED:
            raise RecursionError(f"more than {MAX_NESTED} emits are inside one another")
        if self._depth > 3 and self._together > MAX_TOGETHER:
            raise RecursionError(f"more than {MAX_TOGETHER} handlers would run inside one another")
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


def is_inside_another(emit: CodeType) -> bool:
    """Return whether the emit that asks is inside another one; it asks after a RecursionError.

    On their short path emits are not counted, but the frames know. A `ContextVar` that each emit
    sets and resets makes one to a single handler 1.6 to 3.0 times as slow (CPython 3.11 to 3.13).
    """
    frame, emits = sys._getframe(), 0
    while frame.f_back is not None and emits < 2:
        frame = frame.f_back
        emits += frame.f_code is emit
    return emits > 1 or Nested.depth() > 0


async def invoke(
    subscription: Subscription,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    spawn: Spawn,
    *,
    together: int = 1,
    returned: Callable[[], object] = lambda: None,
) -> object:
    """Call a handler to its end, within its time, and return its result.

    Args:
        subscription: Whose handler it is, and how it wants to be called.
        args: Its positional arguments.
        kwargs: Its keywords.
        spawn: Given what goes on after the call: a thread cannot be cancelled.
        together: How many handlers of the same emit run at the same time.
        returned: Called when a plain function has returned something to be awaited.

    Raises:
        TimeoutError: It took longer than its subscription allows.
        ThreadsStuckError: It is a plain function, and its earlier calls hang on all its threads.
    """
    work = _call(subscription, args, kwargs, spawn, together, returned)
    if subscription.timeout is None:
        return await work
    context = contextvars.copy_context()
    task = spawn(work, context)
    try:
        done, _ = await asyncio.wait([task], timeout=subscription.timeout)
    except asyncio.CancelledError:
        context.run(leave_transactions)
        task.cancel()
        raise
    if not done:  # a handler may refuse to be cancelled, so it is not awaited
        context.run(leave_transactions)
        task.cancel(_TOO_LATE)
        raise TimeoutError(f"took longer than {subscription.timeout} s")
    return task.result()


async def _call(
    subscription: Subscription,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    spawn: Spawn,
    together: int,
    returned: Callable[[], object],
) -> object:
    with Nested(together):
        if subscription.threaded:
            result = await _on_thread(subscription, args, kwargs, spawn)
        elif subscription.is_async:
            result = subscription.handler(*args, **kwargs)
        else:
            result = call(subscription.handler, args, kwargs)
        if result is None or not inspect.isawaitable(result):
            return result
        returned()
        return await result


async def _on_thread(
    subscription: Subscription, args: Sequence[Any], kwargs: dict[str, Any], spawn: Spawn
) -> object:
    threads = _threads_of(subscription)
    context = contextvars.copy_context()
    running = threads.submit(
        functools.partial(context.run, call, subscription.handler, args, kwargs)
    )
    result = asyncio.wrap_future(running)
    try:
        await asyncio.wait([result])
    except asyncio.CancelledError as cancelled:
        if _TOO_LATE in cancelled.args:
            result.cancel()
            threads.give_up(running)
        else:
            spawn(_awaiting(result), None)  # it goes on, or begins only then
        raise
    return result.result()


def lane_of(subscription: Subscription) -> Hashable:
    """Return the identity of a handler, which has threads and a background lane of its own."""
    return id(subscription.handler), subscription.registration


def _threads_of(subscription: Subscription) -> Threads:
    """Return the threads of a handler in this event loop.

    Each handler has its own, so that one that hangs keeps no other from running, and each loop has
    its own, because a handler on a thread may run a loop there and wait for it.
    """
    key = lane_of(subscription)
    with _threads_lock:
        pools = _threads.setdefault(asyncio.get_running_loop(), {})
        if key not in pools:
            for unused in [each for each, threads in pools.items() if threads.is_unused]:
                del pools[unused]
            pools[key] = Threads(THREADS_PER_HANDLER, f"tortoise_auth {subscription.name}")
        return pools[key]


def end_threads() -> None:
    """Let the threads of this event loop end, which is about to end itself."""
    with _threads_lock:
        pools = _threads.pop(asyncio.get_running_loop(), {})
    for threads in pools.values():
        threads.close()


def call(handler: Handler, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    """Call a plain function; what it raises can be raised again anywhere."""
    try:
        return handler(*args, **kwargs)
    except (StopIteration, GeneratorExit) as error:
        # No future can hold the one, and the other would look like the end of its caller.
        raise RuntimeError(f"the handler raised {type(error).__name__}") from error


async def _awaiting(result: Awaitable[object]) -> object:
    return await result


def is_handler_failure(failure: BaseException) -> bool:
    """Return whether *failure* is a handler's own, and not something done to its caller.

    Everything is, of whatever class, but what ends the program, the cancellation of the caller, and
    `GeneratorExit`, with which Python closes a coroutine that is not awaited to its end.
    """
    if isinstance(failure, asyncio.CancelledError):
        if asyncio._get_running_loop() is None:
            return True  # a plain function that `emit_sync` calls: nothing can be cancelled
        task = asyncio.current_task()
        return task is None or task.cancelling() == 0
    return not isinstance(failure, KeyboardInterrupt | SystemExit | GeneratorExit)
