"""Failures of handlers: the line in the log, the error that is raised, and the handler's name in both."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import traceback
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import AsyncMock

import pytest

from tortoise_auth.events import EventEmitter, EventError


def propagating() -> EventEmitter:
    return EventEmitter(propagate_errors=True)


async def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("something went wrong")


def fail_at_once(*args: object, **kwargs: object) -> Awaitable[None]:
    raise RuntimeError("something went wrong")


class Mailer:
    """A handler that is an object, and has another as a method."""

    async def __call__(self, user: object) -> None:
        """A handler."""
        await fail()

    async def notify(self, user: object) -> None:
        """Another handler."""
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
    """An error whose text cannot be read."""

    def __str__(self) -> str:
        raise LookupError("no text")


class TestLine:
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

    async def test_one_for_each_failure(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Each failing handler has its own line, in order, and the other handlers run."""
        good = AsyncMock()
        for number in range(3):
            emitter.add_listener("evt", AsyncMock(side_effect=OSError(str(number))))
            emitter.add_listener("evt", good)
        await emitter.emit("evt")
        assert [record.getMessage()[-1] for record in caplog.records] == ["0", "1", "2"]
        assert good.await_count == 3

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


class TestEveryCallable:
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


class TestErrorsWithoutText:
    async def test_logged(self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture) -> None:
        """An exception whose ``__str__`` raises is a failure like any other."""
        after = AsyncMock()
        emitter.add_listener("evt", AsyncMock(side_effect=SilentError()))
        emitter.add_listener("evt", after)
        await emitter.emit("evt")
        (record,) = caplog.records
        assert "SilentError" in record.getMessage()
        assert "SilentError" in logging.Formatter().format(record)
        after.assert_awaited_once()

    async def test_raised(self) -> None:
        """An exception whose ``__str__`` raises becomes an `EventError` with a text of its own."""
        strict, original = propagating(), SilentError()
        strict.add_listener("evt", AsyncMock(side_effect=original))
        with pytest.raises(EventError, match="SilentError") as caught:
            await strict.emit("evt")
        assert caught.value.original is original


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
