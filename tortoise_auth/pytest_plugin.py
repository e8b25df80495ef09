"""Fixtures for hosts, loaded by pytest itself because the package is installed.

Every run of pytest imports this module, in projects without authentication too. So it imports
Tortoise and the rest of the package where a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tortoise_auth.lazy import LazyModule

if TYPE_CHECKING:
    from tortoise_auth import events, testing
    from tortoise_auth.passwords import PasswordHasher
else:
    events = LazyModule("tortoise_auth.events")
    testing = LazyModule("tortoise_auth.testing")


@pytest.fixture
def auth_events() -> Iterator[testing.Captured]:
    """What the library's own emitter emits during the test; its handlers are restored after."""
    with testing.capture(events.emitter) as captured:
        yield captured


@pytest.fixture
def auth_clock() -> testing.FakeClock:
    """A clock that a test moves: ``AuthService(User, config, clock=auth_clock)``."""
    return testing.FakeClock()


@pytest.fixture(scope="session")
def auth_hasher() -> PasswordHasher:
    """A hasher that is fast and protects nothing.

    Give it to the model: ``monkeypatch.setattr(User, "password_hasher", auth_hasher)``. Then
    ``create_user``, ``set_password`` and every service without ``passwords=`` use it, also one that
    is made when its module is imported.
    """
    return testing.cheap_hasher()
