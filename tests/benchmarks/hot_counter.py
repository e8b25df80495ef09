"""One hot counter: all users behind one address, and one account that logs in many times at once.

    python -m tests.benchmarks.hot_counter [seconds]

Real processes on PostgreSQL, which begin at the same moment.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tortoise.context import TortoiseContext

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import User
from tests.support.database import MODULES, database
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthService,
    RequestContext,
    TortoiseAuthError,
)
from tortoise_auth.testing import cheap_hasher

_USERS = 200
_AT_ONCE = 16
_OF_ONE_ACCOUNT = 64


async def child(config: dict[str, Any], number: int, seconds: float, times: int) -> None:
    """Log in for *seconds*, or one account *times* times at once; print the outcomes."""
    async with TortoiseContext() as context:
        await context.init(config=config)
        auth = AuthService(User, AuthConfig(secret=SECRET))
        outcomes: Counter[str] = Counter()

        async def attempt(address: str) -> None:
            try:
                await auth.login(address, PASSWORD, context=RequestContext(ip="203.0.113.7"))
                outcomes["in"] += 1
            except TortoiseAuthError as error:
                outcomes[error.code] += 1

        async def attempts(place: int, ends: float) -> None:
            while time.monotonic() < ends:
                await attempt(f"user{place % _USERS}@example.com")
                place += 1

        await attempt(f"user{number}@example.com")
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        outcomes.clear()
        began = time.monotonic()
        if times:
            await asyncio.gather(*(attempt("user0@example.com") for _ in range(times)))
        else:
            places = (number * 97 + each * 11 for each in range(_AT_ONCE))
            await asyncio.gather(*(attempts(each, began + seconds) for each in places))
        print(json.dumps({**outcomes, "seconds": time.monotonic() - began}), flush=True)


async def run(config: dict[str, Any], processes: int, seconds: float, times: int) -> None:
    """Start the children, let them begin together, and add up what they print."""
    children = []
    for number in range(processes):
        arguments = [json.dumps(config), str(number), str(seconds), str(times // processes)]
        children.append(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.benchmarks.hot_counter", "child", *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        )
    for each in children:
        assert each.stdout is not None
        assert await each.stdout.readline() == b"ready\n"
    answers = await asyncio.gather(*(each.communicate(b"go\n") for each in children))
    outcomes: Counter[str] = Counter()
    for out, _ in answers:
        outcomes.update(json.loads(out))
    took = outcomes.pop("seconds") / processes
    what = f"{times} of one account" if times else f"{outcomes['in'] / took:.0f} a second"
    print(f"{processes} processes: {what}, {took:.2f} s, {dict(outcomes)}")


async def main(seconds: float) -> None:
    """Measure with one, two and four processes."""
    AbstractUser.password_hasher = cheap_hasher()
    async with database("postgres", Path(tempfile.mkdtemp()), maxsize=20) as context:
        for number in range(_USERS):
            await User.create_user(email=f"user{number}@example.com", password=PASSWORD)
        schema = context.connections.get("postgres").schema  # type: ignore[attr-defined]
        url = f"{_url()}?schema={schema}&maxsize=20"
        config = {
            "connections": {"postgres": url},
            "apps": {"models": {"models": MODULES, "default_connection": "postgres"}},
        }
        for times in (0, _OF_ONE_ACCOUNT):
            for processes in (1, 2, 4):
                await run(config, processes, seconds, times)


def _url() -> str:
    from tests.support.services import POSTGRES_URL  # noqa: PLC0415

    return POSTGRES_URL


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        AbstractUser.password_hasher = cheap_hasher()
        asyncio.run(
            child(json.loads(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
        )
    else:
        asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 5))
