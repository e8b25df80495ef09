"""The emitter against a small model, over generated programs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import event as seen
from hypothesis import given, settings
from hypothesis import strategies as st

from tortoise_auth.events import EventEmitter, EventError

pytestmark = pytest.mark.slow

Errors = Literal["log", "raise", "group"]
Handler = Callable[..., Awaitable[None]]

LIMIT = 20
"""How many emits a program may make, and how many registrations, those of handlers included."""


@dataclass(eq=False)
class Entry:
    event: str
    handler: Handler
    priority: int = 10
    once: bool = False


@dataclass
class Model:
    """A model of the emitter without threads, tasks and timeouts."""

    errors: Errors
    on_error: Callable[[EventError], object]
    entries: list[Entry] = field(default_factory=list)

    def on(self, event: str, handler: Handler, /, timeout: float | None = None, **how: Any) -> None:
        """Append."""
        self.entries.append(Entry(event, handler, **how))

    def off(self, event_name: str, handler: Handler | None = None) -> None:
        """Filter."""
        gone = [e for e in self.entries if e.event == event_name and handler in (None, e.handler)]
        self.entries = [each for each in self.entries if each not in gone]

    def matching(self, event: str) -> list[Entry]:
        """Sort those of the event and those of all; equals stay in the order of registration."""
        matches = [each for each in self.entries if each.event in (event, "*")]
        return sorted(matches, key=lambda each: each.priority)

    def listeners(self, event_name: str) -> list[Handler]:
        """Look."""
        return [each.handler for each in self.matching(event_name)]

    async def emit(self, event: str, /) -> None:
        """Call one after the other."""
        failures: list[EventError] = []
        for each in self.matching(event):
            if each.once and each not in self.entries:
                continue
            if each.once:
                self.entries.remove(each)
            try:
                await each.handler()
            except Exception as failure:
                failures.append(EventError(event, each.handler.__name__, failure))
                self.on_error(failures[-1])
                if self.errors == "raise":
                    raise failures[-1] from failure
        if failures and self.errors == "group":
            raise ExceptionGroup("failed", failures)


@dataclass
class Program:
    """What handlers do when they are called, and what happens around them."""

    scripts: list[list[tuple[Any, ...]]]
    steps: list[tuple[Any, ...]]

    async def run(self, make: Callable[[Callable[[EventError], object]], Any]) -> list[object]:
        """Return all that happens on a bus: calls, failures, outcomes, and the handlers left at the end."""
        trace: list[object] = []
        bus = make(lambda error: trace.append(("failed", shape(error))))
        left = {"emit": LIMIT, "on": LIMIT, "off": LIMIT}
        handlers: list[Handler] = []

        def handler(number: int) -> Handler:
            async def run(*args: object) -> None:
                trace.append(("call", number))
                for step in self.scripts[number]:
                    await do(step)

            run.__name__ = f"h{number}"
            return run

        async def do(step: tuple[Any, ...]) -> None:
            action, *what = step
            if action == "fail":
                raise ValueError(*what)
            left[action] -= 1
            if left[action] < 0:
                return
            match step:
                case ("emit", event):
                    await bus.emit(event)
                case ("on", event, number, options):
                    bus.on(event, handlers[number], **options)
                case ("off", event, number):
                    bus.off(event, None if number is None else handlers[number])

        handlers += [handler(number) for number in range(len(self.scripts))]
        for step in self.steps:
            try:
                await do(step)
            except (EventError, ExceptionGroup) as error:
                trace.append(("raised", shape(error)))
        trace += [[each.__name__ for each in bus.listeners(name)] for name in "ab*"]
        return trace


def shape(error: BaseException) -> object:
    """Return what is the same in the failures of the emitter and of the model."""
    if isinstance(error, ExceptionGroup):
        return [shape(each) for each in error.exceptions]
    if isinstance(error, EventError):
        return error.event_name, error.handler_name, shape(error.original)
    return repr(error)


NUMBERS = st.integers(0, 3)
EVENTS = st.sampled_from(["a", "b"])
LISTENED = st.sampled_from(["a", "b", "*"])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.sampled_from([1, 10, 20]),
        "once": st.booleans(),
        "timeout": st.just(60),  # takes another way through the emitter, to the same effect
    },
)
REGISTER = st.tuples(st.just("on"), LISTENED, NUMBERS, OPTIONS)
REMOVE = st.tuples(st.just("off"), LISTENED, NUMBERS | st.none())
EMIT = st.tuples(st.just("emit"), EVENTS)
FAIL = st.tuples(st.just("fail"), st.sampled_from(["x", "y"]))
SCRIPTS = st.lists(st.lists(REGISTER | REMOVE | EMIT | FAIL, max_size=3), min_size=4, max_size=4)
STEPS = st.tuples(
    st.lists(REGISTER, min_size=2, max_size=6),
    st.lists(EMIT | EMIT | REGISTER | REMOVE, min_size=2, max_size=8),
).map(lambda parts: [*parts[0], *parts[1]])
PROGRAMS = st.builds(Program, scripts=SCRIPTS, steps=STEPS)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Log no lines for intended failures."""
    logger = logging.getLogger("tortoise_auth.events")
    logger.disabled = True
    yield
    logger.disabled = False


def classify(trace: list[object]) -> None:
    kinds = [each[0] for each in trace if isinstance(each, tuple)]
    seen("calls: " + ("none", "few", "many")[(kinds.count("call") > 0) + (kinds.count("call") > 8)])
    seen("failures: " + ("some" if "failed" in kinds else "none"))


@pytest.mark.parametrize("errors", ["log", "raise", "group"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(program=PROGRAMS)
def test_like_the_model(errors: Errors, program: Program) -> None:
    """Order, priority, once, changes during an emit, re-entrancy and failures are as in the model."""
    expected = asyncio.run(program.run(lambda report: Model(errors, report)))
    actual = asyncio.run(program.run(lambda report: EventEmitter(errors=errors, on_error=report)))
    classify(expected)
    assert actual == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(program=PROGRAMS)
def test_in_the_background(program: Program) -> None:
    """Emitted into the background, the same handlers are called as often, and fail in the same way.

    Their order among each other is free there: each subscription has a lane of its own.
    """

    class Queued(EventEmitter):
        async def emit(self, event: Any, /, *args: Any, **kwargs: Any) -> None:
            """Queue it, and wait, if it is not a handler that emits."""
            self.emit_nowait(event, *args, **kwargs)
            assert await self.aclose() == []

    straight = Program(
        [[s for s in script if s[0] == "fail"] for script in program.scripts], program.steps
    )
    expected = asyncio.run(straight.run(lambda failed: Model("log", failed)))
    actual = asyncio.run(straight.run(lambda failed: Queued(on_error=failed)))
    assert actual[-3:] == expected[-3:]
    assert sorted(map(repr, actual)) == sorted(map(repr, expected))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    priorities=st.lists(st.integers(-3, 3), max_size=30),
    removed=st.sets(st.integers(0, 29)),
)
def test_order_after_any_removals(priorities: list[int], removed: set[int]) -> None:
    """Whatever was removed, the rest runs by priority, ties by registration; `describe` says so."""
    emitter = EventEmitter()
    handlers = [lambda number=number: number for number in range(len(priorities))]
    for handler, priority in zip(handlers, priorities, strict=True):
        emitter.on("evt", handler, priority=priority)
    for number in removed & set(range(len(handlers))):
        emitter.remove_listener("evt", handlers[number])
    kept = [number for number in range(len(handlers)) if number not in removed]
    expected = sorted(kept, key=lambda number: priorities[number])
    assert [handlers.index(handler) for handler in emitter.listeners("evt")] == expected
    assert [row.position for row in emitter.describe()] == list(range(1, len(kept) + 1))
    assert [row.priority for row in emitter.describe()] == sorted(priorities[n] for n in kept)
