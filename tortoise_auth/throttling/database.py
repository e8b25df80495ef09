"""A throttle in the host's own database, which needs no further service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.expressions import Q

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.config import checked_clock
from tortoise_auth.database import (
    BATCH_SIZE,
    batches,
    connection_for,
    dialect_of,
    is_transaction,
    root_of,
    run_statement,
    unless_kept,
)
from tortoise_auth.database.dialects import Statement, attempts
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.models import AttemptCount
from tortoise_auth.throttling.protocol import (
    FAILURES_KEPT,
    UNDECIDED,
    Backoff,
    Counted,
    CountingThrottle,
    Reservation,
    TooEarly,
)

_ACCOUNT_BACKOFF = Backoff(free_attempts=10)
_SOURCE_BACKOFF = Backoff(free_attempts=50, reset_after=timedelta(hours=1))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_UNDECIDED = UNDECIDED // _MICROSECOND
_SKEW = 5_000_000
"""How much the clocks of machines that share a database may differ, in microseconds."""
_MAX_TRIES = 100
"""How often a counter is tried that was blocked, and was not when it was looked at after that."""


@dataclass(frozen=True, slots=True)
class _Row(Counted):
    """One attempt in one row.

    Attributes:
        at: When it was counted, in microseconds since 1970.
    """

    at: int = -1


class DatabaseThrottle(CountingThrottle):
    """Counts attempts in a table of the host's own database.

    Counts hold even if a transaction of the caller is rolled back. If the database fails, the
    attempt is rejected with an error, never let through.

    Args:
        account: The back-off for one account, from wherever the attempts come: 10 free by default.
        source: The back-off for one source, whatever accounts it tries: 50 free by default, because
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
        account: Backoff = _ACCOUNT_BACKOFF,
        source: Backoff = _SOURCE_BACKOFF,
        max_failures: int = 100,
        clock: Clock = utc_now,
    ) -> None:
        super().__init__(max_failures)
        if not (isinstance(account, Backoff) and isinstance(source, Backoff)):
            raise ConfigurationError(
                "DatabaseThrottle takes back-offs: account=Backoff(free_attempts=10)"
            )
        self._account = account
        self._source = source
        self._clock = checked_clock(clock)
        self._written: dict[tuple[bool, ...], tuple[Statement, Statement]] = {}

    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong: what was counted stays, and is not in flight any more."""
        for counted in reservation.counted:
            await run_statement(_connection(), attempts.DECIDE, {"key": counted.key})

    async def succeeded(
        self, reservation: Reservation, *, using_db: BaseDBAsyncClient | None = None
    ) -> None:
        """Reset the account and give the source its attempt back.

        Args:
            reservation: The attempt; with *using_db*, what `source_released` returned.
            using_db: The transaction of the login, to reset in it. Warning: until it ends, every
                attempt of the account waits for the row; so never a transaction of the caller.
        """
        if using_db is None:
            return await super().succeeded(reservation)
        for counted in self._to_reset(reservation):
            await run_statement(using_db, attempts.RESET, {"key": counted.key})

    async def source_released(self, reservation: Reservation) -> Reservation:
        """Give the source its attempt back; return the reservation of the account, still in flight.

        For a login that resets the account in its own transaction, before that begins: all users
        behind one address share the row of the source, and it would stay locked until the commit.
        """
        for counted in reservation.counted:
            if counted.of_source:
                await self._give_back(counted)
        rest = (counted for counted in reservation.counted if not counted.of_source)
        return replace(reservation, counted=tuple(rest))

    async def purge(self) -> int:
        """Delete counters that say nothing any more; return how many.

        Those with failures in a row are kept for 400 days after the last one.
        """
        now, deleted, place = self._now(), 0, (-1, "")
        reset = now - max(self._account.reset_after, self._source.reset_after) // _MICROSECOND
        forgotten = Q(reserved_at__lt=now - FAILURES_KEPT // _MICROSECOND)
        stale = Q(reserved_at__lt=reset, failures=0) | forgotten
        counters = AttemptCount.all().using_db(_connection())
        async for _ in batches():  # pragma: no branch - it never ends by itself
            # From where the last batch ended: those that are kept are looked at once.
            at, key = place
            behind = Q(reserved_at__gt=at) | Q(reserved_at=at, key__gt=key)
            old = counters.filter(behind, reserved_at__gte=at, reserved_at__lt=reset)
            oldest = old.order_by("reserved_at", "key").limit(BATCH_SIZE)
            rows = await oldest.values_list("reserved_at", "key")
            if rows:  # a counter that was used since is not stale any more
                keys = [key for _, key in rows]
                deleted += await counters.filter(stale, key__in=keys).delete()
            if len(rows) < BATCH_SIZE:
                break
            place = rows[-1]
        return deleted

    async def _peek(self, counted: Counted) -> None:
        row = await AttemptCount.filter(key=counted.key).using_db(_connection()).first()
        if row is not None:
            await self._reject_if_blocked(counted, row)

    async def _take(self, counted: Counted) -> Counted:
        connection = _connection()
        statement, again = self._statements(counted)
        for _ in range(_MAX_TRIES):
            values = {"key": counted.key, "now": self._now()}
            rows = await run_statement(connection, statement, values)
            if rows:
                at = rows[0]["counted_at"] if counted.limited else -1
                taken = _Row(counted.key, rows[0]["failures"], counted.limited, at)
                # It was granted, and counts whatever others have done meanwhile.
                await _repeat_if_lost(connection, again, values)
                return taken
            await self._peek(counted)
        raise TooEarly(self._backoff(counted).initial_delay.total_seconds())

    async def _give_back(self, counted: Counted) -> None:
        connection = _connection()
        values = await self._give_back_on(connection, counted)
        await _repeat_if_lost(connection, attempts.GIVE_BACK, values)

    @staticmethod
    async def _give_back_on(connection: BaseDBAsyncClient, counted: Counted) -> dict[str, object]:
        at = counted.at if isinstance(counted, _Row) else -1
        values = {"key": counted.key, "limited": int(counted.limited), "at": at}
        await run_statement(connection, attempts.GIVE_BACK, values)
        return values

    async def _reset(self, counted: Counted) -> None:
        await run_statement(_connection(), attempts.RESET, {"key": counted.key})

    async def _reject_if_blocked(self, counted: Counted, row: AttemptCount) -> None:
        """Raise if the row would reject one more, for the reasons for which `attempts.take` does.

        If the clock was set back, the delay begins again: else it would last until the clock has
        come to where it was.
        """
        now, backoff = self._now(), self._backoff(counted)
        elapsed = now - row.counted_at
        delay = backoff.after(row.count) // _MICROSECOND if counted.limited else 0
        decided = not row.in_flight or abs(now - row.reserved_at) >= _UNDECIDED
        if elapsed < -_SKEW and delay:
            # Not if another attempt was counted since this row was read.
            unchanged = AttemptCount.filter(key=row.key, counted_at=row.counted_at)
            await unchanged.using_db(_connection()).update(counted_at=now)
        wait = delay - max(elapsed, 0)
        if counted.of_account and row.failures >= self._max_failures and not decided:
            wait = max(wait, backoff.initial_delay // _MICROSECOND)
        if wait > 0:
            raise TooEarly(wait / 1_000_000, in_flight=None if decided else row.key)

    def _statements(self, counted: Counted) -> tuple[Statement, Statement]:
        """Return what counts an attempt, and what counts it again; written once for each kind."""
        kind = (counted.limited, counted.of_account, counted.of_source)
        if kind not in self._written:
            numbers = self._numbers(counted)
            self._written[kind] = attempts.take(numbers), attempts.take_again(numbers)
        return self._written[kind]

    def _numbers(self, counted: Counted) -> dict[str, int]:
        backoff = self._backoff(counted)
        return {
            "limited": int(counted.limited),
            "fails": int(counted.of_account),
            "max_failures": self._max_failures,
            "free": backoff.free_attempts,
            "doublings": backoff.doublings,
            "initial_delay": backoff.initial_delay // _MICROSECOND,
            "max_delay": backoff.max_delay // _MICROSECOND,
            "reset_after": backoff.reset_after // _MICROSECOND,
            "skew": _SKEW,
            "undecided": _UNDECIDED,
        }

    def _backoff(self, counted: Counted) -> Backoff:
        return self._source if counted.of_source else self._account

    def _now(self) -> int:
        return (self._clock() - _EPOCH) // _MICROSECOND


def _connection() -> BaseDBAsyncClient:
    """Return where attempts are counted: in a transaction of the caller only if there is no other way."""
    connection = connection_for(AttemptCount)
    if is_transaction(connection) and not dialect_of(connection).has_one_connection:
        return root_of(connection)
    return connection


async def _repeat_if_lost(
    connection: BaseDBAsyncClient, statement: Statement, values: Mapping[str, object]
) -> None:
    """Let a count hold although the caller rolls it back, before others can count."""
    again = partial(run_statement, statement=statement, values=values)
    await unless_kept(connection, again)
