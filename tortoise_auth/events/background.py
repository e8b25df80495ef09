"""Bounded delivery in the background of one process, in order per subscription, with drain.

Each subscription has a lane of its own: a bounded queue, and one task that carries the jobs out one
after the other. A handler that is slow, hangs, or floods its lane holds up no other.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from contextvars import Context, ContextVar
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias
from weakref import WeakKeyDictionary

from tortoise_auth.database import context_outside_transactions
from tortoise_auth.events.invocation import is_handler_failure
from tortoise_auth.legible import logger_of

logger = logger_of("tortoise_auth.events")

Overflow: TypeAlias = Literal["log", "raise"]

MAX_HOPS = 32
"""How often a background handler may emit into the background what emits again, and so on."""

_QUIET = 1.0
"""Seconds between two log lines about jobs that were not taken."""

_innermost: ContextVar[BackgroundJob | None] = ContextVar("tortoise_auth_job", default=None)


class BackgroundQueueFull(RuntimeError):
    """The lane is full, or handlers emit in a circle, and the queue was made to raise."""


class Job(Protocol):
    """What a backend carries out: call it once, and await what it returns.

    Jobs of the emitter also have a ``lane``: those with an equal one belong to one subscription and
    must be carried out one after the other. They run outside any transaction, wherever they are
    awaited.
    """

    description: str

    def __call__(self) -> Awaitable[None]:
        """Run the handler; its failure is dealt with inside."""
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


class BackgroundJob:
    """A delivery to one subscription, in a task and a context of its own, outside any transaction.

    Attributes:
        lane: Jobs with an equal one are carried out one after the other.
        description: What to call it in messages.
        hops: How many jobs led to it, each submitted by the one before while that ran.
    """

    def __init__(
        self, work: Callable[[], Coroutine[Any, Any, None]], lane: Hashable, description: str
    ) -> None:
        around: BackgroundJob | None = _innermost.get()
        self.hops: int = 1 if around is None or around._over else around.hops + 1
        self.lane = lane
        self.description = description
        self._work = work
        self._over: bool = False
        self._context = context_outside_transactions()
        self._context.run(_innermost.set, self)

    async def __call__(self) -> None:
        """Do the work."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_task(self._work(), name=self.description, context=self._context)
        finally:
            self._over = True  # what it leaves behind, a timer for example, is not inside it


class _Lane:
    """The jobs of one subscription in one event loop."""

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.pump: asyncio.Task[None] | None = None

    async def work(self) -> None:
        """Carry out the jobs that wait."""
        await asyncio.sleep(0)  # an eager task (3.12) would run handlers inside `submit`
        while self.waiting:
            self.running = job = self.waiting.popleft()
            try:
                await job()
            except BaseException as failure:
                if not is_handler_failure(failure):
                    raise
                logger.exception("Background delivery of %s failed", job.description)
            self.running = None


class _Lanes:
    """The lanes of one event loop, and what they did not take."""

    def __init__(self) -> None:
        self.by_key: dict[Hashable, _Lane] = {}
        self.refused = 0
        self.why = ""
        self.quiet = False

    def report(self) -> None:
        """Log what was not taken since the last line."""
        if self.refused > 1:
            logger.error(
                "%d deliveries were not taken in the background, the last one: %s",
                *(self.refused, self.why),
            )
        elif self.refused:
            logger.error("%s", self.why)
        self.refused = 0

    def report_later(self) -> None:
        """Log now what was not taken, and the rest after a second, if there is any."""
        self.quiet = self.refused > 0
        self.report()
        if self.quiet:
            asyncio.get_running_loop().call_later(_QUIET, self.report_later, context=Context())


class BackgroundQueue:
    """The built-in backend: bounded queues in memory, one for each subscription.

    Args:
        size: Jobs of one subscription that may wait. More are not taken, loudly.
        overflow: ``"log"`` (one ERROR a second with a number, and `dropped` counts them) or
            ``"raise"``.

    Attributes:
        dropped: How many jobs were not taken or not finished.
    """

    def __init__(self, size: int = 1000, overflow: Overflow = "log") -> None:
        self.size = size
        self.overflow = overflow
        self.dropped = 0
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lanes] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def submit(self, job: Job) -> bool:
        """Take *job*; false if there is no room for it.

        Raises:
            RuntimeError: No event loop is running.
            BackgroundQueueFull: There is no room, and ``overflow`` is ``"raise"``.
        """
        lanes = self._lanes()
        if getattr(job, "hops", 1) > MAX_HOPS:
            return self._refuse(lanes, job, f"handlers emit in a circle ({MAX_HOPS} rounds)")
        key = getattr(job, "lane", None)  # jobs that no emitter made may do without
        lane = lanes.by_key.get(key) or _Lane()
        if len(lane.waiting) >= self.size:
            return self._refuse(lanes, job, f"{self.size} deliveries are waiting already")
        lanes.by_key[key] = lane
        lane.waiting.append(job)
        if lane.pump is None:
            self._start(lanes, key, lane)
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

        Called by a handler in the background, it returns at once: that handler is what it would
        wait for.

        Args:
            timeout: Seconds; after that the rest is cancelled.

        Returns:
            Descriptions of what was lost. It has been logged, too.
        """
        lanes = self._lanes()
        innermost = _innermost.get()
        if innermost and any(each.running is innermost for each in lanes.by_key.values()):
            return []
        lost: list[str] = []
        try:
            async with asyncio.timeout(timeout):
                while pumps := [each.pump for each in lanes.by_key.values() if each.pump]:
                    await asyncio.wait(pumps)
        except TimeoutError:
            late, lanes.by_key = lanes.by_key, {}  # one that refuses to end holds up no later job
            lost = self._give_up(late.values(), f"closed after {timeout:g} s")
            for lane in late.values():
                if lane.pump is not None:
                    lane.pump.cancel()
        lanes.report()
        return lost

    def _start(self, lanes: _Lanes, key: Hashable, lane: _Lane) -> None:
        # In an empty context: a lane outlives the request that started it, and would keep alive
        # what hangs on its variables.
        lane.pump = asyncio.get_running_loop().create_task(
            lane.work(), name="tortoise_auth background delivery", context=Context()
        )
        lane.pump.add_done_callback(partial(self._end, lanes, key, lane), context=Context())

    def _end(self, lanes: _Lanes, key: Hashable, lane: _Lane, pump: asyncio.Task[None]) -> None:
        lane.pump = None  # a task keeps its loop, and the loop this lane
        if not pump.cancelled() and pump.exception() is None and lane.waiting:
            self._start(lanes, key, lane)
            return
        if lanes.by_key.get(key) is lane:
            del lanes.by_key[key]
        # The loop ends without an aclose() before, or something ends the program.
        why = "was cancelled" if pump.cancelled() else f"ended by {pump.exception()!r}"
        self._give_up([lane], why)

    def _give_up(self, lanes: Iterable[_Lane], why: str) -> list[str]:
        lost: list[str] = []
        for lane in lanes:
            lost += [job.description for job in (lane.running, *lane.waiting) if job]
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

    def _lanes(self) -> _Lanes:
        # Several threads, each with a loop of its own, may share one emitter.
        with self._lock:
            return self._loops.setdefault(asyncio.get_running_loop(), _Lanes())

    def _refuse(self, lanes: _Lanes, job: Job, why: str) -> bool:
        self.dropped += 1
        if self.overflow == "raise":
            raise BackgroundQueueFull(f"{job.description} was not delivered: {why}")
        lanes.refused += 1
        lanes.why = f"{job.description} was not delivered in the background: {why}"
        if not lanes.quiet:
            lanes.report_later()
        return False
