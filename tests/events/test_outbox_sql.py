"""What the statements of the outbox read: one index, from where they begin, and not a row too many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext

from tests.support.database import ONE_BY_EACH_DIALECT, root
from tortoise_auth.clock import utc_now
from tortoise_auth.database import run_statement, transaction
from tortoise_auth.database.dialects import outbox as sql
from tortoise_auth.models import DeadLetter, OutboxEntry

ROWS = 4000

LIMIT = 20
TABLES = {OutboxEntry._meta.db_table, DeadLetter._meta.db_table}

BY_KEY = ["CLAIM", "HOLD", "SET_ASIDE", "DELETE", "RELEASE", "RESCHEDULE", "DIE", "RESTART"]
BY_KEY_OF_DEAD_LETTERS = ["LOCK_DEAD", "REVIVE", "DELETE_DEAD"]
BY_INDEX = ["DUE", "PROMOTE", "COUNTS", "OVERDUE", "COUNT_DEAD", "OLDEST_DEAD", "WAITING", "DEAD"]
STATEMENTS = [*BY_KEY, *BY_KEY_OF_DEAD_LETTERS, *BY_INDEX]

LINE = {"subscription": "s", "user_table": "app_user", "subject_id": "7"}
PAIRS = [LINE, LINE | {"user_table": ""}, LINE | {"subscription": "t"}]

STATES: dict[str, dict[str, str]] = {
    "all due": {},
    "the first back off": {"due_at": "CASE WHEN n <= 2000 THEN {later} ELSE {earlier} END"},
    "all back off": {"due_at": "{later}"},
    "another subscription": {"subscription": "'unknown'"},
    "another user table": {"user_table": "'other'"},
    "all dead": {"due_at": "{earlier}"},
    "one time": {"due_at": "{once}"},
    "one subject": {"subject_id": "'7'"},
    "no subject": {"subject_id": "NULL"},
    "behind others": {"due_at": "CASE WHEN n > 100 THEN NULL ELSE {earlier} END"},
}
"""States of the outbox: what differs from due rows of 100 subjects."""

STATISTICS = {
    "of a new table": None,
    "of a table that was emptied": {},
    "of one subject": {"subject_id": "'7'", "subscription": "'s'"},
    "of another subscription": {"subscription": "'unknown'"},
    "of rows that back off": {"due_at": "{later}"},
}
"""What was in the table when the planner last looked."""


MOMENTS = {"sqlite": "'{}+00:00'", "postgres": "'{}+00:00'::timestamptz", "mysql": "'{}'"}

NUMBERS = {
    "sqlite": "WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s LIMIT "
    f"{ROWS}) SELECT n FROM s",
    "postgres": f"SELECT n FROM generate_series(1, {ROWS}) AS n",
    "mysql": f"SELECT seq AS n FROM seq_1_to_{ROWS}",
}


async def fill(connection: BaseDBAsyncClient, table: str, **columns: str) -> None:
    """Write many rows in one statement."""
    dialect = connection.capabilities.dialect
    times = {"earlier": "2026-01-01", "later": "2999-01-01", "once": "2026-02-02"}
    moments = {name: MOMENTS[dialect].format(f"{day} 00:00:00") for name, day in times.items()}
    due = "dead_at" if table == DeadLetter._meta.db_table else "due_at"
    values = {
        "event_id": "'00000000-0000-4000-8000-000000000000'",
        "event_name": "'user_login'",
        "subscription": "'s'",
        "user_table": "'app_user'",
        "subject_id": "concat(n % 100, '')" if dialect != "sqlite" else "CAST(n % 100 AS TEXT)",
        "payload": "'{{}}'",
        "created_at": "{earlier}",
        "attempts": "0",
        "due_at": "{earlier}",
    } | columns
    if dialect == "postgres":
        values["event_id"] += "::uuid"
    names = ", ".join(values).replace("due_at", due)
    texts = ", ".join(text.format(**moments) for text in values.values())
    await connection.execute_script(
        f"INSERT INTO {table} ({names}) SELECT {texts} FROM ({NUMBERS[dialect]}) AS numbers"
    )


async def remember(connection: BaseDBAsyncClient, statistics: str) -> None:
    """Leave empty tables, and statistics of what was in them before."""
    before = STATISTICS[statistics]
    await empty()
    for table in TABLES:
        if before is not None:
            await fill(connection, table, **before)
    if statistics == "of a table that was emptied":
        await empty()
    await analyze(connection)
    await empty()


async def empty() -> None:
    """Delete all rows; their pages stay."""
    await OutboxEntry.all().delete()
    await DeadLetter.all().delete()


async def analyze(connection: BaseDBAsyncClient) -> None:
    """Make statistics of the tables as they are."""
    analyze = "ANALYZE TABLE" if connection.capabilities.dialect == "mysql" else "ANALYZE"
    for table in TABLES:
        await connection.execute_script(f"{analyze} {table}")


@pytest.fixture
async def connection(db: TortoiseContext) -> BaseDBAsyncClient:
    """A database whose statistics do not change while a test runs."""
    connection = root(db)
    if connection.capabilities.dialect == "postgres":
        for table in TABLES:
            await connection.execute_script(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    return connection


async def example() -> dict[str, Any]:
    """Return values for every statement."""
    now = utc_now()
    ids = [
        int(row["id"]) for row in await OutboxEntry.all().order_by("id").limit(LIMIT).values("id")
    ]
    return {
        "pairs": PAIRS,
        "gone": [LINE | {"id": 107}, LINE | {"id": 1}],
        **{"ids": ids, "limit": LIMIT, "several": 10, "holder": "r1", "error": "x"},
        **{"now": now, "lease_ends": now, "until": now, "at": now, "due_at": now},
    }


async def counted(connection: BaseDBAsyncClient, name: str) -> dict[str, int]:
    """Run a statement on MariaDB and take it back; return how much the server did for it."""
    values = await example()
    with suppress(_Undo):
        async with transaction(connection) as counting:
            if name == "REVIVE":  # into the place of rows that are there
                await run_statement(counting, sql.DELETE_DEAD["mysql"].replace(*TO_OUTBOX), values)
            before = await _counts(counting)
            await run_statement(counting, getattr(sql, name), values)
            after = await _counts(counting)
            raise _Undo
    return {each: after[each] - before[each] for each in after if after[each] > before[each]}


TO_OUTBOX = ("tortoise_auth_dead_letter", "tortoise_auth_outbox")


async def _counts(connection: BaseDBAsyncClient) -> dict[str, int]:
    groups = ("Handler\\_read%", "Sort%")
    rows = [
        row
        for group in groups
        for row in await connection.execute_query_dict(f"SHOW SESSION STATUS LIKE '{group}'")
    ]
    return {row["Variable_name"]: int(row["Value"]) for row in rows}


class _Undo(Exception):
    pass


async def explain(connection: BaseDBAsyncClient, name: str, *, run: bool = False) -> list[Any]:
    """Return the plan of a statement, as the outbox runs it: PostgreSQL's nodes, or SQLite's lines."""
    dialect = connection.capabilities.dialect
    values = await example()
    statement = getattr(sql, name)[dialect]
    if dialect == "sqlite":
        rows = await run_statement(connection, f"EXPLAIN QUERY PLAN {statement}", values)
        return [row["detail"] for row in rows]
    options = "ANALYZE, FORMAT JSON" if run else "FORMAT JSON"
    async with transaction(connection) as explaining:
        await explaining.execute_script(sql.BEGIN["postgres"])
        (row,) = await run_statement(explaining, f"EXPLAIN ({options}) {statement}", values)
    plans = row["QUERY PLAN"]
    (plan,) = json.loads(plans) if isinstance(plans, str) else plans
    return list(_nodes(plan["Plan"]))


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from _nodes(each)


class TestPlans:
    @pytest.mark.parametrize("statistics", STATISTICS)
    async def test_read_one_index(self, connection: BaseDBAsyncClient, statistics: str) -> None:
        """Every statement reads an index from a given place, and sorts nothing, whatever the statistics."""
        await remember(connection, statistics)
        for table in TABLES:
            await fill(connection, table)
        for name in STATEMENTS:
            match connection.capabilities.dialect:
                case "sqlite":
                    self.check_sqlite(name, await explain(connection, name))
                case "postgres":
                    self.check_postgres(name, await explain(connection, name))
                case _:
                    self.check_mariadb(name, await counted(connection, name))

    def check_sqlite(self, name: str, plan: list[str]) -> None:
        """Only walks in the order of an index begin at its first entry."""
        assert not [line for line in plan if "TEMP B-TREE" in line], (name, plan)
        scans = [line for line in plan if any(f"SCAN {table}" in line for table in TABLES)]
        walks = {
            "COUNTS": "tortoise_auth_outbox USING COVERING INDEX tortoise_auth_outbox_due",
            "OVERDUE": "tortoise_auth_outbox USING COVERING INDEX tortoise_auth_outbox_due",
            "COUNT_DEAD": "tortoise_auth_dead_letter USING COVERING INDEX",
            "WAITING": "tortoise_auth_outbox",
            "DEAD": "tortoise_auth_dead_letter USING INDEX tortoise_auth_dead_letter_at",
        }
        assert len(scans) == (name in walks), (name, plan)
        assert all(line.startswith(f"SCAN {walks[name]}") for line in scans), (name, plan)
        self.check_indexes(name, " ".join(plan))

    def check_postgres(self, name: str, plan: list[dict[str, Any]]) -> None:
        """Tables are read by an index scan, which has a condition or the right order."""
        kinds = {node["Node Type"] for node in plan}
        forbidden = {"Seq Scan", "Sort", "Incremental Sort", "Bitmap Heap Scan", "Hash Join"}
        assert not kinds & (forbidden | {"Merge Join", "Gather", "Materialize"}), (name, kinds)
        scans = [node for node in plan if node.get("Relation Name") in TABLES]
        reads = [node for node in scans if node["Node Type"] != "ModifyTable"]
        assert {node["Node Type"] for node in reads} <= {
            "Index Scan",
            "Index Only Scan",
            "Tid Scan",
        }
        used = " ".join(node.get("Index Name", "") for node in reads)
        self.check_indexes(name, used)
        if name in BY_KEY + BY_KEY_OF_DEAD_LETTERS:
            assert used.split() == [f"{reads[0]['Relation Name']}_pkey"], (name, used)

    def check_mariadb(self, name: str, counts: dict[str, int]) -> None:
        """Its plans say little of several statements, so they are run and what they read is counted."""
        assert not [each for each in counts if each.startswith("Sort")], (name, counts)
        # What is counted stands in a table in memory, which is read as a whole.
        of_counts = 2 * (LIMIT + 1) if name.startswith("COUNT") else 0
        assert counts.pop("Handler_read_rnd_next", 0) <= of_counts, (name, counts)
        # Some updates find a row and read it again to return it; each pair costs a read.
        assert sum(counts.values()) <= 2 * LIMIT + len(PAIRS), (name, counts)

    def check_indexes(self, name: str, used: str) -> None:
        """Each statement uses the indexes that it was written for."""
        due, line = "tortoise_auth_outbox_due", "tortoise_auth_outbox_line"
        expected = {"DUE": {due, line}, "PROMOTE": {line}, "COUNTS": {due}, "OVERDUE": {due}}
        for index in (due, line):
            assert (index in used) == (index in expected.get(name, ())), (name, used)

    def test_of_every_statement(self) -> None:
        """No statement of the module is left out here."""
        both = {name for name, each in vars(sql).items() if isinstance(each, dict)}
        named = {name for name in both if name.isupper() and name[0] != "_"}
        assert named - {"BEGIN"} == set(STATEMENTS)


class TestRowsRead:
    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("server", ONE_BY_EACH_DIALECT, indirect=True)
    async def test_of_a_claim(self, server: TortoiseContext, state: str) -> None:
        """A look at what is due reads two rows for each that it returns, in every state of the table."""
        connection = root(server)
        table = DeadLetter if state == "all dead" else OutboxEntry
        for statistics in STATISTICS:
            await remember(connection, statistics)
            await fill(connection, table._meta.db_table, **STATES[state])
            assert await rows_read(connection, "DUE") <= 2 * LIMIT, statistics
            assert await rows_read(connection, "PROMOTE") <= 2 * 2 * 10, statistics
            assert await rows_read(connection, "OVERDUE") <= 10, statistics
            assert await rows_read(connection, "COUNTS") <= 2 * LIMIT + 10, statistics


async def rows_read(connection: BaseDBAsyncClient, name: str) -> int:
    """Run a statement; return how many rows it reads by an index."""
    if connection.capabilities.dialect == "mysql":
        counts = await counted(connection, name)
        counts.pop("Handler_read_rnd_next", None)
        return sum(counts.values())
    plan = await explain(connection, name, run=True)
    return sum(_rows_read(node) for node in plan if "Index Name" in node)


def _rows_read(node: dict[str, Any]) -> int:
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return int((node["Actual Rows"] + removed) * node["Actual Loops"])
