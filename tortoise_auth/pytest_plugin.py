"""Fixtures for hosts, loaded by pytest itself because the package is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tortoise_auth.events import emitter
from tortoise_auth.passwords import PasswordHasher
from tortoise_auth.testing import Captured, FakeClock, capture, cheap_hasher


@pytest.fixture
def auth_events() -> Iterator[Captured]:
    """What the library's own emitter emits during the test; its listeners are restored after."""
    with capture(emitter) as captured:
        yield captured


@pytest.fixture
def auth_clock() -> FakeClock:
    """A clock that goes when it is told to: ``AuthService(User, config, clock=auth_clock)``."""
    return FakeClock()


@pytest.fixture(scope="session")
def auth_hasher() -> PasswordHasher:
    """A hasher that is fast and protects nobody: ``AuthService(..., passwords=auth_hasher)``."""
    return cheap_hasher()
