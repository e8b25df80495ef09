"""Fakes for the tests of an application."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import ClassVar, TypeVar, get_origin, overload

from tortoise_auth.database import pending_effects
from tortoise_auth.events import Event, EventEmitter
from tortoise_auth.events.event_emitter import deliverer_of
from tortoise_auth.events.subscription import event_class
from tortoise_auth.events.unit_of_work import Outcome
from tortoise_auth.legible import listed, quoted
from tortoise_auth.passwords import PasswordHasher

EventT = TypeVar("EventT", bound=Event)

_FIRST = -(1 << 31)


class FakeClock:
    """A clock that moves only when a test moves it.

    Example::

        clock = FakeClock()
        auth = AuthService(User, config, clock=clock)
        clock.advance(timedelta(minutes=15))

    Args:
        now: The first time it returns, an aware datetime; 2026-01-01 12:00 UTC by default.
    """

    def __init__(self, now: datetime = datetime(2026, 1, 1, 12, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """Return the current time of this clock."""
        return self.now

    def advance(self, by: timedelta) -> None:
        """Move forward, or back if *by* is negative."""
        self.now += by


class _CheapHasher(PasswordHasher):
    cost_floor: ClassVar[tuple[()]] = ()


def cheap_hasher(*, threads: int = 2) -> PasswordHasher:
    """Return a hasher of the lowest possible cost: a hash takes under a millisecond.

    Warning: for tests alone. Its hashes protect no password.
    """
    return _CheapHasher(memory_cost=8, time_cost=1, parallelism=1, threads=threads)


class Captured(Sequence[Event]):
    """The events that were emitted, in order; one emitted by name alone is a `NamedEvent`."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def names(self) -> list[str]:
        """The names of the events, in order."""
        return [event.name for event in self._events]

    def of(self, kind: type[EventT]) -> list[EventT]:
        """Return the events of one class.

        Raises:
            TypeError: It is no class of events, but a name, for example.
        """
        cls: type[EventT] = get_origin(kind) or kind  # UserLogin, also for UserLogin[User]
        if event_class(kind) is None:
            raise TypeError(
                f"This takes a class of events, such as UserLogin, not {quoted(kind)}. "
                "For names there are `names` and `assert_emitted`."
            )
        return [event for event in self._events if isinstance(event, cls)]

    def one(self, kind: type[EventT]) -> EventT:
        """Return the only event of a class.

        Raises:
            AssertionError: There is none, or several.
        """
        events = self.of(kind)
        if len(events) != 1:
            raise AssertionError(f"{len(events)} {kind.__name__} among {self._emitted()}")
        return events[0]

    def assert_emitted(self, *names: str) -> None:
        """Check that exactly the events of these names were emitted, in this order.

        Raises:
            AssertionError: Other events were emitted; the message lists them.
        """
        if self.names != list(names):
            expected = f"[{listed(map(quoted, names))}]"
            raise AssertionError(f"emitted: {self._emitted()}, expected: {expected}")

    def _emitted(self) -> str:
        if self._events:
            return f"[{listed(map(quoted, self.names))}]"
        return "no events (of this emitter; that of a service is `auth.emitter`)"

    def clear(self) -> None:
        """Remove all recorded events."""
        self._events.clear()

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        """Return one event, or several, by position."""
        return self._events[index]

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {listed(self.names) or 'nothing'}>"


@contextmanager
def capture(emitter: EventEmitter, *, mute: bool = False) -> Iterator[Captured]:
    """Record what *emitter* emits, and restore its subscriptions at the end.

    Example::

        with capture(emitter) as events:
            await auth.login("ada@example.com", password)
        events.assert_emitted("user_login")
        assert events.one(UserLogin).user == ada

    Args:
        emitter: The emitter to record.
        mute: Do not run any other handler inside the block.
    """
    captured = Captured()
    with isolated(emitter):
        if mute:
            emitter.clear()
        # First, and on the loop's own thread: an event is recorded even if its handlers raise.
        emitter.on("*", captured._events.append, priority=_FIRST, thread=False)
        yield captured


@contextmanager
def isolated(emitter: EventEmitter) -> Iterator[EventEmitter]:
    """Restore the subscriptions of *emitter* at the end, whatever was added or removed."""
    registry = deliverer_of(emitter).registry
    before = registry.snapshot()
    try:
        yield emitter
    finally:
        registry.restore(before)


async def pending_events() -> list[Event]:
    """Return the events that wait for the commit of the transaction that is open here, in order.

    Savepoints that were rolled back have taken theirs with them.
    """
    return _events_of(await pending_effects(take=False))


async def run_pending() -> list[Event]:
    """Do what would follow the commit of the transaction that is open here; return its events.

    For tests inside a transaction that is rolled back at the end, where no commit ever comes: live
    objects get their new values, and inline handlers run, here inside the transaction. What they
    raise is logged, as after a commit. Background deliveries are handed over; on SQLite they get
    the database when the transaction is over. Durable ones are rows, which `Relay.drain` delivers
    outside of the transaction alone.

    Example::

        async with in_transaction():            # a fixture, which rolls back at the end
            await auth.logout(token)
            assert [event.name for event in await run_pending()] == ["user_logout"]
            assert audit_trail == ["user_logout"]
    """
    effects = await pending_effects(take=True)
    for effect in effects:
        effect.apply()
    for effect in effects:
        await effect.deliver()
    return _events_of(effects)


def _events_of(effects: Sequence[object]) -> list[Event]:
    return [event for effect in effects if isinstance(effect, Outcome) for event in effect.events]
