"""Durable rows: written with the change they belong to, claimed by relays, retried, dead letters.

A row stands for one event and one durable subscription. It is there if and only if the change is,
because both are written in one transaction; it goes when the handler has succeeded.
"""

from __future__ import annotations

import json
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

_WRITE = """
INSERT INTO tortoise_auth_outbox (
    event_id, event_name, subscription, user_table, subject_id, payload, created_at, due_at, attempts
) VALUES {rows}
"""

_ROW = "({{event_id}}, {{event_name}}, {{{name}}}, {{user_table}}, {{subject_id}}, {{payload}}, {{at}}, {{at}}, 0)"

# A row is ready if it is due and so is every row of its subject before it: the events of one user
# arrive in order however many relays there are. Rows without a subject do not wait. The first row of
# every subject comes before the second of any.
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

_ENTRIES = """
SELECT * FROM tortoise_auth_outbox WHERE {column} IS NOT NULL ORDER BY id LIMIT {{limit}}
"""

_WINDOW = 10
"""How many times as many rows as may be claimed are looked at, at first."""

_ALL = 1 << 62
_NO_ID = UUID(int=0)


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
    unreadable: str | None = None
    """Why the row is no event, whatever program reads it; then the payload is empty."""


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


async def delete_delivered(
    connection: BaseDBAsyncClient, rows: Sequence[Claimed], holder: str
) -> None:
    """Delete delivered rows, except those that were claimed again since."""
    if rows:
        ids = [row.id for row in rows]
        await OutboxEntry.filter(id__in=ids, claimed_by=holder).using_db(connection).delete()


async def reschedule(
    connection: BaseDBAsyncClient, row: Claimed, holder: str, *, due_at: datetime, error: str
) -> None:
    """Let a row that failed be claimed again at *due_at*."""
    mine = OutboxEntry.filter(id=row.id, claimed_by=holder).using_db(connection)
    await mine.update(due_at=due_at, last_error=error)


async def dead_letter(
    connection: BaseDBAsyncClient, row: Claimed, holder: str, *, at: datetime, error: str
) -> None:
    """Make a row a dead letter: kept, visible, and not delivered again until it is retried."""
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
    """Return rows, oldest first: those that wait, or the dead letters.

    Of a row that cannot be read the payload is empty and the id of the event is zero.
    """
    statement = _ENTRIES.format(column="dead_at" if dead else "due_at")
    return [_entry(row) for row in await run_statement(connection, statement, {"limit": limit})]


async def retry(connection: BaseDBAsyncClient, ids: Sequence[int], now: datetime) -> int:
    """Give dead letters, or rows that back off, a new start; return how many there were."""
    rows = OutboxEntry.filter(id__in=list(ids))
    return await _start_again(rows, connection, now)


async def retry_dead(connection: BaseDBAsyncClient, now: datetime) -> int:
    """Give every dead letter a new start; return how many there were."""
    return await _start_again(OutboxEntry.filter(dead_at__isnull=False), connection, now)


async def purge(connection: BaseDBAsyncClient, *, before: datetime) -> int:
    """Delete dead letters from before a time; return how many there were."""
    dead = OutboxEntry.filter(dead_at__isnull=False, dead_at__lt=before)
    return await dead.using_db(connection).delete()


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
        subject_id=row["subject_id"],
        payload=payload,
        attempts=row["attempts"],
        unreadable=unreadable,
    )


def _entry(row: Mapping[str, Any]) -> OutboxEntry:
    try:
        return OutboxEntry._init_from_db(**row)
    except Exception:  # noqa: BLE001 - whatever the fields raise for what people wrote into them
        return OutboxEntry._init_from_db(**{**row, "payload": "{}", "event_id": _NO_ID})
