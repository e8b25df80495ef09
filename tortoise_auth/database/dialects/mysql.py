"""MariaDB and MySQL, through asyncmy or aiomysql."""

from __future__ import annotations

from typing import Any, ClassVar

from tortoise.backends.base.client import BaseDBAsyncClient, TransactionalDBClient
from tortoise.models import Model

from tortoise_auth.database.dialects.dialect import Dialect
from tortoise_auth.database.dialects.failures import key_in
from tortoise_auth.database.dialects.mysql_settings import Requirements
from tortoise_auth.database.dialects.mysql_transactions import Pooled, state_of
from tortoise_auth.database.wrappers import outermost, root_of


class MySql(Dialect):
    """MariaDB or MySQL: two servers with one language, through two drivers with one interface."""

    language: ClassVar[str] = "mysql"
    placeholder: ClassVar[str] = "%s"

    def _placeholders(self, value: Any) -> tuple[str, list[Any]]:  # noqa: ANN401
        """Spread a list: the server finds rows by an index for written values, not for JSON."""
        if isinstance(value, list):
            return ", ".join(["%s"] * len(value)) or "NULL", value
        return "%s", [value]

    def quoted(self, name: str) -> str:
        """Return *name* in backquotes."""
        return f"`{name}`"

    def prepare(self, client: BaseDBAsyncClient) -> None:
        """Set the row counts and the isolation that this package requires, unless connected already."""
        Requirements.of(client).prepare()
        pooled: Any = client
        client.acquire_connection = lambda: Pooled(client, pooled._pool_init_lock)  # type: ignore[method-assign]

    def check(self, client: BaseDBAsyncClient, model: type[Model]) -> None:
        """Let the next `verify` check the columns of *model*, too."""
        if Requirements.of(client).expect(model):
            self.prepare(client)

    async def verify(self, connection: BaseDBAsyncClient) -> None:
        """Check the settings and the collations, for statements of ours alone."""
        await Requirements.of(root_of(connection)).verify(connection)

    def guard(self, transaction: TransactionalDBClient) -> None:
        """Keep in Python what other databases keep in the transaction: its marks, and that it failed."""
        state_of(transaction)

    async def set_mark(self, transaction: TransactionalDBClient, mark: int) -> int | None:
        """Set the number, which is kept in Python: no setting of the session is rolled back."""
        before = await self.mark_of(transaction)
        state_of(transaction).mark = mark
        return before

    async def mark_of(self, transaction: TransactionalDBClient) -> int | None:
        """Return the number; ``None`` if the transaction was ended by SQL text."""
        state, connection = state_of(transaction), outermost(transaction)._connection
        state.refuse_if_failed()
        return state.mark if connection.get_transaction_status() else None

    async def refuse_if_failed(self, transaction: TransactionalDBClient) -> None:
        """Raise after a deadlock: the server has rolled back the whole transaction."""
        state_of(transaction).refuse_if_failed()

    async def columns_of_key(
        self, connection: BaseDBAsyncClient, table: str, error: BaseException
    ) -> frozenset[str]:
        """Look the key up whose name is in the text of *error*."""
        statement = (
            "SELECT column_name AS name FROM information_schema.statistics WHERE "
            "table_schema = DATABASE() AND table_name = {table} AND index_name = {key}"
        )
        rows = await self.rows(connection, statement, {"table": table, "key": key_in(error)})
        return frozenset(row["name"] for row in rows)
