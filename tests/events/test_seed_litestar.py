"""What listeners written for Litestar rely on: several events, no waiting, a backend of one's own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest

from tortoise_auth.events import EventEmitter

PATIENCE = 10.0

correlation_id: ContextVar[str] = ContextVar("correlation_id", default="none")


class TestListening:
    async def test_one_listener_several_events(self, emitter: EventEmitter) -> None:
        """One decorator with two names makes one function hear both events."""
        sent: list[tuple[str, str]] = []

        @emitter.on("user_created", "password_changed")
        async def send_email_handler(email: str, message: str) -> None:
            sent.append((email, message))

        async with emitter:
            emitter.emit_nowait("user_created", email="jane@example.com", message="Welcome!")
            emitter.emit_nowait("password_changed", email="jane@example.com", message="Was it you?")
        assert sent == [("jane@example.com", "Welcome!"), ("jane@example.com", "Was it you?")]
        assert emitter.listeners("user_created") == emitter.listeners("password_changed")

    async def test_several_listeners_one_event(self, emitter: EventEmitter) -> None:
        """All listeners of an event run, plain and async, in the order they were registered."""
        order: list[str] = []

        @emitter.on("user_deleted")
        async def farewell() -> None:
            order.append("farewell")

        @emitter.on("user_deleted")
        def ticket() -> None:
            order.append("ticket")

        @emitter.on("user_deleted", "user_created")
        async def count() -> None:
            order.append("count")

        async with emitter:
            emitter.emit_nowait("user_deleted")
        assert order == ["farewell", "ticket", "count"]

    def test_the_decorated_function_stays_a_function(self, emitter: EventEmitter) -> None:
        """A listener can be called directly, in a test for example."""

        @emitter.on("user_created", "user_deleted")
        async def answer(question: str) -> str:
            return f"{question} 42"

        assert asyncio.run(answer("6 x 7?")) == "6 x 7? 42"

    @pytest.mark.parametrize("no_function", [True, None, "user_created", 7])
    def test_only_callables(self, emitter: EventEmitter, no_function: Any) -> None:
        """To decorate what cannot be called is a TypeError, at once."""
        with pytest.raises(TypeError):
            emitter.on("user_created")(no_function)
        assert emitter.listeners("user_created") == []

    async def test_listeners_may_come_later(self, emitter: EventEmitter) -> None:
        """A listener that is registered after the start hears what is emitted from then on."""
        late = AsyncMock()
        async with emitter:
            emitter.emit_nowait("evt", 1)
            await emitter.aclose()
            emitter.on("evt", late)
            emitter.emit_nowait("evt", 2)
        late.assert_awaited_once_with(2)


@dataclass
class Deletion:
    email: str
    reason: str


class TestArguments:
    @pytest.mark.parametrize("make", [AsyncMock, MagicMock])
    @pytest.mark.parametrize("nowait", [True, False])
    async def test_positional_and_keyword(
        self, emitter: EventEmitter, make: type[Mock], nowait: bool
    ) -> None:
        """A payload of both kinds arrives as it was emitted, awaited or not."""
        listener = make()
        emitter.on("test_event", listener)
        async with emitter:
            if nowait:
                emitter.emit_nowait("test_event", "positional", keyword="keyword-value")
            else:
                await emitter.emit("test_event", "positional", keyword="keyword-value")
        listener.assert_called_once_with("positional", keyword="keyword-value")

    @pytest.mark.parametrize("nowait", [True, False])
    async def test_each_names_only_what_it_needs(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture, nowait: bool
    ) -> None:
        """Of one payload with two keywords each of two listeners takes one, with no ``**kwargs``."""
        farewells: list[str] = []
        tickets: list[str] = []

        @emitter.on("user_deleted")
        async def send_farewell_email_handler(email: str) -> None:
            farewells.append(email)

        @emitter.on("user_deleted")
        async def notify_customer_support(reason: str) -> None:
            tickets.append(reason)

        async def delete_user(data: Deletion) -> None:
            if nowait:
                emitter.emit_nowait("user_deleted", email=data.email, reason=data.reason)
            else:
                await emitter.emit("user_deleted", email=data.email, reason=data.reason)

        async with emitter:
            await delete_user(Deletion("jane@example.com", "moved away"))
        assert farewells == ["jane@example.com"]
        assert tickets == ["moved away"]
        assert caplog.records == []

    async def test_surplus_positional_arguments(self, emitter: EventEmitter) -> None:
        """A listener with fewer parameters gets the first ones; one with none gets nothing."""
        seen: list[tuple[object, ...]] = []
        emitter.on("evt", lambda: seen.append(()))
        emitter.on("evt", lambda one: seen.append((one,)))
        emitter.on("evt", lambda one, *, three: seen.append((one, three)))
        emitter.on("evt", lambda *all_of_them: seen.append(all_of_them))
        await emitter.emit("evt", 1, 2, three=3)
        assert seen == [(), (1,), (1, 3), (1, 2)]

    async def test_catch_all(self, emitter: EventEmitter) -> None:
        """``**kwargs`` means everything that no parameter took, as it always did."""
        seen: list[tuple[str, dict[str, object]]] = []

        @emitter.on("user_deleted")
        async def note(email: str, **kwargs: object) -> None:
            seen.append((email, kwargs))

        await emitter.emit("user_deleted", email="jane@example.com", reason="spam", by="admin")
        assert seen == [("jane@example.com", {"reason": "spam", "by": "admin"})]

    async def test_defaults_are_not_lost(self, emitter: EventEmitter) -> None:
        """A parameter with a default takes the payload's value if there is one."""
        seen: list[tuple[str, str]] = []

        @emitter.on("user_deleted")
        async def note(email: str, reason: str = "unknown") -> None:
            seen.append((email, reason))

        await emitter.emit("user_deleted", email="a", reason="spam", by="admin")
        await emitter.emit("user_deleted", email="b", by="admin")
        assert seen == [("a", "spam"), ("b", "unknown")]

    async def test_a_missing_argument_names_the_listener(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing is invented: a required argument that was not emitted fails that listener alone."""
        other = AsyncMock()

        @emitter.on("user_deleted")
        async def wants_address(address: str) -> None: ...

        emitter.on("user_deleted", other)
        await emitter.emit("user_deleted", email="jane@example.com")
        (record,) = caplog.records
        assert "'wants_address' for event 'user_deleted' raised TypeError" in record.getMessage()
        other.assert_awaited_once_with(email="jane@example.com")


class TestNotWaiting:
    async def test_returns_before_the_listeners_start(self, emitter: EventEmitter) -> None:
        """``emit_nowait`` hands over and returns; a listener that hangs holds up no request."""
        started, proceed, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()

        @emitter.on("user_created")
        async def slow() -> None:
            started.set()
            await proceed.wait()
            finished.set()

        async with asyncio.timeout(PATIENCE), emitter:
            emitter.emit_nowait("user_created")
            assert not started.is_set()
            await started.wait()
            assert not finished.is_set()
            proceed.set()
        assert finished.is_set()

    async def test_listeners_side_by_side(self) -> None:
        """With ``concurrent=True`` the listeners of an event run at the same time here, too."""
        emitter = EventEmitter(concurrent=True)
        meeting = asyncio.Barrier(2)
        met: list[str] = []

        async def first() -> None:
            await meeting.wait()
            met.append("first")

        async def second() -> None:
            await meeting.wait()
            met.append("second")

        emitter.on("evt", first)
        emitter.on("evt", second)
        emitter.emit_nowait("evt")
        await emitter.aclose(timeout=PATIENCE)
        assert sorted(met) == ["first", "second"]

    async def test_needs_no_start(self, emitter: EventEmitter) -> None:
        """Events emitted before the application is up are delivered like all others."""
        listener = AsyncMock()
        emitter.on("evt", listener)
        emitter.emit_nowait("evt", 1)
        await emitter.aclose()
        listener.assert_awaited_once_with(1)

    async def test_nobody_listens(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An event without listeners is no error."""
        async with emitter:
            emitter.emit_nowait("unheard", 1, two=2)
        assert caplog.records == []
        assert emitter.events() == []

    async def test_context_variables(self, emitter: EventEmitter) -> None:
        """A listener in the background sees the request that emitted, not the one that came first."""
        seen: list[str] = []

        async def listener() -> None:
            seen.append(correlation_id.get())
            correlation_id.set("changed by a listener")

        def plain() -> None:
            seen.append(correlation_id.get())

        emitter.on("evt", plain)
        emitter.on("evt", listener)

        async def request(name: str) -> None:
            correlation_id.set(name)
            emitter.emit_nowait("evt")

        async with emitter:
            for name in ("first", "second"):
                await asyncio.create_task(request(name))
        assert seen == ["first", "first", "second", "second"]
        assert correlation_id.get() == "none"

    async def test_background_delivery_of_one_listener(self, emitter: EventEmitter) -> None:
        """A listener may ask not to be waited for, while others of the event are."""
        proceed = asyncio.Event()
        order: list[str] = []

        @emitter.on("user_created", delivery="background")
        async def welcome(email: str) -> None:
            await proceed.wait()
            order.append(f"welcome {email}")

        @emitter.on("user_created")
        async def audit(email: str) -> None:
            order.append(f"audit {email}")

        async with asyncio.timeout(PATIENCE), emitter:
            await emitter.emit("user_created", email="jane@example.com")
            assert order == ["audit jane@example.com"]
            proceed.set()
        assert order == ["audit jane@example.com", "welcome jane@example.com"]


class TestShutdown:
    async def test_waits_for_what_is_pending(self, emitter: EventEmitter) -> None:
        """Leaving the block delivers everything that was emitted, in order."""
        seen: list[int] = []

        @emitter.on("evt")
        async def note(number: int) -> None:
            await asyncio.to_thread(lambda: None)
            seen.append(number)

        async with emitter:
            for number in range(100):
                emitter.emit_nowait("evt", number)
            assert seen == []
        assert seen == list(range(100))

    async def test_leaving_through_an_exception(self, emitter: EventEmitter) -> None:
        """An application that crashes still delivers what it had emitted."""
        listener = AsyncMock()
        emitter.on("evt", listener)
        with pytest.raises(LookupError, match="crash"):
            async with emitter:
                for _ in range(5):
                    emitter.emit_nowait("evt")
                raise LookupError("crash")
        assert listener.await_count == 5

    async def test_what_is_emitted_meanwhile(self, emitter: EventEmitter) -> None:
        """Events that listeners emit while the emitter closes are delivered too, to the last."""
        seen: list[int] = []

        @emitter.on("countdown")
        async def count_down(number: int) -> None:
            seen.append(number)
            if number:
                emitter.emit_nowait("countdown", number - 1)

        async with emitter:
            emitter.emit_nowait("countdown", 5)
        assert seen == [5, 4, 3, 2, 1, 0]

    async def test_a_listener_that_hangs(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With a time limit, closing cancels what does not end and tells what was lost."""
        hanging = asyncio.Event()
        ended: list[str] = []

        @emitter.on("user_deleted")
        async def hang() -> None:
            hanging.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                ended.append("hang")

        @emitter.on("user_created")
        async def never_started() -> None:
            ended.append("never_started")

        async with asyncio.timeout(PATIENCE):
            emitter.emit_nowait("user_deleted")
            emitter.emit_nowait("user_created")
            await hanging.wait()
            await emitter.aclose(timeout=0.01)
            while not ended:
                await asyncio.to_thread(lambda: None)
        assert ended == ["hang"]
        told = " ".join(
            record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
        )
        assert "user_deleted" in told
        assert "user_created" in told

    async def test_it_can_be_opened_again(self, emitter: EventEmitter) -> None:
        """A second block works as the first one did, as in a test suite that starts the app anew."""
        listener = AsyncMock()
        emitter.on("evt", listener)
        for _ in range(2):
            async with emitter as entered:
                assert entered is emitter
                emitter.emit_nowait("evt")
        assert listener.await_count == 2


async def async_failure(failure: BaseException) -> None:
    raise failure


def sync_failure(failure: BaseException) -> None:
    raise failure


class TestErrors:
    @pytest.mark.parametrize("failing", [async_failure, sync_failure])
    @pytest.mark.parametrize("failure", [ValueError("test"), asyncio.CancelledError()], ids=repr)
    async def test_one_failure_stops_nothing(
        self,
        emitter: EventEmitter,
        caplog: pytest.LogCaptureFixture,
        failing: Callable[[BaseException], object],
        failure: BaseException,
    ) -> None:
        """A failing listener is logged; its siblings run, and so does every later event."""
        sibling, other = AsyncMock(), AsyncMock()
        emitter.on("error_event", failing)
        emitter.on("error_event", sibling)
        emitter.on("test_event", other)
        async with asyncio.timeout(PATIENCE), emitter:
            for _ in range(2):
                emitter.emit_nowait("error_event", failure)
                emitter.emit_nowait("test_event")
                await emitter.aclose()
        assert sibling.await_count == 2
        assert other.await_count == 2
        assert [record.getMessage() for record in caplog.records] == 2 * [
            f"Handler '{failing.__name__}' for event 'error_event' raised "
            f"{type(failure).__name__}: {failure}"
        ]

    async def test_a_propagating_emitter_has_nobody_to_raise_to(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A failure in the background is logged even where awaited failures are raised."""
        strict = EventEmitter(propagate_errors=True)
        strict.on("evt", AsyncMock(side_effect=RuntimeError("boom")))
        async with strict:
            strict.emit_nowait("evt")
        (record,) = caplog.records
        assert (
            record.getMessage() == "Handler 'AsyncMock' for event 'evt' raised RuntimeError: boom"
        )


class TestThreads:
    async def test_plain_functions_leave_the_loop(self, emitter: EventEmitter) -> None:
        """A plain function runs on another thread, and the loop goes on while it blocks."""
        loop_thread = threading.get_ident()
        threads: list[int] = []
        proceed = threading.Event()

        @emitter.on("user_created")
        def send_mail() -> None:
            threads.append(threading.get_ident())
            assert proceed.wait(PATIENCE)

        emission = asyncio.create_task(emitter.emit("user_created"))
        async with asyncio.timeout(PATIENCE):
            while not threads:
                await asyncio.to_thread(lambda: None)
            assert not emission.done()
            proceed.set()
            await emission
        assert threads[0] != loop_thread

    async def test_in_the_background_too(self, emitter: EventEmitter) -> None:
        """``emit_nowait`` gives plain functions a thread as well."""
        threads: list[int] = []
        emitter.on("evt", lambda: threads.append(threading.get_ident()))
        async with emitter:
            emitter.emit_nowait("evt")
        assert len(threads) == 1
        assert threads[0] != threading.get_ident()

    async def test_inline_on_request(self, emitter: EventEmitter) -> None:
        """``thread=False`` runs a plain function on the loop's own thread, inside its loop."""
        seen: list[tuple[int, asyncio.AbstractEventLoop]] = []

        @emitter.on("user_created", thread=False)
        def count() -> None:
            seen.append((threading.get_ident(), asyncio.get_running_loop()))

        await emitter.emit("user_created")
        assert seen == [(threading.get_ident(), asyncio.get_running_loop())]

    async def test_async_listeners_stay(self, emitter: EventEmitter) -> None:
        """Coroutine functions, also as methods and objects, run on the loop's own thread."""
        threads: set[int] = set()

        class Listener:
            async def __call__(self) -> None:
                """Listen."""
                threads.add(threading.get_ident())

            async def listen(self) -> None:
                """Listen."""
                threads.add(threading.get_ident())

        emitter.on("evt", Listener())
        emitter.on("evt", Listener().listen)
        await emitter.emit("evt")
        assert threads == {threading.get_ident()}


class Spool:
    """A backend that keeps its jobs until it is left, as one with a broker behind it might."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.jobs: list[Callable[[], Awaitable[object]]] = []

    async def __aenter__(self) -> Self:
        self.log.append("entered")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self.jobs:
            await self.jobs.pop(0)()
        self.log.append("left")

    def submit(self, job: Callable[[], Awaitable[object]]) -> None:
        """Keep *job*."""
        self.jobs.append(job)


class TestOwnBackend:
    # The protocol a backend has to follow: an async context manager with ``submit(job)``, which
    # must not block; ``job()`` returns an awaitable that runs the listeners and never raises.
    async def test_carries_the_background(self, caplog: pytest.LogCaptureFixture) -> None:
        """The emitter enters and leaves the backend and gives it what nobody waits for."""
        backend = Spool()
        emitter = EventEmitter(backend=backend)
        heard: list[str] = []

        @emitter.on("user_created")
        async def inline(email: str) -> None:
            heard.append(f"inline {email}")

        @emitter.on("user_created", delivery="background")
        async def background(email: str) -> None:
            heard.append(f"background {email}")

        @emitter.on("user_created", delivery="background")
        async def failing(email: str) -> None:
            raise RuntimeError("boom")

        async with emitter:
            assert backend.log == ["entered"]
            await emitter.emit("user_created", email="awaited")
            assert heard == ["inline awaited"]
            assert backend.jobs
            waiting = len(backend.jobs)
            emitter.emit_nowait("user_created", email="nowait")
            assert len(backend.jobs) > waiting
            assert heard == ["inline awaited"]
        assert backend.log == ["entered", "left"]
        assert heard == [
            "inline awaited",
            "background awaited",
            "inline nowait",
            "background nowait",
        ]
        assert [record.getMessage() for record in caplog.records] == 2 * [
            "Handler 'failing' for event 'user_created' raised RuntimeError: boom"
        ]
