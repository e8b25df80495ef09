"""What the tests of the service share: sessions and rows to look at, statements to watch and break."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import argon2.low_level
import pytest
from argon2.exceptions import VerifyMismatchError
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext
from tortoise.models import Model

from tests.app import User
from tests.conftest import PASSWORD
from tortoise_auth import AuthResult, AuthService
from tortoise_auth.exceptions import TokenRevokedError
from tortoise_auth.models import Session
from tortoise_auth.passwords import PasswordHasher
from tortoise_auth.sessions.access_tokens import AccessTokens
from tortoise_auth.testing import FakeClock

EMAIL = "ada@example.com"

NEW_PASSWORD = "wrong donkey charger nail"

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
"""What is no token at all."""


Cost = tuple[int, int, int]
"""Memory in KiB, passes, lanes."""


def connection_of(context: TortoiseContext) -> BaseDBAsyncClient:
    """Return the only connection of a test's database."""
    (connection,) = context.connections.all()
    return connection


async def hang_up_at(owner: Any, step: str, call: Coroutine[Any, Any, object]) -> None:
    """Cancel a call while it waits for a step of *owner* that has done its work already."""
    take, taken, go_on = getattr(owner, step), asyncio.Event(), asyncio.Event()

    async def take_and_wait(*args: Any) -> Any:
        answer = await take(*args)
        taken.set()
        await go_on.wait()
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, take_and_wait)
        task = asyncio.ensure_future(call)
        async with asyncio.timeout(60):
            await taken.wait()
            task.cancel()
            go_on.set()
            await asyncio.wait([task])
    assert task.cancelled()


@contextmanager
def statements(
    context: TortoiseContext, *, fail_at: int | None = None, error: Exception | None = None
) -> Iterator[list[str]]:
    """Note every statement sent to the database, ``BEGIN`` and ``COMMIT`` included.

    Args:
        context: The database.
        fail_at: Raise *error* instead of sending this one, counted from 1.
        error: What to raise.
    """
    seen: list[str] = []

    def watch(patch: pytest.MonkeyPatch, owner: type, method: str, text: str | None) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        async def watched(self: object, *args: Any, **kwargs: Any) -> Any:
            seen.append(text or args[0])
            if len(seen) == fail_at and error is not None:
                raise error
            return await original(self, *args, **kwargs)

        patch.setattr(owner, method, watched)

    client = type(connection_of(context))
    block: Any = connection_of(context)._in_transaction()
    transaction = type(getattr(block, "client", None) or block.connection)
    with pytest.MonkeyPatch.context() as patch:
        for method in ("execute_insert", "execute_many", "execute_query", "execute_query_dict"):
            watch(patch, client, method, None)
        watch(patch, transaction, "begin", "BEGIN")
        watch(patch, transaction, "commit", "COMMIT")
        yield seen


@contextmanager
def argon2_costs() -> Iterator[list[Cost]]:
    """Note the cost of everything that Argon2 computes."""
    seen: list[Cost] = []
    hash_secret, verify_secret = argon2.low_level.hash_secret, argon2.low_level.verify_secret

    def hash_and_note(**kwargs: Any) -> bytes:
        seen.append((kwargs["memory_cost"], kwargs["time_cost"], kwargs["parallelism"]))
        return hash_secret(**kwargs)

    def verify_and_note(encoded: bytes, secret: bytes, kind: argon2.low_level.Type) -> bool:
        try:
            valid = verify_secret(encoded, secret, kind)
        except VerifyMismatchError:
            seen.append(_cost_of(encoded))
            raise
        seen.append(_cost_of(encoded))  # a malformed hash raised, and nothing was computed
        return valid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argon2.low_level, "hash_secret", hash_and_note)
        patch.setattr(argon2.low_level, "verify_secret", verify_and_note)
        yield seen


def _cost_of(encoded: bytes) -> Cost:
    parameters = argon2.extract_parameters(encoded.decode())
    return parameters.memory_cost, parameters.time_cost, parameters.parallelism


def full_cost(hasher: PasswordHasher) -> Cost:
    """Return what one hash of today's settings costs."""
    return hasher.memory_cost, hasher.time_cost, hasher.parallelism


def meanwhile(
    monkeypatch: pytest.MonkeyPatch,
    hasher: PasswordHasher,
    method: str,
    change: Callable[[], Awaitable[object]],
) -> None:
    """Let *change* happen once, right after the next ``hash`` or ``verify`` was computed."""
    original = getattr(hasher, method)

    async def compute_then_change(*args: object) -> object:
        result = await original(*args)
        monkeypatch.setattr(hasher, method, original)
        await change()
        return result

    monkeypatch.setattr(hasher, method, compute_then_change)


async def rows(*models: type[Model]) -> list[dict[str, object]]:
    """Return every row of *models* and of the sessions, as they are in the database."""
    every: tuple[type[Model], ...] = (*models, Session)
    return [
        found
        for model in every
        for found in await model.all().order_by(model._meta.pk_attr).values()
    ]


async def row(model: type[Model], pk: object) -> dict[str, object]:
    """Return one row as it is in the database."""
    (found,) = await model.filter(pk=pk).values()
    return found


async def log_in(auth: AuthService[User]) -> AuthResult[User]:
    """Open a session of Ada."""
    return await auth.login(EMAIL, PASSWORD)


async def assert_over(auth: AuthService[Any], result: AuthResult[Any]) -> None:
    """Neither token of the session works."""
    with pytest.raises(TokenRevokedError):
        await auth.authenticate(result.access_token)
    with pytest.raises(TokenRevokedError):
        await auth.refresh(result.refresh_token)


async def assert_goes_on(auth: AuthService[Any], result: AuthResult[Any]) -> None:
    """Both tokens of the session work."""
    assert (await auth.authenticate(result.access_token)).pk == result.user.pk
    assert (await auth.refresh(result.refresh_token)).session.id == result.session.id


def signed(auth: AuthService[Any], clock: FakeClock, subject: str, session_id: str) -> str:
    """Return a token that only the holder of the key could make."""
    token, _ = AccessTokens(auth.config, clock).issue(
        subject=subject,
        session_id=session_id,
        session_ends=clock() + timedelta(days=1),
        extra={},
    )
    return token


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    """Return the names of the columns that differ."""
    return {name for name in after if after[name] != before[name]}


def columns(instance: Model) -> dict[str, object]:
    """Return what an object in memory holds of its row."""
    return {name: getattr(instance, name) for name in instance._meta.fields_db_projection}
