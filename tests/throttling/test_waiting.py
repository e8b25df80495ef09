"""Attempts that wait for attempts in flight: how long, how many, and for which."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.support.throttles import attempt
from tortoise_auth.exceptions import ThrottledError
from tortoise_auth.throttling import Reservation, TooEarly, waiting
from tortoise_auth.throttling.waiting import Waiting

RESERVATION = Reservation(attempt=attempt())
LIMIT = 10
"""Seconds after which a test that has not ended fails."""


def rejecting(
    times: int, error: ThrottledError | None = None
) -> Callable[[], Awaitable[Reservation]]:
    """Reject *times* attempts, because of attempts in flight if no other error is given."""
    left = times

    async def reserve() -> Reservation:
        nonlocal left
        left -= 1
        if left >= 0:
            raise error or TooEarly(1, in_flight="account:ada")
        return RESERVATION

    return reserve


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_FIRST_PAUSE", 0.0001)
    monkeypatch.setattr(waiting, "_LONGEST_PAUSE", 0.0001)


async def test_tries_again() -> None:
    """An attempt that is rejected because of others in flight is tried until there is room."""
    waits = Waiting()
    async with asyncio.timeout(LIMIT):
        assert await waits.reserve(rejecting(20)) is RESERVATION
    assert not waits._waiting


@pytest.mark.parametrize("error", [TooEarly(1), ThrottledError(1)], ids=["ours", "any"])
async def test_does_not_wait_for_a_pause(error: ThrottledError) -> None:
    """A pause, which no attempt in flight can end, rejects at once."""
    with pytest.raises(ThrottledError) as raised:
        await Waiting().reserve(rejecting(1, error))
    assert raised.value is error


async def test_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the longest wait the attempt is rejected, with the seconds to wait."""
    monkeypatch.setattr(waiting, "_PATIENCE", 0.02)
    waits = Waiting()
    with pytest.raises(TooEarly) as error:
        async with asyncio.timeout(LIMIT):
            await waits.reserve(rejecting(1 << 30))
    assert error.value.retry_after == 1
    assert not waits._waiting


async def test_only_so_many() -> None:
    """Of a flood at one counter some attempts wait, and the others are rejected at once."""
    waits, asked, flood = Waiting(), 0, waiting._MOST + 50

    async def reserve() -> Reservation:
        nonlocal asked
        asked += 1
        if asked <= flood:
            raise TooEarly(1, in_flight="account:ada")
        return RESERVATION

    async with asyncio.timeout(LIMIT):
        outcomes = await asyncio.gather(
            *(waits.reserve(reserve) for _ in range(flood)), return_exceptions=True
        )
    assert sum(isinstance(each, TooEarly) for each in outcomes) == 50
    assert outcomes.count(RESERVATION) == waiting._MOST
    assert not waits._waiting


async def test_cancelled() -> None:
    """A caller that is cancelled stops waiting, and frees its place."""
    waits = Waiting()
    task = asyncio.ensure_future(waits.reserve(rejecting(1 << 30)))
    async with asyncio.timeout(LIMIT):
        while not waits._waiting:  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not waits._waiting


async def test_pauses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting attempts retry at different moments, and less often as time passes."""
    monkeypatch.setattr(waiting, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(waiting, "_LONGEST_PAUSE", 0.2)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("tortoise_auth.throttling.waiting.asyncio.sleep", sleep)
    await Waiting().reserve(rejecting(100))
    assert 0.005 <= pauses[0] <= 0.01
    assert all(0.1 <= each <= 0.2 for each in pauses[10:])
    assert len(set(pauses[10:])) > 10
