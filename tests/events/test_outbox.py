"""Durable rows: written with the change, claimed by one relay at a time, retried, dead letters."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, log_in
from tests.support.app import NamedUser, User
from tests.support.database import connection_of, kind_of, look, root
from tests.support.deliveries import Undo, quiet
from tests.support.statements import every_statement
from tortoise_auth import AuthenticationError, AuthService, EventEmitter, RequestContext
from tortoise_auth.database import transaction
from tortoise_auth.events import Event, SessionRefreshed, UserEvent, UserLogin, outbox
from tortoise_auth.events.outbox import Claimed
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.models import OutboxEntry
from tortoise_auth.testing import FakeClock

MINUTE = timedelta(minutes=1)


@dataclass(frozen=True, kw_only=True)
class PageTurned(Event):
    """An event of a host."""

    page: int


@dataclass(frozen=True, kw_only=True)
class LiveShown(Event):
    """An event that cannot leave this process."""

    thing: object


@dataclass(frozen=True, kw_only=True)
class CardShown(UserEvent[User]):
    """An event of a host about an account."""

    card: str


async def receive(event: Event) -> None:
    """A handler."""


async def note(user: User) -> None:
    """A handler by name."""


async def receive_too(event: Event) -> None:
    """Another one."""


async def stored(*names: str) -> list[tuple[Any, ...]]:
    """Return columns of all rows, in the order of writing."""
    return [tuple(each) for each in await OutboxEntry.all().order_by("id").values_list(*names)]


class TestWriting:
    async def test_nothing_without_a_subscription(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Without a durable subscription to the event, no statement touches the table."""
        emitter.on("*", receive)
        emitter.on("user_login", note, delivery="background")
        emitter.on("user_login", note, delivery="transaction")
        emitter.on(PageTurned, receive, delivery="durable")
        with every_statement(db) as seen:
            result = await log_in(auth)
            await auth.refresh(result.refresh_token)
            with pytest.raises(AuthenticationError):
                await auth.login(EMAIL, NEW_PASSWORD)
            await auth.set_password(ada, NEW_PASSWORD)
            await emitter.emit("user_login", ada)
            await quiet(emitter)
        assert [sql for sql in seen if "outbox" in sql or "notify" in sql] == []
        assert seen.count("COMMIT") >= 3
        assert await OutboxEntry.all().count() == 0

    async def test_costs_one_statement(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """All rows of an event are one INSERT, which on PostgreSQL notifies as well."""
        result = await log_in(auth)
        with every_statement(db) as plain:
            result = await auth.refresh(result.refresh_token)
        emitter.on(SessionRefreshed, receive, delivery="durable")
        emitter.on(SessionRefreshed, receive_too, delivery="durable")
        with every_statement(db) as recorded:
            await auth.refresh(result.refresh_token)
        assert len(recorded) == len(plain) + 1
        assert await OutboxEntry.all().count() == 2

    async def test_row_for_each_subscription(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, clock: FakeClock
    ) -> None:
        """One row for each event and durable subscription, under the name of the subscription."""

        @emitter.on("user_login", "user_logout", delivery="durable", name="mail")
        async def mail(user: User) -> None: ...

        emitter.on("*", receive, delivery="durable")
        emitter.on(UserLogin, receive_too, delivery="durable")
        result = await log_in(auth)
        await auth.logout(result.access_token)

        rows = await stored("event_name", "subscription", "user_table", "subject_id")
        assert sorted(rows) == [
            ("user_login", "mail", "app_user", str(ada.pk)),
            ("user_login", "tests.events.test_outbox:receive", "app_user", str(ada.pk)),
            ("user_login", "tests.events.test_outbox:receive_too", "app_user", str(ada.pk)),
            ("user_logout", "mail", "app_user", str(ada.pk)),
            ("user_logout", "tests.events.test_outbox:receive", "app_user", str(ada.pk)),
        ]
        assert [name for (name,) in await stored("event_name")][:3] == ["user_login"] * 3
        assert len(set(await stored("event_id"))) == 2
        assert set(await stored("created_at", "due_at", "attempts", "claimed_by")) == {
            (clock(), clock(), 0, None)
        }

    async def test_payload(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """The row holds the event as JSON, and gives the event back."""
        received: list[Event] = []
        emitter.on(UserLogin, received.append, thread=False)
        emitter.on(UserLogin, receive, delivery="durable")
        context = RequestContext(ip="203.0.113.7", user_agent="Löwe \U0001f981", request_id="r1")
        await auth.login(EMAIL, PASSWORD, context=context)

        ((text,),) = await look(db, "SELECT payload FROM tortoise_auth_outbox")
        payload = json.loads(text)
        assert payload == received[0].to_dict()
        assert payload["context"]["user_agent"] == "Löwe \U0001f981"
        assert await stored("event_id") == [(received[0].id,)]
        event = Event.from_dict(payload)
        assert isinstance(event, UserLogin)
        assert (event.id, event.subject_id, event.context) == (received[0].id, str(ada.pk), context)

    async def test_no_secrets(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """No row of any event holds a password, a hash or a token."""
        emitter.on("*", receive, delivery="durable")
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        hashes = [ada.password]
        await auth.change_password(ada, PASSWORD, NEW_PASSWORD)
        with pytest.raises(AuthenticationError):
            await log_in(auth)
        await auth.deactivate(ada)
        hashes.append((await User.get(pk=ada.pk)).password)
        sessions = await look(db, "SELECT family_hash, refresh_hash FROM tortoise_auth_session")
        secrets = [PASSWORD, NEW_PASSWORD, *hashes, *(each for row in sessions for each in row)]
        secrets += [first.access_token, first.refresh_token, second.access_token]

        table = repr(await look(db, "SELECT * FROM tortoise_auth_outbox"))
        assert await OutboxEntry.all().count() == 5
        assert "user_login_failed" in table
        for secret in secrets:
            assert secret not in table

    async def test_raw_event(
        self, db: TortoiseContext, emitter: EventEmitter, clock: FakeClock
    ) -> None:
        """``emit`` of an event object writes at once, or in the transaction of the caller."""
        emitter.on(PageTurned, receive, delivery="durable")
        name = connection_of(db).connection_name
        await emitter.emit(PageTurned(page=1))
        assert await look(db, "SELECT count(*) FROM tortoise_auth_outbox") == [(1,)]
        async with in_transaction(name):
            await emitter.emit(PageTurned(page=2))
            if name != "memory":
                assert await look(db, "SELECT count(*) FROM tortoise_auth_outbox") == [(1,)]
        with suppress(Undo):
            async with in_transaction(name):
                await emitter.emit(PageTurned(page=3))
                raise Undo
        async with in_transaction(name):
            with suppress(Undo):
                async with in_transaction(name):
                    await emitter.emit(PageTurned(page=4))
                    raise Undo
        assert [payload["page"] for (payload,) in await stored("payload")] == [1, 2]
        assert await stored("user_table", "subject_id") == [("", None)] * 2

    async def test_emitted_by_name(
        self, db: TortoiseContext, ada: User, emitter: EventEmitter, emitted: list[str]
    ) -> None:
        """A name alone cannot be stored; the error says what to emit, and no handler is called."""
        emitter.on("page_turned", receive, delivery="durable")
        for name, args in [("page_turned", ()), ("user_login", (ada,))]:
            emitter.on(name, receive_too, delivery="durable", name=f"durable {name}")
            with pytest.raises(TypeError, match=f"'{name}' has durable.* an event object"):
                await emitter.emit(name, *args)
        assert emitted == []
        assert await OutboxEntry.all().count() == 0

    async def test_emitted_without_waiting(
        self, db: TortoiseContext, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """``emit_nowait`` of an event object writes the row soon after; of a name it says why not."""
        emitter.on(PageTurned, receive, delivery="durable")
        emitter.emit_nowait(PageTurned(page=1))
        await quiet(emitter)
        assert await stored("event_name") == [("page_turned",)]
        with caplog.at_level(logging.ERROR):
            emitter.emit_nowait("page_turned")
            await quiet(emitter)
        assert "need an event object" in caplog.text
        assert await OutboxEntry.all().count() == 1

    async def test_without_a_database(self, emitter: EventEmitter) -> None:
        """Where there is no database the error says what to set up."""
        emitter.on(PageTurned, receive, delivery="durable")
        with pytest.raises(ConfigurationError, match=r"Tortoise\.init"):
            await emitter.emit(PageTurned(page=1))

    @pytest.mark.filterwarnings("ignore:Module .* has no models")  # those of other tests
    async def test_without_the_tables(self, emitter: EventEmitter) -> None:
        """Where the models are not registered the error says so."""
        emitter.on(PageTurned, receive, delivery="durable")
        async with TortoiseContext() as context:
            await context.init(
                db_url="sqlite://:memory:", modules={"host": ["tests.support.ledger"]}
            )
            with pytest.raises(ConfigurationError, match=r"tortoise_auth\.models"):
                await emitter.emit(PageTurned(page=1))


class TestBackground:
    async def test_writes_no_row(self, db: TortoiseContext, emitter: EventEmitter) -> None:
        """A background delivery that waits for a commit may carry what JSON cannot hold."""
        received: list[Event] = []
        emitter.on(LiveShown, received.append, delivery="background", thread=False)
        event = LiveShown(thing=object())
        async with in_transaction(connection_of(db).connection_name):
            await emitter.emit(event)
            await quiet(emitter)
            assert received == []
            assert await OutboxEntry.all().count() == 0
        await quiet(emitter)
        assert received == [event]


async def claim(
    connection: BaseDBAsyncClient,
    clock: FakeClock,
    *,
    relay: str = "r1",
    names: Sequence[str] = ("s",),
    user_table: str = "app_user",
    limit: int = 100,
) -> list[Claimed]:
    """Claim with a lease of a minute, as a relay does: again as long as rows are only set aside."""
    while True:
        rows, set_aside = await outbox.claim(
            connection,
            holder=relay,
            subscriptions=names,
            user_table=user_table,
            now=clock(),
            lease_ends=clock() + MINUTE,
            limit=limit,
        )
        if rows or not set_aside:
            return rows


async def put(clock: FakeClock, *subjects: str | None, subscription: str = "s") -> list[int]:
    """Write rows, due now, and return their ids."""
    ids = []
    for page, subject in enumerate(subjects, 1):
        event = PageTurned(page=page, subject_id=subject)
        entry = await OutboxEntry.create(
            event_id=event.id,
            event_name=event.name,
            subscription=subscription,
            subject_id=subject,
            payload=event.to_dict(),
            created_at=clock(),
            due_at=clock(),
        )
        ids.append(int(entry.id))
    return ids


async def set_aside() -> list[int]:
    """Return the ids of the rows that are behind another one, in order."""
    return [int(row.id) for row in await OutboxEntry.filter(due_at__isnull=True).order_by("id")]


def ids_of(rows: Sequence[Claimed]) -> list[int]:
    """Return the ids, in order."""
    return [row.id for row in rows]


class TestClaiming:
    async def test_whole_row(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A relay claims what was written, and the row names the relay and the end of the lease."""
        event = CardShown(user=User(id=7), subject_id="7", card="library", context=RequestContext())
        subscription = _subscription("s")
        await outbox.write(root(db), event, [subscription], clock())
        (row,) = await claim(root(db), clock)
        assert (row.event_id, row.event_name) == (event.id, "card_shown")
        assert isinstance(row.event_id, UUID)
        assert (row.subscription, row.subject_id, row.attempts) == ("s", "7", 1)
        assert row.payload == event.to_dict()
        assert await stored("user_table", "claimed_by", "due_at") == [
            ("app_user", "r1", clock() + MINUTE)
        ]

    async def test_until_the_lease_ends(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A claimed row cannot be claimed again until its lease ends."""
        ids = await put(clock, "a", None)
        assert ids_of(await claim(root(db), clock)) == ids
        assert await claim(root(db), clock, relay="r2") == []
        clock.advance(MINUTE - timedelta(microseconds=1))
        assert await claim(root(db), clock, relay="r2") == []
        clock.advance(timedelta(microseconds=1))
        again = await claim(root(db), clock, relay="r2")
        assert ids_of(again) == ids
        assert [row.attempts for row in again] == [2, 2]

    async def test_behind_a_claimed_row(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A later row of a subject waits until its earlier rows are delivered."""
        await put(clock, "a")
        claimed = await claim(root(db), clock)
        (later,) = await put(clock, "a")
        (other,) = await put(clock, "b")
        assert ids_of(await claim(root(db), clock, relay="r2")) == [other]
        await outbox.delete_delivered(root(db), claimed, "r1")
        assert ids_of(await claim(root(db), clock, relay="r2")) == [later]

    async def test_all_of_a_line(self, db: TortoiseContext, clock: FakeClock) -> None:
        """One claim takes rows of a subject up to its limit, oldest first, without a gap."""
        ids = await put(clock, *["a"] * 5, "b", *["a"] * 3)
        assert ids_of(await claim(root(db), clock, limit=4)) == ids[:4]
        assert ids_of(await claim(root(db), clock, relay="r2", limit=4)) == [ids[5]]

    async def test_sets_aside_what_waits(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Rows behind one that is claimed elsewhere are not looked at again until it is gone."""
        ids = await put(clock, "a")
        first = await claim(root(db), clock)
        ids += await put(clock, *["a"] * 15)
        assert await claim(root(db), clock, relay="r2") == []
        assert await set_aside() == ids[1:]
        await outbox.delete_delivered(root(db), first, "r1")
        assert await set_aside() == ids[11:]
        assert ids_of(await claim(root(db), clock, relay="r2")) == ids[1:11]

    async def test_rows_without_a_subject(self, db: TortoiseContext, clock: FakeClock) -> None:
        """They wait for no other row: different relays may claim them at the same time."""
        ids = await put(clock, None, None, None)
        first = await claim(root(db), clock, limit=2)
        second = await claim(root(db), clock, relay="r2")
        assert sorted(ids_of(first) + ids_of(second)) == ids
        assert len(first) == 2

    async def test_each_subscription_for_itself(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """A subscription that is behind does not hold up another one."""
        slow = await put(clock, "a", "a", subscription="slow")
        quick = await put(clock, "a", subscription="quick")
        assert ids_of(await claim(root(db), clock, names=["slow"])) == slow
        assert ids_of(await claim(root(db), clock, relay="r2", names=["slow", "quick"])) == quick

    async def test_other_models(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Rows of another user model are not claimed, whatever their ids; rows of no model are."""
        subscription = _subscription("s")
        for user in (User(id=1), NamedUser(id=1)):
            event = CardShown(user=user, subject_id="1", card="x")  # type: ignore[arg-type]
            await outbox.write(root(db), event, [subscription], clock())
        mine, theirs = [each for (each,) in await stored("id")]
        (unowned,) = await put(clock, "1")
        claimed = await claim(root(db), clock)
        assert ids_of(claimed) == [mine, unowned]
        assert ids_of(await claim(root(db), clock, user_table="app_named_user")) == [theirs]

    async def test_behind_a_dead_letter(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A dead letter holds up no other row."""
        ids = await put(clock, "a", "a")
        (dead,) = await claim(root(db), clock, limit=1)
        await outbox.dead_letter(root(db), dead, "r1", at=clock(), error="x")
        assert ids_of(await claim(root(db), clock)) == ids[1:]

    async def test_behind_a_row_that_is_not_due(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """A row that backs off, or was written by a clock that is ahead, is never overtaken."""
        first, second, third = await put(clock, "a", "a", "a")
        await OutboxEntry.filter(id=second).update(due_at=clock() + timedelta(seconds=5))
        (row,) = await claim(root(db), clock)
        assert row.id == first
        await outbox.delete_delivered(root(db), [row], "r1")
        assert await claim(root(db), clock) == []
        clock.advance(timedelta(seconds=5))
        (row,) = await claim(root(db), clock)
        assert row.id == second
        await outbox.delete_delivered(root(db), [row], "r1")
        assert ids_of(await claim(root(db), clock)) == [third]

    async def test_subject_with_many_rows(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A subject with many rows does not hold up subjects with few."""
        ids = await put(clock, *["a"] * 30, "b", "c")
        assert ids_of(await claim(root(db), clock, limit=4)) == ids[:4]
        assert ids_of(await claim(root(db), clock, limit=4)) == ids[-2:]

    async def test_first_subscriptions_first(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Rows of the subscriptions that are named first are claimed first."""
        many = await put(clock, *[None] * 5, subscription="many")
        few = await put(clock, None, subscription="few")
        names = ["many", "few"]
        assert ids_of(await claim(root(db), clock, names=names, limit=2)) == many[:2]
        assert ids_of(await claim(root(db), clock, names=names[::-1], limit=2)) == [many[2], *few]

    async def test_behind_very_many_that_wait(self, db: TortoiseContext, clock: FakeClock) -> None:
        """However many rows wait behind one that backs off, the others are claimed."""
        ids = await put(clock, *["a"] * 50, "b")
        await OutboxEntry.filter(id=ids[0]).update(due_at=clock() + MINUTE)
        assert ids_of(await claim(root(db), clock, limit=2)) == [ids[-1]]

    async def test_another_relay_is_faster(self, server: TortoiseContext, clock: FakeClock) -> None:
        """While the first row of a subject is being claimed elsewhere, the ones behind it are left."""
        ids = await put(clock, "a", "a", "b", "b", None, None)
        async with transaction(root(server)) as elsewhere:
            theirs = await claim(elsewhere, clock, relay="r2", limit=1)
            assert ids_of(theirs) == ids[:1]
            assert ids_of(await claim(root(server), clock)) == ids[2:]
            assert await set_aside() == []
        assert await claim(root(server), clock) == []
        assert await set_aside() == [ids[1]]
        await outbox.delete_delivered(root(server), theirs, "r2")
        assert ids_of(await claim(root(server), clock)) == [ids[1]]

    @pytest.mark.parametrize("prepared", [False, True])
    async def test_backlog_after_long_quiet(
        self, server: TortoiseContext, clock: FakeClock, prepared: bool
    ) -> None:
        """Statistics of an empty table do not slow down the claim of a backlog."""
        await put(clock, *["a"] * 100)
        await OutboxEntry.all().delete()
        analyze = "ANALYZE TABLE" if kind_of(server) == "mariadb" else "VACUUM ANALYZE"
        await root(server).execute_script(f"{analyze} tortoise_auth_outbox")
        for _ in range(10 * prepared):
            assert await claim(root(server), clock) == []
        event = PageTurned(page=1).to_dict()
        await OutboxEntry.bulk_create(
            OutboxEntry(
                event_id=event["id"],
                event_name="page_turned",
                subscription="s",
                subject_id=str(number % 500),
                payload=event,
                created_at=clock(),
                due_at=clock(),
            )
            for number in range(5000)
        )
        async with asyncio.timeout(10):
            for _ in range(10):
                rows = await claim(root(server), clock)
                assert len(rows) == 100
                await outbox.delete_delivered(root(server), rows, "r1")

    async def test_nothing_to_listen_for(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A relay without durable subscriptions claims nothing, without a statement."""
        await put(clock, "a")
        with every_statement(db) as seen:
            assert await claim(root(db), clock, names=[]) == []
        assert seen == []

    async def test_hostile_names(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Names and subjects are parameters of statements, whatever characters they have."""
        for text in ("'; DROP TABLE tortoise_auth_outbox; --", "{limit}", "?", "$1", "%s", "ö\n"):
            ids = await put(clock, text, text, subscription=text)
            first = await claim(root(db), clock, names=[text], limit=1)
            assert await claim(root(db), clock, names=[text]) == []
            await outbox.delete_delivered(root(db), first, "r1")
            assert ids_of(await claim(root(db), clock, names=[text])) == ids[1:]


class TestLettingGo:
    """What a relay does with its rows, and with rows whose lease has ended."""

    async def test_only_ones_own(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A relay whose lease has ended cannot delete, reschedule, release or bury its rows."""
        await put(clock, "a")
        (lost,) = await claim(root(db), clock)
        clock.advance(MINUTE)
        await claim(root(db), clock, relay="r2")
        before = await OutboxEntry.all().values()
        await outbox.delete_delivered(root(db), [lost], "r1")
        await outbox.reschedule(root(db), lost, "r1", due_at=clock(), error="x")
        await outbox.dead_letter(root(db), lost, "r1", at=clock(), error="x")
        await outbox.release(root(db), [lost], "r1", clock())
        assert await OutboxEntry.all().values() == before

    async def test_release(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A released row is as if it had never been claimed."""
        await put(clock, "a")
        for _ in range(3):
            (row,) = await claim(root(db), clock)
            assert row.attempts == 1
            await outbox.release(root(db), [row], "r1", clock())

    async def test_nothing(self, db: TortoiseContext, clock: FakeClock) -> None:
        """No rows, no statement."""
        with every_statement(db) as seen:
            await outbox.delete_delivered(root(db), [], "r1")
            await outbox.release(root(db), [], "r1", clock())
            await outbox.write(root(db), PageTurned(page=1), [], clock())
        assert seen == []


class TestOperating:
    async def bury_one(self, db: TortoiseContext, clock: FakeClock) -> int:
        """Make a dead letter."""
        (row,) = await claim(root(db), clock, limit=1)
        await outbox.dead_letter(root(db), row, "r1", at=clock(), error="RuntimeError: no")
        return row.id

    async def test_status(self, db: TortoiseContext, clock: FakeClock) -> None:
        """The status counts rows that wait, are due or are dead letters, and gives the oldest age."""
        empty = await outbox.status(root(db), clock())
        assert (empty.waiting, empty.due, empty.dead, empty.oldest_waiting) == (0, 0, 0, 0.0)
        await put(clock, "a")
        await self.bury_one(db, clock)
        clock.advance(timedelta(seconds=30))
        await put(clock, "b", "c")
        await put(clock, "d", subscription="unknown")
        clock.advance(timedelta(seconds=90))
        await claim(root(db), clock, limit=1)

        status = await outbox.status(root(db), clock())
        assert (status.waiting, status.due, status.dead) == (3, 2, 1)
        assert status.oldest_waiting == 90.0
        assert status.subscriptions == {"s": 2, "unknown": 1}
        clock.advance(timedelta(hours=-1))
        assert (await outbox.status(root(db), clock())).oldest_waiting == 0.0

    async def test_status_in_a_transaction(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Asked inside a transaction, the status counts what that sees, and does not change its plans."""
        async with in_transaction(connection_of(db).connection_name) as caller:
            await put(clock, "a")
            assert (await outbox.status(connection_of(db), clock())).waiting == 1
            if caller.capabilities.dialect == "postgres":
                assert await caller.execute_query_dict("SHOW enable_seqscan") == [
                    {"enable_seqscan": "on"}
                ]

    async def test_entries(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Waiting rows and dead letters can be listed, oldest first."""
        ids = await put(clock, "a", "b", "c", "d")
        dead = await self.bury_one(db, clock)
        assert [row.id for row in await outbox.entries(root(db))] == ids[1:]
        assert [row.id for row in await outbox.entries(root(db), limit=2)] == ids[1:3]
        (letter,) = await outbox.entries(root(db), dead=True)
        assert (letter.id, letter.last_error) == (dead, "RuntimeError: no")
        assert letter.dead_at == clock()

    async def test_retry(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A dead letter that is retried is due, with no attempts made."""
        ids = await put(clock, "a", "b")
        dead = await self.bury_one(db, clock)
        clock.advance(timedelta(days=1))
        assert await outbox.retry(root(db), [dead, 12345], clock()) == 1
        assert await outbox.retry(root(db), [], clock()) == 0
        rows = await claim(root(db), clock)
        assert ids_of(rows) == ids
        assert [row.attempts for row in rows] == [1, 1]
        assert (await outbox.status(root(db), clock())).dead == 0

    async def test_retry_behind_others(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A retried dead letter precedes a row behind it that backs off, and no row overtakes it."""
        first, second, third = await put(clock, "a", "a", "a")
        await self.bury_one(db, clock)
        (row,) = await claim(root(db), clock, limit=1)
        await outbox.reschedule(root(db), row, "r1", due_at=clock() + MINUTE, error="x")
        await outbox.retry(root(db), [first], clock())
        (row,) = await claim(root(db), clock)
        assert row.id == first
        await outbox.delete_delivered(root(db), [row], "r1")
        clock.advance(MINUTE)
        assert ids_of(await claim(root(db), clock)) == [second, third]

    async def test_retry_all_dead(self, db: TortoiseContext, clock: FakeClock) -> None:
        """All dead letters can be retried at once; waiting rows do not change."""
        await put(clock, "a", "b", "c")
        for _ in range(2):
            await self.bury_one(db, clock)
        (waiting,) = await claim(root(db), clock)
        await outbox.reschedule(root(db), waiting, "r1", due_at=clock() + MINUTE, error="x")
        assert await outbox.retry_dead(root(db), clock()) == 2
        assert waiting.id not in ids_of(await claim(root(db), clock))

    async def test_purge(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A purge deletes dead letters from before a time, and no waiting rows."""
        await put(clock, "a", "b", "c")
        await self.bury_one(db, clock)
        clock.advance(MINUTE)
        await self.bury_one(db, clock)
        assert await outbox.purge(root(db), before=clock()) == 1
        status = await outbox.status(root(db), clock())
        assert (status.waiting, status.dead) == (1, 1)

    async def test_status_counts_up_to_a_limit(
        self, db: TortoiseContext, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No count of a subscription or of the dead letters costs more than its limit."""
        monkeypatch.setattr(outbox, "COUNTED", 3)
        await put(clock, *[None] * 5)
        await put(clock, None, subscription="t")
        for _ in range(4):
            await self.bury_one(db, clock)
        await put(clock, *[None] * 5)
        status = await outbox.status(root(db), clock())
        assert (status.waiting, status.due, status.dead) == (4, 4, 3)
        assert status.subscriptions == {"s": 3, "t": 1}

    @pytest.mark.parametrize("work", ["purge", "retry_dead"])
    async def test_some_at_a_time(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
        work: str,
    ) -> None:
        """Many dead letters are purged or retried in short transactions, and logins come between."""
        monkeypatch.setattr(outbox, "BATCH_SIZE", 3)
        await put(clock, *[None] * 8)
        for _ in range(8):
            await self.bury_one(db, clock)
        pauses: list[float] = []
        sleep = asyncio.sleep

        async def log_in_meanwhile(seconds: float) -> None:
            pauses.append(seconds)
            monkeypatch.setattr(asyncio, "sleep", sleep)
            await log_in(auth)
            monkeypatch.setattr(asyncio, "sleep", log_in_meanwhile)
            left.append((await outbox.status(root(db), clock())).dead)

        left: list[int] = []
        monkeypatch.setattr(asyncio, "sleep", log_in_meanwhile)
        if work == "purge":
            changed = await outbox.purge(root(db), before=clock() + MINUTE)
        else:
            changed = await outbox.retry_dead(root(db), clock())
        monkeypatch.setattr(asyncio, "sleep", sleep)
        assert changed == 8
        assert left == [5, 2, 0]
        assert min(pauses) > 0
        assert await OutboxEntry.all().count() == (0 if work == "purge" else 8)

    async def test_retried_twice_at_once(self, server: TortoiseContext, clock: FakeClock) -> None:
        """Dead letters that two operators retry at the same moment move back once."""
        await put(clock, *[None] * 20)
        for _ in range(20):
            await self.bury_one(server, clock)
        several = [outbox.retry_dead(root(server), clock()) for _ in range(3)]
        assert sum(await asyncio.gather(*several)) == 20
        assert await OutboxEntry.all().count() == 20

    async def test_retry_of_a_row_that_is_behind(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """A row that lost its predecessor to a DELETE by hand can be retried."""
        first, second = await put(clock, "a", "a")
        await claim(root(db), clock, limit=1)
        assert await claim(root(db), clock) == []
        await OutboxEntry.filter(id=first).delete()
        assert await claim(root(db), clock) == []
        assert await outbox.retry(root(db), [second], clock()) == 1
        assert ids_of(await claim(root(db), clock)) == [second]


def _subscription(name: str) -> Any:
    emitter = EventEmitter()
    emitter.on("*", receive, delivery="durable", name=name)
    (subscription,) = emitter.subscriptions("*")
    return subscription
