"""Being woken by other processes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TypeAlias

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.database.dialects.choice import dialect_of
from tortoise_auth.database.wrappers import root_of
from tortoise_auth.legible import logger_of

logger = logger_of("tortoise_auth.database")

_Listening: TypeAlias = AbstractAsyncContextManager[Callable[[], Awaitable[object]]]


class Listener:
    """Calls *wake* when *channel* is notified, on PostgreSQL; else does nothing.

    A convenience that may fail: its user polls as well. It listens on a connection of its
    own, so that no pool is one short. A connection that is lost is opened again; *wake* is called
    then, too, for what was notified meanwhile.
    """

    def __init__(
        self, connection: BaseDBAsyncClient, channel: str, wake: Callable[[], object]
    ) -> None:
        self._client = root_of(connection)
        self._channel = channel
        self._wake = wake
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()

    async def __aenter__(self) -> Listener:
        listening = self._connect()
        if listening is not None:
            self._task = asyncio.create_task(self._keep_listening(listening))
            try:
                await self._tried.wait()
            except BaseException:
                self._task.cancel()
                raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _connect(self) -> _Listening | None:
        return dialect_of(self._client).listening(self._client, self._channel, self._wake)

    async def _keep_listening(self, listening: _Listening | None) -> None:
        pauses = _pauses()
        while listening is not None:
            try:
                async with listening as until_lost:
                    if self._tried.is_set():
                        logger.info("Listening to %s again", self._channel)
                        self._wake()
                    self._tried.set()
                    pauses = _pauses()
                    await until_lost()
                logger.warning("Lost the connection that listens to %s", self._channel)
            except Exception as error:  # noqa: BLE001 - a convenience
                if not self._tried.is_set():
                    logger.warning("Cannot listen to %s (%s)", self._channel, type(error).__name__)
                self._tried.set()
            await asyncio.sleep(next(pauses))
            listening = self._connect()


def _pauses() -> Iterator[float]:
    """Return seconds before each further attempt to connect."""
    return itertools.chain((0.1, 1, 2, 5, 10), itertools.repeat(30.0))
