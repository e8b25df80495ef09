"""A handler of each delivery for some events, and what became of each event."""

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


class Ears:
    """A handler of each delivery for some events, and what became of each.

    The handler in the transaction leaves a row, without naming a connection: what counts is
    whether the row stays.
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
        """Let everything arrive that ever will; return it, and forget it.

        Whatever reached a handler is checked to be one and the same event for all of them.
        """
        await quiet(self._emitter)
        await relay.drain()
        kept = await AuditRow.filter(subject__not="").order_by("id")
        heard = [self.inline, self.background, self.durable]
        ids = [[str(event.id) for event in events] for events in heard]
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
        for events in heard:
            events.clear()
        return outcome


def everywhere(*names: str) -> Outcome:
    """Every handler heard these."""
    return {kind: list(names) for kind in ("transaction", "inline", "background", "durable")}


async def quiet(emitter: EventEmitter) -> None:
    """Wait until nothing is under way: neither handlers nor transactions that are being undone."""
    while transactions._background:
        await asyncio.wait(list(transactions._background))
    await emitter.aclose()
