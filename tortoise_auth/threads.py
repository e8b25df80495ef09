"""A bounded pool of threads, for what must not run on the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ResultT = TypeVar("ResultT")


class Threads:
    """Threads of one purpose, made on first use, and again after a fork, whose threads are gone.

    Args:
        size: How many there are at most.
        name: What their names begin with.
        begin: Called by each thread when it begins.
    """

    def __init__(self, size: int, name: str, begin: Callable[[], None] | None = None) -> None:
        self._size = size
        self._name = name
        self._begin = begin
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], ResultT]) -> asyncio.Future[ResultT]:
        """Do *work* on one of the threads, as soon as one is free."""
        return asyncio.get_running_loop().run_in_executor(self._executor(), work)

    def close(self) -> None:
        """Stop the threads once they are idle. They come back with the next call."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._process != os.getpid():
                self._pool = ThreadPoolExecutor(self._size, self._name, initializer=self._begin)
                self._process = os.getpid()
            return self._pool
