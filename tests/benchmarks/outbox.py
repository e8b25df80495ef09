"""What durable events cost: relays, logins, and claims from a table of a million rows.

Run it with ``python tests/benchmarks/outbox.py``, or ``--rows 2000 --logins 100 --backlog 50000`` for
a quick look.
PostgreSQL is expected where ``TORTOISE_AUTH_TEST_POSTGRES`` says, and left out where it is not. It
exits with 1 when a target is missed. Other work on the machine shows in every number, so the load
average is printed beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import secrets
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tortoise import Tortoise
from tortoise.connection import connections, get_connection

from tortoise_auth import AbstractUser, AuthConfig, AuthService, EventEmitter
from tortoise_auth.clock import utc_now
from tortoise_auth.events import UserLogin, outbox
from tortoise_auth.events.relay import Relay, RelaySettings
from tortoise_auth.models import DeadLetter, OutboxEntry
from tortoise_auth.testing import cheap_hasher

POSTGRES_URL = os.environ.get(
    "TORTOISE_AUTH_TEST_POSTGRES", "postgres://postgres@127.0.0.1:5432/test"
)
PASSWORD = "correct horse battery staple"
EMAIL = "user0@example.com"
USERS = 1000
RELAYS = (1, 2, 4)
LEAST_RATE = 1500.0
MOST_LATENCY = 1.0
MOST_FOR_A_CLAIM = 10.0
MOST_FOR_A_LOOK = 50.0
MOST_SLOWER = 1.5
ROUNDS = 3

processes = multiprocessing.get_context("spawn")


class User(AbstractUser):
    """The smallest host model."""


@dataclass(frozen=True)
class Row:
    """One line of the report; without a limit it is information."""

    what: str
    measured: float
    unit: str
    limit: float | None = None
    more_is_better: bool = False

    @property
    def missed(self) -> bool:
        """Whether the measured value is on the wrong side of its limit."""
        if self.limit is None:
            return False
        return self.measured < self.limit if self.more_is_better else self.measured > self.limit

    def __str__(self) -> str:
        line = f"  {self.what:<60}{self.measured:>9.2f} {self.unit:<6}"
        if self.limit is None:
            return line
        sign, verdict = ">=" if self.more_is_better else "<=", "MISSED" if self.missed else "met"
        return f"{line}  target {sign} {self.limit:g} {self.unit:<6} {verdict}"


def connection_name(url: str) -> str:
    """Return a name for each kind of database: Tortoise caches statements by it."""
    return urlsplit(url).scheme


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[None]:
    """Open a database that has its tables already."""
    name = connection_name(url)
    models = [User.__module__, "tortoise_auth.models"]
    await Tortoise.init(
        config={
            "connections": {name: url},
            "apps": {"models": {"models": models, "default_connection": name}},
        }
    )
    try:
        yield
    finally:
        await Tortoise.close_connections()


@asynccontextmanager
async def postgres() -> AsyncIterator[str]:
    """Open an empty schema of PostgreSQL, and give its URL."""
    schema = f"bench_{secrets.token_hex(6)}"
    url = f"{POSTGRES_URL}?schema={schema}"
    async with connected(url):
        connection = get_connection(connection_name(url))
        await connection.execute_script(f'CREATE SCHEMA "{schema}"')
        try:
            await Tortoise.generate_schemas()
            yield url
        finally:
            await connection.execute_script(f'DROP SCHEMA "{schema}" CASCADE')


@asynccontextmanager
async def sqlite() -> AsyncIterator[str]:
    """Open an empty SQLite file, and give its URL."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite://{Path(folder) / 'bench.sqlite3'}"
        async with connected(url):
            await Tortoise.generate_schemas()
            yield url


def listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 0), timeout=1):
            return True
    except OSError:
        return False


async def fill(rows: int) -> None:
    """Write as many logins of many users as there will be deliveries."""
    users = await User.all().order_by("id")
    now = utc_now()
    events = (
        UserLogin(user=user, subject_id=str(user.pk), session_id=str(number))
        for number in range(rows)
        for user in [users[number % len(users)]]
    )
    await OutboxEntry.bulk_create(
        [
            OutboxEntry(
                event_id=event.id,
                event_name=event.name,
                subscription="nothing",
                user_table=User._meta.db_table,
                subject_id=event.subject_id,
                payload=event.to_dict(),
                created_at=now,
                due_at=now,
            )
            for event in events
        ],
        batch_size=1000,
    )


def relay_until_stopped(url: str, parent: Connection) -> None:
    """Be a relay process, from one message of the parent to the next."""
    asyncio.run(_relay_until_stopped(url, parent))


async def _relay_until_stopped(url: str, parent: Connection) -> None:
    emitter = EventEmitter()

    @emitter.on("user_login", delivery="durable", name="nothing")
    async def do_nothing(user: User) -> None: ...

    async with connected(url):
        await User.all().count()
        parent.send("ready")
        await asyncio.to_thread(parent.recv)
        async with Relay(emitter, User, RelaySettings()):
            await asyncio.to_thread(parent.recv)


async def rate_of(relays: int, rows: int, url: str) -> float:
    """Return how many rows a second a number of relay processes deliver together."""
    await fill(rows)
    pipes = [processes.Pipe() for _ in range(relays)]
    children = [
        processes.Process(target=relay_until_stopped, args=(url, each)) for _, each in pipes
    ]
    parents = [parent for parent, _ in pipes]
    for child in children:
        child.start()
    for parent in parents:
        await asyncio.to_thread(parent.recv)
    began = time.perf_counter()
    for parent in parents:
        parent.send("begin")
    while await OutboxEntry.all().exists():  # noqa: ASYNC110 - it is other processes that work
        await asyncio.sleep(0.02)
    seconds = time.perf_counter() - began
    for parent, child in zip(parents, children, strict=True):
        parent.send("end")
        await asyncio.to_thread(child.join)
    return rows / seconds


async def measure_relays(rows: int) -> list[Row]:
    async with postgres() as url:
        await User.bulk_create(User(email=f"user{number}@example.com") for number in range(USERS))
        rates = {}
        for relays in RELAYS:
            rates[relays] = max([await rate_of(relays, rows, url) for _ in range(ROUNDS)])
    best = max(rates.values())
    return [
        *(
            Row(f"{relays} relay process{'es' if relays > 1 else ''}", rate, "rows/s")
            for relays, rate in rates.items()
        ),
        Row("the best of these", best, "rows/s", LEAST_RATE, more_is_better=True),
        Row("2 processes for each row of 1", rates[2] / rates[1], ""),
        Row("4 processes for each row of 1", rates[4] / rates[1], ""),
    ]


async def measure_logins(logins: int) -> list[Row]:
    """Log in with and without a durable subscription, in turn."""
    await User.create_user(email=EMAIL, password=PASSWORD)
    hasher, config = cheap_hasher(), AuthConfig(secret=secrets.token_urlsafe(48))
    plain = AuthService(User, config, passwords=hasher, emitter=EventEmitter())
    recording = AuthService(User, config, passwords=hasher, emitter=EventEmitter())

    @recording.emitter.on("user_login", delivery="durable", name="nothing")
    async def do_nothing(user: User) -> None: ...

    took: dict[AuthService[User], list[float]] = {plain: [], recording: []}
    for number in range(logins + 20):
        for auth in (plain, recording) if number % 2 else (recording, plain):
            began = time.perf_counter()
            await auth.login(EMAIL, PASSWORD)
            took[auth].append(1000 * (time.perf_counter() - began))
    assert await OutboxEntry.all().count() == logins + 20
    without, with_row = (each[20:] for each in took.values())  # the first ones fill caches
    # Of each pair, because other load of the machine lasts for both.
    added = [more - less for more, less in zip(with_row, without, strict=True)]
    return [
        Row("login, median", statistics.median(without), "ms"),
        Row("login with a durable subscription, median", statistics.median(with_row), "ms"),
        Row("added by recording the event, median", statistics.median(added), "ms", MOST_LATENCY),
    ]


STATES = {
    "all due": {},
    "the first 2000 back off": {"due_at": "CASE WHEN n <= 2000 THEN {later} ELSE {now} END"},
    "all back off": {"due_at": "{later}"},
    "all of another subscription": {"subscription": "'unknown'"},
    "all of another user table": {"user_table": "'other'"},
    "all dead": {"dead": "1"},
    "one due_at": {"due_at": "{now}", "created_at": "{now}"},
    "one subject": {"subject_id": "'7'"},
    "no subject": {"subject_id": "NULL"},
    "all due, statistics of an empty table": {"statistics": "empty"},
    "all back off, statistics of an empty table": {"statistics": "empty", "due_at": "{later}"},
    "all due, statistics of an emptied table": {"statistics": "emptied"},
    "all back off, statistics of an emptied table": {"statistics": "emptied", "due_at": "{later}"},
    "all due, statistics of one subject": {"statistics": "one subject"},
    "all due, statistics of one subscription": {"statistics": "one subscription"},
}
"""States of the outbox: which columns differ from rows of 100 000 users that have just become due."""

_FILL = {
    "asyncpg": (
        "INSERT INTO {table} (event_id, event_name, subscription, user_table, subject_id, payload, "
        "created_at, attempts, {at}) SELECT gen_random_uuid(), 'user_login', {subscription}, "
        "{user_table}, {subject_id}, '{{}}', {created_at}, 0, {due_at} "
        "FROM generate_series(1, {rows}) AS n"
    ),
    "sqlite": (
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers LIMIT {rows}) "
        "INSERT INTO {table} (event_id, event_name, subscription, user_table, subject_id, payload, "
        "created_at, attempts, {at}) SELECT '00000000-0000-4000-8000-000000000000', 'user_login', "
        "{subscription}, {user_table}, {subject_id}, '{{}}', {created_at}, 0, {due_at} FROM numbers"
    ),
}
_MOMENTS = {
    "asyncpg": {"now": "now()", "later": "now() + interval '1 hour'"},
    "sqlite": {
        "now": "strftime('%Y-%m-%d %H:%M:%S.000000+00:00', 'now')",
        "later": "strftime('%Y-%m-%d %H:%M:%S.000000+00:00', 'now', '+1 hour')",
    },
}


async def fill_with(state: str, rows: int) -> None:
    """Fill the outbox, or the table of dead letters, in one of the states."""
    (connection,) = connections.all()
    kind = "sqlite" if connection.capabilities.dialect == "sqlite" else "asyncpg"
    earlier = (
        "strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 hour', (n / 1000) || ' seconds') || '000+00:00'"
        if kind == "sqlite"
        else "now() - interval '1 hour' + n * interval '1 millisecond'"
    )
    columns = {
        "subscription": "'nothing'",
        "user_table": f"'{User._meta.db_table}'",
        "subject_id": "CAST(n % 100000 AS TEXT)",
        "created_at": earlier,
        "due_at": earlier,
    } | STATES[state]
    dead, statistics = columns.pop("dead", ""), columns.pop("statistics", "")
    values = {name: text.format(**_MOMENTS[kind]) for name, text in columns.items()}
    for model in (OutboxEntry, DeadLetter):
        await connection.execute_script(f"DELETE FROM {model._meta.db_table}")
    if kind == "asyncpg":
        await connection.execute_script(
            "VACUUM FULL tortoise_auth_outbox, tortoise_auth_dead_letter"
        )
        await connection.execute_script(
            "ALTER TABLE tortoise_auth_outbox SET (autovacuum_enabled = off)"
        )
    other = {
        "one subject": "subject_id",
        "one subscription": "subscription",
        "emptied": "user_table",
    }
    if statistics in other:
        wrong = values | {other[statistics]: "'other'"}
        await connection.execute_script(
            _FILL[kind].format(table=OutboxEntry._meta.db_table, at="due_at", rows=10_000, **wrong)
        )
    if statistics == "emptied":
        await connection.execute_script(f"DELETE FROM {OutboxEntry._meta.db_table}")
    await connection.execute_script("ANALYZE tortoise_auth_outbox")
    if statistics in other:
        await connection.execute_script(f"DELETE FROM {OutboxEntry._meta.db_table}")
    table, at = (DeadLetter, "dead_at") if dead else (OutboxEntry, "due_at")
    await connection.execute_script(
        _FILL[kind].format(table=table._meta.db_table, at=at, rows=rows, **values)
    )
    if not statistics:
        await connection.execute_script("ANALYZE tortoise_auth_outbox")


async def measure_backlog(rows: int) -> list[Row]:
    """Claim from a table of that many rows, in each state."""
    (connection,) = connections.all()
    lines = []
    for state in STATES:
        await fill_with(state, rows)
        took, claimed = [], []
        for number in range(10):
            now, began = utc_now(), time.perf_counter()
            claim = await outbox.claim(
                connection,
                holder=str(number),
                subscriptions=["nothing"],
                user_table=User._meta.db_table,
                now=now,
                lease_ends=now + timedelta(minutes=1),
                limit=100,
            )
            took.append(1000 * (time.perf_counter() - began))
            claimed.append(len(claim.rows))
            await outbox.delete_delivered(connection, claim.rows, str(number))
        typical = statistics.median(took)
        what = f"{state}: {statistics.median(claimed):.0f} claimed"
        lines.append(Row(what, typical, "ms", MOST_FOR_A_CLAIM))
        if state in ("all due", "all back off", "all dead"):
            began = time.perf_counter()
            await outbox.status(connection, utc_now())
            spent = 1000 * (time.perf_counter() - began)
            lines.append(Row(f"{state}: status", spent, "ms", MOST_FOR_A_LOOK))
            began = time.perf_counter()
            await outbox.entries(connection, dead=True)
            spent = 1000 * (time.perf_counter() - began)
            lines.append(Row(f"{state}: dead letters", spent, "ms", MOST_FOR_A_LOOK))
    return lines


async def measure_beside(backlog: int) -> list[Row]:
    """Log in beside a relay that polls, and beside the upkeep of dead letters."""
    (connection,) = connections.all()
    await User.create_user(email=EMAIL, password=PASSWORD)
    emitter = EventEmitter()

    @emitter.on("user_logout", delivery="durable", name="nothing")
    async def do_nothing(user: User) -> None: ...

    auth = AuthService(User, AuthConfig(secret=secrets.token_urlsafe(48)), emitter=emitter)
    works: dict[str, tuple[str, Callable[[], Coroutine[Any, Any, object]]]] = {
        "a relay, all back off": ("all back off", auth.relay().run),
        "a purge": ("all dead", lambda: outbox.purge(connection, before=utc_now())),
        "a retry of all": ("all dead", lambda: outbox.retry_dead(connection, utc_now())),
    }
    lines = []
    for name, (state, work) in works.items():
        await fill_with(state, backlog)
        login, check = await times_beside(auth, None)
        login_beside, check_beside = await times_beside(auth, work)
        lines += [
            Row(f"login before {name}", login, "ms"),
            Row(f"a login beside {name} takes", login_beside / login, "times", MOST_SLOWER),
            Row(f"authenticate beside {name} takes", check_beside / check, "times", 2.0),
        ]
    return lines


async def times_beside(
    auth: AuthService[User], work: Callable[[], Coroutine[Any, Any, object]] | None
) -> tuple[float, float]:
    """Return the medians of logins and of checks of a token, in ms, for four seconds of *work*."""
    token = (await auth.login(EMAIL, PASSWORD)).access_token
    logins, checks = [], []
    task = asyncio.create_task(work()) if work is not None else None
    ends = time.perf_counter() + 4
    while time.perf_counter() < ends and (task is None or not task.done()):
        began = time.perf_counter()
        await auth.login(EMAIL, PASSWORD)
        logins.append(1000 * (time.perf_counter() - began))
        for _ in range(5):
            began = time.perf_counter()
            await auth.authenticate(token)
            checks.append(1000 * (time.perf_counter() - began))
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
    return statistics.median(logins), statistics.median(checks)


async def report(rows: int, logins: int, backlog: int) -> list[Row]:
    result: list[Row] = []

    def show(title: str, lines: list[Row]) -> None:
        print(f"\n{title}", *lines, sep="\n")
        result.extend(lines)

    async with sqlite():
        show(f"SQLite file, {backlog} rows in the outbox", await measure_backlog(backlog))
        show("SQLite file, logins beside them", await measure_beside(backlog))
    async with sqlite():
        show(f"SQLite file, {logins} logins each", await measure_logins(logins))
    if listens(POSTGRES_URL):
        async with postgres():
            show(f"PostgreSQL, {backlog} rows in the outbox", await measure_backlog(backlog))
            show("PostgreSQL, logins beside them", await measure_beside(backlog))
        async with postgres():
            show(f"PostgreSQL, {logins} logins each", await measure_logins(logins))
        title = f"PostgreSQL, {rows} rows, a handler that does nothing, best of {ROUNDS}"
        show(title, await measure_relays(rows))
    else:
        print(f"\nno PostgreSQL listens at {POSTGRES_URL}: relays are not measured")
    return result


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000, help="to deliver (default: 10000)")
    parser.add_argument("--logins", type=int, default=500, help="of each kind (default: 500)")
    parser.add_argument(
        "--backlog", type=int, default=1_000_000, help="to claim from (default: 1000000)"
    )
    return parser.parse_args()


def main() -> int:
    chosen = options()
    missed = sum(
        row.missed for row in asyncio.run(report(chosen.rows, chosen.logins, chosen.backlog))
    )
    load = ", ".join(f"{average:.2f}" for average in os.getloadavg())
    print(f"\n{os.cpu_count()} cores, load average {load}; {missed or 'no'} target(s) missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
