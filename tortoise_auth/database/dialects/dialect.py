"""What every database does in its own way, as far as this package needs it."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeAlias

from tortoise.backends.base.client import BaseDBAsyncClient, TransactionalDBClient
from tortoise.models import Model

Row: TypeAlias = dict[str, Any]
Values: TypeAlias = Mapping[str, Any]

Procedure: TypeAlias = Callable[["Dialect", BaseDBAsyncClient, Values], Awaitable[list[Row]]]
"""Several statements in place of one, where a database has none that does the same."""

Statement: TypeAlias = str | Mapping[str, str | Procedure]
"""A text with names in braces for its values: one for all databases, or one for each language."""


class Dialect:
    """One database, reached through one driver.

    Attributes:
        language: Which text of a `Statement` it reads.
        placeholder: What stands for a value; with ``{}`` for its number.
        has_one_connection: All work of the process shares one connection.
    """

    language: ClassVar[str]
    placeholder: ClassVar[str]
    has_one_connection: ClassVar[bool] = False

    async def rows(
        self, connection: BaseDBAsyncClient, statement: Statement, values: Values
    ) -> list[Row]:
        """Run a statement and return its rows."""
        await self.verify(connection)
        text = statement if isinstance(statement, str) else statement[self.language]
        if isinstance(text, str):
            return await connection.execute_query_dict(*self.placed(text, values))
        return await text(self, connection, values)

    async def changed(
        self, connection: BaseDBAsyncClient, statement: Statement, values: Values
    ) -> int:
        """Run an INSERT, UPDATE or DELETE; return how many rows it matched."""
        await self.verify(connection)
        text = statement if isinstance(statement, str) else statement[self.language]
        if not isinstance(text, str):
            raise TypeError("a procedure returns rows and counts none")
        matched, _ = await connection.execute_query(*self.placed(text, values))
        return matched

    async def script(self, connection: BaseDBAsyncClient, statements: str) -> None:
        """Run statements without values, in one round trip."""
        await connection.execute_script(statements)

    def placed(self, statement: str, values: Values) -> tuple[str, list[Any]]:
        """Return *statement* with the placeholders of the driver, and the values in their order."""
        given: list[Any] = []
        numbers: dict[str, str] = {}

        def place(name: re.Match[str]) -> str:
            if name[1] not in numbers:
                text, encoded = self._placeholders(_in_utc(values[name[1]]))
                given.extend(encoded)
                if "{}" not in text:
                    return text
                numbers[name[1]] = text.format(len(given))
            return numbers[name[1]]

        return re.sub(r"\{(\w+)\}", place, statement), given

    def _placeholders(self, value: Any) -> tuple[str, list[Any]]:  # noqa: ANN401
        """Return what stands for a value in a statement, and what is given to the driver.

        A list is given as JSON: then the text of a statement does not depend on its length.
        """
        return self.placeholder, [json.dumps(value) if isinstance(value, list) else value]

    def quoted(self, name: str) -> str:
        """Return the name of a table or column as a statement has it."""
        return f'"{name}"'

    async def notify(self, connection: BaseDBAsyncClient, channel: str) -> None:
        """Wake every listener on *channel* when the transaction commits, where the database can."""

    def notifying(self, statement: str, channel: str) -> str:
        """Return a statement that does the same and `notify`, in one round trip where there is one."""
        return statement

    def listening(
        self, client: BaseDBAsyncClient, channel: str, wake: Callable[[], object]
    ) -> AbstractAsyncContextManager[Callable[[], Awaitable[object]]] | None:
        """Open a connection on which *wake* is called at each `notify`; ``None`` if there is no such thing.

        Returns:
            A context manager. It yields what is awaited until the connection is lost.
        """
        return None

    async def set_mark(self, transaction: TransactionalDBClient, mark: int) -> int | None:
        """Set a number that is rolled back with the innermost open savepoint; return the one before.

        No row is written.
        """
        raise NotImplementedError

    async def mark_of(self, transaction: TransactionalDBClient) -> int | None:
        """Return the number that was set last and has not been rolled back.

        Raises:
            TransactionManagementError: COMMIT will roll back, because a statement has failed.
        """
        raise NotImplementedError

    async def refuse_if_failed(self, transaction: TransactionalDBClient) -> None:
        """Raise if a statement failed, its error was swallowed, and COMMIT would say nothing.

        Raises:
            TransactionManagementError: It did.
        """

    def prepare(self, client: BaseDBAsyncClient) -> None:
        """Set what this package requires of a connection, before the first one is opened."""

    def check(self, client: BaseDBAsyncClient, model: type[Model]) -> None:
        """Let the next `verify` check the columns of *model*, too."""

    async def verify(self, connection: BaseDBAsyncClient) -> None:
        """Check, once, that the database is as this package requires it.

        Raises:
            ConfigurationError: It is not.
        """

    def guard(self, transaction: TransactionalDBClient) -> None:
        """Watch a transaction that has begun, for what the database does not show afterwards."""

    async def columns_of_key(
        self, connection: BaseDBAsyncClient, table: str, error: BaseException
    ) -> frozenset[str]:
        """Return the columns of a unique key whose name is in *error*; empty if it names none."""
        return frozenset()


def _in_utc(value: object) -> object:
    """Return a time in UTC, as columns hold it: SQLite compares the text."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value
