"""Durable rows: written with the change they belong to, claimed by relays, retried, dead letters.

A row stands for one event and one durable subscription. It is there if and only if the change is,
because both are written in one transaction; it goes when the handler has succeeded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeVar, overload
from uuid import UUID

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.database import (
    BATCH_SIZE,
    batches,
    count_changed,
    dialect_of,
    notify,
    run_statement,
    transaction,
    translates_database_errors,
)
from tortoise_auth.database.dialects import Statement
from tortoise_auth.database.dialects import outbox as sql
from tortoise_auth.events.catalog import Event, UserEvent
from tortoise_auth.events.subscription import Subscription
from tortoise_auth.models import DeadLetter, OutboxEntry, OutboxRow, user_table

RowT = TypeVar("RowT", bound=OutboxRow)

CHANNEL = sql.CHANNEL

COUNTED = 10_000
"""What `status` counts stops at this number, for each subscription and for the dead letters."""

_PROMOTED = 10
"""So many rows of a line become due when one before them is gone."""

_NO_ID = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row that a relay has claimed and must deliver before its lease ends."""

    id: int
    event_id: UUID
    event_name: str
    subscription: str
    user_table: str
    subject_id: str | None
    payload: Mapping[str, Any]
    attempts: int
    unreadable: str | None = None
    """Why the row is no event, whatever program reads it; then the payload is empty."""


class Claim(NamedTuple):
    """What came of one look at the rows that are due.

    Attributes:
        rows: Those that were claimed, oldest first. Those of one line must be delivered one after the
            other.
        set_aside: How many wait behind another row of their line, and are not looked at again until
            it is gone. If that is all that was due, more may be due behind them.
    """

    rows: list[Claimed]
    set_aside: int


class Due(NamedTuple):
    """A row that has been due for longest, for its subscription and user table.

    Attributes:
        id: That of the row.
        subscription: The name of the subscription.
        due_at: Since when, as the database writes it; a relay that claims it changes that.
    """

    id: int
    subscription: str
    due_at: object


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxStatus:
    """The outbox in numbers, for people and monitors.

    Counting stops at `COUNTED`, for each subscription and for the dead letters.

    Attributes:
        waiting: Rows to be delivered: due, backing off, claimed, or behind another one.
        due: Those of them whose time has come.
        dead: Dead letters.
        oldest_waiting: Seconds since the oldest waiting row was written; 0 if there is none.
        subscriptions: Waiting rows by name of subscription.
    """

    waiting: int
    due: int
    dead: int
    oldest_waiting: float
    subscriptions: Mapping[str, int]


@translates_database_errors
async def write(
    connection: BaseDBAsyncClient,
    event: Event,
    subscriptions: Sequence[Subscription],
    at: datetime,
) -> None:
    """Write a row for each durable subscription, in the transaction of *connection*.

    One statement, which wakes the relays of other processes as well where the database can: it is
    part of a login.
    """
    if not subscriptions:
        return
    user = event.user if isinstance(event, UserEvent) else None
    names = {f"name{position}": each.name for position, each in enumerate(subscriptions)}
    statement = sql.WRITE.format(rows=", ".join(sql.ROW.format(name=name) for name in names))
    await run_statement(
        connection,
        dialect_of(connection).notifying(statement, CHANNEL),
        {
            **names,
            "event_id": str(event.id),
            "event_name": event.name,
            "user_table": user_table(type(user)) if user is not None else "",
            "subject_id": event.subject_id,
            "payload": json.dumps(event.to_dict()),
            "at": at.astimezone(UTC),
        },
    )


async def claim(
    connection: BaseDBAsyncClient,
    *,
    holder: str,
    subscriptions: Sequence[str],
    user_table: str,
    now: datetime,
    lease_ends: datetime,
    limit: int,
) -> Claim:
    """Look at up to *limit* rows that are due, and take the first ones of each line.

    What waits behind a row that is not taken is set aside until that row is gone. No lock is waited
    for.

    Args:
        connection: The database.
        holder: Names the batch in the rows.
        subscriptions: Whose rows are taken, those of the first ones first.
        user_table: Whose users' rows are taken, beside those of no user.
        now: The time.
        lease_ends: Until when the rows are left alone by others.
        limit: Rows at most.
    """
    if not subscriptions:
        return Claim([], 0)
    pairs = [
        {"subscription": name, "user_table": table}
        for name in subscriptions
        for table in ("", user_table)
    ]
    async with _transaction(connection) as claiming:
        due = await _run(claiming, sql.DUE, pairs=pairs, now=now, limit=limit)
        mine: set[int] = set()
        behind: dict[int, int] = {}
        for row in sorted(due, key=lambda row: int(row["id"])):
            if row["behind"] is None or row["behind"] in mine:
                mine.add(row["id"])
            else:
                behind[row["id"]] = row["behind"]
        claimed = []
        if mine:
            claimed = await _run(
                claiming, sql.CLAIM, ids=[*mine], holder=holder, lease_ends=lease_ends
            )
        set_aside = await _set_aside(claiming, behind) if behind else 0
    return Claim(sorted(map(_claimed, claimed), key=lambda row: row.id), set_aside)


async def release(
    connection: BaseDBAsyncClient, rows: Sequence[Claimed], holder: str, now: datetime
) -> None:
    """Give rows back that were claimed but not attempted."""
    if rows:
        await _run(connection, sql.RELEASE, ids=_ids(rows), holder=holder, due_at=now)


async def delete_delivered(
    connection: BaseDBAsyncClient, rows: Sequence[Claimed], holder: str
) -> None:
    """Delete delivered rows, except those that were claimed again since."""
    if rows:
        async with _transaction(connection) as finishing:
            await _delete(finishing, rows, holder)


async def reschedule(
    connection: BaseDBAsyncClient, row: Claimed, holder: str, *, due_at: datetime, error: str
) -> None:
    """Let a row that failed be claimed again at *due_at*."""
    await _run(
        connection, sql.RESCHEDULE, ids=_ids([row]), holder=holder, due_at=due_at, error=error
    )


async def dead_letter(
    connection: BaseDBAsyncClient, row: Claimed, holder: str, *, at: datetime, error: str
) -> None:
    """Make a row a dead letter: kept, visible, and not delivered again until it is retried."""
    async with _transaction(connection) as finishing:
        # Locks the row as well: it is copied if and only if it is deleted.
        await reschedule(finishing, row, holder, due_at=at, error=error)
        await _run(finishing, sql.DIE, ids=_ids([row]), holder=holder, at=at)
        await _delete(finishing, [row], holder)


async def status(connection: BaseDBAsyncClient, now: datetime) -> OutboxStatus:
    """Count what is there, with an effort that does not grow with the table."""
    async with _transaction(connection, reads=True) as reading:
        counts = await _run(reading, sql.COUNTS, now=now, limit=COUNTED)
        (dead,) = await _run(reading, sql.COUNT_DEAD, limit=COUNTED)
        first = OutboxEntry.all().using_db(reading).order_by("id").first()
        oldest = await first.values("created_at")
    subscriptions: dict[str, int] = defaultdict(int)
    for each in counts:
        subscriptions[each["subscription"]] += each["waiting"]
    return OutboxStatus(
        waiting=sum(subscriptions.values()),
        due=sum(each["due"] for each in counts),
        dead=dead["dead"],
        oldest_waiting=max(0.0, (now - oldest["created_at"]).total_seconds()) if oldest else 0.0,
        subscriptions=dict(subscriptions),
    )


async def longest_due(connection: BaseDBAsyncClient, now: datetime) -> set[Due]:
    """Return the row that has been due for longest, for each subscription and user table."""
    async with _transaction(connection, reads=True) as reading:
        rows = await _run(reading, sql.OVERDUE, now=now)
    return {Due(row["id"], row["subscription"], row["due_at"]) for row in rows}


@overload
async def entries(
    connection: BaseDBAsyncClient, *, dead: Literal[False] = False, limit: int = 100
) -> list[OutboxEntry]: ...


@overload
async def entries(
    connection: BaseDBAsyncClient, *, dead: Literal[True], limit: int = 100
) -> list[DeadLetter]: ...


async def entries(
    connection: BaseDBAsyncClient, *, dead: bool = False, limit: int = 100
) -> list[OutboxEntry] | list[DeadLetter]:
    """Return rows, oldest first: those that wait, or the dead letters.

    Of a row that cannot be read the payload is empty and the id of the event is zero.
    """
    rows = await _run(connection, sql.DEAD if dead else sql.WAITING, limit=limit)
    if dead:
        return [_entry(DeadLetter, row) for row in rows]
    return [_entry(OutboxEntry, row) for row in rows]


async def retry(connection: BaseDBAsyncClient, ids: Sequence[int], now: datetime) -> int:
    """Give dead letters, or rows that back off, a new start; return how many there were."""
    renewed = 0
    for first in range(0, len(ids), BATCH_SIZE):
        some = list(ids[first : first + BATCH_SIZE])
        async with _transaction(connection) as changing:
            renewed += await _count(changing, sql.RESTART, ids=some, now=now)
            renewed += await _revive(changing, some, now)
    await notify(connection, CHANNEL)
    return renewed


async def retry_dead(connection: BaseDBAsyncClient, now: datetime) -> int:
    """Give every dead letter a new start, some at a time; return how many there were."""

    async def revive_some(ids: list[int]) -> int:
        async with _transaction(connection) as changing:
            return await _revive(changing, ids, now)

    renewed = await _for_dead_letters(connection, now, revive_some)
    await notify(connection, CHANNEL)
    return renewed


async def purge(connection: BaseDBAsyncClient, *, before: datetime) -> int:
    """Delete dead letters from before a time, some at a time; return how many there were."""

    async def delete_some(ids: list[int]) -> int:
        return await _count(connection, sql.DELETE_DEAD, ids=ids)

    return await _for_dead_letters(connection, before - timedelta.resolution, delete_some)


async def _for_dead_letters(
    connection: BaseDBAsyncClient, until: datetime, work: Callable[[list[int]], Awaitable[int]]
) -> int:
    """Do *work*, which removes dead letters of up to a time, in short transactions."""
    changed = 0
    async for _ in batches():  # pragma: no branch - it never ends by itself
        rows = await _run(connection, sql.OLDEST_DEAD, until=until, limit=BATCH_SIZE)
        if not rows:
            break
        changed += await work([row["id"] for row in rows])
    return changed


async def _revive(connection: BaseDBAsyncClient, ids: Sequence[int], now: datetime) -> int:
    """Move dead letters back, in a transaction; return how many."""
    rows = list(ids)
    # Locks them: what another one has just moved back is not moved twice.
    revived = await _count(connection, sql.LOCK_DEAD, ids=rows)
    await _run(connection, sql.REVIVE, ids=rows, now=now)
    await _run(connection, sql.DELETE_DEAD, ids=rows)
    return revived


async def _set_aside(connection: BaseDBAsyncClient, behind: Mapping[int, int]) -> int:
    """Set rows aside whose predecessors are held, so that those cannot go without promoting them."""
    held = await _run(connection, sql.HOLD, ids=list(behind.values()))
    there = {row["id"] for row in held}
    rows = [row for row, earlier in behind.items() if earlier in there]
    await _run(connection, sql.SET_ASIDE, ids=rows)
    return len(rows)


async def _delete(connection: BaseDBAsyncClient, rows: Sequence[Claimed], holder: str) -> None:
    """Delete rows, and then, in a later look, promote those behind them."""
    await _run(connection, sql.DELETE, ids=_ids(rows), holder=holder)
    gone = [
        {
            "subscription": row.subscription,
            "user_table": row.user_table,
            "subject_id": row.subject_id,
            "id": row.id,
        }
        for row in rows
        if row.subject_id is not None
    ]
    if gone:
        await _run(connection, sql.PROMOTE, gone=gone, several=_PROMOTED)


@asynccontextmanager
async def _transaction(
    connection: BaseDBAsyncClient, *, reads: bool = False
) -> AsyncIterator[BaseDBAsyncClient]:
    """Open a transaction that is prepared for the statements; one of the caller is left as it is."""
    block = transaction(connection)
    async with block as opened:
        dialect = dialect_of(opened)
        begin = sql.BEGIN[dialect.language]
        # Nothing is locked only to read; and a transaction of the caller stays as it is.
        if begin and not block.nested and not (reads and dialect.has_one_connection):
            await dialect.script(opened, begin)
        yield opened


async def _run(
    connection: BaseDBAsyncClient, statement: Statement, **values: object
) -> list[dict[str, Any]]:
    return await run_statement(connection, statement, values)


async def _count(connection: BaseDBAsyncClient, statement: Statement, **values: object) -> int:
    return await count_changed(connection, statement, values)


def _ids(rows: Sequence[Claimed]) -> list[int]:
    return [row.id for row in rows]


def _claimed(row: Mapping[str, Any]) -> Claimed:
    payload, event_id, unreadable = row["payload"], row["event_id"], None
    try:
        event_id = event_id if isinstance(event_id, UUID) else UUID(event_id)
        payload = json.loads(payload) if isinstance(payload, str | bytes) else payload
        if not isinstance(payload, dict):
            raise TypeError("the payload is no JSON object")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # Of this row alone: what else was claimed with it can be delivered.
        payload, event_id = {}, _NO_ID
        unreadable = f"{type(error).__name__}: {error}"
    return Claimed(
        id=row["id"],
        event_id=event_id,
        event_name=row["event_name"],
        subscription=row["subscription"],
        user_table=row["user_table"],
        subject_id=row["subject_id"],
        payload=payload,
        attempts=row["attempts"],
        unreadable=unreadable,
    )


def _entry(model: type[RowT], row: Mapping[str, Any]) -> RowT:
    try:
        return model._init_from_db(**row)
    except Exception:  # noqa: BLE001 - whatever the fields raise for what people wrote into them
        return model._init_from_db(**{**row, "payload": "{}", "event_id": _NO_ID})
