"""What follows the commit of a transaction, our own or the host's.

Tortoise has no hook for a commit (https://github.com/tortoise/tortoise-orm/issues/1317; delete
the hooks of `Ending` when it has one). The end of the outermost transaction is replaced on its instance. Which
callbacks belong to savepoints that were rolled back is read from the database: each callback sets a
mark (see `set_mark`), which a savepoint passes up when it is released and drops when it is rolled
back. So savepoints of the host count, too, which Tortoise does not show.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import anyio
import anyio.lowlevel
from tortoise.backends.base.client import BaseDBAsyncClient, TransactionalDBClient

from tortoise_auth.database.dialects import dialect_of
from tortoise_auth.database.wrappers import (
    ENDS,
    context_outside_transactions,
    is_transaction,
    open_transactions,
    outermost,
)
from tortoise_auth.legible import logger_of

logger = logger_of("tortoise_auth.database")

ReturnT = TypeVar("ReturnT")

_ENDING = "_tortoise_auth_ending"
_marks = itertools.cycle(range(1, 1 << 31))  # SQLite has 32 bits for them


class CommitEffect(Protocol):
    """What follows the outermost commit. Nothing of it is called after a rollback."""

    @property
    def awaited(self) -> bool:
        """Whether `deliver` is to be awaited as part of the commit; else `deliver_detached` is called."""
        ...

    def apply(self) -> None:
        """Called at once, before the `deliver` of any effect."""
        ...

    async def deliver(self) -> None:
        """Called outside the transaction. If it is cancelled it must see to the rest itself."""
        ...

    def deliver_detached(self) -> None:
        """Called in place of `deliver` if nothing is awaited, or the committing task is cancelled."""
        ...


async def on_commit(connection: BaseDBAsyncClient, callback: Callable[[], object]) -> None:
    """Call *callback* when the outermost transaction around *connection* has committed.

    It belongs to the innermost open savepoint and is dropped with that. Without a transaction it is
    called now. What it raises is logged: the transaction is committed, and that must not look
    otherwise.
    """
    await attach(connection, _Callback(callback))


async def unless_kept(
    connection: BaseDBAsyncClient, recover: Callable[[BaseDBAsyncClient], Awaitable[object]]
) -> None:
    """Await *recover* at the end of the transaction if what was written in it is not kept.

    It gets the connection of the transaction that has ended, before another one can begin on it
    where there is only one (SQLite). Without a transaction it is never called.
    """
    if isinstance(connection, TransactionalDBClient) and is_transaction(connection):
        ending, kept = Ending.of(connection), _Callback(lambda: None)
        # Before the wait: a registration that is cancelled counts as not kept, and the write is
        # repeated.
        ending.recoveries[kept] = recover
        await ending.register(connection, kept)


async def attach(connection: BaseDBAsyncClient, effect: CommitEffect) -> None:
    """Let *effect* follow the outermost commit; see `on_commit`."""
    if isinstance(connection, TransactionalDBClient) and is_transaction(connection):
        await Ending.of(connection).register(connection, effect)
    else:
        _apply([effect])
        await deliver(deque([effect]))


async def pending_effects(*, take: bool) -> list[CommitEffect]:
    """Return what follows the commits of the transactions that are open here, as things stand.

    For tests. With *take* the commits are not followed by it any more.
    """
    pending: list[CommitEffect] = []
    for transaction in open_transactions():
        ending = Ending.of(transaction)
        pending += await ending.surviving()
        if take:
            ending.take()
    return pending


class _Callback:
    awaited = False

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = callback

    def apply(self) -> None:
        """Call the function."""
        self._callback()

    async def deliver(self) -> None:
        """Nothing more."""

    def deliver_detached(self) -> None:
        """Nothing more."""


class Level:
    """A transaction or a savepoint of ours, in which one savepoint at a time is open.

    Savepoints of one connection that overlap undo each other's work
    (https://github.com/tortoise/tortoise-orm/issues/1861). A task that works inside a savepoint
    waits for its siblings there, not for the savepoint around them.
    """

    def __init__(self, outer: Level | None = None) -> None:
        self._outer = outer
        self._root: Level = self if outer is None else outer._root
        self._around = _level.get()  # of whichever transaction
        self.turn = asyncio.Lock()
        self.open = True

    @asynccontextmanager
    async def closing(self) -> AsyncIterator[None]:
        """Wait until no savepoint is open in it, and let no other one be opened.

        Code in such a savepoint that ends the transaction around it does not wait for itself.
        """
        inner = _innermost(self._root)
        while inner is not None and inner._outer is not self:
            inner = inner._outer
        async with nullcontext() if inner is not None else self.turn:
            self.open = False
            yield

    @staticmethod
    async def enter(transaction: Level) -> Level | None:
        """Wait for the turn, then return the level of a savepoint; ``None`` if the transaction ended."""
        while transaction.open:
            outer = _innermost(transaction) or transaction
            await outer.turn.acquire()
            if outer.open:  # it may have ended while this task waited
                level = Level(outer)
                _level.set(level)
                return level
            outer.turn.release()
        return None

    def leave(self) -> None:
        """Give the turn to the next one."""
        self.open = False
        if self._outer is not None:
            self._outer.turn.release()
        _level.set(self._around)


def _innermost(transaction: Level) -> Level | None:
    """Return the innermost open savepoint in *transaction* around the code that is running."""
    level = _level.get()
    # A task that was started in a savepoint keeps this variable when the savepoint is over, so
    # levels that have ended are skipped.
    while level is not None and not (level.open and level._root is transaction):
        level = level._around
    return level


_level: ContextVar[Level | None] = ContextVar("tortoise_auth_savepoint", default=None)


class Ending:
    """The end of one outermost transaction, and what is to follow its commit."""

    def __init__(self, transaction: TransactionalDBClient) -> None:
        self.level = Level()
        self._dialect = dialect_of(transaction)
        self._dialect.guard(transaction)
        self._transaction: Any = transaction  # with the attributes that its dialects have
        self._commit, self._rollback = transaction.commit, transaction.rollback
        # Numbers must reach the database in the order in which they are drawn: `_up_to` relies on
        # it.
        self._registering = asyncio.Lock()
        self._waiting: list[tuple[int, CommitEffect | None]] = []
        self.recoveries: dict[CommitEffect, Callable[[BaseDBAsyncClient], Awaitable[object]]] = {}
        transaction.commit, transaction.rollback = self.commit, self.rollback  # type: ignore[method-assign]
        setattr(transaction, _ENDING, self)

    @classmethod
    def of(cls, transaction: TransactionalDBClient) -> Ending:
        """Return the one of the transaction around *transaction*."""
        around = outermost(transaction)
        ending: Ending | None = getattr(around, _ENDING, None)
        return ending or cls(around)

    async def register(self, connection: TransactionalDBClient, effect: CommitEffect) -> None:
        """Let *effect* follow the commit if what is open now is kept."""
        async with self._registering:
            mark = next(_marks)
            before = [*self._waiting]
            self._waiting.append((mark, None))  # cancelled now, it may have been set or not
            last = await self._dialect.set_mark(connection, mark)
            # The new mark hides a rollback that came before it, so what that dropped goes now.
            self._waiting = [*_up_to(last, before), (mark, effect)]

    async def surviving(self) -> list[CommitEffect]:
        """Return what would follow a commit now.

        Raises:
            TransactionManagementError: Nothing would: the transaction has failed.
        """
        async with self._registering:
            if self._waiting:
                self._waiting = _up_to(
                    await self._dialect.mark_of(self._transaction), self._waiting
                )
        return [effect for _, effect in self._waiting if effect is not None]

    def take(self) -> None:
        """Forget what waits: it was delivered by other means."""
        self._waiting = []

    async def commit(self) -> None:
        """Commit, then do what follows, awaited; in place of the transaction's own method."""
        if self._is_quiet():
            async with self._last_turn():
                return await self._commit()
        settling = asyncio.ensure_future(self.settle())
        try:
            await wait_uncancelled(settling)
        except asyncio.CancelledError:
            # It is committed, so the events are true: what follows runs without the caller.
            if settling.exception() is None:
                hand_over(settling.result())
            raise
        effects = settling.result()
        try:
            if any(effect.awaited for effect in effects):
                async with _given_back(self._transaction):
                    await deliver(effects)
        finally:
            hand_over(effects)

    async def settle(self) -> deque[CommitEffect]:
        """Commit, apply what waits, and return it: it is to be delivered.

        PostgreSQL answers the COMMIT of a failed transaction with a rollback and no error, so the
        transaction is asked before. SQLite commits nothing if it rolled back by itself.
        """
        async with self._last_turn():
            effects: list[CommitEffect] = []
            with suppress(Exception):  # COMMIT fails or rolls back, too, and that counts
                effects = await self.surviving()
                # What a savepoint dropped is written again in the transaction, and commits with it.
                await self._recover(kept=effects)
            # Tortoise sends COMMIT without this lock, and asyncpg refuses it while a statement of
            # another task runs ("another operation is in progress").
            async with self._transaction._lock:
                await self._commit()
        self.take()
        self.recoveries = {}
        _apply(effects)
        return deque(effects)

    async def rollback(self) -> None:
        """Roll back, and drop what waits; in place of the transaction's own method."""
        self.take()
        if self._is_quiet():
            async with self._last_turn():
                return await self._rollback()
        await wait_for(self._roll_back())

    async def _roll_back(self) -> None:
        async with self._last_turn():
            async with self._transaction._lock:
                await self._rollback()
            # Within the turn: the block gives the lock of SQLite back after it, and the next
            # transaction must see the count.
            await self._recover(kept=())

    async def _recover(self, *, kept: Sequence[CommitEffect]) -> None:
        for effect, recover in self.recoveries.items():
            if effect not in kept:
                try:
                    await recover(self._transaction)
                except Exception:
                    logger.exception("What follows a rollback failed")

    def _is_quiet(self) -> bool:
        """Return whether nothing waits for the end and no other task uses the transaction.

        Then it ends as Tortoise ends it, cancellation included.
        """
        busy = self._waiting or self.recoveries
        return not (busy or self.level.turn.locked() or self._transaction._lock.locked())

    @asynccontextmanager
    async def _last_turn(self) -> AsyncIterator[None]:
        """Wait for units of work of other tasks, and let none begin: they use the database itself."""
        async with self.level.closing():
            setattr(self._transaction, ENDS, True)
            try:
                yield
            except BaseException:
                setattr(self._transaction, ENDS, False)  # it may be tried again
                self.level.open = True
                raise


def watch(connection: BaseDBAsyncClient) -> None:
    """Let every transaction that begins on *connection* from now on have an `Ending`.

    Else a task that was started in a transaction and works on while that ends would not notice.
    """
    if isinstance(connection, TransactionalDBClient) or "_in_transaction" in vars(connection):
        return
    begin = connection._in_transaction

    def begin_watched() -> Any:  # noqa: ANN401 - Tortoise's contexts have no attribute in common
        block: Any = begin()
        # Tortoise's block for SQLite calls its transaction `connection`, those with a pool
        # `client`.
        Ending.of(getattr(block, "client", None) or block.connection)
        return block

    connection._in_transaction = begin_watched  # type: ignore[method-assign]


async def deliver(effects: deque[CommitEffect]) -> None:
    """Deliver one after the other, in the caller's context without transactions that have ended.

    Not without others, of another database: they are waited for, and so may not wait for those.
    What they raise is logged.
    """
    if not any(effect.awaited for effect in effects):
        return hand_over(effects)
    delivering = asyncio.get_running_loop().create_task(
        _deliver(effects), context=context_outside_transactions(still_open=True)
    )
    try:
        await delivering
    finally:
        hand_over(effects)


def hand_over(effects: deque[CommitEffect]) -> None:
    """Do the same without waiting, for effects whose delivery has not begun."""
    while effects:
        call_logged(effects.popleft().deliver_detached)


async def _deliver(effects: deque[CommitEffect]) -> None:
    while effects:
        effect = effects.popleft()
        try:
            await effect.deliver()
        except Exception:
            logger.exception("What follows a commit failed")


def _apply(effects: Sequence[CommitEffect]) -> None:
    for effect in effects:
        call_logged(effect.apply)


def call_logged(callback: Callable[[], object]) -> None:
    """Call *callback* after a commit: what it raises is logged and goes no further."""
    try:
        callback()
    except Exception:
        logger.exception("What follows a commit failed")


def _up_to(
    mark: int | None, waiting: list[tuple[int, CommitEffect | None]]
) -> list[tuple[int, CommitEffect | None]]:
    """Return what is kept: marks are set in order, so a rollback takes all after the last one."""
    marks = [each for each, _ in waiting]
    return waiting[: marks.index(mark) + 1] if mark in marks else []


@asynccontextmanager
async def _given_back(transaction: Any) -> AsyncIterator[None]:  # noqa: ANN401 - see `Ending`
    """Give back what the block of a committed transaction holds until it ends; then take it again.

    Handlers query the database, and must not wait for the block that waits for them: on SQLite for
    its lock, else for a connection of the pool, which may be the last one.
    """
    root = transaction._parent
    pool = getattr(root, "_pool", None)

    async def take_again() -> None:
        if pool is None:
            await root._lock.acquire()
            return
        try:
            transaction._connection = await pool.acquire()
        except Exception:  # noqa: BLE001 - it was committed, so the block must end without an error
            transaction._parent = copy.copy(root)  # with nothing to give back
            transaction._parent._pool = None

    try:
        if pool is None:
            root._lock.release()
        else:
            await wait_for(pool.release(transaction._connection))
        yield
    finally:
        await wait_for(take_again())


async def wait_for(work: Awaitable[ReturnT]) -> ReturnT:
    """Await *work* in a task to its end, even if cancelled meanwhile; raise the cancellation after."""
    task = asyncio.ensure_future(_as_coroutine(work))
    await wait_uncancelled(task)
    return task.result()


async def wait_uncancelled(task: asyncio.Task[Any]) -> None:
    """Wait until *task* is done, even if cancelled meanwhile; raise the cancellation after.

    A cancelled scope of AnyIO, which Starlette and FastAPI use, cancels in each round of the event
    loop until its tasks have left it: 370 000 times in three seconds. A shielded scope keeps it
    waiting, so that it cancels once, after.
    """
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    try:
        await anyio.lowlevel.checkpoint_if_cancelled()
    except asyncio.CancelledError as error:
        cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            # Retrieved, or asyncio logs "exception was never retrieved" when the task is collected.
            task.exception()
        raise cancelled


async def _as_coroutine(awaitable: Awaitable[ReturnT]) -> ReturnT:
    return await awaitable
