"""Several relay processes on one table: no row is lost or delivered twice, and each user's are in order."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tortoise.context import TortoiseContext

from tests.support.app import AuditRow, User
from tests.support.database import MODULES, SERVERS, address, database, kind_of
from tortoise_auth import EventEmitter
from tortoise_auth.clock import utc_now
from tortoise_auth.events import Event
from tortoise_auth.events.relay import Relay, RelaySettings
from tortoise_auth.models import OutboxEntry

pytestmark = pytest.mark.slow

ROWS = 2000
SUBJECTS = 100
PATIENCE = 60.0

processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class StepTaken(Event):
    """One of many steps, each taken by one of many walkers."""

    number: int


def carry(url: str, name: str, number: int, parent: Connection) -> None:
    """Run a relay that writes a row for each event, from one message of the parent to the next."""
    asyncio.run(_carry(url, name, number, parent))


async def _carry(url: str, name: str, number: int, parent: Connection) -> None:
    emitter = EventEmitter()

    @emitter.on(StepTaken, delivery="durable", name="steps")
    async def note(event: StepTaken) -> None:
        await AuditRow.create(event=f"{event.number} by {number}", subject=str(event.id))

    async with connected(url, name):
        await AuditRow.all().count()
        parent.send("ready")
        await asyncio.to_thread(parent.recv)
        settings = RelaySettings(batch_size=20, poll_interval=timedelta(milliseconds=20))
        async with Relay(emitter, User, settings):
            await asyncio.to_thread(parent.recv)


@asynccontextmanager
async def connected(url: str, name: str) -> AsyncIterator[None]:
    """Open the database of the test in a process of its own."""
    config = {
        "connections": {name: url},
        "apps": {"models": {"models": MODULES, "default_connection": name}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config)
        yield


class Relays:
    """Relay processes that begin and end together."""

    def __init__(self, context: TortoiseContext, number: int) -> None:
        url, name = address(context), kind_of(context)
        processes.set_forkserver_preload(["pytest", "tests.delivery.test_many_relays"])
        pipes = [processes.Pipe() for _ in range(number)]
        self._parents = [parent for parent, _ in pipes]
        self._processes = [
            processes.Process(target=carry, args=(url, name, each, child))
            for each, (_, child) in enumerate(pipes)
        ]

    async def __aenter__(self) -> None:
        for process in self._processes:
            process.start()
        for parent in self._parents:
            assert await asyncio.to_thread(parent.poll, PATIENCE), "a relay did not start"
            parent.recv()
        self._send_all("begin")

    async def __aexit__(self, *_: object) -> None:
        self._send_all("end")
        for process in self._processes:
            await asyncio.to_thread(process.join, PATIENCE)
            assert process.exitcode == 0

    def _send_all(self, what: str) -> None:
        for parent in self._parents:
            parent.send(what)


def steps(number: int) -> list[StepTaken]:
    """Return that many steps; every tenth has no subject."""
    return [
        StepTaken(number=each, subject_id=None if each % 10 == 0 else str(each % SUBJECTS))
        for each in range(number)
    ]


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("number", [2, 4])
async def test_every_row_once(tmp_path: Path, kind: str, number: int) -> None:
    """Relays that compete for the same rows share them; each is delivered by exactly one of them."""
    async with database(kind, tmp_path) as context:
        events = steps(ROWS)
        now = utc_now()
        await OutboxEntry.bulk_create(
            [
                OutboxEntry(
                    event_id=event.id,
                    event_name=event.name,
                    subscription="steps",
                    subject_id=event.subject_id,
                    payload=event.to_dict(),
                    created_at=now,
                    due_at=now,
                )
                for event in events
            ]
        )
        async with asyncio.timeout(PATIENCE), Relays(context, number):
            while await OutboxEntry.all().exists():  # noqa: ASYNC110 - other processes work
                await asyncio.sleep(0.02)

        delivered = await AuditRow.all().order_by("id")
        assert sorted(row.subject for row in delivered) == sorted(str(event.id) for event in events)
        by_relay: dict[str, int] = defaultdict(int)
        by_walker: dict[str | None, list[int]] = defaultdict(list)
        walkers = {str(event.id): event.subject_id for event in events}
        for row in delivered:
            step, _, relay = row.event.partition(" by ")
            by_relay[relay] += 1
            by_walker[walkers[row.subject]].append(int(step))
        del by_walker[None]
        assert all(taken == sorted(taken) for taken in by_walker.values())
        assert len(by_walker) == SUBJECTS - 10
        assert len(by_relay) == number, f"not all relays took part: {by_relay}"
