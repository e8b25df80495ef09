"""Slow down guessing: a protocol, and an implementation in the database that needs no further service.

An attempt is *reserved* before the password is hashed, so that a burst cannot be heard faster than
it is counted. After a few free failures each one doubles the pause. Live sessions, refresh and
password resets are not touched, and a source from which the user has logged in before has a budget
of its own: guessing from elsewhere cannot keep the user out.
"""

from __future__ import annotations

import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.exceptions import IntegrityError

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import checked_clock
from tortoise_auth.database import connection_for, is_transaction, root_of
from tortoise_auth.exceptions import ConfigurationError, ThrottledError
from tortoise_auth.models import AttemptCount

_MAX_RACES = 100
_ACCOUNT, _FAMILIAR, _SOURCE = "account:", "familiar:", "source:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Somebody tries a password.

    Attributes:
        account: Stands for the account, existing or not. Opaque: a throttle stores it as it is.
        source: Stands for the network it comes from; ``None`` if it is not known. Opaque, too.
        familiar: Tells whether the user has logged in from there before. Asked only when it matters.
    """

    account: str
    source: str | None
    familiar: Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Leave to check one password.

    Attributes:
        attempt: The attempt.
        locked: The account has had so many failures in a row that no password is right any more,
            until it is changed. The caller must refuse, as if the password were wrong.
        locks: If this attempt fails, the account becomes locked: tell it.
        counted: What was counted, for the throttle alone.
    """

    attempt: Attempt
    locked: bool = False
    locks: bool = False
    counted: tuple[Counted, ...] = field(default=(), repr=False)


_YEAR = timedelta(days=366)


class Throttle(Protocol):
    """Decides how often passwords may be tried. Any failure to decide must be an exception."""

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Count an attempt before its password is checked.

        Raises:
            ThrottledError: Too many came before; it was not counted and must not be heard.
        """
        ...

    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong."""
        ...

    async def succeeded(self, reservation: Reservation) -> None:
        """It was right: forget the failures of the account, but not those of the source."""
        ...

    async def released(self, reservation: Reservation) -> None:
        """It could not be checked, and that was our fault: give the attempt back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Free failures, then a pause that doubles with each.

    Attributes:
        free: Attempts without a pause.
        pause: The first pause.
        longest: The longest pause.
        quiet: After so long without an attempt the pauses begin anew.

    Raises:
        ConfigurationError: A number or duration makes no sense.
    """

    free: int
    pause: timedelta = timedelta(seconds=1)
    longest: timedelta = timedelta(minutes=15)
    quiet: timedelta = timedelta(days=1)

    def __post_init__(self) -> None:
        durations = (self.pause, self.longest, self.quiet)
        if type(self.free) is not int or not all(isinstance(each, timedelta) for each in durations):
            raise ConfigurationError(
                "A limit is made of a whole number and of timedeltas: "
                "Limit(free=10, longest=timedelta(minutes=15))"
            )
        if self.free < 1 or not timedelta(0) < self.pause <= self.longest <= self.quiet <= _YEAR:
            raise ConfigurationError(
                "A limit needs free >= 1 and durations with 0 < pause <= longest <= quiet <= 366 days"
            )

    def after(self, count: int) -> timedelta:
        """Return the pause after *count* attempts."""
        if count < self.free:
            return timedelta(0)
        enough = (self.longest // self.pause).bit_length()
        return min(self.pause * (1 << min(count - self.free, enough)), self.longest)


@dataclass(frozen=True, slots=True)
class Counted:
    """One attempt, as it was counted by one counter.

    Attributes:
        key: The counter.
        failures: Failures in a row, if this one fails.
        limited: It counts against the limit, and not only as a failure in a row.
        count: What the counter showed then.
        at, before: When it was counted, and the one before it.
    """

    key: str
    failures: int
    limited: bool = True
    count: int = 0
    at: datetime | None = None
    before: datetime | None = None

    @property
    def of_source(self) -> bool:
        """It counts what comes from one source, whatever the account."""
        return self.key.startswith(_SOURCE)


class CountingThrottle(ABC):
    """The rules that throttles share; where the counts are kept is left to subclasses.

    Source first, then the account. If the account is blocked and the source is one from which the
    user has logged in before, a counter of the two together decides instead, while the failures in
    a row still count for the account.

    Args:
        max_failures: Failures in a row after which the password is disabled until it is changed
            (NIST SP 800-63B-4, 3.2.2: at most 100).

    Raises:
        ConfigurationError: ``max_failures`` is not between 1 and 100.
    """

    def __init__(self, max_failures: int) -> None:
        if type(max_failures) is not int or not 1 <= max_failures <= 100:
            raise ConfigurationError(
                "A throttle must disable a password after at most 100 failures in a row "
                "(NIST SP 800-63B-4, 3.2.2): choose max_failures between 1 and 100"
            )
        self._max_failures = max_failures

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Count an attempt before its password is checked.

        Raises:
            ThrottledError: Too many came before; it was not counted.
        """
        source = None
        if attempt.source is not None:
            source = await self._take(_SOURCE + attempt.source)
        try:
            counted = await self._take_account(attempt)
        except Exception:  # not a cancellation: nobody waits any more, least of all for a store
            if source is not None:
                await self._give_back(source)
            raise
        failures = counted[0].failures
        return Reservation(
            attempt=attempt,
            locked=failures > self._max_failures,
            locks=failures == self._max_failures,
            counted=counted if source is None else (*counted, source),
        )

    async def failed(self, reservation: Reservation) -> None:  # noqa: B027 - the usual case, not a gap
        """The password was wrong: what was counted stays."""

    async def succeeded(self, reservation: Reservation) -> None:
        """Forget the failures of the account; give the source its attempt back, and no more."""
        for counted in reservation.counted:
            await (self._give_back(counted) if counted.of_source else self._forget(counted))

    async def released(self, reservation: Reservation) -> None:
        """Give every counter its attempt back."""
        for counted in reservation.counted:
            await self._give_back(counted)

    async def _take_account(self, attempt: Attempt) -> tuple[Counted, ...]:
        key = _ACCOUNT + attempt.account
        try:
            return (await self._take(key),)
        except ThrottledError:
            if attempt.source is None or not await attempt.familiar():
                raise
        own = await self._take(f"{_FAMILIAR}{attempt.account}:{attempt.source}")
        return await self._take(key, unlimited=True), own

    @staticmethod
    def _is_source(key: str) -> bool:
        return key.startswith(_SOURCE)

    @staticmethod
    def _is_account(key: str) -> bool:
        """Failures in a row are those of an account, and of nothing else."""
        return key.startswith(_ACCOUNT)

    @abstractmethod
    async def _take(self, key: str, *, unlimited: bool = False) -> Counted:
        """Count one attempt in one atomic step; if *unlimited* only its failure in a row.

        Raises:
            ThrottledError: It is too early.
        """

    @abstractmethod
    async def _give_back(self, counted: Counted) -> None:
        """Take one attempt off a counter."""

    @abstractmethod
    async def _forget(self, counted: Counted) -> None:
        """Set a counter to zero."""


class DatabaseThrottle(CountingThrottle):
    """Counts attempts in a table of the host's own database.

    Counts hold even if a transaction of the caller is rolled back. If the database fails, the
    attempt is refused with an error, never let through.

    Args:
        account: The limit for one account, from wherever the attempts come: 10 free by default.
        source: The limit for one source, whatever accounts it tries: 50 free by default, because
            many people share an address. Successes do not count.
        max_failures: See `CountingThrottle`.
        clock: The time.

    Raises:
        ConfigurationError: ``max_failures`` is not between 1 and 100, or an argument is of
            another type.
    """

    def __init__(
        self,
        *,
        account: Limit = Limit(free=10),
        source: Limit = Limit(free=50, quiet=timedelta(hours=1)),
        max_failures: int = 100,
        clock: Clock = utc_now,
    ) -> None:
        super().__init__(max_failures)
        if not (isinstance(account, Limit) and isinstance(source, Limit)):
            raise ConfigurationError("DatabaseThrottle takes limits: account=Limit(free=10)")
        self._account = account
        self._source = source
        self._clock = checked_clock(clock)
        self._counters = _Counters()

    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong: what was counted stays, whatever became of the caller's transaction."""
        for counted in reservation.counted:
            await self._counters.save(counted.key)

    async def purge(self) -> int:
        """Delete counters that say nothing any more; return how many.

        Those with failures in a row are kept: these never expire.
        """
        old = self._clock() - max(self._account.quiet, self._source.quiet)
        return await self._counters.purge(old)

    async def _take(self, key: str, *, unlimited: bool = False) -> Counted:
        for _ in range(_MAX_RACES):
            now = self._clock()
            row = await self._counters.read(key, now)
            if row.last_at > now:
                # The clock was set back: the pause begins again, lest it lasts until the clock has
                # come to where it was.
                await self._counters.swap(row, row.count, row.failures, now)
                continue
            count, at = (row.count, row.last_at) if unlimited else (self._next(row, now), now)
            failures = row.failures + 1 if self._is_account(key) else 0
            if await self._counters.swap(row, count, failures, at):
                return Counted(key, failures, not unlimited, count, at, before=row.last_at)
        raise ThrottledError(self._account.pause.total_seconds())

    def _next(self, row: AttemptCount, now: datetime) -> int:
        """Return the count with one more attempt."""
        limit = self._source if self._is_source(row.key) else self._account
        elapsed = now - row.last_at
        count = 0 if elapsed >= limit.quiet else row.count
        wait = limit.after(count) - elapsed
        if wait > timedelta(0):
            raise ThrottledError(wait.total_seconds())
        return count + 1

    async def _give_back(self, counted: Counted) -> None:
        for _ in range(_MAX_RACES):
            row = await self._counters.read(counted.key, self._clock())
            count = max(row.count - int(counted.limited), 0)
            # It must not prolong the pause either, unless somebody else has since.
            at = counted.before if row.last_at == counted.at else row.last_at
            if await self._counters.swap(row, count, max(row.failures - 1, 0), at or row.last_at):
                return

    async def _forget(self, counted: Counted) -> None:
        row = AttemptCount(
            key=counted.key, count=counted.count, failures=counted.failures, last_at=counted.at
        )
        for _ in range(_MAX_RACES):
            if await self._counters.swap(row, 0, 0, row.last_at):
                return
            row = await self._counters.read(counted.key, self._clock())


class _Counters:
    """The table of counters, which no transaction of the caller takes back.

    On PostgreSQL it is written through a connection outside of that transaction. SQLite has one
    connection: there, what is counted within a transaction is kept in memory until it is over.
    """

    def __init__(self) -> None:
        self._unsaved: dict[str, AttemptCount] = {}

    async def read(self, key: str, now: datetime) -> AttemptCount:
        """Return a counter; a new one begins *now*."""
        connection = _connection()
        if not is_transaction(connection):
            await self.save(key)
            return await _row(connection, key, now)
        if key in self._unsaved:
            return self._unsaved[key]
        row = await AttemptCount.filter(key=key).using_db(connection).first()
        return row or AttemptCount(key=key, last_at=now)

    async def swap(self, row: AttemptCount, count: int, failures: int, at: datetime) -> bool:
        """Write a counter if it is still as it was read."""
        connection = _connection()
        if not is_transaction(connection):
            return await _swap(connection, row, count, failures, at)
        if self._unsaved.get(row.key, row) is not row:
            return False
        self._unsaved[row.key] = AttemptCount(
            key=row.key, count=count, failures=failures, last_at=at
        )
        return True

    async def save(self, key: str) -> None:
        """Write what was counted within a transaction, now that it is over."""
        connection = _connection()
        for _ in range(_MAX_RACES):
            unsaved = self._unsaved.get(key)
            if unsaved is None or is_transaction(connection):
                return
            row = await _row(connection, key, unsaved.last_at)
            saved = await _swap(connection, row, unsaved.count, unsaved.failures, unsaved.last_at)
            if saved and self._unsaved.get(key) is unsaved:
                del self._unsaved[key]

    async def purge(self, before: datetime) -> int:
        """Delete the counters that nobody has touched since, but those with failures in a row."""
        for key in tuple(self._unsaved):
            await self.save(key)
        stale = AttemptCount.filter(last_at__lt=before, failures=0)
        return await stale.using_db(_connection()).delete()


def _connection() -> BaseDBAsyncClient:
    """Return where counts are written: in a transaction of the caller only if there is no other way."""
    connection = connection_for(AttemptCount)
    if is_transaction(connection) and connection.capabilities.dialect != "sqlite":
        return root_of(connection)
    return connection


async def _row(connection: BaseDBAsyncClient, key: str, now: datetime) -> AttemptCount:
    """Return a counter; insert it where there is none, without an error if somebody else does."""
    found = AttemptCount.filter(key=key).using_db(connection)
    row = await found.first()
    if row is None:
        new = AttemptCount(key=key, last_at=now)
        # Not in bulk: Tortoise leaves that transaction open on SQLite's one connection when cancelled.
        with suppress(IntegrityError):
            await new.save(force_create=True, using_db=connection)
        row = await found.first()
    return row if row is not None else new


async def _swap(
    connection: BaseDBAsyncClient, row: AttemptCount, count: int, failures: int, at: datetime
) -> bool:
    """Write a counter if it is still as it was read.

    The time is compared, too: after a quiet time a counter of 1 becomes 1 again.
    """
    unchanged = AttemptCount.filter(
        key=row.key, count=row.count, failures=row.failures, last_at=row.last_at
    )
    return bool(
        await unchanged.using_db(connection).update(count=count, failures=failures, last_at=at)
    )


def source_of(ip: str | None) -> str | None:
    """Return the network that counts as one source: an IPv4 address, the /64 of an IPv6 address.

    Anything else is taken as it is: the caller knows what it gives.
    """
    if ip is None or not ip.strip():
        return None
    try:
        address = ipaddress.ip_address(ip.strip())
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)
