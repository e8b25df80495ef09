"""Ada, her passwords, and the state of her sessions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.support.app import User
from tortoise_auth import AuthResult, AuthService
from tortoise_auth.exceptions import TokenRevokedError
from tortoise_auth.models import user_table
from tortoise_auth.sessions.access_tokens import AccessTokens
from tortoise_auth.testing import FakeClock

EMAIL = "ada@example.com"
PASSWORD = "correct horse battery staple"
NEW_PASSWORD = "wrong donkey charger nail"
SECRET = "q3Vt8mXw0cJr5ZbLh2Ny7uKd4PsAoE1gTfIi6RvUkHxMzQjWaB9DlYnSpGeFrOtC"
GARBAGE: list[Any] = [
    None,
    7,
    True,
    b"tart_",
    [],
    {},
    "",
    "x",
    "a.b.c",
    "tart_",
    "tart_" + "A" * 70,
    "tart_\0",
    "\ud800.\ud800.\ud800",
    "." * 1_000_000,
]
"""Values that are no token."""


async def counting_from_zero(user: User) -> User:
    """Let ``session_version`` of a new account count from zero, for tests that count the raises."""
    await type(user).filter(pk=user.pk).update(session_version=0)
    user.session_version = 0
    return user


async def log_in(auth: AuthService[User]) -> AuthResult[User]:
    """Open a session of Ada."""
    return await auth.login(EMAIL, PASSWORD)


async def assert_over(auth: AuthService[Any], result: AuthResult[Any]) -> None:
    """Neither token of the session works."""
    with pytest.raises(TokenRevokedError):
        await auth.authenticate(result.access_token)
    with pytest.raises(TokenRevokedError):
        await auth.refresh(result.refresh_token)


async def assert_live(auth: AuthService[Any], result: AuthResult[Any]) -> None:
    """Both tokens of the session work."""
    assert (await auth.authenticate(result.access_token)).pk == result.user.pk
    assert (await auth.refresh(result.refresh_token)).session.id == result.session.id


def signed(auth: AuthService[Any], clock: FakeClock, subject: str, session_id: str) -> str:
    """Return a token that only the owner of the key could make."""
    token, _ = AccessTokens(auth.config, clock, user_table(auth.user_model)).issue(
        subject=subject,
        session_id=session_id,
        session_ends=clock() + timedelta(days=1),
        extra={},
    )
    return token
