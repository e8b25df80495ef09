"""Delivery in the background: order, bounds, contexts, transactions, and an end without losses."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal

import pytest
from tortoise.context import TortoiseContext
from tortoise.transactions import in_transaction

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import AuditRow, User
from tests.support.database import connection_of
from tortoise_auth import AuthConfig, AuthenticationError, AuthService
from tortoise_auth.events import (
    BackgroundQueue,
    BackgroundQueueFull,
    EventEmitter,
    Job,
)
from tortoise_auth.events.background import MAX_HOPS
from tortoise_auth.events.event_emitter import deliverer_of

PATIENCE = 10.0
SHORT = 0.02

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


async def drained(emitter: EventEmitter) -> None:
    """Wait until nothing is left, and check that nothing was lost."""
    async with asyncio.timeout(PATIENCE):
        assert await emitter.aclose() == []


async def audited() -> list[str]:
    return [row.event for row in await AuditRow.all().order_by("id")]


async def begun(started: asyncio.Event) -> None:
    """Wait until a handler has begun and could use an open transaction."""
    async with asyncio.timeout(PATIENCE):
        await started.wait()
        for _ in range(10):
            await asyncio.to_thread(lambda: None)


async def hang() -> None:
    await asyncio.Event().wait()


class TestOrder:
    async def test_kept_over_many_emits(self, emitter: EventEmitter) -> None:
        """Each subscription is called in order, however its events are emitted."""
        done: list[tuple[str, int]] = []

        async def handler(name: str, number: int) -> None:
            for _ in range(number % 3):
                await asyncio.sleep(0)
            done.append((name, number))

        emitter.on("direct", partial(handler, "direct"))
        emitter.on("both", partial(handler, "both"), delivery="background")
        for number in range(100):
            emitter.emit_nowait("direct", number)
            if number % 2:
                emitter.emit_nowait("both", number)
            else:
                await emitter.emit("both", number)
        await drained(emitter)
        for name in ("direct", "both"):
            assert [n for each, n in done if each == name] == list(range(100))

    async def test_over_the_events_of_one_subscription(self, emitter: EventEmitter) -> None:
        """A handler of several events is called in the order in which these were emitted."""
        done: list[int] = []

        async def handler(number: int) -> None:
            for _ in range(number % 3):
                await asyncio.sleep(0)
            done.append(number)

        emitter.on("a", "b", delivery="background")(handler)
        for number in range(30):
            await emitter.emit("ab"[number % 2], number)
        await drained(emitter)
        assert done == list(range(30))

    async def test_one_that_hangs_holds_up_no_other(self, emitter: EventEmitter) -> None:
        """Each subscription has a lane of its own, also those of the same event."""
        release, done = asyncio.Event(), list[str]()

        async def hanging() -> None:
            await release.wait()
            done.append("hanging")

        async def prompt(name: str) -> None:
            done.append(name)
            if name == "other event":
                release.set()

        emitter.on("evt", hanging, delivery="background", priority=1)
        emitter.on("evt", partial(prompt, "same event"), delivery="background")
        emitter.on("other", partial(prompt, "other event"), delivery="background")
        await emitter.emit("evt")
        await emitter.emit("other")
        await drained(emitter)
        assert done == ["same event", "other event", "hanging"]

    async def test_priority_within_one_emit(self, emitter: EventEmitter) -> None:
        """The handlers of one event begin by their priority, in the background as elsewhere."""
        order: list[int] = []
        for priority in (3, 1, 2):

            async def handler(priority: int = priority) -> None:
                order.append(priority)

            emitter.on("evt", handler, priority=priority, delivery="background")
        await emitter.emit("evt")
        await drained(emitter)
        assert order == [1, 2, 3]

    async def test_emit_does_not_wait_for_it(self, emitter: EventEmitter) -> None:
        """An emit returns while its background handler still waits, inline handlers having run."""
        release, done = asyncio.Event(), list[str]()

        async def slow() -> None:
            await release.wait()
            done.append("slow")

        async def inline() -> None:
            done.append("inline")

        emitter.on("evt", slow, delivery="background", priority=1)
        emitter.on("evt", inline)
        await emitter.emit("evt")
        assert done == ["inline"]
        release.set()
        await drained(emitter)
        assert done == ["inline", "slow"]

    async def test_no_task_for_each_emit(self, emitter: EventEmitter) -> None:
        """A thousand deliveries share one task."""
        done: list[int] = []

        async def handler(number: int) -> None:
            await asyncio.sleep(0)
            done.append(number)

        emitter.on("evt", handler)
        before = len(asyncio.all_tasks())
        for number in range(1000):
            emitter.emit_nowait("evt", number)
        assert len(asyncio.all_tasks()) == before + 1
        await drained(emitter)
        assert done == list(range(1000))

    async def test_no_room_is_taken_without_a_subscription(self) -> None:
        """An event without subscriptions is not queued."""
        queue = BackgroundQueue(size=1, overflow="raise")
        emitter = EventEmitter(backend=queue)
        for _ in range(5):
            emitter.emit_nowait("evt")
        assert queue.dropped == 0


class TestFailures:
    @pytest.mark.parametrize("errors", ["log", "raise", "group"])
    async def test_are_logged(
        self, errors: Literal["log", "raise", "group"], caplog: pytest.LogCaptureFixture
    ) -> None:
        """No caller could catch them, so they are logged once under any policy, and the rest runs."""
        failures: list[object] = []
        emitter, ran = EventEmitter(errors=errors, on_error=failures.append), list[int]()

        async def failing() -> None:
            raise ValueError("no")

        async def fine() -> None:
            ran.append(1)

        for handler in (failing, fine):
            emitter.on("evt", handler, delivery="background")
        await emitter.emit("evt")
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert ran == [1, 1]
        assert caplog.messages == ["Handler 'failing' for event 'evt' raised ValueError: no"] * 2
        assert len(failures) == 2

    async def test_a_handler_s_own_cancellation(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A `CancelledError` of a handler does not stop the delivery of what comes after."""
        ran: list[int] = []

        async def confused() -> None:
            raise asyncio.CancelledError

        async def fine() -> None:
            ran.append(1)

        emitter.on("a", confused)
        emitter.on("b", fine)
        emitter.emit_nowait("a")
        emitter.emit_nowait("b")
        await drained(emitter)
        assert ran == [1]
        assert caplog.messages == ["Handler 'confused' for event 'a' raised CancelledError: "]

    async def test_a_job_that_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        """A job that no emitter made and that raises is logged, and the next one is carried out."""
        queue, done = BackgroundQueue(), list[int]()

        class Work:
            description = "broken work"

            def __init__(self, number: int) -> None:
                self.number = number

            async def __call__(self) -> None:
                """Fail the first time."""
                if self.number == 0:
                    raise ValueError("no")
                done.append(self.number)

        assert queue.submit(Work(0))
        assert queue.submit(Work(1))
        assert await queue.drain() == []
        assert done == [1]
        assert caplog.messages == ["Background delivery of broken work failed"]

    @pytest.mark.parametrize("thread", [None, False, True], ids=["async", "plain", "on a thread"])
    async def test_of_any_class(
        self, emitter: EventEmitter, thread: bool | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error that is no `Exception` is a failure, too, and the same subscription goes on."""
        ran: list[int] = []

        def handler(number: int) -> None:
            ran.append(number)
            if number == 0:
                raise Panic("no")

        async def asynchronous(number: int) -> None:
            handler(number)

        if thread is None:
            emitter.on("evt", asynchronous)
        else:
            emitter.on("evt", handler, thread=thread)
        for number in range(2):
            emitter.emit_nowait("evt", number)
        await drained(emitter)
        assert ran == [0, 1]
        (message,) = caplog.messages
        assert message.endswith("for event 'evt' raised Panic: no")

    def test_what_ends_the_program_is_said(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """`KeyboardInterrupt` propagates, and the deliveries lost with its lane are logged."""

        async def interrupted(number: int) -> None:
            raise KeyboardInterrupt

        async def program() -> None:
            emitter.emit_nowait("evt", 1)
            emitter.emit_nowait("evt", 2)
            await asyncio.sleep(PATIENCE)

        emitter.on("evt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(program())
        (message,) = caplog.messages
        assert "with 2 deliveries lost: event 'evt' for interrupted" in message


class Panic(BaseException):
    """What some libraries raise: no `Exception`."""


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks")
class TestEagerTasks:
    async def test_deliver_in_order(self, emitter: EventEmitter) -> None:
        """No handler runs inside the emit, all run in order, and `aclose` waits for them."""
        asyncio.get_running_loop().set_task_factory(
            getattr(asyncio, "eager_task_factory")  # noqa: B009 - of 3.12
        )
        done: list[int] = []

        async def handler(number: int) -> None:
            done.append(number)
            if number % 2:
                await asyncio.sleep(0)
            if number == 3:
                emitter.emit_nowait("evt", 5)

        emitter.on("evt", handler)
        emitter.on("limited", handler, timeout=PATIENCE)
        for number in range(5):
            emitter.emit_nowait("evt", number)
            assert done == []
        await drained(emitter)
        assert done == list(range(6))
        emitter.emit_nowait("limited", 6)
        await emitter.emit("limited", 7)
        await drained(emitter)
        assert sorted(done) == list(range(8))

    async def test_outside_the_transaction(
        self, db: TortoiseContext, emitter: EventEmitter
    ) -> None:
        """A job of an eager loop is outside the caller's transaction as well."""
        asyncio.get_running_loop().set_task_factory(
            getattr(asyncio, "eager_task_factory")  # noqa: B009 - of 3.12
        )

        async def audit(event: str) -> None:
            await AuditRow.create(event=event)

        emitter.on("evt", audit)
        with pytest.raises(ZeroDivisionError):
            async with in_transaction(connection_of(db).connection_name):
                emitter.emit_nowait("evt", "kept")
                await AuditRow.create(event="rolled back")
                raise ZeroDivisionError
        await drained(emitter)
        assert await audited() == ["kept"]


class TestBound:
    async def test_more_is_dropped_loudly(self, caplog: pytest.LogCaptureFixture) -> None:
        """A full lane drops further deliveries, with an ERROR and a counter, and the emit goes on."""
        queue = BackgroundQueue(size=3)
        emitter, done = EventEmitter(backend=queue), list[int]()

        async def handler(number: int) -> None:
            done.append(number)

        emitter.on("evt", handler)
        for number in range(4):
            emitter.emit_nowait("evt", number)
        assert queue.dropped == 1
        assert caplog.messages == [
            "event 'evt' for handler was not delivered in the background: "
            "3 deliveries are waiting already"
        ]
        assert {record.levelno for record in caplog.records} == {logging.ERROR}
        await drained(emitter)
        emitter.emit_nowait("evt", 5)
        await drained(emitter)
        assert done == [0, 1, 2, 5]

    async def test_a_flood_is_one_line_a_second(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Of 4 000 dropped deliveries the first is logged at once, and the others are counted."""

        async def handler() -> None: ...

        emitter.on("evt", handler)
        for _ in range(5000):
            emitter.emit_nowait("evt")
        assert len(caplog.messages) == 1
        await drained(emitter)
        assert caplog.messages[1:] == [
            "3999 deliveries were not taken in the background, the last one: event 'evt' for "
            "handler was not delivered in the background: 1000 deliveries are waiting already"
        ]

    async def test_a_flood_displaces_no_other(self) -> None:
        """A subscription that is flooded loses its own deliveries, and no other's."""
        emitter, done = EventEmitter(backend=BackgroundQueue(size=10)), list[str]()
        release = asyncio.Event()

        async def flooded(identifier: str) -> None:
            await release.wait()

        async def mail() -> None:
            done.append("mail")

        emitter.on("login_throttled", flooded, delivery="background")
        emitter.on("password_changed", mail, delivery="background")
        for _ in range(100):
            await emitter.emit("login_throttled", identifier="ada")
        await emitter.emit("password_changed")
        for _ in range(5):
            await asyncio.sleep(0)
        assert done == ["mail"]
        release.set()
        await drained(emitter)

    async def test_full_for_one_handler_of_an_event(self) -> None:
        """A lane that raises keeps no other handler of the same event from its delivery."""
        queue = BackgroundQueue(size=1, overflow="raise")
        emitter, done = EventEmitter(backend=queue), list[str]()

        async def first() -> None:
            done.append("first")

        async def second() -> None:
            done.append("second")

        emitter.on("full", "evt", delivery="background")(first)
        emitter.on("evt", second, delivery="background")
        await emitter.emit("full")
        with pytest.raises(BackgroundQueueFull, match="'evt' for first was not delivered"):
            await emitter.emit("evt")
        await drained(emitter)
        assert sorted(done) == ["first", "second"]

    async def test_or_refused(self) -> None:
        """With ``overflow="raise"`` the emit raises."""
        queue = BackgroundQueue(size=1, overflow="raise")
        emitter, done = EventEmitter(backend=queue), list[int]()

        async def handler(number: int) -> None:
            done.append(number)

        emitter.on("evt", handler, delivery="background")
        await emitter.emit("evt", 0)
        with pytest.raises(BackgroundQueueFull, match="'evt' for handler was not delivered: 1 del"):
            await emitter.emit("evt", 1)
        with pytest.raises(BackgroundQueueFull):
            emitter.emit_nowait("evt", 2)
        await drained(emitter)
        assert done == [0]
        assert queue.dropped == 2

    async def test_a_circle_ends(self, caplog: pytest.LogCaptureFixture) -> None:
        """Handlers that emit to one another are stopped after 32 rounds, with an ERROR."""
        queue, rounds = BackgroundQueue(), list[str]()
        emitter = EventEmitter(backend=queue)

        def answering(event: str) -> Callable[[], Any]:
            async def answer() -> None:
                rounds.append(event)
                await asyncio.sleep(0)
                emitter.emit_nowait(event)

            return answer

        emitter.on("ping", answering("pong"))
        emitter.on("pong", answering("ping"), delivery="background")
        emitter.emit_nowait("ping")
        await drained(emitter)
        assert rounds == ["pong", "ping"] * (MAX_HOPS // 2)
        assert queue.dropped == 1
        assert caplog.messages == [
            "event 'ping' for answer was not delivered in the background: "
            "handlers emit in a circle (32 rounds)"
        ]

    async def test_a_circle_through_two_emitters(self, caplog: pytest.LogCaptureFixture) -> None:
        """A second emitter does not make the circle endless."""
        one, two, calls = EventEmitter(), EventEmitter(), [0]

        async def answer(other: EventEmitter) -> None:
            calls[0] += 1
            other.emit_nowait("evt")

        one.on("evt", partial(answer, two))
        two.on("evt", partial(answer, one))
        one.emit_nowait("evt")
        for _ in range(2 * MAX_HOPS):
            await drained(one)
            await drained(two)
        assert calls == [MAX_HOPS]
        assert "in a circle" in caplog.messages[0]

    async def test_a_repeated_job_is_no_circle(self, emitter: EventEmitter) -> None:
        """A handler may leave a timer behind that emits again, for as long as the program runs."""
        rounds, over = 3 * MAX_HOPS, asyncio.Event()
        loop = asyncio.get_running_loop()

        async def poll(number: int) -> None:
            if number == rounds:
                over.set()
            else:
                loop.call_later(0, emitter.emit_nowait, "poll", number + 1)

        emitter.on("poll", poll)
        emitter.emit_nowait("poll", 1)
        async with asyncio.timeout(PATIENCE):
            await over.wait()
        await drained(emitter)


class TestContext:
    async def test_of_the_request(self, emitter: EventEmitter) -> None:
        """A handler sees the context variables as they were when its event was emitted."""
        seen: list[str] = []

        async def handler() -> None:
            await asyncio.sleep(0)
            seen.append(request_id.get())

        emitter.on("evt", handler)
        emitter.on("subscribed", handler, delivery="background")

        async def request(name: str) -> None:
            request_id.set(name)
            emitter.emit_nowait("evt")
            await emitter.emit("subscribed")
            request_id.set("changed since")

        await asyncio.gather(*(asyncio.create_task(request(f"r-{n}")) for n in range(3)))
        await drained(emitter)
        assert sorted(seen) == ["r-0", "r-0", "r-1", "r-1", "r-2", "r-2"]

    async def test_does_not_leak(self, emitter: EventEmitter) -> None:
        """A context variable that a handler sets is seen neither by the next delivery nor by the program."""
        seen: list[str] = []

        async def handler() -> None:
            seen.append(request_id.get())
            request_id.set("leaked")
            await asyncio.sleep(0)
            seen.append(request_id.get())

        emitter.on("evt", handler)
        emitter.emit_nowait("evt")
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert seen == ["none", "leaked", "none", "leaked"]
        assert request_id.get() == "none"

    async def test_is_each_handler_s_own(self, emitter: EventEmitter) -> None:
        """Handlers of one emit do not see what another one sets; tasks that they start inherit it."""
        seen: list[str] = []

        async def setting() -> None:
            request_id.set("set by the first")
            await reading()

        async def reading() -> None:
            async def inner() -> None:
                seen.append(request_id.get())

            await asyncio.create_task(inner())

        emitter.on("evt", setting)
        emitter.on("evt", reading)
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert sorted(seen) == ["none", "set by the first"]


class TestTransactions:
    @pytest.mark.parametrize("how", ["emit_nowait", "from a handler"])
    async def test_none_is_inherited(
        self, db: TortoiseContext, emitter: EventEmitter, how: str
    ) -> None:
        """What a background handler writes is its own, and survives the caller's rollback.

        It begins while the caller's transaction is open, so that it could write into that.
        """
        name, started = connection_of(db).connection_name, asyncio.Event()

        async def audit(event: str) -> None:
            started.set()
            await AuditRow.create(event=event)

        async def hand_over(event: str) -> None:
            emitter.emit_nowait("evt", event)

        emitter.on("evt", audit)
        emitter.on("inline", hand_over)
        with pytest.raises(ZeroDivisionError):
            async with in_transaction(name):
                await AuditRow.create(event="rolled back")
                if how == "emit_nowait":
                    emitter.emit_nowait("evt", "kept")
                else:
                    await emitter.emit("inline", "kept")
                await begun(started)
                raise ZeroDivisionError
        await drained(emitter)
        assert await audited() == ["kept"]

    async def test_its_own_work(self, db: TortoiseContext, emitter: EventEmitter) -> None:
        """A background handler may open transactions of its own, and they roll back on their own."""
        name = connection_of(db).connection_name

        async def audit(event: str) -> None:
            async with in_transaction(name):
                await AuditRow.create(event=event)
                if event == "bad":
                    raise ValueError(event)

        emitter.on("evt", audit)
        for event in ("good", "bad", "better"):
            emitter.emit_nowait("evt", event)
        await drained(emitter)
        assert await audited() == ["good", "better"]

    async def test_handlers_rescued_from_a_cancellation(
        self, db: TortoiseContext, emitter: EventEmitter
    ) -> None:
        """Handlers that run after their caller is cancelled are outside its transaction, too."""
        name, started = connection_of(db).connection_name, asyncio.Event()
        rescued = asyncio.Event()

        async def interrupted() -> None:
            started.set()
            await hang()

        async def audit() -> None:
            rescued.set()
            await AuditRow.create(event="kept")

        async def request() -> None:
            async with in_transaction(name):
                await AuditRow.create(event="rolled back")
                try:
                    await emitter.emit("evt")
                finally:
                    await begun(rescued)

        emitter.on("evt", interrupted)
        emitter.on("evt", audit)
        task = asyncio.create_task(request())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await drained(emitter)
        assert await audited() == ["kept"]


class TestNoStart:
    async def test_from_everywhere(self, emitter: EventEmitter) -> None:
        """Start-up code, tasks and handlers can all emit; nothing has to be started before."""
        done: list[str] = []

        async def handler(where: str) -> None:
            done.append(where)
            if where != "handler":
                emitter.emit_nowait("evt", "handler")

        async def task() -> None:
            emitter.emit_nowait("evt", "task")

        emitter.on("evt", handler)
        emitter.emit_nowait("evt", "start-up")
        await asyncio.create_task(task())
        async with emitter as entered:
            assert entered is emitter
            emitter.emit_nowait("evt", "inside")
        assert sorted(done) == ["handler", "handler", "handler", "inside", "start-up", "task"]

    async def test_after_the_end(self, emitter: EventEmitter) -> None:
        """A closed emitter works on as before."""
        done: list[int] = []

        async def handler() -> None:
            done.append(1)

        emitter.on("evt", handler)
        async with emitter:
            emitter.emit_nowait("evt")
        assert done == [1]
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert done == [1, 1]

    def test_in_one_loop_after_another(self, emitter: EventEmitter) -> None:
        """An emitter outlives its loop; loops that are gone are forgotten."""
        loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

        async def handler() -> None:
            await asyncio.sleep(0)
            loops.append(weakref.ref(asyncio.get_running_loop()))

        async def program() -> None:
            emitter.emit_nowait("evt")
            await drained(emitter)

        emitter.on("evt", handler)
        asyncio.run(program())
        asyncio.run(program())
        for _ in range(3):
            emitter.emit_sync("evt")
        gc.collect()
        assert [loop() for loop in loops] == [None] * 5

    def test_what_another_loop_left_is_no_obstacle(self, emitter: EventEmitter) -> None:
        """Tasks and deliveries of a loop that was stopped half-way do not hold up the next one."""
        done: list[int] = []

        async def handler(number: int) -> None:
            if number == 0:
                await hang()
            done.append(number)

        async def cut_short() -> None:
            emitter.emit_nowait("evt", 0)
            emitter.emit_nowait("evt", 1)
            await asyncio.sleep(0)

        async def program() -> None:
            emitter.emit_nowait("evt", 2)
            await drained(emitter)

        emitter.on("evt", handler, timeout=PATIENCE)
        asyncio.run(cut_short())
        asyncio.run(program())
        assert done == [2]


class TestEnd:
    async def test_drains_what_is_emitted_meanwhile(self, emitter: EventEmitter) -> None:
        """`aclose` returns when nothing waits, including what handlers emitted while it drained."""
        done: list[int] = []

        async def handler(number: int) -> None:
            await asyncio.sleep(0)
            done.append(number)
            if number < 20:
                emitter.emit_nowait("evt", number + 1)

        emitter.on("evt", handler)
        emitter.emit_nowait("evt", 1)
        await drained(emitter)
        assert done == list(range(1, 21))

    async def test_others_may_emit_while_it_drains(self, emitter: EventEmitter) -> None:
        """An event that is emitted the moment the queue is empty is neither lost nor reported lost."""
        emptied, done = asyncio.Event(), list[str]()

        async def last() -> None:
            emptied.set()

        async def late() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            done.append("late")

        async def other() -> None:
            await emptied.wait()
            emitter.emit_nowait("late")

        emitter.on("last", last)
        emitter.on("late", late)
        waiting = asyncio.create_task(other())
        await asyncio.sleep(0)
        emitter.emit_nowait("last")
        await drained(emitter)
        assert done == ["late"]
        await waiting

    async def test_reports_what_was_lost(self, caplog: pytest.LogCaptureFixture) -> None:
        """After its timeout `aclose` cancels what runs, and returns and logs what was not delivered."""
        queue, cancelled = BackgroundQueue(), asyncio.Event()
        emitter = EventEmitter(backend=queue)

        async def hanging() -> None:
            try:
                await hang()
            finally:
                cancelled.set()

        emitter.on("a", hanging)
        emitter.on("b", hanging)
        for event in ("a", "b", "a"):
            emitter.emit_nowait(event)
        lost = [f"event '{event}' for hanging" for event in ("a", "a", "b")]  # lane by lane
        assert await emitter.aclose(SHORT) == lost
        async with asyncio.timeout(PATIENCE):
            await cancelled.wait()
        assert queue.dropped == 3
        (message,) = caplog.messages
        assert message.startswith("Background delivery closed after 0.0")
        assert message.endswith(f" s with 3 deliveries lost: {', '.join(lost)}")

    async def test_goes_on_after_a_loss(self, emitter: EventEmitter) -> None:
        """An event emitted right after a lossy end is delivered, even beside a handler that hangs."""
        release, done = asyncio.Event(), list[int]()

        async def stubborn() -> None:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

        async def handler() -> None:
            done.append(1)

        emitter.on("stubborn", stubborn)
        emitter.on("evt", handler)
        emitter.emit_nowait("stubborn")
        assert len(await emitter.aclose(SHORT)) == 1
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert done == [1]
        release.set()

    async def test_one_deadline_for_all(self, emitter: EventEmitter) -> None:
        """Tasks of handlers and the queue share the seconds that `aclose` is given."""
        started = asyncio.Event()

        async def interrupted() -> None:
            started.set()
            await hang()

        emitter.on("evt", interrupted)
        emitter.on("evt", hang)
        emitting = asyncio.create_task(emitter.emit("evt"))
        await started.wait()
        emitting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await emitting
        emitter.on("queued", hang)
        emitter.emit_nowait("queued")
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await emitter.aclose(0.3) == ["event 'evt'", "event 'queued' for hang"]
        assert loop.time() - began < 0.55

    async def test_finishes_what_the_background_began(self, emitter: EventEmitter) -> None:
        """`aclose` waits for a task of a background handler, and delivers what it emits."""
        done: list[str] = []

        async def work(name: str) -> None:
            for _ in range(20):
                await asyncio.sleep(0)
            done.append(name)
            if name == "task":
                await emitter.emit("more")

        async def begin() -> None:
            deliverer_of(emitter).spawn(work("task"), "task")

        emitter.on("evt", begin, delivery="background")
        emitter.on("more", lambda: done.append("more"), delivery="background")
        await emitter.emit("evt")
        await drained(emitter)
        assert done == ["task", "more"]

    async def test_from_a_handler(self, emitter: EventEmitter) -> None:
        """A background handler that closes the emitter does not wait for itself."""
        done: list[object] = []

        async def closing() -> None:
            done.append(await emitter.aclose())

        emitter.on("evt", closing)
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert done == [[]]

    async def test_from_two_handlers_at_once(self, emitter: EventEmitter) -> None:
        """Handlers in two lanes that close the emitter do not wait for each other."""
        done: list[object] = []

        async def closing(name: str) -> None:
            await asyncio.sleep(0)
            done.append(await emitter.aclose())

        emitter.on("evt", partial(closing, "a"))
        emitter.on("evt", partial(closing, "b"), timeout=PATIENCE)
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert done == [[], []]

    async def test_two_at_once(self, emitter: EventEmitter) -> None:
        """Two calls that close an emitter at the same time report a loss once."""
        emitter.on("evt", hang)
        emitter.emit_nowait("evt")
        lost = await asyncio.gather(emitter.aclose(SHORT), emitter.aclose(SHORT))
        assert sorted(lost) == [[], ["event 'evt' for hang"]]

    def test_a_loop_that_ends_without_it(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A program that ends without `aclose` loses what waits, and logs it."""

        async def program() -> None:
            emitter.emit_nowait("evt")
            emitter.emit_nowait("evt")
            await asyncio.sleep(0)

        emitter.on("evt", hang)
        asyncio.run(program())
        assert caplog.messages == [
            "Background delivery was cancelled with 2 deliveries lost: "
            "event 'evt' for hang, event 'evt' for hang"
        ]


class Recorder:
    """A backend of the host's own that runs its jobs on exit."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.jobs: list[Job] = []
        self.log: list[str] = []
        self.hangs = hangs

    async def __aenter__(self) -> None:
        """Note it."""
        self.log.append("entered")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Carry out the jobs."""
        self.log.append("left")
        if self.hangs:
            await hang()
        for job in self.jobs:
            await job()

    def submit(self, job: Job) -> None:
        """Keep the job."""
        self.jobs.append(job)


class AtOnce(Recorder):
    """A backend that makes a task of each job where it is submitted."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[asyncio.Task[None]] = []

    def submit(self, job: Job) -> None:
        """Begin."""
        self.tasks.append(asyncio.ensure_future(job()))

    async def __aexit__(self, *exc: object) -> None:
        """Wait for all."""
        await asyncio.gather(*self.tasks)


class TestBackend:
    async def test_that_takes_nothing_harms_no_login(
        self, db: TortoiseContext, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The change of the service is committed, in a transaction of the caller too; the loss is logged."""
        queue = BackgroundQueue(size=1, overflow="raise")
        emitter = EventEmitter(backend=queue)
        emitter.on("*", lambda event: None, delivery="background")
        auth = AuthService(User, AuthConfig(secret=SECRET), emitter=emitter)
        ada = await User.create_user(email="ada@example.com", password=PASSWORD)
        queue.size = 0
        async with in_transaction():
            await auth.set_password(ada, PASSWORD)
        with pytest.raises(AuthenticationError):
            await auth.login("ada@example.com", "wrong")
        result = await auth.login("ada@example.com", PASSWORD)
        assert await auth.authenticate(result.access_token) == ada
        assert [each.message for each in caplog.records if each.levelname == "ERROR"] == [
            f"event '{name}' was not delivered in the background"
            for name in ("password_changed", "user_login_failed", "user_login")
        ]
        await drained(emitter)

    async def test_that_stores_nothing_stops_no_other_handler(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A durable handler without a database is reported, and the next handlers run."""
        emitter, received = EventEmitter(), list[str]()
        emitter.on("evt", lambda: None, delivery="durable", name="d")
        emitter.on("evt", lambda: received.append("evt"), priority=20)
        emitter.emit_nowait("evt")
        await drained(emitter)
        assert received == ["evt"]
        assert "have durable subscriptions" in caplog.text or "has durable" in caplog.text

    async def test_of_the_host_s_own(self) -> None:
        """A backend is entered and left with the emitter, and gets every delivery as a job."""
        backend, done = Recorder(), list[tuple[str, int]]()
        emitter = EventEmitter(backend=backend)

        async def handler(number: int) -> None:
            done.append(("handler", number))

        emitter.on("evt", handler)
        emitter.on("evt", lambda number: done.append(("background", number)), delivery="background")
        async with emitter:
            assert backend.log == ["entered"]
            await emitter.emit("evt", 1)
            emitter.emit_nowait("evt", 2)
            assert done == [("handler", 1)]
            assert [job.description for job in backend.jobs] == [
                "event 'evt' for <lambda>",
                "event 'evt' for handler",
                "event 'evt' for <lambda>",
            ]
        assert backend.log == ["entered", "left"]
        assert done == [("handler", 1), ("background", 1), ("handler", 2), ("background", 2)]

    @pytest.mark.parametrize("outcome", ["commit", "roll back"])
    async def test_that_begins_at_once_is_outside_the_transaction(
        self, db: TortoiseContext, outcome: str
    ) -> None:
        """A backend may await a job inside the caller's transaction: its writes are its own."""
        backend = AtOnce()
        emitter = EventEmitter(backend=backend)

        async def audit(event: str) -> None:
            await asyncio.sleep(0)
            await AuditRow.create(event=event)

        emitter.on("evt", audit, delivery="background")
        emitter.on("now", audit)
        with suppress(ZeroDivisionError):
            async with in_transaction(connection_of(db).connection_name):
                await emitter.emit("evt", "on commit")
                emitter.emit_nowait("now", "at once")
                await AuditRow.create(event="in the transaction")
                if outcome == "roll back":
                    raise ZeroDivisionError
        await drained(emitter)
        kept = ["at once"] + ["in the transaction", "on commit"] * (outcome == "commit")
        assert sorted(await audited()) == kept

    async def test_that_takes_too_long(self, caplog: pytest.LogCaptureFixture) -> None:
        """A backend that does not stop in time is abandoned, and that is reported."""
        emitter = EventEmitter(backend=Recorder(hangs=True))
        assert await emitter.aclose(SHORT) == ["what Recorder had not finished"]
        assert caplog.messages == ["Closed with deliveries lost: what Recorder had not finished"]

    async def test_that_times_out_by_itself(self) -> None:
        """A `TimeoutError` of the backend's own is not mistaken for the deadline."""

        class Broken(Recorder):
            async def __aexit__(self, *exc: object) -> None:
                """Fail."""
                raise TimeoutError("broker")

        with pytest.raises(TimeoutError, match="broker"):
            await EventEmitter(backend=Broken()).aclose(PATIENCE)

    def test_is_left_alone_by_emit_sync(self) -> None:
        """`emit_sync` gives the backend its jobs and does not stop it."""
        backend = Recorder()
        emitter = EventEmitter(backend=backend)
        emitter.on("evt", lambda: None, delivery="background")
        emitter.emit_sync("evt")
        assert len(backend.jobs) == 1
        assert backend.log == []
