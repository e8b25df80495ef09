"""A program is killed a hundred times; every change it committed is delivered, and no other."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from tortoise.context import TortoiseContext

from tests.delivery import victim
from tests.support.accounts import PASSWORD, counting_from_zero
from tests.support.app import User
from tests.support.database import SHARED_DATABASES, address, database, kind_of, look
from tortoise_auth.clock import utc_now
from tortoise_auth.events.relay import Relay
from tortoise_auth.models import Session

pytestmark = pytest.mark.slow

KILLS = 100
SEED = 20260721
SHORTEST_LIFE, LONGEST_LIFE = 0.03, 0.3
PATIENCE = 30.0

processes = multiprocessing.get_context("forkserver")


@pytest.fixture(params=SHARED_DATABASES)
async def shared(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """A database that outlives the processes that use it."""
    async with database(request.param, tmp_path) as context:
        yield context


class Executioner:
    """Starts the program on one database again and again, and kills it each time."""

    def __init__(self, context: TortoiseContext, journal: Path) -> None:
        self._url, self._name = address(context), kind_of(context)
        self._journal = journal
        # What all of them import is imported once, and each is a fork of that.
        processes.set_forkserver_preload(["pytest", "tests.delivery.victim"])

    def kill_one(self, after: float) -> None:
        """Start a process, and kill it this many seconds after its first login."""
        here, there = processes.Pipe(duplex=False)
        child = processes.Process(
            target=victim.run, args=(self._url, self._name, self._journal, there)
        )
        child.start()
        there.close()
        assert here.poll(PATIENCE), "the program did not start"
        here.recv()
        child.join(after)
        child.kill()
        child.join(PATIENCE)
        assert child.exitcode == -signal.SIGKILL
        here.close()


async def test_every_committed_change_is_delivered_and_nothing_else(
    shared: TortoiseContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each committed change is delivered at least once, repetitions have one id, and no other is delivered."""
    for email in victim.ACCOUNTS:
        await counting_from_zero(await User.create_user(email=email, password=PASSWORD))
    path = tmp_path / "journal"
    executioner, chance = Executioner(shared, path), random.Random(SEED)
    left_behind = Counter[bool]()
    for _ in range(KILLS):
        await asyncio.to_thread(executioner.kill_one, chance.uniform(SHORTEST_LIFE, LONGEST_LIFE))
        ((rows,),) = await look(shared, "SELECT count(*) FROM tortoise_auth_outbox")
        left_behind[bool(rows)] += 1

    journal = victim.Journal(path)
    auth = victim.service(journal)
    # For this relay the leases of the killed processes have ended.
    heir = Relay(auth.emitter, User, clock=lambda: utc_now() + timedelta(hours=1))
    inherited = await heir.drain()
    assert await look(shared, "SELECT * FROM tortoise_auth_outbox") == []

    notes = journal.read()
    logins, ids_of_session = [], defaultdict(set)
    changes: dict[str, set[str]] = {str(user.pk): set() for user in await User.all()}
    for note in notes:
        assert note.there
        if note.session is not None:
            logins.append(note.session)
            ids_of_session[note.session].add(note.event_id)
        else:
            changes[note.user].add(note.event_id)
    sessions = {str(session.id) for session in await Session.all()}
    versions = {str(user.pk): user.session_version for user in await User.all()}

    assert set(logins) == sessions
    assert all(len(ids) == 1 for ids in ids_of_session.values())
    assert {user: len(ids) for user, ids in changes.items()} == versions
    events = len({note.event_id for note in notes})
    assert events == len(sessions) + sum(versions.values())
    assert events > KILLS
    assert left_behind[True] > KILLS / 10
    with capsys.disabled():
        print(
            f"\n{kind_of(shared)}: seed {SEED}, {KILLS} kills, {events} changes, "
            f"{len(notes)} deliveries, {len(notes) - events} of them repetitions; "
            f"rows left behind by {left_behind[True]} kills, {inherited} delivered after the last"
        )
