"""The one way in which a change and its events happen: together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.database import transaction
from tortoise_auth.events.catalog import Event
from tortoise_auth.events.dispatch import EventEmitter


class UnitOfWork:
    """A transaction, and the events that become true when it commits.

    Example::

        async with UnitOfWork(connection, emitter) as unit:
            await Session.create(..., using_db=unit.connection)
            unit.record(UserLogin(...))
        # committed, and the handlers have run

    Attributes:
        connection: The transaction; pass it as ``using_db=`` to every statement.
    """

    connection: BaseDBAsyncClient

    def __init__(self, connection: BaseDBAsyncClient, emitter: EventEmitter) -> None:
        self._outside = connection
        self._emitter = emitter
        self._recorded: list[Event] = []
        self._effects: list[Callable[[], object]] = []
        self._stack = AsyncExitStack()

    def record(self, event: Event) -> None:
        """Emit *event* once the change is committed, and not at all if it is not."""
        self._recorded.append(event)

    def when_committed(self, effect: Callable[[], object]) -> None:
        """Call *effect* after the commit and before any handler: to bring live objects up to date."""
        self._effects.append(effect)

    async def __aenter__(self) -> Self:
        self.connection = await self._stack.enter_async_context(transaction(self._outside))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)
        if error is None:
            for effect in self._effects:
                effect()
            for event in self._recorded:
                await self._emitter.emit(event)
