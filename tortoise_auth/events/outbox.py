"""Durable rows: written with the change they tell of, claimed by relays, retried, buried.

A row stands for one event and one durable subscription. It is there if and only if the change is,
because both are written in one transaction; it goes when the handler has succeeded.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.expressions import F
from tortoise.functions import Count, Min
from tortoise.queryset import QuerySet

from tortoise_auth.database import notify, run_statement, translates_database_errors
from tortoise_auth.events.catalog import Event, UserEvent
from tortoise_auth.events.subscription import Subscription
from tortoise_auth.models import OutboxEntry, user_table

CHANNEL = "tortoise_auth_outbox"
"""On PostgreSQL, relays of other processes are woken through it."""

AFTER_COMMIT = "*after-commit*"
"""In the place of a subscription: the mark of a background delivery that waits for a commit.

Whether a transaction of the caller was really kept, and the savepoint in it, only the database can
tell: by whether the mark is there afterwards. No relay claims marks.
"""

_WRITE = """
INSERT INTO tortoise_auth_outbox (
    event_id, event_name, subscription, user_table, subject_id, payload, created_at, due_at, attempts
) VALUES {rows}
"""

_ROW = "({{event_id}}, {{event_name}}, {{{name}}}, {{user_table}}, {{subject_id}}, {{payload}}, {{at}}, {{at}}, 0)"

# A row is ready if it is due and so is every row of its subject before it: the events of one user
# arrive in order however many relays there are. Rows without a subject wait for nobody. Everybody's
# first row comes before anybody's second.
#
# Of the rows that were ready when the statement began, another relay may have been faster with some:
# those are passed over, and so is whatever is behind them.
#
# Each step is made once, and none joins the table with itself or leaves a choice of indexes. A table
# that is empty most of the time has statistics to match, and the plan that is best for an empty
# table would take hours when there is a backlog.
_CLAIM = """
WITH earliest AS MATERIALIZED (
    SELECT id, subscription, user_table, subject_id, due_at,
        CASE WHEN subject_id IS NULL THEN id END AS alone
    FROM tortoise_auth_outbox
    WHERE due_at IS NOT NULL AND user_table IN ('', {user_table}) AND subscription IN ({names})
    ORDER BY id LIMIT {window}
), ready AS MATERIALIZED (
    SELECT id, subscription, user_table, subject_id, alone FROM (
        SELECT earliest.*, MAX(due_at) OVER subject AS all_due, ROW_NUMBER() OVER subject AS place
        FROM earliest
        WINDOW subject AS (PARTITION BY subscription, user_table, subject_id, alone ORDER BY id)
    ) AS in_order
    WHERE all_due <= {now} ORDER BY place, id LIMIT {limit}
), mine AS MATERIALIZED (
    SELECT id FROM tortoise_auth_outbox
    WHERE id [[SELECT id FROM ready]] AND COALESCE(due_at, {lease_ends}) <= {now} [skip locked]
), in_order AS MATERIALIZED (
    SELECT ready.id, COUNT(*) OVER subject - COUNT(mine.id) OVER subject AS passed_over
    FROM ready LEFT JOIN mine ON mine.id = ready.id
    WINDOW subject AS (PARTITION BY subscription, user_table, subject_id, alone ORDER BY ready.id)
)
UPDATE tortoise_auth_outbox
SET due_at = {lease_ends}, claimed_by = {holder}, attempts = attempts + 1
WHERE id [[SELECT id FROM in_order WHERE passed_over = 0]]
RETURNING id, event_id, event_name, subscription, subject_id, payload, attempts
"""

_CLAIM_ON_SQLITE = _CLAIM.replace("[[", "IN (").replace("]]", ")").replace("[skip locked]", "")
_CLAIM_ON_POSTGRES = (  # arrays are looked up by the primary key
    _CLAIM.replace("[[", "= ANY(ARRAY(")
    .replace("]]", "))")
    .replace("[skip locked]", "FOR UPDATE SKIP LOCKED")
)

_WINDOW = 10
"""How many times as many rows as may be claimed are looked at, at first."""

_ALL = 1 << 62


@dataclass(frozen=True, slots=True)
class Claimed:
    """A row that a relay has claimed and must deliver before its lease ends."""

    id: int
    event_id: UUID
    event_name: str
    subscription: str
    subject_id: str | None
    payload: Mapping[str, Any]
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxStatus:
    """The outbox in numbers, for people and monitors.

    Attributes:
        waiting: Rows to be delivered, due or backing off or claimed.
        due: Those of them that a relay could claim now.
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
    statement = _WRITE.format(rows=", ".join(_ROW.format(name=name) for name in names))
    if _is_postgres(connection):
        statement = f"WITH written AS ({statement}) SELECT pg_notify('{CHANNEL}', '')"
    await run_statement(
        connection,
        statement,
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


@translates_database_errors
async def mark(connection: BaseDBAsyncClient, event: Event, at: datetime) -> int:
    """Leave a mark in the transaction of *connection*; return its id, for `take_mark`."""
    # SQLite gives the id of a row that was rolled back to the next one: the mark of one delivery
    # must not be taken for that of another.
    mark_id = -1 - secrets.randbits(62)
    await OutboxEntry.create(
        id=mark_id,
        event_id=event.id,
        event_name=event.name,
        subscription=AFTER_COMMIT,
        payload={},
        created_at=at,
        using_db=connection,
    )
    return mark_id


async def take_mark(connection: BaseDBAsyncClient, mark_id: int) -> bool:
    """Remove a mark; false if it is not there, because the transaction was not kept."""
    return bool(await OutboxEntry.filter(id=mark_id).using_db(connection).delete())


async def claim(
    connection: BaseDBAsyncClient,
    *,
    holder: str,
    subscriptions: Sequence[str],
    user_table: str,
    now: datetime,
    lease_ends: datetime,
    limit: int,
) -> list[Claimed]:
    """Take due rows of known subscriptions for one batch of a relay alone, in one statement.

    Returns:
        Up to *limit* rows, oldest first. Those of one subscription and subject must be delivered
        one after the other.
    """
    if not subscriptions:
        return []
    values = {
        "holder": holder,
        "names": list(subscriptions),
        "user_table": user_table,
        "now": now,
        "lease_ends": lease_ends,
        "limit": limit,
    }
    # The first rows of a large backlog do, unless they all wait for a few that back off.
    return await _claim(connection, {**values, "window": limit * _WINDOW}) or await _claim(
        connection, {**values, "window": _ALL}
    )


async def release(
    connection: BaseDBAsyncClient, rows: Sequence[Claimed], holder: str, now: datetime
) -> None:
    """Give rows back that were claimed but not attempted."""
    if rows:
        mine = OutboxEntry.filter(id__in=[row.id for row in rows], claimed_by=holder)
        await mine.using_db(connection).update(due_at=now, attempts=F("attempts") - 1)


async def done(connection: BaseDBAsyncClient, rows: Sequence[Claimed], holder: str) -> None:
    """Remove delivered rows, but those that were claimed anew since."""
    if rows:
        ids = [row.id for row in rows]
        await OutboxEntry.filter(id__in=ids, claimed_by=holder).using_db(connection).delete()


async def postpone(
    connection: BaseDBAsyncClient, row: Claimed, holder: str, *, due_at: datetime, error: str
) -> None:
    """Let a row that failed be claimed again at *due_at*."""
    mine = OutboxEntry.filter(id=row.id, claimed_by=holder).using_db(connection)
    await mine.update(due_at=due_at, last_error=error)


async def bury(
    connection: BaseDBAsyncClient, row: Claimed, holder: str, *, at: datetime, error: str
) -> None:
    """Make a dead letter of a row: kept, visible, delivered no more until somebody says so."""
    mine = OutboxEntry.filter(id=row.id, claimed_by=holder).using_db(connection)
    await mine.update(due_at=None, dead_at=at, last_error=error)


async def status(connection: BaseDBAsyncClient, now: datetime) -> OutboxStatus:
    """Count what is there."""
    waiting = OutboxEntry.filter(due_at__isnull=False).using_db(connection)
    counted = waiting.annotate(rows=Count("id"), oldest=Min("created_at")).group_by("subscription")
    names = await counted.values("subscription", "rows", "oldest")
    oldest = min((each["oldest"] for each in names), default=now)
    return OutboxStatus(
        waiting=sum(each["rows"] for each in names),
        due=await waiting.filter(due_at__lte=now).count(),
        dead=await OutboxEntry.filter(dead_at__isnull=False).using_db(connection).count(),
        oldest_waiting=max(0.0, (now - oldest).total_seconds()),
        subscriptions={each["subscription"]: each["rows"] for each in names},
    )


async def entries(
    connection: BaseDBAsyncClient, *, dead: bool = False, limit: int = 100
) -> list[OutboxEntry]:
    """Return rows, oldest first: those that wait, or the dead letters."""
    which = {"dead_at__isnull": False} if dead else {"due_at__isnull": False}
    return await OutboxEntry.filter(**which).using_db(connection).order_by("id").limit(limit)


async def retry(connection: BaseDBAsyncClient, ids: Sequence[int], now: datetime) -> int:
    """Give dead letters, or rows that back off, a new start; return how many there were."""
    rows = OutboxEntry.filter(id__in=list(ids)).exclude(subscription=AFTER_COMMIT)
    return await _start_again(rows, connection, now)


async def retry_dead(connection: BaseDBAsyncClient, now: datetime) -> int:
    """Give every dead letter a new start; return how many there were."""
    return await _start_again(OutboxEntry.filter(dead_at__isnull=False), connection, now)


async def purge(connection: BaseDBAsyncClient, *, before: datetime) -> int:
    """Delete dead letters, and marks that a crash left behind, from before a time."""
    dead = OutboxEntry.filter(dead_at__isnull=False, dead_at__lt=before)
    left = OutboxEntry.filter(subscription=AFTER_COMMIT, created_at__lt=before)
    return await dead.using_db(connection).delete() + await left.using_db(connection).delete()


async def _start_again(
    rows: QuerySet[OutboxEntry], connection: BaseDBAsyncClient, now: datetime
) -> int:
    changed = await rows.using_db(connection).update(
        due_at=now, dead_at=None, attempts=0, claimed_by=None
    )
    await notify(connection, CHANNEL)
    return changed


async def _claim(connection: BaseDBAsyncClient, values: Mapping[str, Any]) -> list[Claimed]:
    statement = _CLAIM_ON_POSTGRES if _is_postgres(connection) else _CLAIM_ON_SQLITE
    rows = await run_statement(connection, statement, values)
    return sorted((_claimed(row) for row in rows), key=lambda row: row.id)


def _is_postgres(connection: BaseDBAsyncClient) -> bool:
    return connection.capabilities.dialect == "postgres"


def _claimed(row: Mapping[str, Any]) -> Claimed:
    payload = row["payload"]
    event_id = row["event_id"]
    return Claimed(
        id=row["id"],
        event_id=event_id if isinstance(event_id, UUID) else UUID(event_id),
        event_name=row["event_name"],
        subscription=row["subscription"],
        subject_id=row["subject_id"],
        payload=json.loads(payload) if isinstance(payload, str) else payload,
        attempts=row["attempts"],
    )
