"""What of the outbox takes several statements on MariaDB and MySQL.

They have no RETURNING for an UPDATE, no LATERAL both of them, and no subquery on the table that is
written. Values are written out, with a UNION of a SELECT for each, because only then is an index
read from where it is to begin. And each SELECT by an index takes a column (``attempts``) that the
index does not have: of what stands in the index alone MariaDB may compare only the first columns,
and then reads a whole line, or every row that is behind another one.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence

from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.database.dialects.dialect import Dialect, Row, Values

_TABLE = "tortoise_auth_outbox"
_BY_DUE = "FORCE INDEX (tortoise_auth_outbox_due)"
_BY_LINE = "FORCE INDEX (tortoise_auth_outbox_line)"
_BY_KEY = "FORCE INDEX (PRIMARY)"
_OF_PAIR = "subscription = {subscription} AND user_table = {user_table}"


def written(text: str) -> str:
    """Return a statement with what these databases write for the marks in it."""
    text = re.sub(r"\[ids in \w+\]", "id IN ({ids})", text.replace("[by key]", _BY_KEY))
    # DELETE of one table takes no index; the form for several does.
    text = re.sub(r"\[delete from (\w+)\]", rf"DELETE \1 FROM \1 {_BY_KEY}", text)
    text = text.replace("[payload]", "payload")
    text = re.sub(r"\[by (\w+)\]", r"FORCE INDEX (\1)", text)
    # MySQL has FOR SHARE and MariaDB LOCK IN SHARE MODE. A row that two hold at once is skipped by
    # the second one, and looked at again.
    return text.replace("[for share]", "FOR UPDATE SKIP LOCKED")


async def due(dialect: Dialect, connection: BaseDBAsyncClient, values: Values) -> list[Row]:
    """Find and lock rows that are due, then look for the row before each in its line."""
    rows: list[Row] = []
    for pair in values["pairs"]:
        left = values["limit"] - len(rows)
        if left > 0:
            rows += await dialect.rows(connection, _DUE, {**values, **pair, "left": left})
    with_subject = [row for row in rows if row["subject_id"] is not None]
    earlier = await _beside(connection, with_subject, "id < %s ORDER BY id DESC LIMIT 1")
    behind = {each["beside"]: each["id"] for each in earlier}
    return [{"id": row["id"], "behind": behind.get(row["id"])} for row in rows]


_DUE = f"""
SELECT id, subscription, user_table, subject_id FROM {_TABLE} {_BY_DUE}
WHERE {_OF_PAIR} AND due_at <= {{now}} ORDER BY due_at, id LIMIT {{left}} FOR UPDATE SKIP LOCKED
"""


async def claim(dialect: Dialect, connection: BaseDBAsyncClient, values: Values) -> list[Row]:
    """Give rows, which `due` has locked, to a relay."""
    await dialect.changed(connection, _CLAIM, values)
    return await dialect.rows(connection, _CLAIMED, values)


_CLAIM = f"""
UPDATE {_TABLE} {_BY_KEY}
SET due_at = {{lease_ends}}, claimed_by = {{holder}}, attempts = attempts + 1 WHERE id IN ({{ids}})
"""
_CLAIMED = f"""
SELECT id, event_id, event_name, subscription, user_table, subject_id, payload, attempts
FROM {_TABLE} {_BY_KEY} WHERE id IN ({{ids}})
"""


async def promote(dialect: Dialect, connection: BaseDBAsyncClient, values: Values) -> list[Row]:
    """Make the rows that come next in the lines of rows that are gone due again."""
    limit = f"id > %s ORDER BY id LIMIT {values['several']:d}"
    following = await _beside(connection, values["gone"], limit)
    ids = [each["id"] for each in following]
    if ids:
        await dialect.changed(connection, _PROMOTE, {"ids": ids})
    return []


_PROMOTE = f"""
UPDATE {_TABLE} {_BY_KEY} SET due_at = created_at WHERE id IN ({{ids}}) AND due_at IS NULL
"""


async def counts(dialect: Dialect, connection: BaseDBAsyncClient, values: Values) -> list[Row]:
    """Count what waits and what is due for each pair of subscription and user table."""
    counted = []
    async for pair in _pairs(dialect, connection):
        (waiting,) = await dialect.rows(connection, _WAITING, {**values, **pair})
        (due,) = await dialect.rows(connection, _WAITING_DUE, {**values, **pair})
        counted.append({**pair, "waiting": waiting["counted"], "due": due["counted"]})
    return counted


async def overdue(dialect: Dialect, connection: BaseDBAsyncClient, values: Values) -> list[Row]:
    """Find the row of each pair that has been due for longest."""
    return [
        row
        async for pair in _pairs(dialect, connection)
        for row in await dialect.rows(connection, _OVERDUE, {**values, **pair})
    ]


async def _pairs(dialect: Dialect, connection: BaseDBAsyncClient) -> AsyncIterator[Row]:
    """Find the pairs that have rows, each by a look into the index."""
    found = await dialect.rows(connection, _FIRST_PAIR, {})
    while found:
        # The next user table, else the next subscription: in whatever order the two came.
        subscription, table = min((row["subscription"], row["user_table"]) for row in found)
        pair = {"subscription": subscription, "user_table": table}
        yield pair
        found = await dialect.rows(connection, _NEXT_PAIR, pair)


_PAIR = f"SELECT subscription, user_table, attempts FROM {_TABLE} {_BY_DUE}"
_FIRST_PAIR = f"{_PAIR} ORDER BY subscription, user_table, due_at, id LIMIT 1"
_NEXT_PAIR = f"""
({_PAIR} WHERE subscription = {{subscription}} AND user_table > {{user_table}}
    ORDER BY user_table, due_at, id LIMIT 1)
UNION ALL
({_PAIR} WHERE subscription > {{subscription}} ORDER BY subscription, user_table, due_at, id LIMIT 1)
"""
_ONE_BY_ONE = f"SELECT COUNT(attempts) AS counted FROM (SELECT attempts FROM {_TABLE} {_BY_DUE} WHERE {_OF_PAIR}"
_WAITING = f"{_ONE_BY_ONE} LIMIT {{limit}}) AS entry"
_WAITING_DUE = f"{_ONE_BY_ONE} AND due_at <= {{now}} LIMIT {{limit}}) AS entry"
_OVERDUE = f"""
SELECT id, subscription, due_at, attempts FROM {_TABLE} {_BY_DUE}
WHERE {_OF_PAIR} AND due_at <= {{now}} ORDER BY due_at, id LIMIT 1
"""


async def _beside(connection: BaseDBAsyncClient, rows: Sequence[Row], condition: str) -> list[Row]:
    """Return the ids of rows in the same lines, each with the id of the one ``beside`` it."""
    if not rows:
        return []
    one = (
        f"(SELECT %s AS beside, id, attempts FROM {_TABLE} {_BY_LINE} WHERE "
        f"subscription = %s AND user_table = %s AND subject_id = %s AND {condition})"
    )
    names = ("id", "subscription", "user_table", "subject_id", "id")
    return await connection.execute_query_dict(
        " UNION ALL ".join([one] * len(rows)), [row[name] for row in rows for name in names]
    )
