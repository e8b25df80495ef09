"""The database layer: no cancellation, failure or finished transaction leaves anything behind."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import secrets
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import psycopg
import pytest
from tortoise import fields
from tortoise.backends.asyncpg.client import AsyncpgDBClient
from tortoise.backends.base.client import (
    BaseDBAsyncClient,
    NestedTransactionContext,
    TransactionalDBClient,
    TransactionContextPooled,
)
from tortoise.backends.sqlite.client import (
    SqliteClient,
    SqliteTransactionContext,
)
from tortoise.connection import ConnectionHandler, get_connections
from tortoise.context import TortoiseContext
from tortoise.exceptions import (
    DBConnectionError,
    IntegrityError,
    OperationalError,
    TransactionManagementError,
)
from tortoise.models import Model
from tortoise.transactions import in_transaction

from tests.support.app import AuditRow, User
from tests.support.concurrency import Steps, Work, settled
from tests.support.database import (
    ON_POSTGRES,
    SERVERS,
    SHARED_DATABASES,
    connection_of,
    database,
    kind_of,
    transaction_class,
    until_idle,
)
from tests.support.services import needs_postgres
from tortoise_auth.database import (
    Listener,
    batches,
    connection_for,
    context_outside_transactions,
    current_connection,
    in_caller_transaction,
    is_transaction,
    notify,
    on_commit,
    root_of,
    transaction,
    translates_database_errors,
)
from tortoise_auth.database.dialects import listening as listening_module
from tortoise_auth.exceptions import (
    AuthenticationError,
    ConfigurationError,
    ServiceUnavailableError,
)
from tortoise_auth.models import Session


class Unregistered(Model):
    """A model that no test registers with Tortoise."""

    id = fields.IntField(primary_key=True)


@pytest.fixture(params=SHARED_DATABASES)
async def root(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BaseDBAsyncClient]:
    """Each database with a single connection, so that a leaked connection fails the test."""
    async with database(request.param, tmp_path, maxsize=1) as context:
        yield context.connections.get(request.param)


@pytest.fixture
async def sqlite_root(sqlite: TortoiseContext) -> BaseDBAsyncClient:
    return sqlite.connections.get("memory")


async def write(connection: BaseDBAsyncClient, *names: str) -> None:
    for name in names:
        await AuditRow.create(event=name, using_db=connection)


async def rows(connection: BaseDBAsyncClient) -> list[str]:
    entries = await AuditRow.all().using_db(connection).order_by("id")
    return [row.event for row in entries]


async def expect_idle(root: BaseDBAsyncClient) -> None:
    """Fail if a connection is out, a lock is held, or a transaction is open or current."""
    await settled()
    if isinstance(root, SqliteClient):
        assert not root._lock.locked()
        assert root._connection is None or not root._connection.in_transaction
    else:
        await until_idle(root._pool)
    assert connection_for(AuditRow) is root
    assert not in_caller_transaction()


async def expect_nothing_left(root: BaseDBAsyncClient) -> None:
    """Fail if earlier transactions have left anything behind, or another one does not work."""
    await expect_idle(root)
    before = await rows(root)
    async with asyncio.timeout(30), transaction(root) as connection:
        await write(connection, "probe")
    assert await rows(root) == [*before, "probe"]
    await AuditRow.filter(event="probe").using_db(root).delete()


async def cancelled_everywhere(
    work: Work,
    check: Callable[[asyncio.Task[Any]], Awaitable[object]],
    *,
    stubbornly: bool = False,
) -> tuple[int, int]:
    """Cancel *work* at each of its steps in turn, and *check* what is left each time.

    Returns:
        How many steps there were, and at how many of them the work was cut short.
    """
    cut_short = 0
    for step in itertools.count(1):
        steps = Steps(cancel_at=step, stubbornly=stubbornly)
        task = await steps.run(work)
        await check(task)
        if steps.taken < step:
            assert not task.cancelled()
            return steps.taken, cut_short
        cut_short += task.cancelled()
    raise AssertionError


class TestTransaction:
    async def test_commit(self, root: BaseDBAsyncClient) -> None:
        """What was written is there after the block, and the connection is back."""
        block = transaction(root)
        async with block as connection:
            assert connection_for(AuditRow) is connection
            assert not block.committed
            await write(connection, "a", "b")
        assert block.committed
        assert await rows(root) == ["a", "b"]
        await expect_nothing_left(root)

    async def test_current_connection(self, root: BaseDBAsyncClient) -> None:
        """Inside the block the models use the transaction by default."""
        async with transaction(root):
            await AuditRow.create(event="a")
            assert await AuditRow.all().count() == 1
        assert await AuditRow.all().count() == 1

    async def test_rollback(self, root: BaseDBAsyncClient) -> None:
        """An error in the block propagates unchanged, and its changes are rolled back."""
        error = LookupError("x")
        block = transaction(root)
        with pytest.raises(LookupError) as raised:
            async with block as connection:
                await write(connection, "a")
                raise error
        assert raised.value is error
        assert not block.committed
        assert await rows(root) == []
        await expect_nothing_left(root)

    @pytest.mark.parametrize("nested", [False, True])
    async def test_error_of_tortoise(self, root: BaseDBAsyncClient, nested: bool) -> None:
        """An error after which Tortoise itself does not roll back rolls back here."""
        async with transaction(root) as outer:
            await write(outer, "outer")
            if nested:
                with pytest.raises(TransactionManagementError):
                    async with transaction(outer) as inner:
                        await write(inner, "inner")
                        raise TransactionManagementError("x")
        if not nested:
            with pytest.raises(TransactionManagementError):
                async with transaction(root) as connection:
                    await write(connection, "inner")
                    raise TransactionManagementError("x")
        await expect_nothing_left(root)
        assert await rows(root) == ["outer"]

    async def test_savepoint(self, root: BaseDBAsyncClient) -> None:
        """A nested block is rolled back alone, and kept only if the outer one is."""
        with pytest.raises(LookupError):
            async with transaction(root) as outer:
                async with transaction(outer) as inner:
                    await write(inner, "lost with the outer one")
                raise LookupError
        async with transaction(root) as outer:
            await write(outer, "a")
            async with transaction(outer) as inner:
                await write(inner, "b")
            with pytest.raises(LookupError):
                async with transaction(outer) as inner:
                    await write(inner, "c")
                    async with transaction(inner) as innermost:
                        await write(innermost, "d")
                    raise LookupError
            with pytest.raises(IntegrityError):
                async with transaction(outer) as inner:
                    await AuditRow.create(id=1, event="e", using_db=inner)
                    await AuditRow.create(id=1, event="e", using_db=inner)
            await write(outer, "f")
        assert await rows(root) == ["a", "b", "f"]
        await expect_nothing_left(root)

    async def test_in_a_transaction_of_the_caller(self, root: BaseDBAsyncClient) -> None:
        """Inside a block of Tortoise ours is a savepoint."""
        async with in_transaction(root.connection_name) as outer:
            await AuditRow.create(event="a")
            assert connection_for(AuditRow) is outer
            block = transaction(connection_for(AuditRow))
            assert block.nested
            with pytest.raises(LookupError):
                async with block as inner:
                    await write(inner, "b")
                    raise LookupError
        assert await rows(root) == ["a"]
        await expect_nothing_left(root)

    async def test_one_after_the_other(self, root: BaseDBAsyncClient) -> None:
        """Many callers at once take turns on one connection."""

        async def add(name: str) -> None:
            async with transaction(root) as connection:
                await write(connection, name, name)

        await asyncio.gather(*(add(str(number)) for number in range(10)))
        entries = await rows(root)
        assert entries[::2] == entries[1::2]
        assert set(entries) == {str(number) for number in range(10)}
        await expect_nothing_left(root)


class TestCancellation:
    @pytest.mark.parametrize("stubbornly", [False, True], ids=["once", "again and again"])
    async def test_anywhere(self, root: BaseDBAsyncClient, stubbornly: bool) -> None:
        """Cancelled at any step, all changes or none are committed, and nothing is left behind."""
        states: list[bool] = []

        async def work() -> None:
            block = transaction(root)
            states.append(False)
            try:
                async with block as connection:
                    await write(connection, "a", "b")
            finally:
                states[-1] = block.committed

        async def check(task: asyncio.Task[Any]) -> None:
            await expect_nothing_left(root)
            written = await rows(root)
            assert written == (["a", "b"] if states and states[-1] else [])
            assert task.cancelled() or written
            await AuditRow.all().using_db(root).delete()
            states.clear()

        steps, cut_short = await cancelled_everywhere(work, check, stubbornly=stubbornly)
        assert min(steps, cut_short) >= 10  # a driver may need a step less in the last run

    async def test_anywhere_in_a_savepoint(self, root: BaseDBAsyncClient) -> None:
        """Cancelled at any step of a savepoint, the transaction around it can go on."""

        async def work() -> None:
            async with transaction(root) as outer:
                await write(outer, "before")
                with suppress(asyncio.CancelledError):
                    async with transaction(outer) as inner:
                        await write(inner, "a", "b")
                await write(outer, "after")

        async def check(task: asyncio.Task[Any]) -> None:
            await expect_nothing_left(root)
            assert await rows(root) in (
                [],
                ["before", "after"],
                ["before", "a", "b", "after"],
            )
            # Both drivers of MariaDB end the connection whose statement is cancelled.
            lost = not task.cancelled() and isinstance(task.exception(), TransactionManagementError)
            assert task.cancelled() or await rows(root) or (lost and on_mariadb)
            await AuditRow.all().using_db(root).delete()

        on_mariadb = root.connection_name == "mariadb"
        steps, cut_short = await cancelled_everywhere(work, check)
        assert min(steps, cut_short) >= 10  # a driver may need a step less in the last run

    async def test_anywhere_in_the_first_one(self, root: BaseDBAsyncClient) -> None:
        """Cancelled while it connects to the database, it leaves a working one to the next caller."""

        async def work() -> None:
            async with transaction(root) as connection:
                await connection.execute_query_dict("SELECT 1")

        async def check(task: asyncio.Task[Any]) -> None:
            await expect_idle(root)
            async with asyncio.timeout(30):
                await work()
            await expect_idle(root)
            await root.close()

        await root.close()
        steps, cut_short = await cancelled_everywhere(work, check)
        assert min(steps, cut_short) >= 10  # a driver may need a step less in the last run

    @pytest.mark.parametrize("steps", range(1, 6))
    async def test_in_the_queue(self, root: BaseDBAsyncClient, steps: int) -> None:
        """A caller that is cancelled while another holds the only connection does not wait for it."""
        entered, leave = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with transaction(root) as connection:
                entered.set()
                await leave.wait()
                await write(connection, "held")

        async def queue() -> None:
            async with transaction(root) as connection:
                await write(connection, "queued")

        holding = asyncio.create_task(hold())
        await entered.wait()
        queueing = asyncio.create_task(queue())
        for _ in range(steps):
            await asyncio.sleep(0)
        queueing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queueing
        assert not holding.done()
        leave.set()
        await holding
        await expect_nothing_left(root)
        assert await rows(root) == ["held"]

    async def test_while_it_commits(
        self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cancelled during the commit, the changes are committed, and then the caller is cancelled."""
        committing, go_on = asyncio.Event(), asyncio.Event()
        kind = transaction_class(root)
        commit = kind.commit

        async def slow_commit(connection: object) -> None:
            committing.set()
            await go_on.wait()
            await commit(connection)

        monkeypatch.setattr(kind, "commit", slow_commit)
        block = transaction(root)

        async def work() -> None:
            async with block as connection:
                await write(connection, "a")

        task = asyncio.create_task(work())
        await committing.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert block.committed
        await expect_nothing_left(root)
        assert await rows(root) == ["a"]

    @pytest.mark.parametrize("nested", [False, True])
    async def test_in_a_scope_that_cancels_in_each_round(
        self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch, nested: bool
    ) -> None:
        """A cancelled scope of AnyIO costs a few rounds of the loop, however long the commit takes."""
        loop: Any = asyncio.get_running_loop()
        rounds = 0

        def run_once(original: Callable[[], None] = loop._run_once) -> None:
            nonlocal rounds
            rounds += 1
            original()

        kind = transaction_class(root)
        commit = kind.commit

        async def slow_commit(connection: object) -> None:
            nonlocal rounds
            if not scope.cancel_called:
                scope.cancel()
                rounds = 0
                await asyncio.sleep(0.1)
                assert rounds < 100
            await commit(connection)

        monkeypatch.setattr(kind, "commit", slow_commit)
        block = transaction(root)

        async def work() -> None:
            async with block as connection:
                await write(connection, "a")

        monkeypatch.setattr(loop, "_run_once", run_once)
        with anyio.CancelScope() as scope:
            if nested:
                async with anyio.create_task_group() as group:
                    group.start_soon(work)
            else:
                await work()
            pytest.fail("the cancellation was lost")
        assert scope.cancelled_caught
        assert block.committed
        await expect_nothing_left(root)
        assert await rows(root) == ["a"]

    async def test_timeout(self, root: BaseDBAsyncClient) -> None:
        """A timeout around a block that waits for ever ends it."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), transaction(root) as connection:
                await write(connection, "a")
                await asyncio.Event().wait()
        await expect_nothing_left(root)
        assert await rows(root) == []


@contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch, root: BaseDBAsyncClient, method: str, error: Exception
) -> Iterator[None]:
    """Let *method* of every transaction on *root* raise *error*."""

    async def fail(self: object) -> None:
        raise error

    kind = transaction_class(root)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, fail)
        yield


class TestFailures:
    @pytest.mark.parametrize(
        "error", [OperationalError("x"), ConnectionResetError("x"), TransactionManagementError("x")]
    )
    async def test_begin(
        self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        """If BEGIN fails, the error propagates, and connection and lock are free."""
        with failing(monkeypatch, root, "begin", error), pytest.raises(type(error)) as raised:
            async with transaction(root):
                raise AssertionError("the block was entered")
        assert raised.value is error
        await expect_nothing_left(root)

    async def test_savepoint(
        self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If SAVEPOINT fails, the transaction around it is unchanged."""
        async with transaction(root) as outer:
            await write(outer, "a")
            with (
                failing(monkeypatch, root, "savepoint", OperationalError("x")),
                pytest.raises(OperationalError),
            ):
                async with transaction(outer):
                    raise AssertionError("the block was entered")
            await write(outer, "b")
        await expect_nothing_left(root)
        assert await rows(root) == ["a", "b"]

    async def test_commit_that_does_nothing(
        self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If COMMIT fails, its changes are rolled back, and no later commit includes them."""
        block = transaction(root)
        with failing(monkeypatch, root, "commit", OperationalError("x")):
            with pytest.raises(OperationalError):
                async with block as connection:
                    await write(connection, "a")
        assert not block.committed
        await expect_nothing_left(root)
        assert await rows(root) == []

    async def test_commit_that_the_database_refuses(self, root: BaseDBAsyncClient) -> None:
        """If a deferred constraint refuses the COMMIT, the changes are rolled back."""
        if root.connection_name == "mariadb":
            pytest.skip("no constraint is deferred there")
        await root.execute_script(
            "CREATE TABLE parent (id INT PRIMARY KEY);"
            "CREATE TABLE child (id INT REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED)"
        )
        block = transaction(root)
        refusals = (asyncpg.ForeignKeyViolationError, psycopg.errors.ForeignKeyViolation)
        with pytest.raises((sqlite3.IntegrityError, *refusals)):
            async with block as connection:
                await write(connection, "a")
                await connection.execute_query("INSERT INTO child VALUES (1)")
        assert not block.committed
        await expect_nothing_left(root)
        assert await rows(root) == []
        assert await root.execute_query_dict("SELECT * FROM child") == []

    @pytest.mark.parametrize("nested", [False, True])
    async def test_passed_over(self, root: BaseDBAsyncClient, nested: bool) -> None:
        """A block that ignores a failed statement is an error on PostgreSQL, not a commit."""

        async def pass_over(connection: BaseDBAsyncClient) -> None:
            await write(connection, "a")
            with suppress(IntegrityError, OperationalError):
                await connection.execute_query("INSERT INTO app_audit_row (id) VALUES (NULL)")

        block = transaction(root)
        keeps_on = root.connection_name not in ON_POSTGRES
        refused = (
            OperationalError,
            asyncpg.InFailedSQLTransactionError,
            psycopg.errors.InFailedSqlTransaction,
        )
        with nullcontext() if keeps_on else pytest.raises(refused):
            async with block as outer:
                if nested:
                    async with transaction(outer) as inner:
                        await pass_over(inner)
                else:
                    await pass_over(outer)
        assert block.committed == keeps_on
        await expect_nothing_left(root)
        assert await rows(root) == (["a"] if keeps_on else [])

    @needs_postgres
    async def test_after_the_commit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A failure after the commit is an error, and the changes stay committed."""
        async with database("postgres", tmp_path, maxsize=1) as context:
            root = context.connections.get("postgres")
            block = transaction(root)
            release = asyncpg.Pool.release

            async def release_and_fail(*args: Any, **kwargs: Any) -> None:
                await release(*args, **kwargs)
                raise ConnectionResetError("x")

            with monkeypatch.context() as patch, pytest.raises(ConnectionResetError):
                async with block as connection:
                    await write(connection, "a")
                    patch.setattr(asyncpg.Pool, "release", release_and_fail)
            assert block.committed
            await expect_nothing_left(root)
            assert await rows(root) == ["a"]

    async def test_rollback(self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
        """If ROLLBACK fails, too, the connection is released, and the transaction is not current."""
        started: list[asyncio.Task[BaseDBAsyncClient]] = []
        over = asyncio.Event()

        async def later() -> BaseDBAsyncClient:
            await over.wait()
            return connection_for(AuditRow)

        with failing(monkeypatch, root, "rollback", ConnectionResetError("x")):
            with pytest.raises(ConnectionResetError):
                async with transaction(root) as connection:
                    started.append(asyncio.create_task(later()))
                    await connection.execute_query_dict("SELECT 1")
                    raise LookupError
        over.set()
        assert await started[0] is root
        if isinstance(root, SqliteClient):
            assert root._connection is not None
            await root._connection.rollback()
        await expect_nothing_left(root)

    @needs_postgres
    async def test_connection_lost(self, tmp_path: Path) -> None:
        """A connection that the server ends is replaced, and the caller gets an error."""
        async with database("postgres", tmp_path, maxsize=1) as context:
            root = context.connections.get("postgres")
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
                async with transaction(root) as connection:
                    await write(connection, "a")
                    await connection.execute_query_dict(
                        "SELECT pg_terminate_backend(pg_backend_pid())"
                    )
            await expect_nothing_left(root)
            assert await rows(root) == []

    @needs_postgres
    async def test_no_server(self) -> None:
        """Where no server answers, opening fails, and the pool can be tried again."""
        async with TortoiseContext() as context:
            await context.init(
                db_url="postgres://postgres@127.0.0.1:1/test",
                modules={"models": ["tests.support.app"]},
            )
            root = next(iter(context.connections.all()))
            for _ in range(2):
                with pytest.raises(OSError):
                    async with transaction(root):
                        raise AssertionError("the block was entered")

    async def test_no_such_folder(self, tmp_path: Path) -> None:
        """An SQLite file that cannot be opened leaves no lock: each caller gets the error."""
        async with TortoiseContext() as context:
            await context.init(
                db_url=f"sqlite://{tmp_path}/missing/x.sqlite3",
                modules={"models": ["tests.support.app"]},
            )
            root = next(iter(context.connections.all()))
            before = set(threading.enumerate())
            for _ in range(2):
                with pytest.raises(sqlite3.OperationalError):
                    async with asyncio.timeout(30), transaction(root):
                        raise AssertionError("the block was entered")
            for thread in set(threading.enumerate()) - before:
                await asyncio.to_thread(thread.join, 30)


class TestConnectionFor:
    def test_no_database(self) -> None:
        """Without a context of Tortoise the error says what to call."""
        with pytest.raises(ConfigurationError) as refused:
            contextvars.Context().run(connection_for, User)
        assert "Tortoise.init" in str(refused.value)
        assert "RegisterTortoise" in str(refused.value)
        assert contextvars.Context().run(current_connection, User) is None
        assert contextvars.Context().run(in_caller_transaction) is False

    async def test_not_registered(self, sqlite_root: BaseDBAsyncClient) -> None:
        """A model that Tortoise does not know is named, with what to write where."""
        with pytest.raises(ConfigurationError) as refused:
            connection_for(Unregistered)
        assert "Unregistered is not registered" in str(refused.value)
        assert 'modules={"models": ["tests.database.test_database", ...]}' in str(refused.value)
        assert '"tortoise_auth.models"' in str(refused.value)
        assert refused.value.__cause__ is None
        assert current_connection(Unregistered) is None
        assert current_connection(AuditRow) is sqlite_root

    async def test_outside(self, root: BaseDBAsyncClient) -> None:
        """Outside a transaction the connection is the database."""
        assert connection_for(User) is connection_for(Session) is root

    async def test_task_that_outlives_a_transaction(self, root: BaseDBAsyncClient) -> None:
        """A task of a transaction that is over gets the database."""
        over = asyncio.Event()

        async def later() -> BaseDBAsyncClient:
            inside = connection_for(AuditRow)
            assert isinstance(inside, TransactionalDBClient)
            await over.wait()
            connection = connection_for(AuditRow)
            await write(connection, "later")
            return connection

        for end in (None, LookupError(), asyncio.CancelledError()):
            for begin in (
                lambda: transaction(root),
                lambda: in_transaction(root.connection_name),
            ):
                over.clear()
                with suppress(LookupError, asyncio.CancelledError):
                    async with begin() as outer, transaction(outer):
                        task = asyncio.create_task(later())
                        await asyncio.sleep(0)
                        if end is not None:
                            raise end
                over.set()
                assert await task is root
        assert await rows(root) == ["later"] * 6
        await expect_nothing_left(root)

    async def test_task_inside(self, root: BaseDBAsyncClient) -> None:
        """A task that is started in an open transaction belongs to it."""
        async with transaction(root) as connection:

            async def inside() -> None:
                assert connection_for(AuditRow) is connection
                await write(connection_for(AuditRow), "inside")

            await asyncio.create_task(inside())
        assert await rows(root) == ["inside"]


class TestWhenCommitted:
    async def test_outside(self, root: BaseDBAsyncClient) -> None:
        """Outside a transaction the act runs at once."""
        acted: list[str] = []
        await on_commit(root, lambda: acted.append("now"))
        assert acted == ["now"]

    @pytest.mark.parametrize("own", [True, False])
    async def test_outermost(self, root: BaseDBAsyncClient, own: bool) -> None:
        """Acts run after the outermost commit, in order, when the changes are committed."""
        acted: list[str] = []
        outer_block: Any = transaction(root) if own else in_transaction(root.connection_name)
        async with outer_block as outer:
            async with transaction(outer) as inner, transaction(inner) as innermost:
                await write(innermost, "a")
                await on_commit(innermost, lambda: acted.append("first"))
            await on_commit(outer, lambda: acted.append("second"))
            assert acted == []
        assert acted == ["first", "second"]
        assert await rows(root) == ["a"]
        await expect_nothing_left(root)

    async def test_any_number_of_acts(self, root: BaseDBAsyncClient) -> None:
        """A transaction may register thousands of acts."""
        acted: list[int] = []
        async with transaction(root) as connection:
            for number in range(5000):
                await on_commit(connection, partial(acted.append, number))
        assert acted == list(range(5000))
        await expect_nothing_left(root)

    async def test_failing_act(
        self, root: BaseDBAsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The error of an act does not reach the caller, and later acts run."""
        acted: list[str] = []

        def fail() -> None:
            raise LookupError("x")

        async with transaction(root) as connection:
            await write(connection, "a")
            await on_commit(connection, fail)
            await on_commit(connection, lambda: acted.append("y"))
        assert acted == ["y"]
        assert caplog.messages == ["What follows a commit failed"]
        assert await rows(root) == ["a"]

    async def test_rollback(self, root: BaseDBAsyncClient) -> None:
        """After a rollback the act does not run, nor with the next transaction."""
        acted: list[str] = []
        with pytest.raises(LookupError):
            async with transaction(root) as outer, transaction(outer) as inner:
                await on_commit(inner, lambda: acted.append("x"))
                raise LookupError
        await expect_nothing_left(root)
        assert acted == []

    async def test_failed_commit(
        self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After a failed commit the act does not run either."""
        acted: list[str] = []
        with failing(monkeypatch, root, "commit", OperationalError("x")):
            with pytest.raises(OperationalError):
                async with transaction(root) as connection:
                    await on_commit(connection, lambda: acted.append("x"))
        await expect_nothing_left(root)
        assert acted == []


request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id")


class TestContexts:
    async def test_outside_transactions(self, root: BaseDBAsyncClient) -> None:
        """A context for later work keeps the variables of the request, and no transaction."""
        request_id.set("r1")
        async with transaction(root) as outer, transaction(outer):
            context = context_outside_transactions()
            assert context.run(request_id.get) == "r1"
            assert context.run(connection_for, AuditRow) is root
            assert not context.run(in_caller_transaction)
            assert in_caller_transaction()
            assert connection_for(AuditRow) is outer
        await expect_nothing_left(root)

    def test_without_a_database(self) -> None:
        """Without a database the context is a plain copy."""

        def copied() -> str:
            request_id.set("r2")
            return context_outside_transactions().run(request_id.get)

        assert contextvars.Context().run(copied) == "r2"

    async def test_names(self, root: BaseDBAsyncClient) -> None:
        """The root is the same at any depth, and a transaction is current while it is open."""
        async with transaction(root) as outer, transaction(outer) as inner:
            assert root_of(inner) is root_of(outer) is root_of(root) is root
            assert [is_transaction(each) for each in (root, outer, inner)] == [False, True, True]
        assert [is_transaction(each) for each in (root, outer, inner)] == [False, False, False]


@pytest.fixture(params=[each for each in SERVERS if each.values[0] in ON_POSTGRES])
async def listening(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[TortoiseContext]:
    """PostgreSQL, by each driver."""
    async with database(request.param, tmp_path) as context:
        yield context


class TestNotify:
    async def test_wakes_after_the_commit(self, listening: TortoiseContext) -> None:
        """A listener is woken by a commit, and not by a rollback."""
        root = connection_of(listening)
        woken: asyncio.Queue[str] = asyncio.Queue()
        async with (
            Listener(root, "tests_one", lambda: woken.put_nowait("one")),
            Listener(root, "tests_two", lambda: woken.put_nowait("two")),
        ):
            with pytest.raises(LookupError):
                async with transaction(root) as connection:
                    await notify(connection, "tests_one")
                    raise LookupError
            async with transaction(root) as connection:
                await notify(connection, "tests_two")
                assert woken.empty()
            async with asyncio.timeout(30):
                assert await woken.get() == "two"
            assert woken.empty()

    async def test_listener_that_gets_no_connection(
        self,
        listening: TortoiseContext,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A listener without a connection polls, and the log gives the reason without the address."""
        root = connection_for(AuditRow)

        async def refuse(*_: object, **options: object) -> None:
            assert 5 in (options.get("timeout"), options.get("connect_timeout"))
            raise OSError(f"no route to {options['host']}")

        owner: Any = asyncpg if kind_of(listening) == "postgres" else psycopg.AsyncConnection
        monkeypatch.setattr(owner, "connect", refuse)
        async with Listener(root, "channel", lambda: None):
            pass
        assert caplog.messages == ["Cannot listen to channel (OSError)"]

    async def test_listener_that_loses_its_connection(
        self,
        listening: TortoiseContext,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A listener whose connection is ended says so once, and listens again when it can."""
        caplog.set_level(logging.INFO)
        root, woken = connection_for(AuditRow), asyncio.Event()
        owner: Any = asyncpg if kind_of(listening) == "postgres" else psycopg.AsyncConnection
        connect, refusals = owner.connect, iter([OSError("down"), OSError("down")])

        async def refuse_at_first(*args: Any, **options: Any) -> Any:
            for refusal in refusals:
                raise refusal
            return await connect(**options)

        monkeypatch.setattr(listening_module, "_pauses", lambda: itertools.repeat(0.01))
        channel = f"tests_lost_{secrets.token_hex(4)}"
        async with Listener(root, channel, woken.set):
            monkeypatch.setattr(owner, "connect", refuse_at_first)
            await root.execute_query_dict(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE query LIKE 'LISTEN%{channel}%'"
            )
            async with asyncio.timeout(30):
                await woken.wait()  # for what may have been notified meanwhile
                woken.clear()
                await notify(root, channel)
                await woken.wait()
        assert caplog.messages == [
            f"Lost the connection that listens to {channel}",
            f"Listening to {channel} again",
        ]
        assert caplog.records[0].levelname == "WARNING"

    def test_listener_backs_off(self) -> None:
        """While the database is down, the pauses between attempts grow to half a minute."""
        pauses = list(itertools.islice(listening_module._pauses(), 10))
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (0.1, 30.0)

    async def test_sqlite(self, sqlite_root: BaseDBAsyncClient) -> None:
        """On SQLite `notify` and `listen` do nothing."""
        async with Listener(sqlite_root, "tests", lambda: pytest.fail("woken")):
            await notify(sqlite_root, "tests")


class Store:
    """Methods like those of a service, with a database that fails on demand."""

    @translates_database_errors
    async def login(self, error: BaseException) -> None:
        """Raise *error*."""
        raise error

    @translates_database_errors
    async def outer(self, error: BaseException) -> None:
        """Call another such method."""
        await self.login(error)

    @translates_database_errors
    async def count(self, model: type[Model]) -> int:
        """Query the database."""
        return await model.all().count()

    @translates_database_errors
    async def add(self, *numbers: int, more: int = 0) -> int:
        """Need no database."""
        return sum(numbers) + more


SECRET_VALUE = "ada@example.com"
SQL = f"INSERT INTO app_user VALUES ('{SECRET_VALUE}')"


DATABASE_FAILURES: dict[str, tuple[Exception, str]] = {
    "Tortoise": (OperationalError(SQL), "OperationalError"),
    "SQLite in Tortoise": (OperationalError(sqlite3.OperationalError(SQL)), "OperationalError"),
    "asyncpg in Tortoise": (
        IntegrityError(asyncpg.UniqueViolationError(SQL)),
        "UniqueViolationError",
    ),
    "transaction": (TransactionManagementError(SQL), "TransactionManagementError"),
    "connection": (DBConnectionError(SQL), "DBConnectionError"),
    "locked": (sqlite3.OperationalError("database is locked"), "OperationalError"),
    "closed": (
        sqlite3.ProgrammingError("Cannot operate on a closed database."),
        "ProgrammingError",
    ),
    "malformed": (sqlite3.DatabaseError("malformed"), "DatabaseError"),
    "deadlock": (asyncpg.DeadlockDetectedError(SQL), "DeadlockDetectedError"),
    "serialization": (asyncpg.SerializationError(SQL), "SerializationError"),
    "too many": (asyncpg.TooManyConnectionsError(SQL), "TooManyConnectionsError"),
    "starting": (asyncpg.CannotConnectNowError(SQL), "CannotConnectNowError"),
    "asyncpg itself": (asyncpg.InterfaceError(SQL), "InterfaceError"),
    "inside asyncpg": (asyncpg.InternalClientError(SQL), "InternalClientError"),
    "system": (OSError(SQL), "OSError"),
    "refused": (ConnectionRefusedError(SQL), "ConnectionRefusedError"),
    "timeout": (TimeoutError(SQL), "TimeoutError"),
    "aiosqlite": (ValueError("no active connection"), "ValueError"),
    "aiosqlite closed": (ValueError("Connection closed"), "ValueError"),
}


class TestTranslatesDatabaseErrors:
    @pytest.mark.parametrize("what", DATABASE_FAILURES)
    async def test_database_failures(self, what: str) -> None:
        """Any failure of a database or driver is one error, without its text, values or cause."""
        error, kind = DATABASE_FAILURES[what]
        error.__cause__ = RuntimeError(SQL)
        with pytest.raises(ServiceUnavailableError) as raised:
            await Store().login(error)
        assert str(raised.value) == f"The database failed during login ({kind})"
        assert raised.value.__cause__ is None
        assert raised.value.__context__ is None

    @pytest.mark.parametrize(
        ("error", "cause"),
        [
            (ConnectionRefusedError(111, "Connect call failed"), "[Errno 111] Connect call failed"),
            (
                OperationalError(sqlite3.OperationalError("database is locked")),
                "database is locked",
            ),
            (OperationalError(asyncpg.AdminShutdownError("is\nstopped")), "is stopped"),
            (DBConnectionError(asyncpg.InvalidPasswordError("of role app")), "of role app"),
        ],
    )
    async def test_is_logged_with_its_cause(
        self, caplog: pytest.LogCaptureFixture, error: Exception, cause: str
    ) -> None:
        """An outage is one record at ERROR, with the cause on its line and the traceback below."""
        with pytest.raises(ServiceUnavailableError) as raised:
            await Store().outer(error)
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("tortoise_auth", "ERROR")
        assert record.getMessage() == f"{raised.value}: {cause}"
        assert "in login" in caplog.text
        assert "raise error" in caplog.text

    @pytest.mark.parametrize(
        "error",
        [
            IntegrityError(asyncpg.UniqueViolationError(SQL)),
            OperationalError(asyncpg.DataError(SQL)),
            OperationalError(SQL),
            asyncpg.InterfaceError(SQL),
        ],
    )
    async def test_log_has_no_value(
        self, caplog: pytest.LogCaptureFixture, error: Exception
    ) -> None:
        """The text of an error that may quote what is stored is not logged."""
        error.__cause__ = RuntimeError(SQL)
        with pytest.raises(ServiceUnavailableError):
            await Store().login(error)
        assert len(caplog.records) == 1
        assert type(error.args[0] if error.args[0] is not SQL else error).__name__ in caplog.text
        assert SECRET_VALUE not in caplog.text

    async def test_missing_table_is_not_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """What only a developer can mend is the error itself, and no outage."""
        with pytest.raises(ConfigurationError):
            await Store().login(OperationalError(sqlite3.OperationalError("no such table: x")))
        assert caplog.records == []

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("x"),
            RuntimeError("x"),
            TypeError("x"),
            AuthenticationError(),
            ConfigurationError("x"),
            asyncio.CancelledError(),
            KeyboardInterrupt(),
        ],
        ids=repr,
    )
    async def test_other_errors(self, error: BaseException) -> None:
        """Other errors propagate unchanged."""
        with pytest.raises(type(error)) as raised:
            await Store().login(error)
        assert raised.value is error

    async def test_no_error(self) -> None:
        """A method that succeeds returns its result, and keeps its name."""
        assert await Store().add(1, 2, more=3) == 6
        assert Store.add.__name__ == "add"
        assert Store.add.__doc__ == "Need no database."

    async def test_missing_table(self, root: BaseDBAsyncClient) -> None:
        """A missing table is a configuration error that says what to do."""
        await root.execute_script("DROP TABLE app_audit_row")
        with pytest.raises(ConfigurationError, match="Run your migrations") as raised:
            await Store().count(AuditRow)
        assert raised.value.__context__ is None
        assert "SELECT" not in str(raised.value)

    async def test_missing_column(self, root: BaseDBAsyncClient) -> None:
        """A missing column is a configuration error, too, for reading and for writing."""
        await root.execute_script("ALTER TABLE app_audit_row RENAME COLUMN subject TO topic")

        class Rows:
            @translates_database_errors
            async def read(self) -> None:
                await AuditRow.all()

            @translates_database_errors
            async def write(self) -> None:
                await AuditRow.create(event="a")

        with pytest.raises(ConfigurationError, match="Run your migrations"):
            await Rows().write()
        if not isinstance(root, SqliteClient):  # which takes an unknown column for text
            with pytest.raises(ConfigurationError, match="Run your migrations"):
                await Rows().read()

    async def test_closed_database(self, root: BaseDBAsyncClient) -> None:
        """A connection that was closed elsewhere is a failure of the database."""
        if isinstance(root, SqliteClient):
            assert root._connection is not None
            await root._connection.close()
        elif root.connection_name == "psycopg":
            await root._pool.close()
        else:
            root._pool.terminate()
        try:
            with pytest.raises(ServiceUnavailableError):
                await Store().count(AuditRow)
        finally:
            root._connection = None
            root._pool = None


class TestPrivateNames:
    """The undocumented parts of Tortoise that the library uses, so that a new version fails here."""

    def test_on_classes(self) -> None:
        """The private names exist."""
        assert callable(BaseDBAsyncClient._in_transaction)
        assert TransactionalDBClient._finalized is False
        assert callable(Model._choose_db)
        assert callable(Model._init_from_db)
        assert "_trxlock" in SqliteTransactionContext.__slots__
        assert "_trxlock" not in TransactionContextPooled.__slots__
        assert {"connection", "token"} <= set(SqliteTransactionContext.__slots__)
        assert {"client", "token"} <= set(TransactionContextPooled.__slots__)
        assert "client" in NestedTransactionContext.__slots__
        assert callable(ConnectionHandler._get_storage)
        assert AsyncpgDBClient.__module__ == "tortoise.backends.asyncpg.client"

    async def test_meta(self, sqlite_root: BaseDBAsyncClient) -> None:
        """The description of a model has the attributes that the joined read and the checks use."""
        meta = User._meta
        assert meta.default_connection == sqlite_root.connection_name
        assert Unregistered._meta.default_connection is None
        assert meta.db_table == "app_user"
        assert meta.schema in (None, "")
        assert meta.db_pk_column == "id"
        assert meta.pk is meta.fields_map["id"]
        assert meta.fields_db_projection["session_version"] == "session_version"
        assert set(meta.fields_db_projection) == set(meta.fields_map)
        assert type(meta.manager).__name__ == "Manager"

    async def test_transactions(self, root: BaseDBAsyncClient) -> None:
        """A transaction or savepoint has its parent, and whether it is over."""
        async with in_transaction(root.connection_name) as outer:
            assert isinstance(outer, TransactionalDBClient)
            assert (outer._parent, outer._finalized) == (root, False)
            assert connection_for(AuditRow) is outer
            block = outer._in_transaction()
            assert isinstance(block, NestedTransactionContext)
            assert block.client._parent is outer
            assert get_connections()._get_storage() == {root.connection_name: outer}
        assert outer._finalized
        assert not isinstance(root, TransactionalDBClient)

    async def test_ending_calls_commit(self, root: BaseDBAsyncClient) -> None:
        """A block ends by calling `commit` of its client, where a wrapper can be put."""
        called: list[str] = []
        async with in_transaction(root.connection_name) as outer:
            commit = outer.commit

            async def noting() -> None:
                called.append("commit")
                await commit()

            outer.commit = noting  # type: ignore[method-assign]
        assert called == ["commit"]

    async def test_block(self, root: BaseDBAsyncClient) -> None:
        """A block has its client, on SQLite its lock, and accepts None as its token."""
        block = root._in_transaction()
        client = getattr(block, "client", None) or getattr(block, "connection", None)
        assert isinstance(client, TransactionalDBClient)
        assert hasattr(block, "_trxlock") == isinstance(root, SqliteClient)
        assert not hasattr(block, "token")
        get_connections().reset(None)
        token = get_connections().set(root.connection_name, client)
        assert connection_for(AuditRow) is client
        get_connections().reset(token)
        assert connection_for(AuditRow) is root

    async def test_models_from_rows(self, sqlite_root: BaseDBAsyncClient) -> None:
        """A model is built from a row by column names, and a missing column is an error."""
        row = {"id": 5, "event": "a", "subject": "b", "at": "2026-01-01 12:00:00+00:00"}
        whole = AuditRow._init_from_db(**row)
        assert (whole.pk, whole.event, whole._partial, whole._saved_in_db) == (5, "a", False, True)
        assert whole.at is not None
        del row["event"]
        assert AuditRow._init_from_db(**row)._partial is True

    @needs_postgres
    async def test_listener(self, postgres: TortoiseContext) -> None:
        """The client for PostgreSQL has the parameters of a separate connection."""
        client: Any = postgres.connections.get("postgres")
        assert type(client) is AsyncpgDBClient
        for name in ("host", "port", "user", "password", "database", "extra"):
            assert hasattr(client, name)


class TestBatches:
    async def test_pause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After each batch the database is free for four times as long as the batch took."""
        times, pauses = iter([10.0, 10.5, 20.0, 20.25, 30.0]), []

        async def pause(seconds: float) -> None:
            pauses.append(seconds)

        class Loop:
            def time(self) -> float:
                return next(times)

        monkeypatch.setattr("tortoise_auth.database.pacing.asyncio.get_running_loop", Loop)
        monkeypatch.setattr("tortoise_auth.database.pacing.asyncio.sleep", pause)
        async with aclosing(batches()) as turns:
            for _ in range(3):
                await anext(turns)
        assert pauses == [2.0, 1.0]
