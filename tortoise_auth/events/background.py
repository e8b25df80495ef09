"""Bounded delivery in the background of one process, in order, with drain.

One pump per event loop carries the jobs out one after the other, each in the context in which it
was submitted: request ids are kept, and no task is made for an emit.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias
from weakref import WeakKeyDictionary

from tortoise_auth.database import context_outside_transactions

logger = logging.getLogger("tortoise_auth.events")

Overflow: TypeAlias = Literal["log", "raise"]

MAX_HOPS = 32
"""How often a background handler may emit into the background what emits again, and so on."""

_hops: ContextVar[int] = ContextVar("tortoise_auth_background_hops", default=0)


class BackgroundQueueFull(RuntimeError):
    """The queue is full, or handlers emit in a circle, and the emitter was told to raise."""


class Job(Protocol):
    """What a backend carries out: call it once, and await what it returns."""

    description: str

    def __call__(self) -> Awaitable[None]:
        """Run the handlers; their failures are dealt with inside."""
        ...


class Backend(Protocol):
    """Carries jobs out in the background; give one to ``EventEmitter(backend=...)``.

    ``async with emitter:`` enters and leaves it. ``submit`` may be called at any time, also before.
    """

    async def __aenter__(self) -> object:
        """Start."""
        ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> object:
        """Carry out what was submitted, and stop."""
        ...

    def submit(self, job: Job) -> object:
        """Take *job* without blocking."""
        ...


@dataclass(slots=True)
class _Queued:
    job: Job
    context: Context


class _Lane:
    """The jobs of one event loop, and the task that works them off."""

    def __init__(self) -> None:
        self.waiting: deque[_Queued] = deque()
        self.pump: asyncio.Task[None] | None = None
        self.running: Job | None = None


class BackgroundQueue:
    """The built-in backend: a bounded queue in memory.

    Args:
        size: Jobs that may wait. More are not taken, loudly.
        overflow: ``"log"`` (an ERROR, and `dropped` counts it) or ``"raise"``.

    Attributes:
        dropped: How many jobs were not taken or not finished.
    """

    def __init__(self, size: int = 1000, overflow: Overflow = "log") -> None:
        self.size = size
        self.overflow = overflow
        self.dropped = 0
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def submit(self, job: Job) -> bool:
        """Take *job*; false if there is no room for it.

        Raises:
            RuntimeError: No event loop is running.
            BackgroundQueueFull: There is no room, and ``overflow`` is ``"raise"``.
        """
        loop = asyncio.get_running_loop()
        lane = self._lane(loop)
        hops = _hops.get() + 1
        if hops > MAX_HOPS:
            return self._refuse(job, f"handlers emit in a circle ({MAX_HOPS} rounds)")
        if len(lane.waiting) >= self.size:
            return self._refuse(job, f"{self.size} deliveries are waiting already")
        context = context_outside_transactions()
        context.run(_hops.set, hops)
        lane.waiting.append(_Queued(job, context))
        if lane.pump is None or lane.pump.done():
            lane.pump = loop.create_task(
                _pump(lane), name="tortoise_auth background delivery", context=Context()
            )
        return True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.drain()

    async def drain(self, timeout: float | None = None) -> list[str]:  # noqa: ASYNC109 - the deadline is the feature
        """Wait until nothing waits, including what is submitted meanwhile.

        Args:
            timeout: Seconds; after that the rest is cancelled.

        Returns:
            Descriptions of what was lost. It has been logged, too.
        """
        lane = self._lane(asyncio.get_running_loop())
        if lane.pump is None or lane.pump is asyncio.current_task():
            return []
        if not lane.pump.done():
            await asyncio.wait([lane.pump], timeout=timeout)
        if lane.pump.done():
            return []
        lost = ([lane.running] if lane.running else []) + [queued.job for queued in lane.waiting]
        lane.waiting.clear()
        lane.pump.cancel()
        self.dropped += len(lost)
        descriptions = [job.description for job in lost]
        logger.error(
            "Background delivery closed after %s s with %d deliveries lost: %s",
            timeout,
            len(descriptions),
            ", ".join(descriptions[:20]),
        )
        return descriptions

    def _lane(self, loop: asyncio.AbstractEventLoop) -> _Lane:
        with self._lock:
            return self._lanes.setdefault(loop, _Lane())

    def _refuse(self, job: Job, why: str) -> bool:
        self.dropped += 1
        if self.overflow == "raise":
            raise BackgroundQueueFull(f"{job.description} was not delivered: {why}")
        logger.error("%s was not delivered in the background: %s", job.description, why)
        return False


async def _pump(lane: _Lane) -> None:
    while lane.waiting:
        queued = lane.waiting.popleft()
        lane.running = queued.job
        try:
            await _InContext(queued.context, queued.job)
        except Exception:  # a job deals with its handlers; the pump must outlive whatever is left
            logger.exception("Background delivery of %s failed", queued.job.description)
        finally:
            lane.running = None


class _InContext:
    """Awaits a job in a context of its own, as a task would, without a task."""

    def __init__(self, context: Context, job: Callable[[], Awaitable[None]]) -> None:
        self._context = context
        self._job = job

    def __await__(self) -> Generator[Any, Any, None]:
        run = self._context.run
        coroutine = run(_started, self._job)
        try:
            step = run(coroutine.send, None)
            while True:
                try:
                    answer = yield step
                except BaseException as error:  # noqa: BLE001 - handed on, as `await` does
                    step = run(coroutine.throw, error)
                else:
                    step = run(coroutine.send, answer)
        except StopIteration:
            return
        finally:
            coroutine.close()


def _started(job: Callable[[], Awaitable[None]]) -> Coroutine[Any, Any, None]:
    async def await_job() -> None:
        await job()

    return await_job()
