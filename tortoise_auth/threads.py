"""Bounded threads of one purpose, for what must not run on the event loop."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

ResultT = TypeVar("ResultT")

_EXIT_PATIENCE = 5.0
"""Seconds for which the end of the program waits for calls under way."""

_CGROUP = Path("/sys/fs/cgroup")

_all: WeakSet[Threads] = WeakSet()


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """Return how many CPUs this process may use: its affinity, and the quota of its container.

    ``os.cpu_count()`` names those of the host, where a container with one of 64 would run 64
    threads at once.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for quota_file, period_file in (
        ("cpu.max", None),  # version 2: both numbers on one line, or "max"
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
    ):
        with suppress(OSError, ValueError):
            text = (cgroup / quota_file).read_text()
            text += " " + (cgroup / period_file).read_text() if period_file else ""
            quota, period = map(int, text.split())
            if quota > 0 and period > 0:
                cpus = min(cpus, max(1, -(-quota // period)))
    return cpus


class ThreadsStuckError(RuntimeError):
    """Every thread is taken by a call that was given up and has not ended.

    Attributes:
        first: It is the first one since a thread was free.
    """

    def __init__(self, calls: int, *, first: bool) -> None:
        super().__init__(f"{calls} earlier calls ran out of time and still occupy its threads")
        self.first = first


class Threads:
    """Threads of one purpose, started on first use, and again after a fork, which ends them.

    They are daemons, unlike those of `concurrent.futures.ThreadPoolExecutor`, which the
    interpreter joins when it ends: one function that hangs would keep the process for ever.

    Args:
        size: The maximum number of threads.
        name: The prefix of their names.
        idle: Seconds after which a thread without work ends.
    """

    _process: int
    _closed: bool
    _refusing: bool

    def __init__(self, size: int, name: str, *, idle: float = 10.0) -> None:
        self._size = size
        self._name = name
        self._idle_time = idle
        self._reset()
        _all.add(self)

    def submit(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        """Run *work* on one of the threads, as soon as one is free.

        Raises:
            ThreadsStuckError: No thread will be free before a call ends that was given up.
        """
        if self._process != os.getpid():
            self._reset()
        call: Future[ResultT] = Future()
        with self._changed:
            if len(self._stuck) >= self._size:
                first = not self._refusing
                self._refusing = True
                raise ThreadsStuckError(self._size, first=first)
            self._closed = False
            self._waiting.append((call, work))
            # A thread stays idle by this number until it wakes, so those for earlier calls are not
            # free.
            if self._idle < len(self._waiting) and self._count < self._size:
                self._start()
            else:
                self._changed.notify()
        return call

    def give_up(self, call: Future[Any]) -> None:
        """Wait no longer for *call*: it does not begin any more, or is stuck until it ends."""
        if not call.cancel():
            with self._changed:
                self._stuck.add(call)
            call.add_done_callback(self._end_stuck)

    def close(self) -> None:
        """Stop the threads once they are idle. The next call starts new ones."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def is_unused(self) -> bool:
        """Whether no thread is there."""
        return self._count == 0

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._stuck: set[Future[Any]] = set()
        self._count = self._idle = 0
        self._closed = self._refusing = False
        self._process = os.getpid()

    def _start(self) -> None:
        self._count += 1
        thread = threading.Thread(
            target=self._work, name=f"{self._name}_{self._count}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads; those that are there go on
            self._count -= 1
            if not self._count:
                self._waiting.pop()
                raise

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Do one call; false if this thread is to end."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._waiting or self._closed, self._idle_time)
            self._idle -= 1
            if not self._waiting:
                self._count -= 1
                return False
            call, work = self._waiting.popleft()
        if call.set_running_or_notify_cancel():
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - raised where the call is awaited
                call.set_exception(error)
            else:
                call.set_result(result)
        return True

    def _end_stuck(self, call: Future[Any]) -> None:
        with self._changed:
            self._stuck.discard(call)
            self._refusing = False

    def _is_busy(self) -> bool:
        with self._changed:
            return self._count > self._idle + len(self._stuck) or bool(self._waiting and self._idle)


@atexit.register
def _finish() -> None:
    """Let calls under way end, for a while; those that were given up are not waited for."""
    ends = time.monotonic() + _EXIT_PATIENCE
    for threads in list(_all):
        # A process that was forked has these objects and none of their threads: it waits for none.
        while threads._process == os.getpid() and threads._is_busy() and time.monotonic() < ends:
            time.sleep(0.01)
