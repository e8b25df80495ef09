"""Commit effects: kept and dropped with their savepoints, whichever code opened them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.backends.sqlite.client import SqliteClient
from tortoise.context import TortoiseContext
from tortoise.exceptions import IntegrityError, OperationalError
from tortoise.transactions import in_transaction

from tests.support.app import AuditRow
from tests.support.concurrency import Cancelled, finished
from tests.support.database import (
    DATABASES,
    all_idle,
    assert_no_connection_is_held,
    database,
    transaction_class,
)
from tests.support.deliveries import Undo
from tests.support.services import needs_postgres
from tortoise_auth.database import (
    attach,
    connection_for,
    dialect_of,
    in_caller_transaction,
    on_commit,
    transaction,
    unless_kept,
)


@pytest.fixture(params=DATABASES)
async def context(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Each database with a single connection: holding it while handlers run is a deadlock."""
    async with database(request.param, tmp_path, maxsize=1) as opened:
        yield opened
        assert_no_connection_is_held(opened)


@pytest.fixture
def root(context: TortoiseContext) -> BaseDBAsyncClient:
    (connection,) = context.connections.all()
    assert connection_for(AuditRow) is connection
    return connection


class Handler:
    """A commit effect that queries the database, and records its calls."""

    awaited = True

    def __init__(self, name: str, noted: list[str]) -> None:
        self.name = name
        self.noted = noted

    def apply(self) -> None:
        """Record the call."""
        self.noted.append(f"{self.name} applied")

    async def deliver(self) -> None:
        """Write a row, outside of any transaction."""
        assert not in_caller_transaction()
        async with transaction(connection_for(AuditRow)) as own:
            await AuditRow.create(event=self.name, using_db=own)
        self.noted.append(f"{self.name} delivered")

    def deliver_detached(self) -> None:
        """Record the call."""
        self.noted.append(f"{self.name} handed over")


async def events() -> list[str]:
    return [row.event for row in await AuditRow.all().order_by("id")]


class TestSavepoints:
    """Each callback is kept or dropped with the rows that were written beside it."""

    @pytest.mark.parametrize("seed", range(12))
    async def test_any_nesting(self, root: BaseDBAsyncClient, seed: int) -> None:
        """In any nesting of blocks of Tortoise and ours, callbacks are kept exactly with their rows."""
        choose = random.Random(seed)
        numbers = itertools.count()
        called: list[str] = []

        async def some(connection: BaseDBAsyncClient, depth: int) -> None:
            for _ in range(choose.randint(1, 3)):
                if choose.random() < 0.5:
                    name = f"callback {next(numbers)}"
                    await AuditRow.create(event=name, using_db=connection)
                    await on_commit(connection, lambda name=name: called.append(name))  # type: ignore[misc]
                if depth:
                    begin: list[Callable[[], Any]] = [
                        lambda: in_transaction(root.connection_name),
                        lambda: connection._in_transaction(),
                        lambda: transaction(connection),
                    ]
                    with suppress(Undo):
                        async with choose.choice(begin)() as inner:
                            await some(inner, depth - 1)
                            if choose.random() < 0.4:
                                raise Undo

        for _ in range(4):
            begin: list[Callable[[], Any]] = [
                lambda: in_transaction(root.connection_name),
                lambda: transaction(root),
            ]
            with suppress(Undo):
                async with choose.choice(begin)() as outermost:
                    await some(outermost, 3)
                    before = list(called)
                    if choose.random() < 0.2:
                        raise Undo
            assert called[: len(before)] == before
            assert called == [each for each in await events() if each.startswith("callback")]

    async def test_opened_before_anything_of_ours(self, root: BaseDBAsyncClient) -> None:
        """A savepoint of the host counts though it is older than the first callback."""
        called: list[str] = []
        async with in_transaction(root.connection_name):
            with suppress(Undo):
                async with in_transaction(root.connection_name) as outer, outer._in_transaction():
                    await on_commit(connection_for(AuditRow), lambda: called.append("dropped"))
                    raise Undo
            async with in_transaction(root.connection_name):
                await on_commit(connection_for(AuditRow), lambda: called.append("kept"))
            assert called == []
        assert called == ["kept"]

    async def test_written_by_hand(self, root: BaseDBAsyncClient) -> None:
        """A savepoint in plain SQL counts like any other."""
        called: list[str] = []
        async with in_transaction(root.connection_name) as outer:
            await outer.execute_query("SAVEPOINT mine")
            await on_commit(outer, lambda: called.append("dropped"))
            await outer.execute_query("ROLLBACK TO SAVEPOINT mine")
            await on_commit(outer, lambda: called.append("kept"))
        assert called == ["kept"]

    async def test_marks_leave_nothing(self, root: BaseDBAsyncClient) -> None:
        """An earlier transaction of the same connection leaves no mark for the next."""
        called: list[str] = []
        for _ in range(3):
            async with in_transaction(root.connection_name) as outer:
                await on_commit(outer, lambda: called.append("kept"))
            with suppress(Undo):
                async with in_transaction(root.connection_name) as outer:
                    await on_commit(outer, lambda: called.append("dropped"))
                    raise Undo
        assert called == ["kept"] * 3

    async def test_registered_at_once(self, root: BaseDBAsyncClient) -> None:
        """Callbacks of many tasks of one transaction are all called."""
        called: list[int] = []
        async with in_transaction(root.connection_name) as outer:
            await asyncio.gather(
                *[on_commit(outer, lambda n=n: called.append(n)) for n in range(20)]  # type: ignore[misc]
            )
        assert sorted(called) == list(range(20))

    async def test_cancelled_registration(self, root: BaseDBAsyncClient) -> None:
        """A registration that is cancelled half-way drops no other."""
        for step in itertools.count(1):
            called: list[str] = []
            async with in_transaction(root.connection_name) as outer:
                await on_commit(outer, lambda: called.append("before"))  # noqa: B023
                attempt = Cancelled(on_commit(outer, lambda: called.append("cut")), step)  # noqa: B023
                await attempt.run()
                await on_commit(outer, lambda: called.append("after"))  # noqa: B023
            called = [each for each in called if each != "cut" or not attempt.reached]
            assert called == ["before", *["cut"] * (not attempt.reached), "after"]
            if not attempt.reached:
                break

    @needs_postgres
    async def test_failed_statement(self, postgres: TortoiseContext) -> None:
        """If PostgreSQL silently rolls back at COMMIT, no callback is called."""
        called: list[str] = []
        async with in_transaction("postgres") as outer:
            await on_commit(outer, lambda: called.append("x"))
            await AuditRow.create(id=1, event="first")
            with suppress(IntegrityError):
                await AuditRow.create(id=1, event="second")
        assert (called, await events()) == ([], [])

    async def test_rolled_back_by_the_database(self, root: BaseDBAsyncClient) -> None:
        """If SQLite ends a transaction by itself, and so commits nothing, no callback is called."""
        called: list[str] = []
        async with in_transaction(root.connection_name) as outer:
            await on_commit(outer, lambda: called.append("x"))
            await AuditRow.create(id=1, event="first", using_db=outer)
            table = AuditRow._meta.db_table
            if isinstance(root, SqliteClient):
                with suppress(IntegrityError):
                    await outer.execute_query(
                        f"INSERT OR ROLLBACK INTO {table} SELECT * FROM {table}"
                    )
            else:
                await outer.execute_script("ROLLBACK")
        assert (called, await events()) == ([], [])


class TestDelivery:
    """Effects that are awaited as part of the commit."""

    @pytest.mark.parametrize("own", [True, False])
    async def test_outside_the_transaction(self, root: BaseDBAsyncClient, own: bool) -> None:
        """Handlers run in order, after every object was changed, and can use the database."""
        noted: list[str] = []
        block: Any = transaction(root) if own else in_transaction(root.connection_name)
        async with block as outer:
            await attach(outer, Handler("a", noted))
            await attach(outer, Handler("b", noted))
            assert noted == []
        assert noted == ["a applied", "b applied", "a delivered", "b delivered"]
        assert await events() == ["a", "b"]

    async def test_by_hand(self, root: BaseDBAsyncClient) -> None:
        """They run at an explicit commit, whose block goes on and ends as usual."""
        noted: list[str] = []
        async with in_transaction(root.connection_name) as outer:
            await attach(outer, Handler("a", noted))
            await finished(outer.commit())
            assert noted == ["a applied", "a delivered"]
        assert await events() == ["a"]

    async def test_holds_no_connection_meanwhile(self, root: BaseDBAsyncClient) -> None:
        """A slow handler holds no connection and no lock."""
        noted: list[str] = []
        waiting, go_on = asyncio.Event(), asyncio.Event()

        class Slow(Handler):
            async def deliver(self) -> None:
                waiting.set()
                await go_on.wait()

        async def commit() -> None:
            async with in_transaction(root.connection_name) as outer:
                await attach(outer, Slow("a", noted))

        committing = asyncio.create_task(commit())
        await finished(waiting.wait())
        async with in_transaction(root.connection_name):
            await finished(AuditRow.create(event="another"))
        assert not committing.done()
        go_on.set()
        await finished(committing)
        assert await events() == ["another"]

    async def test_failure(self, root: BaseDBAsyncClient, caplog: pytest.LogCaptureFixture) -> None:
        """A failure is logged, the commit stands, and later effects run."""
        noted: list[str] = []

        class Failing(Handler):
            def apply(self) -> None:
                raise LookupError("apply")

            async def deliver(self) -> None:
                raise LookupError("deliver")

        async with in_transaction(root.connection_name) as outer:
            await AuditRow.create(event="kept")
            await attach(outer, Failing("a", noted))
            await attach(outer, Handler("b", noted))
        assert noted == ["b applied", "b delivered"]
        assert caplog.messages == ["What follows a commit failed"] * 2
        assert await events() == ["kept", "b"]

    @pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
    @pytest.mark.parametrize("own", [True, False])
    async def test_cancelled(self, root: BaseDBAsyncClient, own: bool, late: bool) -> None:
        """Cancelled at any step, the effects run once if the row is committed, and otherwise never."""
        committed = 0
        for step in itertools.count(1):
            noted: list[str] = []

            async def work() -> None:
                block: Any = transaction(root) if own else in_transaction(root.connection_name)
                async with block as outer:
                    await AuditRow.create(event="kept", using_db=outer)
                    for name in "ab":
                        await attach(outer, Handler(name, noted))  # noqa: B023

            if not own and step < 3:
                continue  # Tortoise leaks a connection that is cancelled while it is opened
            attempt = Cancelled(work(), step, late=late)
            await attempt.run()
            kept = "kept" in await events()
            ends = [each for each in noted if not each.endswith("applied")]
            begun = {each[0] for each in ends}
            assert len(ends) == len(begun)
            # One that was running when it was cancelled is cancelled with the caller.
            assert len(ends) in ((2, 1) if kept and attempt.reached else (2 * kept,))
            assert [each for each in noted if each.endswith("applied")] == [
                f"{name} applied" for name in "ab" if kept
            ]
            committed += kept
            await AuditRow.all().delete()
            if not attempt.reached:
                break
        assert committed >= 1  # aiomysql waits once in a COMMIT

    async def test_no_transaction(self, root: BaseDBAsyncClient) -> None:
        """Without a transaction the effect runs at once."""
        noted: list[str] = []
        await attach(root, Handler("a", noted))
        assert noted == ["a applied", "a delivered"]

    async def test_commit_fails(
        self, root: BaseDBAsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the commit fails, no effect runs, and the transaction may be rolled back."""
        noted: list[str] = []
        kind = transaction_class(root)

        async def fail(self: object) -> None:
            raise OperationalError("no")

        with monkeypatch.context() as patch, suppress(Undo):
            patch.setattr(kind, "commit", fail)
            async with in_transaction(root.connection_name) as outer:
                await AuditRow.create(event="x")
                await attach(outer, Handler("a", noted))
                with pytest.raises(OperationalError):
                    await outer.commit()
                assert connection_for(AuditRow) is outer
                raise Undo
        assert (noted, await events()) == ([], [])


class TestUnlessKept:
    """Rows that are written again after a rollback."""

    @staticmethod
    async def write(connection: BaseDBAsyncClient) -> None:
        """Write one row."""
        await AuditRow.create(event="kept", using_db=connection)

    async def write_to_keep(self, connection: BaseDBAsyncClient) -> None:
        """Write the row again if it was rolled back."""
        await self.write(connection)
        await unless_kept(connection, self.write)

    @pytest.mark.parametrize("ending", ["commit", "rollback"])
    async def test_ending(self, root: BaseDBAsyncClient, ending: str) -> None:
        """Committed or rolled back, the row exists once before another transaction begins."""
        seen: list[int] = []

        begun = asyncio.Event()

        async def next_one() -> None:
            await begun.wait()
            async with in_transaction():
                seen.append(await AuditRow.all().count())

        later = asyncio.ensure_future(next_one())
        with suppress(Undo):
            async with in_transaction() as transaction:
                begun.set()
                await self.write_to_keep(transaction)
                if ending == "rollback":
                    raise Undo
        await later
        assert seen == [1]

    @pytest.mark.parametrize("ending", ["commit", "rollback"])
    async def test_savepoint(self, root: BaseDBAsyncClient, ending: str) -> None:
        """At the end of the outermost transaction only the rows that were rolled back are written again."""
        with suppress(Undo):
            async with in_transaction() as transaction:
                with suppress(Undo):
                    async with in_transaction() as savepoint:
                        await self.write_to_keep(savepoint)
                        raise Undo
                await self.write_to_keep(transaction)
                if ending == "rollback":
                    raise Undo
        assert await AuditRow.all().count() == 2

    async def test_without_a_transaction(self, root: BaseDBAsyncClient) -> None:
        """Without a transaction nothing is written again."""
        await self.write_to_keep(root)
        assert await AuditRow.all().count() == 1

    async def test_failure(self, root: BaseDBAsyncClient, caplog: pytest.LogCaptureFixture) -> None:
        """A failure is logged, and the other rows are written."""

        async def fail(_: BaseDBAsyncClient) -> None:
            raise OSError

        with suppress(Undo):
            async with in_transaction() as transaction:
                await unless_kept(transaction, fail)
                await self.write_to_keep(transaction)
                raise Undo
        assert await AuditRow.all().count() == 1
        assert caplog.messages == ["What follows a rollback failed"]
        caplog.clear()


class TestTurns:
    """Savepoints of several tasks in one transaction do not overlap."""

    async def test_gathered(self, root: BaseDBAsyncClient) -> None:
        """Each savepoint waits for the one before, so that a rollback undoes only its own rows."""

        async def write(number: int) -> None:
            async with transaction(connection_for(AuditRow)) as own:
                await AuditRow.create(event=f"{number}", using_db=own)
                await asyncio.sleep(0)
                if number % 2:
                    raise Undo

        async with in_transaction(root.connection_name):
            await finished(
                asyncio.gather(*[write(number) for number in range(6)], return_exceptions=True)
            )
        assert await events() == ["0", "2", "4"]

    async def test_inside_one_another(self, root: BaseDBAsyncClient) -> None:
        """Tasks inside a savepoint wait for their siblings, not for the savepoint around them."""

        async def write(depth: int) -> None:
            async with transaction(connection_for(AuditRow)) as own:
                await AuditRow.create(event=f"{depth}", using_db=own)
                if depth:
                    await asyncio.gather(write(depth - 1), write(depth - 1))

        async with in_transaction(root.connection_name):
            await finished(asyncio.gather(write(2), write(2)))
        assert sorted(await events()) == ["0"] * 8 + ["1"] * 4 + ["2"] * 2

    async def test_left_behind(self, root: BaseDBAsyncClient) -> None:
        """A savepoint ends after those of the tasks that it started, awaited or not."""
        tasks: list[asyncio.Task[None]] = []

        async def write() -> None:
            async with transaction(connection_for(AuditRow)) as own:
                for _ in range(5):
                    await asyncio.sleep(0)
                await AuditRow.create(event="child", using_db=own)

        async with in_transaction(root.connection_name):
            async with transaction(connection_for(AuditRow)):
                tasks.append(asyncio.create_task(write()))
                await asyncio.sleep(0)
            await AuditRow.create(event="after")
        await finished(asyncio.gather(*tasks))
        assert await events() == ["child", "after"]

    async def test_cancelled_in_the_queue(self, root: BaseDBAsyncClient) -> None:
        """A task that is cancelled while it waits for its turn keeps no other from its turn."""

        async def write(name: str) -> None:
            async with transaction(connection_for(AuditRow)) as own:
                await AuditRow.create(event=name, using_db=own)

        async with in_transaction(root.connection_name):
            async with asyncio.TaskGroup() as group:
                async with transaction(connection_for(AuditRow)):
                    pass
                tasks = [group.create_task(write(f"{number}")) for number in range(3)]
                await asyncio.sleep(0)
                tasks[1].cancel()
        assert await events() == ["0", "2"]

    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8])
    async def test_begun_while_the_transaction_ends(
        self, root: BaseDBAsyncClient, turns: int, kept: bool
    ) -> None:
        """A task that begins while the transaction ends is part of it, or has its own."""
        tasks: list[asyncio.Task[bool]] = []

        async def write() -> bool:
            await AuditRow.all().using_db(connection_for(AuditRow)).count()
            own = transaction(connection_for(AuditRow))
            async with own as connection:
                await AuditRow.create(event="task", using_db=connection)
            return own.nested

        with suppress(Undo):
            async with in_transaction(root.connection_name):
                await AuditRow.create(event="host")
                tasks.append(asyncio.create_task(write()))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if not kept:
                    raise Undo
        nested = await finished(tasks[0])
        expected = ["host"] * kept + ["task"] * (kept or not nested)
        assert sorted(await events()) == expected


class TestPrivateNames:
    """The undocumented parts of Tortoise that this uses, so that a new version fails here."""

    async def test_what_a_block_holds(self, root: BaseDBAsyncClient) -> None:
        """A transaction has a lock for its statements, and returns its connection to its parent."""
        async with in_transaction(root.connection_name) as outer:
            wrapper: Any = outer
            assert not wrapper._lock.locked()
            client: Any = root
            if isinstance(root, SqliteClient):
                assert root._lock.locked()
            else:
                assert not all_idle(client._pool)
                await wrapper.rollback()
                await client._pool.release(wrapper._connection)
                wrapper._connection = await client._pool.acquire()
                wrapper._finalized = True

    async def test_ends_call_methods_of_the_instance(self, root: BaseDBAsyncClient) -> None:
        """A block ends by `commit` or `rollback` of its client, which can be replaced."""
        for error in (None, Undo()):
            called: list[str] = []
            with suppress(Undo):
                async with in_transaction(root.connection_name) as outer:
                    for name in ("commit", "rollback"):
                        original: Callable[[], Awaitable[None]] = getattr(outer, name)

                        async def noting(
                            name: str = name, original: Callable[[], Awaitable[None]] = original
                        ) -> None:
                            called.append(name)  # noqa: B023
                            await original()

                        setattr(outer, name, noting)
                    if error is not None:
                        raise error
            assert called == ["rollback" if error else "commit"]

    async def test_marks(self, root: BaseDBAsyncClient) -> None:
        """The last number is rolled back with a savepoint, and kept by a release."""
        dialect = dialect_of(root)
        async with in_transaction(root.connection_name) as outer:
            before = await dialect.mark_of(outer)
            assert await dialect.set_mark(outer, 7) == before
            with suppress(Undo):
                async with in_transaction(root.connection_name) as inner:
                    assert await dialect.set_mark(inner, 8) == 7
                    raise Undo
            assert await dialect.mark_of(outer) == 7
            async with in_transaction(root.connection_name) as inner:
                assert await dialect.set_mark(inner, 2**31 - 1) == 7
            assert await dialect.mark_of(outer) == 2**31 - 1
