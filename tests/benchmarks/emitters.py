"""What an emit costs, against a bare loop over the handlers and against other emitters.

Run it with ``python tests/benchmarks/emitters.py`` in an environment with the peers:
``pip install blinker pyee regstack django litestar tina4-python``, started in an empty folder:
importing tina4 puts a project there, keys included. Whatever is not installed is left out, visibly.
tortoise-auth 0.6.0 has our import name and is loaded from its wheel, which ``pip download`` fetches
unless ``--seed`` names one. It exits with 1 when a target is missed.

All systems are measured in turn, in a new random order each round, on the CPU time of the thread
with the garbage collector off. A ratio is the median over the rounds of one system's time by
another's of the same round, so that other work on the machine meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import importlib.util
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

from tortoise_auth.events import EventEmitter

Run: TypeAlias = Callable[[int], Awaitable[None]]
"""Emits a number of times."""
Key: TypeAlias = tuple[str, int]
"""A system, and how many handlers it calls."""
Make: TypeAlias = Callable[[int, AsyncExitStack], Awaitable[Run]]
"""Sets a system up with a number of handlers."""

COUNTS = (1, 3, 10)
SAMPLE = 0.01
NAMES = 100_000
FLOOR, OURS, SEED = "bare loop", "tortoise_auth", "tortoise-auth 0.6.0"
SUBSET, EVERYTHING = "names one of two keywords", "spells **kwargs"


@dataclass(frozen=True)
class Target:
    """One line of the verdict."""

    what: str
    measured: str
    met: bool

    def __str__(self) -> str:
        return f"  {'PASS' if self.met else 'FAIL'}  {self.what:<58}{self.measured}"


def no_ops(count: int) -> list[Callable[..., Awaitable[None]]]:
    """Return handlers that do nothing, each a function of its own."""

    def no_op() -> Callable[..., Awaitable[None]]:
        async def handler(payload: object) -> None: ...

        return handler

    return [no_op() for _ in range(count)]


async def bare_loop(count: int, stack: AsyncExitStack) -> Run:
    handlers = no_ops(count)

    async def run(times: int) -> None:
        for _ in range(times):
            for handler in handlers:
                await handler(7)

    return run


def emitting(emitter: Any, count: int) -> Run:
    """Return a run of an emitter with the interface of tortoise-auth."""
    for handler in no_ops(count):
        emitter.add_listener("user_login", handler)

    async def run(times: int) -> None:
        emit = emitter.emit
        for _ in range(times):
            await emit("user_login", 7)

    return run


async def ours(count: int, stack: AsyncExitStack) -> Run:
    return emitting(EventEmitter(), count)


def seed(module: Any) -> Make:
    async def make(count: int, stack: AsyncExitStack) -> Run:
        return emitting(module.EventEmitter(), count)

    return make


async def tina4(count: int, stack: AsyncExitStack) -> Run:
    events = importlib.import_module("tina4_python.core.events")
    name = f"user_login_{count}"
    for handler in no_ops(count):
        events.on(name, handler)

    async def run(times: int) -> None:
        emit = events.emit_async
        for _ in range(times):
            await emit(name, 7)

    return run


async def blinker(count: int, stack: AsyncExitStack) -> Run:
    signal = importlib.import_module("blinker").Signal()
    handlers = no_ops(count)
    for handler in handlers:
        signal.connect(handler, weak=False)

    async def run(times: int) -> None:
        send = signal.send_async
        for _ in range(times):
            await send(7)

    return run


async def regstack(count: int, stack: AsyncExitStack) -> Run:
    registry = importlib.import_module("regstack.hooks").HookRegistry()
    for handler in no_ops(count):
        registry.on("user_login", handler)

    async def run(times: int) -> None:
        fire = registry.fire
        for _ in range(times):
            await fire("user_login", payload=7)

    return run


async def django(count: int, stack: AsyncExitStack) -> Run:
    signal = importlib.import_module("django.dispatch").Signal()

    def receiver() -> Callable[..., Awaitable[None]]:
        async def handler(sender: object, **kwargs: object) -> None: ...

        return handler

    for _ in range(count):
        signal.connect(receiver(), weak=False)

    async def run(times: int) -> None:
        send = signal.asend_robust
        for _ in range(times):
            await send(7)

    return run


class Counter:
    """Handlers that count, for systems that do not report when they are done."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.done = 0

    def handlers(self) -> list[Callable[..., Awaitable[None]]]:
        """Return them, each a function of its own."""

        def counting() -> Callable[..., Awaitable[None]]:
            async def handler(payload: object) -> None:
                self.done += 1

            return handler

        return [counting() for _ in range(self.count)]

    def waiting_for_all(self, emit: Callable[[str, object], object]) -> Run:
        """Return a run that waits after each emit until all have been called."""

        async def run(times: int) -> None:
            for _ in range(times):
                due = self.done + self.count
                emit("user_login", 7)
                while self.done < due:  # noqa: ASYNC110 - an Event would be one more thing to pay for
                    await asyncio.sleep(0)

        return run


async def pyee(count: int, stack: AsyncExitStack) -> Run:
    emitter = importlib.import_module("pyee.asyncio").AsyncIOEventEmitter()
    counter = Counter(count)
    for handler in counter.handlers():
        emitter.on("user_login", handler)
    return counter.waiting_for_all(emitter.emit)


async def litestar(count: int, stack: AsyncExitStack) -> Run:
    events = importlib.import_module("litestar.events")
    counter = Counter(count)
    listeners = [events.listener("user_login")(handler) for handler in counter.handlers()]
    emitter = await stack.enter_async_context(events.SimpleEventEmitter(listeners))
    return counter.waiting_for_all(emitter.emit)


PEERS: dict[str, tuple[str, str, Make]] = {
    "tina4": ("tina4-python", "tina4_python.core.events", tina4),
    "blinker": ("blinker", "blinker", blinker),
    "pyee": ("pyee", "pyee.asyncio", pyee),
    "regstack": ("regstack", "regstack.hooks", regstack),
    "Django": ("django", "django.dispatch", django),
    "Litestar": ("litestar", "litestar.events", litestar),
}
"""Name: distribution, module, how to set it up."""


def installed(distribution: str, module: str) -> str | None:
    """Return the version of a peer; ``None`` if it is not there or has no emitter."""
    try:
        importlib.import_module(module)
        return version(distribution)
    except (ImportError, PackageNotFoundError):
        return None


async def keywords(handler: Callable[[], Callable[..., Awaitable[None]]], count: int) -> Run:
    """Return a run with two keywords, for handlers that take one of them or both."""
    emitter = EventEmitter()
    for _ in range(count):
        emitter.on("user_login_failed", handler())

    async def run(times: int) -> None:
        emit = emitter.emit
        for _ in range(times):
            await emit("user_login_failed", identifier="ada", reason="not_found")

    return run


async def subset(count: int, stack: AsyncExitStack) -> Run:
    def make() -> Callable[..., Awaitable[None]]:
        async def handler(reason: str) -> None: ...

        return handler

    return await keywords(make, count)


async def everything(count: int, stack: AsyncExitStack) -> Run:
    def make() -> Callable[..., Awaitable[None]]:
        async def handler(reason: str, **kwargs: object) -> None: ...

        return handler

    return await keywords(make, count)


def load_seed(wheel: Path | None) -> Any:
    """Return the events module of tortoise-auth 0.6.0, under a name of its own."""
    folder = Path(tempfile.gettempdir()) / "tortoise_auth_benchmark"
    folder.mkdir(exist_ok=True)
    if wheel is None:
        wheels = list(folder.glob("tortoise_auth-0.6.0-*.whl"))
        wheel = wheels[0] if wheels else download_seed(folder)
    source = folder / "seed_events.py"
    with zipfile.ZipFile(wheel) as archive:
        source.write_bytes(archive.read("tortoise_auth/events.py"))
    spec = importlib.util.spec_from_file_location("seed_events", source)
    if spec is None or spec.loader is None:
        raise ImportError(f"{source} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def download_seed(folder: Path) -> Path:
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", *command, "tortoise-auth==0.6.0"], check=True)
    return next(folder.glob("tortoise_auth-0.6.0-*.whl"))


async def seconds(run: Run, times: int) -> float:
    began = time.thread_time_ns()
    await run(times)
    return (time.thread_time_ns() - began) / 1e9


async def calibrated(run: Run) -> int:
    """Return how often to emit for one sample."""
    times = 1
    while (took := await seconds(run, times)) < SAMPLE / 4:
        times *= 2
    return max(1, round(times * SAMPLE / took))


async def measure(systems: dict[str, Make], rounds: int) -> dict[Key, list[float]]:
    """Return the nanoseconds of one emit, for each round, of each system and number of handlers."""
    async with AsyncExitStack() as stack:
        runs = {
            (name, count): await make(count, stack)
            for name, make in systems.items()
            for count in COUNTS
        }
        times = {key: await calibrated(run) for key, run in runs.items()}
        samples: dict[Key, list[float]] = {key: [] for key in runs}
        gc.disable()
        for _ in range(rounds):
            gc.collect()
            for key in random.sample(list(runs), len(runs)):
                samples[key].append(1e9 * await seconds(runs[key], times[key]) / times[key])
        gc.enable()
        return samples


def ratio(samples: dict[Key, list[float]], name: str, by: str, count: int) -> float:
    pairs = zip(samples[name, count], samples[by, count], strict=True)
    return statistics.median(mine / other for mine, other in pairs)


def table(samples: dict[Key, list[float]]) -> list[str]:
    """Return the ratios to the bare loop, cheapest first."""
    names = sorted({name for name, _ in samples}, key=lambda name: ratio(samples, name, FLOOR, 3))
    lines = [f"  {'ratio to the bare loop':<28}" + "".join(f"{f'n={n}':>9}" for n in COUNTS)]
    for name in names:
        ratios = "".join(f"{ratio(samples, name, FLOOR, count):>9.2f}" for count in COUNTS)
        lines.append(f"  {name:<28}{ratios}   {min(samples[name, 1]):>9.0f} ns at n=1")
    return lines


def comparison(
    samples: dict[Key, list[float]], name: str, by: str, limit: float, what: str
) -> Target:
    ratios = [ratio(samples, name, by, count) for count in COUNTS]
    return Target(
        what,
        " / ".join(f"{each:.2f}" for each in ratios) + f"  (at most {limit:g})",
        max(ratios) <= limit,
    )


def unknown_names() -> Target:
    """Emit names without a handler, and count the blocks of memory that stay."""
    emitter = EventEmitter()

    async def emit(prefix: str, times: int) -> None:
        for number in range(times):
            await emitter.emit(f"{prefix} {number}")

    asyncio.run(emit("warm up", 100))
    gc.collect()
    before = sys.getallocatedblocks()
    asyncio.run(emit("unknown", NAMES))
    gc.collect()
    kept = sys.getallocatedblocks() - before
    return Target(f"{NAMES} unknown names leave nothing", f"{kept} blocks", kept < 1000)


def registrations() -> Target:
    """Compare the cost of registering 2 000 and 10 000 handlers for one event."""

    def register(count: int) -> float:
        emitter = EventEmitter()
        handlers = no_ops(count)
        began = time.thread_time_ns()
        for handler in handlers:
            emitter.on("user_login", handler)
        emitter.listeners("user_login")
        return (time.thread_time_ns() - began) / 1e3 / count

    register(100)
    costs = [(register(2_000), register(10_000)) for _ in range(5)]
    few, many = (statistics.median(side) for side in zip(*costs, strict=True))
    grows = statistics.median(each[1] / each[0] for each in costs)
    measured = f"{few:.1f} and {many:.1f} µs each, x{grows:.2f}  (linear: x1, quadratic: x5)"
    return Target("10 000 registrations are linear", measured, grows < 2)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=31, help="default: 31")
    parser.add_argument("--seed", type=Path, help="wheel of tortoise-auth 0.6.0")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    systems: dict[str, Make] = {FLOOR: bare_loop, OURS: ours, SEED: seed(load_seed(chosen.seed))}
    print(f"Python {sys.version.split()[0]}, {chosen.rounds} rounds, no-op async handlers\n")
    for name, (distribution, module, make) in PEERS.items():
        if (release := installed(distribution, module)) is None:
            print(f"  {name}: not installed (pip install {distribution}), SKIPPED")
        else:
            systems[f"{name} {release}"] = make
    peers = [name for name in systems if name not in (FLOOR, OURS, SEED)]
    found_times = asyncio.run(
        measure(systems | {SUBSET: subset, EVERYTHING: everything}, chosen.rounds)
    )
    print(*table(found_times), "", sep="\n")
    targets = [
        comparison(found_times, OURS, SEED, 1.1, f"as fast as {SEED}, by 10 %"),
        *(comparison(found_times, OURS, peer, 1, f"faster than {peer}") for peer in peers),
        comparison(found_times, SUBSET, EVERYTHING, 1.05, "a subset of keywords as cheap as **kw"),
        unknown_names(),
        registrations(),
    ]
    print(*targets, sep="\n")
    missed = sum(not target.met for target in targets)
    load = ", ".join(f"{average:.2f}" for average in os.getloadavg())
    print(f"\n{os.cpu_count()} cores, load average {load}; {missed or 'no'} target(s) missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
