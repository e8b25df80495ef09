"""Fakes for tests: of hosts, and our own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import ClassVar

from tortoise_auth.passwords import PasswordHasher


class FakeClock:
    """A clock that goes when it is told to.

    Example::

        clock = FakeClock()
        auth = AuthService(User, config, clock=clock)
        clock.advance(timedelta(minutes=15))

    Args:
        now: The time it shows at first: aware; 2026-01-01 12:00 UTC by default.
    """

    def __init__(self, now: datetime = datetime(2026, 1, 1, 12, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """Return the time it shows."""
        return self.now

    def advance(self, by: timedelta) -> None:
        """Go forward, or with a negative *by* back."""
        self.now += by


class _CheapHasher(PasswordHasher):
    cost_floor: ClassVar[tuple[()]] = ()


def cheap_hasher(*, threads: int = 2) -> PasswordHasher:
    """Return a hasher of the lowest possible cost: a hash takes under a millisecond.

    Warning: for tests alone. Its hashes protect nobody.
    """
    return _CheapHasher(memory_cost=8, time_cost=1, parallelism=1, threads=threads)
