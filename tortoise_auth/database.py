"""The one module that knows how Tortoise really opens transactions.

Tortoise 1.1 has three traps: cancelling ``in_transaction().__aenter__`` leaks the connection (on
SQLite it leaves a lock that blocks the process for ever), a task started inside a transaction
keeps the dead connection, and a second connection inside a transaction deadlocks. What is private
in Tortoise is used here alone, and a canary test watches each name.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib
import logging
import re
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from tortoise.backends.base.client import (
    BaseDBAsyncClient,
    NestedTransactionContext,
    TransactionalDBClient,
    TransactionContext,
)
from tortoise.connection import get_connections
from tortoise.context import get_current_context
from tortoise.exceptions import (
    BaseORMException,
    IntegrityError,
    OperationalError,
    TransactionManagementError,
)
from tortoise.exceptions import ConfigurationError as TortoiseConfigurationError
from tortoise.models import Model

from tortoise_auth.exceptions import ConfigurationError, ServiceUnavailableError

logger = logging.getLogger("tortoise_auth.database")

P = ParamSpec("P")
ReturnT = TypeVar("ReturnT")
SelfT = TypeVar("SelfT")

_background: set[asyncio.Task[Any]] = set()


def connection_for(model: type[Model]) -> BaseDBAsyncClient:
    """Return the connection on which to read and write *model* now.

    Inside a transaction of the caller it is that transaction. In a task that was started inside a
    transaction which is over by now, it is the database itself and not the dead transaction.

    Raises:
        ConfigurationError: No database is set up, or the model is not registered.
    """
    if get_current_context() is None:
        raise ConfigurationError(
            "Tortoise ORM is not initialised here. Call `await Tortoise.init(...)` first; under a "
            "web server use tortoise.contrib.fastapi.RegisterTortoise, or pass "
            "`_enable_global_fallback=True`, because requests run in another context than the "
            "start-up code."
        )
    try:
        connection: BaseDBAsyncClient = model._choose_db(True)
    except TortoiseConfigurationError:
        raise ConfigurationError(_how_to_register(model)) from None
    while isinstance(connection, TransactionalDBClient) and connection._finalized:
        connection = connection._parent
    return connection


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


def guarded(
    method: Callable[Concatenate[SelfT, P], Awaitable[ReturnT]],
) -> Callable[Concatenate[SelfT, P], Coroutine[Any, Any, ReturnT]]:
    """Turn whatever the database or its driver raises into `ServiceUnavailableError`.

    A database that is down must never look like wrong credentials.
    """

    @functools.wraps(method)
    async def guarding(self: SelfT, /, *args: P.args, **kwargs: P.kwargs) -> ReturnT:
        try:
            return await method(self, *args, **kwargs)
        except Exception as error:
            if not is_database_failure(error):
                raise
            # Drivers put values into their messages; neither text nor cause may leave.
            failure = translated(error, method.__name__)
        raise failure

    return guarding


def translated(error: Exception, doing: str) -> Exception:
    """Return the error of ours for one of a database, without what that says of values."""
    if isinstance(error, TortoiseConfigurationError):
        return ConfigurationError(f"Tortoise ORM is not set up as it must be: {error}")
    if is_missing_table(error):
        return ConfigurationError(
            "A table or column of tortoise_auth, or of your user model, is missing. Run your "
            "migrations, or `await Tortoise.generate_schemas()` in a test."
        )
    kind = type(error.args[0] if error.args and isinstance(error.args[0], Exception) else error)
    return ServiceUnavailableError(
        f"The database failed during {doing.lstrip('_')} ({kind.__name__})"
    )


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
            await to_the_end(undoing)
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
    await to_the_end(task)
    return task.result()


async def to_the_end(task: asyncio.Task[Any]) -> None:
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


def is_database_failure(error: Exception) -> bool:
    """Tell whether it is the database, or its driver, that failed."""
    module = type(error).__module__.partition(".")[0]
    return (
        isinstance(error, BaseORMException | sqlite3.Error | OSError | TimeoutError)
        or module in {"asyncpg", "psycopg", "psycopg_pool", "asyncmy", "aiomysql", "pymysql"}
        or (
            isinstance(error, ValueError)
            and str(error) in {"no active connection", "Connection closed"}
        )
    )


def is_missing_table(error: Exception) -> bool:
    """Tell whether a table or column is missing."""
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    return getattr(cause, "sqlstate", None) in {"42P01", "42703"} or (
        isinstance(cause, sqlite3.OperationalError)
        and str(cause).startswith(("no such table", "no such column", "table "))
    )


def is_unique_violation(error: IntegrityError) -> bool:
    """Tell whether a row was refused because of another one with the same values."""
    cause = error.args[0] if error.args else None
    return getattr(cause, "sqlstate", None) == "23505" or "UNIQUE constraint" in str(cause)


def violated_columns(error: IntegrityError) -> frozenset[str]:
    """Return the columns whose values another row has; empty if the database does not tell.

    For an index on an expression it is every word of that.
    """
    cause = error.args[0] if error.args else None
    told = getattr(cause, "detail", None) or getattr(
        getattr(cause, "diag", None), "message_detail", None
    )
    if isinstance(told, str):  # in the language of the server: Key (tenant, lower(phone))=(7, ...)
        key = re.search(r"\((.+?)\)=", told)
        return frozenset(re.findall(r"\w+", key[1]) if key else ())
    _, _, names = str(cause).partition("UNIQUE constraint failed: ")
    return frozenset(name.rpartition(".")[2] for name in names.split(", ") if "." in name)


def _how_to_register(model: type[Model]) -> str:
    module = model.__module__
    return (
        f"{model.__name__} is not registered with Tortoise. Name its module in Tortoise.init: "
        f'modules={{"models": ["{module}", ...]}}. The tables of tortoise_auth are registered by '
        'the string "tortoise_auth.models" beside your own models, or as an app of their own: '
        'apps={..., "tortoise_auth": tortoise_auth.app_config()}.'
    )


def context_outside_transactions() -> contextvars.Context:
    """Return a copy of the current context in which no transaction of Tortoise is open.

    For work that outlives the transaction in which it was begun: request ids and the like are
    kept, the connection that will be dead by then is not.
    """
    context = contextvars.copy_context()
    if get_current_context() is None:
        return context
    connections = get_connections()
    for alias, connection in connections._get_storage().items():
        root = root_of(connection)
        if root is not connection:
            context.run(connections.set, alias, root)
    return context


def root_of(connection: BaseDBAsyncClient) -> BaseDBAsyncClient:
    """Return the database itself behind *connection*, be it a transaction or not."""
    while isinstance(connection, TransactionalDBClient):
        connection = connection._parent
    return connection


def is_transaction(connection: BaseDBAsyncClient) -> bool:
    """Tell whether *connection* is an open transaction."""
    return isinstance(connection, TransactionalDBClient) and not connection._finalized


def in_caller_transaction() -> bool:
    """Tell whether a transaction of Tortoise is open in this context."""
    if get_current_context() is None:
        return False
    return any(
        is_transaction(connection) for connection in get_connections()._get_storage().values()
    )


def current_connection(model: type[Model]) -> BaseDBAsyncClient | None:
    """Return the connection of *model*, or ``None`` where there is no database or it is not registered."""
    if get_current_context() is None or model._meta.default_connection is None:
        return None
    return connection_for(model)


async def run_statement(
    connection: BaseDBAsyncClient, statement: str, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Run a statement of PostgreSQL or SQLite with *values* for the names in its braces.

    Building SQL costs Tortoise more than running it.
    """
    numbered = connection.capabilities.dialect == "postgres"
    given: list[Any] = []
    placed: dict[str, str] = {}

    def place(name: re.Match[str]) -> str:
        if not numbered or name[1] not in placed:
            value = values[name[1]]
            several = value if isinstance(value, list) else [value]
            first = len(given) + 1
            given.extend(map(_in_utc, several))
            marks = [f"${first + at}" if numbered else "?" for at in range(len(several))]
            placed[name[1]] = ", ".join(marks)
        return placed[name[1]]

    return await connection.execute_query_dict(re.sub(r"\{(\w+)\}", place, statement), given)


def _in_utc(value: object) -> object:
    """Return a time in UTC, as columns hold it: SQLite compares the text."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value


async def notify(connection: BaseDBAsyncClient, channel: str) -> None:
    """Wake those who listen on *channel*, on PostgreSQL when the transaction commits."""
    if connection.capabilities.dialect == "postgres":
        await connection.execute_query_dict("SELECT pg_notify($1, '')", [channel])


class Listener:
    """Calls *wake* when somebody notifies *channel*, on PostgreSQL through asyncpg; else does nothing.

    A convenience that may fail: whoever uses it polls as well. It listens on a connection of its
    own, so that no pool is one short.
    """

    def __init__(
        self, connection: BaseDBAsyncClient, channel: str, wake: Callable[[], object]
    ) -> None:
        self._client = root_of(connection)
        self._channel = channel
        self._wake = wake
        self._listening: Any = None

    async def __aenter__(self) -> Listener:
        if type(self._client).__module__ == "tortoise.backends.asyncpg.client":
            try:
                await self._listen()
            except Exception as error:  # noqa: BLE001 - a convenience
                logger.warning("Cannot listen to %s (%s)", self._channel, type(error).__name__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._listening is not None:
            with suppress(Exception):
                await self._listening.close(timeout=2)

    async def _listen(self) -> None:
        client: Any = self._client
        self._listening = await importlib.import_module("asyncpg").connect(
            host=client.host,
            port=client.port,
            user=client.user,
            password=client.password,
            database=client.database,
            ssl=client.extra.get("ssl"),
            timeout=5,
        )
        await self._listening.add_listener(self._channel, lambda *_: self._wake())
