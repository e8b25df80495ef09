"""Transactions that survive cancellation, and what is to happen when they commit.

Tortoise 1.1 has three traps: cancelling ``in_transaction().__aenter__`` leaks the connection (on
SQLite it leaves a lock that blocks the process for ever), a task started inside a transaction
keeps the dead connection, and a second connection inside a transaction deadlocks.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
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

logger = logging.getLogger("tortoise_auth.database")


ReturnT = TypeVar("ReturnT")


_background: set[asyncio.Task[Any]] = set()


class transaction:
    """A transaction on a connection, or a savepoint if it is in one, safe under cancellation.

    Cancelled while it opens or runs, the transaction is rolled back and its connection returned.
    Cancelled while it commits, the commit is awaited, and the cancellation raised afterwards.

    Example::

        async with transaction(connection_for(User)) as connection:
            await User.create(..., using_db=connection)

    Attributes:
        nested: It is a savepoint in a transaction of the caller.
        committed: The block has ended and its changes are kept (a savepoint's: as far as the
            caller's transaction keeps them). Also true when a cancellation was raised afterwards.
    """

    def __init__(self, connection: BaseDBAsyncClient) -> None:
        self.nested = isinstance(connection, TransactionalDBClient)
        self.committed = False
        self._block = connection._in_transaction()
        self._name = connection.connection_name
        # Tortoise restores the current connection when a block ends, and can only do so in the
        # context in which the block began; so both ends run in a context of their own.
        self._context = contextvars.copy_context()

    async def __aenter__(self) -> TransactionalDBClient:
        self._opened = await _open(self._block, self._context, wait_even_if_cancelled=self.nested)
        # A savepoint is never made current by Tortoise either: it is the same connection.
        self._token = None if self.nested else get_connections().set(self._name, self._opened)
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
        finally:
            self._opened._finalized = True  # Tortoise forgets to say so when the ending fails
            get_connections().reset(self._token)

    async def _roll_back(self, error: BaseException) -> None:
        # Not the type of the error: after its own ones Tortoise leaves the transaction open.
        await self._block.__aexit__(BaseException, error, error.__traceback__)

    async def _commit(self) -> None:
        """Commit and leave the block; roll back if the commit fails.

        Tortoise leaves a transaction open whose COMMIT failed, and on SQLite the next transaction
        would commit it.
        """
        if not self.nested:
            try:
                await self._refuse_if_failed()
                await self._opened.commit()
            except BaseException as error:
                with suppress(Exception):
                    await self._roll_back(error)
                raise
            self.committed = True
        await self._block.__aexit__(None, None, None)
        self.committed = True

    async def _refuse_if_failed(self) -> None:
        """Raise if a statement failed and somebody passed over it.

        PostgreSQL rolls such a transaction back at its COMMIT, and does not say so.
        """
        if self._opened.capabilities.dialect == "postgres":
            try:
                await self._opened.execute_script("SELECT 1")
            except TransactionManagementError as error:
                # Of its own type it would make Tortoise leave the transaction open.
                raise OperationalError("A statement failed in this transaction") from error


def when_committed(connection: BaseDBAsyncClient, act: Callable[[], object]) -> None:
    """Call *act* once the outermost transaction around *connection* has committed; now if there is none.

    A kick, not a proof: a savepoint in between may have been rolled back, and PostgreSQL answers a
    COMMIT of a failed transaction without an error. Whoever is kicked looks at what is there.
    Never called after a rollback. What *act* raises is logged: the transaction is committed, and
    whoever commits it must not be told otherwise.
    """
    outermost = connection
    while isinstance(outermost, TransactionalDBClient) and isinstance(
        outermost._parent, TransactionalDBClient
    ):
        outermost = outermost._parent
    if not isinstance(outermost, TransactionalDBClient) or outermost._finalized:
        act()
        return
    commit = outermost.commit
    if not isinstance(commit, _CommitAndAct):
        commit = outermost.commit = _CommitAndAct(commit)  # type: ignore[method-assign]
    commit.acts.append(act)


class _CommitAndAct:
    """The commit of one transaction, and what follows it, however much that is."""

    def __init__(self, commit: Callable[[], Awaitable[None]]) -> None:
        self._commit = commit
        self.acts: list[Callable[[], object]] = []

    async def __call__(self) -> None:
        await self._commit()
        acts, self.acts = self.acts, []
        for act in acts:
            try:
                act()
            except Exception:
                logger.exception("What was to follow a commit failed")


async def _open(
    block: TransactionContext, context: contextvars.Context, *, wait_even_if_cancelled: bool
) -> TransactionalDBClient:
    entering = asyncio.get_running_loop().create_task(_enter(block), context=context)
    try:
        return await asyncio.shield(entering)
    except asyncio.CancelledError as cancelled:
        if entering.cancelled():
            raise
        undoing = _spawn(_undo_open(entering, block, cancelled), context)
        if wait_even_if_cancelled:
            # On the caller's own connection: it must be quiet before the caller goes on with it.
            await wait_uncancelled(undoing)
        raise


async def _enter(block: TransactionContext) -> TransactionalDBClient:
    """Enter *block*; if that fails half-way, give back what it had taken, which Tortoise does not."""
    try:
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


async def _undo_open(
    entering: asyncio.Task[TransactionalDBClient],
    block: TransactionContext,
    cancelled: asyncio.CancelledError,
) -> None:
    await asyncio.wait([entering])
    if entering.cancelled() or entering.exception() is not None:
        return
    await block.__aexit__(type(cancelled), cancelled, None)


async def _uninterrupted(ending: Awaitable[ReturnT], context: contextvars.Context) -> ReturnT:
    """Await *ending* to its end, even if cancelled meanwhile; raise the cancellation after."""
    task = asyncio.get_running_loop().create_task(_as_coroutine(ending), context=context)
    await wait_uncancelled(task)
    return task.result()


async def wait_uncancelled(task: asyncio.Task[Any]) -> None:
    """Wait until *task* is done, even if cancelled meanwhile; raise the cancellation after."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled


def _spawn(work: Coroutine[Any, Any, None], context: contextvars.Context) -> asyncio.Task[None]:
    task = asyncio.get_running_loop().create_task(work, context=context)
    _background.add(task)  # the loop itself keeps only weak references
    task.add_done_callback(_background.discard)
    return task


async def _as_coroutine(awaitable: Awaitable[ReturnT]) -> ReturnT:
    return await awaitable
