"""All SQL that is written by hand, and what each database and driver does in its own way."""

from collections.abc import Mapping
from typing import Any

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.database.dialects.choice import dialect_of, reads_naive_times
from tortoise_auth.database.dialects.dialect import Dialect, Statement
from tortoise_auth.database.dialects.listening import Listener

__all__ = [
    "Dialect",
    "Listener",
    "Statement",
    "count_changed",
    "dialect_of",
    "notify",
    "reads_naive_times",
    "run_statement",
]


async def run_statement(
    connection: BaseDBAsyncClient, statement: Statement, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Run a statement with *values* for the names in its braces; return its rows.

    Building SQL costs Tortoise more than running it.
    """
    return await dialect_of(connection).rows(connection, statement, values)


async def count_changed(
    connection: BaseDBAsyncClient, statement: Statement, values: Mapping[str, Any]
) -> int:
    """Run an INSERT, UPDATE or DELETE like `run_statement`; return how many rows it matched."""
    return await dialect_of(connection).changed(connection, statement, values)


async def notify(connection: BaseDBAsyncClient, channel: str) -> None:
    """Wake every listener on *channel* when the transaction commits, where the database can."""
    await dialect_of(connection).notify(connection, channel)
