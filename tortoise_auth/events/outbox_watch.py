"""Says so while durable rows wait and no relay delivers them."""

from __future__ import annotations

import asyncio
from weakref import WeakSet

from tortoise_auth.clock import utc_now
from tortoise_auth.database import connection_for, context_outside_transactions, root_of
from tortoise_auth.events import outbox
from tortoise_auth.legible import listed, logger_of
from tortoise_auth.models import OutboxEntry

logger = logger_of("tortoise_auth.outbox")

_EVERY = 60.0
"""Seconds between two looks."""


class OutboxWatch:
    """Looks once a minute, from the time when rows were written until none is due.

    If a row was due at two looks and no relay claimed it between them, none works for it: a warning.
    One look is a query that reads one row for each subscription, in a task of its own.
    """

    def __init__(self) -> None:
        self._planned: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
        self._due: set[outbox.Due] = set()
        self._looking: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look in a minute, unless that is to happen anyway."""
        loop = asyncio.get_running_loop()
        if loop not in self._planned:
            self._planned.add(loop)
            loop.call_later(_EVERY, self._spawn_look, context=context_outside_transactions())

    def _spawn_look(self) -> None:
        self._looking = asyncio.ensure_future(self.look())  # the loop keeps only a weak reference

    async def look(self) -> None:
        """Compare what is due with the last look, and go on as long as there is something."""
        self._planned.discard(asyncio.get_running_loop())
        try:
            due = await outbox.longest_due(root_of(connection_for(OutboxEntry)), utc_now())
        except Exception as error:  # noqa: BLE001 - the database is down, which others report
            logger.debug("Could not look for rows that wait (%s)", type(error).__name__)
            return self.begin()
        unclaimed = self._due & due
        self._due = due
        if unclaimed:
            logger.warning(
                "Durable rows wait and no relay delivers them, for %s: run `tortoise-auth relay "
                "module:auth`, or `async with auth.relay()` in the application, where these handlers "
                "are registered; `tortoise-auth outbox status` counts what waits",
                listed(sorted({row.subscription for row in unclaimed})),
            )
        if due:
            self.begin()
