"""Throttling over many machines: the counts live in Redis, kept by the `limits` library.

Needs the extra ``limits``: ``pip install "tortoise-auth[limits]"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import checked_clock
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.throttling.counters import Count
from tortoise_auth.throttling.protocol import (
    FAILURES_KEPT,
    LOCKED,
    TELLING,
    TOLD,
    Counted,
    CountingThrottle,
    TooEarly,
)

try:
    from limits import RateLimitItem, parse_many
    from limits.aio.storage import Storage
    from limits.errors import ConfigurationError as UnknownStorageError
    from limits.storage import storage_from_string
except ImportError as missing:
    raise ImportError(
        "tortoise_auth.integrations.limits needs the limits library: "
        'pip install "tortoise-auth[limits]"'
    ) from missing

_FAILURES_KEPT = int(FAILURES_KEPT.total_seconds())
_ROUND_KEPT = 10 * _FAILURES_KEPT  # far longer, lest a lock ends with its round
_LATE = 60
_FORGOTTEN = 1 << 40
_A_MINUTE = int(TELLING.total_seconds())


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
        clock: The time, by which windows begin: at each full minute, hour or day of UTC.

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
        clock: Clock = utc_now,
    ) -> None:
        super().__init__(max_failures)
        made = _storage(storage) if isinstance(storage, str) else storage
        if not isinstance(made, Storage):
            raise ConfigurationError(
                "LimitsThrottle needs an asynchronous storage: its URI begins with async+, for "
                "example async+redis://localhost:6379"
            )
        self._storage = made
        self._account = _windows(account)
        self._source = _windows(source)
        self._clock = checked_clock(clock)

    async def _take(
        self, key: str, *, unlimited: bool = False, seen: Count | None = None
    ) -> Counted:
        round_ = 0 if self._is_source(key) else await self._storage.get(_round_of(key))
        windows = () if unlimited else self._windows_of(key, round_)
        for number, window in enumerate(windows, 1):
            if await self._storage.incr(window.key, window.kept) > window.amount:
                await self._uncount(windows[:number])
                wait = max(window.ends - self._clock().timestamp(), 1.0)
                raise TooEarly(wait, of_source=self._is_source(key))
        failures = 0
        if self._is_account(key):
            failures = _in_a_row(await self._add(_failures_of(key, round_), 1))
        return _CountedInWindows(key, failures, windows=windows, round=round_)

    async def _give_back(self, counted: Counted) -> None:
        counted = _here(counted)
        await self._uncount(counted.windows)
        if self._is_account(counted.key):
            await self._add(_failures_of(counted.key, counted.round), -1)

    async def _forget(self, counted: Counted) -> None:
        """Begin a new round, in which nothing has been counted, not even by who is late."""
        round_ = await self._storage.get(_round_of(counted.key))
        failures = _failures_of(counted.key, round_)
        if _in_a_row(await self._storage.get(failures)) >= LOCKED:
            return
        if _in_a_row(await self._add(failures, -_FORGOTTEN)) >= LOCKED:  # at this very moment
            await self._add(failures, _FORGOTTEN)
            return
        if await self._is_first(f"{failures}:over"):
            await self._storage.incr(_round_of(counted.key), _ROUND_KEPT)
            await self._storage.clear(failures)

    async def _lock(self, counted: Counted) -> bool:
        round_ = _here(counted).round
        failures = _failures_of(counted.key, round_)
        before = await self._storage.get(failures)
        if self._max_failures <= before < LOCKED:
            before = await self._add(failures, LOCKED) - LOCKED
            is_first = self._max_failures <= before < LOCKED
            if not is_first or await self._storage.get(_round_of(counted.key)) != round_:
                await self._add(failures, -LOCKED)  # forgotten, or locked by somebody else
                return False
            return True
        is_locked = LOCKED <= before < TOLD
        return is_locked and await self._storage.get(_round_of(counted.key)) == round_

    async def _undertake_to_tell(self, counted: Counted) -> bool:
        return await self._is_first(f"{_failures_of(counted.key, _here(counted).round)}:telling")

    async def _is_first(self, step: str) -> bool:
        """Tell whether nobody has begun this step within the last minute: he may have been killed."""
        return await self._storage.incr(step, _A_MINUTE) == 1

    async def _remember_told(self, counted: Counted) -> None:
        failures = _failures_of(counted.key, _here(counted).round)
        before = await self._add(failures, TOLD) - TOLD
        if not LOCKED <= _in_a_row(before) < TOLD:
            await self._add(failures, -TOLD)

    async def _add(self, failures: str, amount: int) -> int:
        return await self._storage.incr(failures, _FAILURES_KEPT, amount=amount)

    def _windows_of(self, key: str, round_: int) -> Sequence[_Window]:
        now = int(self._clock().timestamp())
        return [
            _Window(
                key=f"tortoise_auth:{key}:{round_}:{number}:{now // item.get_expiry()}",
                amount=item.amount,
                kept=item.get_expiry() + _LATE,
                ends=(now // item.get_expiry() + 1) * item.get_expiry(),
            )
            for number, item in enumerate(self._source if self._is_source(key) else self._account)
        ]

    async def _uncount(self, windows: Sequence[_Window]) -> None:
        for window in windows:
            await self._storage.incr(window.key, window.kept, amount=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """One window of time: attempts of another one have another key.

    Attributes:
        key: Of its counter.
        amount: Attempts that it has room for.
        kept: How long its counter is kept, in seconds: longer than it lasts, lest an attempt that
            comes late begins it anew.
        ends: When it does, in seconds since 1970.
    """

    key: str
    amount: int
    kept: int
    ends: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _CountedInWindows(Counted):
    """One attempt, with all that is needed to take it back from where it was counted."""

    windows: Sequence[_Window]
    round: int


def _here(counted: Counted) -> _CountedInWindows:
    if not isinstance(counted, _CountedInWindows):
        raise TypeError("This reservation is from another throttle")
    return counted


def _in_a_row(value: int) -> int:
    """Return the failures in a row, locked or not, that a counter stands for.

    A success takes `_FORGOTTEN` off it, and what is then there says who was first: if it is locked
    under that, the lock was. If it is not, the failures are forgotten.
    """
    if value < -_FORGOTTEN // 2:
        value %= _FORGOTTEN
        return value if LOCKED <= value < _FORGOTTEN // 2 else 0
    return max(value, 0)


def _failures_of(key: str, round_: int) -> str:
    return f"tortoise_auth:failures:{key}:{round_}"


def _round_of(key: str) -> str:
    """Return the counter of successes: each begins a round, and what is counted is of one round."""
    return f"tortoise_auth:round:{key}"


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
