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

_round: ContextVar[_Round | None] = ContextVar("tortoise_auth_background_round", default=None)


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
class _Round:
    """One delivery of those that handlers emit in a circle; what it leaves behind is not in it."""

    number: int
    over: bool = False

    @staticmethod
    def next() -> _Round:
        current = _round.get()
        return _Round(1 if current is None or current.over else current.number + 1)


@dataclass(slots=True)
class _Queued:
    job: Job
    context: Context
    round: _Round


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
        round_ = _Round.next()
        if round_.number > MAX_HOPS:
            return self._refuse(job, f"handlers emit in a circle ({MAX_HOPS} rounds)")
        if len(lane.waiting) >= self.size:
            return self._refuse(job, f"{self.size} deliveries are waiting already")
        context = context_outside_transactions()
        context.run(_round.set, round_)
        lane.waiting.append(_Queued(job, context, round_))
        self._pumping(lane)
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
        loop = asyncio.get_running_loop()
        lane = self._lane(loop)
        if lane.pump is asyncio.current_task():
            return []
        try:
            async with asyncio.timeout(timeout):
                while lane.waiting or lane.pump is not None:
                    await asyncio.wait([self._pumping(lane)])
        except TimeoutError:
            return self._abandon(loop, lane, f"closed after {timeout:g} s")
        return []

    def _abandon(self, loop: asyncio.AbstractEventLoop, lane: _Lane, why: str) -> list[str]:
        """Cancel what runs. If it refuses, it must not hold up later jobs: these get a new lane."""
        with self._lock:
            if self._lanes.get(loop) is lane:
                del self._lanes[loop]
        lost = self._give_up(lane, why)
        if lane.pump is not None:
            lane.pump.cancel()
        return lost

    def _pumping(self, lane: _Lane) -> asyncio.Task[None]:
        """Return the task that works a lane off, of this loop; start it if there is none."""
        if lane.pump is None:
            lane.pump = asyncio.get_running_loop().create_task(
                self._pump(lane), name="tortoise_auth background delivery", context=Context()
            )
        return lane.pump

    async def _pump(self, lane: _Lane) -> None:
        try:
            while lane.waiting:
                queued = lane.waiting.popleft()
                lane.running = queued.job
                await _in_context(queued)
                lane.running = None
        except asyncio.CancelledError:  # the loop ends, and nobody closed the emitter before
            self._give_up(lane, "was cancelled")
            raise
        finally:
            lane.pump = lane.running = None  # a task keeps its loop, and the loop this lane

    def _give_up(self, lane: _Lane, why: str) -> list[str]:
        lost = [job.description for job in (lane.running, *(q.job for q in lane.waiting)) if job]
        lane.running = None
        lane.waiting.clear()
        self.dropped += len(lost)
        if lost:
            logger.error(
                "Background delivery %s with %d deliveries lost: %s",
                why,
                len(lost),
                ", ".join(lost[:20]),
            )
        return lost

    def _lane(self, loop: asyncio.AbstractEventLoop) -> _Lane:
        with self._lock:
            return self._lanes.setdefault(loop, _Lane())

    def _refuse(self, job: Job, why: str) -> bool:
        self.dropped += 1
        if self.overflow == "raise":
            raise BackgroundQueueFull(f"{job.description} was not delivered: {why}")
        logger.error("%s was not delivered in the background: %s", job.description, why)
        return False


async def _in_context(queued: _Queued) -> None:
    try:
        await _InContext(queued.context, queued.job)
    except Exception:  # a job deals with its handlers; the pump must outlive whatever is left
        logger.exception("Background delivery of %s failed", queued.job.description)
    finally:
        queued.round.over = True


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
