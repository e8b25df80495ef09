"""MariaDB and MySQL, through asyncmy or aiomysql."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tortoise.backends.base.client import (
    BaseDBAsyncClient,
    ConnectionWrapper,
    PoolConnectionWrapper,
    TransactionalDBClient,
)
from tortoise.exceptions import OperationalError, TransactionManagementError
from tortoise.models import Model

from tortoise_auth.database.dialects.dialect import Dialect
from tortoise_auth.database.dialects.failures import key_in
from tortoise_auth.database.dialects.mysql_settings import Requirements
from tortoise_auth.database.wrappers import outermost, root_of

_DEADLOCK, _LOCK_WAIT_TIMEOUT = 1213, 1205


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
        client.acquire_connection = lambda: _Pooled(client, pooled._pool_init_lock)  # type: ignore[method-assign]

    def check(self, client: BaseDBAsyncClient, model: type[Model]) -> None:
        """Let the next `verify` check the columns of *model*, too."""
        if Requirements.of(client).expect(model):
            self.prepare(client)

    async def verify(self, connection: BaseDBAsyncClient) -> None:
        """Check the settings and the collations, for statements of ours alone."""
        await Requirements.of(root_of(connection)).verify(connection)

    def guard(self, transaction: TransactionalDBClient) -> None:
        """Keep in Python what other databases keep in the transaction: its marks, and that it failed."""
        _state_of(transaction)

    async def set_mark(self, transaction: TransactionalDBClient, mark: int) -> int | None:
        """Set the number, which is kept in Python: no setting of the session is rolled back."""
        before = await self.mark_of(transaction)
        _state_of(transaction).mark = mark
        return before

    async def mark_of(self, transaction: TransactionalDBClient) -> int | None:
        """Return the number; ``None`` if the transaction was ended by SQL text."""
        state, connection = _state_of(transaction), outermost(transaction)._connection
        state.refuse_if_failed()
        return state.mark if connection.get_transaction_status() else None

    async def refuse_if_failed(self, transaction: TransactionalDBClient) -> None:
        """Raise after a deadlock: the server has rolled back the whole transaction."""
        _state_of(transaction).refuse_if_failed()

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


_SAVEPOINT = re.compile(
    r"(?:^|;)\s*(?:SAVEPOINT|(ROLLBACK\s+(?:WORK\s+)?TO(?:\s+SAVEPOINT)?))\s+`?(\w+)", re.IGNORECASE
)

_STATE = "_tortoise_auth_state"


@dataclass(slots=True)
class _State:
    """What a transaction and its savepoints share.

    Attributes:
        mark: The number that was set last and has not been rolled back.
        marks: That number, as it was when each savepoint began.
        failed: What has rolled the whole transaction back on the server. It is in none now: further
            statements would be kept one by one.
    """

    mark: int | None = None
    marks: dict[str, int | None] = field(default_factory=dict)
    failed: str | None = None

    def follow(self, statements: str) -> None:
        """Note the savepoints that the host sets, and rolls back to, by statements of its own."""
        for end, name in _SAVEPOINT.findall(statements):
            if end:
                self.mark = self.marks.get(name)
            else:
                self.marks[name] = self.mark

    def refuse_if_failed(self) -> None:
        if self.failed:
            raise TransactionManagementError(f"{self.failed} has rolled back this transaction")


def _state_of(transaction: TransactionalDBClient) -> _State:
    around = outermost(transaction)
    if _STATE not in vars(around):  # it has begun before anything was watched
        _watch(around, _State())
    state: _State = getattr(around, _STATE)
    return state


def _watch(transaction: Any, state: _State) -> None:  # noqa: ANN401 - the wrapper of one driver
    """Replace methods of one transaction or savepoint, so that *state* follows it."""
    begin_nested = transaction._in_transaction
    commit, roll_back = transaction.commit, transaction.rollback

    def begin_watched() -> Any:  # noqa: ANN401
        block = begin_nested()
        _watch_savepoint(block.client, state)
        return block

    async def commit_unless_failed() -> None:
        if state.failed:
            # Of its own type Tortoise would leave the transaction open.
            raise OperationalError(f"{state.failed} has rolled back this transaction")
        await commit()

    async def roll_back_if_connected() -> None:
        if _is_open(transaction._connection):
            await roll_back()
        else:  # it ended with the connection
            transaction._finalized = True

    execute_query, execute_script = transaction.execute_query, transaction.execute_script

    async def query_watched(query: str, values: list[Any] | None = None) -> Any:  # noqa: ANN401
        result = await execute_query(query, values)
        state.follow(query)
        return result

    async def script_watched(query: str) -> None:
        await execute_script(query)
        state.follow(query)

    setattr(transaction, _STATE, state)
    transaction.execute_query, transaction.execute_script = query_watched, script_watched
    transaction._in_transaction = begin_watched
    transaction.commit, transaction.rollback = commit_unless_failed, roll_back_if_connected
    transaction.acquire_connection = lambda: _Guarded(transaction, state)


def _watch_savepoint(savepoint: Any, state: _State) -> None:  # noqa: ANN401
    _watch(savepoint, state)
    begin, roll_back, release = (
        savepoint.savepoint,
        savepoint.savepoint_rollback,
        savepoint.release_savepoint,
    )

    async def begin_watched() -> None:
        state.refuse_if_failed()
        await begin()
        state.marks[savepoint._savepoint] = state.mark

    async def roll_back_watched() -> None:
        if state.failed:  # the server knows the savepoint no more
            savepoint._finalized = True
            return
        name = savepoint._savepoint
        await roll_back()
        state.mark = state.marks[name]

    async def release_watched() -> None:
        state.refuse_if_failed()
        await release()

    savepoint.savepoint, savepoint.savepoint_rollback = begin_watched, roll_back_watched
    savepoint.release_savepoint = release_watched


class _Guarded(ConnectionWrapper[Any]):
    """The connection of a transaction, for one statement."""

    __slots__ = ("_requirements", "_state")

    def __init__(self, transaction: Any, state: _State) -> None:  # noqa: ANN401
        super().__init__(transaction._lock, transaction)
        self._state = state
        self._requirements = Requirements.of(root_of(transaction))

    async def __aenter__(self) -> Any:  # noqa: ANN401
        connection = await super().__aenter__()
        try:
            self._state.refuse_if_failed()
        except BaseException:
            self._lock.release()
            raise
        return connection

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:  # noqa: ANN401
        number = error.args[0] if error is not None and error.args else None
        if number == _DEADLOCK:
            self._state.failed = "A deadlock"
        elif number == _LOCK_WAIT_TIMEOUT and self._requirements.timeout_ends_transaction:
            self._state.failed = "A lock that was waited for in vain"
        elif not _is_open(self.connection):
            self._state.failed = "The end of its connection"
        await super().__aexit__(kind, error, traceback)
        _raise_cancellation(error)


class _Pooled(PoolConnectionWrapper[Any]):
    """A connection of the pool, for one statement."""

    __slots__ = ()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:  # noqa: ANN401
        await super().__aexit__(kind, error, traceback)
        _raise_cancellation(error)


def _is_open(connection: Any) -> bool:  # noqa: ANN401 - of one of two drivers
    return bool(connection.connected if hasattr(connection, "connected") else not connection.closed)


def _raise_cancellation(error: BaseException | None) -> None:
    """Raise the cancellation of a statement, for which both drivers raise an error of their own.

    They end the connection, and then fail to close the cursor on it.
    """
    cancelled = error.__context__ if error is not None else None
    if isinstance(cancelled, asyncio.CancelledError):
        raise cancelled
