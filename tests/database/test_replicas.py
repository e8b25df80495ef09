"""A primary and a replica that lags: whatever decides about access is read where it is written."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tortoise.context import TortoiseContext
from tortoise.models import Model
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET
from tests.support.app import User
from tests.support.database import MODULES
from tortoise_auth import (
    AuthConfig,
    AuthenticationError,
    AuthService,
    ConfigurationError,
    EventEmitter,
)
from tortoise_auth.events import UserLogin
from tortoise_auth.exceptions import TokenRevokedError
from tortoise_auth.testing import FakeClock


class ReadsFromTheReplica:
    """What a host gives to Tortoise as a router."""

    def db_for_read(self, model: type[Model]) -> str:
        """Return where rows are read."""
        return "replica"

    def db_for_write(self, model: type[Model]) -> str:
        """Return where rows are written."""
        return "primary"


@dataclass
class Pair:
    """Two files: SQLite copies the first one to the second when it is told to."""

    folder: Path

    def url(self, name: str) -> str:
        """Return the URL of one of them."""
        return f"sqlite://{self.folder / name}.sqlite3?journal_mode=DELETE"

    def replicate(self) -> None:
        """Let the replica catch up with the primary."""
        with (
            closing(sqlite3.connect(self.folder / "primary.sqlite3")) as source,
            closing(sqlite3.connect(self.folder / "replica.sqlite3")) as target,
        ):
            source.backup(target)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """A host whose reads go to a replica."""
    pair = Pair(tmp_path)
    config = {
        "connections": {name: pair.url(name) for name in ("primary", "replica")},
        "apps": {"models": {"models": MODULES, "default_connection": "primary"}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config, routers=[ReadsFromTheReplica])
        await context.generate_schemas()
        pair.replicate()
        yield pair


@pytest.fixture
def on_replica(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that is sent to the replica."""
    sent: list[str] = []
    from tortoise.connection import get_connections  # noqa: PLC0415 - of the context of the test

    client: Any = get_connections().get("replica")
    for method in ("execute_query", "execute_query_dict", "execute_insert", "execute_many"):
        original = getattr(client, method)

        async def noted(query: str, *args: Any, original: Any = original) -> Any:
            sent.append(query)
            return await original(query, *args)

        monkeypatch.setattr(client, method, noted)
    return sent


async def test_no_ended_session_lives(
    pair: Pair, auth: AuthService[User], on_replica: list[str]
) -> None:
    """A replica still shows a session, a password, an account that have ended: nothing opens."""
    user = await User.create_user(email=EMAIL, password=PASSWORD)
    first, second, third = [await auth.login(EMAIL, PASSWORD) for _ in range(3)]
    pair.replicate()
    assert (await User.get(pk=user.pk)).email == EMAIL, "the host reads there"
    assert len(on_replica) == 1
    await auth.logout(first.access_token)
    for call in (auth.authenticate(first.access_token), auth.refresh(first.refresh_token)):
        with pytest.raises(TokenRevokedError):
            await call
    await auth.set_password(second.user, NEW_PASSWORD)
    with pytest.raises(TokenRevokedError):
        await auth.authenticate(third.access_token)
    with pytest.raises(AuthenticationError):
        await auth.login(EMAIL, PASSWORD)
    await auth.deactivate(user)
    with pytest.raises(AuthenticationError):
        await auth.login(EMAIL, NEW_PASSWORD)
    assert await auth.sessions(user) == []
    assert len(on_replica) == 1


async def test_in_a_transaction_of_the_host(
    pair: Pair, auth: AuthService[User], on_replica: list[str]
) -> None:
    """In a transaction on the primary, too, everything is read and written in it."""
    await User.create_user(email=EMAIL, password=PASSWORD)
    with pytest.raises(LookupError):
        async with in_transaction("primary"):
            result = await auth.login(EMAIL, PASSWORD)
            assert (await auth.authenticate(result.access_token)).email == EMAIL
            raise LookupError
    with pytest.raises(TokenRevokedError):
        await auth.authenticate(result.access_token)
    assert on_replica == []


async def test_counters_and_outbox(
    pair: Pair, auth: AuthService[User], emitter: EventEmitter, on_replica: list[str]
) -> None:
    """Guesses are counted, and durable events delivered, however far behind the replica is."""
    delivered: list[str] = []

    @emitter.on("user_login", delivery="durable", name="welcome")
    async def welcome(user: User, event: UserLogin[User]) -> None:
        delivered.append(user.email)

    await User.create_user(email=EMAIL, password=PASSWORD)
    await auth.login(EMAIL, PASSWORD)
    assert await auth.relay().drain() == 1
    assert delivered == [EMAIL]
    for _ in range(10):
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, "wrong password")
    with pytest.raises(AuthenticationError) as refused:
        await auth.login(EMAIL, PASSWORD)
    assert refused.value.code == "throttled"
    await auth.purge_expired()
    assert on_replica == []


async def test_purge(pair: Pair, auth: AuthService[User], clock: FakeClock) -> None:
    """Expired sessions are found on the primary."""
    await User.create_user(email=EMAIL, password=PASSWORD)
    await auth.login(EMAIL, PASSWORD)
    clock.advance(timedelta(days=60))
    assert await auth.purge_expired() == 1


async def test_users_elsewhere(tmp_path: Path) -> None:
    """A router that sends users and sessions to two databases is refused, and both are named."""

    class Split:
        def db_for_write(self, model: type[Model]) -> str:
            return "replica" if model is User else "primary"

    pair = Pair(tmp_path)
    config = {
        "connections": {name: pair.url(name) for name in ("primary", "replica")},
        "apps": {"models": {"models": MODULES, "default_connection": "primary"}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config, routers=[Split])
        await context.generate_schemas()
        pair.replicate()
        with pytest.raises(ConfigurationError, match=r"'replica'.*'primary'"):
            await AuthService(User, AuthConfig(secret=SECRET)).login(EMAIL, PASSWORD)
