"""Errors of a database or its driver, sorted into ours."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.exceptions import BaseORMException, IntegrityError, ValidationError
from tortoise.exceptions import ConfigurationError as TortoiseConfigurationError
from tortoise.models import Model

from tortoise_auth.database.dialects import dialect_of
from tortoise_auth.database.dialects.failures import (
    columns_in,
    is_of_check,
    is_of_driver,
    is_of_missing_table,
    is_of_unique_key,
    speaks_of_the_server,
)
from tortoise_auth.exceptions import ConfigurationError, ServiceUnavailableError, causes
from tortoise_auth.legible import describe, logger_of

logger = logger_of("tortoise_auth")

P = ParamSpec("P")
ReturnT = TypeVar("ReturnT")
SelfT = TypeVar("SelfT")

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
    kind = type(_of_driver(error)).__name__
    return outage(error, f"The database failed during {doing.lstrip('_')} ({kind})")


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
    return " ".join(describe(error).split()) if speaks_of_the_server(error) else ""


def is_database_failure(error: Exception) -> bool:
    """Return whether the database, or its driver, failed."""
    return isinstance(error, BaseORMException | OSError | TimeoutError) or is_of_driver(error)


def is_missing_table(error: Exception) -> bool:
    """Return whether a table or column is missing."""
    return is_of_missing_table(_of_driver(error))


def is_refused_row(error: BaseORMException) -> bool:
    """Return whether a row was rejected for its values, by the model or the database."""
    return isinstance(error, IntegrityError | ValidationError) or is_of_check(_of_driver(error))


def is_unique_violation(error: BaseORMException) -> bool:
    """Return whether a row was rejected because of another one with the same values."""
    return is_of_unique_key(_of_driver(error))


async def violated_columns(
    error: BaseORMException, model: type[Model], connection: BaseDBAsyncClient
) -> frozenset[str]:
    """Return the columns whose values another row of *model* has; empty if that is not known.

    For an index on an expression it is every word of that.
    """
    cause = _of_driver(error)
    return columns_in(cause) or await dialect_of(connection).columns_of_key(
        connection, model._meta.db_table, cause
    )


def _of_driver(error: Exception) -> BaseException:
    """Return the error of the driver, which Tortoise puts into its own."""
    cause = error.args[0] if error.args else None
    return cause if isinstance(cause, BaseException) else error
