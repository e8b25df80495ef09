"""One contract for every throttle, in any store."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tortoise_auth.exceptions import ConfigurationError, ThrottledError
from tortoise_auth.throttling import (
    Attempt,
    Reservation,
    Throttle,
)

HERE, ELSEWHERE, ABROAD = "203.0.113.7", "198.51.100.9", "192.0.2.11"
BURST, BUDGET = 50, 5
LIMIT = 60
"""Seconds after which a burst that has not ended fails."""


class Make(Protocol):
    """Makes a throttle with that many free attempts, and then a pause longer than any test."""

    def __call__(  # noqa: D102 - the class has one
        self, *, account: int = 1000, source: int = 1000, max_failures: int = 100
    ) -> Throttle: ...


async def yes() -> bool:
    return True


def attempt(
    account: str = "ada",
    source: str | None = HERE,
    known_source: Callable[[], Awaitable[bool]] | None = None,
) -> Attempt:
    if known_source is None:
        return Attempt(account=account, source=source)
    return Attempt(account=account, source=source, known_source=known_source)


async def fail(throttle: Throttle, tried: Attempt, times: int = 1) -> list[Reservation]:
    """Try a wrong password."""
    reservations = []
    for _ in range(times):
        reservations.append(await throttle.reserve(tried))
        await throttle.failed(reservations[-1])
    return reservations


async def succeed(throttle: Throttle, tried: Attempt) -> None:
    """Try the right password."""
    await throttle.succeeded(await throttle.reserve(tried))


async def refused(throttle: Throttle, tried: Attempt) -> float:
    """Check that an attempt is refused; return the seconds to wait."""
    with pytest.raises(ThrottledError) as error:
        await throttle.reserve(tried)
    assert error.value.retry_after > 0
    return error.value.retry_after


async def burst(
    throttle: Throttle, attempts: Sequence[Attempt]
) -> tuple[list[Reservation], list[ThrottledError]]:
    """Reserve all attempts at once; return those that were granted and the refusals."""
    start = asyncio.Barrier(len(attempts))

    async def reserve(tried: Attempt) -> Reservation | ThrottledError:
        await start.wait()
        try:
            return await throttle.reserve(tried)
        except ThrottledError as error:
            return error

    async with asyncio.timeout(LIMIT):
        outcomes = await asyncio.gather(*map(reserve, attempts))
    granted = [each for each in outcomes if isinstance(each, Reservation)]
    late = [each for each in outcomes if isinstance(each, ThrottledError)]
    assert all(error.retry_after > 0 for error in late)
    return granted, late


async def granted_to_processes(arguments: Sequence[str], processes: int = 2) -> list[int]:
    """Let processes reserve `BURST` times each, all at once; return how many each was granted."""
    running = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(processes)
    ]
    async with asyncio.timeout(LIMIT):
        for each in running:
            assert each.stdout is not None
            assert await each.stdout.readline() == b"ready\n"
        outputs = await asyncio.gather(*(each.communicate(b"go\n") for each in running))
    assert [each.returncode for each in running] == [0] * processes
    return [int(output) for output, _ in outputs]


async def race(throttle: Throttle) -> None:
    """Run one of those processes: report that it is ready, wait for the start, print how many it was granted."""
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    granted, _ = await burst(throttle, [attempt()] * BURST)
    print(len(granted), flush=True)


async def storm(throttle: Throttle, chance: random.Random, max_failures: int) -> list[Reservation]:
    """Let wrong attempts, and some that are given back, end in any order; return the wrong ones."""

    async def hesitate() -> None:
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)

    async def one() -> Reservation | None:
        await hesitate()
        try:
            reservation = await throttle.reserve(attempt(source=None))
        except ThrottledError:
            return None
        await hesitate()
        if chance.random() < 0.1:
            await throttle.released(reservation)
            return None
        await throttle.failed(reservation)
        return reservation

    count = chance.randint(max_failures, max_failures + 6)
    async with asyncio.timeout(LIMIT):
        outcomes = await asyncio.gather(*(one() for _ in range(count)))
    return [each for each in outcomes if each is not None]


class ThrottleContract:
    """The behaviour of every throttle. Subclasses have a fixture ``make``."""

    async def test_free_attempts_then_refusal(self, make: Make) -> None:
        """The attempt after the free ones is refused, with the seconds to wait."""
        throttle = make(account=3)
        await fail(throttle, attempt(), 3)
        for _ in range(3):
            await refused(throttle, attempt())

    async def test_source_has_a_budget(self, make: Make) -> None:
        """One source that tries many accounts is refused at each, and another source at none."""
        throttle = make(source=3)
        for number in range(3):
            await fail(throttle, attempt(f"account {number}"))
        await refused(throttle, attempt("ada"))
        await refused(throttle, attempt("bob"))
        await fail(throttle, attempt("ada", ELSEWHERE), 3)

    async def test_account_has_a_budget(self, make: Make) -> None:
        """One account is refused for every source, and another account for none."""
        throttle = make(account=3)
        for number in range(3):
            await fail(throttle, attempt("ada", f"source {number}"))
        await refused(throttle, attempt("ada", HERE))
        await refused(throttle, attempt("ada", None))
        await fail(throttle, attempt("bob", HERE), 3)

    async def test_unknown_source(self, make: Make) -> None:
        """Attempts without a source count for their accounts, and not together as one source."""
        throttle = make(account=2, source=2)
        for name in ("ada", "bob", "eve"):
            await fail(throttle, attempt(name, None), 2)
            await refused(throttle, attempt(name, None))

    async def test_refused_is_not_counted(self, make: Make) -> None:
        """Attempts at a blocked account take nothing from the budget of the source."""
        throttle = make(account=2, source=5)
        await fail(throttle, attempt(), 2)
        for _ in range(20):
            await refused(throttle, attempt())
        await fail(throttle, attempt("bob"), 2)
        await fail(throttle, attempt("eve"), 1)
        await refused(throttle, attempt("eve"))

    async def test_blocked_source_counts_for_no_account(self, make: Make) -> None:
        """Attempts of a blocked source take nothing from the budget of the account."""
        throttle = make(account=2, source=1)
        await fail(throttle, attempt("bob"))
        for _ in range(20):
            await refused(throttle, attempt("ada"))
        await fail(throttle, attempt("ada", ELSEWHERE))
        await fail(throttle, attempt("ada", ABROAD))

    async def test_success_forgets_the_account(self, make: Make) -> None:
        """After the right password the account has its whole budget again (R34)."""
        throttle = make(account=3)
        for _ in range(4):
            await fail(throttle, attempt(), 2)
            await succeed(throttle, attempt())
        await fail(throttle, attempt(), 3)
        await refused(throttle, attempt())

    async def test_success_does_not_forget_the_source(self, make: Make) -> None:
        """Logins to the attacker's own account do not buy guesses at others (A166)."""
        throttle = make(source=4)
        for number in range(4):
            await fail(throttle, attempt(f"victim {number}"))
            if number < 3:
                await succeed(throttle, attempt("own"))
        await refused(throttle, attempt("victim 4"))
        await refused(throttle, attempt("own"))

    async def test_success_costs_the_source_nothing(self, make: Make) -> None:
        """However many users log in behind one address, none of them is refused."""
        throttle = make(account=2, source=3)
        for number in range(20):
            await succeed(throttle, attempt(f"person {number}"))
        await fail(throttle, attempt(), 2)
        await fail(throttle, attempt("bob"), 1)
        await refused(throttle, attempt("bob"))

    async def test_released_gives_back(self, make: Make) -> None:
        """An attempt that could not be checked counts for neither account, source nor failures (A173)."""
        throttle = make(account=2, source=2, max_failures=2)
        for _ in range(10):
            await throttle.released(await throttle.reserve(attempt()))
        first, second = await fail(throttle, attempt(), 2)
        assert (first.locks, second.locks, second.exceeded) == (False, True, False)
        await refused(throttle, attempt())

    async def test_known_source_has_its_own_budget(self, make: Make) -> None:
        """While an account is blocked, each of its known sources still has a whole budget."""
        throttle = make(account=3)
        await fail(throttle, attempt(source=ABROAD), 3)
        await refused(throttle, attempt(source=ABROAD))
        for known in (HERE, ELSEWHERE):
            await fail(throttle, attempt(source=known, known_source=yes), 3)
            await refused(throttle, attempt(source=known, known_source=yes))

    async def test_known_source_gets_in(self, make: Make) -> None:
        """A success from a known source ends the pause for every source."""
        throttle = make(account=2)
        await fail(throttle, attempt(source=ABROAD), 2)
        await fail(throttle, attempt(known_source=yes), 1)
        await succeed(throttle, attempt(known_source=yes))
        await fail(throttle, attempt(source=ABROAD), 2)
        await fail(throttle, attempt(known_source=yes), 2)
        await refused(throttle, attempt(known_source=yes))

    async def test_known_source_account_is_not_another(self, make: Make) -> None:
        """A source that is known for one account has no budget of its own at another."""
        throttle = make(account=1)
        for name in ("ada", "bob"):
            await fail(throttle, attempt(name, ABROAD))
        await fail(throttle, attempt("ada", known_source=yes))
        await fail(throttle, attempt("bob", known_source=yes))
        await refused(throttle, attempt("ada", known_source=yes))

    async def test_known_source_is_asked_when_it_matters(self, make: Make) -> None:
        """As long as the account is not blocked its known sources are not read."""
        asked: list[str] = []

        async def ask() -> bool:
            asked.append("asked")
            return False

        throttle = make(account=2)
        await fail(throttle, attempt(known_source=ask), 2)
        assert asked == []
        await refused(throttle, attempt(known_source=ask))
        assert asked == ["asked"]
        await refused(throttle, attempt(source=None, known_source=ask))
        assert asked == ["asked"]

    async def test_released_from_a_known_source(self, make: Make) -> None:
        """Only the reserved attempt is given back, and the account stays blocked for other sources."""
        throttle = make(account=2, max_failures=3)
        await fail(throttle, attempt(source=ABROAD), 2)
        for _ in range(5):
            await throttle.released(await throttle.reserve(attempt(known_source=yes)))
        await refused(throttle, attempt(source=ABROAD))
        (reservation,) = await fail(throttle, attempt(known_source=yes))
        assert reservation.locks

    async def test_too_many_failures_in_a_row_lock(self, make: Make) -> None:
        """One failure locks the account, and later ones exceed the limit (R33)."""
        throttle = make(max_failures=3)
        reservations = await fail(throttle, attempt(), 6)
        assert [each.locks for each in reservations] == [False, False, True, False, False, False]
        assert [each.exceeded for each in reservations] == [False, False, False, True, True, True]
        assert not (await throttle.reserve(attempt("bob"))).exceeded

    async def test_success_ends_the_row(self, make: Make) -> None:
        """A right password at the last attempt before the lock resets the failures."""
        throttle = make(max_failures=3)
        for _ in range(3):
            await fail(throttle, attempt(), 2)
            await succeed(throttle, attempt())
        reservations = await fail(throttle, attempt(), 4)
        assert [each.locks for each in reservations] == [False, False, True, False]

    async def test_row_goes_on_from_known_sources(self, make: Make) -> None:
        """Failures from a known source count in the same row as the others."""
        throttle = make(account=2, max_failures=4)
        await fail(throttle, attempt(source=ABROAD), 2)
        reservations = await fail(throttle, attempt(known_source=yes), 2)
        assert [each.locks for each in reservations] == [False, True]
        (locked,) = await fail(throttle, attempt(source=ELSEWHERE, known_source=yes))
        assert locked.exceeded

    async def test_burst_at_an_account(self, make: Make) -> None:
        """Of fifty attempts at once only the free ones are granted (R35)."""
        granted, late = await burst(make(account=BUDGET), [attempt()] * BURST)
        assert (len(granted), len(late)) == (BUDGET, BURST - BUDGET)
        assert sorted(each.counted[0].failures for each in granted) == [1, 2, 3, 4, 5]

    async def test_burst_from_a_source(self, make: Make) -> None:
        """Of fifty accounts that one source tries at once only the free attempts are granted (A161)."""
        attempts = [attempt(f"account {number}") for number in range(BURST)]
        granted, _ = await burst(make(source=BUDGET), attempts)
        assert len(granted) == BUDGET

    async def test_burst_from_a_known_source(self, make: Make) -> None:
        """Of fifty attempts of a known source at a blocked account only its free ones are granted."""
        throttle = make(account=BUDGET)
        await fail(throttle, attempt(source=ABROAD), BUDGET)
        granted, _ = await burst(throttle, [attempt(known_source=yes)] * BURST)
        assert len(granted) == BUDGET

    async def test_nothing_is_checked_beyond_the_last_one(self, make: Make) -> None:
        """While the last attempt before the lock is checked, other attempts are refused unchecked."""
        throttle = make(max_failures=2)
        first, last = [await throttle.reserve(attempt()) for _ in range(2)]
        for _ in range(3):
            await refused(throttle, attempt())
            await refused(throttle, attempt(known_source=yes))
        await throttle.failed(first)
        await refused(throttle, attempt())
        await throttle.failed(last)
        assert last.locks
        (later,) = await fail(throttle, attempt())
        assert (later.locks, later.exceeded) == (False, True)

    async def test_last_one_is_right(self, make: Make) -> None:
        """A right password at the last attempt resets the failures, and attempts in flight do not lock."""
        throttle = make(max_failures=2)
        wrong, right = [await throttle.reserve(attempt()) for _ in range(2)]
        await throttle.succeeded(right)
        await throttle.failed(wrong)
        assert not (await throttle.reserve(attempt())).exceeded

    async def test_unlocked(self, make: Make) -> None:
        """Unlocking an account resets its failures."""
        throttle = make(max_failures=2)
        await fail(throttle, attempt(), 3)
        await throttle.succeeded(Reservation(attempt=attempt()))
        reservations = await fail(throttle, attempt(), 3)
        assert [each.locks for each in reservations] == [False, True, False]

    @pytest.mark.parametrize("seed", range(20))
    async def test_lock_in_a_storm(self, make: Make, seed: int) -> None:
        """In whatever order attempts end, only the allowed number are checked."""
        chance = random.Random(seed)
        throttle = make(max_failures=(most := chance.randint(2, 5)))
        failed = await storm(throttle, chance, most)
        assert sum(not each.exceeded for each in failed) <= most

    async def test_burst_locks_once(self, make: Make) -> None:
        """Of fifty failures at once only the allowed number are checked."""
        throttle = make(max_failures=BUDGET)
        granted, late = await burst(throttle, [attempt()] * BURST)
        assert len(granted) <= BUDGET
        assert not any(each.exceeded for each in granted)
        assert len(granted) + len(late) == BURST

    @pytest.mark.parametrize("max_failures", [0, 101, -1])
    def test_lock_that_comes_too_late(self, make: Make, max_failures: int) -> None:
        """A limit of more than a hundred failures in a row is a configuration error."""
        with pytest.raises(ConfigurationError, match="between 1 and 100"):
            make(max_failures=max_failures)
