"""Databases for the tests: SQLite in memory, an SQLite file, and PostgreSQL where one listens."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import settings
from tortoise.context import TortoiseContext

from tests.app import User
from tortoise_auth import AuthConfig, AuthService, EventEmitter
from tortoise_auth.passwords import PasswordHasher
from tortoise_auth.testing import FakeClock, cheap_hasher

# The same examples in every run: a build fails for what was changed, not by chance. Look further
# with `make test ARGS="--hypothesis-profile=default"`.
settings.register_profile("same-every-time", derandomize=True, deadline=None)
settings.load_profile("same-every-time")

POSTGRES_URL = os.environ.get(
    "TORTOISE_AUTH_TEST_POSTGRES", "postgres://postgres@127.0.0.1:5432/test"
)
MODULES = ["tests.app", "tortoise_auth.models"]
PASSWORD = "correct horse battery staple"
SECRET = "q3Vt8mXw0cJr5ZbLh2Ny7uKd4PsAoE1gTfIi6RvUkHxMzQjWaB9DlYnSpGeFrOtC"


def listens(url: str) -> bool:
    """Tell whether a server answers at the host and port of *url*."""
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 0), timeout=1):
            return True
    except OSError:
        return False


needs_postgres = pytest.mark.skipif(
    not listens(POSTGRES_URL), reason=f"no PostgreSQL listens at {POSTGRES_URL}"
)

DATABASES = [
    pytest.param("memory", id="memory"),
    pytest.param("file", id="file"),
    pytest.param("postgres", id="postgres", marks=needs_postgres),
]


@asynccontextmanager
async def database(
    kind: str, folder: Path, *, modules: list[str] | None = None, maxsize: int = 5, **options: Any
) -> AsyncIterator[TortoiseContext]:
    """Open an empty database with every table; on PostgreSQL in a schema of its own."""
    schema = f"t_{secrets.token_hex(8)}"
    urls = {
        "memory": "sqlite://:memory:",
        "file": f"sqlite://{folder / 'test.sqlite3'}",
        "postgres": f"{POSTGRES_URL}?schema={schema}&maxsize={maxsize}",
    }
    config = {
        # Tortoise caches statements by connection name, so each dialect has its own.
        "connections": {kind: urls[kind]},
        "apps": {"models": {"models": modules or MODULES, "default_connection": kind}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config, **options)
        connection = context.connections.get(kind)
        if kind == "postgres":
            await connection.execute_script(f'CREATE SCHEMA "{schema}"')
        try:
            await context.generate_schemas()
            yield context
        finally:
            if kind == "postgres":
                await connection.execute_script(f'DROP SCHEMA "{schema}" CASCADE')


@pytest.fixture(params=DATABASES)
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Every database there is, one test for each."""
    async with database(request.param, tmp_path) as context:
        yield context


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """One SQLite database in memory, for what no database changes."""
    async with database("memory", tmp_path) as context:
        yield context


@pytest.fixture
async def postgres(tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """PostgreSQL with a pool of 30 connections; mark the test with ``needs_postgres``."""
    async with database("postgres", tmp_path, maxsize=30) as context:
        yield context


@pytest.fixture(scope="session")
def hasher() -> PasswordHasher:
    return cheap_hasher()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def emitter() -> EventEmitter:
    return EventEmitter()


@pytest.fixture(autouse=True)
def _cheap_models(
    monkeypatch: pytest.MonkeyPatch, hasher: PasswordHasher, emitter: EventEmitter
) -> None:
    """The models of ``tests.app`` hash cheaply and emit to the test's own emitter."""
    from tortoise_auth import AbstractUser  # noqa: PLC0415 - after the models of the tests

    monkeypatch.setattr(AbstractUser, "password_hasher", hasher)
    monkeypatch.setattr(AbstractUser, "emitter", emitter)


@pytest.fixture
def auth(clock: FakeClock) -> AuthService[User]:
    """A service for `User` with a clock that stands still and the test's own emitter."""
    return AuthService(User, AuthConfig(secret=SECRET), clock=clock)


@pytest.fixture
def heard(emitter: EventEmitter) -> list[str]:
    """The names of the events that the test's emitter was given, in order."""
    names: list[str] = []
    _listen_to_all(emitter, names.append)
    return names


def _listen_to_all(emitter: EventEmitter, tell: Callable[[str], object]) -> None:
    from tortoise_auth.events import catalog  # noqa: PLC0415

    for event in vars(catalog).values():
        if isinstance(event, type) and issubclass(event, catalog.Event):
            _listen(emitter, event.name, tell)


def _listen(emitter: EventEmitter, name: str, tell: Callable[[str], object]) -> None:
    @emitter.on(name)
    async def note(*args: object, **kwargs: object) -> None:
        tell(name)
