"""Throttling over many machines: the counts live in Redis, kept by the `limits` library.

Needs the extra ``limits`` of this package: in its checkout ``pip install ".[limits]"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import checked_clock
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.legible import quoted
from tortoise_auth.throttling.protocol import (
    FAILURES_KEPT,
    UNDECIDED,
    Counted,
    CountingThrottle,
    Reservation,
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
        'pip install limits redis, or in our checkout pip install ".[limits]"'
    ) from missing

_FAILURES_KEPT = int(FAILURES_KEPT.total_seconds())
_ROUND_KEPT = 10 * _FAILURES_KEPT  # far longer than what is counted in it
_LATE = 60
_UNDECIDED = int(UNDECIDED.total_seconds())


class LimitsThrottle(CountingThrottle):
    """Counts attempts in a storage of the `limits` library.

    Several windows together make the pauses grow: after ten attempts in a minute the next one
    waits for the next minute, after twenty in an hour for the next hour.

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

    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong: what was counted stays, and is not in flight any more."""
        for counted in reservation.counted:
            await self._land(counted)

    async def _take(self, counted: Counted) -> Counted:
        key, in_flight = counted.key, _in_flight(counted.key)
        # A source has no rounds: logins to an account of one's own must buy no guesses at others.
        round_ = 0 if counted.of_source else await self._storage.get(_round(key))
        windows = self._windows_of(counted, round_) if counted.limited else ()
        # Added before it is compared: `limits` has no other atomic step.
        for number, window in enumerate(windows, 1):
            if await self._storage.incr(window.key, window.kept) > window.amount:
                await self._uncount(windows[:number])
                wait = max(window.ends - self._clock().timestamp(), 1.0)
                undecided = await self._storage.get(in_flight) > 0
                raise TooEarly(wait, in_flight=key if undecided else None)
        others = await self._storage.incr(in_flight, _UNDECIDED) - 1
        taken = _CountedInWindows(
            key,
            await self._add_failure(key, round_, 1) if counted.of_account else 0,
            counted.limited,
            windows=windows,
            round=round_,
        )
        if taken.failures > self._max_failures and others > 0:
            await self._give_back(taken)  # the last one that is allowed is still being checked
            raise TooEarly(1.0, in_flight=key)
        return taken

    async def _give_back(self, counted: Counted) -> None:
        if not isinstance(counted, _CountedInWindows):
            raise TypeError("This reservation is from another throttle")
        await self._uncount(counted.windows)
        if counted.of_account:
            await self._add_failure(counted.key, counted.round, -1)
        await self._land(counted)

    async def _reset(self, counted: Counted) -> None:
        """Begin a new round, in which nothing is counted, not even what is in flight."""
        await self._storage.incr(_round(counted.key), _ROUND_KEPT)
        if isinstance(counted, _CountedInWindows):
            await self._land(counted)

    async def _land(self, counted: Counted) -> None:
        await self._storage.incr(_in_flight(counted.key), _UNDECIDED, amount=-1)

    async def _add_failure(self, key: str, round_: int, amount: int) -> int:
        failures = f"tortoise_auth:failures:{key}:{round_}"
        return max(await self._storage.incr(failures, _FAILURES_KEPT, amount=amount), 0)

    def _windows_of(self, counted: Counted, round_: int) -> Sequence[_Window]:
        now = int(self._clock().timestamp())
        return [
            _Window(
                key=f"tortoise_auth:{counted.key}:{round_}:{number}:{now // item.get_expiry()}",
                amount=item.amount,
                kept=item.get_expiry() + _LATE,
                ends=(now // item.get_expiry() + 1) * item.get_expiry(),
            )
            for number, item in enumerate(self._source if counted.of_source else self._account)
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
        kept: How long its counter is kept, in seconds: longer than it lasts, so that a late
            attempt does not begin it anew.
        ends: When it does, in seconds since 1970.
    """

    key: str
    amount: int
    kept: int
    ends: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _CountedInWindows(Counted):
    """One attempt, with all that is needed to take it back from where it was counted.

    Attributes:
        windows: Where it was counted.
        round: The number of successes before it.
    """

    windows: Sequence[_Window]
    round: int


def _in_flight(key: str) -> str:
    return f"tortoise_auth:in_flight:{key}"


def _round(key: str) -> str:
    """Return the counter of successes: each begins a round, and what is counted is of one round."""
    return f"tortoise_auth:round:{key}"


def _storage(uri: str) -> object:
    try:
        # By default `limits` looks for coredis, which is not in our extra.
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
            f"LimitsThrottle cannot read {quoted(notation)}; write, for example, "
            '"10 per minute; 50 per day"'
        )
    return windows
