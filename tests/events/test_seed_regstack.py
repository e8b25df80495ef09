"""What hooks written for regstack rely on: direct registration, side by side, never in the way."""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import User
from tortoise_auth import AuthConfig, AuthService
from tortoise_auth.events import EventEmitter
from tortoise_auth.testing import FakeClock

PATIENCE = 10.0
PUBLISHED = {
    "user_login",
    "user_login_failed",
    "user_logout",
    "password_changed",
    "password_rehashed",
    "session_refreshed",
    "session_revoked",
    "refresh_token_reused",
    "user_registered",
    "user_deactivated",
    "user_activated",
    "login_throttled",
}


@dataclass
class Person:
    email: str = "ada@example.com"
    full_name: str = "Ada Lovelace"


@pytest.fixture
def hooks() -> EventEmitter:
    return EventEmitter(concurrent=True)


class TestSubscribing:
    async def test_direct_form(self, hooks: EventEmitter) -> None:
        """``on(event, handler)`` registers at once and gives the handler back."""
        contacts: list[tuple[str, str]] = []

        async def send_to_crm(user: Person) -> None:
            contacts.append((user.email, user.full_name))

        assert hooks.on("user_registered", send_to_crm) is send_to_crm
        await hooks.emit("user_registered", user=Person())
        assert contacts == [("ada@example.com", "Ada Lovelace")]

    async def test_decorator_form(self, hooks: EventEmitter) -> None:
        """``@on(event)`` does what the direct form does."""
        purged: list[str] = []

        @hooks.on("user_deleted")
        async def purge_host_data(user: Person) -> None:
            purged.append(user.email)

        await hooks.emit("user_deleted", user=Person())
        assert purged == ["ada@example.com"]

    async def test_keyword_only_handlers(self, hooks: EventEmitter) -> None:
        """An event with several keywords reaches a handler that takes them keyword-only."""
        tracked: list[tuple[str, str]] = []

        @hooks.on("oauth_signin_completed")
        async def track_signin(*, user: Person, provider: str, mode: str, was_new: bool) -> None:
            tracked.append(("signup" if was_new else "login", provider))

        for was_new in (True, False):
            await hooks.emit(
                "oauth_signin_completed",
                user=Person(),
                provider="google",
                mode="signin",
                was_new=was_new,
            )
        assert tracked == [("signup", "google"), ("login", "google")]

    @pytest.mark.parametrize("make", [MagicMock, AsyncMock])
    async def test_sync_and_async(self, hooks: EventEmitter, make: type[Mock]) -> None:
        """Plain functions and coroutine functions are handlers alike; what they return is ignored."""
        handler = make(return_value=7)
        hooks.on("user_verified", handler)
        emission: Awaitable[object] = hooks.emit("user_verified", user="ada")
        assert await emission is None
        handler.assert_called_once_with(user="ada")

    async def test_an_awaitable_of_a_plain_function(self, hooks: EventEmitter) -> None:
        """A plain function that returns an awaitable has it awaited, on the loop."""
        done = AsyncMock()
        hooks.on("user_verified", lambda user: done(user))
        await hooks.emit("user_verified", user="ada")
        done.assert_awaited_once_with("ada")

    async def test_custom_names(self, hooks: EventEmitter) -> None:
        """A host fires events of its own, with any payload, and nobody has to declare them."""
        handler = AsyncMock()
        hooks.on("invoice.paid", handler)
        await hooks.emit("invoice.paid", number=7, total="12.50")
        handler.assert_awaited_once_with(number=7, total="12.50")
        assert "invoice.paid" not in hooks.known_events()

    async def test_known_names_with_another_payload(self, hooks: EventEmitter) -> None:
        """On an emitter of the host's own, a name of ours carries whatever the host likes."""
        seen: list[str] = []

        @hooks.on("user_login")
        async def on_login(machine: str) -> None:
            seen.append(machine)

        await hooks.emit("user_login", machine="db1")
        assert seen == ["db1"]

    async def test_every_keyword_is_free(self, hooks: EventEmitter) -> None:
        """``event`` and other names of parameters may be keywords of a payload."""
        handler = AsyncMock()
        hooks.on("e-mail", handler)
        await hooks.emit("e-mail", event="changed", self=1, handler=2, timeout=3, priority=4)
        handler.assert_awaited_once_with(event="changed", self=1, handler=2, timeout=3, priority=4)

    async def test_nobody_subscribed(
        self, hooks: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """To fire what nobody subscribed to does nothing."""
        await hooks.emit("user_verified", user="ada")
        assert caplog.records == []
        assert hooks.events() == []

    async def test_two_registries(self) -> None:
        """Two registries in one process share nothing."""
        business, consumer = EventEmitter(concurrent=True), EventEmitter(concurrent=True)
        handler = AsyncMock()
        business.on("user_registered", handler)
        await consumer.emit("user_registered", user="ada")
        handler.assert_not_called()
        await business.emit("user_registered", user="ada")
        handler.assert_awaited_once_with(user="ada")

    def test_known_events(self, hooks: EventEmitter) -> None:
        """`known_events` lists the library's events by name, each once, on every emitter."""
        known = list(hooks.known_events())
        assert set(known) >= PUBLISHED
        assert {"event", "user_event", "named_event", "*"}.isdisjoint(known)
        assert len(known) == len(set(known))
        assert known == list(EventEmitter().known_events())

    def test_every_known_event_can_be_heard(self) -> None:
        """What `known_events` lists can be subscribed to, also where names are checked."""
        hooks = EventEmitter(concurrent=True, strict=True)
        handler = MagicMock()
        for name in PUBLISHED:
            hooks.on(name, handler)
        assert set(hooks.events()) == PUBLISHED


class TestConcurrency:
    async def test_async_handlers_run_at_the_same_time(self, hooks: EventEmitter) -> None:
        """Three handlers that wait for one another all come through."""
        meeting = asyncio.Barrier(3)
        met: list[int] = []

        def numbered(number: int) -> Callable[[], Awaitable[None]]:
            async def handler() -> None:
                await meeting.wait()
                met.append(number)

            return handler

        for number in range(3):
            hooks.on("evt", numbered(number))
        async with asyncio.timeout(PATIENCE):
            await hooks.emit("evt")
        assert sorted(met) == [0, 1, 2]

    async def test_without_the_option_they_do_not(self) -> None:
        """An emitter that was not told otherwise runs one handler at a time."""
        emitter = EventEmitter(propagate_errors=True)
        inside: list[str] = []
        most: list[int] = []

        async def crowd() -> None:
            inside.append("one more")
            await asyncio.to_thread(lambda: None)
            most.append(len(inside))
            inside.pop()

        for _ in range(3):
            emitter.on("evt", crowd)
        await emitter.emit("evt")
        assert most == [1, 1, 1]

    async def test_emit_waits_for_all(self, hooks: EventEmitter) -> None:
        """When ``emit`` returns, the slowest handler is done."""
        released, finished = asyncio.Event(), asyncio.Event()

        @hooks.on("evt")
        async def slow() -> None:
            await released.wait()
            await asyncio.to_thread(lambda: None)
            finished.set()

        @hooks.on("evt")
        async def quick() -> None:
            released.set()

        async with asyncio.timeout(PATIENCE):
            await hooks.emit("evt")
        assert finished.is_set()

    async def test_sync_handlers_keep_their_order(self, hooks: EventEmitter) -> None:
        """Plain functions run one after the other, in the order they were registered."""
        order: list[int] = []
        for number in range(10):
            hooks.on("evt", lambda number=number: order.append(number))
        await hooks.emit("evt")
        assert order == list(range(10))

    async def test_one_handler_alone(self, hooks: EventEmitter) -> None:
        """With a single handler there is nothing to run beside, and it runs all the same."""
        handler = AsyncMock()
        hooks.on("evt", handler)
        await hooks.emit("evt", 1)
        handler.assert_awaited_once_with(1)

    async def test_a_cancelled_caller_loses_nothing(self, hooks: EventEmitter) -> None:
        """If the caller is cancelled while a plain function works, the async handlers still run."""
        working, proceed = threading.Event(), threading.Event()
        told = asyncio.Event()

        @hooks.on("evt")
        def blocking() -> None:
            working.set()
            proceed.wait(PATIENCE)

        @hooks.on("evt")
        async def notify() -> None:
            told.set()

        request = asyncio.create_task(hooks.emit("evt"))
        try:
            assert await asyncio.to_thread(working.wait, PATIENCE)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        finally:
            proceed.set()
        async with asyncio.timeout(PATIENCE):
            await told.wait()


def sync_failure(**payload: object) -> None:
    raise OSError("no route to the CRM")


async def async_failure(**payload: object) -> None:
    raise OSError("no route to the CRM")


class TestErrors:
    @pytest.mark.parametrize("failing", [sync_failure, async_failure])
    async def test_logged_and_dropped(
        self,
        hooks: EventEmitter,
        caplog: pytest.LogCaptureFixture,
        failing: Callable[..., object],
    ) -> None:
        """A failure of either kind is one ERROR with names and traceback, and all others run."""
        before, after, plain = AsyncMock(), AsyncMock(), MagicMock()
        for handler in (before, failing, plain, after):
            hooks.on("user_registered", handler)
        await hooks.emit("user_registered", user="ada")

        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.getMessage() == (
            f"Handler '{failing.__name__}' for event 'user_registered' raised "
            "OSError: no route to the CRM"
        )
        assert record.exc_info is not None
        assert traceback.extract_tb(record.exc_info[2])[-1].name == failing.__name__
        for handler in (before, after, plain):
            handler.assert_called_once_with(user="ada")

    async def test_all_fail(self, hooks: EventEmitter, caplog: pytest.LogCaptureFixture) -> None:
        """Every failure is logged, also where no handler succeeds."""
        for failing in (sync_failure, async_failure, sync_failure, async_failure):
            hooks.on("evt", failing)
        await hooks.emit("evt")
        assert len(caplog.records) == 4

    @pytest.mark.parametrize(
        "failure", [RuntimeError("boom"), asyncio.CancelledError(), TimeoutError()], ids=repr
    )
    async def test_siblings_are_never_cancelled(
        self,
        hooks: EventEmitter,
        caplog: pytest.LogCaptureFixture,
        failure: BaseException,
    ) -> None:
        """Handlers under way when another fails go on to their end, however many turns it takes."""
        failed = asyncio.Event()
        together = asyncio.Barrier(2)
        finished: list[str] = []

        @hooks.on("evt")
        async def fails() -> None:
            failed.set()
            raise failure

        async def survivor() -> None:
            await failed.wait()
            for _ in range(20):
                await together.wait()
            finished.append("survivor")

        hooks.on("evt", survivor)
        hooks.on("evt", survivor)
        async with asyncio.timeout(PATIENCE):
            await hooks.emit("evt")
        assert finished == ["survivor", "survivor"]
        (record,) = caplog.records
        assert f"'fails' for event 'evt' raised {type(failure).__name__}" in record.getMessage()

    async def test_the_emitter_survives(self, hooks: EventEmitter) -> None:
        """After a failure the same handlers run at the next emit."""
        calls: list[int] = []

        @hooks.on("evt")
        async def fails(number: int) -> None:
            calls.append(number)
            raise RuntimeError("boom")

        for number in range(3):
            await hooks.emit("evt", number)
        assert calls == [0, 1, 2]


class TestAuthFlow:
    async def test_registration_and_login(
        self, sqlite: TortoiseContext, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The library's own events reach concurrent hooks, and a failing hook breaks no flow."""
        hooks = EventEmitter(concurrent=True)
        monkeypatch.setattr(User, "emitter", hooks)
        meeting = asyncio.Barrier(2)
        told: list[str] = []

        async def tell_crm(user: User) -> None:
            await meeting.wait()
            told.append(f"crm: {user.email}")

        async def tell_sales(user: User) -> None:
            await meeting.wait()
            told.append(f"sales: {user.email}")

        for event in ("user_registered", "user_login"):
            hooks.on(event, sync_failure)
            hooks.on(event, tell_crm)
            hooks.on(event, async_failure)
            hooks.on(event, tell_sales)

        auth = AuthService(User, AuthConfig(secret=SECRET), clock=clock)
        async with asyncio.timeout(PATIENCE):
            ada = await User.create_user(email="ada@example.com", password=PASSWORD)
            result = await auth.login("ada@example.com", PASSWORD)
        assert await auth.authenticate(result.access_token) == ada
        assert sorted(told) == sorted(2 * ["crm: ada@example.com", "sales: ada@example.com"])
