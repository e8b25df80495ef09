"""Two calls at the same time, on each server, each order of their commits forced.

SQLite runs one transaction after the other and would hide every race.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeAlias

import pytest
from passlib.hash import pbkdf2_sha256
from tortoise.backends.base.client import TransactionalDBClient
from tortoise.context import TortoiseContext, require_context

from tests.support.accounts import (
    EMAIL,
    NEW_PASSWORD,
    PASSWORD,
    SECRET,
    assert_live,
    assert_over,
    counting_from_zero,
    log_in,
)
from tests.support.app import User
from tests.support.database import ONE_BY_EACH_DIALECT, root, transaction_class
from tests.support.servers import Second, second
from tortoise_auth import (
    AuthConfig,
    AuthenticationError,
    AuthResult,
    AuthService,
    EventEmitter,
    PasswordHasher,
    RequestContext,
    Revocation,
    TortoiseAuthError,
)
from tortoise_auth.events import (
    AccountLocked,
    AccountUnlocked,
    PasswordChanged,
    RefreshTokenReused,
    SessionRefreshed,
    SessionRevoked,
    UserDeactivated,
    UserLogin,
    UserLoginFailed,
    UserLogout,
)
from tortoise_auth.exceptions import (
    EventError,
    IdentifierTakenError,
    TokenReusedError,
    TokenRevokedError,
)
from tortoise_auth.models import AttemptCount
from tortoise_auth.sessions import Sessions
from tortoise_auth.testing import Captured, FakeClock, capture
from tortoise_auth.throttling import DatabaseThrottle

OTHER_PASSWORD = "another donkey charger"
CALLERS = 20
LIMIT = 20
"""Seconds after which a race that has not ended fails."""

Call: TypeAlias = Callable[[], Awaitable[object]]

holds_its_commit: ContextVar[bool] = ContextVar("holds_its_commit", default=False)


@pytest.fixture(autouse=True)
def events(emitter: EventEmitter) -> Iterator[Captured]:
    with capture(emitter) as captured:
        yield captured


@pytest.fixture
async def ada(server: TortoiseContext) -> User:
    return await counting_from_zero(await User.create_user(email=EMAIL, password=PASSWORD))


@pytest.fixture
async def session(auth: AuthService[User], ada: User) -> AuthResult[User]:
    return await log_in(auth)


@pytest.fixture
async def fresh(server: TortoiseContext) -> AsyncIterator[Second]:
    async with second(server) as connection:
        yield connection


async def assert_events_equal_changes(fresh: Second, events: Captured) -> None:
    """Check that the events match the changes in the tables."""
    ended = len(events.of(SessionRevoked)) + len(events.of(RefreshTokenReused))
    ended += sum(event.sessions_ended for event in events.of(UserLogout))
    ended += sum(event.sessions_ended for event in events.of(PasswordChanged))
    ended += sum(event.sessions_ended for event in events.of(UserDeactivated))
    raised = len(events.of(PasswordChanged)) + len(events.of(UserDeactivated))
    table = "FROM tortoise_auth_session"
    assert await fresh.value(f"SELECT count(*) {table}") == len(events.of(UserLogin))
    assert await fresh.value(f"SELECT count(revoked_at) {table}") == ended
    assert await fresh.value(f"SELECT coalesce(sum(generation), 0) {table}") == len(
        events.of(SessionRefreshed)
    )
    assert await fresh.value("SELECT max(session_version) FROM app_user") == raised


async def outcome(call: Call) -> object:
    """Return what *call* returns or raises."""
    try:
        return await call()
    except TortoiseAuthError as error:
        return error


async def overlap(
    monkeypatch: pytest.MonkeyPatch, fresh: Second, first: Call, last: Call
) -> tuple[Any, Any]:
    """Let *last* read before *first* writes, and commit after it.

    *first* writes and stops in front of its COMMIT. *last* starts, reads the old state, and comes
    to wait for a row that *first* has locked. Then *first* commits.
    """
    loop = asyncio.get_running_loop()
    written, go = asyncio.Event(), asyncio.Event()
    wrapper = transaction_class(root(require_context()))
    commit = wrapper.commit

    async def commit_when_released(self: TransactionalDBClient) -> None:
        if holds_its_commit.get() and not written.is_set():
            written.set()
            await go.wait()
        await commit(self)

    async def run_first() -> object:
        holds_its_commit.set(True)
        return await outcome(first)

    monkeypatch.setattr(wrapper, "commit", commit_when_released)
    try:
        async with asyncio.timeout(LIMIT):
            one = loop.create_task(run_first())
            await written.wait()
            two = loop.create_task(outcome(last))
            await fresh.until_waiting()
            go.set()
            return await one, await two
    finally:
        go.set()  # else the pool waits for the connection of *first* for ever


ENDERS = ["logout_access", "logout_refresh", "logout_all", "set_password", "deactivate", "revoke"]


def ender_of(auth: AuthService[User], ada: User, session: AuthResult[User], name: str) -> Call:
    """Return a call that ends *session*."""
    enders: dict[str, Call] = {
        "logout_access": lambda: auth.logout(session.access_token),
        "logout_refresh": lambda: auth.logout(session.refresh_token),
        "logout_all": lambda: auth.logout_all(ada),
        "set_password": lambda: auth.set_password(ada, NEW_PASSWORD),
        "deactivate": lambda: auth.deactivate(ada),
        "revoke": lambda: auth.revoke_session(session.session.id),
    }
    return enders[name]


class TestRefreshAndEnd:
    @pytest.mark.parametrize("ender", ENDERS)
    async def test_refresh_commits_first(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        events: Captured,
        ender: str,
    ) -> None:
        """The tokens of an earlier refresh are revoked when the call that ends the session returns."""
        refreshed, ended = await overlap(
            monkeypatch,
            fresh,
            lambda: auth.refresh(session.refresh_token),
            ender_of(auth, ada, session, ender),
        )
        assert isinstance(refreshed, AuthResult)
        assert not isinstance(ended, Exception)
        assert await fresh.live_sessions() == 0
        await assert_events_equal_changes(fresh, events)
        await assert_over(auth, refreshed)

    @pytest.mark.parametrize("ender", ENDERS)
    async def test_end_commits_first(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        events: Captured,
        ender: str,
    ) -> None:
        """A refresh that read a live session gets no tokens, and no event of reuse is emitted."""
        ended, refused = await overlap(
            monkeypatch,
            fresh,
            ender_of(auth, ada, session, ender),
            lambda: auth.refresh(session.refresh_token),
        )
        assert not isinstance(ended, Exception)
        assert type(refused) is TokenRevokedError
        assert await fresh.live_sessions() == 0
        assert "refresh_token_reused" not in events.names
        await assert_events_equal_changes(fresh, events)

    @pytest.mark.parametrize("order", ["refresh", "set_password"])
    async def test_kept_session_goes_on(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        events: Captured,
        order: str,
    ) -> None:
        """A session that a password change keeps survives a refresh at the same time."""
        calls: dict[str, Call] = {
            "refresh": lambda: auth.refresh(session.refresh_token),
            "set_password": lambda: auth.set_password(ada, NEW_PASSWORD, keep=session.session),
        }
        first = calls.pop(order)
        outcomes = await overlap(monkeypatch, fresh, first, *calls.values())
        (refreshed,) = [result for result in outcomes if result is not None]
        await assert_live(auth, refreshed)
        assert await fresh.live_sessions() == 1
        await assert_events_equal_changes(fresh, events)


class TestManyRefreshes:
    async def test_one_wins(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        session: AuthResult[User],
        events: Captured,
    ) -> None:
        """Of twenty refreshes that read an unspent token one gets tokens, and one event of reuse is emitted."""
        other = await log_in(auth)
        meet(monkeypatch, Sessions, "find_by_refresh_token", CALLERS)
        async with asyncio.timeout(LIMIT):
            outcomes = await asyncio.gather(
                *(outcome(lambda: auth.refresh(session.refresh_token)) for _ in range(CALLERS))
            )
        (won,) = [result for result in outcomes if isinstance(result, AuthResult)]
        refused = [result for result in outcomes if result is not won]
        assert {type(error) for error in refused} == {TokenReusedError}
        assert len(refused) == CALLERS - 1
        assert events.names.count("refresh_token_reused") == 1
        assert events.names.count("session_refreshed") == 1
        await assert_events_equal_changes(fresh, events)
        assert await fresh.live_sessions() == 1
        await assert_over(auth, won)
        await assert_live(auth, other)

    async def test_all_of_two_within_the_grace(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        ada: User,
        clock: FakeClock,
        events: Captured,
    ) -> None:
        """Within the grace two refreshes get the same token, and one event is emitted."""
        config = AuthConfig(secret=SECRET, refresh_reuse_grace=timedelta(seconds=10))
        auth = AuthService(User, config, clock=clock)
        session = await log_in(auth)
        first, second = await overlap(
            monkeypatch,
            fresh,
            lambda: auth.refresh(session.refresh_token),
            lambda: auth.refresh(session.refresh_token),
        )
        for result in (first, second):
            assert await auth.authenticate(result.access_token) == ada
        assert first.refresh_token == second.refresh_token
        await assert_live(auth, second)
        assert events.names.count("session_refreshed") == 1
        assert "refresh_token_reused" not in events.names
        await assert_events_equal_changes(fresh, events)

    async def test_replays_emit_one_event(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        session: AuthResult[User],
        events: Captured,
    ) -> None:
        """However many callers replay a spent token at once, the session ends once."""
        newest = await auth.refresh(session.refresh_token)
        meet(monkeypatch, Sessions, "find_by_refresh_token", CALLERS)
        async with asyncio.timeout(LIMIT):
            outcomes = await asyncio.gather(
                *(outcome(lambda: auth.refresh(session.refresh_token)) for _ in range(CALLERS))
            )
        assert {type(error) for error in outcomes} == {TokenReusedError}
        assert events.names.count("refresh_token_reused") == 1
        await assert_events_equal_changes(fresh, events)
        await assert_over(auth, newest)


class TestOneEnd:
    @pytest.mark.parametrize("server", ONE_BY_EACH_DIALECT, indirect=True)
    @pytest.mark.parametrize("last", ENDERS)
    @pytest.mark.parametrize("first", [*ENDERS, "reuse"])
    async def test_emits_one_event(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        events: Captured,
        first: str,
        last: str,
    ) -> None:
        """Of two calls that read a live session one ends it and emits the event, and the other does not."""
        newest = await auth.refresh(session.refresh_token)
        calls: dict[str, Call] = {
            name: ender_of(auth, ada, newest, name) for name in {first, last} - {"reuse"}
        }
        calls["reuse"] = lambda: auth.refresh(session.refresh_token)
        one, two = await overlap(monkeypatch, fresh, calls[first], calls[last])
        if isinstance(one, Revocation):
            assert one.sessions == 1
        else:
            assert one is None or type(one) is TokenReusedError
        if isinstance(two, Revocation):
            assert two.sessions == 0
        await assert_events_equal_changes(fresh, events)
        await assert_over(auth, newest)


class TestLoginAndEnd:
    @pytest.mark.parametrize("ender", ["set_password", "deactivate"])
    async def test_login_commits_first(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        events: Captured,
        ender: str,
    ) -> None:
        """A session that is opened meanwhile ends with the others."""
        other = await User.get(pk=ada.pk)
        result, ended = await overlap(
            monkeypatch, fresh, lambda: log_in(auth), ender_of(auth, other, session, ender)
        )
        assert isinstance(result, AuthResult)
        assert not isinstance(ended, Exception)
        assert await fresh.live_sessions() == 0
        await assert_events_equal_changes(fresh, events)
        await assert_over(auth, result)

    @pytest.mark.parametrize("ender", ["set_password", "deactivate"])
    async def test_end_commits_first(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        events: Captured,
        ender: str,
    ) -> None:
        """A password that was right when it was read opens no session."""
        ended, refused = await overlap(
            monkeypatch, fresh, ender_of(auth, ada, session, ender), lambda: log_in(auth)
        )
        assert not isinstance(ended, Exception)
        assert type(refused) is AuthenticationError
        assert await fresh.live_sessions() == 0
        await assert_events_equal_changes(fresh, events)


class TestOneAddress:
    """People behind one address share a counter, and nothing else."""

    async def test_login_under_way_locks_no_shared_row(
        self, fresh: Second, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """While one login is about to commit, another from its address is neither held up nor refused."""
        await User.create_user(email="bob@example.com", password=PASSWORD)
        here = RequestContext(ip="203.0.113.7")
        within, go_on = asyncio.Event(), asyncio.Event()

        @emitter.on("user_login", delivery="transaction")
        async def pause(user: User) -> None:
            if user == ada:
                within.set()
                await go_on.wait()

        async with asyncio.timeout(LIMIT):
            first = asyncio.ensure_future(auth.login(EMAIL, PASSWORD, context=here))
            await within.wait()
            second = await auth.login("bob@example.com", PASSWORD, context=here)
            assert not first.done()
            go_on.set()
            assert {(await first).user.pk, second.user.pk} == {1, 2}

    async def test_count_of_the_address(
        self, fresh: Second, auth: AuthService[User], ada: User
    ) -> None:
        """After a login, and after one that a handler refused, nothing of it is counted."""
        here = RequestContext(ip="203.0.113.7")
        await auth.login(EMAIL, PASSWORD, context=here)
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, "a wrong donkey charger", context=here)
        await auth.login(EMAIL, PASSWORD, context=here)

        @auth.emitter.on("user_login", delivery="transaction")
        async def veto() -> None:
            raise RuntimeError

        with pytest.raises(EventError):
            await auth.login(EMAIL, PASSWORD, context=here)
        await auth.emitter.aclose(LIMIT)
        counted = {each.key.partition(":")[0]: each for each in await AttemptCount.all()}
        assert (counted["source"].count, counted["source"].in_flight) == (1, 0)
        assert (counted["account"].count, counted["account"].in_flight) == (0, 0)


class TestLock:
    """The last allowed failure, and calls for the account at the same moment."""

    WRONG = "a wrong donkey charger"

    @pytest.fixture
    def auth(self, emitter: EventEmitter, clock: FakeClock) -> AuthService[User]:
        """A service whose second failure in a row locks."""
        throttle = DatabaseThrottle(max_failures=2, clock=clock)
        return AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)

    @pytest.fixture
    def last(self, auth: AuthService[User]) -> Call:
        """Make the last allowed failure."""
        return lambda: auth.login(EMAIL, self.WRONG)

    async def login_and_failure(
        self,
        monkeypatch: pytest.MonkeyPatch,
        hasher: PasswordHasher,
        fresh: Second,
        calls: tuple[Call, Call],
        *,
        first_to_commit: int,
    ) -> tuple[Any, Any]:
        """Let both be counted in this order, before either password is checked; then `overlap`."""
        verify, counted = hasher.verify, [asyncio.Event(), asyncio.Event()]
        go_on = asyncio.Event()

        async def slowly(*args: Any) -> Any:
            is_first_to_commit = holds_its_commit.get()
            counted[first_to_commit if is_first_to_commit else 1 - first_to_commit].set()
            await (counted[1].wait() if is_first_to_commit else go_on.wait())
            return await verify(*args)

        async def in_order(number: int) -> object:
            if number == 1:
                await counted[0].wait()
            return await calls[number]()

        async def end_of_other() -> object:
            go_on.set()
            return await other

        monkeypatch.setattr(hasher, "verify", slowly)
        other = asyncio.ensure_future(outcome(lambda: in_order(1 - first_to_commit)))
        return await overlap(monkeypatch, fresh, lambda: in_order(first_to_commit), end_of_other)

    async def assert_locked(self, ada: User, *, locked: bool) -> None:
        """Check the lock in the row of the account."""
        assert ((await User.get(pk=ada.pk)).password_locked_at is not None) is locked

    async def test_login_commits_first(
        self,
        monkeypatch: pytest.MonkeyPatch,
        hasher: PasswordHasher,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        last: Call,
        events: Captured,
    ) -> None:
        """A login that commits first resets the failures, and nothing is locked."""
        calls = (lambda: log_in(auth), last)
        result, failed = await self.login_and_failure(
            monkeypatch, hasher, fresh, calls, first_to_commit=0
        )
        assert isinstance(result, AuthResult)
        assert type(failed) is AuthenticationError
        await self.assert_locked(ada, locked=False)
        assert events.of(AccountLocked) == []

    async def test_lock_commits_first(
        self,
        monkeypatch: pytest.MonkeyPatch,
        hasher: PasswordHasher,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        last: Call,
        events: Captured,
    ) -> None:
        """A password that was right before the lock opens no session."""
        calls = (lambda: log_in(auth), last)
        failed, refused = await self.login_and_failure(
            monkeypatch, hasher, fresh, calls, first_to_commit=1
        )
        assert type(failed) is type(refused) is AuthenticationError
        await self.assert_locked(ada, locked=True)
        assert [each.reason for each in events.of(UserLoginFailed)] == ["bad_password", "locked"]
        assert len(events.of(AccountLocked)) == 1

    async def test_two_locks(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        last: Call,
        events: Captured,
    ) -> None:
        """Of two attempts that reach the limit one locks the account."""
        await outcome(last)
        one, two = await overlap(monkeypatch, fresh, last, last)
        assert type(one) is type(two) is AuthenticationError
        assert len(events.of(AccountLocked)) == 1
        await self.assert_locked(ada, locked=True)

    async def test_new_password_after_the_lock(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        last: Call,
        events: Captured,
    ) -> None:
        """A new password waits for the lock, and unlocks the account."""
        await outcome(last)
        failed, _ = await overlap(
            monkeypatch, fresh, last, lambda: auth.set_password(ada, NEW_PASSWORD)
        )
        assert type(failed) is AuthenticationError
        assert len(events.of(AccountLocked)) == 1
        await self.assert_locked(ada, locked=False)
        assert await auth.login(EMAIL, NEW_PASSWORD)

    async def test_new_password_before_the_lock(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        last: Call,
        events: Captured,
    ) -> None:
        """Failures at the old password do not lock the new one."""
        await outcome(last)
        await overlap(monkeypatch, fresh, lambda: auth.set_password(ada, NEW_PASSWORD), last)
        assert events.of(AccountLocked) == []
        await self.assert_locked(ada, locked=False)

    async def test_two_unlocks(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        last: Call,
        events: Captured,
    ) -> None:
        """Of two unlocks one unlocks the account, and the other changes nothing."""
        for _ in range(2):
            await outcome(last)
        await overlap(monkeypatch, fresh, lambda: auth.unlock(ada), lambda: auth.unlock(ada))
        assert len(events.of(AccountUnlocked)) == 1
        await self.assert_locked(ada, locked=False)


class TestRehash:
    @pytest.fixture
    async def ada(self, ada: User) -> User:
        """An account whose hash has an older scheme."""
        ada.password = pbkdf2_sha256.using(rounds=10).hash(PASSWORD)
        await ada.save(update_fields=["password"])
        return ada

    @pytest.mark.parametrize("check", ["login", "check_password"])
    @pytest.mark.parametrize("order", ["rehash", "set_password"])
    async def test_never_replaces_a_new_password(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        events: Captured,
        check: str,
        order: str,
    ) -> None:
        """Whichever call commits first, the new password stays and the old one is refused."""
        other = await User.get(pk=ada.pk)
        checks: dict[str, Call] = {
            "login": lambda: log_in(auth),
            "check_password": lambda: other.check_password(PASSWORD),
        }
        calls: dict[str, Call] = {
            "rehash": checks[check],
            "set_password": lambda: auth.set_password(ada, NEW_PASSWORD),
        }
        first = calls.pop(order)
        await overlap(monkeypatch, fresh, first, *calls.values())

        stored = await User.get(pk=ada.pk)
        assert await stored.check_password(NEW_PASSWORD)
        assert not await stored.check_password(PASSWORD)
        assert ada.password == stored.password
        assert ("password_rehashed" in events.names) == (order == "rehash")
        assert await fresh.live_sessions() == 0
        await assert_events_equal_changes(fresh, events)

    async def test_happens_once(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        events: Captured,
    ) -> None:
        """Of two logins one replaces the hash, and both succeed."""
        results = await overlap(monkeypatch, fresh, lambda: log_in(auth), lambda: log_in(auth))
        for result in results:
            await assert_live(auth, result)
        assert events.names.count("password_rehashed") == 1
        assert await (await User.get(pk=ada.pk)).check_password(PASSWORD)
        await assert_events_equal_changes(fresh, events)


class TestPasswords:
    async def test_change_and_change(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        events: Captured,
    ) -> None:
        """Of two changes with the right current password one succeeds, and the other is refused."""
        other = await User.get(pk=ada.pk)
        before = other.password
        one, two = await overlap(
            monkeypatch,
            fresh,
            lambda: auth.change_password(ada, PASSWORD, NEW_PASSWORD),
            lambda: auth.change_password(other, PASSWORD, OTHER_PASSWORD),
        )
        assert one is None
        assert type(two) is AuthenticationError
        assert other.password == before
        assert await (await User.get(pk=ada.pk)).check_password(NEW_PASSWORD)
        assert events.names.count("password_changed") == 1
        await assert_events_equal_changes(fresh, events)

    async def test_set_and_change(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        events: Captured,
    ) -> None:
        """A reset is not undone by a change that checked the password before it."""
        other = await User.get(pk=ada.pk)
        one, two = await overlap(
            monkeypatch,
            fresh,
            lambda: auth.set_password(ada, NEW_PASSWORD),
            lambda: auth.change_password(other, PASSWORD, OTHER_PASSWORD),
        )
        assert one is None
        assert type(two) is AuthenticationError
        assert await (await User.get(pk=ada.pk)).check_password(NEW_PASSWORD)
        await assert_events_equal_changes(fresh, events)

    async def test_set_and_set(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        events: Captured,
    ) -> None:
        """Of two resets the later one holds, and each ends the sessions before it."""
        other = await User.get(pk=ada.pk)
        await overlap(
            monkeypatch,
            fresh,
            lambda: auth.set_password(ada, NEW_PASSWORD),
            lambda: auth.set_password(other, OTHER_PASSWORD),
        )
        stored = await User.get(pk=ada.pk)
        assert await stored.check_password(OTHER_PASSWORD)
        assert (ada.session_version, other.session_version, stored.session_version) == (1, 2, 2)
        assert events.names.count("password_changed") == 2
        await assert_events_equal_changes(fresh, events)


class TestAccounts:
    async def test_one_of_two_is_created(
        self, monkeypatch: pytest.MonkeyPatch, fresh: Second, events: Captured
    ) -> None:
        """Two sign-ups with one address make one account."""
        one, two = await overlap(
            monkeypatch,
            fresh,
            lambda: User.create_user(email=EMAIL, password=PASSWORD),
            lambda: User.create_user(email=EMAIL.upper(), password=NEW_PASSWORD),
        )
        assert isinstance(one, User)
        assert type(two) is IdentifierTakenError
        assert await fresh.value("SELECT count(*) FROM app_user") == 1
        assert events.names == ["user_registered"]

    @pytest.mark.parametrize("method", ["deactivate", "activate"])
    async def test_is_closed_and_opened_once(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fresh: Second,
        auth: AuthService[User],
        ada: User,
        events: Captured,
        method: str,
    ) -> None:
        """Of two calls that close or open an account one changes it and emits the event."""
        if method == "activate":
            await auth.deactivate(ada)
        events.clear()
        other = await User.get(pk=ada.pk)
        await overlap(
            monkeypatch,
            fresh,
            lambda: getattr(auth, method)(ada),
            lambda: getattr(auth, method)(other),
        )
        assert events.names == [f"user_{method}d"]
        raised = 2 if method == "activate" else 1
        assert await fresh.value("SELECT session_version FROM app_user") == raised
        assert await fresh.value("SELECT is_active FROM app_user") == (method == "activate")


def meet(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, callers: int) -> None:
    """Let the first *callers* of a method return only when each has its result."""
    original = getattr(owner, method)
    barrier = asyncio.Barrier(callers)
    came = 0

    async def answer_together(*args: object) -> object:
        nonlocal came
        came += 1
        expected = came <= callers
        answer = await original(*args)
        if expected:
            await barrier.wait()
        return answer

    monkeypatch.setattr(owner, method, answer_together)
