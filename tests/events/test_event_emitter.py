"""Emitting: which handlers are called with what, in which order, and what a bad handler causes."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal
from unittest.mock import Mock

import pytest
from tortoise.context import TortoiseContext
from tortoise.transactions import in_transaction

from tests.support.accounts import SECRET
from tests.support.app import AuditRow, User
from tests.support.database import connection_of
from tortoise_auth import AuthConfig, AuthService
from tortoise_auth.events import (
    Delivered,
    Event,
    EventEmitter,
    EventError,
    EventErrorGroup,
    NamedEvent,
    UserLogin,
    UserLogout,
)
from tortoise_auth.events.invocation import MAX_NESTED
from tortoise_auth.testing import FakeClock, cheap_hasher

Handler = Callable[..., Any]
Modes = dict[str, Any]

ADA = User(id=7, email="ada@example.com")
PATIENCE = 10.0
SHORT = 0.02

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


@dataclass(frozen=True, kw_only=True)
class OrderPaid(Event):
    """An event of the host's own."""

    order_id: int
    amount: float = 0.0


def login() -> UserLogin[User]:
    return UserLogin(user=ADA, subject_id="7", session_id="s-1")


def noting(order: list[Any], what: object) -> Handler:
    async def handler() -> None:
        order.append(what)

    return handler


def failing(error: BaseException) -> Handler:
    async def failing() -> None:
        raise error

    return failing


async def settled(emitter: EventEmitter) -> None:
    """Wait for all that the emitter left running."""
    async with asyncio.timeout(PATIENCE):
        assert await emitter.aclose() == []


PATHS: list[Any] = [
    pytest.param({}, id="short path"),
    pytest.param({"timeout": PATIENCE}, id="in a task"),
    pytest.param({"once": True}, id="once"),
]
"""Options with which handlers take the different ways through `emit`."""


class TestWhatHandlersReceive:
    async def test_by_class_by_name_and_all(self, emitter: EventEmitter) -> None:
        """A handler by class gets the event, by name its arguments, and by ``*`` every event."""
        typed, named, everything = [], [], []

        @emitter.on(UserLogin)
        async def by_class(event: UserLogin[User]) -> None:
            typed.append(event)

        @emitter.on("user_login")
        async def by_name(user: User) -> None:
            named.append(user)

        @emitter.on("*")
        async def all_(event: Event) -> None:
            everything.append(event)

        event, other = login(), UserLogout(user=ADA)
        await emitter.emit(event)
        await emitter.emit(other)
        assert typed == [event]
        assert typed[0].user is ADA
        assert named == [ADA]
        assert everything == [event, other]

    @pytest.mark.parametrize("form", ["*", Event], ids=["star", "class"])
    async def test_names_without_a_class(self, emitter: EventEmitter, form: Any) -> None:
        """An emit by name alone reaches ``*`` as an event with the name and the payload."""
        received: list[Event] = []

        async def all_(event: Event) -> None:
            received.append(event)

        emitter.on(form, all_)
        await emitter.emit("order_paid", 7, amount=9.5)
        (event,) = received
        assert isinstance(event, NamedEvent)
        assert (event.name, event.args, dict(event.kwargs)) == ("order_paid", (7,), {"amount": 9.5})
        assert event.occurred_at.tzinfo is not None

    async def test_a_named_event_can_be_emitted_again(self, emitter: EventEmitter) -> None:
        """A `NamedEvent` that ``*`` received reaches handlers by name when it is emitted again."""
        recorded: list[Event] = []
        replayed: list[object] = []
        emitter.on("*", recorded.append)
        await emitter.emit("order_paid", 7, amount=9.5, currency="EUR")
        other = EventEmitter()
        other.on("order_paid", lambda order_id, currency: replayed.append((order_id, currency)))
        other.on("*", lambda event: replayed.append(event.name))
        await other.emit(recorded[0])
        assert replayed == [(7, "EUR"), "order_paid"]

    async def test_events_of_the_host(self, emitter: EventEmitter) -> None:
        """A subclass of `Event` reaches handlers of its class, and of its name, field by field."""
        received: list[object] = []

        @emitter.on(OrderPaid)
        async def typed(event: OrderPaid) -> None:
            received.append(event.order_id)

        @emitter.on("order_paid")
        async def named(amount: float, context: object) -> None:
            received.append(amount)

        await emitter.emit(OrderPaid(order_id=7, amount=9.5))
        assert received == [7, 9.5]

    async def test_a_name_cannot_become_a_class(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A subscription by class fails when the event is emitted by name, and the others run."""
        received: list[str] = []

        @emitter.on(UserLogin)
        async def typed(event: UserLogin[User]) -> None:
            received.append("typed")

        emitter.on("user_login", noting(received, "named"))
        await emitter.emit("user_login", ADA)
        assert received == ["named"]
        assert caplog.messages == [
            "Handler 'typed' for event 'user_login' raised TypeError: it listens to the class of "
            "'user_login' and needs an event object, but the event was emitted by name"
        ]

    @pytest.mark.parametrize("what", [7, None, b"user_login", object(), UserLogin])
    async def test_neither_name_nor_event(self, emitter: EventEmitter, what: Any) -> None:
        """Anything else is refused, with or without a subscription."""
        with pytest.raises(TypeError, match="the name of an event or an event object"):
            await emitter.emit(what)

    async def test_an_event_is_its_own_payload(self, emitter: EventEmitter) -> None:
        """Arguments beside an event object are refused."""
        with pytest.raises(TypeError, match="alone"):
            await emitter.emit(login(), "more")
        with pytest.raises(TypeError, match="alone"):
            await emitter.emit(login(), more=1)

    @pytest.mark.parametrize("options", [{}, {"thread": False}, {"thread": True}], ids=str)
    async def test_where_plain_functions_run(self, emitter: EventEmitter, options: Any) -> None:
        """A plain function runs on a worker thread unless ``thread=False``."""
        threads: list[int] = []
        emitter.on("evt", lambda: threads.append(threading.get_ident()), **options)
        await emitter.emit("evt")
        here = threading.get_ident()
        assert [each == here for each in threads] == [options.get("thread") is False]

    async def test_a_blocking_function_does_not_stall_the_loop(self, emitter: EventEmitter) -> None:
        """While a plain function blocks, the loop goes on: it is what releases the function."""
        release = threading.Event()
        emitter.on("evt", lambda: release.wait(PATIENCE))
        emitting = asyncio.create_task(emitter.emit("evt"))
        await asyncio.sleep(0)
        assert not emitting.done()
        release.set()
        await emitting

    async def test_hanging_threads_are_not_those_of_the_loop(self, emitter: EventEmitter) -> None:
        """However many plain handlers hang, the loop still looks up names on threads of its own."""
        go_on = threading.Event()

        @emitter.on("evt", timeout=0.01)
        def hang() -> None:
            go_on.wait(30)

        for _ in range(40):
            await emitter.emit("evt")
        try:
            async with asyncio.timeout(10):
                await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        finally:
            go_on.set()
        assert await emitter.aclose(10) == []

    async def test_context_variables_reach_threads(self, emitter: EventEmitter) -> None:
        """A handler on a worker thread sees the context variables of the emit."""
        seen: list[str] = []
        request_id.set("r-1")
        emitter.on("evt", lambda: seen.append(request_id.get()))
        await emitter.emit("evt")
        assert seen == ["r-1"]

    @pytest.mark.parametrize("options", PATHS)
    async def test_a_changed_payload_is_seen_by_later_handlers(
        self, emitter: EventEmitter, options: Modes
    ) -> None:
        """What a handler changes in a mutable payload the next one sees."""

        async def add(cart: list[str]) -> None:
            cart.append("gift")

        seen: list[list[str]] = []
        emitter.on("evt", add, **options)
        emitter.on("evt", lambda cart: seen.append(list(cart)))
        await emitter.emit("evt", ["book"])
        assert seen == [["book", "gift"]]


class TestOnce:
    async def test_removed_before_the_call(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A once-handler that emits its own event is not called again, nor by an emit meanwhile."""
        ran: list[int] = []

        async def handler() -> None:
            ran.append(1)
            await emitter.emit("evt")
            await asyncio.gather(emitter.emit("evt"), emitter.emit("evt"))

        emitter.once("evt", handler)
        await asyncio.gather(emitter.emit("evt"), emitter.emit("evt"))
        assert ran == [1]
        assert emitter.events() == []
        assert caplog.messages == []

    async def test_a_failure_does_not_bring_it_back(self) -> None:
        """A once-handler that failed is not called again."""
        failures: list[EventError] = []
        emitter = EventEmitter(on_error=failures.append)
        emitter.once("evt", failing(ValueError("no")))
        await emitter.emit("evt")
        await emitter.emit("evt")
        assert len(failures) == 1

    async def test_in_the_background(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A once-handler that is queued twice runs once."""
        ran: list[int] = []
        emitter.once("evt", noting(ran, 1), delivery="background")
        emitter.emit_nowait("evt")
        await emitter.emit("evt")
        await settled(emitter)
        assert ran == [1]
        assert caplog.messages == []


class TestErrorPolicies:
    @pytest.mark.parametrize("options", PATHS)
    async def test_log(
        self, emitter: EventEmitter, options: Modes, caplog: pytest.LogCaptureFixture
    ) -> None:
        """By default a failure is one ERROR line with its traceback, and the next handler runs."""
        ran: list[int] = []
        emitter.on("evt", failing(ValueError("no")), **options)
        emitter.on("evt", noting(ran, 1), **options)
        await emitter.emit("evt")
        assert ran == [1]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.getMessage() == "Handler 'failing' for event 'evt' raised ValueError: no"
        assert record.exc_info is not None
        assert record.exc_info[2] is not None

    @pytest.mark.parametrize("options", PATHS)
    async def test_raise(self, options: Modes, caplog: pytest.LogCaptureFixture) -> None:
        """``errors="raise"`` raises the first failure, calls no handler after it and logs nothing."""
        ran: list[int] = []
        emitter, original = EventEmitter(errors="raise"), ValueError("no")
        emitter.on("evt", noting(ran, 1), **options)
        emitter.on("evt", failing(original), **options)
        emitter.on("evt", noting(ran, 2), **options)
        with pytest.raises(EventError) as raised:
            await emitter.emit("evt")
        assert raised.value.original is raised.value.__cause__ is original
        assert ran == [1]
        assert caplog.records == []

    @pytest.mark.parametrize("options", PATHS)
    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_group(
        self, options: Modes, concurrent: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """``errors="group"`` runs all and raises every failure, in order, in one group."""
        ran: list[int] = []
        emitter = EventEmitter(errors="group", concurrent=concurrent)
        for number in range(3):
            emitter.on("evt", failing(ValueError(number)), **options)
            emitter.on("evt", noting(ran, number), **options)
        with pytest.raises(EventErrorGroup, match="Handlers for event 'evt' failed") as raised:
            await emitter.emit("evt")
        assert isinstance(raised.value, ExceptionGroup)
        assert isinstance(raised.value, EventError)
        assert str(raised.value.original) == "0"
        some, rest = raised.value.split(lambda error: str(error.__cause__) == "1")
        assert isinstance(some, EventErrorGroup)
        assert isinstance(rest, EventErrorGroup)
        assert [len(some.exceptions), len(rest.exceptions)] == [1, 2]
        errors = raised.value.exceptions
        assert all(isinstance(error, EventError) for error in errors)
        assert [str(error.__cause__) for error in errors] == ["0", "1", "2"]
        assert ran == [0, 1, 2]
        assert caplog.records == []

    async def test_group_without_failures(self) -> None:
        """Nothing is raised when nothing failed."""
        ran: list[int] = []
        emitter = EventEmitter(errors="group")
        emitter.on("evt", noting(ran, 1))
        await emitter.emit("evt")
        assert ran == [1]

    @pytest.mark.parametrize("options", [{"errors": "ignore"}, {"errors": True}], ids=str)
    def test_unknown_policies(self, options: Any) -> None:
        """An unknown policy is refused when the emitter is made."""
        with pytest.raises(ValueError, match="errors must be"):
            EventEmitter(**options)

    def test_a_contradiction(self) -> None:
        """``propagate_errors`` is ``errors="raise"`` and cannot be asked to log."""
        with pytest.raises(ValueError, match="fit propagate_errors"):
            EventEmitter(propagate_errors=True, errors="log")
        assert EventEmitter(propagate_errors=True).errors == "raise"
        assert EventEmitter(errors="raise").propagate_errors

    @pytest.mark.parametrize("errors", ["log", "raise", "group"])
    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_on_error(
        self, errors: Literal["log", "raise", "group"], concurrent: bool
    ) -> None:
        """`on_error` is called with each failure, whatever the policy."""
        failures: list[EventError] = []
        emitter = EventEmitter(errors=errors, concurrent=concurrent, on_error=failures.append)
        emitter.on("evt", failing(ValueError("no")))
        raised: list[BaseException] = []
        try:
            await emitter.emit("evt")
        except (EventError, ExceptionGroup) as error:
            raised.append(error)
        assert bool(raised) is (errors != "log")
        (failure,) = failures
        assert (failure.event_name, failure.handler_name) == ("evt", "failing")
        assert isinstance(failure.__cause__, ValueError)

    @pytest.mark.parametrize("failure", [KeyError, BaseException, asyncio.CancelledError])
    async def test_on_error_may_fail(
        self, failure: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        """A failing `on_error` is logged and changes nothing else."""
        ran: list[int] = []

        def broken(error: EventError) -> None:
            raise failure("metrics")

        emitter = EventEmitter(on_error=broken)
        emitter.on("evt", failing(ValueError("no")))
        emitter.on("evt", noting(ran, 1))
        await emitter.emit("evt")
        assert ran == [1]
        assert "on_error failed for event 'evt'" in caplog.messages

    async def test_errors_survive_pickling(self) -> None:
        """An `EventError` can go to another process, and says the same there."""
        emitter = EventEmitter(errors="raise")
        emitter.on("evt", failing(ValueError("no")))
        with pytest.raises(EventError) as raised:
            await emitter.emit("evt")
        copied: EventError = pickle.loads(pickle.dumps(raised.value))
        assert str(copied) == str(raised.value)
        assert (copied.event_name, copied.handler_name) == ("evt", "failing")
        assert repr(copied.original) == "ValueError('no')"


class TestTimeout:
    async def test_a_handler_that_hangs(self, caplog: pytest.LogCaptureFixture) -> None:
        """After its time a handler is cancelled and has failed, and the next one runs."""
        emitter, ran, cancelled = EventEmitter(), list[int](), asyncio.Event()

        async def hanging() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        emitter.on("evt", hanging, timeout=SHORT)
        emitter.on("evt", noting(ran, 1))
        async with asyncio.timeout(PATIENCE):
            await emitter.emit("evt")
            await cancelled.wait()
        assert ran == [1]
        assert caplog.messages == [
            "Handler 'hanging' for event 'evt' raised TimeoutError: took longer than 0.02 s"
        ]

    async def test_a_handler_that_will_not_stop(self, emitter: EventEmitter) -> None:
        """A handler that ignores its cancellation does not keep the emit from returning."""
        ran: list[str] = []
        release = asyncio.Event()

        async def stubborn() -> None:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    ran.append("ignored")

        emitter.on("evt", stubborn, timeout=SHORT)
        emitter.on("evt", noting(ran, "next"))
        async with asyncio.timeout(PATIENCE):
            await emitter.emit("evt")
        assert "next" in ran
        release.set()
        await settled(emitter)
        assert "ignored" in ran

    async def test_what_it_raises_too_late(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A late failure has been reported as a timeout and is not reported again."""

        async def late() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("too late")

        emitter.on("evt", late, timeout=SHORT)
        await emitter.emit("evt")
        await settled(emitter)
        assert len(caplog.records) == 1

    async def test_on_a_thread(self) -> None:
        """A plain function that blocks for longer has failed, too."""
        release = threading.Event()
        failures: list[EventError] = []
        emitter = EventEmitter(on_error=failures.append)
        emitter.on("evt", lambda: release.wait(PATIENCE), timeout=SHORT)
        began = time.monotonic()
        await emitter.emit("evt")
        assert time.monotonic() - began < PATIENCE / 2
        release.set()
        assert isinstance(failures[0].original, TimeoutError)

    async def test_in_time(self) -> None:
        """A handler that finishes in time sees the context, and raises its own error."""
        failures: list[EventError] = []
        seen: list[str] = []
        emitter = EventEmitter(on_error=failures.append)
        request_id.set("r-1")

        async def prompt() -> None:
            seen.append(request_id.get())
            raise ValueError("no")

        emitter.on("evt", prompt, timeout=PATIENCE)
        await emitter.emit("evt")
        assert seen == ["r-1"]
        assert isinstance(failures[0].original, ValueError)

    @pytest.mark.parametrize("delivery", ["inline", "background"])
    async def test_its_own_timeouts(
        self, emitter: EventEmitter, delivery: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A `TimeoutError` of the handler's own is an ordinary failure, in the background too."""

        async def impatient() -> None:
            async with asyncio.timeout(0):
                await asyncio.Event().wait()

        emitter.on("evt", impatient, delivery=delivery)
        await emitter.emit("evt")
        await settled(emitter)
        assert caplog.messages == ["Handler 'impatient' for event 'evt' raised TimeoutError: "]


class TestStopIteration:
    @pytest.mark.parametrize("thread", [None, False])
    async def test_from_a_plain_function(
        self, emitter: EventEmitter, thread: bool | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        """``next()`` of nothing in a plain function is a failure; no future waits for it for ever."""
        ran: list[int] = []
        emitter.on("evt", lambda: next(iter(())), thread=thread)
        emitter.on("evt", noting(ran, 1))
        async with asyncio.timeout(PATIENCE):
            await emitter.emit("evt")
        assert ran == [1]
        assert "StopIteration" in caplog.messages[0]


async def cancel_when(task: asyncio.Task[None], ready: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE):
        await ready.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class TestCancellation:
    @pytest.mark.parametrize("options", PATHS)
    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_a_handler_s_own(
        self, options: Modes, concurrent: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A `CancelledError` that a handler raises is a failure like others, and later ones run."""
        ran: list[int] = []
        emitter = EventEmitter(concurrent=concurrent)

        async def confused() -> None:
            ended = asyncio.create_task(asyncio.Event().wait())
            ended.cancel()
            await ended

        emitter.on("evt", confused, **options)
        emitter.on("evt", noting(ran, 1), **options)
        await emitter.emit("evt")
        assert ran == [1]
        assert caplog.messages == ["Handler 'confused' for event 'evt' raised CancelledError: "]

    @pytest.mark.parametrize("options", PATHS)
    @pytest.mark.parametrize("payload", [{}, {"surplus": 1}], ids=["exact", "with surplus"])
    @pytest.mark.parametrize("errors", ["log", "raise", "group"])
    async def test_of_the_caller(
        self,
        options: Modes,
        payload: dict[str, int],
        errors: Literal["log", "raise", "group"],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The handler that runs is cancelled, the caller too; those after it run in a task."""
        emitter = EventEmitter(errors=errors)
        order: list[str] = []
        started = asyncio.Event()

        async def interrupted() -> None:
            order.append("started")
            started.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                order.append("cancelled")
                raise

        emitter.on("evt", noting(order, "first"), **options)
        emitter.on("evt", interrupted, **options)
        emitter.on("evt", failing(ValueError("reported all the same")), **options)
        emitter.on("evt", noting(order, "last"), **options)
        await cancel_when(asyncio.create_task(emitter.emit("evt", **payload)), started)
        await settled(emitter)
        assert order == ["first", "started", "cancelled", "last"]
        assert caplog.messages == [
            "Handler 'failing' for event 'evt' raised ValueError: reported all the same"
        ]

    async def test_background_deliveries_are_handed_over(self, emitter: EventEmitter) -> None:
        """A cancelled emit has still queued what goes to the background."""
        ran: list[int] = []
        started = asyncio.Event()

        async def interrupted() -> None:
            started.set()
            await asyncio.Event().wait()

        emitter.on("evt", interrupted)
        emitter.on("evt", noting(ran, 1), delivery="background")
        await cancel_when(asyncio.create_task(emitter.emit("evt")), started)
        await settled(emitter)
        assert ran == [1]

    async def test_by_a_timeout_around_the_emit(self, emitter: EventEmitter) -> None:
        """``asyncio.timeout`` around an emit works as always, and loses no handler."""
        ran: list[int] = []

        async def hanging() -> None:
            await asyncio.Event().wait()

        emitter.on("evt", hanging)
        emitter.on("evt", noting(ran, 1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT):
                await emitter.emit("evt")
        await settled(emitter)
        assert ran == [1]

    @pytest.mark.parametrize("together", [1, 3])
    async def test_while_a_plain_function_runs_before_concurrent_ones(self, together: int) -> None:
        """A concurrent emit that is cancelled in its first part still runs the second."""
        emitter = EventEmitter(concurrent=True)
        ran: list[object] = []
        started, release = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def blocking() -> None:
            loop.call_soon_threadsafe(started.set)
            release.wait(PATIENCE)

        emitter.on("evt", blocking)
        emitter.on("evt", lambda: ran.append("plain"))
        for number in range(together):
            emitter.on("evt", noting(ran, number))
        await cancel_when(asyncio.create_task(emitter.emit("evt")), started)
        release.set()
        await settled(emitter)
        assert ran[0] == "plain"
        assert set(ran[1:]) == set(range(together))

    @pytest.mark.parametrize("errors", ["log", "raise", "group"])
    async def test_while_concurrent_handlers_run(
        self, errors: Literal["log", "raise", "group"], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Concurrent handlers that have started go on, and their failures are reported."""
        emitter = EventEmitter(concurrent=True, errors=errors)
        ran: list[int] = []
        started, release = asyncio.Event(), asyncio.Event()

        async def patient(number: int) -> None:
            started.set()
            await release.wait()
            ran.append(number)
            if number == 1:
                raise ValueError("late")

        for number in range(3):
            emitter.on("evt", partial(patient, number))
        await cancel_when(asyncio.create_task(emitter.emit("evt")), started)
        assert ran == []
        release.set()
        await settled(emitter)
        assert sorted(ran) == [0, 1, 2]
        assert caplog.messages == ["Handler 'patient' for event 'evt' raised ValueError: late"]


class TestInterrupts:
    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("options", PATHS)
    @pytest.mark.parametrize("concurrent", [False, True])
    def test_pass(self, interrupt: type[BaseException], options: Modes, concurrent: bool) -> None:
        """An exception that ends the program is not a failure of the handler: it propagates unreported."""
        failures: list[EventError] = []
        emitter = EventEmitter(concurrent=concurrent, on_error=failures.append)
        emitter.on("evt", failing(interrupt()), **options)
        emitter.on("evt", noting([], 1), **options)
        with pytest.raises(interrupt):
            asyncio.run(emitter.emit("evt"))
        assert failures == []


class Panic(BaseException):
    """What some libraries raise: no `Exception`."""


class TestAnyClass:
    @pytest.mark.parametrize("options", PATHS)
    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_is_a_failure(
        self, options: Modes, concurrent: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Anything a handler raises, `Exception` or not, is its failure, and the next one runs."""
        ran: list[int] = []
        emitter = EventEmitter(concurrent=concurrent)
        emitter.on("evt", failing(Panic("no")), **options)
        emitter.on("evt", noting(ran, 1), **options)
        await emitter.emit("evt")
        assert ran == [1]
        assert caplog.messages == ["Handler 'failing' for event 'evt' raised Panic: no"]

    async def test_raised(self) -> None:
        """A policy that raises does so with an `EventError`."""
        emitter = EventEmitter(errors="raise")
        emitter.on("evt", failing(Panic("no")))
        with pytest.raises(EventError) as raised:
            await emitter.emit("evt")
        assert isinstance(raised.value.original, Panic)


RECURSION: list[Any] = [
    pytest.param({}, {}, id="short path"),
    pytest.param({}, {"errors": "group"}, id="general path"),
    pytest.param({"timeout": PATIENCE}, {}, id="tasks"),
    pytest.param({}, {"concurrent": True}, id="concurrent"),
    pytest.param({"timeout": PATIENCE}, {"concurrent": True}, id="concurrent tasks"),
    pytest.param({"priority": 1}, {"errors": "raise"}, id="raising"),
]


class TestRecursion:
    @pytest.mark.parametrize(("options", "kind"), RECURSION)
    async def test_two_that_emit_each_other(self, options: Modes, kind: Modes) -> None:
        """Handlers that emit each other's event are stopped, and it is reported once."""
        failures: list[EventError] = []
        calls = [0]
        emitter = EventEmitter(**kind, on_error=failures.append)

        def answering(event: str) -> Handler:
            async def answer() -> None:
                calls[0] += 1
                await emitter.emit(event)

            return answer

        emitter.on("ping", answering("pong"), **options)
        emitter.on("pong", answering("ping"), **options)
        if kind.get("errors"):
            with pytest.raises((EventError, ExceptionGroup)):
                await emitter.emit("ping")
        else:
            await emitter.emit("ping")
        assert len(failures) == 1
        assert isinstance(failures[0].original, RecursionError)
        assert 10 < calls[0] < 1000

    @pytest.mark.parametrize(("options", "kind"), RECURSION[:5])
    async def test_two_that_emit_their_own(self, options: Modes, kind: Modes) -> None:
        """Two handlers of one event that emit it do not double with every round.

        Each fails in the outermost emit, and that is what is reported.
        """
        failures: list[EventError] = []
        calls = [0]
        emitter = EventEmitter(**kind, on_error=failures.append)

        async def first() -> None:
            calls[0] += 1
            await emitter.emit("evt")

        async def second() -> None:
            calls[0] += 1
            await emitter.emit("evt")

        emitter.on("evt", first, **options)
        emitter.on("evt", second, **options)
        with suppress(ExceptionGroup):
            await emitter.emit("evt")
        assert sorted(error.handler_name for error in failures) == ["first", "second"]
        assert calls[0] < 3000

    async def test_through_worker_threads(self) -> None:
        """Plain functions that emit from their threads without end are stopped as well."""
        failures: list[EventError] = []
        calls = [0]
        emitter = EventEmitter(on_error=failures.append)

        def recursing() -> None:
            calls[0] += 1
            emitter.emit_sync("evt")

        emitter.on("evt", recursing)
        await emitter.emit("evt")
        assert calls == [MAX_NESTED]
        assert [type(error.original) for error in failures] == [RecursionError]

    @pytest.mark.parametrize("limit", [None, PATIENCE])
    async def test_a_handler_s_own(
        self, emitter: EventEmitter, limit: float | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Endless recursion inside a handler is its failure; it does not leave the emit."""
        ran: list[int] = []

        def endless() -> None:
            endless()

        async def handler() -> None:
            endless()

        emitter.on("evt", handler, timeout=limit)
        emitter.on("evt", noting(ran, 1), timeout=limit)
        await emitter.emit("evt")
        assert ran == [1]
        assert "RecursionError" in caplog.messages[0]

    async def test_work_left_behind_is_not_inside(self, emitter: EventEmitter) -> None:
        """A task that a handler leaves behind may emit again, and so on, for as long as it likes."""
        rounds, over = 3 * MAX_NESTED, asyncio.Event()
        left: set[asyncio.Task[None]] = set()

        async def again(number: int) -> None:
            if number == rounds:
                over.set()
                return

            async def later() -> None:
                await asyncio.sleep(0)
                await emitter.emit("evt", number + 1)

            left.add(asyncio.create_task(later()))

        emitter.on("evt", again, timeout=PATIENCE)
        await emitter.emit("evt", 0)
        async with asyncio.timeout(PATIENCE):
            await over.wait()
        assert len(left) == rounds

    async def test_nesting_as_deep_as_it_may(self, emitter: EventEmitter) -> None:
        """Emits inside one another that end by themselves all run."""
        depths: list[int] = []

        async def deeper(depth: int) -> None:
            depths.append(depth)
            if depth < 40:
                await emitter.emit("evt", depth + 1)

        emitter.on("evt", deeper, timeout=PATIENCE)
        await emitter.emit("evt", 1)
        assert depths == list(range(1, 41))


class TestConcurrent:
    async def test_handlers_run_at_the_same_time(self) -> None:
        """Each of three handlers waits for the others: only together can they finish."""
        emitter, finished = EventEmitter(concurrent=True), list[int]()
        barrier = asyncio.Barrier(3)

        async def meet(number: int) -> None:
            await barrier.wait()
            finished.append(number)

        for number in range(3):
            emitter.on("evt", partial(meet, number))
        async with asyncio.timeout(PATIENCE):
            await emitter.emit("evt")
        assert sorted(finished) == [0, 1, 2]

    async def test_siblings_are_never_cancelled(self, caplog: pytest.LogCaptureFixture) -> None:
        """A failure, or a handler's own cancellation, leaves the others to finish."""
        emitter, finished = EventEmitter(concurrent=True), list[int]()

        async def slow() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            finished.append(1)

        emitter.on("evt", slow)
        emitter.on("evt", failing(ValueError("no")))
        emitter.on("evt", failing(asyncio.CancelledError()))
        emitter.on("evt", slow)
        await emitter.emit("evt")
        assert finished == [1, 1]
        assert len(caplog.records) == 2

    async def test_raise_waits_for_all(self, caplog: pytest.LogCaptureFixture) -> None:
        """``errors="raise"`` raises the first in order when all are done, and logs the others."""
        emitter, finished = EventEmitter(concurrent=True, errors="raise"), list[int]()

        async def slow() -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            finished.append(1)
            raise ValueError("slow")

        emitter.on("evt", slow)
        emitter.on("evt", failing(ValueError("quick")))
        with pytest.raises(EventError, match="slow"):
            await emitter.emit("evt")
        assert finished == [1]
        assert caplog.messages == ["Handler 'failing' for event 'evt' raised ValueError: quick"]

    async def test_plain_functions_come_first(self) -> None:
        """Plain functions run one after the other before the concurrent part."""
        emitter, order = EventEmitter(concurrent=True), list[Any]()
        emitter.on("evt", noting(order, "async"), priority=1)
        emitter.on("evt", noting(order, "async"), priority=1)
        for number in range(5):
            emitter.on("evt", partial(order.append, number))
        await emitter.emit("evt")
        assert order == [0, 1, 2, 3, 4, "async", "async"]

    async def test_contexts_are_separate(self) -> None:
        """A context variable that a concurrent handler sets is not seen by the others."""
        emitter, seen = EventEmitter(concurrent=True), list[str]()
        request_id.set("r-1")

        async def changing() -> None:
            seen.append(request_id.get())
            request_id.set("changed")
            await asyncio.sleep(0)

        emitter.on("evt", changing)
        emitter.on("evt", changing)
        await emitter.emit("evt")
        assert seen == ["r-1", "r-1"]
        assert request_id.get() == "r-1"

    async def test_one_by_one_in_a_transaction(self, db: TortoiseContext) -> None:
        """Inside a transaction concurrent handlers run in order, with their savepoints intact."""
        emitter = EventEmitter(concurrent=True)
        running, most = [0], [0]

        async def audit(name: str) -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            async with in_transaction(connection_of(db).connection_name):
                await AuditRow.create(event=name)
                await asyncio.sleep(0)
            running[0] -= 1

        for number in range(3):
            emitter.on("evt", partial(audit, str(number)))
        async with in_transaction(connection_of(db).connection_name):
            await emitter.emit("evt")
        assert most == [1]
        assert [row.event for row in await AuditRow.all().order_by("id")] == ["0", "1", "2"]


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class TestThreadsAndLoops:
    def test_emit_threadsafe(self, emitter: EventEmitter) -> None:
        """From another thread handlers run on the given loop; the future waits for them."""
        ran: list[tuple[int, object, object]] = []

        async def handler(user: object, *, reason: str) -> None:
            ran.append((threading.get_ident(), user, reason))

        emitter.on("evt", handler)
        with loop_in_a_thread() as loop:
            future: Future[None] = emitter.emit_threadsafe(loop, "evt", ADA, reason="because")
            assert future.result(PATIENCE) is None
        assert [each[1:] for each in ran] == [(ADA, "because")]
        assert ran[0][0] != threading.get_ident()

    def test_emit_threadsafe_raises_into_the_future(self) -> None:
        """A failure that is raised is raised by ``result()``."""
        emitter = EventEmitter(errors="raise")
        emitter.on("evt", failing(ValueError("no")))
        with loop_in_a_thread() as loop, pytest.raises(EventError, match="no"):
            emitter.emit_threadsafe(loop, "evt").result(PATIENCE)

    async def test_from_a_handler_on_a_worker_thread(self, emitter: EventEmitter) -> None:
        """A plain function on its thread can emit on the loop that called it, and wait."""
        ran: list[str] = []
        loop = asyncio.get_running_loop()

        def plain() -> None:
            emitter.emit_threadsafe(loop, "inner").result(PATIENCE)
            ran.append("plain")

        emitter.on("outer", plain)
        emitter.on("inner", noting(ran, "inner"))
        await emitter.emit("outer")
        assert ran == ["inner", "plain"]


class TestEmitSync:
    def test_runs_everything(self, emitter: EventEmitter) -> None:
        """Without a loop, async handlers, plain functions and the background all run to their end."""
        ran: list[str] = []
        emitter.on("evt", noting(ran, "async"))
        emitter.on("evt", lambda: ran.append("plain"))
        emitter.on("evt", noting(ran, "background"), delivery="background")

        async def queueing() -> None:
            emitter.emit_nowait("later")

        emitter.on("evt", queueing)
        emitter.on("later", noting(ran, "later"))
        emitter.emit_sync("evt")
        assert ran == ["async", "plain", "later", "background"]

    def test_takes_events_and_payloads(self, emitter: EventEmitter) -> None:
        """It takes what `emit` takes."""
        got: list[object] = []
        emitter.on(UserLogin, lambda event: got.append(event))
        emitter.on("evt", lambda *args, **kwargs: got.append((args, kwargs)))
        event = login()
        emitter.emit_sync(event)
        emitter.emit_sync("evt", 1, two=2)
        assert got == [event, ((1,), {"two": 2})]

    def test_raises(self) -> None:
        """It raises by the emitter's policy, after the background is done."""
        emitter, ran = EventEmitter(errors="raise"), list[int]()
        emitter.on("evt", failing(ValueError("no")))
        emitter.on("evt", noting(ran, 1), delivery="background")
        with pytest.raises(EventError, match="no"):
            emitter.emit_sync("evt")
        assert ran == [1]

    async def test_not_inside_a_loop(self, emitter: EventEmitter) -> None:
        """In a running loop it would block it, and says what to do instead."""
        ran: list[int] = []
        emitter.on("evt", noting(ran, 1))
        with pytest.raises(RuntimeError, match="await emit"):
            emitter.emit_sync("evt")
        assert ran == []

    def test_without_handlers_is_a_look_up(
        self, emitter: EventEmitter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A name without handlers makes no loop, whatever else there are handlers for."""
        emitter.on("other", noting([], 1))
        monkeypatch.setattr(asyncio, "new_event_loop", Mock(side_effect=AssertionError))
        emitter.emit_sync("evt", 1, two=2)
        emitter.emit_sync(login())

    @pytest.mark.parametrize("handled", ["plain", "async", None])
    def test_leaves_the_current_loop_alone(
        self, emitter: EventEmitter, handled: str | None
    ) -> None:
        """The loop that a program has set for its thread is its current one afterwards, and open."""
        if handled is not None:
            emitter.on("evt", noting([], 1) if handled == "async" else lambda: None)
        mine = asyncio.new_event_loop()
        asyncio.set_event_loop(mine)
        try:
            emitter.emit_sync("evt")
            assert asyncio.get_event_loop() is mine
            assert mine.run_until_complete(asyncio.sleep(0, "open")) == "open"
        finally:
            asyncio.set_event_loop(None)
            mine.close()

    @pytest.mark.parametrize("among", [False, True], ids=["alone", "among async ones"])
    def test_plain_functions_run_on_this_thread(self, emitter: EventEmitter, among: bool) -> None:
        """A plain function needs no thread here, and may run a loop itself, whatever runs beside it."""
        ran: list[object] = []

        def plain() -> None:
            asyncio.run(asyncio.sleep(0))
            ran.append(threading.current_thread())

        if among:
            emitter.on("evt", noting(ran, "first"))
        emitter.on("evt", plain)
        if among:
            emitter.on("evt", noting(ran, "last"))
        emitter.emit_sync("evt")
        here = threading.current_thread()
        assert ran == (["first", here, "last"] if among else [here])

    def test_a_timeout_needs_a_thread(self, emitter: EventEmitter) -> None:
        """A plain function that hangs is left behind after its time."""
        release, ran = threading.Event(), list[int]()
        emitter.on("evt", lambda: release.wait(PATIENCE), timeout=0.01)
        emitter.on("evt", lambda: ran.append(1))
        emitter.emit_sync("evt")
        assert ran == [1]
        release.set()

    def test_plain_functions_have_every_option(self) -> None:
        """Once, awaitable results, the error policies and the observer are the same without a loop."""
        seen, ran = list[Delivered](), list[object]()
        emitter = EventEmitter(errors="group", observer=seen.append)

        def fail() -> None:
            raise asyncio.CancelledError

        emitter.once("evt", lambda: ran.append("once"))
        emitter.on("evt", lambda: noting(ran, "awaited")())
        emitter.on("evt", fail)
        emitter.on("evt", noting(ran, "background"), delivery="background")
        for _ in range(2):
            with pytest.raises(ExceptionGroup) as group:
                emitter.emit_sync("evt")
        (error,) = group.value.exceptions
        assert isinstance(error, EventError)
        assert isinstance(error.original, asyncio.CancelledError)
        assert ran == ["once", "awaited", "background", "awaited", "background"]
        assert [each.outcome for each in seen[:4]] == [
            *("succeeded", "succeeded", "failed", "succeeded")
        ]

    def test_a_failure_that_is_raised_stops_plain_functions(self) -> None:
        """The first failure is raised, and what comes after it does not run."""
        emitter, ran = EventEmitter(propagate_errors=True), list[int]()
        emitter.on("evt", dict[str, int]().popitem)
        emitter.on("evt", lambda: ran.append(1))
        with pytest.raises(EventError, match="KeyError"):
            emitter.emit_sync("evt")
        assert ran == []

    def test_emit_nowait_needs_a_loop(self, emitter: EventEmitter) -> None:
        """Without a loop `emit_nowait` says what to call instead."""
        with pytest.raises(RuntimeError, match=r"emit_sync\(\).*emit_threadsafe\(loop"):
            emitter.emit_nowait("evt")

    async def test_beside_a_loop_that_is_busy(self, emitter: EventEmitter) -> None:
        """From a worker thread it waits for its own tasks, not for those of the application's loop."""
        release, started, ran = asyncio.Event(), asyncio.Event(), list[str]()

        async def slow() -> None:
            started.set()
            await release.wait()
            ran.append("slow")

        emitter.on("slow", slow, timeout=PATIENCE)
        emitter.on("evt", noting(ran, "evt"), timeout=PATIENCE)
        emitting = asyncio.create_task(emitter.emit("slow"))
        await started.wait()
        async with asyncio.timeout(PATIENCE):
            await asyncio.to_thread(emitter.emit_sync, "evt")
        assert ran == ["evt"]
        release.set()
        await emitting
        assert ran == ["evt", "slow"]


class TestCollect:
    @pytest.mark.parametrize("options", PATHS)
    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_results_in_order(self, options: Modes, concurrent: bool) -> None:
        """`collect` returns the results in the order of the handlers, plain and async."""
        emitter = EventEmitter(concurrent=concurrent)

        async def answer(number: int, text: str) -> str:
            for _ in range(5 - number):
                await asyncio.sleep(0)
            return f"{text} {number}"

        for number in (3, 1, 2):
            emitter.on("evt", partial(answer, number), priority=number, **options)
        emitter.on("evt", lambda text: text.upper(), priority=4, **options)
        emitter.on("evt", lambda: None, priority=5, thread=False, **options)
        assert await emitter.collect("evt", "no") == ["no 1", "no 2", "no 3", "NO", None]

    async def test_without_a_subscription(self, emitter: EventEmitter) -> None:
        """Without a subscription the list is empty."""
        assert await emitter.collect("evt") == []

    async def test_of_event_objects(self, emitter: EventEmitter) -> None:
        """It takes what `emit` takes."""
        emitter.on(OrderPaid, lambda event: event.order_id)
        emitter.on("order_paid", lambda amount: amount)
        assert await emitter.collect(OrderPaid(order_id=7, amount=9.5)) == [7, 9.5]

    async def test_failures(self, caplog: pytest.LogCaptureFixture) -> None:
        """Failures that are logged are left out; the other policies raise."""
        emitter = EventEmitter()
        emitter.on("evt", failing(ValueError("no")))
        emitter.on("evt", lambda: 1)
        assert await emitter.collect("evt") == [1]
        assert caplog.messages == ["Handler 'failing' for event 'evt' raised ValueError: no"]
        emitter.errors = "raise"
        with pytest.raises(EventError):
            await emitter.collect("evt")
        emitter.errors = "group"
        with pytest.raises(ExceptionGroup):
            await emitter.collect("evt")

    async def test_background_returns_nothing(self, emitter: EventEmitter) -> None:
        """A background handler runs and returns nothing here; nor does a spent ``once``."""
        ran: list[int] = []
        emitter.on("evt", noting(ran, 1), delivery="background")
        emitter.once("evt", lambda: "once")
        assert await emitter.collect("evt") == ["once"]
        assert await emitter.collect("evt") == []
        await settled(emitter)
        assert ran == [1, 1]


class TestObserver:
    async def test_outcomes(self) -> None:
        """After each call it receives the outcome, the duration and the subscription."""
        seen: list[Delivered] = []
        emitter = EventEmitter(observer=seen.append)

        async def hanging() -> None:
            await asyncio.Event().wait()

        received: list[Event] = []
        emitter.on("evt", noting([], 1), name="fine")
        emitter.on("evt", failing(ValueError("no")), name="bad")
        emitter.on("evt", failing(TimeoutError("own")), name="own", timeout=PATIENCE)
        emitter.on("evt", hanging, name="late", timeout=SHORT)
        emitter.on(OrderPaid, received.append, name="typed", delivery="background", thread=False)
        await emitter.emit("evt")
        event = OrderPaid(order_id=7)
        await emitter.emit(event)
        await settled(emitter)
        assert [(each.subscription, each.delivery, each.outcome) for each in seen] == [
            ("fine", "inline", "succeeded"),
            ("bad", "inline", "failed"),
            ("own", "inline", "failed"),
            ("late", "inline", "timed_out"),
            ("typed", "background", "succeeded"),
        ]
        assert [each.event_id for each in seen] == [None] * 4 + [event.id]
        assert {each.attempt for each in seen} == {1}
        assert seen[3].seconds >= SHORT > seen[0].seconds

    async def test_cancelled(self) -> None:
        """A call that is cancelled by its caller has neither succeeded nor failed."""
        seen: list[Delivered] = []
        emitter, started = EventEmitter(observer=seen.append), asyncio.Event()

        async def interrupted() -> None:
            started.set()
            await asyncio.Event().wait()

        emitter.on("evt", interrupted)
        emitter.on("evt", noting([], 1))
        await cancel_when(asyncio.create_task(emitter.emit("evt")), started)
        await settled(emitter)
        assert [each.outcome for each in seen] == ["cancelled", "succeeded"]

    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_that_fails(self, concurrent: bool, caplog: pytest.LogCaptureFixture) -> None:
        """Anything an observer raises is logged and changes nothing else."""
        ran: list[int] = []

        def broken(delivered: Delivered) -> None:
            raise Panic("metrics")

        emitter = EventEmitter(observer=broken, concurrent=concurrent, errors="raise")
        emitter.on("evt", noting(ran, 1))
        emitter.on("evt", noting(ran, 2))
        await emitter.emit("evt")
        assert ran == [1, 2]
        assert caplog.messages == ["The observer failed for event 'evt'"] * 2

    async def test_of_an_emitter_that_is_in_use(self, emitter: EventEmitter) -> None:
        """An observer may be set and removed at any time, on the library's emitter too."""
        seen: list[Delivered] = []
        emitter.on("evt", noting([], 1))
        await emitter.emit("evt")
        emitter.observer = seen.append
        await emitter.emit("evt")
        emitter.observer = None
        await emitter.emit("evt")
        assert len(seen) == 1

    async def test_of_the_relay(self, db: TortoiseContext) -> None:
        """Durable deliveries are observed in the relay, with the number of the attempt."""
        seen: list[Delivered] = []
        clock = FakeClock()
        auth = AuthService(
            User,
            AuthConfig(secret=SECRET),
            emitter=EventEmitter(observer=seen.append),
            clock=clock,
            passwords=cheap_hasher(),
        )
        results = [ValueError("no"), None]

        async def deliver(event: Event) -> None:
            failure = results.pop(0)
            if failure is not None:
                raise failure

        auth.emitter.on(OrderPaid, deliver, delivery="durable", name="crm")
        event = OrderPaid(order_id=7, occurred_at=clock())
        await auth.emitter.emit(event)
        assert seen == []
        clock.now = datetime.now(UTC) + timedelta(hours=1)
        await auth.relay().drain()
        clock.advance(timedelta(hours=1))
        await auth.relay().drain()
        assert [(each.event_id, each.outcome, each.attempt) for each in seen] == [
            (event.id, "failed", 1),
            (event.id, "succeeded", 2),
        ]
        assert {(each.subscription, each.delivery) for each in seen} == {("crm", "durable")}


class TestPublicClass:
    def test_has_what_the_contract_names(self) -> None:
        """The public attributes of an emitter are those that the pages describe."""
        assert {name for name in dir(EventEmitter) if not name.startswith("_")} == {
            *("on", "once", "off", "add_listener", "remove_listener", "clear"),
            *("listeners", "subscriptions", "events", "known_events", "describe"),
            *("emit", "emit_nowait", "emit_sync", "emit_threadsafe", "collect", "aclose"),
            *("errors", "propagate_errors", "concurrent", "strict", "backend", "observer"),
        }

    def test_the_emitter_is_no_module(self) -> None:
        """``tortoise_auth.events.emitter`` is the library's emitter, whatever is imported before."""
        code = (
            "import tortoise_auth.events.event_emitter\n"
            "from tortoise_auth.events import emitter, EventEmitter, on\n"
            "assert type(emitter) is EventEmitter and on.__self__ is emitter"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_policies_may_change(self, concurrent: bool) -> None:
        """``propagate_errors`` and ``errors`` can be set later, and hold from the next emit on."""
        emitter = EventEmitter(concurrent=concurrent)
        emitter.on("evt", failing(ValueError("no")))
        await emitter.emit("evt")
        emitter.propagate_errors = True
        with pytest.raises(EventError):
            await emitter.emit("evt")
        emitter.errors = "group"
        assert not emitter.propagate_errors
        with pytest.raises(ExceptionGroup):
            await emitter.emit("evt")
        emitter.propagate_errors = False
        await emitter.emit("evt")
        with pytest.raises(ValueError, match="errors must be"):
            setattr(emitter, "errors", "ignore")  # noqa: B010 - a mistake that mypy would find
