"""The relay: at least once, in order per user, also when relays and handlers stop, fail, hang or compete."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from tortoise.context import TortoiseContext
from tortoise.exceptions import OperationalError
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, log_in
from tests.support.app import NamedUser, User
from tests.support.concurrency import finished
from tests.support.database import (
    BOTH_BY_POSTGRES,
    SERVERS,
    assert_no_connection_is_held,
    connection_of,
    database,
    kind_of,
    root,
)
from tests.support.servers import process_of, processes_of, second
from tortoise_auth import AuthConfig, AuthService, EventEmitter, RequestContext
from tortoise_auth.database import Listener, connection_for, in_caller_transaction
from tortoise_auth.events import Event, UserEvent, UserLogin, UserLogout, outbox
from tortoise_auth.events import relay as relay_module
from tortoise_auth.events.event_emitter import deliverer_of
from tortoise_auth.events.outbox import Claim
from tortoise_auth.events.relay import Relay
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import ConfigurationError, ServiceUnavailableError
from tortoise_auth.models import DeadLetter, OutboxEntry
from tortoise_auth.testing import FakeClock

SECOND = timedelta(seconds=1)
NEVER = timedelta(days=1)
EVERYWHERE = ["sqlite", "postgres", "mysql"]
"""A poll interval that no test waits for."""


@dataclass(frozen=True, kw_only=True)
class LetterPosted(UserEvent[User]):
    """An event of a host about an account."""

    number: int


@dataclass(frozen=True, kw_only=True)
class BellRung(Event):
    """An event of a host about no account."""

    times: int = 1


class Publisher:
    """Records events: writes rows for the durable subscriptions of an emitter."""

    def __init__(self, emitter: EventEmitter, clock: FakeClock) -> None:
        self._emitter = emitter
        self._clock = clock

    async def __call__(self, *events: Event) -> None:
        """Record all events in one transaction."""
        async with UnitOfWork(
            connection_for(OutboxEntry), self._emitter, clock=self._clock
        ) as unit:
            for event in events:
                unit.record(event)

    async def letters(self, user: User, *numbers: int) -> None:
        """Record one `LetterPosted` for *user* per number, in order."""
        for number in numbers:
            await self(LetterPosted(user=user, subject_id=str(user.pk), number=number))


@pytest.fixture
def publish(emitter: EventEmitter, clock: FakeClock) -> Publisher:
    return Publisher(emitter, clock)


class Handler:
    """A durable handler of `LetterPosted` that fails a given number of times.

    Attributes:
        delivered: The numbers of the letters, in the order in which it was called with success.
        attempts: The numbers with which it was called.
    """

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.delivered: list[int] = []
        self.attempts: list[int] = []

    async def __call__(self, event: LetterPosted) -> None:
        """Receive a letter, or fail."""
        self.attempts.append(event.number)
        if self.failures:
            self.failures -= 1
            raise RuntimeError(f"letter {event.number} is wet")
        self.delivered.append(event.number)


@pytest.fixture
def handler(emitter: EventEmitter) -> Handler:
    handler = Handler()
    emitter.on(LetterPosted, handler, delivery="durable", name="post")
    return handler


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Wait until a relay next claims no rows."""
    looked = asyncio.Condition()
    claim = outbox.claim

    async def noted(*args: Any, **kwargs: Any) -> Claim:
        claimed = await claim(*args, **kwargs)
        if claimed == ([], 0):
            async with looked:
                looked.notify_all()
        return claimed

    monkeypatch.setattr(outbox, "claim", noted)

    async def wait() -> None:
        async with looked:
            await finished(looked.wait())

    return wait


class TestHandlers:
    async def test_same_arguments_as_any_other(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """An inline and a durable handler get the same arguments, however they are subscribed."""
        inline: list[Any] = []
        durable: list[Any] = []
        for calls in (inline, durable):
            self.subscribe(emitter, calls, "durable" if calls is durable else "inline")
        context = RequestContext(ip="203.0.113.7", request_id="r1")
        result = await auth.login(EMAIL, PASSWORD, context=context)
        await auth.logout(result.access_token)
        assert len(inline) == 7
        assert durable == []
        assert await auth.relay().drain() == 7
        assert sorted(durable, key=repr) == sorted(inline, key=repr)
        assert await OutboxEntry.all().count() == 0

    def subscribe(self, emitter: EventEmitter, calls: list[Any], delivery: Any) -> None:
        """Register handlers of every shape that note what they are called with."""
        on: Callable[..., Callable[[Callable[..., Any]], Any]] = partial(
            emitter.on, delivery=delivery
        )

        @on("user_login", name=f"{delivery} by name")
        async def by_name(user: User) -> None:
            calls.append(("by name", user))

        @on(UserLogin, name=f"{delivery} by class")
        async def by_class(event: UserLogin[User]) -> None:
            calls.append(("by class", event, event.user))

        @on("user_login", name=f"{delivery} fields")
        async def fields(session_id: str, context: RequestContext, *, user: User) -> None:
            calls.append(("fields", session_id, context, user))

        @on("user_login", name=f"{delivery} event")
        async def with_event(user: User, event: UserLogin[User]) -> None:
            calls.append(("event", user, event, event.id))

        @on("user_login", name=f"{delivery} rest")
        async def rest(*args: object, **kwargs: object) -> None:
            calls.append(("rest", args, kwargs))

        @on("*", name=f"{delivery} all")
        def everything(event: Event) -> None:
            calls.append(("all", event))

    async def test_of_a_name_and_a_class(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A handler of both gets the user of the named event and the object of the class."""
        received: list[object] = []

        async def note(what: object) -> None:
            received.append(what if isinstance(what, User) else type(what))

        on: Any = emitter.on
        on("user_login", UserLogout, note, delivery="durable", name="audit")
        result = await auth.login(EMAIL, PASSWORD)
        await auth.logout(result.access_token)
        assert await auth.relay().drain() == 2
        assert received == [ada, UserLogout]

    async def test_by_a_clock_of_another_zone(
        self, db: TortoiseContext, ada: User, emitter: EventEmitter, handler: Handler
    ) -> None:
        """A row is delivered when it is due, whatever the time zone of the clock."""
        received: list[str] = []
        emitter.on("user_login", delivery="durable", name="log")(
            lambda user, event: received.append(event.name)
        )
        for hours in (-5, 9):
            clock = FakeClock(datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=hours))))
            auth = AuthService(User, AuthConfig(secret=SECRET), clock=clock)
            await auth.login(EMAIL, PASSWORD)
            assert await auth.relay().drain() == 1
        assert received == ["user_login"] * 2

    async def test_user_is_loaded_anew(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """The handler gets the account as it is when it is called."""
        seen: list[User] = []
        emitter.on("user_login", seen.append, delivery="durable", thread=False)
        await log_in(auth)
        await User.filter(pk=ada.pk).update(display_name="Countess")
        await auth.relay().drain()
        assert [(type(user), user.pk, user.display_name) for user in seen] == [
            (User, ada.pk, "Countess")
        ]

    async def test_recognises_repetitions_by_the_id(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, clock: FakeClock
    ) -> None:
        """Every delivery of an event has the id of its row."""
        ids: list[object] = []

        @emitter.on("user_login", delivery="durable")
        async def fail_twice(event: Event) -> None:
            ids.append(event.id)
            if len(ids) < 3:
                raise RuntimeError

        await log_in(auth)
        expected = (await OutboxEntry.get()).event_id
        for _ in range(3):
            await auth.relay().drain()
            clock.advance(timedelta(minutes=1))
        assert ids == [expected] * 3

    async def test_may_take_only_so_long(
        self, publish: Publisher, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """The timeout of a subscription is a failure like any other, and is retried."""

        @emitter.on("bell_rung", delivery="durable", timeout=0.01)
        async def hang() -> None:
            await asyncio.Event().wait()

        await publish(BellRung())
        assert await auth.relay().drain() == 0
        row = await OutboxEntry.get()
        assert row.attempts == 1
        assert row.last_error == "TimeoutError: took longer than 0.01 s"

    async def test_runs_outside_transactions(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
    ) -> None:
        """A relay that is started inside a transaction runs its handlers outside of it."""
        inside: list[bool] = []
        called = asyncio.Event()

        @emitter.on("bell_rung", delivery="durable")
        async def look() -> None:
            inside.append(in_caller_transaction())
            called.set()

        await publish(BellRung())
        async with in_transaction(connection_of(db).connection_name):
            relay = auth.relay()
            await relay.__aenter__()
        await finished(called.wait())
        await relay.__aexit__(None, None, None)
        assert inside == [False]


class TestDeletedUser:
    async def deleted(self, publish: Publisher, ada: User) -> None:
        """Post a letter to Ada, and delete her account before it is delivered."""
        await publish.letters(ada, 1)
        await ada.delete()

    async def test_where_the_handler_needs_it(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, publish: Publisher
    ) -> None:
        """The row is a dead letter at once, with the reason: no retry restores an account."""
        called: list[object] = []
        emitter.on("letter_posted", called.append, delivery="durable", thread=False)
        await self.deleted(publish, ada)
        assert await auth.relay().drain() == 0
        (row,) = await outbox.entries(connection_for(OutboxEntry), dead=True)
        assert row.attempts == 1
        assert row.last_error == f"UserGoneError: the user {ada.pk} was deleted"
        assert called == []

    async def test_where_it_does_not(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, publish: Publisher
    ) -> None:
        """It is called: with the event, which keeps its `subject_id`, or with None as a default."""
        called: list[object] = []

        @emitter.on(LetterPosted, delivery="durable")
        async def by_class(event: LetterPosted) -> None:
            called.append(("class", event.user, event.subject_id))

        @emitter.on("letter_posted", delivery="durable")
        async def by_field(subject_id: str) -> None:
            called.append(("field", subject_id))

        @emitter.on("letter_posted", delivery="durable")
        async def by_default(user: User | None = None) -> None:
            called.append(("default", user))

        await self.deleted(publish, ada)
        assert await auth.relay().drain() == 3
        pk = str(ada.pk)
        assert sorted(called, key=repr) == [("class", None, pk), ("default", None), ("field", pk)]

    async def test_that_never_was(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, clock: FakeClock
    ) -> None:
        """A subject that is no primary key belongs to no user, and its row is delivered."""
        seen: list[str | None] = []
        emitter.on("bell_rung", lambda subject_id: seen.append(subject_id), delivery="durable")
        subjects = [" 1 ", "True", "9" * 30, "-1", "x" * 255, "order-7", "\u00e9", str(ada.pk)]
        for subject in subjects:
            await Publisher(emitter, clock)(BellRung(subject_id=subject))
        assert await auth.relay().drain() == len(subjects)
        assert sorted(map(str, seen)) == sorted(subjects)


class TestUnreadableRows:
    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"name": "of_tomorrow"}, "'of_tomorrow' is not the name of a declared Event"),
            ({"schema_version": 2}, "letter_posted has schema version 2, not 1"),
            ({"number": None}, "needs number"),
            ({"occurred_at": "yesterday"}, "LetterPosted.occurred_at: "),
        ],
        ids=["name", "version", "field", "value"],
    )
    async def test_are_retried_then_dead(
        self,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
        change: dict[str, Any],
        error: str,
    ) -> None:
        """A row of a newer program, or a broken one, is retried, and then is a dead letter."""
        await publish.letters(ada, 1)
        whole = (await OutboxEntry.get()).payload
        broken = {name: each for name, each in (whole | change).items() if each is not None}
        await OutboxEntry.all().update(payload=broken)
        relay = auth.relay(max_attempts=3)
        for attempt in range(1, 4):
            assert await relay.drain() == 0
            row = await OutboxEntry.get() if attempt < 3 else await DeadLetter.get()
            assert row.attempts == attempt
            clock.advance(timedelta(hours=1))
        assert row.last_error is not None
        assert row.last_error.startswith("ValueError: ")
        assert error in row.last_error

        await DeadLetter.all().update(payload=whole)
        assert await outbox.retry_dead(connection_for(OutboxEntry), clock()) == 1
        assert await relay.drain() == 1
        assert handler.delivered == [1]

    @pytest.mark.parametrize(
        ("column", "value", "dialects"),
        [
            ("payload", "'{oops'", ["sqlite"]),
            ("payload", "''", ["sqlite"]),
            ("payload", "X'ff'", ["sqlite"]),
            ("payload", "'[]'", EVERYWHERE),
            ("payload", "'7'", EVERYWHERE),
            ("payload", "'{\"n\": %s}'" % ("1" * 5000), EVERYWHERE),
            ("payload", "'%s%s'" % ("[" * 3000, "]" * 3000), ["sqlite", "postgres"]),  # noqa: UP031 - as above
            ("payload", "'{\"n\": %s%s}'" % ("[" * 12000, "]" * 12000), ["sqlite", "postgres"]),  # noqa: UP031
            ("event_id", "'oops'", ["sqlite", "mysql"]),
            ("event_id", "7", ["sqlite", "mysql"]),
        ],
        ids=["json", "empty", "bytes", "list", "number", "digits", "deep", "inside", "id", "int"],
    )
    async def test_are_dead_letters_of_their_own(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        column: str,
        value: str,
        dialects: list[str],
    ) -> None:
        """A row that no program can read is a dead letter at once and holds up no other row."""
        connection = root(db)
        if connection.capabilities.dialect not in dialects:
            pytest.skip("the column takes no such value")
        await publish.letters(ada, 1, 2, 3)
        (broken, *_) = await outbox.entries(connection)
        table = OutboxEntry._meta.db_table
        await connection.execute_query(
            f"UPDATE {table} SET {column} = {value} WHERE id = {broken.id}"
        )
        relay = auth.relay()
        assert await relay.drain() == 2
        assert handler.delivered == [2, 3]
        (letter,) = await outbox.entries(connection, dead=True)
        assert letter.id == broken.id
        assert letter.last_error is not None
        assert len(letter.last_error) <= 2000
        assert (await outbox.status(connection, auth._core.clock())).dead == 1

    async def test_of_unknown_subscriptions_wait(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        emitter: EventEmitter,
        clock: FakeClock,
    ) -> None:
        """Rows of a subscription that this program lacks stay unchanged, and `status` lists them."""
        old = Handler()
        emitter.on(LetterPosted, old, delivery="durable", name="old")
        await publish.letters(ada, 1, 2)
        emitter.off(LetterPosted, old)
        new = Handler()
        emitter.on(LetterPosted, new, delivery="durable", name="new")
        await publish.letters(ada, 3)
        before = await OutboxEntry.filter(subscription="old").values()
        clock.advance(NEVER)
        assert await auth.relay().drain() == 1
        assert await OutboxEntry.all().values() == before
        status = await outbox.status(root(db), clock())
        assert (status.subscriptions, status.due, status.dead) == ({"old": 2}, 2, 0)

        emitter.on(LetterPosted, old, delivery="durable", name="old")
        assert await auth.relay().drain() == 2
        assert (old.delivered, new.delivered) == ([1, 2], [3])


class TestOrder:
    """The events of one account reach a subscription in the order in which they happened."""

    async def post_all(self, publish: Publisher) -> list[User]:
        """Post letters 0 to 5 to four users, in turn."""
        users = [
            await User.create_user(email=f"u{number}@example.com", password=PASSWORD)
            for number in range(4)
        ]
        for number in range(6):
            for user in users:
                await publish.letters(user, number)
        return users

    @pytest.mark.parametrize("relays", [1, 2])
    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    async def test_kept_whatever_fails(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        emitter: EventEmitter,
        publish: Publisher,
        clock: FakeClock,
        relays: int,
        batch_size: int,
    ) -> None:
        """A failure holds up its own user alone, and no letter overtakes another of that user."""
        chance = random.Random(batch_size * relays)
        received: dict[str | None, list[int]] = defaultdict(list)
        reading: set[str | None] = set()

        @emitter.on(LetterPosted, delivery="durable")
        async def read(event: LetterPosted) -> None:
            assert event.subject_id not in reading
            reading.add(event.subject_id)
            for _ in range(chance.randint(0, 5)):
                await asyncio.sleep(0)
            reading.discard(event.subject_id)
            if chance.random() < 0.4:
                raise RuntimeError("again, please")
            received[event.subject_id].append(event.number)

        users = await self.post_all(publish)
        several = [auth.relay(batch_size=batch_size, max_attempts=100) for _ in range(relays)]
        rounds = 0
        while await OutboxEntry.all().count():
            await finished(asyncio.gather(*(relay.drain() for relay in several)))
            clock.advance(timedelta(hours=1))
            rounds += 1
        assert received == {str(user.pk): list(range(6)) for user in users}
        assert rounds > 2

    async def test_failure_does_not_hold_up_others(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        publish: Publisher,
        emitter: EventEmitter,
    ) -> None:
        """A letter that cannot be delivered holds up those of the same user, and no others."""
        received: dict[str | None, list[int]] = defaultdict(list)

        @emitter.on(LetterPosted, delivery="durable")
        async def read(event: LetterPosted) -> None:
            if event.subject_id == str(first.pk) and event.number == 1:
                raise RuntimeError
            received[event.subject_id].append(event.number)

        first, *others = await self.post_all(publish)
        assert await auth.relay().drain() == 1 + 6 * len(others)
        expected = {str(user.pk): list(range(6)) for user in others} | {str(first.pk): [0]}
        assert received == expected
        assert [row.attempts for row in await OutboxEntry.all().order_by("id")] == [1, 0, 0, 0, 0]

    async def test_dead_letter_lets_the_rest_pass(
        self,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
    ) -> None:
        """Behind a dead letter the others are delivered, and it can be retried later."""
        handler.failures = 2
        await publish.letters(ada, 1, 2, 3)
        relay = auth.relay(max_attempts=2)
        await relay.drain()
        clock.advance(SECOND)
        await relay.drain()
        assert handler.attempts == [1, 1, 2, 3]
        assert await outbox.retry_dead(connection_for(OutboxEntry), clock()) == 1
        await relay.drain()
        assert handler.delivered == [2, 3, 1]

    async def test_no_subscription_starves(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        emitter: EventEmitter,
        publish: Publisher,
    ) -> None:
        """However many rows one subscription has, others have their turn."""
        for name in ("busy", "quiet"):
            emitter.on(BellRung, list[object]().append, delivery="durable", name=name, thread=False)
        for _ in range(5):
            await publish(BellRung())
        relay = auth.relay(batch_size=1)
        claimed = [await relay._claim() for _ in range(4)]
        names = [row.subscription for batch in claimed if batch is not None for row in batch._rows]
        assert sorted(names) == ["busy", "busy", "quiet", "quiet"]

    async def test_goes_on_when_a_slow_row_ends(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
        idle: Callable[[], Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The row behind one whose batch goes on by itself is delivered at once, without a poll."""
        monkeypatch.setattr(relay_module, "_PATIENCE", 0.01)
        may_end, received = asyncio.Event(), asyncio.Queue[int]()

        @emitter.on(LetterPosted, delivery="durable")
        async def read(event: LetterPosted) -> None:
            await may_end.wait()
            received.put_nowait(event.number)

        await publish.letters(ada, 1, 2)
        async with auth.relay(batch_size=1, poll_interval=NEVER):
            await idle()
            assert await OutboxEntry.filter(due_at__isnull=True).count() == 1
            may_end.set()
            assert [await finished(received.get()) for _ in range(2)] == [1, 2]


class TestRetrying:
    async def test_back_off(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
    ) -> None:
        """The back-off doubles with each attempt up to the maximum, less a jitter of up to half."""
        backoff, longest = timedelta(seconds=4), timedelta(seconds=60)
        relay = auth.relay(backoff=backoff, max_backoff=longest, max_attempts=50)
        spread = []
        for _ in range(8):
            await OutboxEntry.all().delete()
            await publish.letters(ada, 1)
            for attempt in range(1, 9):
                handler.failures = 1
                assert await relay.drain() == 0
                row = await OutboxEntry.get()
                assert row.due_at is not None
                assert row.attempts == attempt
                full = min(backoff * 2 ** (attempt - 1), longest)
                pause = row.due_at - clock()
                assert full / 2 < pause <= full
                spread.append(pause / full)
                clock.now = row.due_at - timedelta(microseconds=1)
                calls = len(handler.attempts)
                assert await relay.drain() == 0
                assert len(handler.attempts) == calls
                clock.now = row.due_at
            handler.failures = 0
            assert await relay.drain() == 1
        assert min(spread) < 0.6
        assert max(spread) > 0.9

    async def test_after_very_many_attempts(
        self,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
    ) -> None:
        """The back-off stays at the maximum, and no number overflows."""
        await publish.letters(ada, 1)
        for attempts in (31, 32, 33, 100_000):
            await OutboxEntry.all().update(attempts=attempts, due_at=clock())
            handler.failures = 1
            await auth.relay(max_attempts=10**9).drain()
            row = await OutboxEntry.get()
            assert row.due_at is not None
            assert timedelta(minutes=30) < row.due_at - clock() <= timedelta(hours=1)

    async def test_dead_letter(
        self,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """After the last attempt the row stays with its error, which is logged, and is not retried."""
        handler.failures = 3
        await publish.letters(ada, 1)
        relay = auth.relay(max_attempts=3)
        for attempt in range(1, 4):
            caplog.clear()
            await relay.drain()
            (record,) = [each for each in caplog.records if each.name == "tortoise_auth.relay"]
            assert record.levelno == (logging.ERROR if attempt == 3 else logging.WARNING)
            assert "letter 1 is wet" in record.getMessage()
            clock.advance(timedelta(minutes=1))
        assert await OutboxEntry.all().count() == 0
        row = await DeadLetter.get()
        assert (row.attempts, row.last_error) == (3, "RuntimeError: letter 1 is wet")
        assert row.dead_at == clock() - timedelta(minutes=1)
        clock.advance(NEVER)
        assert await relay.drain() == 0
        assert handler.attempts == [1, 1, 1]

        assert await outbox.retry(connection_for(OutboxEntry), [row.id], clock()) == 1
        assert await relay.drain() == 1
        assert handler.delivered == [1]

    async def test_errors_of_any_kind(
        self,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
        clock: FakeClock,
    ) -> None:
        """Any error fits into the row, also one with a text that no database stores."""
        failures: list[BaseException] = [
            RuntimeError("x" * 100_000),
            RuntimeError("a\0b"),
            RuntimeError("\ud800"),
            asyncio.CancelledError(),
            StopIteration(),
            TimeoutError(),
            ExceptionGroup("several", [ValueError("one")]),
            Unspeakable(),
        ]

        @emitter.on("bell_rung", delivery="durable")
        async def fail(times: int) -> None:
            raise failures[times]

        for times in range(len(failures)):
            await publish(BellRung(times=times))
        assert await auth.relay(max_attempts=1).drain() == 0
        rows = await outbox.entries(connection_for(OutboxEntry), dead=True)
        assert len(rows) == len(failures)
        for row in rows:
            assert row.last_error
            assert len(row.last_error) <= 2000

    async def test_panic(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, publish: Publisher
    ) -> None:
        """Anything a handler raises is a failed attempt, and the relay goes on."""
        rung: list[int] = []

        @emitter.on("bell_rung", delivery="durable")
        async def fail(times: int) -> None:
            if times:
                raise (Panic, GeneratorExit)[times - 1]("no")
            rung.append(times)

        await publish(BellRung(times=1), BellRung(times=2), BellRung(times=0))
        assert await auth.relay(max_attempts=1).drain() == 1
        assert rung == [0]
        dead = await outbox.entries(connection_for(OutboxEntry), dead=True)
        assert [row.last_error for row in dead] == ["Panic: no", "GeneratorExit: no"]

    async def test_clock_that_steps_back(
        self,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
    ) -> None:
        """A row that was written or postponed before the step waits until it is due, and is not lost."""
        handler.failures = 1
        await publish.letters(ada, 1)
        await auth.relay().drain()
        await publish.letters(ada, 2)
        clock.advance(-timedelta(hours=1))
        assert await auth.relay().drain() == 0
        clock.advance(timedelta(hours=1, seconds=1))
        assert await auth.relay().drain() == 2
        assert handler.delivered == [1, 2]


class Panic(BaseException):
    """An error that no ``except Exception`` catches."""


class Unspeakable(Exception):
    """An error without a readable text."""

    def __str__(self) -> str:
        raise RuntimeError


class TestLease:
    async def test_of_a_relay_that_was_killed(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
    ) -> None:
        """Its rows are delivered again when the lease expires, and not before."""
        await publish.letters(ada, 1, 2)
        await outbox.claim(
            root(db),
            holder="killed",
            subscriptions=["post"],
            user_table="app_user",
            now=clock(),
            lease_ends=clock() + timedelta(minutes=1),
            limit=10,
        )
        clock.advance(timedelta(seconds=59))
        assert await auth.relay().drain() == 0
        clock.advance(SECOND)
        assert await auth.relay().drain() == 2
        assert handler.delivered == [1, 2]

    async def test_shorter_than_the_handler(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
        clock: FakeClock,
    ) -> None:
        """The handler has failed and is cancelled; if it goes on, the relay does not wait for it."""
        may_end, ended = asyncio.Event(), asyncio.Event()

        @emitter.on("bell_rung", delivery="durable")
        async def refuse_to_stop() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await may_end.wait()
            ended.set()

        await publish(BellRung())
        relay = auth.relay(lease=timedelta(milliseconds=50))
        assert await finished(relay.drain()) == 0
        row = await OutboxEntry.get()
        assert (row.attempts, row.claimed_by) == (1, f"{relay.name}:1")
        assert row.last_error == "TimeoutError: took longer than the lease of 0:00:00.050000"
        assert row.due_at is not None
        assert row.due_at > clock()
        may_end.set()
        await finished(ended.wait())
        assert await OutboxEntry.all().count() == 1

    async def test_that_ended_under_a_batch(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A batch does not change rows that its own relay has claimed again since."""
        handler.failures = 1
        postpone, late, go_on = outbox.reschedule, asyncio.Event(), asyncio.Event()

        async def slowly(*args: Any, **kwargs: Any) -> None:
            if not late.is_set():
                late.set()
                await go_on.wait()
            await postpone(*args, **kwargs)

        monkeypatch.setattr(outbox, "reschedule", slowly)
        await publish.letters(ada, 1, 2)
        relay = auth.relay()
        first = asyncio.create_task(relay.drain())
        await finished(late.wait())
        clock.advance(timedelta(minutes=2))
        again = await relay._claim()  # as `run` does while a slow batch goes on by itself
        assert again is not None
        before = await OutboxEntry.all().order_by("id").values("due_at", "last_error", "attempts")
        go_on.set()
        assert await finished(first) == 0
        after = await OutboxEntry.all().order_by("id").values("due_at", "last_error", "attempts")
        assert after == before
        assert await again.deliver() == 2
        assert handler.delivered == [1, 2]

    async def test_not_spent_on_rows_whose_turn_comes_late(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
    ) -> None:
        """Rows that waited for a slow row are released without an attempt."""
        calls: list[int] = []

        @emitter.on(LetterPosted, delivery="durable")
        async def hang_at_first(event: LetterPosted) -> None:
            calls.append(event.number)
            if len(calls) == 1:
                await asyncio.Event().wait()

        bob = await User.create_user(email="bob@example.com", password=PASSWORD)
        await publish.letters(ada, 1, 2)
        await publish.letters(bob, 3)
        relay = auth.relay(lease=timedelta(milliseconds=50), concurrency=1, max_attempts=1)
        assert await finished(relay.drain()) == 2
        assert calls == [1, 2, 3]
        (dead,) = await DeadLetter.all()
        assert dead.payload["number"] == 1

    async def test_of_quick_rows_beside_a_slow_one(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """They are recorded while the slow one runs: a crash would not deliver them again."""
        monkeypatch.setattr(relay_module, "_RECORD_EVERY", 0.01)
        may_end = asyncio.Event()
        recorded = asyncio.Event()
        done = outbox.delete_delivered

        async def note_done(*args: Any) -> None:
            await done(*args)
            if await OutboxEntry.all().count() == 1:
                recorded.set()

        monkeypatch.setattr(outbox, "delete_delivered", note_done)

        @emitter.on("bell_rung", delivery="durable")
        async def hang_at_first(times: int) -> None:
            if times == 1:
                await may_end.wait()

        for times in range(1, 6):
            await publish(BellRung(times=times))
        draining = asyncio.create_task(auth.relay().drain())
        await finished(recorded.wait())
        assert [row.payload["times"] for row in await OutboxEntry.all()] == [1]
        may_end.set()
        assert await finished(draining) == 5


class TestRunning:
    @pytest.fixture
    def other(self, clock: FakeClock) -> AuthService[User]:
        """The same application in another process: it shares nothing but the database."""
        emitter = EventEmitter()
        emitter.on(UserLogin, list[object]().append, delivery="durable", name="logins")
        return AuthService(User, AuthConfig(secret=SECRET), clock=clock, emitter=emitter)

    @pytest.fixture
    def logins(self, emitter: EventEmitter) -> asyncio.Queue[UserLogin[User]]:
        """The logins that this process receives."""
        queue: asyncio.Queue[UserLogin[User]] = asyncio.Queue()
        emitter.on(UserLogin, queue.put_nowait, delivery="durable", name="logins", thread=False)
        return queue

    async def test_hanging_handler_does_not_hold_up_others(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Later rows are delivered while it hangs, as long as the concurrency allows."""
        monkeypatch.setattr(relay_module, "_PATIENCE", 0.01)
        may_end = asyncio.Event()
        rung: asyncio.Queue[int] = asyncio.Queue()

        @emitter.on("bell_rung", delivery="durable")
        async def ring(times: int) -> None:
            if times == 0:
                await may_end.wait()
            rung.put_nowait(times)

        await publish(BellRung(times=0))
        async with auth.relay(concurrency=2, poll_interval=NEVER):
            for times in (1, 2, 3):
                await publish(BellRung(times=times))
                assert await finished(rung.get()) == times
            await publish(BellRung(times=0))
            await publish(BellRung(times=4))
            while await OutboxEntry.filter(claimed_by__isnull=False).count() < 2:  # noqa: ASYNC110 - no event is set
                await asyncio.sleep(0.001)
            assert rung.empty()
            may_end.set()
            assert sorted([await finished(rung.get()) for _ in range(3)]) == [0, 0, 4]
        assert await OutboxEntry.all().count() == 0

    async def test_woken_by_commits_of_its_process(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        logins: asyncio.Queue[UserLogin[User]],
        idle: Callable[[], Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It does not wait for the next poll, nor after the commit of a caller's transaction."""
        monkeypatch.setattr(Listener, "_connect", lambda _: _no_listening())
        async with auth.relay(poll_interval=NEVER):
            await idle()
            result = await log_in(auth)
            assert (await finished(logins.get())).session_id == str(result.session.id)
            await idle()
            async with in_transaction(connection_of(db).connection_name):
                result = await log_in(auth)
                await asyncio.sleep(0)
            assert (await finished(logins.get())).session_id == str(result.session.id)

    @pytest.mark.parametrize("server", BOTH_BY_POSTGRES, indirect=True)
    async def test_woken_by_other_processes(
        self,
        server: TortoiseContext,
        auth: AuthService[User],
        other: AuthService[User],
        logins: asyncio.Queue[UserLogin[User]],
        idle: Callable[[], Any],
    ) -> None:
        """On PostgreSQL a commit in any process wakes it, and a rollback does not."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        async with auth.relay(poll_interval=NEVER):
            await idle()
            with suppress(RuntimeError):
                async with in_transaction(kind_of(server)):
                    await log_in(other)
                    raise RuntimeError
            result = await log_in(other)
            assert (await finished(logins.get())).session_id == str(result.session.id)
        assert logins.empty()

    @pytest.mark.parametrize("server", BOTH_BY_POSTGRES, indirect=True)
    async def test_listens_again(
        self,
        server: TortoiseContext,
        auth: AuthService[User],
        other: AuthService[User],
        logins: asyncio.Queue[UserLogin[User]],
        idle: Callable[[], Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A relay whose listening connection is ended by the server is woken by others again."""
        opened: list[Any] = []
        driver: Any = asyncpg if kind_of(server) == "postgres" else psycopg.AsyncConnection
        connect = driver.connect

        async def noted(*of_the_pool: Any, **options: Any) -> Any:
            connection = await connect(*of_the_pool, **options)
            if not of_the_pool:
                opened.append(connection)
            return connection

        monkeypatch.setattr(driver, "connect", noted)
        await User.create_user(email=EMAIL, password=PASSWORD)
        async with auth.relay(poll_interval=NEVER):
            await idle()
            process = process_of(opened[0])
            async with second(server) as connection:
                await connection.kill(process)
            while len(opened) < 2:  # it looks once more when it listens again
                await idle()
            result = await log_in(other)
            assert (await finished(logins.get())).session_id == str(result.session.id)

    async def test_looks_around_where_nothing_wakes_it(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        other: AuthService[User],
        ada: User,
        logins: asyncio.Queue[UserLogin[User]],
        idle: Callable[[], Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Without notifications it gets the rows of other processes by polling."""
        monkeypatch.setattr(Listener, "_connect", lambda _: _no_listening())
        async with auth.relay(poll_interval=timedelta(milliseconds=10)):
            await idle()
            await log_in(other)
            await finished(logins.get())

    async def test_survives_the_database(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        logins: asyncio.Queue[UserLogin[User]],
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Whichever of its statements fails, it goes on, and the row is delivered at least once."""
        results = []
        for name in ("claim", "delete_delivered", "reschedule", "release"):
            original, failures = getattr(outbox, name), iter(range(2))

            async def fail_at_first(
                *args: Any, original: Any = original, failures: Any = failures, **kwargs: Any
            ) -> Any:
                if next(failures, None) is not None:
                    clock.advance(timedelta(minutes=2))
                    raise OperationalError("server closed the connection")
                return await original(*args, **kwargs)

            monkeypatch.setattr(outbox, name, fail_at_first)
        async with auth.relay(poll_interval=timedelta(milliseconds=1)) as relay:
            for _ in range(3):
                results.append(str((await log_in(auth)).session.id))
            while await OutboxEntry.all().count():
                clock.advance(timedelta(minutes=2))
                await asyncio.sleep(0.001)
        delivered = [logins.get_nowait().session_id for _ in range(logins.qsize())]
        assert list(dict.fromkeys(delivered)) == results
        assert len(delivered) > 3
        assert f"Relay {relay.name} could not work" in caplog.text

    @pytest.mark.parametrize("kind", SERVERS)
    async def test_survives_a_restart_of_the_server(
        self,
        kind: str,
        auth: AuthService[User],
        logins: asyncio.Queue[UserLogin[User]],
        idle: Callable[[], Any],
        tmp_path: Path,
    ) -> None:
        """When all its connections are cut, it opens new ones and goes on."""
        async with database(kind, tmp_path, maxsize=2) as context:
            await User.create_user(email=EMAIL, password=PASSWORD)
            async with auth.relay(poll_interval=timedelta(milliseconds=20)):
                await idle()
                await _cut_connections(context)
                while logins.empty():
                    with suppress(Exception):
                        await log_in(auth)
                    await asyncio.sleep(0.01)

    async def test_failed_statement_does_not_stop_the_others(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If a failure cannot be recorded, the other deliveries are recorded all the same."""
        monkeypatch.setattr(outbox, "reschedule", _unavailable)
        rung: list[int] = []

        @emitter.on("bell_rung", delivery="durable")
        async def ring(times: int) -> None:
            for _ in range(times * 10):
                await asyncio.sleep(0)
            if times == 0:
                raise RuntimeError
            rung.append(times)

        for times in range(4):
            await publish(BellRung(times=times))
        with pytest.raises(ServiceUnavailableError):
            await auth.relay().drain()
        assert rung == [1, 2, 3]
        assert [row.payload["times"] for row in await OutboxEntry.all()] == [0]

    async def test_dies_visibly(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """An error that ends a relay is logged at once and raised by `join`."""

        async def panic(*args: object, **kwargs: object) -> None:
            raise Panic("no")

        monkeypatch.setattr(outbox, "claim", panic)
        async with auth.relay() as relay:
            with pytest.raises(Panic):
                await finished(relay.join())
            (record,) = caplog.records
            assert record.levelname == "ERROR"
            assert record.message == f"Relay {relay.name} failed and has ended"
            assert record.exc_info is not None

    async def test_cancelled_by_others(
        self, db: TortoiseContext, auth: AuthService[User], caplog: pytest.LogCaptureFixture
    ) -> None:
        """A relay that is cancelled from outside logs that it delivers nothing any more."""
        async with auth.relay() as relay:
            assert relay._task is not None
            relay._task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await finished(relay.join())
            assert caplog.messages == [
                f"Relay {relay.name} was cancelled: it delivers nothing any more"
            ]
        async with auth.relay():
            caplog.clear()
        assert caplog.messages == []

    async def test_stops_in_time(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
        clock: FakeClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A handler that does not end delays the stop by its timeout; its row is left to the lease."""
        began, may_end = asyncio.Event(), asyncio.Event()
        calls: list[str] = []

        @emitter.on("bell_rung", delivery="durable")
        async def refuse_to_stop() -> None:
            calls.append("called")
            began.set()
            while not may_end.is_set():
                with suppress(asyncio.CancelledError):
                    await may_end.wait()

        await publish(BellRung())
        loop = asyncio.get_running_loop()
        async with auth.relay(stop_timeout=timedelta(milliseconds=50)):
            await finished(began.wait())
            started = loop.time()
        assert 0.04 < loop.time() - started < 5
        assert "stopped with handlers running" in caplog.text
        row = await OutboxEntry.get()
        assert row.due_at == clock() + timedelta(minutes=1)
        assert await auth.relay().drain() == 0
        may_end.set()
        clock.advance(timedelta(minutes=1))
        assert await auth.relay().drain() == 1
        assert len(calls) == 2

    async def test_stop_lets_running_handlers_end_and_begins_no_more(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
    ) -> None:
        """Rows that are claimed and not begun are released at once, for other relays."""
        began, may_end = asyncio.Event(), asyncio.Event()
        rung: list[int] = []

        @emitter.on("bell_rung", delivery="durable")
        async def ring(times: int) -> None:
            began.set()
            await may_end.wait()
            rung.append(times)

        for times in range(6):
            await publish(BellRung(times=times))
        async with auth.relay(concurrency=2) as relay:
            await finished(began.wait())
            relay.stop()
            may_end.set()
        assert rung == [0, 1]
        rows = await OutboxEntry.all().order_by("id")
        assert [(row.payload["times"], row.attempts) for row in rows] == [
            (times, 0) for times in (2, 3, 4, 5)
        ]
        assert await auth.relay().drain() == 4
        assert await relay.drain() == 0

    async def test_runs_again(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        logins: asyncio.Queue[UserLogin[User]],
    ) -> None:
        """A relay that was stopped can be started and drained again."""
        relay = auth.relay(poll_interval=NEVER)
        for _ in range(3):
            async with relay:
                await log_in(auth)
                await finished(logins.get())
            await log_in(auth)
            assert await relay.drain() == 1
            logins.get_nowait()
        async with relay:
            pass
        assert deliverer_of(auth.emitter).relays == set()
        assert_no_connection_is_held(db)

    async def test_cancelled_while_it_stops(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
    ) -> None:
        """A relay that is cancelled during its stop leaves no task behind."""
        began = asyncio.Event()

        @emitter.on("bell_rung", delivery="durable")
        async def hang() -> None:
            began.set()
            await asyncio.Event().wait()

        await publish(BellRung())
        relay = auth.relay(stop_timeout=NEVER)

        async def live() -> None:
            async with relay:
                await began.wait()

        task = asyncio.create_task(live())
        await finished(began.wait())
        await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await finished(task)
        await finished(asyncio.wait(_tasks_of(relay) or [task]))
        assert deliverer_of(emitter).relays == set()
        assert (await OutboxEntry.get()).claimed_by == f"{relay.name}:1"

    async def test_stopped_before_it_began(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
    ) -> None:
        """A relay that is stopped before it starts works when it is started."""
        await publish.letters(ada, 1)
        relay = auth.relay()
        relay.stop()
        assert await relay.drain() == 1
        await publish.letters(ada, 2)
        relay.stop()
        async with relay:
            await finished(_delivered(handler, [1, 2]))

    async def test_drained_inside_a_transaction(
        self, db: TortoiseContext, auth: AuthService[User]
    ) -> None:
        """`drain` inside a transaction would wait for ever on SQLite, and is refused."""
        async with in_transaction():
            with pytest.raises(RuntimeError, match="inside a transaction"):
                await auth.relay().drain()

    async def test_failure_to_record_is_the_one_that_is_raised(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        publish: Publisher,
        handler: Handler,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """No other error is left behind for the event loop to report."""
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))

        async def refuse(*args: object, **kwargs: object) -> None:
            raise OperationalError("down")

        handler.failures = 1
        monkeypatch.setattr(outbox, "delete_delivered", refuse)
        monkeypatch.setattr(outbox, "reschedule", refuse)
        await publish.letters(ada, 1)
        with pytest.raises(ServiceUnavailableError):
            await auth.relay().drain()
        gc.collect()
        assert complaints == []

    async def test_without_a_database(self, auth: AuthService[User]) -> None:
        """Without a database a relay does not start: the error is raised where it is started."""
        with pytest.raises(ConfigurationError, match="not initialised"):
            async with auth.relay():
                pass

    async def test_bounds(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        publish: Publisher,
    ) -> None:
        """No more rows are claimed, and no more handlers run at once, than the settings allow."""
        running = most_running = 0
        claimed: list[int] = []

        @emitter.on("bell_rung", delivery="durable")
        async def ring() -> None:
            nonlocal running, most_running
            running += 1
            most_running = max(most_running, running)
            claimed.append(await OutboxEntry.filter(claimed_by__isnull=False).count())
            running -= 1

        for _ in range(12):
            await publish(BellRung())
        assert await auth.relay(batch_size=5, concurrency=2).drain() == 12
        assert most_running == 2
        assert max(claimed) == 5


async def _delivered(handler: Handler, numbers: list[int]) -> None:
    while handler.delivered != numbers:  # noqa: ASYNC110 - no event is set
        await asyncio.sleep(0.005)


class TestTwoServices:
    async def test_with_two_models(
        self, db: TortoiseContext, emitter: EventEmitter, clock: FakeClock
    ) -> None:
        """One emitter, one table, the same primary keys: each relay delivers its own users alone."""
        config = AuthConfig(secret=SECRET)
        users = AuthService(User, config, clock=clock)
        named = AuthService(NamedUser, config, clock=clock)
        seen: list[Any] = []
        emitter.on("user_login", seen.append, delivery="durable", thread=False)
        emitter.on(
            "user_login_failed",
            lambda identifier, reason: seen.append(identifier),
            delivery="durable",
            thread=False,
        )
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        eve = await NamedUser.create_user(email=EMAIL, username="eve", password=PASSWORD)
        assert ada.pk == eve.pk
        for _ in range(3):
            await users.login(EMAIL, PASSWORD)
            await named.login("eve", PASSWORD)

        assert await users.relay().drain() == 3
        assert [(type(user), user.pk) for user in seen] == [(User, ada.pk)] * 3
        seen.clear()
        with suppress(Exception):
            await users.login(EMAIL, NEW_PASSWORD)
        assert await named.relay().drain() == 4
        assert seen.count(EMAIL) == 1
        seen.remove(EMAIL)
        assert [(type(user), user.pk) for user in seen] == [(NamedUser, eve.pk)] * 3


class TestSettings:
    @pytest.mark.parametrize("name", ["batch_size", "concurrency", "max_attempts"])
    def test_numbers(self, name: str, auth: AuthService[User]) -> None:
        """Numbers are at least 1, and the service passes them on."""
        for value in (0, -1):
            with pytest.raises(ValueError, match=name):
                auth.relay(**{name: value})  # type: ignore[arg-type]
        assert getattr(auth.relay(**{name: 1}).settings, name) == 1  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "name", ["lease", "backoff", "max_backoff", "poll_interval", "stop_timeout"]
    )
    def test_durations(self, name: str, auth: AuthService[User]) -> None:
        """Durations are positive, and the service passes them on."""
        for value in (timedelta(0), -SECOND):
            with pytest.raises(ValueError, match=name):
                auth.relay(**{name: value})  # type: ignore[arg-type]
        settings = auth.relay(**{name: SECOND}).settings  # type: ignore[arg-type]
        assert getattr(settings, name) == SECOND


async def _unavailable(*args: object, **kwargs: object) -> None:
    raise OperationalError("not available")


@asynccontextmanager
async def _no_listening() -> AsyncIterator[Callable[[], Awaitable[object]]]:
    raise OperationalError("not available")
    yield asyncio.Event().wait


async def _cut_connections(context: TortoiseContext) -> None:
    """Have the server end every connection of the pool."""
    processes = processes_of(context)
    assert processes
    async with second(context) as connection:
        for process in processes:
            await connection.kill(process)


def _tasks_of(relay: Relay[Any]) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == f"relay {relay.name}"]
