"""The claims that a service asks its host for, at each login and each refresh."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, TypeAlias

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET, log_in
from tests.support.app import User
from tests.support.deliveries import quiet
from tests.support.rows import rows
from tortoise_auth import AuthConfig, AuthService
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.models import AttemptCount, Session
from tortoise_auth.testing import Captured, FakeClock

Source: TypeAlias = Callable[
    [User, Session], Mapping[str, object] | Awaitable[Mapping[str, object]]
]


def name_of(user: User, session: Session) -> Mapping[str, object]:
    """Return claims without waiting."""
    return {"name": user.display_name, "from": session.ip}


async def name_in_time(user: User, session: Session) -> Mapping[str, object]:
    """Return the same claims after a query."""
    assert await Session.get(id=session.id) == session  # in the transaction of the login
    return name_of(user, session)


def asking(source: Source, clock: FakeClock, **settings: Any) -> AuthService[User]:
    """Return a service that asks *source*."""
    return AuthService(User, AuthConfig(secret=SECRET, **settings), clock=clock, claims=source)


class TestAsked:
    @pytest.mark.parametrize("source", [name_of, name_in_time])
    async def test_at_login_and_refresh(self, ada: User, clock: FakeClock, source: Source) -> None:
        """Each access token has the claims of its moment, whether the function is plain or async."""
        auth = asking(source, clock)
        await User.filter(pk=ada.pk).update(display_name="Ada")
        result = await log_in(auth)
        assert auth.decode(result.access_token).extra == {"name": "Ada", "from": None}
        await User.filter(pk=ada.pk).update(display_name="Countess")
        result = await auth.refresh(result.refresh_token)
        assert auth.decode(result.access_token).extra["name"] == "Countess"

    async def test_with_given_ones(self, ada: User, clock: FakeClock) -> None:
        """Claims of the call are added, and go before those of the service."""
        auth = asking(lambda user, session: {"role": "reader", "tenant": "blue"}, clock)
        given = {"role": "editor", "page": 1}
        result = await auth.login(EMAIL, PASSWORD, claims=given)
        assert auth.decode(result.access_token).extra == {**given, "tenant": "blue"}
        result = await auth.refresh(result.refresh_token, claims={"page": 2})
        assert auth.decode(result.access_token).extra == {
            "role": "reader",
            "tenant": "blue",
            "page": 2,
        }

    async def test_for_a_repeated_answer(self, ada: User, clock: FakeClock) -> None:
        """A token that is repeated within the grace period gets claims, too."""
        auth = asking(
            lambda user, session: {"n": session.generation},
            clock,
            refresh_reuse_grace=timedelta(seconds=30),
        )
        first = await log_in(auth)
        for _ in range(2):
            result = await auth.refresh(first.refresh_token)
            assert auth.decode(result.access_token).extra == {"n": 1}

    async def test_nothing_else(self, ada: User, clock: FakeClock) -> None:
        """Neither a refused login nor a spent token, nor what reads a token, asks for claims."""
        asked: list[str] = []

        def source(user: User, session: Session) -> Mapping[str, object]:
            asked.append(str(session.id))
            return {}

        auth = asking(source, clock)
        with pytest.raises(Exception, match="Invalid credentials"):
            await auth.login(EMAIL, "wrong")
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        await auth.authenticate(second.access_token)
        with pytest.raises(Exception, match="used before"):
            await auth.refresh(first.refresh_token)
        assert asked == [str(first.session.id)] * 2


class NoRoleError(Exception):
    """The host refuses."""


def refuse(user: User, session: Session) -> Mapping[str, object]:
    """Refuse at once."""
    raise NoRoleError


async def refuse_in_time(user: User, session: Session) -> Mapping[str, object]:
    """Refuse after a query."""
    await User.exists()
    raise NoRoleError


REFUSED: list[Any] = [
    pytest.param(refuse, NoRoleError, id="raises"),
    pytest.param(refuse_in_time, NoRoleError, id="raises-later"),
    pytest.param(lambda user, session: {"sub": "8"}, ValueError, id="reserved"),
    pytest.param(lambda user, session: {"user": user}, ValueError, id="no-json"),
    pytest.param(lambda user, session: {"long": "x" * 10_000}, ValueError, id="too-long"),
    pytest.param(lambda user, session: None, ValueError, id="none"),
    pytest.param(lambda user, session: ["role"], ValueError, id="list"),
]


class TestRefused:
    @pytest.mark.parametrize(("source", "error"), REFUSED)
    async def test_at_login(
        self,
        db: TortoiseContext,
        ada: User,
        clock: FakeClock,
        events: Captured,
        source: Any,
        error: type[Exception],
    ) -> None:
        """Nothing of the login is kept: no session, no time of it, no event, no failure."""
        auth = asking(source, clock)
        before = await rows(User)
        events.clear()
        with pytest.raises(error):
            await log_in(auth)
        await quiet(auth.emitter)
        assert not await Session.exists()
        assert await rows(User) == before
        assert events.names == []
        assert [(each.failures, each.in_flight) for each in await AttemptCount.all()] in (
            [],
            [(0, 0)],
        )

    @pytest.mark.parametrize(("source", "error"), REFUSED)
    async def test_at_refresh(
        self,
        db: TortoiseContext,
        ada: User,
        clock: FakeClock,
        events: Captured,
        source: Any,
        error: type[Exception],
    ) -> None:
        """The presented token is not spent, and works once there are claims."""
        result = await log_in(asking(name_of, clock))
        before = await rows(Session)
        events.clear()
        with pytest.raises(error):
            await asking(source, clock).refresh(result.refresh_token)
        assert await rows(Session) == before
        assert events.names == []
        assert (await asking(name_of, clock).refresh(result.refresh_token)).session.generation == 1

    @pytest.mark.parametrize("source", [{"role": "editor"}, "role", 7])
    def test_no_function(self, source: Any) -> None:
        """What cannot be called is refused at construction."""
        with pytest.raises(ConfigurationError, match="claims= takes a function of a user and a"):
            AuthService(User, AuthConfig(secret=SECRET), claims=source)
