"""The service: what each method does, on every database."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tortoise.context import TortoiseContext

from tests.app import User
from tests.conftest import PASSWORD
from tortoise_auth import AuthenticationError, AuthService
from tortoise_auth.exceptions import (
    TokenError,
    TokenExpiredError,
    TokenReusedError,
    TokenRevokedError,
)
from tortoise_auth.testing import FakeClock

NEW_PASSWORD = "wrong donkey charger nail"


@pytest.fixture
async def ada(db: TortoiseContext) -> User:
    return await User.create_user(email="ada@example.com", password=PASSWORD)


class TestLogin:
    async def test_opens_a_session(
        self, auth: AuthService[User], ada: User, heard: list[str]
    ) -> None:
        """A login gives the host's own user, two tokens that work, and a saved last_login."""
        heard.clear()
        result = await auth.login(" Ada@EXAMPLE.com", PASSWORD)

        assert result.user == ada
        assert await auth.authenticate(result.access_token) == ada
        assert (await User.get(pk=ada.pk)).last_login == result.session.created_at
        assert heard == ["user_login"]


class TestRefresh:
    async def test_replay_ends_the_session(
        self, auth: AuthService[User], ada: User, heard: list[str]
    ) -> None:
        """A spent token ends its session, the newest tokens included, and no other session."""
        first, other = (
            await auth.login("ada@example.com", PASSWORD),
            await auth.login("ada@example.com", PASSWORD),
        )
        second = await auth.refresh(first.refresh_token)
        third = await auth.refresh(second.refresh_token)
        heard.clear()
        for _ in range(2):
            with pytest.raises(TokenReusedError):
                await auth.refresh(first.refresh_token)
        with pytest.raises(TokenRevokedError):
            await auth.refresh(third.refresh_token)
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(third.access_token)
        assert await auth.authenticate(other.access_token) == ada
        assert heard == ["refresh_token_reused"]

    async def test_idle_lifetime(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """A refresh token expires when it lies idle for longer than its lifetime."""
        result = await auth.login("ada@example.com", PASSWORD)
        clock.advance(timedelta(days=7))
        with pytest.raises(TokenExpiredError):
            await auth.refresh(result.refresh_token)


class TestLogout:
    @pytest.mark.parametrize("which", ["access_token", "refresh_token"])
    async def test_either_token_ends_both(
        self, auth: AuthService[User], ada: User, which: str, heard: list[str]
    ) -> None:
        """After logout with either token neither works; other sessions live; twice is nothing."""
        result = await auth.login("ada@example.com", PASSWORD)
        other = await auth.login("ada@example.com", PASSWORD)
        heard.clear()
        assert (await auth.logout(getattr(result, which))).sessions == 1
        assert (await auth.logout(getattr(result, which))).sessions == 0
        with pytest.raises(TokenError):
            await auth.authenticate(result.access_token)
        with pytest.raises(TokenError):
            await auth.refresh(result.refresh_token)
        assert await auth.authenticate(other.access_token) == ada
        assert heard == ["user_logout"]


class TestPasswords:
    async def test_set_password_ends_the_other_sessions(
        self, auth: AuthService[User], ada: User, heard: list[str]
    ) -> None:
        """A new password ends all sessions but the kept one, at once."""
        kept = await auth.login("ada@example.com", PASSWORD)
        ended = await auth.login("ada@example.com", PASSWORD)
        heard.clear()
        await auth.set_password(ada, NEW_PASSWORD, keep=kept.session)
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(ended.access_token)
        with pytest.raises(TokenRevokedError):
            await auth.refresh(ended.refresh_token)
        assert await auth.authenticate(kept.access_token) == ada
        assert await auth.refresh(kept.refresh_token)
        with pytest.raises(AuthenticationError):
            await auth.login("ada@example.com", PASSWORD)
        assert await auth.login("ada@example.com", NEW_PASSWORD)
        assert heard[0] == "password_changed"
        assert heard.count("password_changed") == 1


class TestDeactivate:
    async def test_ends_everything(self, auth: AuthService[User], ada: User) -> None:
        """A closed account can do nothing; opened again, no old session comes back."""
        result = await auth.login("ada@example.com", PASSWORD)
        assert (await auth.deactivate(ada)).sessions == 1
        for _ in range(2):
            with pytest.raises(TokenRevokedError):
                await auth.authenticate(result.access_token)
            with pytest.raises(TokenRevokedError):
                await auth.refresh(result.refresh_token)
            await auth.activate(ada)
        assert await auth.login("ada@example.com", PASSWORD)
