"""A bounded pool of threads, for work that must not run on the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ResultT = TypeVar("ResultT")


class Threads:
    """Threads of one purpose, started on first use, and again after a fork, which ends them.

    Args:
        size: The maximum number of threads.
        name: The prefix of their names.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], ResultT]) -> asyncio.Future[ResultT]:
        """Run *work* on one of the threads, as soon as one is free."""
        return asyncio.get_running_loop().run_in_executor(self._executor(), work)

    def close(self) -> None:
        """Stop the threads once they are idle. The next call starts new ones."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            # A pool that a forked child inherits has a queue and no threads: it would wait forever.
            if self._pool is None or self._process != os.getpid():
                self._pool = ThreadPoolExecutor(self._size, self._name)
                self._process = os.getpid()
            return self._pool
