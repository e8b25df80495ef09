"""Errors of the drivers, by the numbers and texts of each database."""

from __future__ import annotations

import re
import sqlite3

_DRIVERS = frozenset(
    {"asyncpg", "psycopg", "psycopg_pool", "asyncmy", "aiomysql", "pymysql", "aiosqlite"}
)

_OUTAGES = ("08", "28", "3D", "40", "53", "55", "57", "58")
"""Classes of SQLSTATE whose messages name the server, its locks and roles, and no value of a row."""

_OUTAGES_OF_MYSQL = frozenset({1040, 1044, 1045, 1049, 1129, 1130, 1203, 1205, 1213})
"""The same of MariaDB and MySQL, beside those of the client, which begin at 2000."""

_NOT_CONNECTED = {
    "no active connection",  # a ValueError of aiosqlite
    "Connection closed",
    "Cannot acquire connection after closing pool",  # a RuntimeError of asyncmy and aiomysql
}


def is_of_driver(error: BaseException) -> bool:
    """Return whether a driver raised *error*."""
    return (
        isinstance(error, sqlite3.Error)
        or type(error).__module__.partition(".")[0] in _DRIVERS
        or (isinstance(error, ValueError | RuntimeError) and str(error) in _NOT_CONNECTED)
    )


def is_of_missing_table(error: BaseException) -> bool:
    """Return whether a table or column is missing."""
    # undefined_table, undefined_column
    return (
        _state(error) in {"42P01", "42703"}
        or _number(error) in {1146, 1054}
        or (
            isinstance(error, sqlite3.OperationalError)
            and str(error).startswith(("no such table", "no such column", "table "))
        )
    )


def is_of_unique_key(error: BaseException | None) -> bool:
    """Return whether a row was rejected because of another one with the same values."""
    return _state(error) == "23505" or _number(error) == 1062 or "UNIQUE constraint" in str(error)


def is_of_check(error: BaseException | None) -> bool:
    """Return whether MariaDB or MySQL rejected a row by a check, which Tortoise takes for a failure."""
    return _number(error) in {4025, 3819}


def columns_in(error: BaseException | None) -> frozenset[str]:
    """Return the columns of the unique key that *error* names; empty if it does not.

    For an index on an expression it is every word of that.
    """
    detail = getattr(error, "detail", None) or getattr(
        getattr(error, "diag", None), "message_detail", None
    )
    if isinstance(detail, str):
        # In the language of the server: Key (tenant, lower(phone))=(7, ...)
        key = re.search(r"\((.+?)\)=", detail)
        return frozenset(re.findall(r"\w+", key[1]) if key else ())
    _, _, names = str(error).partition("UNIQUE constraint failed: ")
    return frozenset(name.rpartition(".")[2] for name in names.split(", ") if "." in name)


def key_in(error: BaseException | None) -> str | None:
    """Return the name of the unique key in an error of MariaDB or MySQL, which names no columns."""
    # The value comes before it, and may contain anything.
    if error is None or _number(error) != 1062:
        return None
    found = re.search(r"for key '(?:[^']*\.)?([^'.]+)'$", str(error.args[1]))
    return found[1] if found else None


def speaks_of_the_server(error: BaseException) -> bool:
    """Return whether the text of *error* is about the server and quotes no value of a row."""
    state, number = _state(error), _number(error)
    return (
        (isinstance(state, str) and state.startswith(_OUTAGES))
        or (number is not None and (number in _OUTAGES_OF_MYSQL or 2000 <= number < 3000))
        or isinstance(error, OSError | sqlite3.OperationalError)
    )


def _state(error: BaseException | None) -> object:
    return getattr(error, "sqlstate", None)


def _number(error: BaseException | None) -> int | None:
    """Return the number of an error of MariaDB or MySQL."""
    driver = type(error).__module__.partition(".")[0]
    if error is None or driver not in {"asyncmy", "aiomysql", "pymysql"}:
        return None
    number = error.args[0] if error.args else None
    return number if isinstance(number, int) else None
