"""R30 to R39: refusals that reveal nothing, and limits to guessing, tested through a login."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, log_in
from tests.support.app import User
from tests.support.hashing import argon2_costs, full_cost
from tests.support.statements import statements
from tortoise_auth import (
    AuthConfig,
    AuthenticationError,
    AuthService,
    EventEmitter,
    PasswordHasher,
    RequestContext,
    TortoiseAuthError,
)
from tortoise_auth.events import UserLoginFailed
from tortoise_auth.exceptions import (
    IdentifierTakenError,
    ThrottledError,
    TokenRevokedError,
)
from tortoise_auth.testing import FakeClock, capture
from tortoise_auth.throttling import Backoff, DatabaseThrottle

BOB = "bob@example.com"


def service(clock: FakeClock, *, free: int) -> AuthService[User]:
    """Return a service that allows *free* failures without a pause, for account and source."""
    limit = Backoff(free_attempts=free)
    throttle = DatabaseThrottle(account=limit, source=limit, clock=clock)
    return AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)


async def guess(auth: AuthService[User], ip: str | None = None) -> type[TortoiseAuthError]:
    """Try a wrong password, and return how it was refused."""
    with pytest.raises(TortoiseAuthError) as refusal:
        await auth.login(EMAIL, "wrong", context=RequestContext(ip=ip))
    return type(refusal.value)


class TestSameAnswer:
    async def test_locked_account(
        self, ada: User, clock: FakeClock, hasher: PasswordHasher, emitter: EventEmitter
    ) -> None:
        """R30, R31, A1, A2: a locked account is refused like a wrong password, at the same cost."""
        auth = service(clock, free=1000)
        assert {await guess(auth) for _ in range(100)} == {AuthenticationError}
        for password in (PASSWORD, "wrong"):
            with capture(emitter) as events, argon2_costs() as costs:
                with pytest.raises(AuthenticationError) as refusal:
                    await auth.login(EMAIL, password)
            error = refusal.value
            assert (error.args, error.code, vars(error)) == (
                ("Invalid credentials",),
                "invalid_credentials",
                {},
            )
            assert costs == [full_cost(hasher)]
            assert events.one(UserLoginFailed).reason == "locked"

    async def test_first_call_of_a_hasher(self, sqlite: TortoiseContext) -> None:
        """A2: the first failure of a new hasher costs one hash, without another to prepare it."""
        hasher = type(User.password_hasher)(memory_cost=8, time_cost=1, parallelism=1)
        auth = AuthService(User, AuthConfig(secret=SECRET), passwords=hasher)
        with argon2_costs() as costs, pytest.raises(AuthenticationError):
            await auth.login("nobody@example.com", PASSWORD)
        assert costs == [full_cost(hasher)]

    async def test_sign_up(self, db: TortoiseContext, ada: User, hasher: PasswordHasher) -> None:
        """R32, A7: a taken address costs a sign-up the same hash and no other statement than a free one."""
        seen = []
        for email in (EMAIL, BOB):
            with argon2_costs() as costs, statements(db) as sent:
                try:
                    await User.create_user(email=email, password=PASSWORD)
                except IdentifierTakenError as error:
                    assert (error.__cause__, error.__context__) == (None, None)
            assert costs == [full_cost(hasher)]
            seen.append(sent[:2])
        assert len(seen[0]) == 2
        assert seen[0] == seen[1]
        assert await User.all().count() == 2


class TestGuessing:
    async def test_many_sources(self, ada: User, clock: FakeClock) -> None:
        """R35, A160: guesses at one account from many sources share the budget of the account."""
        auth = service(clock, free=5)
        outcomes = [await guess(auth, f"198.51.100.{number}") for number in range(20)]
        assert outcomes == [AuthenticationError] * 5 + [ThrottledError] * 15


class TestEveryDoor:
    async def test_closed_account(self, auth: AuthService[User], ada: User) -> None:
        """R39: a closed account is refused by login, change, authenticate and refresh alike."""
        result = await log_in(auth)
        await auth.deactivate(ada)
        calls: list[tuple[Callable[[], Awaitable[object]], type[TortoiseAuthError]]] = [
            (lambda: log_in(auth), AuthenticationError),
            (lambda: auth.change_password(ada, PASSWORD, NEW_PASSWORD), AuthenticationError),
            (lambda: auth.authenticate(result.access_token), TokenRevokedError),
            (lambda: auth.refresh(result.refresh_token), TokenRevokedError),
        ]
        for call, error in calls:
            with pytest.raises(error):
                await call()


async def test_new_database_has_no_account(db: TortoiseContext, auth: AuthService[User]) -> None:
    """R37: a new database has no account, and no usual name logs in."""
    assert await User.all().count() == 0
    for name in ("admin", "root", "admin@example.com", "test@example.com"):
        with pytest.raises(AuthenticationError):
            await auth.login(name, name)
