"""Transactions that survive cancellation.

Tortoise 1.1 has three traps: cancelling ``in_transaction().__aenter__`` leaks the connection (on
SQLite it leaves a lock that blocks the process for ever, https://github.com/tortoise/tortoise-orm/issues/1152),
a task started inside a transaction keeps the dead connection, and a second connection inside a
transaction deadlocks.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any, TypeVar

from tortoise.backends.base.client import (
    BaseDBAsyncClient,
    NestedTransactionContext,
    TransactionalDBClient,
    TransactionContext,
)
from tortoise.connection import get_connections
from tortoise.exceptions import OperationalError, TransactionManagementError

from tortoise_auth.database.commits import (
    CommitEffect,
    Ending,
    Level,
    call_logged,
    deliver,
    hand_over,
    wait_uncancelled,
)
from tortoise_auth.database.dialects import dialect_of
from tortoise_auth.database.wrappers import outermost, root_of

ReturnT = TypeVar("ReturnT")

_background: set[asyncio.Task[Any]] = set()


class transaction:
    """A transaction on a connection, or a savepoint if it is in one, safe under cancellation.

    Cancelled while it opens or runs, the transaction is rolled back and its connection returned.
    Cancelled while it commits, the commit is awaited, and the cancellation raised afterwards.

    Several at once in one transaction, in several tasks, wait for each other. One that is begun when
    the transaction around it has ended is a transaction of its own.

    Example::

        async with transaction(connection_for(User)) as connection:
            await User.create(..., using_db=connection)

    Args:
        connection: The database, or a transaction.
        apply: Called when the outermost commit is over, if this is the outermost transaction, and
            before anything else that follows the commit.

    Attributes:
        nested: It is a savepoint in a transaction of the caller.
        committed: The block has ended and its changes are kept (a savepoint's: as far as the
            caller's transaction keeps them). Also true when a cancellation was raised afterwards.
    """

    def __init__(
        self, connection: BaseDBAsyncClient, *, apply: Callable[[], object] = lambda: None
    ) -> None:
        self.nested = isinstance(connection, TransactionalDBClient)
        self.committed = False
        self._connection = connection
        self._apply = apply
        self._effects: deque[CommitEffect] = deque()
        # Tortoise restores the current connection when a block ends, and can only do so in the
        # context in which the block began; so both ends run in a context of their own.
        self._context = contextvars.copy_context()

    async def __aenter__(self) -> TransactionalDBClient:
        connection, self._level = self._connection, None
        await dialect_of(connection).verify(connection)
        if isinstance(connection, TransactionalDBClient):
            self._level = await Level.enter(Ending.of(connection).level)
            if self._level is None:
                # The caller's transaction ended while this one waited for its turn.
                connection = root_of(connection)
        self.nested = self._level is not None
        self._block = connection._in_transaction()
        self._one_by_one: AbstractAsyncContextManager[object] = (
            _statements_of(self._block) if self.nested else nullcontext()
        )
        try:
            self._opened = await self._open()
        except BaseException:
            if self._level is not None:
                # Else the units of work of other tasks in this transaction wait for ever.
                self._level.leave()
            raise
        # A savepoint is never made current by Tortoise either: it is the same connection.
        name = connection.connection_name
        # Tortoise has made the transaction current in `self._context` only, not for the caller.
        self._token = None if self.nested else get_connections().set(name, self._opened)
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        ending = self._commit() if error is None else self._roll_back(error)
        try:
            await _uninterrupted(ending, self._context)
        except BaseException:
            hand_over(self._effects)  # none, unless it was committed
            raise
        finally:
            self._opened._finalized = True  # Tortoise does not set it when the ending fails
            get_connections().reset(self._token)
            if self._level is not None:
                self._level.leave()
        # Only now: handlers query the database, and on SQLite the block held its only connection.
        await deliver(self._effects)

    async def _open(self) -> TransactionalDBClient:
        opening = _enter(self._block, self._one_by_one)
        entering = asyncio.get_running_loop().create_task(opening, context=self._context)
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError as cancelled:
            # Not this task but the opening itself was cancelled, as at the end of `asyncio.run`.
            if entering.cancelled():
                raise
            undoing = _spawn(self._undo_open(entering, cancelled), self._context)
            if self.nested:
                # On the caller's own connection: it must be quiet before the caller goes on with it.
                await wait_uncancelled(undoing)
            raise

    async def _undo_open(
        self, entering: asyncio.Task[TransactionalDBClient], cancelled: asyncio.CancelledError
    ) -> None:
        await asyncio.wait([entering])
        if entering.cancelled() or entering.exception() is not None:
            return
        async with self._one_by_one:
            await self._block.__aexit__(type(cancelled), cancelled, None)

    async def _roll_back(self, error: BaseException) -> None:
        # Not the type of the error: after its own ones Tortoise leaves the transaction open.
        async with self._closing(), self._one_by_one:
            await self._block.__aexit__(BaseException, error, error.__traceback__)

    async def _commit(self) -> None:
        """Commit and leave the block; roll back if the commit fails.

        Tortoise leaves a transaction open whose COMMIT failed, and on SQLite the next transaction
        would commit it.
        """
        if self.nested:
            async with self._closing(), self._one_by_one:
                await self._block.__aexit__(None, None, None)
        else:
            try:
                await self._refuse_if_failed()
                self._effects = await Ending.of(self._opened).settle()
            except BaseException as error:
                # The error of the COMMIT is the one to raise; on a lost connection a rollback
                # fails, too.
                with suppress(Exception):
                    await self._roll_back(error)
                raise
            # Before the block is left: to give the connection back may fail, and the change stays.
            self.committed = True
            call_logged(self._apply)
            # The commit has finalised the transaction, so this only gives its connection back.
            await self._block.__aexit__(None, None, None)
        self.committed = True

    def _closing(self) -> AbstractAsyncContextManager[None]:
        return self._level.closing() if self._level is not None else nullcontext()

    async def _refuse_if_failed(self) -> None:
        """Raise if a statement failed, its error was swallowed, and COMMIT would not say so."""
        try:
            await dialect_of(self._opened).refuse_if_failed(self._opened)
        except TransactionManagementError as error:
            # Of its own type it would make Tortoise leave the transaction open.
            raise OperationalError("A statement failed in this transaction") from error


def _statements_of(savepoint: Any) -> asyncio.Lock:  # noqa: ANN401 - a block of Tortoise
    """Return the lock of the transaction around *savepoint*, in which one statement runs at a time.

    Tortoise gives each savepoint a lock of its own, and sends SAVEPOINT, RELEASE and ROLLBACK TO
    without any. asyncpg refuses what comes while another statement runs.
    """
    client: Any = savepoint.client
    around: Any = outermost(client)
    client._lock = around._lock
    lock: asyncio.Lock = around._lock
    return lock


async def _enter(
    block: TransactionContext, one_by_one: AbstractAsyncContextManager[object]
) -> TransactionalDBClient:
    """Enter *block*; if that fails half-way, give back what it had taken, which Tortoise does not."""
    try:
        async with one_by_one:
            return await block.__aenter__()
    except Exception as error:
        client = getattr(block, "client", None) or getattr(block, "connection", None)
        holds_lock = hasattr(block, "_trxlock")
        holds_connection = getattr(client, "_connection", None) is not None
        nested = isinstance(block, NestedTransactionContext)
        if client is not None and not nested and (holds_lock or holds_connection):
            client._finalized = True  # nothing to roll back
            if not hasattr(block, "token"):
                block.token = None  # type: ignore[attr-defined]
            await block.__aexit__(type(error), error, error.__traceback__)
        raise


async def _uninterrupted(ending: Awaitable[ReturnT], context: contextvars.Context) -> ReturnT:
    """Await *ending* to its end, even if cancelled meanwhile; raise the cancellation after."""
    task = asyncio.get_running_loop().create_task(_as_coroutine(ending), context=context)
    await wait_uncancelled(task)
    return task.result()


def _spawn(work: Coroutine[Any, Any, None], context: contextvars.Context) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work, context=context)
    _background.add(task)  # the loop itself keeps only weak references
    task.add_done_callback(_background.discard)
    return task


async def _as_coroutine(awaitable: Awaitable[ReturnT]) -> ReturnT:
    return await awaitable
