"""How one handler is called: on threads of its own, and inside a bounded number of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from functools import partial

import pytest

from tortoise_auth.events import EventEmitter, EventError
from tortoise_auth.events.invocation import MAX_TOGETHER, THREADS_PER_HANDLER

PATIENCE = 10.0
SHORT = 0.02


class TestThreadsOfAHandler:
    async def test_one_that_hangs_keeps_no_other(self, caplog: pytest.LogCaptureFixture) -> None:
        """A handler that hangs uses up its own threads, then fails at once; others run as before."""
        release, failures, ran = threading.Event(), list[EventError](), list[int]()
        emitter = EventEmitter(on_error=failures.append)

        def hang() -> None:
            release.wait(PATIENCE)

        emitter.on("evt", hang, timeout=0.2)  # time for a thread to begin on a busy machine
        emitter.on("evt", lambda: ran.append(1))
        emitter.on("other", lambda: ran.append(2))
        times = THREADS_PER_HANDLER + 5
        async with asyncio.timeout(PATIENCE):
            for _ in range(times):
                await emitter.emit("evt")
                await emitter.emit("other")
        assert ran == [1, 2] * times
        kinds = [type(failure.original).__name__ for failure in failures]
        assert kinds == ["TimeoutError"] * THREADS_PER_HANDLER + ["ThreadsStuckError"] * 5
        assert len(caplog.messages) == THREADS_PER_HANDLER + 1
        assert caplog.messages[-1] == (
            "Handler 'hang' for event 'evt' raised ThreadsStuckError: 8 earlier calls ran out of "
            "time and still occupy its threads"
        )
        release.set()
        assert await emitter.aclose(PATIENCE) == []

    async def test_it_recovers(self) -> None:
        """Once a call that hung has ended, the handler is called again."""
        release, failures, ran = threading.Event(), list[EventError](), list[int]()
        emitter = EventEmitter(on_error=failures.append)
        ended = threading.Semaphore(0)

        def hang(number: int) -> None:
            if number < THREADS_PER_HANDLER:
                release.wait(PATIENCE)
                ended.release()
            else:
                ran.append(number)

        emitter.on("evt", hang, timeout=SHORT)
        for number in range(THREADS_PER_HANDLER + 1):
            await emitter.emit("evt", number)
        assert ran == []
        release.set()
        for _ in range(THREADS_PER_HANDLER):
            assert await asyncio.to_thread(ended.acquire, timeout=PATIENCE)
        emitter.clear()
        emitter.on("evt", hang, timeout=PATIENCE)
        async with asyncio.timeout(PATIENCE):
            while not ran:
                await emitter.emit("evt", THREADS_PER_HANDLER)
        assert ran[0] == THREADS_PER_HANDLER

    async def test_flooded_it_keeps_no_other(self, emitter: EventEmitter) -> None:
        """A plain handler with a thousand calls in flight leaves the threads of others alone."""
        release, ran = threading.Event(), list[int]()
        emitter.on("flooded", lambda: release.wait(PATIENCE))
        emitter.on("evt", lambda: ran.append(1))
        flood = [asyncio.create_task(emitter.emit("flooded")) for _ in range(1000)]
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await emitter.emit("evt")
        assert ran == [1]
        release.set()
        await asyncio.gather(*flood)

    async def test_of_the_caller_cancelled(self, emitter: EventEmitter) -> None:
        """A call that waits for a thread is made even if its caller is cancelled meanwhile."""
        release, ran = threading.Event(), list[int]()

        def handler(number: int) -> None:
            release.wait(PATIENCE)
            ran.append(number)

        emitter.on("evt", handler)
        emits = [
            asyncio.create_task(emitter.emit("evt", number))
            for number in range(2 * THREADS_PER_HANDLER)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for emit in emits:
            emit.cancel()
        await asyncio.wait(emits)
        release.set()
        assert await emitter.aclose(PATIENCE) == []
        assert sorted(ran) == list(range(2 * THREADS_PER_HANDLER))

    @pytest.mark.parametrize("thread", [False, True])
    async def test_generator_exit(
        self, emitter: EventEmitter, thread: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A plain function that raises `GeneratorExit` has failed, and closes nothing of ours."""

        def handler() -> None:
            raise GeneratorExit

        emitter.on("evt", handler, thread=thread)
        await emitter.emit("evt")
        (message,) = caplog.messages
        assert message.endswith("raised RuntimeError: the handler raised GeneratorExit")


class TestNesting:
    async def test_concurrent_however_deep(self) -> None:
        """Handlers that meet at a barrier meet also in the tenth emit inside one another."""
        emitter, met = EventEmitter(concurrent=True), list[int]()
        barrier = asyncio.Barrier(2)

        async def deeper(depth: int) -> None:
            await emitter.emit("evt" if depth < 10 else "meet", depth + 1)

        async def meet(depth: int) -> None:
            await barrier.wait()
            met.append(depth)

        emitter.on("evt", deeper)
        emitter.on("meet", meet)
        emitter.on("meet", partial(meet))
        async with asyncio.timeout(PATIENCE):
            await emitter.emit("evt", 1)
        assert met == [11, 11]

    async def test_many_at_once_are_no_circle(self) -> None:
        """However many handlers an event has, and its handlers' events have, they all run."""
        emitter, calls = EventEmitter(concurrent=True), [0]

        async def inner() -> None:
            calls[0] += 1

        async def outer() -> None:
            await emitter.emit("inner")

        for _ in range(50):
            emitter.on("outer", partial(outer))
            emitter.on("inner", partial(inner))
        await emitter.emit("outer")
        assert calls[0] == 2500 > MAX_TOGETHER


class TestConcurrentPlainFunctions:
    @pytest.mark.parametrize("thread", [False, True])
    async def test_what_they_return_is_awaited_together(self, thread: bool) -> None:
        """Plain functions are called one by one; the awaitables of all can meet, in any emit."""
        emitter, order = EventEmitter(concurrent=True), list[str]()
        barrier = asyncio.Barrier(3)

        async def meet(name: str) -> None:
            await barrier.wait()
            order.append(name)

        def plain(name: str) -> Awaitable[None]:
            order.append(f"called {name}")
            return meet(name)

        for name in "ab":
            emitter.on("evt", partial(plain, name), thread=thread)
        emitter.on("evt", partial(meet, "c"))
        emitter.on("outer", lambda: emitter.emit("evt"), thread=False)
        async with asyncio.timeout(PATIENCE):
            await emitter.emit("outer")
        assert order[:2] == ["called a", "called b"]
        assert sorted(order[2:]) == ["a", "b", "c"]
