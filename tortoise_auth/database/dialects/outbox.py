"""The statements of the outbox.

None of them leaves a choice to the planner. A table that is empty most of the time has statistics to
match, and the plan that is best for an empty table takes seconds when there is a backlog. So each
statement reads one index from a given place, row by row, and stops. SQLite and MariaDB are told
which index (``INDEXED BY``, ``FORCE INDEX``). PostgreSQL may neither sort nor read a whole table in
these transactions, and the comparison of all columns of a line leaves it one index that is in the
right order.
"""

from __future__ import annotations

import re

from tortoise_auth.database.dialects import outbox_mysql as mysql
from tortoise_auth.database.dialects.dialect import Statement

CHANNEL = "tortoise_auth_outbox"
"""Relays of other processes are woken through it, where the database can."""


def _everywhere(text: str) -> dict[str, str]:
    """Return a statement of one text, with what each database writes for the marks in it."""
    sqlite = re.sub(r"\[ids in \w+\]", "id IN (SELECT value FROM json_each({ids}))", text)
    sqlite = re.sub(r"\[by (\w+)\]", r"INDEXED BY \1", sqlite.replace(" [by key]", ""))
    sqlite = sqlite.replace("[payload]", "payload")
    postgres = re.sub(r"\[ids in (\w+)\]", _BY_KEY_ON_POSTGRES, text)
    postgres = re.sub(r" \[by \w+\]", "", postgres)
    # As text: psycopg reads JSON by itself, and one row that it cannot read would fail all of them.
    postgres = postgres.replace("[payload]", "payload::text AS payload")
    plain = {"sqlite": sqlite.replace("[for share]", "")}
    plain["postgres"] = postgres.replace("[for share]", "FOR SHARE SKIP LOCKED")
    return {
        **{
            name: re.sub(r"\[delete from (\w+)\]", r"DELETE FROM \1", each)
            for name, each in plain.items()
        },
        "mysql": mysql.written(text),
    }


# Not id = ANY(...): the other indexes have an id as well, and for a table that was emptied and is
# full again PostgreSQL may read all of one. Only the primary key is in the order of the ids.
_BY_KEY_ON_POSTGRES = r"""ctid = ANY(ARRAY(
    SELECT found.ctid FROM json_array_elements_text({ids}::json) AS given (id)
    CROSS JOIN LATERAL (
        SELECT id, ctid FROM \1 WHERE id >= given.id::bigint ORDER BY id LIMIT 1
    ) AS found
    WHERE found.id = given.id::bigint
))"""

ROW = (
    "({{event_id}}, {{event_name}}, {{{name}}}, {{user_table}}, {{subject_id}}, {{payload}}, "
    "{{at}}, {{at}}, 0)"
)
"""One row of `WRITE`, for a parameter that is the name of the subscription."""

WRITE = """
INSERT INTO tortoise_auth_outbox (
    event_id, event_name, subscription, user_table, subject_id, payload, created_at, due_at, attempts
) VALUES {rows}
"""

BEGIN = {
    "sqlite": "DELETE FROM tortoise_auth_outbox WHERE id IS NULL",
    "postgres": """
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off; SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_incremental_sort = off; SET LOCAL jit = off
""",
    "mysql": "",
}
"""Begins a transaction, in which each statement sees what was committed before it.

SQLite begins with a lock: a transaction that reads before it writes fails if another process has
written.
"""

_MINE = "[ids in tortoise_auth_outbox] AND claimed_by = {holder}"

CLAIM: Statement = {
    **_everywhere("""
UPDATE tortoise_auth_outbox
SET due_at = {lease_ends}, claimed_by = {holder}, attempts = attempts + 1
WHERE [ids in tortoise_auth_outbox]
RETURNING id, event_id, event_name, subscription, user_table, subject_id, [payload], attempts
"""),
    "mysql": mysql.claim,
}
"""Gives rows to a relay."""

HOLD = _everywhere(
    "SELECT id FROM tortoise_auth_outbox [by key] WHERE [ids in tortoise_auth_outbox] [for share]"
)
"""Locks rows, as far as they are there and not locked elsewhere."""

SET_ASIDE = _everywhere(
    "UPDATE tortoise_auth_outbox [by key] SET due_at = NULL WHERE [ids in tortoise_auth_outbox]"
)
"""Takes rows out of those that are due, because each is behind another row of its line."""

DELETE = _everywhere(f"[delete from tortoise_auth_outbox] WHERE {_MINE}")

RELEASE = _everywhere(f"""
UPDATE tortoise_auth_outbox [by key] SET due_at = {{due_at}}, attempts = attempts - 1 WHERE {_MINE}
""")

RESCHEDULE = _everywhere(f"""
UPDATE tortoise_auth_outbox [by key] SET due_at = {{due_at}}, last_error = {{error}} WHERE {_MINE}
""")

_KEPT = "id, event_id, event_name, subscription, user_table, subject_id, payload, created_at, last_error"

DIE = _everywhere(f"""
INSERT INTO tortoise_auth_dead_letter ({_KEPT}, attempts, dead_at)
SELECT {_KEPT}, attempts, {{at}} FROM tortoise_auth_outbox [by key] WHERE {_MINE}
""")
"""Copies a row to the dead letters."""

LOCK_DEAD = _everywhere(
    "UPDATE tortoise_auth_dead_letter [by key] SET attempts = 0 WHERE [ids in tortoise_auth_dead_letter]"
)

REVIVE = _everywhere(f"""
INSERT INTO tortoise_auth_outbox ({_KEPT}, attempts, due_at)
SELECT {_KEPT}, 0, {{now}} FROM tortoise_auth_dead_letter [by key] WHERE [ids in tortoise_auth_dead_letter]
""")
"""Copies dead letters back, due and with all attempts before them."""

DELETE_DEAD = _everywhere(
    "[delete from tortoise_auth_dead_letter] WHERE [ids in tortoise_auth_dead_letter]"
)

RESTART = _everywhere("""
UPDATE tortoise_auth_outbox [by key] SET due_at = {now}, attempts = 0, claimed_by = NULL
WHERE [ids in tortoise_auth_outbox]
""")

OLDEST_DEAD = _everywhere("""
SELECT id FROM tortoise_auth_dead_letter [by tortoise_auth_dead_letter_at]
WHERE dead_at <= {until} ORDER BY dead_at, id LIMIT {limit}
""")

# Each step finds the next pair by the index, however many rows the last one has.
_FIRST_PAIR = """
SELECT subscription, user_table FROM (
    SELECT subscription, user_table FROM tortoise_auth_outbox [by tortoise_auth_outbox_due]
    ORDER BY subscription, user_table, due_at, id LIMIT 1
) AS first
"""

_PAIRS_ON_SQLITE = f"""
WITH RECURSIVE pair (subscription, user_table) AS (
    {_FIRST_PAIR}
    UNION ALL
    SELECT following.subscription, following.user_table
    FROM pair CROSS JOIN tortoise_auth_outbox AS following ON following.id = COALESCE((
        SELECT id FROM tortoise_auth_outbox INDEXED BY tortoise_auth_outbox_due
        WHERE subscription = pair.subscription AND user_table > pair.user_table
        ORDER BY user_table, due_at, id LIMIT 1
    ), (
        SELECT id FROM tortoise_auth_outbox INDEXED BY tortoise_auth_outbox_due
        WHERE subscription > pair.subscription
        ORDER BY subscription, user_table, due_at, id LIMIT 1
    ))
)
"""

_PAIRS_ON_POSTGRES = f"""
WITH RECURSIVE pair (subscription, user_table) AS (
    {_FIRST_PAIR}
    UNION ALL
    SELECT following.subscription, following.user_table
    FROM pair CROSS JOIN LATERAL (
        SELECT subscription, user_table FROM tortoise_auth_outbox
        WHERE (subscription, user_table) > (pair.subscription, pair.user_table)
        ORDER BY subscription, user_table, due_at, id LIMIT 1
    ) AS following
)
"""

_COUNTS = """
SELECT subscription, (
    SELECT COUNT(*) FROM (
        SELECT 1 FROM tortoise_auth_outbox AS entry [by tortoise_auth_outbox_due]
        WHERE entry.subscription = pair.subscription AND entry.user_table = pair.user_table
        ORDER BY entry.due_at, entry.id LIMIT {limit}
    ) AS counted
) AS waiting, (
    SELECT COUNT(*) FROM (
        SELECT 1 FROM tortoise_auth_outbox AS entry [by tortoise_auth_outbox_due]
        WHERE entry.subscription = pair.subscription AND entry.user_table = pair.user_table
        AND entry.due_at <= {now} ORDER BY entry.due_at, entry.id LIMIT {limit}
    ) AS counted
) AS due FROM pair
"""

COUNTS: Statement = {
    "sqlite": _everywhere(_PAIRS_ON_SQLITE + _COUNTS)["sqlite"],
    "postgres": _everywhere(_PAIRS_ON_POSTGRES + _COUNTS)["postgres"],
    "mysql": mysql.counts,
}
"""Counts what waits and what is due for each pair of subscription and user table, up to a limit."""

_OVERDUE_ON_SQLITE = """
SELECT first.id, first.subscription, first.due_at
FROM pair CROSS JOIN tortoise_auth_outbox AS first ON first.id = (
    SELECT id FROM tortoise_auth_outbox AS entry INDEXED BY tortoise_auth_outbox_due
    WHERE entry.subscription = pair.subscription AND entry.user_table = pair.user_table
    AND entry.due_at <= {now} ORDER BY entry.due_at, entry.id LIMIT 1
)
"""

_OVERDUE_ON_POSTGRES = """
SELECT first.id, first.subscription, first.due_at
FROM pair CROSS JOIN LATERAL (
    SELECT id, subscription, due_at FROM tortoise_auth_outbox AS entry
    WHERE entry.subscription = pair.subscription AND entry.user_table = pair.user_table
    AND entry.due_at <= {now} ORDER BY entry.due_at, entry.id LIMIT 1
) AS first
"""

OVERDUE: Statement = {
    "sqlite": _everywhere(_PAIRS_ON_SQLITE + _OVERDUE_ON_SQLITE)["sqlite"],
    "postgres": _everywhere(_PAIRS_ON_POSTGRES + _OVERDUE_ON_POSTGRES)["postgres"],
    "mysql": mysql.overdue,
}
"""Finds the row of each pair that has been due for longest."""

COUNT_DEAD = _everywhere("""
SELECT COUNT(*) AS dead FROM (SELECT 1 FROM tortoise_auth_dead_letter LIMIT {limit}) AS counted
""")

_SHOWN = f"{_KEPT.replace('payload', '[payload]')}, attempts"

WAITING = _everywhere(f"""
SELECT {_SHOWN}, due_at, claimed_by FROM tortoise_auth_outbox [by key] ORDER BY id LIMIT {{limit}}
""")

DEAD = _everywhere(f"""
SELECT {_SHOWN}, dead_at FROM tortoise_auth_dead_letter [by tortoise_auth_dead_letter_at]
ORDER BY dead_at, id LIMIT {{limit}}
""")

_DUE_ON_SQLITE = """
SELECT due.id, (
    SELECT earlier.id FROM tortoise_auth_outbox AS earlier INDEXED BY tortoise_auth_outbox_line
    WHERE earlier.subscription = due.subscription AND earlier.user_table = due.user_table
    AND earlier.subject_id = due.subject_id AND earlier.id < due.id
    ORDER BY earlier.id DESC LIMIT 1
) AS behind
FROM json_each({pairs}) AS pair CROSS JOIN tortoise_auth_outbox AS due
WHERE due.id IN (
    SELECT id FROM tortoise_auth_outbox INDEXED BY tortoise_auth_outbox_due
    WHERE subscription = json_extract(pair.value, '$.subscription')
    AND user_table = json_extract(pair.value, '$.user_table')
    AND due_at <= {now} ORDER BY due_at, id LIMIT {limit}
)
LIMIT {limit}
"""

# A row without a subject must not be compared: PostgreSQL would read all of them.
_DUE_ON_POSTGRES = """
SELECT due.id, before.id AS behind
FROM json_to_recordset({pairs}::json) AS pair (subscription text, user_table text)
CROSS JOIN LATERAL (
    SELECT id, subscription, user_table, subject_id FROM tortoise_auth_outbox
    WHERE subscription = pair.subscription AND user_table = pair.user_table AND due_at <= {now}
    ORDER BY due_at, id LIMIT {limit} FOR UPDATE SKIP LOCKED
) AS due
LEFT JOIN LATERAL (
    SELECT id, subscription, user_table, subject_id FROM tortoise_auth_outbox
    WHERE due.subject_id IS NOT NULL AND (subscription, user_table, subject_id, id)
        < (due.subscription, due.user_table, due.subject_id, due.id)
    ORDER BY subscription DESC, user_table DESC, subject_id DESC, id DESC LIMIT 1
) AS before ON (before.subscription, before.user_table, before.subject_id)
    = (due.subscription, due.user_table, due.subject_id)
LIMIT {limit}
"""

_PROMOTE_ON_SQLITE = """
UPDATE tortoise_auth_outbox SET due_at = created_at WHERE due_at IS NULL AND id IN (
    SELECT later.id FROM json_each({gone}) AS gone CROSS JOIN tortoise_auth_outbox AS later
    WHERE later.id IN (
        SELECT id FROM tortoise_auth_outbox INDEXED BY tortoise_auth_outbox_line
        WHERE subscription = json_extract(gone.value, '$.subscription')
        AND user_table = json_extract(gone.value, '$.user_table')
        AND subject_id = json_extract(gone.value, '$.subject_id')
        AND id > json_extract(gone.value, '$.id')
        ORDER BY id LIMIT {several}
    )
)
"""

# No plain IS NULL, for which the index on due_at could be read.
_PROMOTE_ON_POSTGRES = """
UPDATE tortoise_auth_outbox SET due_at = created_at
WHERE CASE WHEN due_at IS NULL THEN 1 END = 1 AND ctid = ANY(ARRAY(
    SELECT later.ctid
    FROM json_to_recordset({gone}::json)
        AS gone (subscription text, user_table text, subject_id text, id bigint)
    CROSS JOIN LATERAL (
        SELECT ctid, subscription, user_table, subject_id FROM tortoise_auth_outbox
        WHERE (subscription, user_table, subject_id, id)
            > (gone.subscription, gone.user_table, gone.subject_id, gone.id)
        ORDER BY subscription, user_table, subject_id, id LIMIT {several}
    ) AS later
    WHERE (later.subscription, later.user_table, later.subject_id)
        = (gone.subscription, gone.user_table, gone.subject_id)
))
"""

DUE: Statement = {"sqlite": _DUE_ON_SQLITE, "postgres": _DUE_ON_POSTGRES, "mysql": mysql.due}
"""Finds and locks rows that are due, by pairs of subscription and user table.

``behind`` is the row before it in its line. Rows that are locked elsewhere are left out.
"""

PROMOTE: Statement = {
    "sqlite": _PROMOTE_ON_SQLITE,
    "postgres": _PROMOTE_ON_POSTGRES,
    "mysql": mysql.promote,
}
"""Makes the rows that come next in the lines of rows that are gone due again, in their old place.

One would do. Several can be claimed together when a long line goes on.
"""
