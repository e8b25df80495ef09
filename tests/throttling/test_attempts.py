"""Who is refused for attempts under way, waits for them, in order, and not for ever."""

from __future__ import annotations

import asyncio

import pytest

from tortoise_auth.throttling import waiting as waiting_module
from tortoise_auth.throttling.waiting import OpenAttempt, OpenAttempts

LIMIT = 10


async def waiting(
    others: OpenAttempts,
    *groups: str,
    on: str,
    then: str | None = None,
    tries: int = 1,
    right: bool = True,
) -> asyncio.Task[bool]:
    """Return somebody who waits: as often as he *tries*, and *then* for another group."""
    began = asyncio.Event()

    async def wait() -> bool:
        with others.attempt(*groups) as place:
            began.set()
            let_in = True
            for group in [on] * tries + ([] if then is None else [then]):
                let_in = let_in and await place.is_let_in(group)
            place.costs_nothing = let_in and right
            return let_in

    task = asyncio.create_task(wait())
    await began.wait()
    return task


async def answer(task: asyncio.Task[bool]) -> bool:
    async with asyncio.timeout(LIMIT):
        return await task


class TestLettingIn:
    async def test_nobody_to_wait_for(self) -> None:
        """Who is alone is not kept waiting."""
        others = OpenAttempts()
        with others.attempt("a", None, "s") as place:
            assert not await place.is_let_in("a")
        assert others._groups == {}

    async def test_one_for_each_that_cost_nothing(self) -> None:
        """And those behind it when it turns out to cost nothing, too: all in order."""
        others = OpenAttempts()
        with others.attempt("a") as place:
            tasks = [await waiting(others, "a", on="a") for _ in range(5)]
            place.costs_nothing = True
        assert [await answer(each) for each in tasks] == [True] * 5
        assert others._groups == {}

    async def test_nobody_for_one_that_was_wrong(self) -> None:
        """They are refused when the last open one is over, and not before."""
        others = OpenAttempts()
        with others.attempt("a", "s"):
            with others.attempt("a"):
                task = await waiting(others, "a", "s", on="a")
            assert not task.done()
        assert not await answer(task)
        assert others._groups == {}

    async def test_of_another_group(self) -> None:
        """What was right elsewhere is no help."""
        others = OpenAttempts()
        with others.attempt("a"):
            task = await waiting(others, "a", "s", on="a")
            with others.attempt("s") as place:
                place.costs_nothing = True
            await asyncio.sleep(0)
            assert not task.done()
        assert not await answer(task)

    async def test_until_one_is_refused_again(self) -> None:
        """What one has freed may be room for many: each that ends lets the next one try."""
        others = OpenAttempts()
        with others.attempt("a") as place:
            tasks = [await waiting(others, "a", on="a", right=False) for _ in range(3)]
            refused_again = await waiting(others, "a", on="a", tries=2)
            last = await waiting(others, "a", on="a")
            place.costs_nothing = True
        assert [await answer(each) for each in tasks] == [True] * 3
        assert not await answer(refused_again)
        assert not await answer(last)
        assert others._groups == {}

    async def test_what_it_did_not_take(self) -> None:
        """Who is let in for the source and then refused for the account leaves that to the next."""
        others = OpenAttempts()
        with others.attempt("a"), others.attempt("s") as place:
            tasks = [
                await waiting(others, "a", "s", on="s", then="a"),
                await waiting(others, "b", "s", on="s"),
            ]
            place.costs_nothing = True
            place.__exit__(None, None, None)
            assert await answer(tasks[1])
        assert not await answer(tasks[0])
        assert others._groups == {}

    async def test_what_it_gave_back(self) -> None:
        """Who is refused for the account has held a place of the source for a moment, and no longer."""
        others = OpenAttempts()
        with others.attempt("a"), others.attempt("a", "s") as place:
            task = await waiting(others, "b", "s", on="s")
            refused = asyncio.create_task(place.is_let_in("a"))
            assert await answer(task)
            refused.cancel()
            await asyncio.wait([refused])
        assert others._groups == {}

    async def test_refused_while_one_succeeded(self) -> None:
        """Its refusal may be older than what was freed: it tries again at once, and once."""
        others = OpenAttempts()
        with others.attempt("a") as place:
            with others.attempt("a") as right:
                right.costs_nothing = True
            assert await place.is_let_in("a")
            assert not await place.is_let_in("a")
        assert others._groups == {}

    async def test_nobody_waits_for_who_came_later(self) -> None:
        """In a flood somebody always is: only those before him are waited for."""
        others = OpenAttempts()
        with others.attempt("a") as before:
            task = await waiting(others, "a", on="a")
            with others.attempt("a"):
                before.__exit__(None, None, None)
                assert not await answer(task)
        assert others._groups == {}

    async def test_newcomer_was_faster(self) -> None:
        """Who has taken what one was let in for is waited for by all, though he came after them."""
        others = OpenAttempts()
        with others.attempt("a") as before:
            first = await waiting(others, "a", on="a", tries=2)
            second = await waiting(others, "a", on="a")
            with others.attempt("a") as newcomer:
                before.costs_nothing = True
                before.__exit__(None, None, None)
                for _ in range(10):
                    await asyncio.sleep(0)
                assert not second.done()
                newcomer.costs_nothing = True
        assert await answer(first)
        assert await answer(second)
        assert others._groups == {}

    async def test_company(self) -> None:
        """Who has stepped back is in nobody's company, and has none."""
        others = OpenAttempts()
        with others.attempt("a") as one:
            assert not one.has_company("a")
            with others.attempt("a", "s") as other:
                assert one.has_company("a")
                assert not other.has_company("s")
                task = asyncio.create_task(other.is_let_in("a"))
                await asyncio.sleep(0)
                assert not one.has_company("a")
                assert not other.has_company("a")
                one.__exit__(None, None, None)
                assert not await answer(task)

    async def test_is_open_again(self) -> None:
        """Who was let in counts as open in all of its groups."""
        others = OpenAttempts()
        first: OpenAttempt
        with others.attempt("a") as first, others.attempt("a", "s") as place:
            await asyncio.sleep(0)
            letting_in = asyncio.create_task(place.is_let_in("a"))
            await asyncio.sleep(0)
            first.costs_nothing = True
            first.__exit__(None, None, None)
            assert await answer(letting_in)
            open_now = {key[1]: len(group.open) for key, group in others._groups.items()}
            assert open_now == {"a": 1, "s": 1}
        assert others._groups == {}


class TestGivingUp:
    async def test_after_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However long the others take."""
        monkeypatch.setattr(waiting_module, "_PATIENCE", 0.01)
        others = OpenAttempts()
        with others.attempt("a"):
            assert not await answer(await waiting(others, "a", on="a"))
            assert [len(group.waiting) for group in others._groups.values()] == [0]
        assert others._groups == {}

    async def test_tries_again_only_so_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However often others succeed meanwhile."""
        monkeypatch.setattr(waiting_module, "_PATIENCE", -1)
        others = OpenAttempts()
        with others.attempt("a") as place:
            with others.attempt("a") as right:
                right.costs_nothing = True
            assert not await place.is_let_in("a")

    async def test_cancelled(self) -> None:
        """Who is gone is passed over."""
        others = OpenAttempts()
        with others.attempt("a") as place:
            gone, there = [await waiting(others, "a", on="a") for _ in range(2)]
            gone.cancel()
            await asyncio.wait([gone])
            place.costs_nothing = True
        assert await answer(there)
        assert others._groups == {}

    async def test_cancelled_at_the_moment_it_is_refused(self) -> None:
        """There is nothing to leave to anybody."""
        others = OpenAttempts()
        with others.attempt("a"):
            gone = await waiting(others, "a", on="a")
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        assert others._groups == {}

    async def test_cancelled_at_the_moment_it_is_let_in(self) -> None:
        """Its place is the next one's."""
        others = OpenAttempts()
        with others.attempt("a") as place:
            gone, there = [await waiting(others, "a", on="a") for _ in range(2)]
            place.costs_nothing = True
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        assert await answer(there)
        assert others._groups == {}
