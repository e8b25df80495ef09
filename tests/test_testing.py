"""What the library offers for the tests of its hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tortoise_auth import AuthConfig, AuthService, PasswordPolicy, PasswordPolicyError
from tortoise_auth.events import (
    Event,
    EventEmitter,
    EventError,
    NamedEvent,
    UserEvent,
    UserLogin,
    UserLogout,
)
from tortoise_auth.events import (
    emitter as shared,
)
from tortoise_auth.testing import Captured, FakeClock, capture, cheap_hasher, isolated

ADA = User(id=7, email="ada@example.com")


def login(session_id: str = "s-1") -> UserLogin[User]:
    return UserLogin(user=ADA, session_id=session_id)


class TestCapture:
    async def test_order_and_payload(self, emitter: EventEmitter) -> None:
        """The emitted objects are recorded in order; an event by name carries its payload."""
        first, second = login("s-1"), UserLogout(user=ADA)
        with capture(emitter) as events:
            await emitter.emit(first)
            await emitter.emit("order_paid", 7, amount=9.5)
            await emitter.emit(second)
        assert events.names == ["user_login", "order_paid", "user_logout"]
        assert (events[0], events[-1]) == (first, second)
        assert events[0] is first
        assert list(events[1:]) == list(events)[1:]
        named = events.one(NamedEvent)
        assert (named.args, dict(named.kwargs)) == ((7,), {"amount": 9.5})
        assert len(events) == 3

    async def test_of(self, emitter: EventEmitter) -> None:
        """`of` returns the events of a class and of its subclasses."""
        with capture(emitter) as events:
            for session_id in ("a", "b"):
                await emitter.emit(login(session_id))
            await emitter.emit(UserLogout(user=ADA))
            await emitter.emit("other")
        assert [event.session_id for event in events.of(UserLogin)] == ["a", "b"]
        assert len(events.of(UserEvent)) == 3
        assert len(events.of(Event)) == 4

    async def test_one(self, emitter: EventEmitter) -> None:
        """`one` returns the only event, and otherwise names the events that there were."""
        with capture(emitter) as events:
            with pytest.raises(
                AssertionError,
                match=r"^0 UserLogin among no events \(of this emitter; .*auth\.emitter",
            ):
                events.one(UserLogin)
            event = login()
            await emitter.emit(event)
            assert events.one(UserLogin) is event
            await emitter.emit(login())
            with pytest.raises(
                AssertionError, match=r"^2 UserLogin among \['user_login', 'user_lo"
            ):
                events.one(UserLogin)

    @pytest.mark.parametrize("wrong", ["user_login", None, int, User])
    def test_what_is_no_class_of_events(self, emitter: EventEmitter, wrong: Any) -> None:
        """A name instead of a class is refused with the words to use instead."""
        with (
            capture(emitter) as events,
            pytest.raises(TypeError, match=r"UserLogin.*assert_emitted"),
        ):
            events.one(wrong)

    async def test_assert_emitted(self, emitter: EventEmitter) -> None:
        """`assert_emitted` accepts exactly these events, in this order."""
        with capture(emitter) as events:
            events.assert_emitted()
            await emitter.emit("a")
            await emitter.emit("b")
        events.assert_emitted("a", "b")
        for wrong in (("b", "a"), ("a",), ("a", "b", "c"), ()):
            with pytest.raises(AssertionError, match=r"emitted: \['a', 'b'\], expected: "):
                events.assert_emitted(*wrong)
        events.clear()
        events.assert_emitted()

    async def test_repr(self, emitter: EventEmitter) -> None:
        """The `repr` shows the names, for the messages of failed assertions."""
        with capture(emitter) as events:
            assert repr(events) == "<Captured: nothing>"
            await emitter.emit("a")
            await emitter.emit("b")
            assert repr(events) == "<Captured: a, b>"

    async def test_handlers_still_run(self, emitter: EventEmitter) -> None:
        """Recording does not keep a handler from receiving the event."""
        received: list[str] = []
        emitter.on("evt", lambda: received.append("listener"))
        with capture(emitter) as events:
            await emitter.emit("evt")
        assert received == ["listener"]
        assert events.names == ["evt"]

    async def test_mute(self, emitter: EventEmitter) -> None:
        """While muted, no handler receives an event; afterwards every handler does."""
        received: list[str] = []
        emitter.on("evt", lambda: received.append("listener"))
        emitter.on("*", lambda event: received.append("all"))
        with capture(emitter, mute=True) as events:
            await emitter.emit("evt")
            assert received == []
        await emitter.emit("evt")
        assert received == ["listener", "all"]
        assert events.names == ["evt"]

    async def test_records_before_others_fail(self) -> None:
        """An event is recorded even if the first handler raises."""
        emitter = EventEmitter(errors="raise")

        @emitter.on("evt", priority=-1000)
        async def fail() -> None:
            raise ValueError("no")

        with capture(emitter) as events, pytest.raises(EventError):
            await emitter.emit("evt")
        assert events.names == ["evt"]

    async def test_the_background(self, emitter: EventEmitter) -> None:
        """An event emitted in the background is recorded when it is delivered."""
        with capture(emitter) as events:
            emitter.emit_nowait("evt")
            assert events.names == []
            await emitter.aclose()
            assert events.names == ["evt"]

    async def test_inside_one_another(self, emitter: EventEmitter) -> None:
        """Captures can be nested, and each records while it is open."""
        with capture(emitter) as outer:
            await emitter.emit("a")
            with capture(emitter) as inner:
                await emitter.emit("b")
            await emitter.emit("c")
        assert outer.names == ["a", "b", "c"]
        assert inner.names == ["b"]

    async def test_leaves_no_trace(self, emitter: EventEmitter) -> None:
        """Afterwards the emitter is as before, even if the block fails."""
        emitter.on("evt", print, name="kept")
        before = emitter.describe()
        with pytest.raises(ZeroDivisionError), capture(emitter, mute=True):
            raise ZeroDivisionError
        assert emitter.describe() == before


class TestIsolated:
    async def test_restores_handlers(self, emitter: EventEmitter) -> None:
        """Whatever was added, removed, consumed or cleared, the handlers are as before."""
        received: list[str] = []

        async def kept() -> None:
            received.append("kept")

        async def once() -> None:
            received.append("once")

        emitter.on("evt", kept)
        emitter.once("evt", once)
        before = emitter.describe()
        for _ in range(2):
            with isolated(emitter) as same:
                assert same is emitter
                emitter.on("evt", lambda: received.append("temporary"))
                await emitter.emit("evt")
                emitter.clear()
                await emitter.emit("evt")
            assert received == ["kept", "once", "temporary"]
            assert emitter.describe() == before
            received.clear()
        await emitter.emit("evt")
        await emitter.emit("evt")
        assert received == ["kept", "once", "kept"]

    def test_also_after_a_failure(self, emitter: EventEmitter) -> None:
        """The handlers are restored when the block raises."""
        with pytest.raises(ZeroDivisionError), isolated(emitter):
            emitter.on("evt", print)
            raise ZeroDivisionError
        assert emitter.events() == []


class TestFakes:
    def test_the_clock_stands_still(self) -> None:
        """The clock shows the same aware time until it is advanced or set back."""
        clock = FakeClock()
        assert clock() == clock() == datetime(2026, 1, 1, 12, tzinfo=UTC)
        clock.advance(timedelta(minutes=15))
        assert clock() == datetime(2026, 1, 1, 12, 15, tzinfo=UTC)
        clock.advance(timedelta(minutes=-15))
        assert clock() == FakeClock()()

    async def test_the_model_s_parts_are_looked_up_at_each_call(
        self, sqlite: TortoiseContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A service that was made before a test replaced the model's parts uses what the test gave."""
        service = AuthService(User, AuthConfig(secret=SECRET))
        hasher, emitter = cheap_hasher(), EventEmitter()
        monkeypatch.setattr(User, "password_hasher", hasher)
        monkeypatch.setattr(User, "password_policy", PasswordPolicy(min_length=30))
        monkeypatch.setattr(User, "emitter", emitter)
        hashes = AsyncMock(wraps=hasher.hash)
        monkeypatch.setattr(hasher, "hash", hashes)
        with capture(emitter) as events:
            user = await User.create_user(email=EMAIL, password=PASSWORD + PASSWORD)
            with pytest.raises(PasswordPolicyError):
                await service.set_password(user, PASSWORD)
            await service.set_password(user, PASSWORD * 2)
            await service.login(EMAIL, PASSWORD * 2)
        events.assert_emitted("user_registered", "password_changed", "user_login")
        assert hashes.await_count == 2
        assert (service.passwords, service.emitter) == (hasher, emitter)

    async def test_the_hasher_is_cheap_and_real(self) -> None:
        """The cheap hasher makes Argon2id hashes of the lowest cost that verify."""
        hasher = cheap_hasher()
        try:
            hashed = await hasher.hash(PASSWORD)
            assert hashed.startswith("$argon2id$v=19$m=8,t=1,p=1$")
            assert (await hasher.verify(PASSWORD, hashed)).valid
            assert not (await hasher.verify(PASSWORD + "!", hashed)).valid
        finally:
            hasher.close()


class TestPlugin:
    def test_events(self, auth_events: Captured) -> None:
        """The fixture records what the default emitter emits."""
        shared.emit_sync("order_paid", 7)
        auth_events.assert_emitted("order_paid")

    def test_clock(self, auth_clock: FakeClock) -> None:
        """The fixture is a clock that can be advanced."""
        before = auth_clock()
        auth_clock.advance(timedelta(days=1))
        assert auth_clock() - before == timedelta(days=1)

    def test_entry_point(self) -> None:
        """An installed package registers the plugin."""
        (point,) = entry_points(group="pytest11", name="tortoise_auth")
        assert point.value == "tortoise_auth.pytest_plugin"

    def test_in_another_project(self, tmp_path: Path) -> None:
        """A project can use the fixtures with nothing but the installed package."""
        (tmp_path / "test_host.py").write_text(HOST)
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_host.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": "", "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "3 passed" in result.stdout, result.stdout + result.stderr
        assert result.returncode == 0


HOST = """
import asyncio
from datetime import timedelta

from tortoise_auth.events import emitter, on

received = []


@on("order_paid")
async def listener(order_id):
    received.append(order_id)


def test_events(auth_events):
    emitter.on("order_paid", lambda: received.append("temporary"))
    emitter.emit_sync("order_paid", 7)
    auth_events.assert_emitted("order_paid")
    assert received == [7, "temporary"]


def test_restored(auth_events, auth_clock):
    auth_events.assert_emitted()
    received.clear()
    emitter.emit_sync("order_paid", 8)
    assert received == [8]
    before = auth_clock()
    auth_clock.advance(timedelta(hours=1))
    assert auth_clock() - before == timedelta(hours=1)


def test_hasher(auth_hasher):
    hashed = asyncio.run(auth_hasher.hash("correct horse battery staple"))
    assert hashed.startswith("$argon2id$")
"""
