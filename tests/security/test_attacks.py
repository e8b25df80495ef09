"""Attacks that need several calls or a form of their own; the others are with their subjects."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import argon2.low_level
import pytest

from tests.support.accounts import EMAIL, PASSWORD, SECRET, assert_live, log_in
from tests.support.app import User, store
from tests.support.rows import row, rows
from tortoise_auth import AuthConfig, AuthenticationError, AuthService, PasswordHasher
from tortoise_auth.exceptions import IdentifierTakenError
from tortoise_auth.models import Session
from tortoise_auth.passwords import unusable_hash

CROWD = 200


class Computing:
    """Counts how many hashes are computed at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 0
        self.most = 0
        self.all = 0

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Count from now on."""
        verify = argon2.low_level.verify_secret

        def verify_and_count(*args: Any, **kwargs: Any) -> bool:
            with self._lock:
                self._now += 1
                self.all += 1
                self.most = max(self.most, self._now)
            try:
                return verify(*args, **kwargs)
            finally:
                with self._lock:
                    self._now -= 1

        patch.setattr(argon2.low_level, "verify_secret", verify_and_count)


class TestStorm:
    async def test_of_logins(
        self, ada: User, hasher: PasswordHasher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A38: of two hundred logins at once all succeed, and few are computed at a time."""
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=None)
        computing = Computing()
        computing.watch(monkeypatch)
        results = await asyncio.gather(*(log_in(auth) for _ in range(CROWD)))
        assert computing.all == CROWD
        assert computing.most <= hasher.threads
        assert len({result.session.id for result in results}) == CROWD
        await assert_live(auth, results[-1])

    async def test_of_cancelled_callers(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A38, A143: a caller that is cancelled while it waits costs no hash, and delays no later caller."""
        go_on = threading.Event()
        computing = Computing()
        with monkeypatch.context() as patch:
            computing.watch(patch)
            verify = argon2.low_level.verify_secret

            def wait_and_verify(*args: Any, **kwargs: Any) -> bool:
                go_on.wait(30)
                return verify(*args, **kwargs)

            patch.setattr(argon2.low_level, "verify_secret", wait_and_verify)
            logins = [asyncio.create_task(hasher.verify(PASSWORD, None)) for _ in range(CROWD)]
            await asyncio.sleep(0)
            for login in logins:
                login.cancel()
            await asyncio.wait(logins)
            go_on.set()
            await log_in(auth)
        assert all(login.cancelled() for login in logins)
        assert computing.all <= hasher.threads + 1


class TestStoredValue:
    @pytest.mark.parametrize("stored", ["", "!", "None", "null", PASSWORD])
    @pytest.mark.parametrize("typed", ["", "!", "None", "null", PASSWORD])
    async def test_what_is_no_hash_matches_nothing(
        self, auth: AuthService[User], ada: User, stored: str, typed: str
    ) -> None:
        """A36: neither the stored text itself nor an empty password opens an account without a hash."""
        await store(ada, password=stored)
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, typed)
        assert not await (await User.get(pk=ada.pk)).check_password(typed)
        assert await Session.all().count() == 0

    async def test_unusable_value_is_no_password(self, auth: AuthService[User], ada: User) -> None:
        """A36: the stored value of an account without a password is no password."""
        stored = unusable_hash()
        await User.filter(pk=ada.pk).update(password=stored)
        for typed in (stored, stored[1:]):
            with pytest.raises(AuthenticationError):
                await auth.login(EMAIL, typed)

    async def test_hash_is_no_password(self, auth: AuthService[User], ada: User) -> None:
        """A36: a stolen hash does not log in, and a sign-up hashes it like any password."""
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, ada.password)
        eve = await User.create_user(email="eve@example.com", password=ada.password)
        assert eve.password != ada.password
        with pytest.raises(AuthenticationError):
            await auth.login("eve@example.com", PASSWORD)


class TestSignUp:
    @pytest.mark.parametrize("email", [EMAIL, "ADA@Example.COM", " ada@example.com\t"])
    async def test_takes_over_no_account(
        self, auth: AuthService[User], ada: User, email: str
    ) -> None:
        """A25, A26: a second account under another spelling is refused, and the first is unchanged."""
        before = await rows(User)
        with pytest.raises(IdentifierTakenError):
            await User.create_user(email=email, password="wrong donkey charger nail")
        assert await rows(User) == before
        assert (await auth.login(email, PASSWORD)).user.pk == ada.pk

    async def test_takes_over_no_primary_key(self, auth: AuthService[User], ada: User) -> None:
        """A182: a form that contains the key of an account neither changes it nor ends its sessions."""
        result = await log_in(auth)
        before = await row(User, ada.pk)
        with pytest.raises(IdentifierTakenError):
            await User.create_user(email="eve@example.com", password=PASSWORD, id=ada.pk)
        with pytest.raises(ValueError, match="pk"):
            await User.create_user(email="eve@example.com", password=PASSWORD, pk=ada.pk)
        assert await row(User, ada.pk) == before
        await assert_live(auth, result)
