"""What others wrote is bounded and on one line, in errors, in logs and in their tracebacks."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tortoise_auth import AuthConfig, AuthService, RequestContext, SigningKey
from tortoise_auth.events import Classification, Event, EventEmitter, EventError, UserLogin
from tortoise_auth.legible import legible, listed, logger_of, quoted, traceback_of
from tortoise_auth.testing import capture

HUGE = "x" * 100_000
FORGED = "bad\nERROR root: forged\x1b[2J\u202egro\u2028end"
BOUND = 3000


class Colour(Enum):
    """A type of a field that quotes what does not fit."""

    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Painted(Event):
    """An event of the host's."""

    colour: Colour


async def needs_more(tenant: object) -> None:
    """Need what no event of the library has."""


CALLS: dict[str, Callable[[Any, Any, Any], object]] = {
    "on": lambda _, emitter, text: emitter.on(text, needs_more)(None),
    "on a pattern": lambda _, emitter, text: emitter.on(f"{text}*", needs_more),
    "no handler": lambda _, emitter, text: emitter.add_listener("user_login", text),
    "no event": lambda _, emitter, text: emitter.add_listener([text], needs_more),
    "option": lambda _, emitter, text: emitter.on("evt", needs_more, **{text: 1}),
    "delivery": lambda _, emitter, text: emitter.on("evt", needs_more, delivery=text),
    "name": lambda _, emitter, text: emitter.on("evt", needs_more, name=text),
    "remove": lambda _, emitter, text: emitter.remove_listener(text, needs_more),
    "policy": lambda _, emitter, text: setattr(emitter, "errors", text),
    "emit": lambda _, emitter, text: emitter.emit([text]),
    "emit_nowait": lambda _, emitter, text: emitter.emit_nowait([text]),
    "from_dict": lambda _, __, text: Event.from_dict({"name": text}),
    "version": lambda _, __, text: Event.from_dict({"name": "painted", "schema_version": text}),
    "member": lambda _, __, text: Painted.from_dict(
        {"name": "painted", "schema_version": 1, "colour": text}
    ),
    "moment": lambda _, __, text: Painted.from_dict(
        {"name": "painted", "schema_version": 1, "colour": "red", "occurred_at": text}
    ),
    "algorithm": lambda _, __, text: SigningKey(SECRET, algorithm=text),
    "kid": lambda _, __, text: SigningKey(SECRET, kid=text),
    "issuer": lambda _, __, text: AuthConfig(secret=SECRET, issuer=text),
    "address": lambda _, __, text: RequestContext(ip=text),
    "sign up with an unknown column": lambda auth, _, text: User.create_user(
        email=EMAIL, password=PASSWORD, **{text: 1}
    ),
    "sign up": lambda auth, _, text: User.create_user(email=text, password=PASSWORD),
    "log in": lambda auth, _, text: auth.login(text, PASSWORD),
    "claim": lambda auth, _, text: auth.login(EMAIL, PASSWORD, claims={text: text}),
    "decode": lambda auth, _, text: auth.decode(text),
    "refresh": lambda auth, _, text: auth.refresh(text),
    "authenticate": lambda auth, _, text: auth.authenticate(text),
    "actor": lambda auth, _, text: auth.deactivate(User(id=1), actor=text),
    "keep": lambda auth, _, text: auth.logout_all(User(id=1), keep=text),
    "another model": lambda auth, _, text: auth.activate(text),
    "classification": lambda _, __, text: Classification(activity=text, message="Painted").problem(
        ()
    ),
    "capture": lambda _, emitter, text: captured(emitter, text),
}


def captured(emitter: EventEmitter, text: str) -> None:
    with capture(emitter) as events:
        events.assert_emitted(text)


class TestErrors:
    @pytest.mark.parametrize(
        "text", [HUGE, FORGED * 1000, "\0" * 100_000], ids=["x", "forged", "NUL"]
    )
    @pytest.mark.parametrize("name", CALLS)
    async def test_echo_little(
        self, sqlite: TortoiseContext, name: str, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """No error echoes more than a line of what it was called with, and nothing that forges one."""
        auth = AuthService(User, AuthConfig(secret=SECRET))
        try:
            result = CALLS[name](auth, EventEmitter(strict=True), text)
            if isinstance(result, Awaitable):
                await result
        except Exception as error:  # noqa: BLE001 - whatever it is
            said = f"{error} {error!r}"
        else:
            said = str(result)
        for each in (said, caplog.text):
            assert len(each) < BOUND
            assert "\x1b" not in each
            assert "\u202e" not in each
            assert "ERROR root: forged" not in each.splitlines()

    async def test_of_a_handler(self, caplog: pytest.LogCaptureFixture) -> None:
        """An `EventError` has one bounded line; the original error is whole."""
        error = EventError(HUGE, FORGED, ValueError(HUGE))
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < BOUND
        assert str(error.original) == HUGE


class TestLogs:
    @pytest.mark.parametrize("text", [HUGE, FORGED], ids=["huge", "forged"])
    @pytest.mark.parametrize("chained", ["alone", "cause", "context", "note", "group"])
    async def test_tracebacks(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture, text: str, chained: str
    ) -> None:
        """The traceback of a handler has its frames, and forges no line by any text in the chain."""

        async def handler() -> None:
            if chained == "note":
                error = ValueError("outer")
                error.add_note(text)
                raise error
            if chained == "group":
                raise ExceptionGroup("outer", [ValueError(text), TypeError(text)])
            try:
                raise LookupError(text)
            except LookupError as error:
                if chained == "alone":
                    raise
                raise ValueError("outer") from (error if chained == "cause" else None)

        if chained == "context":

            async def replacing() -> None:
                try:
                    raise LookupError(text)
                finally:
                    raise ValueError("outer")

            emitter.on("evt", replacing)
        else:
            emitter.on("evt", handler)
        await emitter.emit("evt")
        (record,) = caplog.records
        shown = logging.Formatter().format(record)
        assert "Traceback (most recent call last)" in shown
        assert f"in {'replacing' if chained == 'context' else 'handler'}" in shown
        assert len(shown) < 4 * BOUND
        assert not any(line.startswith("ERROR root") for line in shown.splitlines())
        assert not {"\x1b", "\u202e", "\u2028"} & set(shown)
        assert ("bad" in shown) is (text is FORGED)
        assert record.exc_info is not None
        assert isinstance(record.exc_info[1], Exception)

    def test_of_every_logger(self) -> None:
        """A logger made here twice writes each traceback once."""
        logger = logger_of("tortoise_auth.events")
        assert len(logger.filters) == 1

    def test_a_circle_of_causes(self) -> None:
        """Errors that cause each other, or very many, have an end."""
        first, second = ValueError("first"), ValueError("second")
        first.__cause__, second.__cause__ = second, first
        assert traceback_of(first).count("ValueError") == 2
        last = ValueError("0")
        for number in range(1, 10_000):
            error = ValueError(str(number))
            error.__cause__, last = last, error
        assert traceback_of(last).count("ValueError") == 20


class TestText:
    def test_legible(self) -> None:
        """What is printable stays as it is, up to the limit."""
        assert legible("Zoë, Ω 😀") == "Zoë, Ω 😀"
        assert legible("a\nb\u202ec") == r"a\nb\u202ec"
        assert legible("x" * 7, 5) == "xxxxx..."

    def test_quoted(self) -> None:
        """Any value is quoted, also one whose `repr` fails."""

        class Mute:
            def __repr__(self) -> str:
                raise LookupError

        assert quoted("it's") == '''"it's"'''
        assert quoted(UserLogin).endswith("UserLogin'>")
        assert len(quoted([HUGE] * 1000)) < 1000
        assert "Mute" in quoted(Mute())

    def test_listed(self) -> None:
        """A list of names says how many it leaves out."""
        assert listed(["a", "b"]) == "a, b"
        assert listed(map(str, range(25))).endswith("19, and 5 more")
