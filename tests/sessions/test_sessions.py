"""Sessions: refresh, logout, lists, purge, and the one statement that reads session and user."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from tortoise import fields
from tortoise.context import TortoiseContext
from tortoise.manager import Manager
from tortoise.models import Model
from tortoise.queryset import QuerySet
from tortoise.transactions import in_transaction

from tests.support.accounts import (
    EMAIL,
    GARBAGE,
    NEW_PASSWORD,
    PASSWORD,
    SECRET,
    assert_live,
    assert_over,
    log_in,
    signed,
)
from tests.support.app import User
from tests.support.database import DATABASES, MODULES, connection_of, database
from tests.support.rows import columns, row
from tests.support.statements import statements
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthenticationError,
    AuthResult,
    AuthService,
    EventEmitter,
    RequestContext,
    Revocation,
)
from tortoise_auth.events import (
    RefreshTokenReused,
    SessionRefreshed,
    SessionRevoked,
    UserLogout,
)
from tortoise_auth.exceptions import (
    EventError,
    TokenExpiredError,
    TokenInvalidError,
    TokenReusedError,
    TokenRevokedError,
)
from tortoise_auth.fields import EmailField
from tortoise_auth.models import Session
from tortoise_auth.sessions.refresh_tokens import RefreshToken
from tortoise_auth.testing import Captured, FakeClock


@pytest.fixture
async def bob(db: TortoiseContext) -> User:
    return await User.create_user(email="bob@example.com", password=PASSWORD)


class TestRefresh:
    async def test_rotates(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A refresh returns two new tokens of the same session, whose idle time begins again."""
        first = await log_in(auth)
        clock.advance(timedelta(days=6))
        second = await auth.refresh(first.refresh_token)

        assert second.user == ada
        assert second.session.id == first.session.id
        assert second.access_token != first.access_token
        assert second.refresh_token != first.refresh_token
        assert second.access_expires_at == clock() + timedelta(minutes=15)
        assert second.refresh_expires_at == clock() + timedelta(days=7)
        assert second.session.generation == 1
        assert second.session.last_used_at == clock()
        assert (await row(Session, first.session.id))["generation"] == 1
        event = events.one(SessionRefreshed)
        assert (event.user, event.session_id, event.generation) == (ada, str(first.session.id), 1)
        await assert_live(auth, second)

    async def test_older_access_token_lives_on(self, auth: AuthService[User], ada: User) -> None:
        """A request that is in flight while the client refreshes is not refused."""
        first = await log_in(auth)
        await auth.refresh(first.refresh_token)
        assert await auth.authenticate(first.access_token) == ada

    async def test_context(self, auth: AuthService[User], ada: User) -> None:
        """The session stores the context of the last refresh; what that omits is kept."""
        first = await auth.login(
            EMAIL, PASSWORD, context=RequestContext(ip="203.0.113.7", user_agent="Firefox")
        )
        second = await auth.refresh(first.refresh_token, context=RequestContext(ip="203.0.113.8"))
        stored = await row(Session, first.session.id)
        assert (stored["ip"], stored["user_agent"]) == ("203.0.113.8", "Firefox")
        assert second.session.ip == "203.0.113.8"
        await auth.refresh(second.refresh_token)
        assert (await row(Session, first.session.id))["ip"] == "203.0.113.8"

    async def test_idle_lifetime(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A refresh token expires when it is not used within its lifetime."""
        first, second = await log_in(auth), await log_in(auth)
        events.clear()
        clock.advance(timedelta(days=7) - timedelta(microseconds=1))
        await auth.refresh(first.refresh_token)
        clock.advance(timedelta(microseconds=1))
        with pytest.raises(TokenExpiredError):
            await auth.refresh(second.refresh_token)
        assert events.names == ["session_refreshed"]

    async def test_absolute_lifetime(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """However often a session is refreshed, it ends after its lifetime."""
        result = await log_in(auth)
        ends = result.session.expires_at
        for _ in range(5):
            clock.advance(timedelta(days=5, hours=23))
            result = await auth.refresh(result.refresh_token)
        assert result.refresh_expires_at == ends
        assert result.session.expires_at == ends
        clock.now = ends - timedelta(minutes=1)
        result = await auth.refresh(result.refresh_token)
        assert result.access_expires_at == ends
        clock.now = ends
        with pytest.raises(TokenExpiredError):
            await auth.refresh(result.refresh_token)
        with pytest.raises(TokenExpiredError):
            await auth.authenticate(result.access_token)

    @pytest.mark.parametrize("age", [1, 2, 5])
    async def test_replay_ends_the_session(
        self,
        auth: AuthService[User],
        ada: User,
        events: Captured,
        age: int,
    ) -> None:
        """A spent token of any age ends its session and no other, and the event is emitted once."""
        first, other = await log_in(auth), await log_in(auth)
        newest = first
        for _ in range(age):
            newest = await auth.refresh(newest.refresh_token)
        events.clear()
        with pytest.raises(TokenReusedError):
            await auth.refresh(first.refresh_token)

        await assert_over(auth, newest)
        with pytest.raises(TokenReusedError):
            await auth.refresh(first.refresh_token)
        assert events.names == ["refresh_token_reused"]
        event = events.one(RefreshTokenReused)
        assert (event.user, event.session_id) == (ada, str(first.session.id))
        await assert_live(auth, other)

    @pytest.mark.parametrize(
        "ender", ["logout", "set_password", "deactivate", "close_by_hand", "raise_by_hand"]
    )
    async def test_replay_after_the_end_emits_nothing(
        self, auth: AuthService[User], ada: User, events: Captured, ender: str
    ) -> None:
        """A spent token of a session that is over ends nothing, and emits nothing."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        enders: dict[str, Callable[[], Awaitable[object]]] = {
            "logout": lambda: auth.logout(second.access_token),
            "set_password": lambda: auth.set_password(ada, NEW_PASSWORD),
            "deactivate": lambda: auth.deactivate(ada),
            "close_by_hand": lambda: User.filter(pk=ada.pk).update(is_active=False),
            "raise_by_hand": lambda: User.filter(pk=ada.pk).update(session_version=7),
        }
        await enders[ender]()
        events.clear()
        with pytest.raises(TokenReusedError):
            await auth.refresh(first.refresh_token)
        assert events.names == []

    async def test_unknown_token(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """A well-formed token that was never issued is refused, and ends nothing."""
        result = await log_in(auth)
        events.clear()
        with pytest.raises(TokenInvalidError):
            await auth.refresh(RefreshToken.new().text)
        assert events.names == []
        await assert_live(auth, result)

    async def test_damaged_token(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """A token with any one character changed is damaged, not reused."""
        result = await log_in(auth)
        events.clear()
        token = result.refresh_token
        for position in range(len(token)):
            damaged = token[:position] + other_than(token[position]) + token[position + 1 :]
            with pytest.raises(TokenInvalidError):
                await auth.refresh(damaged)
            assert await auth.logout(damaged) == Revocation(0, None)
        for damaged in (token[:-1], token + "A", token + "=", token + "\n", f" {token}"):
            with pytest.raises(TokenInvalidError):
                await auth.refresh(damaged)
        assert events.names == []
        await assert_live(auth, result)

    async def test_sees_the_end_at_once(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """After a new password or a deactivation no refresh works, even once the account is active again."""
        first = await log_in(auth)
        await auth.set_password(ada, NEW_PASSWORD)
        await assert_over(auth, first)
        second = await auth.login(EMAIL, NEW_PASSWORD)
        await auth.deactivate(ada)
        events.clear()
        await assert_over(auth, second)
        await auth.activate(ada)
        await assert_over(auth, second)
        assert events.names == ["user_activated"]

    async def test_handler_of_a_reuse_fails(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A handler that fails after the session has ended does not revive it."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)

        @emitter.on("refresh_token_reused")
        async def fail() -> None:
            raise RuntimeError

        emitter.errors = "raise"
        with pytest.raises(EventError):
            await auth.refresh(first.refresh_token)
        await assert_over(auth, second)

    @pytest.mark.parametrize("around", ["nothing", "transaction"])
    async def test_handler_refuses_the_event_of_a_reuse(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, around: str
    ) -> None:
        """A handler that refuses the event of a spent token keeps no session live."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)

        @emitter.on("refresh_token_reused", delivery="transaction")
        async def refuse() -> None:
            raise RuntimeError

        with pytest.raises(EventError):
            if around == "nothing":
                await auth.refresh(first.refresh_token)
            else:
                async with in_transaction():
                    await auth.refresh(first.refresh_token)
        await emitter.aclose(10)
        await assert_over(auth, second)

    async def test_answer_is_lost(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, events: Captured
    ) -> None:
        """A refresh whose answer is lost ends the session without an event of reuse."""
        first = await log_in(auth)
        events.clear()
        with _raising(emitter):
            with pytest.raises(EventError):
                await auth.refresh(first.refresh_token)
        await emitter.aclose(10)
        assert events.names == ["session_refreshed", "session_revoked"]
        assert events.one(SessionRevoked).actor == "system"
        with pytest.raises(TokenReusedError):
            await auth.refresh(first.refresh_token)
        assert events.names == ["session_refreshed", "session_revoked"]


@contextmanager
def _raising(emitter: EventEmitter) -> Iterator[None]:
    """Let a handler of ``session_refreshed`` fail, and its error reach the caller."""

    async def fail() -> None:
        raise RuntimeError

    emitter.errors = "raise"
    emitter.on("session_refreshed", fail)
    yield
    emitter.off("session_refreshed", fail)
    emitter.errors = "log"


class TestLogout:
    @pytest.mark.parametrize("which", ["access_token", "refresh_token"])
    async def test_either_token_ends_both(
        self, auth: AuthService[User], ada: User, which: str, events: Captured
    ) -> None:
        """A logout with either token ends both, and no other session; a second one ends nothing."""
        result, other = await log_in(auth), await log_in(auth)
        events.clear()
        token = getattr(result, which)
        assert await auth.logout(token) == Revocation(1, str(ada.pk))
        assert await auth.logout(token) == Revocation(0, str(ada.pk))
        await assert_over(auth, result)
        assert events.names == ["user_logout"]
        await assert_live(auth, other)

    async def test_spent_refresh_token(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """A client that lost its newest token can still log out, without an event of reuse."""
        first, other = await log_in(auth), await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        events.clear()
        assert await auth.logout(first.refresh_token) == Revocation(1, str(ada.pk))
        await assert_over(auth, second)
        assert events.names == ["user_logout"]
        await assert_live(auth, other)

    async def test_expired_access_token(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A client whose access token has expired can still log out."""
        result = await log_in(auth)
        events.clear()
        clock.advance(timedelta(days=2))
        assert await auth.logout(result.access_token) == Revocation(1, str(ada.pk))
        with pytest.raises(TokenRevokedError):
            await auth.refresh(result.refresh_token)
        assert events.names == ["user_logout"]

    async def test_session_over(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A session whose lifetime is over cannot end again."""
        result = await log_in(auth)
        events.clear()
        clock.advance(timedelta(days=30))
        for token in (result.access_token, result.refresh_token):
            assert await auth.logout(token) == Revocation(0, str(ada.pk))
        assert events.names == []

    async def test_garbage(
        self, db: TortoiseContext, auth: AuthService[User], events: Captured
    ) -> None:
        """A value that is no token ends nothing, raises nothing and costs no statement."""
        with statements(db) as seen:
            for token in filter(lambda each: isinstance(each, str), GARBAGE):
                assert await auth.logout(token) == Revocation(0, None)
        assert seen == []
        assert events.names == []

    async def test_what_holds_the_token(self, auth: AuthService[User], ada: User) -> None:
        """Passing the whole result, or the session, is a TypeError, not a logout of no session."""
        result = await log_in(auth)
        for mistake in (result, result.session):
            with pytest.raises(TypeError, match=r"^logout\(\) takes "):
                await auth.logout(mistake)  # type: ignore[arg-type]
        with pytest.raises(
            TypeError, match=r"^revoke_session\(\) takes result.session, not the Auth"
        ):
            await auth.revoke_session(result)  # type: ignore[arg-type]
        await assert_live(auth, result)

    async def test_forged_token(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """The id of a session under a foreign signature ends nothing."""
        result = await log_in(auth)
        events.clear()
        forger = AuthService(User, AuthConfig(secret=SECRET[::-1]), clock=clock)
        forged = signed(forger, clock, str(ada.pk), str(result.session.id))
        assert await auth.logout(forged) == Revocation(0, None)
        assert events.names == []
        await assert_live(auth, result)

    async def test_event(
        self, auth: AuthService[User], ada: User, events: Captured, clock: FakeClock
    ) -> None:
        """`user_logout` carries the session that ended, and the context of the request."""
        result = await log_in(auth)
        context = RequestContext(ip="203.0.113.7")
        await auth.logout(result.refresh_token, context=context)
        event = events.one(UserLogout)
        assert event.user == ada
        assert event.session_id == str(result.session.id)
        assert (event.sessions_ended, event.everywhere) == (1, False)
        assert event.context == context


class TestIdle:
    @pytest.mark.parametrize(
        "end",
        [
            lambda auth, result: auth.logout(result.access_token),
            lambda auth, result: auth.logout(result.refresh_token),
            lambda auth, result: auth.revoke_session(result.session.id),
        ],
        ids=["access", "refresh", "id"],
    )
    async def test_cannot_end_once_more(
        self,
        auth: AuthService[User],
        ada: User,
        clock: FakeClock,
        events: Captured,
        end: Any,
    ) -> None:
        """A session that was idle for too long is over, and no event reports that it ends now."""
        result = await log_in(auth)
        clock.advance(auth.config.refresh_token_lifetime)
        events.clear()
        assert await end(auth, result) == Revocation(0, str(ada.pk))
        assert events.names == []
        assert (await Session.get()).revoked_at is not None


class TestLogoutAll:
    async def test_ends_every_session(
        self, auth: AuthService[User], ada: User, bob: User, events: Captured
    ) -> None:
        """Every session of the account ends at once, none of another account, with one event."""
        results = [await log_in(auth) for _ in range(3)]
        other = await auth.login("bob@example.com", PASSWORD)
        assert await auth.logout_all(ada) == Revocation(3, str(ada.pk))
        for result in results:
            await assert_over(auth, result)
        await assert_live(auth, other)
        event = events.one(UserLogout)
        assert event.user == ada
        assert (event.session_id, event.sessions_ended, event.everywhere) == (None, 3, True)

    @pytest.mark.parametrize("sessions", [1, 25])
    async def test_two_statements(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, sessions: int
    ) -> None:
        """A logout from every session is an UPDATE of the live and one of the idle, however many there are."""
        for _ in range(sessions):
            await log_in(auth)
        with statements(db) as seen:
            assert (await auth.logout_all(ada)).sessions == sessions
        assert [each.split()[0] for each in seen] == ["BEGIN", "UPDATE", "UPDATE", "COMMIT"]

    @pytest.mark.parametrize("hours", [-11, -5, 2, 14])
    async def test_by_a_clock_of_another_zone(
        self, db: TortoiseContext, ada: User, hours: int
    ) -> None:
        """The stored time is the same whatever the zone of the clock."""
        clock = FakeClock(datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=hours))))
        hour = timedelta(hours=1)
        config = AuthConfig(secret=SECRET, session_lifetime=hour, refresh_token_lifetime=hour)
        auth = AuthService(User, config, clock=clock)
        result = await log_in(auth)
        assert (await auth.logout_all(ada)).sessions == 1
        await assert_over(auth, result)

    async def test_does_not_count_idle_sessions(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A session that was over already is not counted, and without a live one nothing is emitted."""
        idle = await log_in(auth)
        clock.advance(auth.config.refresh_token_lifetime)
        live = await log_in(auth)
        assert (await auth.logout_all(ada)).sessions == 1
        assert events.one(UserLogout).sessions_ended == 1
        rows = await Session.filter(id__in=[idle.session.id, live.session.id])
        assert all(row.revoked_at is not None for row in rows)
        await log_in(auth)
        clock.advance(auth.config.refresh_token_lifetime)
        events.clear()
        assert (await auth.logout_all(ada)).sessions == 0
        assert events.names == []

    @pytest.mark.parametrize("keep", ["session", "uuid", "str"])
    async def test_keep(self, auth: AuthService[User], ada: User, keep: str) -> None:
        """One session stays live, given by itself or by its id."""
        ended, kept = await log_in(auth), await log_in(auth)
        names: dict[str, Any] = {
            "session": kept.session,
            "uuid": kept.session.id,
            "str": str(kept.session.id),
        }
        assert (await auth.logout_all(ada, keep=names[keep])).sessions == 1
        await assert_over(auth, ended)
        await assert_live(auth, kept)

    async def test_keep_what_is_no_session(self, auth: AuthService[User], ada: User) -> None:
        """An invalid keep= is a ValueError and ends nothing."""
        result = await log_in(auth)
        mistakes: list[Any] = ["", "x", 7, b"x", True, result]
        for keep in mistakes:
            with pytest.raises(ValueError, match="keep="):
                await auth.logout_all(ada, keep=keep)
            with pytest.raises(ValueError, match="keep="):
                await auth.set_password(ada, NEW_PASSWORD, keep=keep)
        await assert_live(auth, result)
        await log_in(auth)

    async def test_keep_of_another_user(
        self, auth: AuthService[User], ada: User, bob: User
    ) -> None:
        """Keeping the session of another user keeps none of one's own, and does not change it."""
        mine, other = await log_in(auth), await auth.login("bob@example.com", PASSWORD)
        assert (await auth.logout_all(ada, keep=other.session)).sessions == 1
        await assert_over(auth, mine)
        await assert_live(auth, other)

    async def test_nothing_to_end(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """Without a live session nothing ends and nothing is emitted."""
        await log_in(auth)
        clock.advance(timedelta(days=30))
        events.clear()
        assert await auth.logout_all(ada) == Revocation(0, str(ada.pk))
        assert events.names == []


class TestSessionList:
    async def test_live_sessions_used_last_first(
        self, auth: AuthService[User], ada: User, bob: User, clock: FakeClock
    ) -> None:
        """The list holds the live sessions of this account alone, the last used first."""
        first, second, third = [await log_in(auth) for _ in range(3)]
        await auth.login("bob@example.com", PASSWORD)
        await auth.logout(third.access_token)
        clock.advance(timedelta(days=1))
        await auth.refresh(first.refresh_token)
        listed = await auth.sessions(ada)
        assert [session.id for session in listed] == [first.session.id, second.session.id]
        clock.advance(timedelta(days=6))
        assert [session.id for session in await auth.sessions(ada)] == [first.session.id]
        clock.advance(timedelta(days=1))
        assert await auth.sessions(ada) == []

    async def test_of_a_closed_account(self, auth: AuthService[User], ada: User) -> None:
        """A closed or deleted account has no sessions."""
        await log_in(auth)
        await User.filter(pk=ada.pk).update(is_active=False)
        assert await auth.sessions(ada) == []
        await ada.delete()
        assert await auth.sessions(ada) == []


class TestRevokeSession:
    @pytest.mark.parametrize("spelling", ["uuid", "str"])
    async def test_ends_one(
        self, auth: AuthService[User], ada: User, events: Captured, spelling: str
    ) -> None:
        """One session ends once, with one event."""
        result, other = await log_in(auth), await log_in(auth)
        name = result.session.id if spelling == "uuid" else str(result.session.id)
        assert await auth.revoke_session(name, user=ada) == Revocation(1, str(ada.pk))
        assert await auth.revoke_session(name, user=ada) == Revocation(0, str(ada.pk))
        await assert_over(auth, result)
        await assert_live(auth, other)
        event = events.one(SessionRevoked)
        assert (event.user, event.session_id) == (ada, str(result.session.id))

    async def test_of_another_user(
        self, auth: AuthService[User], ada: User, bob: User, events: Captured
    ) -> None:
        """A user cannot end the session of another user by its id."""
        result = await log_in(auth)
        events.clear()
        assert await auth.revoke_session(result.session.id, user=bob) == Revocation(0, None)
        assert events.names == []
        await assert_live(auth, result)

    async def test_by_the_session_itself(self, auth: AuthService[User], ada: User) -> None:
        """The session itself may be passed instead of its id."""
        result = await log_in(auth)
        assert (await auth.revoke_session(result.session)).sessions == 1
        await assert_over(auth, result)

    async def test_what_is_no_id(self, db: TortoiseContext, auth: AuthService[User]) -> None:
        """A value that is no id ends nothing and costs no statement."""
        mistakes: list[Any] = [None, 7, True, "", "x", b"x", "{0}", "0" * 32, "\0", "\ud800"]
        with statements(db) as seen:
            for name in mistakes:
                assert await auth.revoke_session(name) == Revocation(0, None)
        assert seen == []

    async def test_unknown_id(self, auth: AuthService[User], ada: User) -> None:
        """An id that no session has ends nothing."""
        assert await auth.revoke_session(uuid4()) == Revocation(0, None)


class TestPages:
    """The list of sessions, a page at a time."""

    @pytest.fixture
    async def opened(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> list[AuthResult[User]]:
        """Seven sessions, the newest first, of which three were opened at the same moment."""
        opened = []
        for minutes in (1, 1, 1, 0, 0, 1, 1):
            clock.advance(timedelta(minutes=minutes))
            opened.append(await log_in(auth))
        opened.sort(key=lambda each: (each.session.last_used_at, each.session.id), reverse=True)
        return opened

    async def test_pages(
        self, auth: AuthService[User], ada: User, opened: list[AuthResult[User]]
    ) -> None:
        """Page after page lists every live session once, the one used last first."""
        await auth.logout(opened[5].access_token)
        listed: list[Session] = []
        while page := await auth.sessions(ada, limit=2, before=listed[-1] if listed else None):
            assert len(page) <= 2
            listed += page
        expected = [each.session.id for each in opened if each is not opened[5]]
        assert [each.id for each in listed] == expected

    async def test_a_hundred_by_default(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """Without a limit a page has at most a hundred sessions, whatever an account has."""
        first = (await log_in(auth)).session
        copies = [first.clone(pk=uuid4()) for _ in range(120)]
        for number, each in enumerate(copies):
            each.family_hash = str(number)
        await Session.bulk_create(copies)
        page = await auth.sessions(ada)
        assert len(page) == 100
        assert len(await auth.sessions(ada, before=page[-1])) == 21

    @pytest.mark.parametrize("limit", [0, -1, 1.5, "10", None])
    async def test_limit(self, auth: AuthService[User], ada: User, limit: Any) -> None:
        """A limit that is no positive number of sessions is refused."""
        with pytest.raises(ValueError, match="limit"):
            await auth.sessions(ada, limit=limit)

    async def test_before(self, auth: AuthService[User], ada: User, clock: FakeClock) -> None:
        """What is no session is refused as ``before``."""
        for before in (clock(), uuid4(), "x"):
            with pytest.raises(TypeError, match="Session"):
                await auth.sessions(ada, before=before)  # type: ignore[arg-type]


class TestPurge:
    async def test_deletes_what_is_over(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """Rows are deleted when the lifetime of the session is over, not earlier, and without an event."""
        first = await log_in(auth)
        clock.advance(timedelta(days=1))
        second = await log_in(auth)
        events.clear()
        clock.now = first.session.expires_at - timedelta(microseconds=1)
        assert await auth.purge_expired() == 0
        clock.now = first.session.expires_at
        assert await auth.purge_expired() == 1
        assert await auth.purge_expired() == 0
        assert [session.id for session in await Session.all()] == [second.session.id]
        assert events.names == []

    async def test_of_another_model(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """Whatever table a session's user has, its row goes when its lifetime is over."""
        await log_in(auth)
        await Session.all().update(user_table="app_of_last_year")
        clock.advance(timedelta(days=30))
        assert await auth.purge_expired() == 1

    async def test_keeps_what_detects_reuse(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A spent token is recognised as long as its session could live, even after logout."""
        live = await log_in(auth)
        newest = await auth.refresh(live.refresh_token)
        ended = await log_in(auth)
        await auth.refresh(ended.refresh_token)
        await auth.logout(ended.access_token)
        idle = await log_in(auth)
        clock.advance(timedelta(days=6))
        newest = await auth.refresh(newest.refresh_token)
        clock.advance(timedelta(days=6))
        events.clear()
        assert await auth.purge_expired() == 0
        for spent in (live, ended):
            with pytest.raises(TokenReusedError if spent is live else TokenExpiredError):
                await auth.refresh(spent.refresh_token)
        with pytest.raises(TokenExpiredError):
            await auth.refresh(idle.refresh_token)
        with pytest.raises(TokenRevokedError):
            await auth.refresh(newest.refresh_token)
        assert events.names == ["refresh_token_reused"]

    async def test_in_batches(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """However many rows there are, each DELETE removes a bounded number, and none is left."""
        monkeypatch.setattr("tortoise_auth.sessions.store.BATCH_SIZE", 2)
        for _ in range(5):
            await log_in(auth)
        clock.advance(timedelta(days=30))
        alive = await log_in(auth)
        with statements(db) as seen:
            assert await auth.purge_expired() == 5
        deletions = [
            text for text in seen if re.match('DELETE FROM ["`]tortoise_auth_session', text)
        ]
        assert len(deletions) == 3
        assert [session.id for session in await Session.all()] == [alive.session.id]


class Palette(Enum):
    """A value that a host stores in a column."""

    DARK = "dark"
    LIGHT = "light"


class RenamedUser(AbstractUser):
    """A user whose columns have every type, and other names than its attributes."""

    key: UUID = fields.UUIDField(primary_key=True, source_field="user_key")
    email = EmailField(unique=True, source_field="mail")
    palette = fields.CharEnumField(Palette, default=Palette.LIGHT, source_field="colours")
    balance = fields.DecimalField(max_digits=12, decimal_places=2, default=Decimal(0))
    profile: dict[str, Any] = fields.JSONField(default=dict)
    born: date | None = fields.DateField(null=True)
    order = fields.IntField(default=0, source_field="group")

    class Meta(AbstractUser.Meta):
        table = "select"
        abstract = False


class VisibleUsers(Manager):
    """Hides the accounts that a host has archived."""

    def get_queryset(self) -> QuerySet[Any]:
        """Return all but the hidden accounts."""
        return super().get_queryset().filter(hidden=False)


class HiddenUser(AbstractUser):
    hidden = fields.BooleanField(default=False)

    class Meta(AbstractUser.Meta):
        table = "app_hidden_user"
        abstract = False
        manager = VisibleUsers()


@pytest.fixture(params=DATABASES)
async def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Every database, with the models of this module."""
    async with database(request.param, tmp_path, modules=[*MODULES, __name__]) as context:
        yield context


class TestJoinedRead:
    """`authenticate` reads session and user in one statement, without the query builder of the ORM."""

    async def test_every_kind_of_column(self, hosts: TortoiseContext, clock: FakeClock) -> None:
        """The user is the same, column by column, as the one that the ORM reads."""
        auth = AuthService(RenamedUser, AuthConfig(secret=SECRET), clock=clock)
        user = await RenamedUser.create_user(
            email=EMAIL,
            password=PASSWORD,
            palette=Palette.DARK,
            balance=Decimal("12.30"),
            profile={"langs": ["en", "fr"], "quote": "\"'?$1"},
            born=date(1815, 12, 10),
            order=3,
        )
        result = await auth.login(EMAIL, PASSWORD)
        with statements(hosts) as seen:
            user = await auth.authenticate(result.access_token)
        assert len(seen) == 1
        expected = columns(await RenamedUser.get(pk=user.pk))
        assert columns(user) == expected
        assert {name: type(value) for name, value in columns(user).items()} == {
            name: type(value) for name, value in expected.items()
        }

    async def test_is_an_ordinary_instance(self, hosts: TortoiseContext, clock: FakeClock) -> None:
        """The user can be changed, saved and deleted like any other."""
        auth = AuthService(RenamedUser, AuthConfig(secret=SECRET), clock=clock)
        await RenamedUser.create_user(email=EMAIL, password=PASSWORD)
        result = await auth.login(EMAIL, PASSWORD)
        user = await auth.authenticate(result.access_token)
        user.order = 7
        await user.save()
        assert (await auth.authenticate(result.access_token)).order == 7
        await user.delete()
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(result.access_token)

    async def test_manager_of_the_host(self, hosts: TortoiseContext, clock: FakeClock) -> None:
        """A manager that hides rows hides them from the joined read, too."""
        auth = AuthService(HiddenUser, AuthConfig(secret=SECRET), clock=clock)
        user = await HiddenUser.create_user(email=EMAIL, password=PASSWORD)
        result = await auth.login(EMAIL, PASSWORD)
        with statements(hosts) as seen:
            assert await auth.authenticate(result.access_token) == user
        assert len(seen) == 2
        user.hidden = True
        await user.save()
        await assert_over(auth, result)
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, PASSWORD)

    @pytest.mark.parametrize("model", [User, Session])
    @pytest.mark.parametrize("way", ["missing", "other-signature", "other-keys", "partial"])
    async def test_falls_back(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        model: type[Model],
        way: str,
    ) -> None:
        """Where Tortoise builds models in an unknown way, two reads return the same."""
        result = await log_in(auth)
        expected = columns(await auth.authenticate(result.access_token))
        service = AuthService(User, auth.config, clock=auth._core.clock)
        break_once(monkeypatch, model, way)
        with statements(db) as seen:
            assert columns(await service.authenticate(result.access_token)) == expected
        assert len(seen) == 3
        with statements(db) as seen:
            assert columns(await service.authenticate(result.access_token)) == expected
        assert len(seen) == 2

        (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
        assert warning.name == "tortoise_auth.sessions"
        assert "two queries" in warning.getMessage()
        assert result.access_token not in caplog.text
        await auth.logout(result.access_token)
        with pytest.raises(TokenRevokedError):
            await service.authenticate(result.access_token)

    async def test_falls_back_to_the_same_answers(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """Two reads refuse what the joined read refuses."""
        service = AuthService(User, auth.config, clock=clock)
        service._core.sessions._reader._may_join = False
        other = await User.create_user(email="bob@example.com", password=PASSWORD)
        result = await log_in(auth)
        assert await service.authenticate(result.access_token) == ada
        for subject, session in [
            (str(other.pk), str(result.session.id)),
            (str(ada.pk), str(uuid4())),
            ("7", str(result.session.id)),
        ]:
            with pytest.raises(TokenRevokedError):
                await service.authenticate(signed(auth, clock, subject, session))
        await User.filter(pk=ada.pk).update(is_active=False)
        with pytest.raises(TokenRevokedError):
            await service.authenticate(result.access_token)
        await ada.delete()
        with pytest.raises(TokenRevokedError):
            await service.authenticate(result.access_token)


def break_once(monkeypatch: pytest.MonkeyPatch, model: type[Any], way: str) -> None:
    """Let the hook that builds *model* from a row fail once."""
    original = model._init_from_db

    def broken(**values: object) -> object:
        monkeypatch.setattr(model, "_init_from_db", original)
        if way == "missing":
            raise AttributeError("_init_from_db")
        if way == "other-signature":
            raise TypeError("_init_from_db() takes 2 positional arguments")
        if way == "other-keys":
            raise KeyError("id")
        return original(**dict(list(values.items())[:3]))

    monkeypatch.setattr(model, "_init_from_db", broken)


def other_than(character: str) -> str:
    return "B" if character != "B" else "C"


async def test_login_while_all_are_ended(
    db: TortoiseContext,
    auth: AuthService[User],
    ada: User,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session that is opened between the statements that end all is ended, too, and counted."""
    await log_in(auth)
    update, meanwhile = QuerySet.update, [lambda: log_in(auth)]

    def update_and_log_in(query: QuerySet[Session], **values: Any) -> Any:
        updating = update(query, **values)

        async def run() -> int:
            changed = await updating
            if meanwhile:
                await meanwhile.pop()()
            return int(changed)

        return run()

    monkeypatch.setattr(QuerySet, "update", update_and_log_in)
    ended = await Session.end_all(
        user_table="app_user", user_id=str(ada.pk), at=clock(), using_db=connection_of(db)
    )
    assert ended == await Session.filter(revoked_at__isnull=False).count() == 2
