"""Does the time of a refused login reveal which accounts exist? A measurement, not a test.

    TORTOISE_AUTH_TIMING=1 python -m tests.security.timing

Reasons are measured in turn, in random order, so that whatever slows the machine down slows all of
them; medians are compared with that of a wrong password. The first login of a process is measured
in processes of its own. A reason passes if its median is within 10 % of that of a wrong password.
That one hash of full cost is computed, whatever the reason, is proven without a clock by
``tests/flows/test_service.py``.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

from tortoise.context import TortoiseContext

from tests.support.app import User
from tortoise_auth import AbstractUser, AuthConfig, AuthenticationError, AuthService, PasswordHasher
from tortoise_auth.models import AttemptCount
from tortoise_auth.passwords import unusable_hash

GATE = "TORTOISE_AUTH_TIMING"
SAMPLES = 120
FIRST_CALLS = 41
DISCARDED = 5
RIGHT, WRONG = "correct horse battery staple", "wrong donkey charger nail"

HASHER = PasswordHasher(memory_cost=19456, time_cost=2, parallelism=1)
"""The least that OWASP recommends: the shape of the default at a fifth of its time."""

CONFIG = {
    "connections": {"default": "sqlite://:memory:"},
    "apps": {"models": {"models": ["tests.support.app", "tortoise_auth.models"]}},
}


@dataclass(frozen=True)
class Case:
    """A reason to refuse a login.

    Attributes:
        typed: The password that is typed.
        stored: What is stored instead of the hash; ``None`` for the hash itself.
        exists: There is such an account.
        is_active: It is open.
    """

    typed: str = WRONG
    stored: str | None = None
    exists: bool = True
    is_active: bool = True


CASES = {
    "wrong password": Case(),
    "unknown": Case(exists=False),
    "inactive": Case(typed=RIGHT, is_active=False),
    "unusable": Case(stored=unusable_hash()),
    "corrupt hash": Case(stored="$argon2id$v=19$m=19456,t=2,p=1$c2FsdA$"),
    "over-long": Case(typed="x" * 100_000),
}


@dataclass(frozen=True)
class Cost:
    """What one login took, in milliseconds."""

    wall: float
    cpu: float


def address(name: str) -> str:
    """Return the address of the account of a case."""
    return f"{name.replace(' ', '.')}@example.com"


@asynccontextmanager
async def service(hashed: str) -> AsyncIterator[AuthService[User]]:
    """Open a database with an account for each case, and the service with its usual throttle."""
    AbstractUser.password_hasher = HASHER
    async with TortoiseContext() as context:
        await context.init(config=CONFIG)
        await context.generate_schemas()
        for name, case in CASES.items():
            if case.exists:
                stored = case.stored or hashed
                await User.create(email=address(name), password=stored, is_active=case.is_active)
        yield AuthService(User, AuthConfig(secret=os.urandom(48)))


async def refuse(auth: AuthService[User], name: str) -> Cost:
    """Let a login be refused, with no earlier attempt counted, and return its cost."""
    await AttemptCount.all().delete()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        await auth.login(address(name), CASES[name].typed)
    except AuthenticationError:
        return Cost((time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000)
    raise RuntimeError(f"{name} was not refused")


async def measure(hashed: str) -> dict[str, list[Cost]]:
    """Return what every case took, measured in turn."""
    costs: dict[str, list[Cost]] = {name: [] for name in CASES}
    async with service(hashed) as auth:
        for _ in range(SAMPLES + DISCARDED):
            for name in random.sample(list(CASES), len(CASES)):
                costs[name].append(await refuse(auth, name))
    return {name: each[DISCARDED:] for name, each in costs.items()}


async def first(name: str, hashed: str) -> None:
    """Print what the first login of this process takes."""
    async with service(hashed) as auth:
        cost = await refuse(auth, name)
    print(cost.wall, cost.cpu)


def first_calls(hashed: str) -> dict[str, list[Cost]]:
    """Return what the first login of a process took, each in a process of its own."""
    costs: dict[str, list[Cost]] = {name: [] for name in CASES}
    for _ in range(FIRST_CALLS):
        for name in random.sample(list(CASES), len(CASES)):
            command = [sys.executable, "-m", "tests.security.timing", name, hashed]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            wall, cpu = map(float, done.stdout.split())
            costs[name].append(Cost(wall, cpu))
    return costs


def table(title: str, costs: dict[str, list[Cost]]) -> bool:
    """Print medians, their ratios to that of a wrong password, and the verdict; return it."""
    wall = {name: median(cost.wall for cost in each) for name, each in costs.items()}
    cpu = {name: median(cost.cpu for cost in each) for name, each in costs.items()}
    usual, usual_cpu = wall["wrong password"], cpu["wrong password"]
    allowed = 0.1 * usual
    print(f"\n{title}\n\n| reason | median, ms | ratio | CPU, ms | ratio | verdict |")
    print("|---|---|---|---|---|---|")
    for name in costs:
        verdict = "same" if abs(wall[name] - usual) <= allowed else "DIFFERENT"
        print(
            f"| {name} | {wall[name]:.1f} | {wall[name] / usual:.3f} "
            f"| {cpu[name]:.1f} | {cpu[name] / usual_cpu:.3f} | {verdict} |"
        )
    return all(abs(each - usual) <= allowed for each in wall.values())


def main() -> None:
    """Measure both, print both tables, and fail if one reason can be distinguished from another."""
    if os.environ.get(GATE) != "1":
        raise SystemExit(f"This takes minutes and wants a quiet machine; set {GATE}=1")
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{os.cpu_count()} cores, load average {load}, {HASHER!r}")
    hashed = asyncio.run(HASHER.hash(RIGHT))
    passed = [
        table(f"{SAMPLES} logins for each reason", asyncio.run(measure(hashed))),
        table(f"The first login of {FIRST_CALLS} processes", first_calls(hashed)),
    ]
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"\nload average at the end {load}")
    raise SystemExit(0 if all(passed) else 1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(first(sys.argv[1], sys.argv[2]))
    else:
        main()
