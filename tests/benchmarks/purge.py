"""What a purge of a million rows does to the requests beside it.

python -m tests.benchmarks.purge memory|file|postgres [rows]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import mean, quantiles

from tests.support.accounts import EMAIL, PASSWORD, SECRET, log_in
from tests.support.app import User
from tests.support.database import connection_of, database
from tortoise_auth import AbstractUser, AuthConfig, AuthService
from tortoise_auth.testing import cheap_hasher

_FILL = {
    "session": """
INSERT INTO tortoise_auth_session (id, family_hash, user_table, user_id, session_version, refresh_hash,
    generation, created_at, last_used_at, authentication_methods, refresh_expires_at, expires_at)
{numbers} SELECT {uuid}, 'f' || n, 'app_user', '77', 1, '', 0, {past}, {past}, '', {past}, {past} FROM s
""",
    "attempts": """
INSERT INTO tortoise_auth_attempts (key, count, failures, in_flight, counted_at, previous_at, reserved_at)
{numbers} SELECT 'old ' || n, 1, n % 2, 0, n, n, n FROM s
""",
}
_NUMBERS = "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows})"
_UUID = {
    "postgres": "gen_random_uuid()",
    "sqlite": ("lower(printf('%08x-0000-4000-8000-', n) || substr(hex(randomblob(6)), 1, 12))"),
}


async def measure(call: Callable[[], Awaitable[object]], until: asyncio.Task[int]) -> list[float]:
    """Call again and again, at most for ten seconds; return the milliseconds each took."""
    took: list[float] = []
    ends = time.perf_counter() + 10
    while not until.done() and time.perf_counter() < ends:
        began = time.perf_counter()
        await call()
        took.append((time.perf_counter() - began) * 1e3)
        await asyncio.sleep(0.002)
    return took


async def purge_beside_requests(kind: str, table: str, rows: int) -> None:
    """Fill a table, purge it, and measure beside that."""
    async with database(kind, Path(tempfile.mkdtemp())) as context:
        await User.create_user(email=EMAIL, password=PASSWORD)
        auth = AuthService(User, AuthConfig(secret=SECRET))
        token = (await log_in(auth)).access_token
        text = _FILL[table].format(
            numbers=_NUMBERS.format(rows=rows),
            uuid=_UUID["postgres" if kind == "postgres" else "sqlite"],
            past="'2020-01-01 00:00:00+00:00'",
        )
        await connection_of(context).execute_script(text)
        idle = asyncio.ensure_future(asyncio.sleep(3, 0))
        before = await measure(lambda: auth.authenticate(token), idle)
        purging = asyncio.ensure_future(auth.purge_expired())
        during = await measure(lambda: auth.authenticate(token), purging)
        logins = await measure(lambda: log_in(auth), purging) or [0.0]
        purging.cancel()
        await asyncio.wait([purging])
        print(
            f"{kind} {table} {rows}: authenticate {mean(before):.2f} ms, beside the purge "
            f"{mean(during):.2f} (95 %: {quantiles(during, n=20)[-1]:.2f}, "
            f"longest {max(during):.1f}); login {mean(logins):.1f}, longest {max(logins):.1f}"
        )


async def main(kind: str, rows: int) -> None:
    """Measure both tables."""
    AbstractUser.password_hasher = cheap_hasher()
    for table in _FILL:
        await purge_beside_requests(kind, table, rows)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000))
