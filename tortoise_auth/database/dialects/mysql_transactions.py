"""Transactions of MariaDB and MySQL, followed in Python as far as the server does not show them."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

from tortoise.backends.base.client import (
    ConnectionWrapper,
    PoolConnectionWrapper,
    TransactionalDBClient,
)
from tortoise.exceptions import OperationalError, TransactionManagementError

from tortoise_auth.database.dialects.mysql_settings import Requirements
from tortoise_auth.database.wrappers import outermost, root_of

_DEADLOCK, _LOCK_WAIT_TIMEOUT = 1213, 1205

_SAVEPOINT = re.compile(
    r"(?:^|;)\s*(?:SAVEPOINT|(ROLLBACK\s+(?:WORK\s+)?TO(?:\s+SAVEPOINT)?))\s+`?(\w+)", re.IGNORECASE
)

_STATE = "_tortoise_auth_state"


@dataclass(slots=True)
class State:
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
        """Raise if the server has rolled the transaction back.

        Raises:
            TransactionManagementError: It has.
        """
        if self.failed:
            raise TransactionManagementError(f"{self.failed} has rolled back this transaction")


def state_of(transaction: TransactionalDBClient) -> State:
    """Return what is followed of the transaction around *transaction*; follow it from now on."""
    around = outermost(transaction)
    if _STATE not in vars(around):  # it has begun before anything was watched
        _watch(around, State())
    state: State = getattr(around, _STATE)
    return state


def _watch(transaction: Any, state: State) -> None:  # noqa: ANN401 - the wrapper of one driver
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


def _watch_savepoint(savepoint: Any, state: State) -> None:  # noqa: ANN401
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

    def __init__(self, transaction: Any, state: State) -> None:  # noqa: ANN401
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


class Pooled(PoolConnectionWrapper[Any]):
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
