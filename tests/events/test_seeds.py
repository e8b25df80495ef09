"""The four event systems that this one grew from: what their documentation shows works unchanged.

What each of them promises beyond its examples is tested where it is implemented: order, removal
and names in ``test_registry``, arguments in ``test_subscription``, error policies, timeouts,
cancellation, concurrency and threads in the tests of the emitter, queues and shutdown in
``test_background``, log lines in ``test_failures``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from unittest.mock import AsyncMock, MagicMock

import pytest
from tortoise.context import TortoiseContext

import tortoise_auth
from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET
from tests.support.app import AuditRow, User
from tortoise_auth import AuthConfig, AuthenticationError, AuthService, events
from tortoise_auth.events import EventEmitter, EventError
from tortoise_auth.exceptions import TokenError, TortoiseAuthError
from tortoise_auth.testing import FakeClock, isolated

PATIENCE = 10.0


@dataclass
class Person:
    """An object with an address: all that a handler in these examples needs."""

    email: str = EMAIL


@pytest.fixture
def shared() -> Iterator[EventEmitter]:
    """The library's own emitter, without handlers before and after."""
    with isolated(events.emitter):
        events.emitter.clear()
        yield events.emitter


@pytest.fixture
async def ada(sqlite: TortoiseContext) -> User:
    return await User.create_user(email=EMAIL, password=PASSWORD)


class TestTortoiseAuth:
    """The first edition of this library: registration order, logged errors, ``propagate_errors``."""

    async def test_decorator_and_add_listener(self, emitter: EventEmitter) -> None:
        """Both put functions into one list, and decorators stack."""
        calls: list[str] = []

        @emitter.on("user_login")
        @emitter.on("user_logout")
        async def note(user: Person) -> None:
            calls.append(f"note {user.email}")

        async def added(user: Person) -> None:
            calls.append(f"added {user.email}")

        emitter.add_listener(event_name="user_login", handler=added)
        await emitter.emit("user_login", Person())
        await emitter.emit("user_logout", Person())
        assert calls == [f"note {EMAIL}", f"added {EMAIL}", f"note {EMAIL}"]
        assert emitter.listeners(event_name="user_login") == [note, added]

    async def test_one_after_the_other(self, emitter: EventEmitter) -> None:
        """Handlers run in registration order, each to its end; what they return is dropped."""
        order: list[int] = []

        def numbered(number: int) -> Callable[[], Awaitable[int]]:
            async def handler() -> int:
                await asyncio.to_thread(lambda: None)
                order.append(number)
                return number

            return handler

        for number in range(10):
            emitter.add_listener("evt", numbered(number))
        emission: Awaitable[object] = emitter.emit("evt")
        assert await emission is None
        assert order == list(range(10))

    async def test_any_payload(self, emitter: EventEmitter) -> None:
        """Arguments arrive as emitted, whatever the keywords are called."""
        handler = AsyncMock()
        emitter.add_listener("evt", handler)
        names = {"event_name": 1, "self": 2, "event": 3, "name": 4, "args": 5, "kwargs": 6}
        await emitter.emit("evt", 1, "two", **names)
        handler.assert_awaited_once_with(1, "two", **names)

    async def test_remove_listener(self, emitter: EventEmitter) -> None:
        """The first registration of an equal handler goes; an absent one is a `ValueError`."""

        class Mailer:
            async def notify(self) -> None: ...

        async def between() -> None: ...

        mailer = Mailer()
        for handler in (mailer.notify, between, mailer.notify):
            emitter.add_listener("evt", handler)
        emitter.remove_listener(event_name="evt", handler=mailer.notify)
        assert emitter.listeners("evt") == [between, mailer.notify]
        emitter.remove_listener("evt", mailer.notify)
        with pytest.raises(ValueError):
            emitter.remove_listener("evt", mailer.notify)
        with pytest.raises(ValueError):
            emitter.remove_listener("other", between)

    @pytest.mark.parametrize(("event", "remaining"), [("a", ["b"]), (None, []), ("c", ["a", "b"])])
    async def test_clear(
        self, emitter: EventEmitter, event: str | None, remaining: list[str]
    ) -> None:
        """`clear` removes the handlers of one event, or all; an unknown name changes nothing."""
        called: list[str] = []

        @emitter.on("a")
        @emitter.on("b")
        async def note(name: str) -> None:
            called.append(name)

        emitter.clear(event)
        for name in ("a", "b"):
            await emitter.emit(name, name)
        assert called == remaining

    async def test_shared_emitter(self, shared: EventEmitter) -> None:
        """The functions of the module are methods of one emitter that logs and isolates."""
        calls: list[tuple[str, str]] = []

        @events.on("host_event")
        async def decorated(value: str) -> None:
            calls.append(("decorated", value))

        async def added(value: str) -> None:
            calls.append(("added", value))

        events.add_listener("host_event", added)
        await EventEmitter().emit("host_event", "of another emitter")
        await events.emit("host_event", "data")
        events.remove_listener("host_event", decorated)
        await shared.emit("host_event", "again")
        assert calls == [("decorated", "data"), ("added", "data"), ("added", "again")]
        assert shared.propagate_errors is False

    @pytest.mark.parametrize("name", ["on", "emit", "add_listener", "remove_listener", "emitter"])
    def test_both_addresses(self, name: str) -> None:
        """The functions and the emitter are the same in `tortoise_auth` and `tortoise_auth.events`."""
        assert getattr(tortoise_auth, name) == getattr(events, name)

    def test_classes_have_both_addresses_too(self) -> None:
        """`EventEmitter` is also in the root; `EventError` with the errors and with the events."""
        assert tortoise_auth.EventEmitter is EventEmitter
        assert tortoise_auth.exceptions.EventError is EventError
        assert issubclass(EventError, TortoiseAuthError)

    async def test_errors_are_logged(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A failure is one ERROR line, byte for byte as documented, and the next handler runs."""
        after = AsyncMock()

        @emitter.on("user_login")
        async def flaky_handler(user: Person) -> None:
            raise RuntimeError("something went wrong")

        emitter.add_listener("user_login", after)
        await emitter.emit("user_login", Person())
        (record,) = caplog.records
        assert record.getMessage().encode() == (
            b"Handler 'flaky_handler' for event 'user_login' raised "
            b"RuntimeError: something went wrong"
        )
        assert (record.name, record.levelname) == ("tortoise_auth.events", "ERROR")
        after.assert_awaited_once()

    async def test_errors_are_raised(self, caplog: pytest.LogCaptureFixture) -> None:
        """With ``propagate_errors`` the first failure is an `EventError`, and the rest do not run."""
        before, after, down = AsyncMock(), AsyncMock(), RuntimeError("audit system down")
        strict = EventEmitter(propagate_errors=True)
        strict.add_listener("user_login", before)

        @strict.on("user_login")
        async def critical_handler(user: Person) -> None:
            raise down

        strict.add_listener("user_login", after)
        with pytest.raises(EventError) as caught:
            await strict.emit("user_login", Person())
        error = caught.value
        assert (error.event_name, error.handler_name) == ("user_login", "critical_handler")
        assert error.original is error.__cause__ is down
        assert str(error) == (
            "Handler 'critical_handler' for event 'user_login' raised "
            "RuntimeError: audit system down"
        )
        before.assert_awaited_once()
        after.assert_not_called()
        assert caplog.records == []


class TestTortoiseAuthService:
    """The events that the first edition documents, emitted by the service."""

    async def test_user_login_and_logout(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """``handler(user)``: a login once it is stored, a logout once its token is dead."""
        seen: list[str] = []

        @emitter.on("user_login")
        async def on_login(user: User) -> None:
            stored = await User.get(pk=user.pk)
            assert stored.last_login == user.last_login is not None
            seen.append(f"login {user.email}")

        @emitter.on("user_logout")
        async def on_logout(user: User) -> None:
            with pytest.raises(TokenError):
                await auth.authenticate(token)
            seen.append(f"logout {user.email}")

        token = (await auth.login(EMAIL, PASSWORD)).access_token
        await auth.logout(token)
        await auth.logout(token)
        await auth.login(EMAIL, PASSWORD)
        await auth.logout_all(ada)
        assert seen == 2 * [f"login {EMAIL}", f"logout {EMAIL}"]

    @pytest.mark.parametrize(
        ("identifier", "password", "reason"),
        [
            ("nobody@example.com", PASSWORD, "not_found"),
            ("gone@example.com", PASSWORD, "inactive"),
            (EMAIL, "not her password", "bad_password"),
        ],
    )
    @pytest.mark.usefixtures("ada")
    async def test_user_login_failed(
        self,
        auth: AuthService[User],
        emitter: EventEmitter,
        identifier: str,
        password: str,
        reason: str,
    ) -> None:
        """``handler(*, identifier, reason)`` gets the reason; the caller does not."""
        seen: list[dict[str, str]] = []

        @emitter.on("user_login_failed")
        async def track(*, identifier: str, reason: str) -> None:
            seen.append({"identifier": identifier, "reason": reason})

        gone = await User.create_user(email="gone@example.com", password=PASSWORD)
        await auth.deactivate(gone)
        with pytest.raises(AuthenticationError, match=r"^Invalid credentials$"):
            await auth.login(identifier, password)
        assert seen == [{"identifier": identifier, "reason": reason}]

    @pytest.mark.parametrize("through", ["model", "service"])
    async def test_password_changed(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, through: str
    ) -> None:
        """``handler(user)``, once the new hash is stored, and exactly once."""
        seen: list[tuple[User, bool]] = []

        @emitter.on("password_changed")
        async def notify_password_change(user: User) -> None:
            stored = await User.get(pk=user.pk)
            seen.append((user, await stored.check_password(NEW_PASSWORD)))

        if through == "model":
            await ada.set_password(NEW_PASSWORD)
        else:
            await auth.set_password(ada, NEW_PASSWORD)
        assert seen == [(ada, True)]

    async def test_a_flaky_handler_does_not_fail_the_login(
        self,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The login succeeds, the session works, and the failure is in the log."""

        @emitter.on("user_login")
        async def flaky_handler(user: User) -> None:
            raise RuntimeError("something went wrong")

        result = await auth.login(EMAIL, PASSWORD)
        assert await auth.authenticate(result.access_token) == ada
        assert [record.getMessage() for record in caplog.records] == [
            "Handler 'flaky_handler' for event 'user_login' raised "
            "RuntimeError: something went wrong"
        ]

    @pytest.mark.parametrize("call", ["login", "logout", "logout_all"])
    async def test_propagated_errors_reach_the_caller(
        self, ada: User, clock: FakeClock, call: str
    ) -> None:
        """The caller gets the `EventError`; a logout has ended the session all the same."""
        strict = EventEmitter(propagate_errors=True)
        auth = AuthService(User, AuthConfig(secret=SECRET), emitter=strict, clock=clock)
        token = (await auth.login(EMAIL, PASSWORD)).access_token
        calls: list[User] = []

        @strict.on("user_login", "user_logout")
        async def critical_handler(user: User) -> None:
            calls.append(user)
            raise RuntimeError("audit system down")

        calling: dict[str, Callable[[], Awaitable[object]]] = {
            "login": lambda: auth.login(EMAIL, PASSWORD),
            "logout": lambda: auth.logout(token),
            "logout_all": lambda: auth.logout_all(ada),
        }
        with pytest.raises(EventError, match="critical_handler"):
            await calling[call]()
        assert calls == [ada]
        if call != "login":
            with pytest.raises(TokenError):
                await auth.authenticate(token)

    async def test_audit_trail(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Handlers that write rows leave a trail of good and bad logins, logouts and changes."""

        @emitter.on("user_login")
        async def log_login(user: User) -> None:
            await AuditRow.create(event="login", subject=str(user.pk))

        @emitter.on("user_login_failed")
        async def log_failed_login(*, identifier: str, reason: str) -> None:
            await AuditRow.create(event="login_failed", subject=f"{identifier}: {reason}")

        @emitter.on("user_logout")
        async def log_logout(user: User) -> None:
            await AuditRow.create(event="logout", subject=str(user.pk))

        @emitter.on("password_changed")
        async def log_password_change(user: User) -> None:
            await AuditRow.create(event="password_changed", subject=str(user.pk))

        with pytest.raises(AuthenticationError):
            await auth.login("eve@example.com", PASSWORD)
        result = await auth.login(EMAIL, PASSWORD)
        await auth.logout(result.refresh_token)
        await ada.set_password(NEW_PASSWORD)
        assert await AuditRow.all().order_by("id").values_list("event", "subject") == [
            ("login_failed", "eve@example.com: not_found"),
            ("login", str(ada.pk)),
            ("logout", str(ada.pk)),
            ("password_changed", str(ada.pk)),
        ]


class TestRegstack:
    """Hooks: registered directly, run side by side, with keyword payloads."""

    @pytest.fixture
    def hooks(self) -> EventEmitter:
        """Run handlers at the same time."""
        return EventEmitter(concurrent=True)

    async def test_direct_form(self, hooks: EventEmitter) -> None:
        """``on(event, handler)`` registers at once and returns the handler, plain or async."""
        plain, waiting = MagicMock(return_value=7), AsyncMock()
        assert hooks.on("user_verified", plain) is plain
        assert hooks.on("user_verified", waiting) is waiting
        await hooks.emit("user_verified", user="ada")
        plain.assert_called_once_with(user="ada")
        waiting.assert_awaited_once_with(user="ada")

    async def test_keyword_only_handlers(self, hooks: EventEmitter) -> None:
        """A handler of a host's event takes its keywords keyword-only."""
        tracked: list[tuple[str, str]] = []

        @hooks.on("oauth_signin_completed")
        async def track_signin(*, user: Person, provider: str, mode: str, was_new: bool) -> None:
            tracked.append(("signup" if was_new else "login", provider))

        payload = {"user": Person(), "provider": "google", "mode": "signin", "was_new": True}
        await hooks.emit("oauth_signin_completed", **payload)
        assert tracked == [("signup", "google")]

    async def test_an_awaitable_of_a_plain_function(self, hooks: EventEmitter) -> None:
        """A plain function that returns an awaitable has it awaited."""
        done = AsyncMock()
        hooks.on("user_verified", lambda user: done(user))
        await hooks.emit("user_verified", user="ada")
        done.assert_awaited_once_with("ada")

    def test_known_events(self, hooks: EventEmitter) -> None:
        """`known_events` names each event of the contract once; a strict emitter takes them all."""
        known = list(hooks.known_events())
        contract = {
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
        assert set(known) >= contract
        assert len(known) == len(set(known))
        strict = EventEmitter(concurrent=True, strict=True)
        for name in contract:
            strict.on(name, MagicMock())
        assert set(strict.events()) == contract

    async def test_registration_and_login(
        self, sqlite: TortoiseContext, clock: FakeClock, hooks: EventEmitter, emitted: list[str]
    ) -> None:
        """A service emits on the emitter it was given, side by side; a failure breaks no flow."""
        meeting = asyncio.Barrier(2)
        done: list[str] = []

        async def unreachable(**payload: object) -> None:
            raise OSError("no route to the CRM")

        async def update_crm(user: User) -> None:
            await meeting.wait()
            done.append(f"crm: {user.email}")

        async def notify_sales(user: User) -> None:
            await meeting.wait()
            done.append(f"sales: {user.email}")

        for handler in (unreachable, update_crm, notify_sales):
            hooks.on("user_login", handler)
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        auth = AuthService(User, AuthConfig(secret=SECRET), emitter=hooks, clock=clock)
        async with asyncio.timeout(PATIENCE):
            result = await auth.login(EMAIL, PASSWORD)
        assert await auth.authenticate(result.access_token) == ada
        assert sorted(done) == [f"crm: {EMAIL}", f"sales: {EMAIL}"]
        assert emitted == ["user_registered"]  # on the emitter of the model


class TestLitestar:
    """Listeners: several events, no waiting, a backend of one's own."""

    async def test_one_listener_several_events(self, emitter: EventEmitter) -> None:
        """One decorator with two names, and ``emit_nowait`` inside the emitter's block."""
        sent: list[tuple[str, str]] = []

        @emitter.on("user_created", "password_changed")
        async def send_email_handler(email: str, message: str) -> None:
            sent.append((email, message))

        async with emitter as entered:
            assert entered is emitter
            emitter.emit_nowait("user_created", email=EMAIL, message="Welcome!")
            emitter.emit_nowait("password_changed", email=EMAIL, message="Was it you?")
            assert sent == []
        assert sent == [(EMAIL, "Welcome!"), (EMAIL, "Was it you?")]

    @pytest.mark.parametrize("nowait", [True, False])
    async def test_each_names_only_what_it_needs(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture, nowait: bool
    ) -> None:
        """Of one payload with two keywords each of two listeners takes one, with no ``**kwargs``."""
        farewells: list[str] = []
        tickets: list[str] = []

        @emitter.on("user_deleted")
        async def send_farewell_email_handler(email: str) -> None:
            farewells.append(email)

        @emitter.on("user_deleted")
        def notify_customer_support(reason: str = "unknown") -> None:
            tickets.append(reason)

        async with emitter:
            if nowait:
                emitter.emit_nowait("user_deleted", email=EMAIL, reason="moved away")
            else:
                await emitter.emit("user_deleted", email=EMAIL, reason="moved away")
        assert (farewells, tickets) == ([EMAIL], ["moved away"])
        assert caplog.records == []

    async def test_leaving_through_an_exception(self, emitter: EventEmitter) -> None:
        """An application that crashes still delivers what it had emitted, and can start again."""
        listener = AsyncMock()
        emitter.on("evt", listener)
        with pytest.raises(LookupError, match="crash"):
            async with emitter:
                emitter.emit_nowait("evt", 1)
                raise LookupError("crash")
        async with emitter:
            emitter.emit_nowait("evt", 2)
        assert [call.args for call in listener.await_args_list] == [(1,), (2,)]


class TestTina4:
    """Direct calls, priorities, ``once``, ``off``, and code without a loop."""

    def test_on_and_off(self, emitter: EventEmitter) -> None:
        """After ``off`` every registration of a handler is gone; an unknown one is no error."""
        logged: list[int] = []
        other = MagicMock()

        def log_purchase(payload: dict[str, int]) -> None:
            logged.append(payload["order_id"])

        assert emitter.on("order.placed", log_purchase) is log_purchase
        emitter.on("order.placed", log_purchase)
        emitter.on("order.placed", other)
        emitter.emit_sync("order.placed", {"order_id": 101})
        emitter.off("order.placed", log_purchase)
        emitter.off("order.placed", log_purchase)
        emitter.off("nonexistent.event")
        emitter.emit_sync("order.placed", {"order_id": 102})
        assert logged == [101, 101]
        assert other.call_count == 2

    def test_priority(self, emitter: EventEmitter) -> None:
        """Stock, then payment, then confirmation, in whatever order they were registered."""
        ran: list[str] = []
        emitter.on("order.placed", lambda payload: ran.append("confirmation"))  # 10 by default
        emitter.on("order.placed", lambda payload: ran.append("points"), priority=11)
        emitter.on("order.placed", lambda payload: ran.append("stock"), priority=1)
        emitter.on("order.placed", lambda payload: ran.append("payment"), priority=5)
        emitter.emit_sync("order.placed", {"order_id": 200})
        assert ran == ["stock", "payment", "confirmation", "points"]

    def test_once(self, emitter: EventEmitter) -> None:
        """A ``once`` handler runs for the first event and is gone; the function is returned."""
        direct = MagicMock()

        @emitter.once("app.started")
        def run_migrations(payload: dict[str, str]) -> str:
            return "migrated"

        assert emitter.once("app.started", direct) is direct
        assert emitter.listeners("app.started") == [run_migrations, direct]
        emitter.emit_sync("app.started", {})
        emitter.emit_sync("app.started", {})
        direct.assert_called_once_with({})
        assert run_migrations({}) == "migrated"
        assert list(emitter.events()) == []

    def test_emit_sync(self, emitter: EventEmitter) -> None:
        """Without a loop, async and plain handlers run to their end, the background included."""
        order: list[str] = []

        @emitter.on("order.placed", priority=1)
        async def notify_warehouse(order_id: int) -> None:
            await asyncio.to_thread(lambda: None)
            order.append(f"warehouse {order_id}")

        @emitter.on("order.placed", priority=2)
        def log_order(order_id: int) -> None:
            order.append(f"log {order_id}")

        @emitter.on("order.placed", delivery="background")
        async def award_points(order_id: int) -> None:
            order.append(f"points {order_id}")

        emitter.emit_sync("order.placed", 300)
        assert order[:2] == ["warehouse 300", "log 300"]
        assert order[2:] == ["points 300"]

    def test_module_functions(self, shared: EventEmitter) -> None:
        """The functions of the module are enough for an application with one emitter."""
        done: list[str] = []

        @events.once("app.ready")
        def on_app_ready(payload: dict[str, str]) -> None:
            done.append("ready")

        @events.on("user.created", priority=2)
        def send_welcome_email(user: dict[str, str]) -> None:
            done.append(f"welcome {user['email']}")

        async def create_default_profile(user: dict[str, str]) -> None:
            done.append(f"profile {user['email']}")

        events.on("user.created", create_default_profile, priority=1)
        for _ in range(2):
            events.emit_sync("app.ready", {})
        events.emit_sync("user.created", {"email": "bob@example.com"})
        events.off("user.created", create_default_profile)
        events.emit_sync("user.created", {"email": "eve@example.com"})
        assert done == [
            "ready",
            "profile bob@example.com",
            "welcome bob@example.com",
            "welcome eve@example.com",
        ]
