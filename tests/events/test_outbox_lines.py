"""Lines of the outbox: however relays interleave, every row is delivered, and those of a line in order."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext

from tests.support.concurrency import finished
from tests.support.database import BOTH_BY_POSTGRES, database, kind_of, root
from tests.support.servers import Second, second
from tests.support.statements import every_statement
from tortoise_auth.database import transaction
from tortoise_auth.database.dialects import outbox as sql
from tortoise_auth.events import Event, outbox
from tortoise_auth.events.outbox import Claimed
from tortoise_auth.models import DeadLetter, OutboxEntry
from tortoise_auth.testing import FakeClock

LEASE = timedelta(minutes=1)


@dataclass(frozen=True, kw_only=True)
class TrainPassed(Event):
    """An event of a host."""

    number: int


@dataclass
class Lines:
    """The outbox of one subscription, and what relays do with it."""

    connection: BaseDBAsyncClient
    clock: FakeClock

    async def put(self, *subjects: str | None, on: BaseDBAsyncClient | None = None) -> list[int]:
        """Write rows, due now; return their ids."""
        ids = []
        for number, subject in enumerate(subjects):
            event = TrainPassed(number=number, subject_id=subject)
            row = await OutboxEntry.create(
                event_id=event.id,
                event_name=event.name,
                subscription="s",
                subject_id=subject,
                payload=event.to_dict(),
                created_at=self.clock(),
                due_at=self.clock(),
                using_db=on or self.connection,
            )
            ids.append(int(row.id))
        return ids

    async def claim(
        self, holder: str, *, limit: int = 100, on: BaseDBAsyncClient | None = None
    ) -> list[Claimed]:
        """Claim once."""
        claimed = await outbox.claim(
            on or self.connection,
            holder=holder,
            subscriptions=["s"],
            user_table="app_user",
            now=self.clock(),
            lease_ends=self.clock() + LEASE,
            limit=limit,
        )
        return claimed.rows


@pytest.fixture
def lines(db: TortoiseContext, clock: FakeClock) -> Lines:
    return Lines(root(db), clock)


def ids_of(rows: list[Claimed]) -> list[int]:
    """Return the ids, in order."""
    return [row.id for row in rows]


class TestTwoConnections:
    """A row is set aside while the row before it goes, in either order of the commits."""

    @pytest.fixture
    def lines(self, server: TortoiseContext, clock: FakeClock) -> Lines:
        """The lines on a database with many connections."""
        return Lines(root(server), clock)

    @pytest.fixture
    async def onlooker(self, server: TortoiseContext) -> AsyncIterator[Second]:
        """A further connection."""
        async with second(server) as connection:
            yield connection

    async def test_set_aside_first(self, lines: Lines, onlooker: Second) -> None:
        """The delivery waits until the row behind is set aside, and then makes it due again."""
        await lines.put("a")
        first = await lines.claim("r1")
        (later,) = await lines.put("a")
        async with transaction(lines.connection) as claiming:
            assert await lines.claim("r2", on=claiming) == []
            deleting = asyncio.ensure_future(outbox.delete_delivered(lines.connection, first, "r1"))
            await onlooker.until_waiting()
        await finished(deleting)
        assert ids_of(await lines.claim("r2")) == [later]

    async def test_gone_first(self, lines: Lines) -> None:
        """A row whose predecessor is just being deleted is not set aside."""
        await lines.put("a")
        first = await lines.claim("r1")
        (later,) = await lines.put("a")
        async with transaction(lines.connection) as deleting:
            await outbox.delete_delivered(deleting, first, "r1")
            assert await finished(lines.claim("r2")) == []
            assert await OutboxEntry.filter(due_at__isnull=True).count() == 0
        assert ids_of(await lines.claim("r2")) == [later]

    @pytest.mark.parametrize("dies", [False, True])
    @pytest.mark.parametrize("order", ["12", "21", "both", "overlapping", "overlapping back"])
    async def test_ids_that_commit_out_of_order(
        self,
        lines: Lines,
        onlooker: Second,
        clock: FakeClock,
        order: str,
        dies: bool,
    ) -> None:
        """Two rows of a line that are claimed at once leave none behind, in whatever order they go."""
        async with transaction(lines.connection) as writing:
            ids = await lines.put("a", on=writing)
            ids += await lines.put("a")
            last = await lines.claim("r2")
        first = await lines.claim("r1")
        assert ids_of(first + last) == ids
        ids += await lines.put("a", "a")
        assert await lines.claim("r3") == []
        assert await OutboxEntry.filter(due_at__isnull=True).count() == 2

        async def end(rows: list[Claimed], on: BaseDBAsyncClient | None = None) -> None:
            for row in rows:
                holder, connection = f"r{1 if row in first else 2}", on or lines.connection
                if dies:
                    await outbox.dead_letter(connection, row, holder, at=clock(), error="x")
                else:
                    await outbox.delete_delivered(connection, [row], holder)

        if order.startswith("overlapping"):
            one, other = (first, last) if order == "overlapping" else (last, first)
            async with transaction(lines.connection) as ending:
                await end(one, ending)
                ends_too = asyncio.ensure_future(end(other))
                await onlooker.until_waiting()
            await finished(ends_too)
        elif order == "both":
            async with transaction(lines.connection) as ending:
                await end(first + last, ending)
        else:
            await end(first + last if order == "12" else last + first)
        assert ids_of(await lines.claim("r3")) == ids[2:]

    @pytest.mark.parametrize("server", BOTH_BY_POSTGRES, indirect=True)
    async def test_whatever_isolation_is_the_default(
        self, server: TortoiseContext, lines: Lines, onlooker: Second
    ) -> None:
        """A later statement sees what was committed meanwhile, also where snapshots are the default.

        On MariaDB a connection with that default is refused: see `tests.database.test_mysql`.
        """
        await repeatable_read(server)
        await lines.put("a")
        first = await lines.claim("r1")
        (later,) = await lines.put("a")
        async with transaction(lines.connection) as claiming:
            await claiming.execute_script("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            assert await lines.claim("r2", on=claiming) == []
            deleting = asyncio.ensure_future(outbox.delete_delivered(lines.connection, first, "r1"))
            await onlooker.until_waiting()
        await finished(deleting)
        assert ids_of(await lines.claim("r2")) == [later]


async def test_claim_and_deletion_write_first(tmp_path: Path, clock: FakeClock) -> None:
    """On SQLite they lock the database before they read: another program cannot make them fail."""
    async with database("file", tmp_path) as context:
        lines = Lines(root(context), clock)
        await lines.put("a", "a")
        async with transaction(lines.connection) as working:
            await working.execute_query(sql.BEGIN["sqlite"])
            client: Any = lines.connection
            with closing(sqlite3.connect(client.filename, timeout=0)) as other:
                with pytest.raises(sqlite3.OperationalError, match="locked"):
                    other.execute("BEGIN IMMEDIATE")
        with every_statement(context) as seen:
            await outbox.delete_delivered(lines.connection, await lines.claim("r1"), "r1")
        begun = [after for before, after in pairwise(seen) if before == "BEGIN"]
        assert begun == [sql.BEGIN["sqlite"]] * 2


async def repeatable_read(context: TortoiseContext) -> None:
    """Let every new connection begin its transactions at that level."""
    client: Any = root(context)
    await client.close()
    if kind_of(context) == "postgres":
        client.server_settings["default_transaction_isolation"] = "repeatable read"
    else:
        client.extra["configure"] = _read_repeatably


async def _read_repeatably(connection: psycopg.AsyncConnection) -> None:
    await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)


class Relay:
    """A relay of the model: it claims, calls handlers in order, and records what came of it."""

    def __init__(self, name: str, lines: Lines, ledger: Ledger) -> None:
        self._name = name
        self._lines = lines
        self._ledger = ledger
        self._batches = 0
        self._rows: list[Claimed] = []
        self._delivered: list[Claimed] = []
        self._holder = ""

    async def work(self, chance: random.Random) -> None:
        """Do one step."""
        if not self._rows and not self._delivered:
            self._batches += 1
            self._holder = f"{self._name}:{self._batches}"
            self._rows = await self._lines.claim(self._holder, limit=chance.randint(1, 6))
        elif self._rows and chance.random() < 0.7:
            await self._call(self._rows.pop(0), chance)
        elif chance.random() < 0.9:
            delivered, self._delivered = self._delivered, []
            await outbox.delete_delivered(self._lines.connection, delivered, self._holder)
        else:  # it is killed, and another one takes its place
            self._rows, self._delivered = [], []

    async def _call(self, row: Claimed, chance: random.Random) -> None:
        connection, now = self._lines.connection, self._lines.clock()
        fate = chance.random()
        if fate < 0.7:
            self._ledger.called(row)
            self._delivered.append(row)
            return
        if fate < 0.85:
            later = now + timedelta(seconds=chance.randint(1, 90))
            await outbox.reschedule(connection, row, self._holder, due_at=later, error="x")
        else:
            await outbox.dead_letter(connection, row, self._holder, at=now, error="x")
            if await DeadLetter.filter(id=row.id).exists():
                self._ledger.died(row.id)
        behind = [each for each in self._rows if _line(each) == _line(row)]
        self._rows = [each for each in self._rows if each not in behind]
        await outbox.release(connection, behind, self._holder, now)


class Ledger:
    """What was written, in order for each line, and what came of it."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self._lines: dict[object, list[int]] = {}
        self._dead: set[int] = set()

    def wrote(self, row: int, subject: str | None) -> None:
        """Note a row."""
        self._lines.setdefault(row if subject is None else subject, []).append(row)

    def died(self, row: int) -> None:
        """Note that a row is, or once was, a dead letter: it may come late."""
        self._dead.add(row)

    def called(self, row: Claimed) -> None:
        """Note that a handler succeeded with a row, and check that none before it was left out."""
        earlier = self._lines[_line(row)]
        for each in earlier[: earlier.index(row.id)]:
            assert self.calls[each] or each in self._dead, f"{row.id} has overtaken {each}"
        self.calls[row.id] += 1

    def ids(self) -> set[int]:
        """Return every row that was written."""
        return {row for line in self._lines.values() for row in line}


def _line(row: Claimed) -> object:
    return row.id if row.subject_id is None else row.subject_id


@pytest.mark.parametrize("seed", range(6))
async def test_any_interleaving(lines: Lines, clock: FakeClock, seed: int) -> None:
    """Whatever relays do and in whatever order, every row is delivered, and no row overtakes another."""
    chance, ledger = random.Random(seed), Ledger()
    relays = [Relay(name, lines, ledger) for name in ("r1", "r2", "r3")]
    for _ in range(250):
        step = chance.random()
        if step < 0.25:
            subject = chance.choice(["a", "a", "a", "b", "c", None])
            (row,) = await lines.put(subject)
            ledger.wrote(row, subject)
        elif step < 0.9:
            await chance.choice(relays).work(chance)
        elif step < 0.95:
            clock.advance(timedelta(seconds=chance.randint(1, 90)))
        elif step < 0.97:
            await outbox.retry_dead(lines.connection, clock())
        else:
            some = [int(row.id) for row in await OutboxEntry.all().limit(3)]
            await outbox.retry(lines.connection, some, clock())
    await outbox.retry_dead(lines.connection, clock() + LEASE)
    clock.advance(timedelta(minutes=3))
    while await OutboxEntry.all().count():
        rows = await lines.claim("last", limit=5)
        for each in rows:
            ledger.called(each)
        await outbox.delete_delivered(lines.connection, rows, "last")
        assert rows or await OutboxEntry.filter(due_at__lte=clock()).count(), "rows are left behind"
    assert ledger.calls.keys() == ledger.ids()
    assert await DeadLetter.all().count() == 0
