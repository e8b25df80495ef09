"""Throttling: the contract of every throttle, and the rest of the throttle in the database."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tortoise.context import TortoiseContext
from tortoise.exceptions import OperationalError
from tortoise.transactions import in_transaction

from tests.support.accounts import SECRET
from tests.support.database import address
from tests.support.snippets import run, snippets
from tests.support.statements import statements
from tests.support.throttles import (
    ABROAD,
    BUDGET,
    BURST,
    ELSEWHERE,
    HERE,
    LIMIT,
    Make,
    ThrottleContract,
    attempt,
    burst,
    fail,
    granted_to_processes,
    race,
    refused,
    succeed,
    yes,
)
from tortoise_auth import AuthConfig, AuthService
from tortoise_auth.database import dialects
from tortoise_auth.exceptions import ConfigurationError, ThrottledError
from tortoise_auth.models import AttemptCount
from tortoise_auth.testing import FakeClock
from tortoise_auth.throttling import (
    Backoff,
    DatabaseThrottle,
    TooEarly,
    database,
    source_of,
)
from tortoise_auth.throttling.protocol import Counted


class TestDatabaseThrottle(ThrottleContract):
    @pytest.fixture
    def make(self, db: TortoiseContext, clock: FakeClock) -> Make:
        """Make a throttle on every database."""

        def make(
            *, account: int = 1000, source: int = 1000, max_failures: int = 100
        ) -> DatabaseThrottle:
            return DatabaseThrottle(
                account=Backoff(free_attempts=account),
                source=Backoff(free_attempts=source),
                max_failures=max_failures,
                clock=clock,
            )

        return make


def all_statements_at_once(monkeypatch: pytest.MonkeyPatch, callers: int) -> None:
    """Let the first *callers* that count go on only when all of them are ready."""
    run_statement = dialects.run_statement
    barrier = asyncio.Barrier(callers)
    came = 0

    async def together(connection: Any, statement: str, values: Any) -> Any:
        nonlocal came
        came += 1
        if came <= callers:
            await barrier.wait()
        return await run_statement(connection, statement, values)

    monkeypatch.setattr(database, "run_statement", together)


class TestRaces:
    async def test_all_at_once(
        self, server: TortoiseContext, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of fifty attempts whose statements start at the same moment five are checked."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=BUDGET), clock=clock)
        all_statements_at_once(monkeypatch, BURST)
        granted, late = await burst(throttle, [attempt(source=None)] * BURST)
        assert (len(granted), len(late)) == (BUDGET, BURST - BUDGET)
        row = await AttemptCount.get()
        assert (row.count, row.failures, row.in_flight) == (BUDGET, BUDGET, BUDGET)

    @pytest.mark.parametrize("before", [1, BUDGET, BURST])
    async def test_after_a_quiet_time(
        self,
        server: TortoiseContext,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
        before: int,
    ) -> None:
        """Only five are checked, too, after a quiet time, whatever the count was before it."""
        limit = Backoff(free_attempts=BUDGET)
        at = microseconds(clock)
        await AttemptCount.create(
            key=f"source:{HERE}", count=before, counted_at=at, previous_at=at, reserved_at=at
        )
        clock.advance(limit.reset_after)
        attempts = [attempt(f"account {number}") for number in range(BURST)]
        all_statements_at_once(monkeypatch, BURST)
        granted, _ = await burst(DatabaseThrottle(source=limit, clock=clock), attempts)
        assert len(granted) == BUDGET

    async def test_two_processes(self, server: TortoiseContext) -> None:
        """Two processes share one budget."""
        url = address(server, maxsize=20)
        granted = await granted_to_processes(["-m", "tests.throttling.test_throttling", url])
        assert sum(granted) == BUDGET


class TestInFlight:
    async def test_refused_because_of_them(self, db: TortoiseContext, clock: FakeClock) -> None:
        """The error names the counter while attempts are in flight, and no counter once they are decided."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=1), clock=clock)
        reservation = await throttle.reserve(attempt(source=None))
        assert await in_flight(throttle) == "account:ada"
        await throttle.failed(reservation)
        assert await in_flight(throttle) is None

    async def test_ages_out(self, db: TortoiseContext, clock: FakeClock) -> None:
        """The attempt of a killed process counts as a failure after a minute."""
        throttle = DatabaseThrottle(
            account=Backoff(
                free_attempts=1, initial_delay=timedelta(hours=1), max_delay=timedelta(hours=1)
            ),
            clock=clock,
        )
        await throttle.reserve(attempt(source=None))
        clock.advance(timedelta(minutes=1) - timedelta(microseconds=1))
        assert await in_flight(throttle) == "account:ada"
        clock.advance(timedelta(microseconds=1))
        assert await in_flight(throttle) is None

    async def test_last_one_ages_out(self, db: TortoiseContext, clock: FakeClock) -> None:
        """If the process of the last attempt was killed, the next attempt exceeds the limit."""
        throttle = DatabaseThrottle(max_failures=1, clock=clock)
        await throttle.reserve(attempt(source=None))
        assert await refused(throttle, attempt(source=None)) == 1
        clock.advance(timedelta(minutes=1))
        assert (await throttle.reserve(attempt(source=None))).exceeded

    async def test_success_keeps_what_is_in_flight(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """A login gives attempts in flight no further guess."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=3), clock=clock)
        right, *wrong = [await throttle.reserve(attempt(source=None)) for _ in range(3)]
        await throttle.succeeded(right)
        for each in wrong:
            await throttle.failed(each)
        await fail(throttle, attempt(source=None))
        await refused(throttle, attempt(source=None))

    async def test_in_the_transaction_of_the_login(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """A rolled-back login resets nothing."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=2), clock=clock)
        await fail(throttle, attempt())
        right = await throttle.reserve(attempt())
        with pytest.raises(OSError, match="undo"):
            async with in_transaction() as transaction:
                await throttle.succeeded(right, using_db=transaction)
                raise OSError("undo")
        await refused(throttle, attempt())

    async def test_blocked_no_more(
        self, db: TortoiseContext, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An attempt that was blocked, and no longer is when read, is retried, but not for ever."""
        throttle = DatabaseThrottle(clock=clock)
        run_statement, calls = dialects.run_statement, 0

        async def blocked(connection: Any, statement: str, values: Any) -> Any:
            nonlocal calls
            calls += 1
            return [] if calls < 3 else await run_statement(connection, statement, values)

        monkeypatch.setattr(database, "run_statement", blocked)
        assert (await throttle.reserve(attempt(source=None))).failures == 1
        calls = -1000
        assert await refused(throttle, attempt(source=None)) == 1


async def in_flight(throttle: DatabaseThrottle) -> str | None:
    """Check that an attempt is rejected; return the counter of the attempts in flight."""
    with pytest.raises(TooEarly) as error:
        await throttle.reserve(attempt(source=None))
    return error.value.in_flight


def microseconds(clock: FakeClock) -> int:
    return round(clock().timestamp() * 1_000_000)


class TestPauses:
    async def test_double(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Each failure after the free ones doubles the pause, up to the longest."""
        throttle = DatabaseThrottle(
            account=Backoff(
                free_attempts=3, initial_delay=timedelta(seconds=2), max_delay=timedelta(seconds=30)
            ),
            clock=clock,
        )
        await fail(throttle, attempt(), 3)
        pauses = []
        for _ in range(7):
            pauses.append(await refused(throttle, attempt()))
            clock.advance(timedelta(seconds=pauses[-1]) - timedelta(microseconds=1))
            assert await refused(throttle, attempt()) == pytest.approx(1e-6)
            clock.advance(timedelta(microseconds=1))
            await fail(throttle, attempt())
        assert pauses == [2, 4, 8, 16, 30, 30, 30]

    async def test_defaults(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Ten attempts are free for an account; a hundred take a day, and the hundredth locks it (R33)."""
        throttle = DatabaseThrottle(clock=clock)
        ada = attempt(source=None)
        began, reservations = clock(), await fail(throttle, ada, 10)
        pauses = []
        while not reservations[-1].locks:
            pauses.append(await refused(throttle, ada))
            clock.advance(timedelta(seconds=pauses[-1]))
            reservations += await fail(throttle, ada)
        assert pauses[:11] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900]
        assert set(pauses[10:]) == {900}
        assert len(reservations) == 100
        assert clock() - began > timedelta(hours=20)

    async def test_quiet_time(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A quiet time resets the pauses, and never the failures in a row."""
        limit = Backoff(free_attempts=2, reset_after=timedelta(hours=1))
        throttle = DatabaseThrottle(account=limit, max_failures=5, clock=clock)
        await fail(throttle, attempt(), 2)
        clock.advance(timedelta(seconds=1))
        await fail(throttle, attempt())
        clock.advance(limit.reset_after)
        await fail(throttle, attempt())
        (fifth,) = await fail(throttle, attempt())
        assert fifth.locks
        assert await refused(throttle, attempt()) == 1
        clock.advance(timedelta(days=3650))
        assert (await throttle.reserve(attempt())).exceeded

    async def test_just_before_the_quiet_time_ends(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """Just before the quiet time ends the pauses still grow."""
        limit = Backoff(free_attempts=2, reset_after=timedelta(hours=1))
        throttle = DatabaseThrottle(account=limit, clock=clock)
        await fail(throttle, attempt(), 2)
        clock.advance(limit.reset_after - timedelta(microseconds=1))
        await fail(throttle, attempt())
        assert await refused(throttle, attempt()) == 2

    async def test_refusals_do_not_prolong(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Attempts during a pause do not prolong it."""
        throttle = DatabaseThrottle(
            account=Backoff(free_attempts=1, initial_delay=timedelta(seconds=10)), clock=clock
        )
        await fail(throttle, attempt())
        for left in range(10, 0, -1):
            assert await refused(throttle, attempt()) == left
            clock.advance(timedelta(seconds=1))
        await fail(throttle, attempt())

    async def test_defaults_of_a_source(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Fifty attempts are free for a source, and free again after an hour without failures."""
        throttle = DatabaseThrottle(clock=clock)
        for number in range(50):
            await fail(throttle, attempt(f"account {number}"))
        for pause in (1, 2, 4):
            assert await refused(throttle, attempt("ada")) == pause
            clock.advance(timedelta(seconds=pause))
            await fail(throttle, attempt("ada"))
        clock.advance(timedelta(hours=1))
        for number in range(50):
            await fail(throttle, attempt(f"account {number}"))
        await refused(throttle, attempt("ada"))

    async def test_of_a_source_do_not_grow_without_failures(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """Neither right passwords nor attempts at a blocked account prolong the pause of their source."""
        throttle = DatabaseThrottle(
            account=Backoff(
                free_attempts=1, initial_delay=timedelta(hours=1), max_delay=timedelta(hours=1)
            ),
            source=Backoff(free_attempts=2, initial_delay=timedelta(seconds=10)),
            clock=clock,
        )
        await fail(throttle, attempt("ada"))
        await fail(throttle, attempt("bob"))
        clock.advance(timedelta(seconds=10))
        for _ in range(3):
            assert await refused(throttle, attempt("ada")) == 3590
            await succeed(throttle, attempt("eve"))
        await fail(throttle, attempt("eve"))
        assert await refused(throttle, attempt("carl")) == 20

    async def test_attempts_at_the_same_time_are_given_back(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """Giving an attempt back does not shorten a pause that another caller has caused meanwhile."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=2), clock=clock)
        first = await throttle.reserve(attempt())
        clock.advance(timedelta(minutes=1))
        await fail(throttle, attempt(), 1)
        await throttle.released(first)
        await fail(throttle, attempt(), 1)
        assert await refused(throttle, attempt()) == 1

    async def test_known_source_does_not_prolong(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """Failures from a known source do not prolong the pause of other sources."""
        throttle = DatabaseThrottle(
            account=Backoff(free_attempts=2, initial_delay=timedelta(minutes=1)), clock=clock
        )
        await fail(throttle, attempt(source=ABROAD), 2)
        clock.advance(timedelta(seconds=30))
        await fail(throttle, attempt(known_source=yes), 2)
        assert await refused(throttle, attempt(source=ABROAD)) == 30


class TestClock:
    @pytest.mark.parametrize(
        "back", [timedelta(seconds=6), timedelta(days=3), timedelta(days=3650)]
    )
    async def test_set_back(self, db: TortoiseContext, clock: FakeClock, back: timedelta) -> None:
        """A clock that is set back ends no pause, and prolongs none beyond the longest (A172)."""
        limit = Backoff(free_attempts=2, max_delay=timedelta(minutes=1))
        throttle = DatabaseThrottle(account=limit, clock=clock)
        await fail(throttle, attempt(), 2)
        for pause in (1, 2, 4):
            clock.advance(timedelta(seconds=await refused(throttle, attempt())))
            await fail(throttle, attempt())
            assert await refused(throttle, attempt()) == 2 * pause
        clock.advance(-back)
        assert await refused(throttle, attempt()) == 8
        clock.advance(timedelta(seconds=7))
        assert await refused(throttle, attempt()) == 1
        clock.advance(timedelta(seconds=1))
        await fail(throttle, attempt())
        assert await refused(throttle, attempt()) == 16

    async def test_set_back_while_attempts_are_free(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """A clock that is set back adds no free attempts, and removes none."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=3), clock=clock)
        await fail(throttle, attempt(), 2)
        clock.advance(timedelta(days=-30))
        await fail(throttle, attempt())
        await refused(throttle, attempt())

    async def test_set_forward(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A clock that is set beyond the quiet time resets the pauses, as time does, and not the failures."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=2), max_failures=4, clock=clock)
        await fail(throttle, attempt(), 2)
        clock.advance(timedelta(days=3650))
        third, fourth = await fail(throttle, attempt(), 2)
        assert (third.locks, fourth.locks) == (False, True)
        assert await refused(throttle, attempt()) == 1

    async def test_ahead_elsewhere(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Clocks of two machines that differ a little do not restart the pause of a source."""
        limit = Backoff(free_attempts=1, max_delay=timedelta(minutes=1))
        ahead = FakeClock(clock() + timedelta(seconds=2))
        here, there = (DatabaseThrottle(source=limit, clock=each) for each in (clock, ahead))
        for number in range(12):
            pause = await self.pause(here, f"account {number}")
            for each in (clock, ahead):
                each.advance(pause)
            await fail(here, attempt(f"account {number}"))
        for each in (clock, ahead):
            each.advance(timedelta(minutes=2))
        right = await there.reserve(attempt("bob"))
        assert await refused(here, attempt("eve")) == 60
        await there.succeeded(right)
        await fail(here, attempt("eve"))

    @staticmethod
    async def pause(throttle: DatabaseThrottle, account: str) -> timedelta:
        """Return the seconds that an attempt has to wait."""
        try:
            await throttle.released(await throttle.reserve(attempt(account)))
        except ThrottledError as error:
            return timedelta(seconds=error.retry_after)
        return timedelta(0)

    @pytest.mark.parametrize("counter", ["account", "source"])
    async def test_forward_and_back(
        self, db: TortoiseContext, clock: FakeClock, counter: str
    ) -> None:
        """Attempts that were counted by a wrong clock cause no wait until that time."""
        limit = Backoff(free_attempts=2, max_delay=timedelta(minutes=1))
        throttle = DatabaseThrottle(account=limit, source=limit, clock=clock)
        attempts = [
            attempt(source=None) if counter == "account" else attempt(f"account {number}")
            for number in range(4)
        ]
        clock.advance(timedelta(days=365))
        for each in attempts[:2]:
            await fail(throttle, each)
        clock.advance(-timedelta(days=365))
        assert await refused(throttle, attempts[2]) == 1
        clock.advance(timedelta(seconds=1))
        await fail(throttle, attempts[2])
        assert await refused(throttle, attempts[3]) == 2


class TestBackoff:
    @pytest.mark.parametrize(
        "values",
        [
            {"free_attempts": 0},
            {"free_attempts": -1},
            {"free_attempts": 1, "initial_delay": timedelta(0)},
            {"free_attempts": 1, "initial_delay": timedelta(seconds=-1)},
            {
                "free_attempts": 1,
                "initial_delay": timedelta(hours=1),
                "max_delay": timedelta(minutes=1),
            },
            {"free_attempts": 1, "max_delay": timedelta(days=2), "reset_after": timedelta(days=1)},
            {"free_attempts": 1, "reset_after": timedelta.max},
        ],
        ids=str,
    )
    def test_nonsense(self, values: dict[str, Any]) -> None:
        """Invalid numbers are refused when the back-off is made."""
        with pytest.raises(
            ConfigurationError, match="0 < initial_delay <= max_delay <= reset_after"
        ):
            Backoff(**values)

    @pytest.mark.parametrize(
        "values",
        [{"free_attempts": "5"}, {"free_attempts": True}, {"free_attempts": 5, "max_delay": 300}],
        ids=str,
    )
    def test_other_types(self, values: dict[str, Any]) -> None:
        """A value that is no number or duration is refused, with an example."""
        with pytest.raises(ConfigurationError, match=r"Backoff\(free_attempts=10"):
            Backoff(**values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"account": 10}, r"account=Backoff\(free_attempts=10\)"),
            ({"source": Backoff}, r"account=Backoff\(free_attempts=10\)"),
            ({"max_failures": "5"}, "between 1 and 100"),
            ({"clock": datetime.now}, "aware datetime"),
            ({"clock": datetime(2026, 1, 1, tzinfo=UTC)}, "aware datetime"),
        ],
    )
    def test_throttle_of_other_types(self, values: dict[str, Any], message: str) -> None:
        """An invalid throttle is refused when it is made, not at the first login."""
        with pytest.raises(ConfigurationError, match=message):
            DatabaseThrottle(**values)

    @pytest.mark.parametrize("pause", [1e-6, 1, 59, 60, 61, 899, 900, 86400 * 300])
    def test_never_overflows(self, pause: float) -> None:
        """However many attempts fail, the pause is the longest one, without an overflow."""
        longest = timedelta(seconds=max(pause, 900))
        limit = Backoff(
            free_attempts=5,
            initial_delay=timedelta(seconds=pause),
            max_delay=longest,
            reset_after=timedelta(days=366),
        )
        assert limit.after(4) == timedelta(0)
        assert limit.after(5) == limit.initial_delay
        assert limit.after(6) == min(2 * limit.initial_delay, longest)
        pauses = [limit.after(count) for count in range(5, 200)]
        assert pauses == sorted(pauses)
        assert limit.after(60) == limit.after(10**9) == longest


class TestTransaction:
    """Attempts in a transaction of the caller."""

    @pytest.fixture
    def throttle(self, clock: FakeClock) -> DatabaseThrottle:
        """A throttle with three free attempts, whose fourth failure locks."""
        return DatabaseThrottle(account=Backoff(free_attempts=3), max_failures=4, clock=clock)

    @pytest.mark.parametrize("ending", ["commit", "rollback"])
    async def test_counts_stay(
        self, db: TortoiseContext, throttle: DatabaseThrottle, ending: str
    ) -> None:
        """Attempts that are counted in a transaction stay counted once, committed or rolled back."""
        reservations = []
        try:
            async with in_transaction():
                for _ in range(2):
                    reservations.append(await throttle.reserve(attempt()))
                if ending == "rollback":
                    raise OSError
        except OSError:
            pass
        for reservation in reservations:
            await throttle.failed(reservation)
        assert await AttemptCount.all().order_by("key").values("count", "failures") == [
            {"count": 2, "failures": 2},
            {"count": 2, "failures": 0},
        ]
        await fail(throttle, attempt())
        await refused(throttle, attempt())

    async def test_counts_at_once(self, db: TortoiseContext, throttle: DatabaseThrottle) -> None:
        """The budget holds within a transaction, even before its counts are written."""
        async with in_transaction():
            granted, _ = await burst(throttle, [attempt()] * 20)
            assert len(granted) == 3
            for each in granted:
                await throttle.released(each)
            await succeed(throttle, attempt())
            await fail(throttle, attempt(), 3)
            await refused(throttle, attempt())

    async def test_one_after_the_other(
        self, db: TortoiseContext, throttle: DatabaseThrottle
    ) -> None:
        """Attempts in transactions that are rolled back stay counted."""
        for _ in range(3):
            with pytest.raises(OSError, match="undo"):
                async with in_transaction():
                    reservation = await throttle.reserve(attempt())
                    raise OSError("undo")
            await throttle.failed(reservation)
        with pytest.raises(ThrottledError):
            async with in_transaction():
                await throttle.reserve(attempt())
        await refused(throttle, attempt())
        assert await AttemptCount.filter(failures=3).count() == 1

    async def test_counts_for_others_meanwhile(
        self, server: TortoiseContext, clock: FakeClock
    ) -> None:
        """Another process reads the count before the transaction ends."""
        limit = Backoff(free_attempts=1)
        async with in_transaction():
            await DatabaseThrottle(account=limit, clock=clock).reserve(attempt())
            await refused(DatabaseThrottle(account=limit, clock=clock), attempt())

    async def test_after_a_quiet_time(
        self, db: TortoiseContext, throttle: DatabaseThrottle, clock: FakeClock
    ) -> None:
        """A count that was reset after a quiet time is not mistaken for the old one."""
        await fail(throttle, attempt(), 3)
        clock.advance(timedelta(days=2))
        with pytest.raises(OSError, match="undo"):
            async with in_transaction():
                reservation = await throttle.reserve(attempt())
                raise OSError("undo")
        await throttle.failed(reservation)
        (locked,) = await fail(throttle, attempt())
        assert locked.exceeded
        await fail(throttle, attempt())
        await refused(throttle, attempt())

    async def test_another_process_counts_meanwhile(
        self, sqlite: TortoiseContext, throttle: DatabaseThrottle
    ) -> None:
        """Counts that are restored after a rollback overwrite no others."""
        await fail(throttle, attempt(source=None))
        with pytest.raises(OSError, match="undo"):
            async with in_transaction():
                reservation = await throttle.reserve(attempt(source=None))
                raise OSError("undo")
        await throttle.failed(reservation)
        await throttle.failed(reservation)
        row = await AttemptCount.get()
        assert (row.count, row.failures, row.in_flight) == (2, 2, 0)


class TestFailure:
    @pytest.mark.parametrize("fail_at", [1, 2, 3])
    async def test_at_every_statement(
        self, db: TortoiseContext, clock: FakeClock, fail_at: int
    ) -> None:
        """Whichever statement fails, the call raises an error, and returns no reservation."""
        throttle = DatabaseThrottle(clock=clock)
        with statements(db, fail_at=fail_at, error=OperationalError("canary")):
            with pytest.raises(OperationalError, match="canary"):
                await throttle.reserve(attempt())

    async def test_gives_the_source_its_attempt_back(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """If the count of the account fails, that of the source is given back."""

        async def broken() -> bool:
            raise OperationalError("canary")

        throttle = DatabaseThrottle(
            account=Backoff(free_attempts=1), source=Backoff(free_attempts=3), clock=clock
        )
        await fail(throttle, attempt())
        for _ in range(5):
            with pytest.raises(OperationalError):
                await throttle.reserve(attempt(known_source=broken))
        await fail(throttle, attempt("bob"))
        await fail(throttle, attempt("eve"))

    async def test_gives_a_known_source_its_attempt_back(
        self, db: TortoiseContext, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the count of the account fails, that of its known source is given back, too."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=2), clock=clock)
        await fail(throttle, attempt(source=ELSEWHERE), 2)
        take = throttle._take

        async def broken(counted: Counted) -> Counted:
            if not counted.limited:
                raise OperationalError("canary")
            return await take(counted)

        with monkeypatch.context() as patch:
            patch.setattr(throttle, "_take", broken)
            for _ in range(5):
                with pytest.raises(OperationalError):
                    await throttle.reserve(attempt(known_source=yes))
        await fail(throttle, attempt(known_source=yes), 2)
        await refused(throttle, attempt(known_source=yes))

    async def test_cancelled(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A caller that is cancelled between source and account ends at once, without giving back."""
        waiting = asyncio.Event()

        async def wait() -> bool:
            waiting.set()
            await asyncio.Event().wait()
            return True

        throttle = DatabaseThrottle(account=Backoff(free_attempts=1), clock=clock)
        await fail(throttle, attempt(source=ELSEWHERE))
        task = asyncio.ensure_future(throttle.reserve(attempt(known_source=wait)))
        async with asyncio.timeout(LIMIT):
            await waiting.wait()
        with statements(db) as seen:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert seen == []


class TestPurge:
    async def test_deletes_what_says_nothing(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Counters of quiet sources and of accounts without failures are deleted; failures in a row stay."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=1), clock=clock)
        await fail(throttle, attempt("ada", HERE))
        await fail(throttle, attempt("ada", ELSEWHERE, yes))
        await succeed(throttle, attempt("bob", ABROAD))
        assert await AttemptCount.all().count() == 6
        clock.advance(timedelta(days=1))
        assert await throttle.purge() == 0
        clock.advance(timedelta(microseconds=1))
        await fail(throttle, attempt("eve", HERE))
        assert await throttle.purge() == 4
        left = [row.key for row in await AttemptCount.all().order_by("key")]
        assert left == ["account:ada", "account:eve", f"source:{HERE}"]
        assert await throttle.purge() == 0

    async def test_failures_of_long_ago(self, db: TortoiseContext, clock: FakeClock) -> None:
        """Failures in a row are deleted 400 days after the last; the lock stays with the account."""
        throttle = DatabaseThrottle(max_failures=3, clock=clock)
        await fail(throttle, attempt("ada", None), 2)
        clock.advance(timedelta(days=400))
        assert await throttle.purge() == 0
        clock.advance(timedelta(microseconds=1))
        assert await throttle.purge() == 1

    async def test_in_batches(
        self, db: TortoiseContext, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each DELETE is short, those that are kept are read once, and one that is used meanwhile stays."""
        throttle = DatabaseThrottle(clock=clock)
        monkeypatch.setattr("tortoise_auth.throttling.database.BATCH_SIZE", 3)
        monkeypatch.setattr("tortoise_auth.database.pacing._PAUSE", 0)
        now = int(clock().timestamp() * 1e6)
        await AttemptCount.bulk_create(
            AttemptCount(
                key=f"{number:02}",
                failures=number % 2,
                counted_at=now,
                previous_at=0,
                reserved_at=now + max(0, number - 10),  # the first ten at the same moment
            )
            for number in range(20)
        )
        clock.advance(timedelta(days=2))
        await AttemptCount.filter(key="14").update(reserved_at=int(clock().timestamp() * 1e6))
        with statements(db) as seen:
            assert await throttle.purge() == 9
        left = [each.key for each in await AttemptCount.all().order_by("key")]
        assert left == sorted([*(f"{number:02}" for number in range(1, 20, 2)), "14"])
        deletions = [text for text in seen if text.startswith("DELETE")]
        reads = [text for text in seen if text.startswith("SELECT")]
        assert len(deletions) == len(reads) == 7


class TestSourceOf:
    @pytest.mark.parametrize(
        ("ip", "source"),
        [
            (None, None),
            ("203.0.113.7", "203.0.113.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
            ("2001:db8:1:2::", "2001:db8:1:2::/64"),
            ("2001:db8:1:3::", "2001:db8:1:3::/64"),
            ("::1", "::/64"),
        ],
    )
    def test_is_a_network(self, ip: str | None, source: str | None) -> None:
        """An address of IPv4 is itself, one of IPv6 its /64 (A170)."""
        assert source_of(ip) == source


class TestPage:
    PAGE = Path(__file__).parents[2] / "docs" / "throttling.md"

    @pytest.fixture
    async def namespace(self, sqlite: TortoiseContext) -> AsyncIterator[dict[str, Any]]:
        """The names that the snippets of the page use."""
        from tests.support.app import User  # noqa: PLC0415 - the name that the page uses

        yield {"AuthService": AuthService, "User": User, "config": AuthConfig(secret=SECRET)}

    async def test_snippets_run(self, namespace: dict[str, Any]) -> None:
        """Every snippet that needs no Redis runs, and leaves a service that works."""
        sources = [each for each in snippets(self.PAGE) if "redis" not in each]
        assert len(sources) >= 2
        for source in sources:
            await run(source, namespace, self.PAGE.name)
            assert await namespace["auth"].purge_expired() == 0

    def test_names_every_setting(self) -> None:
        """Settings and defaults on the page are those of the code (R36)."""
        page = self.PAGE.read_text()
        for line in (
            "| `account` | `Backoff(free_attempts=10)` |",
            "| `source` | `Backoff(free_attempts=50, reset_after=timedelta(hours=1))` |",
            "| `max_failures` | 100 |",
            "| `free_attempts` | |",
            "| `initial_delay` | 1 s |",
            "| `max_delay` | 15 min |",
            "| `reset_after` | 1 d |",
        ):
            assert line in page
        limit = Backoff(free_attempts=1)
        assert (limit.initial_delay, limit.max_delay, limit.reset_after) == (
            timedelta(seconds=1),
            timedelta(minutes=15),
            timedelta(days=1),
        )

    def test_is_short(self) -> None:
        """The page has fewer than 150 lines."""
        assert len(self.PAGE.read_text().splitlines()) < 150


async def _race_in_the_database(url: str) -> None:
    config = {
        "connections": {"default": url},
        "apps": {"models": {"models": ["tortoise_auth.models"], "default_connection": "default"}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config)
        await race(
            DatabaseThrottle(
                account=Backoff(free_attempts=BUDGET, initial_delay=timedelta(minutes=15))
            )
        )


if __name__ == "__main__":
    asyncio.run(_race_in_the_database(sys.argv[1]))
