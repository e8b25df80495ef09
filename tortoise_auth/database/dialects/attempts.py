"""The statements of the throttle.

Each decides and counts at once: whatever runs at the same moment waits for the row, and then sees it
as it is. The numbers in brackets come from the settings.
"""

from __future__ import annotations

from collections.abc import Mapping

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.exceptions import IntegrityError

from tortoise_auth.database.dialects.dialect import Dialect, Row, Statement, Values

# `count` begins anew after a quiet time; `failures` never do, they end with a success or the lock.
# `in_flight` is forgotten if none has begun for a minute: the processes were killed. `counted_at`
# does not go back by less than [skew], or the clocks of two machines would restart each other's
# pauses. MariaDB sets one column after the other and reads what is set already, so `count`,
# `in_flight` and `previous_at` come before what they are computed from.
_COUNTED = """
count = CASE WHEN [elapsed] >= [reset_after] THEN 0 ELSE [old]count END + [limited],
failures = [failures],
in_flight = CASE WHEN [decided] THEN 1 ELSE [old]in_flight + 1 END,
previous_at = CASE WHEN [limited] = 1 THEN [old]counted_at ELSE [old]previous_at END,
counted_at = CASE WHEN [limited] = 1 AND ([elapsed] > 0 OR [elapsed] < -[skew])
THEN {now} ELSE [old]counted_at END,
reserved_at = {now}
"""
# Shifts are of BIGINT and end at [doublings]: microseconds times a power of two leave 32 bits soon,
# and 64 in the end.
_GRANTED = """
([fails] = 0 OR [old]failures < [max_failures] OR [decided])
AND ([limited] = 0 OR [old]count < [free]
OR [elapsed] >= CASE WHEN [old]count - [free] >= [doublings] THEN [max_delay]
ELSE [shifted] END)
"""
_NEW = "([key], count, failures, in_flight, counted_at, previous_at, reserved_at)"
_FIRST = "({key}, [limited], [fails], 1, {now}, {now}, {now})"
_UPSERT = f"INSERT INTO tortoise_auth_attempts AS old {_NEW} VALUES {_FIRST} ON CONFLICT ([key]) DO UPDATE SET {_COUNTED}"
_RETURNING = "RETURNING failures, counted_at"

_SHARED = {
    "decided": "([old]in_flight = 0 OR ABS({now} - [old]reserved_at) >= [undecided])",
    "elapsed": "({now} - [old]counted_at)",
}
_SQL = {
    **_SHARED,
    "failures": "[old]failures + [fails]",
    "shifted": "CAST([initial_delay] AS BIGINT) << ([old]count - [free])",
    "old": "old.",
    "key": "key",
}
_MYSQL = {
    **_SHARED,
    # Kept for the connection, and sent with the answer: a row is counted and read in one statement.
    # Plus one, because 0 says that no row was updated.
    "failures": "LAST_INSERT_ID([old]failures + [fails] + 1) - 1",
    # `count` is counted already where `failures` is set, but not in a condition.
    "shifted": "CAST(CAST([initial_delay] AS UNSIGNED) << ([old]count - [free]) AS SIGNED)",
    "old": "",
    "key": "`key`",
}


def take(numbers: Mapping[str, int]) -> Statement:
    """Return the statement that counts an attempt and returns ``failures, counted_at``.

    It returns no row, and writes none, if the attempt is not granted. On MariaDB and MySQL
    ``counted_at`` is the time of the attempt, even if the clock of another machine is ahead.

    Args:
        numbers: The settings, for the names in brackets.
    """
    upsert = _numbered(f"{_UPSERT} WHERE {_GRANTED} {_RETURNING}", _SQL, numbers)
    update = _numbered(
        f"UPDATE tortoise_auth_attempts SET {_COUNTED} WHERE [key] = {{key}} AND {_GRANTED}",
        _MYSQL,
        numbers,
    )
    insert = _numbered(
        f"INSERT INTO tortoise_auth_attempts {_NEW} VALUES {_FIRST}", _MYSQL, numbers
    )

    async def update_or_insert(
        dialect: Dialect, connection: BaseDBAsyncClient, values: Values
    ) -> list[Row]:
        failures = await connection.execute_insert(*dialect.placed(update, values)) - 1
        if failures < 0:
            try:
                # No INSERT IGNORE, for which aiomysql prints a warning.
                await dialect.changed(connection, insert, values)
            except IntegrityError:
                return []
            failures = numbers["fails"]
        return [{"failures": failures, "counted_at": values["now"]}]

    return {"sqlite": upsert, "postgres": upsert, "mysql": update_or_insert}


def take_again(numbers: Mapping[str, int]) -> Statement:
    """Return the statement that counts an attempt again, whatever others have done meanwhile.

    For a database on which attempts are counted in a transaction of the caller, which is SQLite.
    """
    return {"sqlite": _numbered(_UPSERT, _SQL, numbers)}


def _numbered(text: str, names: Mapping[str, str], numbers: Mapping[str, int]) -> str:
    for name, written in (*names.items(), *((name, str(each)) for name, each in numbers.items())):
        text = text.replace(f"[{name}]", written)
    return text


def _by_key(text: str) -> Statement:
    plain = f"UPDATE tortoise_auth_attempts SET {text}"
    return {
        "sqlite": plain.replace("[key]", "key"),
        "postgres": plain.replace("[key]", "key"),
        "mysql": plain.replace("[key]", "`key`"),
    }


# CASE, because SQLite calls it MAX(a, b) and PostgreSQL GREATEST. The time is set back only if no
# other attempt was counted since, which may have begun a pause of its own.
GIVE_BACK = _by_key("""
count = CASE WHEN count > 0 THEN count - {limited} ELSE 0 END,
failures = CASE WHEN failures > 0 THEN failures - 1 ELSE 0 END,
in_flight = CASE WHEN in_flight > 0 THEN in_flight - 1 ELSE 0 END,
counted_at = CASE WHEN counted_at = {at} THEN previous_at ELSE counted_at END
WHERE [key] = {key}
""")
# Not to zero: attempts in flight stay counted, or a login would make each of them a free guess.
RESET = _by_key("""
count = CASE WHEN in_flight > 1 THEN in_flight - 1 ELSE 0 END,
failures = CASE WHEN failures > 0 AND in_flight > 1 THEN in_flight - 1 ELSE 0 END,
in_flight = CASE WHEN in_flight > 1 THEN in_flight - 1 ELSE 0 END
WHERE [key] = {key}
""")
DECIDE = _by_key("in_flight = in_flight - 1 WHERE [key] = {key} AND in_flight > 0")
