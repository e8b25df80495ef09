"""A change and its events are committed or rolled back together, whatever happens in between."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
from tortoise.context import TortoiseContext
from tortoise.exceptions import (
    IntegrityError,
    OperationalError,
    TransactionManagementError,
)
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, counting_from_zero, log_in
from tests.support.app import AuditRow, User
from tests.support.concurrency import Cancelled, finished
from tests.support.database import (
    BOTH_BY_POSTGRES,
    MODULES,
    SHARED_DATABASES,
    assert_no_connection_is_held,
    connection_of,
    database,
    kind_of,
    look,
    place,
    transaction_class,
)
from tests.support.deliveries import Deliveries, Undo, everywhere, quiet
from tests.support.ledger import Ledger
from tests.support.rows import changed, columns, row, rows
from tests.support.statements import statements
from tortoise_auth import AuthConfig, AuthenticationError, AuthResult, AuthService, EventEmitter
from tortoise_auth.clock import utc_now
from tortoise_auth.database import connection_for, is_transaction
from tortoise_auth.events import (
    Event,
    PasswordChanged,
    RefreshTokenReused,
    SessionRevoked,
    UserLogin,
    UserLoginFailed,
    UserLogout,
)
from tortoise_auth.events.catalog import declared_events
from tortoise_auth.events.relay import Relay
from tortoise_auth.events.subscription import Delivery
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import (
    EventError,
    ServiceUnavailableError,
    TokenReusedError,
    TokenRevokedError,
)
from tortoise_auth.models import OutboxEntry, Session
from tortoise_auth.sessions import Sessions
from tortoise_auth.sessions.refresh_tokens import RefreshToken
from tortoise_auth.testing import FakeClock, pending_events, run_pending

Act: TypeAlias = Callable[[], Awaitable[object]]

DELIVERIES: tuple[Delivery, ...] = ("transaction", "inline", "background", "durable")


@dataclass(frozen=True, kw_only=True)
class Shipped(Event):
    """An event of a host."""

    parcel: int


@pytest.fixture
async def ada(db: TortoiseContext) -> User:
    return await counting_from_zero(await User.create_user(email=EMAIL, password=PASSWORD))


@pytest.fixture
def auth(clock: FakeClock) -> AuthService[User]:
    """A service without a throttle, whose counters are not part of a change."""
    return AuthService(User, AuthConfig(secret=SECRET), clock=clock, throttle=None)


@pytest.fixture
def relay(emitter: EventEmitter) -> Relay[User]:
    """A relay for which every row is due."""
    return Relay(emitter, User, clock=FakeClock(datetime(2100, 1, 1, tzinfo=UTC)))


@pytest.fixture(params=SHARED_DATABASES)
async def narrow(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Every database, PostgreSQL with a pool of one connection: a second one is a deadlock."""
    async with database(request.param, tmp_path, maxsize=1) as context:
        yield context


async def ship(emitter: EventEmitter, parcel: int = 7) -> None:
    """A change of the host with its event."""
    async with UnitOfWork(connection_for(AuditRow), emitter) as unit:
        await AuditRow.create(event="parcel", using_db=unit.connection)
        unit.record(Shipped(parcel=parcel))


# ---- what a caller does around it -----------------------------------------------------------


async def plain(name: str, act: Act) -> None:
    await act()


async def committed(name: str, act: Act) -> None:
    async with in_transaction(name):
        await act()


async def rolled_back(name: str, act: Act) -> None:
    with suppress(Undo):
        async with in_transaction(name):
            await act()
            raise Undo


async def savepoint_released(name: str, act: Act) -> None:
    async with in_transaction(name), in_transaction(name):
        await act()


async def savepoint_rolled_back(name: str, act: Act) -> None:
    async with in_transaction(name):
        with suppress(Undo):
            async with in_transaction(name):
                await act()
                raise Undo


async def three_deep(name: str, act: Act) -> None:
    async with in_transaction(name), in_transaction(name), in_transaction(name):
        await act()


async def three_deep_undone_between(name: str, act: Act) -> None:
    async with in_transaction(name):
        with suppress(Undo):
            async with in_transaction(name):
                async with in_transaction(name):
                    await act()
                raise Undo


async def beside_a_savepoint_rolled_back(name: str, act: Act) -> None:
    async with in_transaction(name):
        await act()
        with suppress(Undo):
            async with in_transaction(name):
                raise Undo


async def committed_by_hand(name: str, act: Act) -> None:
    async with in_transaction(name) as wrapper:
        await act()
        await wrapper.commit()


async def rolled_back_by_hand(name: str, act: Act) -> None:
    async with in_transaction(name) as wrapper:
        await act()
        await wrapper.rollback()


async def failed_unnoticed(name: str, act: Act) -> None:
    """PostgreSQL answers this COMMIT with ROLLBACK and no error; SQLite commits."""
    async with in_transaction(name):
        await act()
        await AuditRow.create(id=1000, event="first")
        with suppress(IntegrityError):
            await AuditRow.create(id=1000, event="second")


KEPT = [
    plain,
    committed,
    savepoint_released,
    three_deep,
    beside_a_savepoint_rolled_back,
    committed_by_hand,
]
UNDONE = [rolled_back, savepoint_rolled_back, three_deep_undone_between, rolled_back_by_hand]


class TestOutcomes:
    """What each delivery does where the caller's own transaction ends in one way or another."""

    @pytest.mark.parametrize("around", KEPT, ids=lambda each: each.__name__)
    async def test_kept(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        around: Callable[[str, Act], Awaitable[None]],
    ) -> None:
        """Where the change is committed, every handler receives its event once."""
        deliveries = Deliveries(emitter, Shipped, UserLogin, PasswordChanged)
        name = connection_of(db).connection_name
        await finished(around(name, lambda: ship(emitter)))
        assert await deliveries.outcome(relay) == everywhere("shipped")
        await finished(around(name, lambda: log_in(auth)))
        assert await deliveries.outcome(relay) == everywhere("user_login")
        await finished(around(name, lambda: ada.set_password(NEW_PASSWORD)))
        assert await deliveries.outcome(relay) == everywhere("password_changed")
        assert await look(db, "SELECT count(*) FROM app_audit_row WHERE event = 'parcel'") == [(1,)]
        assert await look(db, "SELECT count(*) FROM tortoise_auth_session") == [(1,)]
        assert await look(db, "SELECT session_version FROM app_user") == [(1,)]
        assert await look(db, "SELECT count(*) FROM tortoise_auth_outbox") == [(0,)]

    @pytest.mark.parametrize("around", UNDONE, ids=lambda each: each.__name__)
    async def test_undone(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        around: Callable[[str, Act], Awaitable[None]],
    ) -> None:
        """Where the change is rolled back, no handler runs, and nothing is left behind."""
        deliveries = Deliveries(emitter, Shipped, UserLogin, PasswordChanged)
        before = await rows(User, AuditRow)
        name = connection_of(db).connection_name
        await finished(around(name, lambda: ship(emitter)))
        assert await deliveries.outcome(relay) == everywhere()
        await finished(around(name, lambda: log_in(auth)))
        assert await deliveries.outcome(relay) == everywhere()
        await finished(around(name, lambda: ada.set_password(NEW_PASSWORD)))
        assert await deliveries.outcome(relay) == everywhere()
        assert await rows(User, AuditRow) == before
        assert await look(db, "SELECT count(*) FROM tortoise_auth_outbox") == [(0,)]

    async def test_failed_unnoticed(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
    ) -> None:
        """A COMMIT that PostgreSQL turns into a rollback without an error delivers no event."""
        deliveries = Deliveries(emitter, UserLogin)
        name = connection_of(db).connection_name
        await finished(failed_unnoticed(name, lambda: log_in(auth)))
        kept = await look(db, "SELECT count(*) FROM tortoise_auth_session")
        postgres = connection_of(db).capabilities.dialect == "postgres"
        assert kept == [(0,)] if postgres else [(1,)]
        outcome = await deliveries.outcome(relay)
        assert outcome == everywhere(*([] if postgres else ["user_login"]))

    async def test_nothing_before_the_outermost_commit(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
    ) -> None:
        """Every delivery but the one in the transaction waits for the caller's commit."""
        deliveries = Deliveries(emitter, UserLogin)
        name = connection_of(db).connection_name
        async with in_transaction(name):
            async with in_transaction(name):
                await log_in(auth)
            for _ in range(100):
                await asyncio.sleep(0)
            assert await AuditRow.all().count() == 1
            assert deliveries.inline == deliveries.background == deliveries.durable == []
        assert await deliveries.outcome(relay) == everywhere("user_login")

    async def test_two_changes_one_undone(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
    ) -> None:
        """Of two changes in one transaction only the committed one has its event delivered."""
        deliveries = Deliveries(emitter, UserLogin, PasswordChanged, UserLogout)
        name = connection_of(db).connection_name
        async with in_transaction(name):
            result = await log_in(auth)
            await savepoint_rolled_back(name, lambda: auth.set_password(ada, NEW_PASSWORD))
            await auth.logout(result.access_token)
        assert await deliveries.outcome(relay) == everywhere("user_login", "user_logout")

    @pytest.mark.parametrize("kept", [True, False], ids=["kept", "undone"])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    async def test_connection_given_by_hand(
        self,
        db: TortoiseContext,
        emitter: EventEmitter,
        relay: Relay[User],
        depth: int,
        kept: bool,
    ) -> None:
        """A unit of work joins the transaction of the connection that it is given."""
        deliveries = Deliveries(emitter, Shipped)

        async def ship_within(connection: Any, left: int) -> None:
            if left:
                async with connection._in_transaction() as inner:
                    await ship_within(inner, left - 1)
                return
            async with UnitOfWork(connection, emitter) as unit:
                await AuditRow.create(event="parcel", using_db=unit.connection)
                unit.record(Shipped(parcel=7))

        with suppress(Undo):
            async with in_transaction(connection_of(db).connection_name) as outermost:
                await ship_within(outermost, depth - 1)
                if not kept:
                    raise Undo
        assert await deliveries.outcome(relay) == everywhere(*["shipped"] * kept)
        assert await AuditRow.filter(event="parcel").count() == kept

    async def test_task_started_inside_a_transaction(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
    ) -> None:
        """A task that outlives the transaction in which it was started has one of its own."""
        deliveries = Deliveries(emitter, UserLogin)
        over = asyncio.Event()

        async def log_in_later() -> AuthResult[User]:
            await over.wait()
            return await log_in(auth)

        with suppress(Undo):
            async with in_transaction(connection_of(db).connection_name):
                task = asyncio.create_task(log_in_later())
                await asyncio.sleep(0)
                raise Undo
        over.set()
        result = await finished(task)
        assert await auth.authenticate(result.access_token) == ada
        assert await deliveries.outcome(relay) == everywhere("user_login")


class TestSeveralAtOnce:
    """Calls of the service that share one transaction of the caller."""

    @pytest.mark.parametrize("kept", [True, False], ids=["kept", "undone"])
    async def test_gathered(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        kept: bool,
    ) -> None:
        """They wait for each other; every session ends, and its event is delivered."""
        results = [await log_in(auth) for _ in range(4)]
        deliveries = Deliveries(emitter, UserLogout)
        with suppress(Undo):
            async with in_transaction(connection_of(db).connection_name):
                ended = await finished(
                    asyncio.gather(*[auth.logout(each.access_token) for each in results])
                )
                if not kept:
                    raise Undo
        assert [each.sessions for each in ended] == [1] * 4
        assert await Session.filter(revoked_at__isnull=True).count() == 4 * (not kept)
        assert await deliveries.outcome(relay) == everywhere(*["user_logout"] * 4 * kept)

    async def test_gathered_inside_a_handler(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A handler in the transaction may do several things at once, and so may each of them."""
        results = [await log_in(auth) for _ in range(4)]

        @emitter.on(PasswordChanged, delivery="transaction", timeout=20)
        async def end_more(event: PasswordChanged[User]) -> None:
            await asyncio.gather(*[User.create_user(email=f"{n}@example.com") for n in range(3)])

        async with in_transaction(connection_of(db).connection_name):
            await finished(auth.set_password(ada, NEW_PASSWORD))
            await finished(asyncio.gather(*[auth.logout(each.access_token) for each in results]))
        assert await User.all().count() == 4
        assert await Session.filter(revoked_at__isnull=True).count() == 0

    @pytest.mark.parametrize("inside", [False, True], ids=["alone", "in one of the caller"])
    @pytest.mark.parametrize("ended_by", ["timeout", "caller"])
    async def test_handler_that_refuses_its_cancellation(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        inside: bool,
        ended_by: str,
    ) -> None:
        """A handler that goes on after its time writes into no transaction, whichever is open then."""
        go, done, began = asyncio.Event(), asyncio.Event(), asyncio.Event()
        refused: list[BaseException] = []
        name = connection_of(db).connection_name

        async def stubborn(user: User) -> None:
            began.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await go.wait()
            for write in (
                lambda: AuditRow.create(event="late"),
                lambda: User.filter(pk=user.pk).update(display_name="late"),
                lambda: AuditRow.bulk_create([AuditRow(event="late")]),
                lambda: connection_of(db).execute_query("SELECT 1"),
            ):
                try:
                    await write()
                except TransactionManagementError as error:
                    refused.append(error)
            done.set()

        emitter.on(
            "user_login",
            stubborn,
            delivery="transaction",
            timeout=0.05 if ended_by == "timeout" else 60,
        )
        async with in_transaction(name) if inside else nullcontext():
            task = asyncio.create_task(auth.login(EMAIL, PASSWORD))
            await began.wait()
            if ended_by == "caller":
                task.cancel()
            with pytest.raises((EventError, asyncio.CancelledError)):
                await task
            async with in_transaction(name):
                await AuditRow.create(event="mine")
                go.set()
                await done.wait()
        assert [each.event for each in await AuditRow.all()] == ["mine"]
        assert (await User.get(pk=ada.pk)).display_name == ""
        assert len(refused) == 4

    @pytest.mark.parametrize("kept", [True, False], ids=["kept", "undone"])
    @pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 30])
    async def test_task_that_outlives_the_transaction(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        turns: int,
        kept: bool,
    ) -> None:
        """Wherever the transaction ends meanwhile, the call works: inside or on its own."""
        result = await log_in(auth)
        deliveries = Deliveries(emitter, UserLogout)
        with suppress(Undo):
            async with in_transaction(connection_of(db).connection_name):
                task = asyncio.create_task(auth.logout(result.access_token))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if not kept:
                    raise Undo
        assert (await finished(task)).sessions == 1
        ended = (await row(Session, result.session.id))["revoked_at"] is not None
        assert ended or not kept
        assert await deliveries.outcome(relay) == everywhere(*["user_logout"] * ended)


class TestOrder:
    async def test_from_the_transaction_to_the_background(
        self, db: TortoiseContext, emitter: EventEmitter
    ) -> None:
        """Transaction, commit, live objects, inline, background: whatever the priorities."""
        order: list[str] = []

        class Noting:
            def __setattr__(self, name: str, value: object) -> None:
                order.append(f"{name}={value} after {seen[-1]}")

        priorities: dict[Delivery, int] = {"background": 1, "inline": 5, "transaction": 99}
        for delivery, priority in priorities.items():
            note = note_in(order, delivery)
            emitter.on("shipped", note, delivery=delivery, priority=priority, name=delivery)
        with statements(db) as seen:
            async with UnitOfWork(connection_for(AuditRow), emitter) as unit:
                await AuditRow.create(event="parcel", using_db=unit.connection)
                unit.set_on_commit(Noting(), paid=True)
                unit.record(Shipped(parcel=7))
            order.append("left")
        await quiet(emitter)
        assert order == ["transaction", "paid=True after COMMIT", "inline", "left", "background"]

    async def test_inline_handlers_see_what_is_committed(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """They run outside the transaction, and any other connection sees the change."""
        seen: list[object] = []

        @emitter.on(UserLogin)
        async def see(event: UserLogin[User]) -> None:
            seen.append(is_transaction(connection_for(User)))
            seen.append(await look(db, "SELECT id FROM tortoise_auth_session"))
            seen.append(await look(db, "SELECT last_login IS NOT NULL FROM app_user"))

        result = await log_in(auth)
        (where, sessions, last_login) = seen
        assert where is False
        assert [str(each) for (each,) in sessions] == [str(result.session.id)]  # type: ignore[attr-defined]
        assert last_login in ([(True,)], [(1,)])

    @pytest.mark.parametrize("delivery", ["inline", "background", "durable"])
    async def test_handlers_may_use_the_service(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        delivery: Literal["inline", "background", "durable"],
    ) -> None:
        """A handler that ends the session of its event has a transaction of its own for it."""

        @emitter.on(UserLogin, delivery=delivery)
        async def end(event: UserLogin[User]) -> None:
            await auth.revoke_session(event.session_id)

        deliveries = Deliveries(emitter, SessionRevoked)
        await finished(log_in(auth))
        await quiet(emitter)
        await finished(relay.drain())
        assert await deliveries.outcome(relay) == everywhere("session_revoked")

    async def test_handler_in_the_transaction_may_use_the_service(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
    ) -> None:
        """What the handler does is part of the change, and is rolled back with it."""

        @emitter.on(UserLogin, delivery="transaction")
        async def end(event: UserLogin[User]) -> None:
            await auth.revoke_session(event.session_id)

        deliveries = Deliveries(emitter, UserLogin, SessionRevoked)
        result = await finished(log_in(auth))
        assert (await row(Session, result.session.id))["revoked_at"] is not None
        outcome = await deliveries.outcome(relay)
        assert {kind: sorted(names) for kind, names in outcome.items()} == everywhere(
            "session_revoked", "user_login"
        )
        await rolled_back(connection_of(db).connection_name, lambda: log_in(auth))
        assert await deliveries.outcome(relay) == everywhere()

    async def test_failure_of_one_event_does_not_silence_the_next(
        self, db: TortoiseContext, relay: Relay[User]
    ) -> None:
        """Where errors propagate, the handlers of the events behind the failed one run all the same."""
        emitter = EventEmitter(propagate_errors=True)
        deliveries = Deliveries(emitter, Shipped)
        emitter.on(Shipped, fail_on_seven, priority=1)
        with pytest.raises(EventError, match="parcel 7"):
            async with UnitOfWork(connection_for(AuditRow), emitter) as unit:
                unit.record(Shipped(parcel=7))
                unit.record(Shipped(parcel=8))
        await quiet(emitter)
        assert [event.parcel for event in deliveries.inline if isinstance(event, Shipped)] == [8]
        assert len(deliveries.background) == 2
        assert await Relay(emitter, User).drain() == 2

    async def test_same_event_for_every_delivery(
        self, db: TortoiseContext, emitter: EventEmitter, relay: Relay[User]
    ) -> None:
        """All handlers receive the same event, with one id."""
        deliveries = Deliveries(emitter, Shipped)
        await ship(emitter)
        await quiet(emitter)
        await relay.drain()
        assert deliveries.inline == deliveries.background == deliveries.durable
        assert [each.subject for each in await AuditRow.filter(event="shipped")] == [
            str(deliveries.inline[0].id)
        ]


def note_in(notes: list[str], note: str) -> Act:
    """Return a handler that writes *note*."""

    async def handler() -> None:
        notes.append(note)

    return handler


async def fail_on_seven(event: Shipped) -> None:
    """A handler that fails for one of two events."""
    if event.parcel == 7:
        raise RuntimeError("parcel 7 is lost")


@dataclass(frozen=True, kw_only=True)
class Noted(Event):
    """An event of a host that holds anything."""

    text: str = ""
    anything: Any = None


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class TestRecording:
    @pytest.mark.parametrize(
        ("values", "field"),
        [
            ({"text": "he\x00llo"}, "text"),
            ({"text": "\ud83d"}, "text"),
            ({"anything": {"a": ["b", {"c": "\x00"}]}}, "anything"),
            ({"anything": {"\udc00": 1}}, "anything"),
            ({"anything": ("\x00",)}, "anything"),
            ({"anything": 10**5000}, "anything"),
            ({"anything": nested(3000)}, "anything"),
            ({"anything": nested(30)}, "anything"),
            ({"subject_id": "\x00"}, "subject_id"),
        ],
        ids=[
            "nul",
            "surrogate",
            "inside",
            "key",
            "tuple",
            "digits",
            "deep",
            "deeper than MariaDB",
            "subject",
        ],
    )
    async def test_what_cannot_be_stored(
        self, db: TortoiseContext, emitter: EventEmitter, values: dict[str, Any], field: str
    ) -> None:
        """The event is refused on every database, with the field, whatever is subscribed."""
        with pytest.raises(ValueError, match=rf"^Noted\.{field} "):
            async with UnitOfWork(connection_for(AuditRow), emitter) as unit:
                await AuditRow.create(event="parcel", using_db=unit.connection)
                unit.record(Noted(**values))
        assert await AuditRow.all().count() == 0

    async def test_what_cannot_be_stored_is_refused_by_emit(
        self, db: TortoiseContext, emitter: EventEmitter
    ) -> None:
        """A durable event of its own that no row can hold is refused alike, with the field."""

        @emitter.on(Noted, delivery="durable")
        async def never(event: Noted) -> None: ...

        for hostile in ("he\x00llo", "\ud83d"):
            with pytest.raises(ValueError, match=r"^Noted\.text "):
                await emitter.emit(Noted(text=hostile))
        assert await OutboxEntry.all().count() == 0

    async def test_what_can(
        self, db: TortoiseContext, emitter: EventEmitter, relay: Relay[User]
    ) -> None:
        """Any other text or number is delivered unchanged."""
        deliveries = Deliveries(emitter, Noted)
        event = Noted(text="\U0001f600\u202e\n\x01", anything=[-(2**63), 10**4000, nested(28)])
        async with UnitOfWork(connection_for(AuditRow), emitter) as unit:
            unit.record(event)
        await relay.drain()
        assert deliveries.durable == [event]


class TestInlineAtTheCommit:
    """Inline handlers of events that are recorded in a transaction of the caller."""

    @pytest.mark.parametrize("errors", ["log", "raise", "group"])
    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_failure_is_logged(
        self,
        db: TortoiseContext,
        errors: Literal["log", "raise", "group"],
        concurrent: bool,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Whatever the policy, the commit stands, its caller goes on, and so do other handlers."""
        emitter = EventEmitter(errors=errors, concurrent=concurrent)
        ran: list[str] = []

        @emitter.on("shipped")
        async def fail() -> None:
            ran.append("fail")
            raise LookupError("mail is down")

        emitter.on("shipped", note_in(ran, "next"))
        async with in_transaction(connection_of(db).connection_name):
            await ship(emitter, 1)
            await ship(emitter, 2)
            assert ran == []
        assert sorted(ran) == ["fail", "fail", "next", "next"]
        assert await AuditRow.filter(event="parcel").count() == 2
        logged = [each for each in caplog.records if each.levelname == "ERROR"]
        assert len(logged) == 2
        for each in logged:
            assert "fail' for event 'shipped' raised LookupError: mail is down" in each.message
            assert each.exc_info

    async def test_may_use_the_service(
        self, narrow: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
    ) -> None:
        """The connection and the lock are free, and what handlers do there is committed at once."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        seen: list[object] = []

        @emitter.on(UserLogin)
        async def end(event: UserLogin[User]) -> None:
            seen.append(is_transaction(connection_for(User)))
            await auth.revoke_session(event.session_id)

        for _ in range(3):
            async with in_transaction(connection_of(narrow).connection_name):
                result = await finished(log_in(auth))
                assert seen == []
            assert seen == [False]
            assert (await row(Session, result.session.id))["revoked_at"] is not None
            seen.clear()

    async def test_while_another_transaction_is_open(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """The handler does not join a transaction that another task opened in the meantime."""
        opened, ended = asyncio.Event(), asyncio.Event()

        @emitter.on("user_login")
        async def wait() -> None:
            opened.set()
            await ended.wait()

        async def another() -> None:
            await opened.wait()
            async with in_transaction(connection_of(db).connection_name):
                await AuditRow.create(event="another")
                ended.set()

        task = asyncio.create_task(another())
        async with in_transaction(connection_of(db).connection_name):
            await finished(log_in(auth))
        await finished(task)
        assert await AuditRow.filter(event="another").exists()

    async def test_live_objects(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """They have the new values before any handler runs, and not before the outermost commit."""
        seen: list[object] = []
        old = ada.password, ada.session_version, ada.is_active

        @emitter.on("password_changed")
        async def see() -> None:
            seen.append((ada.password == old[0], ada.is_active))

        name = connection_of(db).connection_name
        for around in UNDONE:
            await finished(around(name, lambda: auth.set_password(ada, NEW_PASSWORD)))
            await finished(around(name, lambda: auth.deactivate(ada)))
            assert (ada.password, ada.session_version, ada.is_active) == old
        await ada.save()  # what was rolled back is not saved after all
        assert await auth.login(EMAIL, PASSWORD)
        async with in_transaction(name):
            async with in_transaction(name):
                await auth.set_password(ada, NEW_PASSWORD)
            await auth.deactivate(ada)
            assert (ada.password, ada.is_active) == (old[0], True)
        assert seen == [(False, False)]

    async def test_saved_before_the_commit(
        self, db: TortoiseContext, auth: AuthService[User], ada: User
    ) -> None:
        """An object that is saved in the same transaction does not restore the old password."""
        name = connection_of(db).connection_name
        async with in_transaction(name):
            await savepoint_rolled_back(name, lambda: auth.deactivate(ada))
            await auth.set_password(ada, NEW_PASSWORD)
            ada.display_name = "Ada L."
            await ada.save()
        stored = await User.get()
        assert (stored.display_name, stored.is_active) == ("Ada L.", True)
        assert stored.session_version == ada.session_version == 1
        assert stored.password == ada.password
        assert await stored.check_password(NEW_PASSWORD)
        ada.is_active = False
        await ada.save()
        assert not (await User.get()).is_active

    async def test_pending_in_a_test(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A test whose transaction is rolled back sees the waiting deliveries, and runs them."""
        seen: list[int] = []

        @emitter.on("user_login")
        async def count_sessions() -> None:
            seen.append(await Session.all().count())

        name = connection_of(db).connection_name
        with suppress(Undo):
            async with in_transaction(name):
                await log_in(auth)
                await savepoint_rolled_back(name, lambda: log_in(auth))
                assert [each.name for each in await pending_events()] == ["user_login"]
                assert (seen, ada.last_login) == ([], None)
                assert [each.name for each in await run_pending()] == ["user_login"]
                assert seen == [1]
                assert await pending_events() == await run_pending() == []
                raise Undo
        assert seen == [1]
        assert await pending_events() == []


class TestVeto:
    """A handler in the transaction refuses."""

    @pytest.fixture
    async def opened(self, auth: AuthService[User], ada: User) -> AuthResult[User]:
        """A session of Ada."""
        return await log_in(auth)

    @pytest.fixture
    def refused(
        self, auth: AuthService[User], ada: User, opened: AuthResult[User]
    ) -> dict[str, Act]:
        """Every method that changes something."""
        return {
            "login": lambda: log_in(auth),
            "refresh": lambda: auth.refresh(opened.refresh_token),
            "logout": lambda: auth.logout(opened.refresh_token),
            "logout_all": lambda: auth.logout_all(ada),
            "set_password": lambda: auth.set_password(ada, NEW_PASSWORD),
            "change_password": lambda: auth.change_password(ada, PASSWORD, NEW_PASSWORD),
            "model.set_password": lambda: ada.set_password(NEW_PASSWORD),
            "revoke_session": lambda: auth.revoke_session(opened.session.id),
            "deactivate": lambda: auth.deactivate(ada),
            "create_user": lambda: User.create_user(email="bob@example.com", password=PASSWORD),
        }

    @pytest.mark.parametrize("nested", [False, True], ids=["alone", "in-the-callers"])
    async def test_leaves_nothing(
        self,
        db: TortoiseContext,
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        clock: FakeClock,
        refused: dict[str, Act],
        nested: bool,
    ) -> None:
        """Nothing changes in the database or in memory, no event is emitted, and the caller gets the error."""
        deliveries = Deliveries(emitter, *EVERY_EVENT)
        for event in EVERY_EVENT:
            emitter.on(event, refuse, delivery="transaction", priority=20, name=f"no {event.name}")
        before, remembered = await rows(User, AuditRow, OutboxEntry), columns(ada)
        clock.advance(timedelta(seconds=1))

        for method, act in refused.items():
            with pytest.raises(EventError, match="refuse") as refusal:
                if nested:
                    async with in_transaction(connection_of(db).connection_name):
                        await AuditRow.create(event="of the caller")
                        try:
                            await act()
                        finally:
                            assert await AuditRow.all().count() == 1, method
                else:
                    await finished(act())
            assert isinstance(refusal.value.original, Undo)
            assert await rows(User, AuditRow, OutboxEntry) == before, method
            assert columns(ada) == remembered, method
        assert await deliveries.outcome(relay) == everywhere()
        assert_no_connection_is_held(db)

    async def test_spares_the_callers_transaction(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
    ) -> None:
        """The caller may go on and commit its own changes."""
        deliveries = Deliveries(emitter, UserLogin, UserLogout)
        result = await log_in(auth)
        assert await deliveries.outcome(relay) == everywhere("user_login")
        emitter.on(UserLogin, refuse, delivery="transaction", priority=20)
        async with in_transaction(connection_of(db).connection_name):
            with pytest.raises(EventError):
                await log_in(auth)
            await auth.logout(result.access_token)
        assert await deliveries.outcome(relay) == everywhere("user_logout")
        assert await Session.all().count() == 1

    @pytest.mark.parametrize("server", BOTH_BY_POSTGRES, indirect=True)
    async def test_swallowed_failure_of_a_statement(
        self, server: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A handler that swallows a failed statement on PostgreSQL fails the change, and no event is emitted."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        received: list[Event] = []
        emitter.on(UserLogin, received.append, thread=False)

        @emitter.on(UserLogin, delivery="transaction")
        async def stumble(event: UserLogin[User]) -> None:
            with suppress(IntegrityError):
                await User.create(email=EMAIL)

        with pytest.raises(ServiceUnavailableError):
            await log_in(auth)
        assert await Session.all().count() == 0
        assert received == []
        assert_no_connection_is_held(server)

    async def test_cancelled_three_hundred_times(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """When calls are cancelled ten at a time, every connection is returned and no session is left."""
        deliveries = Deliveries(emitter, UserLogin)
        emitter.on(UserLogin, refuse, delivery="transaction", priority=20)
        chance, lossy = random.Random(7), kind_of(db) in {"psycopg", "mariadb"}
        refused = 0
        for _ in range(30):
            attempts = [
                Cancelled(
                    log_in(auth), chance.randint(1, 14), late=chance.random() < 0.5, lossy=lossy
                )
                for _ in range(10)
            ]
            outcomes = await finished(asyncio.gather(*(each.run() for each in attempts)))
            refused += sum(not task.cancelled() for task in outcomes)
            for task in outcomes:
                assert task.cancelled() or isinstance(task.exception(), EventError)
        await quiet(emitter)
        assert 0 < refused < 300
        assert (deliveries.inline, deliveries.background) == ([], [])
        assert await rows(OutboxEntry, AuditRow) == []
        assert_no_connection_is_held(db)


class TestFailures:
    """A failure stays recorded even if the caller rolls back the transaction around it."""

    async def log_in_wrongly(self, auth: AuthService[User]) -> None:
        """Try another password than Ada's."""
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, NEW_PASSWORD)

    @pytest.mark.parametrize("around", [plain, *KEPT[1:], *UNDONE], ids=lambda f: f.__name__)
    async def test_failed_login(
        self,
        narrow: TortoiseContext,
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
        around: Callable[[str, Act], Awaitable[None]],
    ) -> None:
        """It is emitted however the caller's transaction ends; only rows in that transaction are undone."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, UserLoginFailed)
        name = connection_of(narrow).connection_name
        await finished(around(name, lambda: self.log_in_wrongly(auth)))
        expected = everywhere("user_login_failed")
        if around in UNDONE:
            expected["transaction"] = []
        assert await finished(deliveries.outcome(relay)) == expected
        assert_no_connection_is_held(narrow)

    async def test_failed_login_that_is_counted(
        self, db: TortoiseContext, emitter: EventEmitter, relay: Relay[User]
    ) -> None:
        """The same where attempts are counted, and the count needs a connection of its own."""
        auth = AuthService(User, AuthConfig(secret=SECRET))
        await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, UserLoginFailed)
        name = connection_of(db).connection_name
        await finished(rolled_back(name, lambda: self.log_in_wrongly(auth)))
        expected = everywhere("user_login_failed") | {"transaction": []}
        assert await finished(deliveries.outcome(relay)) == expected

    async def test_failed_login_is_emitted_at_once(
        self, narrow: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
    ) -> None:
        """The background does not wait for the caller's transaction to end."""
        called = asyncio.Event()
        emitter.on(UserLoginFailed, lambda _: called.set(), delivery="background", thread=False)
        async with in_transaction(connection_of(narrow).connection_name):
            await self.log_in_wrongly(auth)
            await finished(called.wait())

    @pytest.mark.parametrize("around", [plain, rolled_back], ids=lambda f: f.__name__)
    async def test_veto(
        self,
        narrow: TortoiseContext,
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
        around: Callable[[str, Act], Awaitable[None]],
    ) -> None:
        """The rows of a handler in the transaction that raises are rolled back, and no event is emitted."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, UserLoginFailed)
        emitter.on(UserLoginFailed, refuse, delivery="transaction", priority=20)

        async def log_in_wrongly() -> None:
            with pytest.raises(EventError, match="refuse"):
                await auth.login(EMAIL, NEW_PASSWORD)
            assert await AuditRow.all().count() == 0

        await finished(around(connection_of(narrow).connection_name, log_in_wrongly))
        assert await finished(deliveries.outcome(relay)) == everywhere()

    async def test_failed_statement_spares_the_callers_transaction(
        self, server: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A failed statement of a handler in the transaction is rolled back, and the caller may go on."""
        await User.create_user(email=EMAIL, password=PASSWORD)

        @emitter.on(UserLoginFailed, delivery="transaction")
        async def stumble(event: UserLoginFailed) -> None:
            await User.create(email=EMAIL)

        async with in_transaction(kind_of(server)):
            with pytest.raises(EventError):
                await auth.login(EMAIL, NEW_PASSWORD)
            assert await User.all().count() == 1

    @pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
    async def test_cancelled(
        self,
        narrow: TortoiseContext,
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
        late: bool,
    ) -> None:
        """A refused login that is cancelled anywhere is emitted to all handlers or to none."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, UserLoginFailed)
        outcomes = []
        for step in count(-1):
            cancelled = Cancelled(self.log_in_wrongly(auth), step, late=late)
            await finished(cancelled.run())
            outcomes.append(await deliveries.outcome(relay))
            assert outcomes[-1] in (everywhere(), everywhere("user_login_failed")), step
            assert_no_connection_is_held(narrow)
            if step > 0 and not cancelled.reached:
                break
        assert outcomes[2] == everywhere()
        assert outcomes[-2] == outcomes[-1] == everywhere("user_login_failed")

    @pytest.mark.parametrize("around", [plain, *KEPT[1:], *UNDONE], ids=lambda f: f.__name__)
    async def test_reused_token(
        self,
        narrow: TortoiseContext,
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
        around: Callable[[str, Act], Awaitable[None]],
    ) -> None:
        """The session ends at once for the caller's transaction, stays ended, and the event is emitted once."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, RefreshTokenReused)
        spent = await log_in(auth)
        fresh = await auth.refresh(spent.refresh_token)

        async def reuse() -> None:
            with pytest.raises(TokenReusedError):
                await auth.refresh(spent.refresh_token)
            with pytest.raises(TokenRevokedError):
                await auth.authenticate(fresh.access_token)
            with pytest.raises(TokenReusedError):
                await auth.refresh(spent.refresh_token)

        await finished(around(connection_of(narrow).connection_name, reuse))
        await finished(quiet(emitter))
        ((ended,),) = await look(narrow, "SELECT revoked_at IS NULL FROM tortoise_auth_session")
        assert not ended
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(fresh.access_token)
        with pytest.raises(TokenReusedError):
            await auth.refresh(spent.refresh_token)
        expected = everywhere("refresh_token_reused")
        if around in UNDONE:
            expected["transaction"] = []
        assert await finished(deliveries.outcome(relay)) == expected
        assert_no_connection_is_held(narrow)

    async def test_reused_token_of_a_session_that_just_ended(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A token of a session that another caller has just ended is refused, and no event is emitted."""
        spent = await log_in(auth)
        await auth.refresh(spent.refresh_token)
        find = Sessions.find_by_refresh_token

        async def find_and_lose(self: Sessions[User], token: RefreshToken) -> Any:
            session = await find(self, token)
            await Session.all().using_db(self.connection()).update(revoked_at=utc_now())
            return session

        monkeypatch.setattr(Sessions, "find_by_refresh_token", find_and_lose)
        deliveries = Deliveries(emitter, RefreshTokenReused)
        async with in_transaction(connection_of(db).connection_name):
            with pytest.raises(TokenReusedError):
                await auth.refresh(spent.refresh_token)
        await finished(quiet(emitter))
        assert set(map(str, (await finished(deliveries.outcome(auth.relay()))).values())) == {"[]"}

    async def test_reused_token_in_a_transaction_that_raises(
        self, db: TortoiseContext, auth: AuthService[User], ada: User
    ) -> None:
        """The error that refuses the token rolls the caller back, and the session stays ended."""
        spent = await log_in(auth)
        fresh = await auth.refresh(spent.refresh_token)
        with pytest.raises(TokenReusedError):
            async with in_transaction(connection_of(db).connection_name):
                await auth.refresh(spent.refresh_token)
        await finished(quiet(auth.emitter))
        with pytest.raises(TokenRevokedError):
            await auth.refresh(fresh.refresh_token)


class TestTwoDatabases:
    """Users and sessions on one, rows of the host on the other."""

    @pytest.fixture(params=SHARED_DATABASES)
    async def pair(
        self, request: pytest.FixtureRequest, tmp_path: Path
    ) -> AsyncIterator[tuple[str, str]]:
        """The names of both connections."""
        kind: str = request.param
        names = f"{kind}_users", f"{kind}_host"
        async with (
            place(kind, tmp_path, maxsize=1) as users,
            place(kind, tmp_path, maxsize=1) as host,
            TortoiseContext() as context,
        ):
            config = {
                "connections": {names[0]: users, names[1]: host},
                "apps": {
                    "models": {"models": MODULES, "default_connection": names[0]},
                    "host": {"models": ["tests.support.ledger"], "default_connection": names[1]},
                },
            }
            await context.init(config=config)
            await context.generate_schemas()
            yield names
            assert_no_connection_is_held(context)

    @pytest.mark.parametrize("kept", [True, False], ids=["kept", "undone"])
    async def test_transaction_on_the_hosts_own(
        self,
        pair: tuple[str, str],
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
        kept: bool,
    ) -> None:
        """A transaction of the other database neither delays nor undoes a login."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, UserLogin)
        with suppress(Undo):
            async with in_transaction(pair[1]):
                await Ledger.create(text="before")
                result = await finished(log_in(auth))
                await finished(quiet(emitter))
                assert (len(deliveries.inline), len(deliveries.background)) == (1, 1)
                await Ledger.create(text="after")
                if not kept:
                    raise Undo
        assert await deliveries.outcome(relay) == everywhere("user_login")
        assert await auth.authenticate(result.access_token)
        assert await Ledger.all().count() == 2 * kept

    @pytest.mark.parametrize("kept", [True, False], ids=["kept", "undone"])
    async def test_transactions_on_both(
        self,
        pair: tuple[str, str],
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
        kept: bool,
    ) -> None:
        """The transaction of the database with the users decides, whichever was opened first."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, UserLogin)
        for outer, inner in (pair, reversed(pair)):
            with suppress(Undo):
                async with in_transaction(outer), in_transaction(inner):
                    await Ledger.create(text="host")
                    await finished(log_in(auth))
                    if not kept:
                        raise Undo
            assert await deliveries.outcome(relay) == everywhere(*["user_login"] * kept)
        assert await Session.all().count() == await Ledger.all().count() == 2 * kept

    async def test_handlers_write_to_the_hosts_own(
        self,
        pair: tuple[str, str],
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
    ) -> None:
        """Handlers of every delivery write to the other database, also while both are in transactions."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        for delivery in DELIVERIES:
            write = partial(Ledger.create, text=delivery)
            emitter.on("user_login", without_arguments(write), delivery=delivery, name=delivery)
        async with in_transaction(pair[0]), in_transaction(pair[1]):
            await finished(log_in(auth))
        await finished(quiet(emitter))
        await finished(relay.drain())
        written = await Ledger.all().order_by("id")
        assert [each.text for each in written] == list(DELIVERIES)


async def refuse(event: Event) -> None:
    """A handler that vetoes."""
    raise Undo


def without_arguments(act: Act) -> Act:
    """Return a handler that does *act*, whatever the event."""

    async def handler() -> None:
        await act()

    return handler


@contextmanager
def statement_cut_short(context: TortoiseContext) -> Iterator[None]:
    """Let the COMMIT of the caller fail on MariaDB: a statement that is cancelled ends the connection.

    Then nothing is kept, and the caller is told.
    """
    try:
        yield
    except OperationalError as error:
        assert kind_of(context) == "mariadb"
        assert str(error) == "The end of its connection has rolled back this transaction"


class TestCancellation:
    """A call that is cancelled at each of its awaits, before or after the awaited result is there."""

    @pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
    @pytest.mark.parametrize("around", [plain, committed, rolled_back], ids=lambda f: f.__name__)
    @pytest.mark.parametrize("method", ["login", "set_password", "logout", "refresh"])
    async def test_emitted_if_and_only_if_it_happened(
        self,
        narrow: TortoiseContext,
        auth: AuthService[User],
        emitter: EventEmitter,
        relay: Relay[User],
        clock: FakeClock,
        method: str,
        around: Callable[[str, Act], Awaitable[None]],
        late: bool,
    ) -> None:
        """Handlers receive the events of exactly what was committed, and no connection leaks.

        A session whose tokens reached no caller is revoked, and that is emitted as well.
        """
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        deliveries = Deliveries(emitter, *EVERY_EVENT)
        name = connection_of(narrow).connection_name
        happened = {True: 0, False: 0}
        for step in count(-1):  # the first two rounds fill the caches of the drivers
            clock.advance(timedelta(seconds=1))
            attempt = await ATTEMPTS[method](auth, ada)
            await deliveries.outcome(relay)
            cancelled = Cancelled(attempt.work, step, late=late)
            with statement_cut_short(narrow):
                await finished(around(name, cancelled.run))
            outcome = await deliveries.outcome(relay)
            there = await finished(attempt.happened(narrow, cancelled.reached))
            expected = attempt.emitted(cancelled.reached) if there else ()
            if around is rolled_back:
                assert not there
                outcome["inline"] = []
            assert outcome == everywhere(*expected), step
            if around is not rolled_back and method == "set_password":
                await assert_up_to_date(ada)
            assert_no_connection_is_held(narrow)
            if step > 0 and not cancelled.reached:
                break
            happened[there] += step > 0
        assert await look(narrow, "SELECT count(*) FROM tortoise_auth_outbox") == [(0,)]
        assert step > 4
        assert happened[False] > 1
        assert happened[True] > 0 or around is rolled_back

    async def test_during_the_commit(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A call that is cancelled during the COMMIT emits its event, and then raises the cancellation."""
        deliveries = Deliveries(emitter, PasswordChanged)
        began, may_end = asyncio.Event(), asyncio.Event()
        wrapper = transaction_class(connection_of(db))
        commit = wrapper.commit

        async def slow_commit(self: Any) -> None:
            began.set()
            await may_end.wait()
            await commit(self)

        with monkeypatch.context() as patch:
            patch.setattr(wrapper, "commit", slow_commit)
            task = asyncio.create_task(auth.set_password(ada, NEW_PASSWORD))
            await finished(began.wait())
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await finished(task)
        assert await deliveries.outcome(relay) == everywhere("password_changed")
        await assert_up_to_date(ada)
        assert await ada.check_password(NEW_PASSWORD)

    async def test_session_without_a_holder_waits_for_the_callers_commit(
        self, server: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A session whose tokens reached no caller is revoked when the caller's transaction commits."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        name = kind_of(server)
        async with in_transaction(name):  # statements that are prepared take fewer steps
            await auth.logout((await log_in(auth)).access_token)
        deliveries = Deliveries(emitter, UserLogin, SessionRevoked)
        orphans = 0
        for step in count(1):
            with statement_cut_short(server):
                async with in_transaction(name):
                    attempt = Cancelled(log_in(auth), step)
                    await attempt.run()
                    await finished(quiet(emitter))
            if not attempt.reached:
                break
            outcome = await deliveries.outcome(Relay(emitter, User))
            orphaned = bool(outcome["inline"])
            assert outcome == everywhere(*["user_login", "session_revoked"] * orphaned)
            alive = "SELECT id FROM tortoise_auth_session WHERE revoked_at IS NULL"
            assert await look(server, alive) == []
            orphans += orphaned
        assert orphans

    async def test_emitted_although_the_connection_breaks_after_the_commit(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        relay: Relay[User],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The caller gets the error; the handlers get the event, and the object has the change."""
        deliveries = Deliveries(emitter, PasswordChanged)
        block = type(connection_of(db)._in_transaction())
        leave = block.__aexit__

        async def leave_and_break(self: Any, *args: Any) -> None:
            await leave(self, *args)
            raise OperationalError("connection lost")

        with monkeypatch.context() as patch:
            patch.setattr(block, "__aexit__", leave_and_break)
            with pytest.raises(ServiceUnavailableError):
                await auth.set_password(ada, NEW_PASSWORD)
        assert await deliveries.outcome(relay) == everywhere("password_changed")
        await assert_up_to_date(ada)


EVERY_EVENT: list[type[Event]] = [
    each for each in declared_events() if each.__module__.startswith("tortoise_auth.")
]


@dataclass(frozen=True)
class Attempt:
    """Something to be cancelled.

    Attributes:
        work: What to cancel.
        happened: Asks the database, and checks that what belongs together is there together.
        emitted: The names of the events, given whether it was cancelled.
    """

    work: Coroutine[Any, Any, object]
    happened: Callable[[TortoiseContext, bool], Awaitable[bool]]
    emitted: Callable[[bool], tuple[str, ...]]


async def login_attempt(auth: AuthService[User], ada: User) -> Attempt:
    await Session.all().delete()
    before = (await row(User, ada.pk))["last_login"]

    async def happened(db: TortoiseContext, cancelled: bool) -> bool:
        sessions = await look(db, "SELECT revoked_at IS NULL FROM tortoise_auth_session")
        assert len(sessions) <= 1
        assert all(bool(alive) is not cancelled for (alive,) in sessions)
        assert ((await row(User, ada.pk))["last_login"] != before) is bool(sessions)
        return bool(sessions)

    def emitted(cancelled: bool) -> tuple[str, ...]:
        return ("user_login", "session_revoked") if cancelled else ("user_login",)

    return Attempt(log_in(auth), happened, emitted)


async def password_attempt(auth: AuthService[User], ada: User) -> Attempt:
    await ada.refresh_from_db()
    await Session.all().delete()
    await log_in(auth)
    before = await row(User, ada.pk)

    async def happened(db: TortoiseContext, cancelled: bool) -> bool:
        after = await row(User, ada.pk)
        different = changed(before, after)
        assert different in (set(), {"password", "session_version", "updated_at"})
        ended = await look(db, "SELECT revoked_at IS NOT NULL FROM tortoise_auth_session")
        assert [bool(each) for (each,) in ended] == [bool(different)]
        return bool(different)

    return Attempt(auth.set_password(ada, PASSWORD), happened, lambda _: ("password_changed",))


async def logout_attempt(auth: AuthService[User], ada: User) -> Attempt:
    await Session.all().delete()
    result = await log_in(auth)

    async def happened(db: TortoiseContext, cancelled: bool) -> bool:
        ((ended,),) = await look(db, "SELECT revoked_at IS NOT NULL FROM tortoise_auth_session")
        return bool(ended)

    return Attempt(auth.logout(result.refresh_token), happened, lambda _: ("user_logout",))


async def refresh_attempt(auth: AuthService[User], ada: User) -> Attempt:
    await Session.all().delete()
    result = await log_in(auth)

    async def happened(db: TortoiseContext, cancelled: bool) -> bool:
        columns = "SELECT generation, revoked_at IS NULL FROM tortoise_auth_session"
        ((generation, alive),) = await look(db, columns)
        assert bool(alive) is not (generation and cancelled)
        return bool(generation)

    def emitted(cancelled: bool) -> tuple[str, ...]:
        return ("session_refreshed", "session_revoked") if cancelled else ("session_refreshed",)

    return Attempt(auth.refresh(result.refresh_token), happened, emitted)


ATTEMPTS: dict[str, Callable[[AuthService[User], User], Awaitable[Attempt]]] = {
    "login": login_attempt,
    "set_password": password_attempt,
    "logout": logout_attempt,
    "refresh": refresh_attempt,
}


async def assert_up_to_date(user: User) -> None:
    """Assert that the object in memory has the stored password and session version."""
    stored = await row(User, user.pk)
    assert (user.password, user.session_version) == (stored["password"], stored["session_version"])
