"""What a storm of logins costs: promptness of the event loop, throughput, memory.

Run it with ``make bench``, or ``python tests/benchmarks/hashing.py --profile owasp --logins 200``.
It exits with 1 when a target is missed. Other work on the machine shows in every number, so the
load average is printed beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import argon2
from tortoise import Tortoise

from tortoise_auth import AbstractUser, AuthConfig, AuthService, PasswordHasher

ResultT = TypeVar("ResultT")

PASSWORD = "correct horse battery staple"
TICK = 0.001
LEAST_ROUNDS = 4
LEAST_SECONDS = 20
MIB = 1024 * 1024


class User(AbstractUser):
    """The smallest host model."""


@dataclass(frozen=True)
class Profile:
    """Argon2 parameters, and how late the event loop may be under them.

    Attributes:
        memory_cost: KiB.
        p99: Milliseconds; the target for 99 of 100 ticks.
        worst: Milliseconds; the target for every tick.
    """

    memory_cost: int
    time_cost: int
    parallelism: int
    p99: float
    worst: float

    def hasher(self) -> PasswordHasher:
        """Return the library's hasher with these parameters."""
        return PasswordHasher(
            memory_cost=self.memory_cost, time_cost=self.time_cost, parallelism=self.parallelism
        )

    def raw(self) -> argon2.PasswordHasher:
        """Return the equivalent without the library."""
        return argon2.PasswordHasher(
            memory_cost=self.memory_cost, time_cost=self.time_cost, parallelism=self.parallelism
        )


PROFILES = {
    "default": Profile(memory_cost=65536, time_cost=3, parallelism=4, p99=15, worst=60),
    "owasp": Profile(memory_cost=19456, time_cost=2, parallelism=1, p99=5, worst=20),
}


@dataclass(frozen=True)
class Storm:
    """The event loop and the memory while every account logged in at once.

    Attributes:
        lateness: Seconds that each tick came late, in ascending order.
        peak: Bytes of resident memory above the idle process; ``None`` where it cannot be read.
    """

    lateness: list[float]
    peak: int | None


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
        line = f"  {self.what:<36}{self.measured:>9.2f} {self.unit:<4}"
        if self.limit is None:
            return line
        sign, verdict = ">=" if self.more_is_better else "<=", "MISSED" if self.missed else "met"
        return f"{line}  target {sign} {self.limit:g} {self.unit:<4} {verdict}"


@asynccontextmanager
async def host(profile: Profile, logins: int) -> AsyncIterator[AuthService[User]]:
    """Open a service on an SQLite file with as many accounts as there will be logins."""
    hasher = profile.hasher()
    with tempfile.TemporaryDirectory() as folder:
        await Tortoise.init(
            db_url=f"sqlite://{Path(folder) / 'bench.sqlite3'}",
            modules={"models": [__name__, "tortoise_auth.models"]},
        )
        try:
            await Tortoise.generate_schemas()
            hashed = await hasher.hash(PASSWORD)
            await User.bulk_create(
                User(email=email, password=hashed) for email in addresses(logins)
            )
            config = AuthConfig(secret=secrets.token_urlsafe(48))
            yield AuthService(User, config, passwords=hasher)
        finally:
            hasher.close()
            await Tortoise.close_connections()


def addresses(count: int) -> Iterator[str]:
    return (f"user{number}@example.com" for number in range(count))


async def log_in_at_once(auth: AuthService[User], logins: int) -> float:
    """Log every account in; return the logins per second."""
    began = time.perf_counter()
    await asyncio.gather(*(auth.login(email, PASSWORD) for email in addresses(logins)))
    return logins / (time.perf_counter() - began)


async def tick_until(over: asyncio.Event) -> list[float]:
    """Tick every millisecond, and once more when it is over; return how late each tick came."""
    loop, lateness, last = asyncio.get_running_loop(), [], False
    while not last:
        last = over.is_set()
        due = loop.time() + TICK
        await asyncio.sleep(TICK)
        lateness.append(loop.time() - due)
    return sorted(lateness)


async def measure_storm(profile: Profile, logins: int) -> Storm:
    async with host(profile, logins) as auth:
        idle, over = resident_bytes("VmRSS"), asyncio.Event()
        ticker = asyncio.create_task(tick_until(over))
        await log_in_at_once(auth, logins)
        over.set()
        lateness, peak = await ticker, resident_bytes("VmHWM")
        return Storm(lateness, None if idle is None or peak is None else peak - idle)


def resident_bytes(field: str) -> int | None:
    """Return resident memory of this process, now (``VmRSS``) or at most (``VmHWM``)."""
    # ru_maxrss would not do: on Linux a child starts with the maximum of its parent.
    status = Path("/proc/self/status")
    match = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return None if match is None else int(match[1]) * 1024


async def measure_throughput(profile: Profile, logins: int) -> list[tuple[float, float]]:
    """Return pairs of logins per second and bare verifications per second, taken in turn."""
    hashed = profile.raw().hash(PASSWORD)
    pairs: list[tuple[float, float]] = []
    async with host(profile, logins) as auth:
        began = time.perf_counter()
        while len(pairs) < LEAST_ROUNDS or time.perf_counter() - began < LEAST_SECONDS:
            if len(pairs) % 2:  # the order changes in each round
                bare = verify_on_threads(profile, hashed, auth.passwords.threads, logins)
                rate = await log_in_at_once(auth, logins)
            else:
                rate = await log_in_at_once(auth, logins)
                bare = verify_on_threads(profile, hashed, auth.passwords.threads, logins)
            pairs.append((rate, bare))
    return pairs


def verify_on_threads(profile: Profile, hashed: str, threads: int, times: int) -> float:
    """Verify at once on plain threads; return how many a second."""
    raw = profile.raw()
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for verified in [pool.submit(raw.verify, hashed, PASSWORD) for _ in range(times)]:
            verified.result()
        return times / (time.perf_counter() - began)


def run_storm(profile: Profile, logins: int) -> Storm:
    return asyncio.run(measure_storm(profile, logins))


def run_throughput(profile: Profile, logins: int) -> list[tuple[float, float]]:
    return asyncio.run(measure_throughput(profile, logins))


def in_a_new_process(
    work: Callable[[Profile, int], ResultT], profile: Profile, logins: int
) -> ResultT:
    """Return ``work(profile, logins)`` of a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, profile, logins).result()


def report(profile: Profile, logins: int) -> list[Row]:
    storm = in_a_new_process(run_storm, profile, logins)
    pairs = in_a_new_process(run_throughput, profile, logins)
    late = [1000 * seconds for seconds in storm.lateness]
    return [
        Row("event loop late, median", statistics.median(late), "ms"),
        Row("event loop late, 99 of 100 ticks", late[len(late) * 99 // 100], "ms", profile.p99),
        Row("event loop late, at most", late[-1], "ms", profile.worst),
        *memory_rows(storm, profile),
        Row("logins", statistics.median(pair[0] for pair in pairs), "/s"),
        Row("bare argon2-cffi on plain threads", statistics.median(p[1] for p in pairs), "/s"),
        Row("logins per bare verification", ratio(pairs), "", 0.95, more_is_better=True),
    ]


def memory_rows(storm: Storm, profile: Profile) -> list[Row]:
    if storm.peak is None:
        return []
    limit = profile.hasher().threads * profile.memory_cost / 1024 + 100
    return [Row("memory above idle, at most", storm.peak / MIB, "MiB", limit)]


def ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(logins / bare for logins, bare in pairs)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logins", type=int, default=64, help="at once (default: 64)")
    parser.add_argument("--profile", choices=[*PROFILES, "all"], default="all")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    missed = 0
    for name in PROFILES if chosen.profile == "all" else [chosen.profile]:
        profile = PROFILES[name]
        print(f"\n{name}: {profile.hasher()}, {chosen.logins} logins at once")
        rows = report(profile, chosen.logins)
        print(*rows, sep="\n")
        missed += sum(row.missed for row in rows)
    load = ", ".join(f"{average:.2f}" for average in os.getloadavg())
    print(f"\n{os.cpu_count()} cores, load average {load}; {missed or 'no'} target(s) missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
