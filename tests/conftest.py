"""Fixtures for all tests; their building blocks are in ``tests/support``."""
# ruff: noqa: E402 - pytest rewrites the assertions of modules that are imported afterwards

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tortoise.context import TortoiseContext

pytest.register_assert_rewrite("tests.support")

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tests.support.database import DATABASES, SERVERS, database
from tests.support.services import missing, needs_postgres
from tortoise_auth import AuthConfig, AuthService, EventEmitter
from tortoise_auth.passwords import PasswordHasher
from tortoise_auth.testing import Captured, FakeClock, capture, cheap_hasher

# The same examples in every run: a build fails for what was changed, not by chance. Look further
# with `make test ARGS="--hypothesis-profile=default"`.
settings.register_profile("same-every-time", derandomize=True, deadline=None)
settings.load_profile("same-every-time")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests that need a server because one of their fixtures does."""
    if "postgres" in getattr(item, "fixturenames", ()):
        item.add_marker(needs_postgres)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test if a server it needs is not listening, and name the server."""
    for mark in item.iter_markers("service"):
        reason = missing(*mark.args)
        if reason:
            pytest.skip(reason)


@pytest.fixture(params=DATABASES)
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """A database of each dialect, one test for each."""
    async with database(request.param, tmp_path) as context:
        yield context


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """One SQLite database in memory, for what no database changes."""
    async with database("memory", tmp_path) as context:
        yield context


@pytest.fixture
async def postgres(tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """PostgreSQL with a pool of 30 connections."""
    async with database("postgres", tmp_path, maxsize=30) as context:
        yield context


@pytest.fixture(params=SERVERS)
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Each server by each driver, with a pool of 30 connections: SQLite hides races."""
    async with database(request.param, tmp_path, maxsize=30) as context:
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
    """The models of ``tests.support.app`` hash cheaply and emit to the test's own emitter."""
    from tortoise_auth import AbstractUser  # noqa: PLC0415 - after the models of the tests

    monkeypatch.setattr(AbstractUser, "password_hasher", hasher)
    monkeypatch.setattr(AbstractUser, "emitter", emitter)


@pytest.fixture
async def ada(db: TortoiseContext) -> User:
    """An account on each database."""
    return await User.create_user(email=EMAIL, password=PASSWORD)


@pytest.fixture
def events(emitter: EventEmitter) -> Iterator[Captured]:
    """What is emitted on the test's own emitter."""
    with capture(emitter) as captured:
        yield captured


@pytest.fixture
def auth(clock: FakeClock) -> AuthService[User]:
    """A service for `User` with a clock that stands still and the test's own emitter."""
    return AuthService(User, AuthConfig(secret=SECRET), clock=clock)


@pytest.fixture
def emitted(emitter: EventEmitter) -> list[str]:
    """The names of the events emitted on the test's emitter, in order."""
    names: list[str] = []
    _subscribe_to_all(emitter, names.append)
    return names


def _subscribe_to_all(emitter: EventEmitter, record: Callable[[str], object]) -> None:
    from tortoise_auth.events import catalog  # noqa: PLC0415

    for event in vars(catalog).values():
        if isinstance(event, type) and issubclass(event, catalog.Event):
            _subscribe(emitter, event.name, record)


def _subscribe(emitter: EventEmitter, name: str, record: Callable[[str], object]) -> None:
    @emitter.on(name)
    async def handler(*args: object, **kwargs: object) -> None:
        record(name)
