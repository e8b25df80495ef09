"""What handlers written for tortoise-auth 0.6 rely on, and what failed them there."""

from __future__ import annotations

import asyncio
import copy
import functools
import gc
import logging
import pickle
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import AsyncMock

import pytest
from tortoise.context import TortoiseContext

import tortoise_auth
from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import AuditRow, User
from tortoise_auth import AuthConfig, AuthenticationError, AuthService, events
from tortoise_auth.events import (
    EventEmitter,
    EventError,
    add_listener,
    emit,
    emitter,
    on,
    remove_listener,
)
from tortoise_auth.exceptions import TokenError, TortoiseAuthError
from tortoise_auth.testing import FakeClock

PATIENCE = 10.0
NEW_PASSWORD = "wrong donkey charger nail"
NAMES = 5_000


@dataclass
class Person:
    """Somebody with an address: all that a handler in these examples wants of a user."""

    email: str = "ada@example.com"


def propagating() -> EventEmitter:
    return EventEmitter(propagate_errors=True)


@pytest.fixture
def clean() -> Iterator[None]:
    """The shared emitter without handlers, before and after."""
    emitter.clear()
    yield
    emitter.clear()


class TestRegistering:
    async def test_decorator_registers(self, emitter: EventEmitter) -> None:
        """A decorated function is called with what was emitted."""
        welcomed: list[str] = []

        @emitter.on("user_login")
        async def greet_user(user: Person) -> None:
            welcomed.append(f"Welcome back, {user.email}!")

        await emitter.emit("user_login", Person())
        assert welcomed == ["Welcome back, ada@example.com!"]

    def test_decorator_returns_the_function(self, emitter: EventEmitter) -> None:
        """The decorated name is the very function, so that a test can call it without an emitter."""

        async def greet_user(user: Person) -> str:
            return user.email

        decorated = emitter.on("user_login")(greet_user)
        assert decorated is greet_user
        assert asyncio.run(decorated(Person())) == "ada@example.com"

    async def test_decorators_stack(self, emitter: EventEmitter) -> None:
        """One function under two decorators hears both events."""
        heard: list[str] = []

        @emitter.on("user_login")
        @emitter.on("user_logout")
        async def note(user: Person) -> None:
            heard.append(user.email)

        await emitter.emit("user_login", Person("in@example.com"))
        await emitter.emit("user_logout", Person("out@example.com"))
        assert heard == ["in@example.com", "out@example.com"]

    async def test_add_listener_is_the_same(self, emitter: EventEmitter) -> None:
        """The imperative form and the decorator put handlers into one list."""
        heard: list[str] = []

        async def added(user: Person) -> None:
            heard.append("added")

        emitter.add_listener("user_login", added)

        @emitter.on("user_login")
        async def decorated(user: Person) -> None:
            heard.append("decorated")

        await emitter.emit("user_login", Person())
        assert heard == ["added", "decorated"]
        assert emitter.listeners("user_login") == [added, decorated]

    async def test_a_duplicate_runs_twice(self, emitter: EventEmitter) -> None:
        """A function that was added twice runs twice."""
        handler = AsyncMock()
        emitter.add_listener("user_login", handler)
        emitter.add_listener("user_login", handler)
        await emitter.emit("user_login", "ada")
        assert handler.await_count == 2

    async def test_arguments_have_names(self, emitter: EventEmitter) -> None:
        """Registering, removing, listing and clearing accept the documented keywords."""

        async def handler(user: Person) -> None: ...

        emitter.add_listener(event_name="user_login", handler=handler)
        emitter.add_listener(event_name="user_login", handler=handler)
        emitter.remove_listener(event_name="user_login", handler=handler)
        assert emitter.listeners(event_name="user_login") == [handler]
        emitter.clear(event_name="user_login")
        assert emitter.listeners(event_name="user_login") == []


class TestEmitting:
    async def test_registration_order(self, emitter: EventEmitter) -> None:
        """Handlers run in the order they were registered."""
        order: list[int] = []

        def numbered(number: int) -> Callable[[], Awaitable[None]]:
            async def handler() -> None:
                order.append(number)

            return handler

        for number in range(20):
            emitter.add_listener("evt", numbered(number))
        await emitter.emit("evt")
        assert order == list(range(20))

    async def test_one_after_the_other(self, emitter: EventEmitter) -> None:
        """A handler that waits is over before the next one starts."""
        steps: list[str] = []

        @emitter.on("evt")
        async def first() -> None:
            steps.append("first starts")
            await asyncio.to_thread(lambda: None)
            steps.append("first ends")

        @emitter.on("evt")
        async def second() -> None:
            steps.append("second starts")

        await emitter.emit("evt")
        assert steps == ["first starts", "first ends", "second starts"]

    async def test_any_payload(self, emitter: EventEmitter) -> None:
        """Positional and keyword arguments arrive as they were emitted; nothing comes back."""
        handler = AsyncMock(return_value="ignored")
        emitter.add_listener("evt", handler)
        emission: Awaitable[object] = emitter.emit("evt", 1, "two", three=3)
        assert await emission is None
        handler.assert_awaited_once_with(1, "two", three=3)

    async def test_keywords_alone(self, emitter: EventEmitter) -> None:
        """A handler with nothing but keyword-only parameters gets the failed login's two."""
        seen: list[tuple[str, str]] = []

        @emitter.on("user_login_failed")
        async def track(*, identifier: str, reason: str) -> None:
            seen.append((identifier, reason))

        await emitter.emit("user_login_failed", identifier="eve", reason="not_found")
        assert seen == [("eve", "not_found")]

    async def test_nobody_listens(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An event without handlers is no error and not worth a line."""
        await emitter.emit("nonexistent", 1, two=2)
        await propagating().emit("nonexistent")
        assert caplog.records == []

    async def test_changes_wait_for_the_next_emit(self, emitter: EventEmitter) -> None:
        """A handler that is removed meanwhile still runs, one that is added waits."""
        ran: list[str] = []

        async def added() -> None:
            ran.append("added")

        async def removed() -> None:
            ran.append("removed")

        @emitter.on("evt")
        async def change() -> None:
            ran.append("change")
            emitter.remove_listener("evt", removed)
            emitter.remove_listener("evt", change)
            emitter.add_listener("evt", added)

        emitter.add_listener("evt", removed)
        await emitter.emit("evt")
        assert ran == ["change", "removed"]
        await emitter.emit("evt")
        assert ran == ["change", "removed", "added"]

    async def test_emitters_are_isolated(self) -> None:
        """A handler of one emitter hears nothing of another, nor of the shared one."""
        notifications, other = EventEmitter(), EventEmitter()
        pushed: list[str] = []

        @notifications.on("user_login")
        async def send_welcome_push(user: Person) -> None:
            pushed.append(user.email)

        await other.emit("user_login", Person())
        await emit("user_login", Person())
        assert pushed == []
        assert send_welcome_push not in emitter.listeners("user_login")
        await notifications.emit("user_login", Person())
        assert pushed == ["ada@example.com"]


class TestManaging:
    async def test_remove_listener(self, emitter: EventEmitter) -> None:
        """A removed handler is not called, its neighbours are."""
        temporary, lasting = AsyncMock(), AsyncMock()
        emitter.add_listener("user_login", temporary)
        emitter.add_listener("user_login", lasting)
        emitter.remove_listener("user_login", temporary)
        await emitter.emit("user_login", "ada")
        temporary.assert_not_called()
        lasting.assert_awaited_once_with("ada")

    def test_remove_what_is_not_there(self, emitter: EventEmitter) -> None:
        """To remove a handler that is not registered for this event is a ValueError, every time."""

        async def handler() -> None: ...

        emitter.add_listener("other", handler)
        with pytest.raises(ValueError):
            emitter.remove_listener("evt", handler)
        emitter.add_listener("evt", handler)
        emitter.remove_listener("evt", handler)
        with pytest.raises(ValueError):
            emitter.remove_listener("evt", handler)
        assert emitter.listeners("other") == [handler]

    def test_remove_drops_the_first_of_duplicates(self, emitter: EventEmitter) -> None:
        """Of a handler that was added twice the earlier registration goes."""

        async def twice() -> None: ...

        async def between() -> None: ...

        for handler in (twice, between, twice):
            emitter.add_listener("evt", handler)
        emitter.remove_listener("evt", twice)
        assert emitter.listeners("evt") == [between, twice]

    def test_bound_methods_are_found_again(self, emitter: EventEmitter) -> None:
        """A bound method is removed by an equal one: Python makes a new object at each access."""
        mailer = Mailer()
        emitter.add_listener("evt", mailer.notify)
        emitter.remove_listener("evt", mailer.notify)
        assert emitter.listeners("evt") == []

    def test_listeners_is_a_copy(self, emitter: EventEmitter) -> None:
        """Whatever is done to the returned list, the handlers stay."""

        async def handler() -> None: ...

        emitter.add_listener("evt", handler)
        emitter.listeners("evt").clear()
        emitter.listeners("evt").append(print)
        assert emitter.listeners("evt") == [handler]
        assert emitter.listeners("unknown") == []

    @pytest.mark.parametrize(("event", "remaining"), [("a", ["b"]), (None, []), ("c", ["a", "b"])])
    async def test_clear(
        self, emitter: EventEmitter, event: str | None, remaining: list[str]
    ) -> None:
        """One event's handlers go, or with no name given those of all; an unknown name is nothing."""
        called: list[str] = []

        @emitter.on("a")
        @emitter.on("b")
        async def note(name: str) -> None:
            called.append(name)

        emitter.clear(event)
        for name in ("a", "b"):
            await emitter.emit(name, name)
        assert called == remaining


@pytest.mark.usefixtures("clean")
class TestSharedEmitter:
    async def test_functions_are_its_methods(self) -> None:
        """The module's functions register with, emit on and remove from the shared emitter."""
        calls: list[tuple[str, str]] = []

        @on("host_event")
        async def decorated(value: str) -> None:
            calls.append(("decorated", value))

        async def added(value: str) -> None:
            calls.append(("added", value))

        add_listener("host_event", added)
        assert emitter.listeners("host_event") == [decorated, added]
        await emit("host_event", "data")
        assert calls == [("decorated", "data"), ("added", "data")]

        remove_listener("host_event", decorated)
        await emitter.emit("host_event", "again")
        assert calls[2:] == [("added", "again")]

    @pytest.mark.parametrize("name", ["on", "emit", "add_listener", "remove_listener", "emitter"])
    def test_both_addresses(self, name: str) -> None:
        """The functions and the emitter are the same in `tortoise_auth` and `tortoise_auth.events`."""
        assert getattr(tortoise_auth, name) == getattr(events, name)

    def test_classes_have_both_addresses_too(self) -> None:
        """`EventEmitter` is also in the root; `EventError` with the errors and with the events."""
        assert tortoise_auth.EventEmitter is EventEmitter
        assert tortoise_auth.exceptions.EventError is EventError
        assert issubclass(EventError, TortoiseAuthError)

    async def test_parameters_may_have_any_name(self) -> None:
        """A handler of ``user_login`` gets the user first, whatever it calls it."""
        seen: list[Person] = []

        @on("user_login")
        async def note(somebody: Person) -> None:
            seen.append(somebody)

        ada = Person()
        await emit("user_login", ada)
        assert seen == [ada]

    def test_it_only_logs(self) -> None:
        """The shared emitter swallows, so that no handler can break a login by default."""
        assert emitter.propagate_errors is False


class TestLogging:
    async def test_the_line(self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture) -> None:
        """A failure is one ERROR line, byte for byte as documented, and the emit goes on."""
        after = AsyncMock()

        @emitter.on("user_login")
        async def flaky_handler(user: Person) -> None:
            raise RuntimeError("something went wrong")

        emitter.add_listener("user_login", after)
        await emitter.emit("user_login", Person())

        (record,) = caplog.records
        assert record.getMessage().encode() == (
            b"Handler 'flaky_handler' for event 'user_login' raised "
            b"RuntimeError: something went wrong"
        )
        assert (record.name, record.levelno) == ("tortoise_auth.events", logging.ERROR)
        after.assert_awaited_once()

    @pytest.mark.parametrize(
        "text", ["", "100 % of %s and %(name)s {0}", "Grüße, 世界 🔑", "'quoted' \"twice\" \\n"]
    )
    async def test_printable_text_is_untouched(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture, text: str
    ) -> None:
        """Nothing that can be printed on one line is changed, be it a percent sign or a backslash."""

        @emitter.on("evt")
        async def flaky_handler() -> None:
            raise ValueError(text)

        await emitter.emit("evt")
        expected = f"Handler 'flaky_handler' for event 'evt' raised ValueError: {text}"
        assert [record.getMessage() for record in caplog.records] == [expected]

    async def test_every_failure_is_told(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each failing handler has its own line, in order, and the good ones between them run."""
        good = AsyncMock()
        for number in range(3):
            emitter.add_listener("evt", AsyncMock(side_effect=OSError(str(number))))
            emitter.add_listener("evt", good)
        await emitter.emit("evt")
        assert [record.getMessage()[-1] for record in caplog.records] == ["0", "1", "2"]
        assert good.await_count == 3


class TestPropagating:
    async def test_raises_event_error(self) -> None:
        """The error names event and handler and holds the original, as attribute and as cause."""
        audit_down = RuntimeError("audit system down")
        strict = propagating()

        @strict.on("user_login")
        async def critical_handler(user: Person) -> None:
            raise audit_down

        with pytest.raises(EventError) as caught:
            await strict.emit("user_login", Person())
        error = caught.value
        assert (error.event_name, error.handler_name) == ("user_login", "critical_handler")
        assert error.original is audit_down
        assert error.__cause__ is audit_down
        assert str(error) == (
            "Handler 'critical_handler' for event 'user_login' raised "
            "RuntimeError: audit system down"
        )

    async def test_the_first_failure_stops(self, caplog: pytest.LogCaptureFixture) -> None:
        """Handlers before the failing one have run, those after it do not; nothing is logged."""
        before, after = AsyncMock(), AsyncMock()
        strict = propagating()
        strict.add_listener("evt", before)
        strict.add_listener("evt", AsyncMock(side_effect=RuntimeError("boom")))
        strict.add_listener("evt", after)
        with pytest.raises(EventError):
            await strict.emit("evt")
        before.assert_awaited_once()
        after.assert_not_called()
        assert caplog.records == []

    async def test_the_option_is_an_attribute(self, emitter: EventEmitter) -> None:
        """``propagate_errors`` can be read and is off by default."""
        assert emitter.propagate_errors is False
        assert propagating().propagate_errors is True


async def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("something went wrong")


def fail_at_once(*args: object, **kwargs: object) -> Awaitable[None]:
    raise RuntimeError("something went wrong")


class Mailer:
    """A handler that is an object, and has another as a method."""

    async def __call__(self, user: object) -> None:
        """Be a handler."""
        await fail()

    async def notify(self, user: object) -> None:
        """Be another."""
        await fail()


UNUSUAL = [
    pytest.param(functools.partial(fail, "ada"), "fail", id="partial"),
    pytest.param(
        functools.partial(functools.partial(fail), greeting="hi"), "fail", id="nested partial"
    ),
    pytest.param(functools.partial(Mailer().notify), "notify", id="partial of a method"),
    pytest.param(Mailer(), "Mailer", id="object"),
    pytest.param(Mailer().notify, "notify", id="bound method"),
    pytest.param(lambda user: fail(user), "<lambda>", id="lambda"),
    pytest.param(fail_at_once, "fail_at_once", id="function"),
    pytest.param(
        AsyncMock(side_effect=RuntimeError("something went wrong")), "AsyncMock", id="mock"
    ),
]


class SilentError(Exception):
    """Cannot be put into words."""

    def __str__(self) -> str:
        raise LookupError("no words")


class TestFailuresThatEscaped:
    """The error path of 0.6 could itself fail, and then the login failed with it."""

    @pytest.mark.parametrize(("handler", "name"), UNUSUAL)
    async def test_unusual_handlers_are_logged(
        self,
        emitter: EventEmitter,
        caplog: pytest.LogCaptureFixture,
        handler: Callable[..., Any],
        name: str,
    ) -> None:
        """Whatever kind of callable fails, it has a name in the line and the next handler runs."""
        after = AsyncMock()
        emitter.add_listener("user_login", handler)
        emitter.add_listener("user_login", after)
        await emitter.emit("user_login", "ada")
        assert [record.getMessage() for record in caplog.records] == [
            f"Handler '{name}' for event 'user_login' raised RuntimeError: something went wrong"
        ]
        after.assert_awaited_once_with("ada")

    @pytest.mark.parametrize(("handler", "name"), UNUSUAL)
    async def test_unusual_handlers_are_raised(
        self, handler: Callable[..., Any], name: str
    ) -> None:
        """Whatever kind of callable fails, a propagating emitter raises `EventError` with its name."""
        strict = propagating()
        strict.add_listener("user_login", handler)
        with pytest.raises(EventError) as caught:
            await strict.emit("user_login", "ada")
        assert caught.value.handler_name == name
        assert isinstance(caught.value.original, RuntimeError)

    async def test_an_error_without_words_is_logged(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An exception whose ``__str__`` raises is a failure like any other."""
        after = AsyncMock()
        emitter.add_listener("evt", AsyncMock(side_effect=SilentError()))
        emitter.add_listener("evt", after)
        await emitter.emit("evt")
        (record,) = caplog.records
        assert "SilentError" in record.getMessage()
        assert "SilentError" in logging.Formatter().format(record)
        after.assert_awaited_once()

    async def test_an_error_without_words_is_raised(self) -> None:
        """An exception whose ``__str__`` raises becomes an `EventError` that has words."""
        strict, original = propagating(), SilentError()
        strict.add_listener("evt", AsyncMock(side_effect=original))
        with pytest.raises(EventError, match="SilentError") as caught:
            await strict.emit("evt")
        assert caught.value.original is original

    async def test_a_cancelled_error_of_its_own(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A handler that awaits something cancelled has failed; nobody cancelled the emit."""
        after = AsyncMock()

        @emitter.on("evt")
        async def await_the_dead() -> None:
            dead = asyncio.get_running_loop().create_future()
            dead.cancel()
            await dead

        emitter.add_listener("evt", after)
        await emitter.emit("evt")
        (record,) = caplog.records
        assert "'await_the_dead'" in record.getMessage()
        assert "CancelledError" in record.getMessage()
        after.assert_awaited_once()

    async def test_the_caller_is_cancelled(self, emitter: EventEmitter) -> None:
        """A client that hangs up cannot suppress the handlers that had not started."""
        waiting, told = asyncio.Event(), asyncio.Event()
        interrupted: list[str] = []

        @emitter.on("password_changed")
        async def slow(user: Person) -> None:
            waiting.set()
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                interrupted.append("slow")
                raise

        @emitter.on("password_changed")
        async def notify(user: Person) -> None:
            told.set()

        request = asyncio.create_task(emitter.emit("password_changed", Person()))
        async with asyncio.timeout(PATIENCE):
            await waiting.wait()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            await told.wait()
        assert interrupted == ["slow"]


class TestHandlersThatFailed:
    """What 0.6 ran, or could have run, and reported as broken."""

    async def test_sync_handlers(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A plain function is a handler: it runs once, in its turn, and is no error."""
        order: list[str] = []
        emitter.add_listener("user_login", lambda user: order.append(f"lambda {user}"))

        @emitter.on("user_login")
        def plain(user: str) -> None:
            order.append(f"plain {user}")

        @emitter.on("user_login")
        async def last(user: str) -> None:
            order.append(f"last {user}")

        await emitter.emit("user_login", "ada")
        assert order == ["lambda ada", "plain ada", "last ada"]
        assert caplog.records == []

    async def test_payload_names_are_free(self, emitter: EventEmitter) -> None:
        """No keyword of a payload collides with a parameter of ``emit``."""
        payload = {"event_name": 1, "self": 2, "event": 3, "name": 4, "args": 5, "kwargs": 6}
        seen: list[dict[str, int]] = []

        @emitter.on("evt")
        async def note(**everything: int) -> None:
            seen.append(everything)

        await emitter.emit("evt", **payload)
        assert seen == [payload]

    async def test_a_missing_argument_is_an_ordinary_failure(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A handler that requires what was not emitted fails with its name in the log."""

        @emitter.on("evt")
        async def wants_more(user: str, colour: str) -> None: ...

        await emitter.emit("evt", "ada")
        (record,) = caplog.records
        assert record.getMessage().startswith(
            "Handler 'wants_more' for event 'evt' raised TypeError: "
        )
        assert "colour" in record.getMessage()


class TestLogRecords:
    async def test_traceback(self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture) -> None:
        """The record has the traceback, down to the line of the handler that failed."""

        @emitter.on("evt")
        async def flaky_handler() -> None:
            inner()

        def inner() -> None:
            raise RuntimeError("deep down")

        await emitter.emit("evt")
        (record,) = caplog.records
        assert record.exc_info is not None
        kind, failure, where = record.exc_info
        assert kind is RuntimeError
        assert str(failure) == "deep down"
        assert [frame.name for frame in traceback.extract_tb(where)][-2:] == [
            "flaky_handler",
            "inner",
        ]

    @pytest.mark.parametrize(
        "character",
        [
            "\n",
            "\r",
            "\0",
            "\t",
            "\x0b",
            "\x0c",
            "\x1b",
            "\x1c",
            "\x7f",
            "\x85",
            "\u2028",
            "\u2029",
        ],
        ids=ascii,
    )
    async def test_one_line(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture, character: str
    ) -> None:
        """No text of an error can start a line of its own or drive a terminal."""
        text = f"no such user{character}ERROR root: forged"
        emitter.add_listener("evt", AsyncMock(side_effect=ValueError(text)))
        await emitter.emit("evt")
        (record,) = caplog.records
        line = record.getMessage()
        assert character not in line
        assert len(line.splitlines()) == 1
        before, forged = "raised ValueError: no such user", "ERROR root: forged"
        assert before in line
        assert line.endswith(forged)
        assert not line.endswith(f"user{forged}")

    async def test_names_are_escaped_too(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An event name or handler name with a line break makes no second line."""
        handler = AsyncMock(side_effect=ValueError("x"), __name__="hand\nler")
        emitter.add_listener("eve\nnt", handler)
        await emitter.emit("eve\nnt")
        (record,) = caplog.records
        assert "\n" not in record.getMessage()


class TestEventError:
    @pytest.mark.parametrize(
        "duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
    )
    async def test_survives_copying(self, duplicate: Callable[[EventError], EventError]) -> None:
        """The error can be copied and pickled, as task queues and process pools do."""
        strict = propagating()
        strict.add_listener("evt", fail)
        with pytest.raises(EventError) as caught:
            await strict.emit("evt")
        again = duplicate(caught.value)
        assert type(again) is EventError
        assert (again.event_name, again.handler_name) == ("evt", "fail")
        assert isinstance(again.original, RuntimeError)
        assert str(again) == str(caught.value)
        assert again.code == caught.value.code


class TestMemory:
    @pytest.mark.parametrize("use", ["emit", "listeners", "remove_listener", "off", "clear"])
    async def test_unknown_names_leave_nothing(self, emitter: EventEmitter, use: str) -> None:
        """Asking for names that nobody listens to, however many, costs no memory."""

        async def handler() -> None: ...

        async def ask(name: str) -> None:
            if use == "emit":
                await emitter.emit(name, name)
            elif use == "listeners":
                emitter.listeners(name)
            elif use == "off":
                emitter.off(name, handler)
            elif use == "clear":
                emitter.clear(name)
            else:
                with pytest.raises(ValueError):
                    emitter.remove_listener(name, handler)

        assert await bytes_kept(ask) < 5 * NAMES

    async def test_names_nobody_listens_to_any_more(self, emitter: EventEmitter) -> None:
        """An event whose last handler was removed is forgotten."""

        async def handler() -> None: ...

        async def come_and_go(name: str) -> None:
            emitter.add_listener(name, handler)
            await emitter.emit(name)
            emitter.remove_listener(name, handler)

        assert await bytes_kept(come_and_go) < 5 * NAMES

    async def test_the_measure_sees_a_leak(self) -> None:
        """The measure is no blind one: a dictionary of the names exceeds it by far."""
        kept: dict[str, list[object]] = {}

        async def keep(name: str) -> None:
            kept[name] = []

        assert await bytes_kept(keep) > 50 * NAMES


async def bytes_kept(use: Callable[[str], Awaitable[None]]) -> int:
    """Return how many bytes remain after *use* was awaited with many names, each once."""
    await use("a first one")
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(NAMES):
            await use(f"unknown {number}")
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return after - before


@pytest.fixture
async def ada(sqlite: TortoiseContext) -> User:
    return await User.create_user(email="ada@example.com", password=PASSWORD)


class TestCoreEvents:
    """The four events that 0.6 documents, emitted by the service."""

    async def test_user_login(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """``handler(user)``, once the session and ``last_login`` are stored."""
        seen: list[tuple[User, bool]] = []

        @emitter.on("user_login")
        async def on_login(user: User) -> None:
            stored = await User.get(pk=user.pk)
            seen.append((user, stored.last_login == user.last_login is not None))

        result = await auth.login("ada@example.com", PASSWORD)
        assert seen == [(ada, True)]
        assert seen[0][0] is result.user

    @pytest.mark.parametrize(
        ("identifier", "password", "reason"),
        [
            ("nobody@example.com", PASSWORD, "not_found"),
            ("gone@example.com", PASSWORD, "inactive"),
            ("ada@example.com", "not her password", "bad_password"),
        ],
    )
    @pytest.mark.usefixtures("ada")
    async def test_user_login_failed(
        self,
        auth: AuthService[User],
        emitter: EventEmitter,
        identifier: str,
        password: str,
        reason: str,
    ) -> None:
        """``handler(*, identifier, reason)`` learns why; the caller learns nothing."""
        seen: list[dict[str, str]] = []

        @emitter.on("user_login_failed")
        async def track(*, identifier: str, reason: str) -> None:
            seen.append({"identifier": identifier, "reason": reason})

        gone = await User.create_user(email="gone@example.com", password=PASSWORD)
        await auth.deactivate(gone)
        with pytest.raises(AuthenticationError, match=r"^Invalid credentials$"):
            await auth.login(identifier, password)
        assert seen == [{"identifier": identifier, "reason": reason}]

    async def test_user_logout(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """``handler(user)``, once the token is dead; a second logout tells nothing."""
        seen: list[User] = []
        token = (await auth.login("ada@example.com", PASSWORD)).access_token

        @emitter.on("user_logout")
        async def on_logout(user: User) -> None:
            with pytest.raises(TokenError):
                await auth.authenticate(token)
            seen.append(user)

        await auth.logout(token)
        await auth.logout(token)
        assert seen == [ada]

    async def test_user_logout_everywhere(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """``logout_all`` emits the same event with the same signature."""
        seen: list[User] = []

        @emitter.on("user_logout")
        async def on_logout(user: User) -> None:
            seen.append(user)

        await auth.login("ada@example.com", PASSWORD)
        await auth.logout_all(ada)
        assert seen == [ada]

    @pytest.mark.parametrize("through", ["model", "service"])
    async def test_password_changed(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, through: str
    ) -> None:
        """``handler(user)``, once the new hash is stored, and exactly once."""
        seen: list[tuple[User, bool]] = []

        @emitter.on("password_changed")
        async def notify_password_change(user: User) -> None:
            stored = await User.get(pk=user.pk)
            seen.append((user, await stored.check_password(NEW_PASSWORD)))

        if through == "model":
            await ada.set_password(NEW_PASSWORD)
        else:
            await auth.set_password(ada, NEW_PASSWORD)
        assert seen == [(ada, True)]

    async def test_a_flaky_handler_does_not_fail_the_login(
        self,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The login succeeds, the session works, and the failure is in the log."""

        @emitter.on("user_login")
        async def flaky_handler(user: User) -> None:
            raise RuntimeError("something went wrong")

        result = await auth.login("ada@example.com", PASSWORD)
        assert await auth.authenticate(result.access_token) == ada
        assert [record.getMessage() for record in caplog.records] == [
            "Handler 'flaky_handler' for event 'user_login' raised "
            "RuntimeError: something went wrong"
        ]


class TestDocumentedUses:
    """The guide's own examples, with a database under them."""

    async def test_audit_trail(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Handlers that write rows leave a trail of good and bad logins, logouts and changes."""

        @emitter.on("user_login")
        async def log_login(user: User) -> None:
            await AuditRow.create(event="login", subject=str(user.pk))

        @emitter.on("user_login_failed")
        async def log_failed_login(*, identifier: str, reason: str) -> None:
            await AuditRow.create(event="login_failed", subject=f"{identifier}: {reason}")

        @emitter.on("user_logout")
        async def log_logout(user: User) -> None:
            await AuditRow.create(event="logout", subject=str(user.pk))

        @emitter.on("password_changed")
        async def log_password_change(user: User) -> None:
            await AuditRow.create(event="password_changed", subject=str(user.pk))

        with pytest.raises(AuthenticationError):
            await auth.login("eve@example.com", PASSWORD)
        result = await auth.login("ada@example.com", PASSWORD)
        await auth.logout(result.refresh_token)
        await ada.set_password(NEW_PASSWORD)
        assert await AuditRow.all().order_by("id").values_list("event", "subject") == [
            ("login_failed", "eve@example.com: not_found"),
            ("login", str(ada.pk)),
            ("logout", str(ada.pk)),
            ("password_changed", str(ada.pk)),
        ]

    async def test_lock_after_failures(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Handlers that count failures can close the account, and a good login resets the count."""
        failures: Counter[str] = Counter()

        @emitter.on("user_login_failed")
        async def track_failures(*, identifier: str, reason: str) -> None:
            failures[identifier] += 1
            if failures[identifier] >= 3 and reason == "bad_password":
                await User.filter(email=identifier).update(is_active=False)

        @emitter.on("user_login")
        async def reset_failure_counter(user: User) -> None:
            del failures[user.email]

        async def guess() -> None:
            with pytest.raises(AuthenticationError):
                await auth.login("ada@example.com", "a guess")

        await guess()
        await guess()
        await auth.login("ada@example.com", PASSWORD)
        assert failures == {}
        for _ in range(3):
            await guess()
        with pytest.raises(AuthenticationError):
            await auth.login("ada@example.com", PASSWORD)
        assert failures == {"ada@example.com": 4}


class TestPropagatingFromTheService:
    @pytest.fixture
    def emitter(self) -> EventEmitter:
        """Raise from the service what handlers raise."""
        return propagating()

    async def test_login_raises(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """With a propagating emitter the caller of ``login`` gets the `EventError`."""

        @emitter.on("user_login")
        async def critical_handler(user: User) -> None:
            raise RuntimeError("audit system down")

        with pytest.raises(EventError) as caught:
            await auth.login("ada@example.com", PASSWORD)
        assert caught.value.handler_name == "critical_handler"

    @pytest.mark.parametrize("everywhere", [False, True])
    async def test_logout_raises_and_has_ended_the_session(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter, everywhere: bool
    ) -> None:
        """A failing handler of ``user_logout`` is told to the caller, and the session is over."""
        token = (await auth.login("ada@example.com", PASSWORD)).access_token
        calls: list[User] = []

        @emitter.on("user_logout")
        async def critical_handler(user: User) -> None:
            calls.append(user)
            raise RuntimeError("audit system down")

        with pytest.raises(EventError, match="critical_handler"):
            await (auth.logout_all(ada) if everywhere else auth.logout(token))
        with pytest.raises(TokenError):
            await auth.authenticate(token)
        assert calls == [ada]

    async def test_an_emitter_for_one_service(
        self, ada: User, clock: FakeClock, emitter: EventEmitter
    ) -> None:
        """A service that was given its own emitter emits there and nowhere else."""
        own = EventEmitter()
        heard: list[str] = []

        @own.on("user_login")
        async def on_own(user: User) -> None:
            heard.append("own")

        @emitter.on("user_login")
        async def on_default(user: User) -> None:
            heard.append("default")

        service = AuthService(User, AuthConfig(secret=SECRET), emitter=own, clock=clock)
        await service.login("ada@example.com", PASSWORD)
        assert heard == ["own"]
