"""Secrets that can be recognised in any form, and the places that are searched for them."""

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
    """Return the forms of *secret*: as it is, escaped, quoted, in hex, in base64."""
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
    """Collects what leaves the library, by its destination."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {
            place: [] for place in (OURS, OTHERS, SAID, EVENTS, SHOWN, RAISED)
        }

    def show(self, *things: object) -> None:
        """Record the `repr` and the text of objects."""
        self.texts[SHOWN] += [text for thing in things for text in (repr(thing), f"{thing}")]

    def error(self, error: BaseException) -> None:
        """Record an error, its attributes, and every error that it chains."""
        seen: list[BaseException | None] = []
        waiting: list[BaseException | None] = [error]
        while waiting:
            each = waiting.pop()
            if each is None or each in seen:
                continue
            seen.append(each)
            waiting += [each.__cause__, each.__context__]
            facts = (each.args, vars(each), getattr(each, "__notes__", None))
            self.texts[RAISED] += [repr(each), str(each), *map(repr, facts)]
        self.texts[RAISED] += TracebackException.from_exception(error).format()

    def leaks(self, canaries: dict[str, str]) -> set[tuple[str, str]]:
        """Return the places in which canaries can be read, and their names."""
        everything = {place: "\n".join(texts) for place, texts in self.texts.items()}
        return {
            (place, name)
            for name, secret in canaries.items()
            for form in forms(secret)
            for place, text in everything.items()
            if form in text
        }


class _LogRecorder(logging.Handler):
    """Records whole lines as a log file would have them, tracebacks included."""

    def __init__(self, places: Places) -> None:
        super().__init__(logging.DEBUG)
        self._places = places
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Record one line, with its arguments."""
        place = OURS if record.name.partition(".")[0] == "tortoise_auth" else OTHERS
        self._places.texts[place] += [self.format(record), repr(record.args)]


@contextmanager
def recording_places() -> Iterator[Places]:
    """Record every log at DEBUG, asyncio's included, every warning, and what is printed."""
    places, out = Places(), io.StringIO()
    names = ("", "tortoise", "tortoise.db_client", "tortoise_auth", "aiosqlite", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    recorder, loop = _LogRecorder(places), asyncio.get_running_loop()
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    loggers[0].addHandler(recorder)
    loop.set_debug(True)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with redirect_stdout(out), redirect_stderr(out):
                yield places
    finally:
        loop.set_debug(False)
        loggers[0].removeHandler(recorder)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    places.texts[SAID] += [out.getvalue(), *(str(each.message) for each in warned)]
    sys.stdout.flush()
