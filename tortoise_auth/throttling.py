"""Slow down guessing: a protocol, and an implementation in the database that needs no further service.

An attempt is *reserved* before the password is hashed, so that a burst cannot be heard faster than
it is counted. After a few free failures each one doubles the pause. Live sessions, refresh and
password resets are not touched, and a source from which the user has logged in before has a budget
of its own: guessing from elsewhere cannot keep the user out.
"""

from __future__ import annotations

import asyncio
import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol
from weakref import WeakValueDictionary

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import checked_clock
from tortoise_auth.counters import MAX_RACES, Count, Counters
from tortoise_auth.database import in_caller_transaction
from tortoise_auth.exceptions import ConfigurationError, ThrottledError

_ACCOUNT, _FAMILIAR, _SOURCE, _TOLD_BY = "account:", "familiar:", "source:", "telling:"

FAILURES_KEPT = timedelta(days=400)
"""How long failures in a row are remembered after the last one."""

LOCKED = 1 << 20
"""Added to the failures in a row of an account when it is locked for good: it needs no column."""

TOLD = 1 << 24
"""Added when that has been told."""

TELLING = timedelta(minutes=1)
"""How long whoever has undertaken to tell it may take: after that he is believed to be dead."""

_SKEW = timedelta(seconds=5)
"""How much the clocks of machines that share a database may differ."""


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
        locks: If this attempt fails, the account is to be locked: `Throttle.lock` it.
        untold: It had so many failures before, but nobody has been told that it is locked. Either
            the last of them is still being checked, or whoever was to tell it failed: then `lock` it.
        counted: What was counted, for the throttle alone.
    """

    attempt: Attempt
    locked: bool = False
    locks: bool = False
    untold: bool = False
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

    async def lock(self, reservation: Reservation) -> bool:
        """Lock the account for good, unless its failures have been forgotten meanwhile.

        Returns:
            Whether the caller is to tell that it is locked: nobody has, and nobody else is about to.
        """
        ...

    async def told(self, reservation: Reservation) -> None:
        """That the account is locked has been told; ``untold`` is not true of it any more."""
        ...


class TooEarly(ThrottledError):
    """What our own throttles raise; the same error, but it knows the counter.

    Attributes:
        of_source: Too much came from the source, and not only for the account.
    """

    def __init__(self, retry_after: float, *, of_source: bool) -> None:
        super().__init__(retry_after)
        self.of_source = of_source


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

    Source first, then the account, but who is refused for the account counts nowhere. If the
    account is blocked and the source is one from which the user has logged in before, a counter of
    the two together decides instead, while the failures in a row still count for the account.

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
        seen = await self._look(attempt)
        source = None
        if attempt.source is not None:
            source = await self._take(_SOURCE + attempt.source)
        try:
            counted = await self._take_account(attempt, seen)
        except Exception:  # not a cancellation: nobody waits any more, least of all for a store
            if source is not None:
                await self._give_back(source)
            raise
        failures = counted[0].failures
        return Reservation(
            attempt=attempt,
            locked=failures > self._max_failures,
            locks=failures == self._max_failures,
            untold=self._max_failures < failures < TOLD,
            counted=counted if source is None else (*counted, source),
        )

    async def failed(self, reservation: Reservation) -> None:  # noqa: B027 - the usual case, not a gap
        """The password was wrong: what was counted stays."""

    async def succeeded(self, reservation: Reservation) -> None:
        """Forget the failures of the account; give the source its attempt back, and no more.

        An account that was locked while this attempt was checked stays so.
        """
        for counted in reservation.counted:
            await (self._give_back(counted) if counted.of_source else self._forget(counted))

    async def released(self, reservation: Reservation) -> None:
        """Give every counter its attempt back."""
        for counted in reservation.counted:
            await self._give_back(counted)

    async def lock(self, reservation: Reservation) -> bool:
        """Lock the account for good, unless its failures have been forgotten meanwhile.

        Returns:
            Whether the caller is to tell it. He has a minute: he may be killed, or the database may
            refuse the row of a handler, and then an attempt after that minute tells it.
        """
        account = reservation.counted[0]
        return await self._lock(account) and await self._undertake_to_tell(account)

    async def told(self, reservation: Reservation) -> None:
        """Remember that somebody knows of the lock."""
        await self._remember_told(reservation.counted[0])

    async def _look(self, attempt: Attempt) -> Count | None:
        """Look at the account without counting, so that refusing an attempt writes nothing."""
        try:
            return await self._peek(_ACCOUNT + attempt.account)
        except TooEarly:
            if attempt.source is None or not await attempt.familiar():
                raise
        return None

    async def _take_account(self, attempt: Attempt, seen: Count | None) -> tuple[Counted, ...]:
        key = _ACCOUNT + attempt.account
        try:
            return (await self._take(key, seen=seen),)
        except TooEarly:
            if attempt.source is None or not await attempt.familiar():
                raise
        own = await self._take(f"{_FAMILIAR}{attempt.account}:{attempt.source}")
        try:
            return await self._take(key, unlimited=True), own
        except Exception:
            await self._give_back(own)
            raise

    @staticmethod
    def _is_source(key: str) -> bool:
        return key.startswith(_SOURCE)

    @staticmethod
    def _is_account(key: str) -> bool:
        """Failures in a row are those of an account, and of nothing else."""
        return key.startswith(_ACCOUNT)

    async def _peek(self, key: str) -> Count | None:
        """Return a counter as it is, for `_take` to go by, if looking is cheaper than counting.

        Raises:
            TooEarly: It would refuse one more.
        """
        return None

    @abstractmethod
    async def _take(
        self, key: str, *, unlimited: bool = False, seen: Count | None = None
    ) -> Counted:
        """Count one attempt in one atomic step; if *unlimited* only its failure in a row.

        Raises:
            TooEarly: It is.
        """

    @abstractmethod
    async def _give_back(self, counted: Counted) -> None:
        """Take one attempt off a counter."""

    @abstractmethod
    async def _forget(self, counted: Counted) -> None:
        """Set a counter to zero, unless it is that of a locked account."""

    @abstractmethod
    async def _lock(self, counted: Counted) -> bool:
        """Add `LOCKED` to the failures in a row once, if they are so many.

        Returns:
            Whether it is added, by whomever, and `TOLD` is not.
        """

    @abstractmethod
    async def _undertake_to_tell(self, counted: Counted) -> bool:
        """Tell whether nobody has called this within the last minute."""

    @abstractmethod
    async def _remember_told(self, counted: Counted) -> None:
        """Add `TOLD` to the failures in a row of a locked account, if it has not been added."""


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
        self._counters = Counters()
        self._turns: WeakValueDictionary[tuple[int, str], _Turn] = WeakValueDictionary()

    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong: what was counted stays, whatever became of the caller's transaction."""
        await self._counters.save()

    async def purge(self) -> int:
        """Delete counters that say nothing any more; return how many.

        Those with failures in a row are kept for 400 days after the last one, and those of locked
        accounts for good.
        """
        now = self._clock()
        quiet = now - max(self._account.quiet, self._source.quiet)
        return await self._counters.purge(quiet, now - FAILURES_KEPT, self._max_failures)

    async def _peek(self, key: str) -> Count:
        row = await self._current(key)
        self._with_one_more(row, unlimited=False)
        return row

    async def _take(
        self, key: str, *, unlimited: bool = False, seen: Count | None = None
    ) -> Counted:
        changed = await self._change(key, partial(self._with_one_more, unlimited=unlimited), seen)
        if changed is None:
            raise self._too_many_others(key)
        before, now = changed
        return Counted(key, now.failures, not unlimited, now.count, now.last_at, before.last_at)

    def _with_one_more(self, row: Count, *, unlimited: bool) -> Count:
        of_source = self._is_source(row.key)
        now = max(self._clock(), row.last_at)  # the clock of another machine may be ahead
        failures = row.failures + 1 if self._is_account(row.key) else 0
        if unlimited:
            return replace(row, failures=failures)
        limit = self._source if of_source else self._account
        elapsed = now - row.last_at
        count = 0 if elapsed >= limit.quiet else row.count
        wait = limit.after(count) - elapsed
        if wait > timedelta(0):
            raise TooEarly(wait.total_seconds(), of_source=of_source)
        return replace(row, count=count + 1, failures=failures, last_at=now)

    async def _give_back(self, counted: Counted) -> None:
        def without_it(row: Count) -> Count:
            # It must not prolong the pause either, unless somebody else has since.
            at = counted.before if row.last_at == counted.at else row.last_at
            return replace(
                row,
                count=max(row.count - int(counted.limited), 0),
                failures=max(row.failures - 1, 0),
                last_at=at or row.last_at,
            )

        await self._change(counted.key, without_it)

    async def _forget(self, counted: Counted) -> None:
        def without_failures(row: Count) -> Count | None:
            return replace(row, count=0, failures=0) if row.failures < LOCKED else None

        at = counted.at or self._clock()
        as_counted = Count(counted.key, at, counted.count, counted.failures)
        await self._change(counted.key, without_failures, first=as_counted)

    async def _lock(self, counted: Counted) -> bool:
        def with_lock(row: Count) -> Count | None:
            is_due = self._max_failures <= row.failures < LOCKED
            return replace(row, failures=row.failures + LOCKED) if is_due else None

        await self._change(counted.key, with_lock)
        return LOCKED <= (await self._current(counted.key)).failures < TOLD

    async def _undertake_to_tell(self, counted: Counted) -> bool:
        def undertaken(row: Count) -> Count | None:
            now = self._clock()
            is_free = not row.count or now - row.last_at >= TELLING
            return replace(row, count=1, last_at=now) if is_free else None

        return await self._change(_TOLD_BY + counted.key, undertaken) is not None

    async def _remember_told(self, counted: Counted) -> None:
        def with_that(row: Count) -> Count | None:
            is_untold = LOCKED <= row.failures < TOLD
            return replace(row, failures=row.failures + TOLD) if is_untold else None

        await self._change(counted.key, with_that)

    async def _change(
        self, key: str, change: Callable[[Count], Count | None], first: Count | None = None
    ) -> tuple[Count, Count] | None:
        """Change a counter in one atomic step; in this process one after the other.

        Counts are right without that, but of many at once all but one would have to read again, and
        again. Whoever is refused waits for nobody, and who has waited goes by what the one before
        has written, so that a queue ends as soon as one of it is too early.

        Args:
            key: The counter.
            change: Returns what it is to be; ``None`` to leave it. It may raise.
            first: The counter as it probably is, to save a look.

        Returns:
            The counter before and after; ``None`` if it was left, or others were always faster.
        """
        turn = self._turn(key)
        seen = turn.seen
        row = first or await self._current(key)
        if change(row) is None:
            return None
        waits = turn.lock.locked()
        async with turn.lock:
            if waits:
                row = turn.row if turn.row and turn.seen > seen else await self._current(key)
            for _ in range(MAX_RACES):
                changed = change(row)
                if changed is None:
                    return None
                if await self._counters.swap(row, changed):
                    turn.saw(changed)
                    return row, changed
                row = await self._current(key)
                turn.saw(row)
        return None

    def _turn(self, key: str) -> _Turn:
        """Return the turn of those who change a counter.

        Inside a transaction of the caller everybody has one of his own: whoever has the turn may
        wait for the connection which that transaction holds.
        """
        if in_caller_transaction():
            return _Turn()
        return self._turns.setdefault((id(asyncio.get_running_loop()), key), _Turn())

    async def _current(self, key: str) -> Count:
        for _ in range(MAX_RACES):
            row = await self._counters.read(key, self._clock())
            now = self._clock()  # not the time before: others have counted since
            if row.last_at - now <= _SKEW:
                return row
            # The clock was set back: the pause begins again, lest it lasts until the clock has come
            # to where it was.
            await self._counters.swap(row, replace(row, last_at=now))
        raise self._too_many_others(key)

    def _too_many_others(self, key: str) -> TooEarly:
        return TooEarly(self._account.pause.total_seconds(), of_source=self._is_source(key))


class _Turn:
    """Whose turn it is to change a counter, and what those before saw of it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.row: Count | None = None
        self.seen = 0

    def saw(self, row: Count) -> None:
        """Note the counter as it is in the table now."""
        self.row = replace(row, is_new=False)
        self.seen += 1


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
