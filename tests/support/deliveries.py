"""A handler of each delivery for some events, and the events each received."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.app import AuditRow
from tortoise_auth import EventEmitter
from tortoise_auth.database import transactions
from tortoise_auth.events import Event
from tortoise_auth.events.relay import Relay

Outcome = dict[str, list[str]]
"""The names of the events that reached the handlers of each delivery, in order."""


class Undo(Exception):
    """Raised to roll a transaction back."""


class Deliveries:
    """A handler of each delivery for some events, and the events each received.

    The handler in the transaction writes a row, without naming a connection: the row stays if
    the transaction commits.
    """

    def __init__(self, emitter: EventEmitter, *events: type[Event]) -> None:
        self.inline: list[Event] = []
        self.background: list[Event] = []
        self.durable: list[Event] = []
        self._emitter = emitter
        for event in events:
            emitter.on(event, self._leave_a_row, delivery="transaction", name=f"{event.name}:row")
            emitter.on(event, self.inline.append, thread=False, name=f"{event.name}:inline")
            emitter.on(
                event,
                self.background.append,
                delivery="background",
                thread=False,
                name=f"{event.name}:background",
            )
            emitter.on(
                event,
                self.durable.append,
                delivery="durable",
                thread=False,
                name=f"{event.name}:durable",
            )

    async def _leave_a_row(self, event: Event) -> None:
        await AuditRow.create(event=event.name, subject=str(event.id))

    async def outcome(self, relay: Relay[Any]) -> Outcome:
        """Wait for every delivery; return what was received, and clear it.

        All handlers are checked to have received the same events.
        """
        await quiet(self._emitter)
        await relay.drain()
        kept = await AuditRow.filter(subject__not="").order_by("id")
        received = [self.inline, self.background, self.durable]
        ids = [[str(event.id) for event in events] for events in received]
        ids.append([row.subject for row in kept])
        assert all(len(set(each)) == len(each) for each in ids)
        assert all(set(each) <= set(ids[0]) for each in ids)
        outcome = {
            "transaction": [row.event for row in kept],
            "inline": [event.name for event in self.inline],
            "background": [event.name for event in self.background],
            "durable": [event.name for event in self.durable],
        }
        await AuditRow.filter(subject__not="").delete()
        for events in received:
            events.clear()
        return outcome


def everywhere(*names: str) -> Outcome:
    """Return the outcome in which every handler received these events."""
    return {kind: list(names) for kind in ("transaction", "inline", "background", "durable")}


async def quiet(emitter: EventEmitter) -> None:
    """Wait until nothing is in flight: neither handlers nor transactions that are rolled back."""
    while transactions._background:
        await asyncio.wait(list(transactions._background))
    await emitter.aclose()
