"""Secrets that can be recognised wherever they turn up, in whatever form, and the places to look."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import secrets
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from traceback import TracebackException
from urllib.parse import quote, quote_plus

OURS, OTHERS, SAID, EVENTS, SHOWN, RAISED = (
    "our log",
    "logs of drivers",
    "output",
    "events",
    "repr",
    "errors",
)


def new_secret() -> str:
    """Return text of 128 random bits whose escaped, quoted and encoded forms all differ."""
    return f"Käfig '{secrets.token_urlsafe(8)} %&\u2713 {secrets.token_urlsafe(8)}"


def forms(secret: str) -> set[str]:
    """Return how *secret* may be written down: as it is, escaped, quoted, in hex, in base64."""
    raw = secret.encode()
    written = {
        secret,
        repr(secret)[1:-1],
        ascii(secret)[1:-1],
        repr(raw)[2:-1],
        json.dumps(secret)[1:-1],
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        raw.hex(),
        raw.hex().upper(),
    }
    for before in range(3):  # base64 inside something longer looks different at each alignment
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * before + raw).decode().rstrip("=")
            written.add(text[4:-2] if before else text[:-2])
    return written


class Places:
    """Collects what leaves the library, by where it went."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {
            place: [] for place in (OURS, OTHERS, SAID, EVENTS, SHOWN, RAISED)
        }

    def show(self, *things: object) -> None:
        """Note how objects present themselves."""
        self.found[SHOWN] += [text for thing in things for text in (repr(thing), f"{thing}")]

    def error(self, error: BaseException) -> None:
        """Note an error, its facts, and every error behind it."""
        seen: list[BaseException | None] = []
        waiting: list[BaseException | None] = [error]
        while waiting:
            each = waiting.pop()
            if each is None or each in seen:
                continue
            seen.append(each)
            waiting += [each.__cause__, each.__context__]
            facts = (each.args, vars(each), getattr(each, "__notes__", None))
            self.found[RAISED] += [repr(each), str(each), *map(repr, facts)]
        self.found[RAISED] += TracebackException.from_exception(error).format()

    def leaks(self, canaries: dict[str, str]) -> set[tuple[str, str]]:
        """Return which canaries are to be seen where."""
        everything = {place: "\n".join(texts) for place, texts in self.found.items()}
        return {
            (place, name)
            for name, secret in canaries.items()
            for form in forms(secret)
            for place, text in everything.items()
            if form in text
        }


class _Ear(logging.Handler):
    """Writes down whole lines as a log file would have them, tracebacks included."""

    def __init__(self, places: Places) -> None:
        super().__init__(logging.DEBUG)
        self._places = places
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write down one record, with its arguments as they came."""
        place = OURS if record.name.partition(".")[0] == "tortoise_auth" else OTHERS
        self._places.found[place] += [self.format(record), repr(record.args)]


@contextmanager
def listening() -> Iterator[Places]:
    """Hear every log at DEBUG, asyncio's included, every warning, and what is printed."""
    places, out = Places(), io.StringIO()
    names = ("", "tortoise", "tortoise.db_client", "tortoise_auth", "aiosqlite", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    ear, loop = _Ear(places), asyncio.get_running_loop()
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    loggers[0].addHandler(ear)
    loop.set_debug(True)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with redirect_stdout(out), redirect_stderr(out):
                yield places
    finally:
        loop.set_debug(False)
        loggers[0].removeHandler(ear)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    places.found[SAID] += [out.getvalue(), *(str(each.message) for each in warned)]
    sys.stdout.flush()
