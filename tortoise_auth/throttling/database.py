"""A throttle in the host's own database, which needs no further service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from weakref import WeakValueDictionary

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import checked_clock
from tortoise_auth.database import in_caller_transaction
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.throttling.counters import MAX_RACES, Count, Counters
from tortoise_auth.throttling.protocol import (
    FAILURES_KEPT,
    LOCKED,
    TELLING,
    TOLD,
    Counted,
    CountingThrottle,
    Limit,
    Reservation,
    TooEarly,
)

_TOLD_BY = "telling:"


_ACCOUNT_LIMIT = Limit(free=10)
_SOURCE_LIMIT = Limit(free=50, quiet=timedelta(hours=1))
_SKEW = timedelta(seconds=5)
"""How much the clocks of machines that share a database may differ."""


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
        account: Limit = _ACCOUNT_LIMIT,
        source: Limit = _SOURCE_LIMIT,
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
