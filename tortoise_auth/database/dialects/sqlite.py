"""SQLite, through aiosqlite."""

from __future__ import annotations

from typing import ClassVar

from tortoise.backends.base.client import BaseDBAsyncClient, TransactionalDBClient

from tortoise_auth.database.dialects.dialect import Dialect


class Sqlite(Dialect):
    """SQLite, through aiosqlite. All tasks share one connection."""

    language: ClassVar[str] = "sqlite"
    placeholder: ClassVar[str] = "?"
    has_one_connection: ClassVar[bool] = True

    async def script(self, connection: BaseDBAsyncClient, statements: str) -> None:
        """Run one statement: for several the driver would commit the transaction before them."""
        await self.rows(connection, statements, {})

    async def set_mark(self, transaction: TransactionalDBClient, mark: int) -> int | None:
        """Set a number in the header of the temporary database, which is part of the transaction."""
        before = await self.mark_of(transaction)
        await transaction.execute_query_dict(f"PRAGMA temp.user_version = {mark:d}")
        return before

    async def mark_of(self, transaction: TransactionalDBClient) -> int | None:
        """Return the number in that header; ``None`` for 0, which it begins with."""
        (row,) = await transaction.execute_query_dict("PRAGMA temp.user_version")
        return next(iter(row.values())) or None
