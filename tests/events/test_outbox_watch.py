"""A program that writes durable rows says so while no relay delivers them, and says nothing otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from tortoise.context import TortoiseContext
from tortoise.exceptions import OperationalError

from tests.support.accounts import EMAIL, SECRET, log_in
from tests.support.app import User
from tests.support.concurrency import finished
from tests.support.statements import every_statement
from tortoise_auth import AuthConfig, AuthenticationError, AuthService, EventEmitter
from tortoise_auth.events import outbox, outbox_watch
from tortoise_auth.events.event_emitter import deliverer_of
from tortoise_auth.events.outbox_watch import OutboxWatch
from tortoise_auth.models import OutboxEntry


@pytest.fixture
def auth(emitter: EventEmitter) -> AuthService[User]:
    """A service by the real clock, with a durable subscription."""
    return _service(emitter)


@pytest.fixture
def other() -> AuthService[User]:
    """The same application in another process: it shares nothing but the database."""
    return _service(EventEmitter())


@pytest.fixture
def watch(emitter: EventEmitter) -> OutboxWatch:
    """What watches over the rows of the emitter."""
    return deliverer_of(emitter)._watch


def _service(emitter: EventEmitter) -> AuthService[User]:
    emitter.on("user_login", list[object]().append, delivery="durable", name="crm", thread=False)
    return AuthService(User, AuthConfig(secret=SECRET), emitter=emitter)


async def test_no_relay(
    auth: AuthService[User], ada: User, watch: OutboxWatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that was due at two looks is a warning, which says what to do, once for each look."""
    await log_in(auth)
    await watch.look()
    assert caplog.messages == []
    for number in (1, 2):
        await watch.look()
        assert [record.levelname for record in caplog.records] == ["WARNING"] * number
    assert "no relay delivers them, for crm: run `tortoise-auth relay" in caplog.messages[0]


async def test_relay_of_another_process(
    auth: AuthService[User],
    other: AuthService[User],
    ada: User,
    watch: OutboxWatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As long as another process delivers, nothing is said, however many rows are due at each look."""
    for _ in range(4):
        await log_in(auth)
        await log_in(auth)
        await watch.look()
        assert await other.relay(batch_size=1).drain() == 2
    assert caplog.messages == []


async def test_rows_that_back_off(
    auth: AuthService[User], ada: User, watch: OutboxWatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that are tried again and again are no sign that there is no relay."""
    await log_in(auth)
    for attempts in range(3):
        later = {"due_at": (await OutboxEntry.get()).created_at + timedelta(microseconds=attempts)}
        await OutboxEntry.all().update(attempts=attempts, **later)
        await watch.look()
    await OutboxEntry.all().update(due_at=None)
    await watch.look()
    await watch.look()
    assert caplog.messages == []


async def test_looks_once_a_minute(
    db: TortoiseContext,
    auth: AuthService[User],
    ada: User,
    watch: OutboxWatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any number of logins plan one look, a minute later, and no login does more for it."""
    planned: list[float] = []
    with pytest.raises(
        AuthenticationError
    ):  # MariaDB's settings are checked, and a row is counted in
        await auth.login(EMAIL, "wrong")

    call_later = asyncio.get_running_loop().call_later

    def plan(delay: float, callback: Callable[..., object], *args: Any, **options: Any) -> Any:
        if callback == watch._spawn_look:
            planned.append(delay)
        return call_later(delay, callback, *args, **options)

    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", plan)
    with every_statement(db) as first:
        await log_in(auth)
    with every_statement(db) as later:
        await log_in(auth)
    assert planned == [60.0]
    assert len(later) == len(first)
    await watch.look()
    assert planned == [60.0] * 2  # there is something to look for
    await OutboxEntry.all().delete()
    await watch.look()
    await watch.look()
    assert planned == [60.0] * 2
    await log_in(auth)
    assert planned == [60.0] * 3


async def test_goes_on_by_itself(
    auth: AuthService[User],
    ada: User,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After one login the warnings come until the row is delivered, also if the database fails once."""
    monkeypatch.setattr(outbox_watch, "_EVERY", 0.01)
    failures, ended = iter([OperationalError("down")]), asyncio.Event()
    longest_due = outbox.longest_due

    async def fail_once(*args: Any) -> set[outbox.Due]:
        for failure in failures:
            raise failure
        due = await longest_due(*args)
        if not due:
            ended.set()
        return due

    monkeypatch.setattr(outbox, "longest_due", fail_once)
    await log_in(auth)
    while len(caplog.messages) < 2:  # noqa: ASYNC110 - no event is set
        await asyncio.sleep(0.005)
    await auth.relay().drain()
    await finished(ended.wait())
