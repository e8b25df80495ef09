"""What others wrote, in messages and logs: on one line, and of no length that fills them."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable, Iterator
from reprlib import Repr
from types import TracebackType

_MAX_TEXT = 1000
_MAX_NAME = 100
_MAX_NAMES = 20
_MAX_EXCEPTIONS = 20

_repr = Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _MAX_NAME


def legible(text: str, limit: int = _MAX_TEXT) -> str:
    """Return at most *limit* characters of *text*, and escaped what is invisible or moves the cursor.

    A line break could forge the next line of a log, a mark of direction reverses what follows.
    """
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in shown)[:limit]
    return shown if len(text) <= limit else f"{shown}..."


def quoted(value: object) -> str:
    """Return the bounded ``repr()`` of a value that is not what it should be."""
    return legible(_repr.repr(value), 2 * _MAX_NAME)


def named(text: object) -> str:
    """Return a name that others chose, bounded."""
    return legible(str(text), _MAX_NAME)


def listed(names: Iterable[object]) -> str:
    """Return names that others chose as one bounded list."""
    every = list(names)
    more = [f"and {len(every) - _MAX_NAMES} more"] if len(every) > _MAX_NAMES else []
    return ", ".join([*map(named, every[:_MAX_NAMES]), *more])


def describe(error: BaseException) -> str:
    """Return the text of an error, even of one whose own ``__str__`` fails."""
    try:
        return str(error)
    except Exception as failure:  # noqa: BLE001 - a broken __str__ must not replace the error it describes
        return f"<no text: {type(failure).__name__} in __str__>"


def logger_of(name: str) -> logging.Logger:
    """Return a logger whose tracebacks are legible: their texts are bounded, each on one line."""
    logger = logging.getLogger(name)
    logger.addFilter(_write_traceback)
    return logger


def _write_traceback(record: logging.LogRecord) -> bool:
    """Write the traceback before a formatter does, which takes what is written already."""
    if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
        record.exc_text = traceback_of(record.exc_info[1], record.exc_info[2])
    return True


def traceback_of(error: BaseException, raised: TracebackType | None = None) -> str:
    """Return the traceback of an error and of its causes as Python shows it, but for their texts.

    Args:
        error: The error.
        raised: Where it was raised, if not where it says itself.
    """
    return "\n".join(_lines_of(error, raised or error.__traceback__, set()))


def _lines_of(error: BaseException, raised: TracebackType | None, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    for before, what in (
        (error.__cause__, "The above exception was the direct cause of the following exception:"),
        (
            None if error.__suppress_context__ else error.__context__,
            "During handling of the above exception, another exception occurred:",
        ),
    ):
        if before is not None and id(before) not in seen and len(seen) < _MAX_EXCEPTIONS:
            yield from _lines_of(before, before.__traceback__, seen)
            yield f"\n{what}\n"
    if raised is not None:
        yield "Traceback (most recent call last):"
        yield "".join(traceback.format_tb(raised)).rstrip("\n")
    kind = type(error)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    text = legible(describe(error))
    yield f"{module}{kind.__qualname__}" + (f": {text}" if text else "")
    yield from (legible(str(note)) for note in getattr(error, "__notes__", ()))
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions[:_MAX_EXCEPTIONS]:
            if id(each) not in seen and len(seen) < _MAX_EXCEPTIONS:
                yield "One of them:"
                yield from _lines_of(each, each.__traceback__, seen)
