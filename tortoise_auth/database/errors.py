"""Errors of a database or its driver, sorted into ours."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from tortoise.exceptions import BaseORMException, IntegrityError
from tortoise.exceptions import ConfigurationError as TortoiseConfigurationError

from tortoise_auth.exceptions import ConfigurationError, ServiceUnavailableError, causes
from tortoise_auth.legible import describe, logger_of

logger = logger_of("tortoise_auth")

P = ParamSpec("P")
ReturnT = TypeVar("ReturnT")
SelfT = TypeVar("SelfT")

_OUTAGES = ("08", "28", "3D", "40", "53", "55", "57", "58")
"""Classes of SQLSTATE whose messages name the server, its locks and roles, and no value of a row."""

_MAX_CAUSE_LENGTH = 300


def translates_database_errors(
    method: Callable[Concatenate[SelfT, P], Awaitable[ReturnT]],
) -> Callable[Concatenate[SelfT, P], Coroutine[Any, Any, ReturnT]]:
    """Turn every error of the database or its driver into `ServiceUnavailableError`, and log it.

    A database that is down must never look like wrong credentials.
    """

    @functools.wraps(method)
    async def translating(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> ReturnT:
        try:
            return await method(self, *args, **kwargs)
        except Exception as error:
            if not is_database_failure(error):
                raise
            # Drivers put values into their messages; neither text nor cause may leave.
            failure = translated(error, method.__name__)
        raise failure

    return translating


def translated(error: Exception, doing: str) -> Exception:
    """Return our error for one of a database, without the values in its text; log an outage."""
    if isinstance(error, TortoiseConfigurationError):
        return ConfigurationError(f"Tortoise ORM is not set up as it must be: {error}")
    if is_missing_table(error):
        return ConfigurationError(
            "A table or column of tortoise_auth, or of your user model, is missing. Run your "
            "migrations, or `await Tortoise.generate_schemas()` in a test."
        )
    kind = type(error.args[0] if error.args and isinstance(error.args[0], Exception) else error)
    return outage(error, f"The database failed during {doing.lstrip('_')} ({kind.__name__})")


def outage(error: Exception, message: str) -> ServiceUnavailableError:
    """Log at ERROR that a database or another store failed, and return the error for the caller.

    The record has the traceback of *error*. Its text is there only where it cannot contain a value.
    """
    failure = ServiceUnavailableError(message)
    texts = (text for each in causes(error) if (text := _text_without_values(each)))
    cause = next(texts, "")[:_MAX_CAUSE_LENGTH]
    logger.error(
        "%s%s",
        *(message, f": {cause}" if cause else ""),
        exc_info=(type(failure), failure, error.__traceback__),
    )
    return failure


def _text_without_values(error: BaseException) -> str:
    """Return the text of an error on one line; empty for a kind that may quote what is stored."""
    state = getattr(error, "sqlstate", None)
    speaks_of_the_server = isinstance(state, str) and state.startswith(_OUTAGES)
    if speaks_of_the_server or isinstance(error, OSError | sqlite3.OperationalError):
        return " ".join(describe(error).split())
    return ""


def is_database_failure(error: Exception) -> bool:
    """Return whether the database, or its driver, failed."""
    module = type(error).__module__.partition(".")[0]
    return (
        isinstance(error, BaseORMException | sqlite3.Error | OSError | TimeoutError)
        or module in {"asyncpg", "psycopg", "psycopg_pool", "asyncmy", "aiomysql", "pymysql"}
        or (
            isinstance(error, ValueError)
            # What aiosqlite raises when the connection is not open.
            and str(error) in {"no active connection", "Connection closed"}
        )
    )


def is_missing_table(error: Exception) -> bool:
    """Return whether a table or column is missing."""
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    # undefined_table, undefined_column
    return getattr(cause, "sqlstate", None) in {"42P01", "42703"} or (
        isinstance(cause, sqlite3.OperationalError)
        and str(cause).startswith(("no such table", "no such column", "table "))
    )


def is_unique_violation(error: IntegrityError) -> bool:
    """Return whether a row was rejected because of another one with the same values."""
    cause = error.args[0] if error.args else None
    return getattr(cause, "sqlstate", None) == "23505" or "UNIQUE constraint" in str(cause)


def violated_columns(error: IntegrityError) -> frozenset[str]:
    """Return the columns whose values another row has; empty if the database does not say.

    For an index on an expression it is every word of that.
    """
    cause = error.args[0] if error.args else None
    detail = getattr(cause, "detail", None) or getattr(
        getattr(cause, "diag", None), "message_detail", None
    )
    if isinstance(
        detail, str
    ):  # in the language of the server: Key (tenant, lower(phone))=(7, ...)
        key = re.search(r"\((.+?)\)=", detail)
        return frozenset(re.findall(r"\w+", key[1]) if key else ())
    _, _, names = str(cause).partition("UNIQUE constraint failed: ")
    return frozenset(name.rpartition(".")[2] for name in names.split(", ") if "." in name)
