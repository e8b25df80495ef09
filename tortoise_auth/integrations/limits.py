"""Throttling over many machines: the counts live in Redis, kept by the `limits` library.

Needs the extra ``limits``: ``pip install "tortoise-auth[limits]"``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tortoise_auth.counters import Count
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.throttling import FAILURES_KEPT, TOLD, Counted, CountingThrottle, TooEarly

try:
    from limits import RateLimitItem, parse_many
    from limits.aio.storage import Storage
    from limits.aio.strategies import FixedWindowRateLimiter
    from limits.errors import ConfigurationError as UnknownStorageError
    from limits.storage import storage_from_string
except ImportError as missing:
    raise ImportError(
        "tortoise_auth.integrations.limits needs the limits library: "
        'pip install "tortoise-auth[limits]"'
    ) from missing

_FAILURES_KEPT = int(FAILURES_KEPT.total_seconds())


class LimitsThrottle(CountingThrottle):
    """Counts attempts in a storage of the `limits` library.

    Several windows together make the pauses grow: who has used up ten attempts in a minute waits
    for the next minute, who has used up twenty in an hour for the next hour.

    Example::

        throttle = LimitsThrottle("async+redis://localhost:6379")
        auth = AuthService(User, config, throttle=throttle)

    Args:
        storage: A storage of `limits`, or its URI. Only asynchronous ones.
        account: The windows for one account, in the notation of `limits`.
        source: The windows for one source. Successes do not count.
        max_failures: See `CountingThrottle`.

    Raises:
        ConfigurationError: The storage is not asynchronous, or a window cannot be read.
    """

    def __init__(
        self,
        storage: Storage | str,
        *,
        account: str = "10 per minute; 20 per hour",
        source: str = "50 per minute; 300 per hour; 1000 per day",
        max_failures: int = 100,
    ) -> None:
        super().__init__(max_failures)
        made = _storage(storage) if isinstance(storage, str) else storage
        if not isinstance(made, Storage):
            raise ConfigurationError(
                "LimitsThrottle needs an asynchronous storage: its URI begins with async+, for "
                "example async+redis://localhost:6379"
            )
        self._storage = made
        self._limiter = FixedWindowRateLimiter(made)
        self._account = _windows(account)
        self._source = _windows(source)

    async def _take(
        self, key: str, *, unlimited: bool = False, seen: Count | None = None
    ) -> Counted:
        taken: list[RateLimitItem] = []
        for window in () if unlimited else self._of(key):
            taken.append(window)
            if not await self._limiter.hit(window, key):
                for each in taken:
                    await self._uncount(each.key_for(key), each.get_expiry())
                ends = (await self._limiter.get_window_stats(window, key)).reset_time
                wait = max(ends - time.time(), 1.0)
                raise TooEarly(wait, of_source=self._is_source(key))
        failures = 0
        if self._is_account(key):
            failures = await self._storage.incr(_failures_of(key), _FAILURES_KEPT)
        return Counted(key, failures, limited=not unlimited)

    async def _give_back(self, counted: Counted) -> None:
        for window in self._of(counted.key) if counted.limited else ():
            await self._uncount(window.key_for(counted.key), window.get_expiry())
        if self._is_account(counted.key):
            await self._uncount(_failures_of(counted.key), _FAILURES_KEPT)

    async def _forget(self, counted: Counted) -> None:
        for window in self._of(counted.key):
            await self._limiter.clear(window, counted.key)
        await self._storage.clear(_failures_of(counted.key))

    async def _remember_told(self, counted: Counted) -> None:
        key = _failures_of(counted.key)
        if self._max_failures <= await self._storage.get(key) < TOLD:
            await self._storage.incr(key, _FAILURES_KEPT, amount=TOLD)

    def _of(self, key: str) -> Sequence[RateLimitItem]:
        return self._source if self._is_source(key) else self._account

    async def _uncount(self, key: str, expiry: int) -> None:
        if await self._storage.get(key) > 0:  # the window in which it was counted may be over
            await self._storage.incr(key, expiry, amount=-1)


def _failures_of(key: str) -> str:
    return f"tortoise_auth:failures:{key}"


def _storage(uri: str) -> object:
    try:
        return storage_from_string(uri, implementation="redispy")
    except UnknownStorageError:
        # Its words hold the URI, and that may hold a password.
        raise ConfigurationError(
            "LimitsThrottle cannot use this storage: no such scheme, or its client library is not "
            "installed. Write, for example, async+redis://localhost:6379"
        ) from None


def _windows(notation: str) -> Sequence[RateLimitItem]:
    try:
        windows = sorted(parse_many(notation), key=lambda window: window.get_expiry())
    except ValueError:
        windows = []
    if not windows or any(window.amount < 1 for window in windows):
        raise ConfigurationError(
            f"LimitsThrottle cannot read {notation!r}; write, for example, "
            '"10 per minute; 50 per day"'
        )
    return windows
