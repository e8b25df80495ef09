"""``max_sessions``: a login that would be one too many ends the session used least recently."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from tortoise.context import TortoiseContext
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, PASSWORD, SECRET, assert_live, assert_over, log_in
from tests.support.app import NamedUser, User
from tests.support.database import connection_of
from tests.support.statements import statements
from tortoise_auth import AuthConfig, AuthResult, AuthService, EventEmitter, RequestContext
from tortoise_auth.events import SessionEvicted, UserLogout
from tortoise_auth.exceptions import ConfigurationError, EventError
from tortoise_auth.models import Session
from tortoise_auth.sessions import Sessions
from tortoise_auth.testing import Captured, FakeClock

CONTEXT = RequestContext(ip="203.0.113.7", user_agent="Firefox")
CALLERS = 20


def at_most(number: int | None, clock: FakeClock) -> AuthService[User]:
    """Return a service whose accounts have at most so many sessions; passwords are not counted."""
    config = AuthConfig(secret=SECRET, max_sessions=number)
    return AuthService(User, config, throttle=None, clock=clock)


async def logins(auth: AuthService[User], clock: FakeClock, number: int) -> list[AuthResult[User]]:
    """Log in so often, a minute after one another."""
    results = []
    for _ in range(number):
        results.append(await log_in(auth))
        clock.advance(timedelta(minutes=1))
    return results


def ids(*results: AuthResult[User]) -> list[str]:
    """Return the public ids of sessions."""
    return [str(result.session.id) for result in results]


class TestOneTooMany:
    async def test_ends_the_one_used_least_recently(
        self, ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A session that was refreshed stays; the event names the session that ended, and the login."""
        auth = at_most(3, clock)
        first, second, third = await logins(auth, clock, 3)
        first = await auth.refresh(first.refresh_token)
        events.clear()
        fourth = await auth.login(EMAIL, PASSWORD, context=CONTEXT)
        await assert_over(auth, second)
        for result in (first, third, fourth):
            await assert_live(auth, result)
        event = events.one(SessionEvicted)
        assert (event.user, event.subject_id) == (ada, str(ada.pk))
        assert event.session_id == str(second.session.id)
        assert (event.actor, event.context) == ("system", CONTEXT)
        assert events.names[:2] == ["session_evicted", "user_login"]

    @pytest.mark.parametrize("number", [1, 2])
    async def test_each_login_ends_one(
        self, ada: User, clock: FakeClock, events: Captured, number: int
    ) -> None:
        """As many sessions as configured are there after any number of logins: the newest."""
        auth = at_most(number, clock)
        results = await logins(auth, clock, 5)
        assert [each.id for each in await auth.sessions(ada)] == [
            result.session.id for result in reversed(results[-number:])
        ]
        evicted = [event.session_id for event in events.of(SessionEvicted)]
        assert evicted == ids(*results[:-number])

    async def test_number_was_lowered(self, ada: User, clock: FakeClock, events: Captured) -> None:
        """All that are too many end at the next login, each with its event."""
        results = await logins(at_most(None, clock), clock, 5)
        newest = await log_in(at_most(2, clock))
        live = await at_most(None, clock).sessions(ada)
        assert [each.id for each in live] == [newest.session.id, results[-1].session.id]
        evicted = {event.session_id for event in events.of(SessionEvicted)}
        assert evicted == set(ids(*results[:-1]))

    async def test_any_number_by_default(
        self, db: TortoiseContext, ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """Without a number none ends, and a login costs no statement more."""
        results = await logins(at_most(None, clock), clock, 5)
        assert len(await at_most(None, clock).sessions(ada)) == len(results)
        with statements(db) as unbounded:
            await log_in(at_most(None, clock))
        with statements(db) as bounded:
            await log_in(at_most(10, clock))
        assert len(unbounded) < len(bounded)
        assert not any("OFFSET" in each for each in unbounded)
        assert events.of(SessionEvicted) == []


class TestMeanwhile:
    async def test_ended_by_another_call(
        self, ada: User, clock: FakeClock, events: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A session that ended between the look and its eviction has no second event."""
        auth = at_most(1, clock)
        await log_in(auth)
        revoke = Sessions.revoke

        async def revoke_after_another(self: Any, *arguments: Any) -> bool:
            await revoke(self, *arguments)
            return await revoke(self, *arguments)

        monkeypatch.setattr(Sessions, "revoke", revoke_after_another)
        newest = await log_in(auth)
        assert events.of(SessionEvicted) == []
        assert [each.id for each in await auth.sessions(ada)] == [newest.session.id]


class TestNotCounted:
    async def test_sessions_that_are_over(
        self, ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A session that was ended, lay idle or has the version of an old password takes no place."""
        auth = at_most(1, clock)
        idle = await log_in(auth)
        clock.advance(auth.config.refresh_token_lifetime)
        ended = await log_in(auth)
        await auth.logout(ended.access_token)
        await log_in(auth)
        await User.filter(pk=ada.pk).update(session_version=ada.session_version + 1)
        await assert_live(auth, await log_in(auth))
        assert events.of(SessionEvicted) == []
        assert (await Session.get(id=idle.session.id)).revoked_at is None

    async def test_sessions_of_others(self, ada: User, clock: FakeClock, events: Captured) -> None:
        """Neither another account nor one of another model with the same key loses a session."""
        auth = at_most(1, clock)
        named = AuthService(NamedUser, auth.config, throttle=None, clock=clock)
        namesake = await NamedUser.create_user(
            id=ada.pk, email=EMAIL, username="ada", password=PASSWORD
        )
        await User.create_user(email="bob@example.com", password=PASSWORD)
        assert namesake.pk == ada.pk
        other = await named.login("ada", PASSWORD)
        bob = await auth.login("bob@example.com", PASSWORD)
        await log_in(auth)
        assert events.of(SessionEvicted) == []
        await assert_live(named, other)
        await assert_live(auth, bob)


class TestRolledBack:
    async def test_by_a_handler(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, events: Captured
    ) -> None:
        """A handler in the transaction that refuses the event refuses the login: nothing ends."""
        auth = at_most(1, clock)
        result = await log_in(auth)
        events.clear()

        @emitter.on("session_evicted", delivery="transaction")
        async def refuse() -> None:
            raise RuntimeError("no")

        with pytest.raises(EventError):
            await log_in(auth)
        assert events.names == []
        assert await Session.all().count() == 1
        await assert_live(auth, result)

    async def test_by_the_caller(
        self, db: TortoiseContext, ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """With the caller's transaction the session comes back, and its end is not emitted."""
        auth = at_most(1, clock)
        result = await log_in(auth)
        events.clear()
        with pytest.raises(ZeroDivisionError):
            async with in_transaction(connection_of(db).connection_name):
                await log_in(auth)
                raise ZeroDivisionError
        assert events.names == []
        await assert_live(auth, result)


class TestAtOnce:
    async def test_many_logins(
        self, server: TortoiseContext, clock: FakeClock, events: Captured
    ) -> None:
        """Of twenty logins at the same moment three sessions are left, and each end has its event."""
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        auth = at_most(3, clock)
        results = await asyncio.gather(*(log_in(auth) for _ in range(CALLERS)))
        live = {str(each.id) for each in await auth.sessions(ada)}
        assert len(live) == 3
        evicted = [event.session_id for event in events.of(SessionEvicted)]
        assert len(evicted) == CALLERS - 3
        assert set(evicted) == set(ids(*results)) - live

    async def test_and_other_ends(
        self, server: TortoiseContext, clock: FakeClock, events: Captured
    ) -> None:
        """Logins and logouts at the same moment fail none another, and no end is emitted twice."""
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        auth = at_most(3, clock)
        old = [await log_in(auth) for _ in range(3)]
        await asyncio.gather(
            *(log_in(auth) for _ in range(CALLERS)),
            *(auth.logout(each.access_token) for each in old[:2]),
            *(auth.logout_all(ada) for _ in range(3)),
        )
        assert len(await auth.sessions(ada)) <= 3
        assert await Session.all().count() == len(old) + CALLERS
        ended = [event.session_id for event in events.of(SessionEvicted)]
        ended += [event.session_id or "" for event in events.of(UserLogout) if not event.everywhere]
        assert len(ended) == len(set(ended))
        over = Session.filter(revoked_at__not_isnull=True)
        assert set(ended) <= {str(each) for each in await over.values_list("id", flat=True)}


class TestSetting:
    @pytest.mark.parametrize("number", [0, -1, True, 1.0, "3", [], object()])
    def test_no_number(self, number: Any) -> None:
        """Anything but a whole number of at least one is refused at construction."""
        with pytest.raises(ConfigurationError, match=r"AuthConfig.max_sessions must be a whole"):
            AuthConfig(secret=SECRET, max_sessions=number)
