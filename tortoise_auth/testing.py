"""Fakes for tests: of hosts, and our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import ClassVar, TypeVar, get_origin, overload

from tortoise_auth.events import Event, EventEmitter
from tortoise_auth.events.event_emitter import deliverer_of
from tortoise_auth.passwords import PasswordHasher

EventT = TypeVar("EventT", bound=Event)

_FIRST = -(1 << 31)


class FakeClock:
    """A clock that goes when it is told to.

    Example::

        clock = FakeClock()
        auth = AuthService(User, config, clock=clock)
        clock.advance(timedelta(minutes=15))

    Args:
        now: The time it shows at first: aware; 2026-01-01 12:00 UTC by default.
    """

    def __init__(self, now: datetime = datetime(2026, 1, 1, 12, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """Return the time it shows."""
        return self.now

    def advance(self, by: timedelta) -> None:
        """Go forward, or with a negative *by* back."""
        self.now += by


class _CheapHasher(PasswordHasher):
    cost_floor: ClassVar[tuple[()]] = ()


def cheap_hasher(*, threads: int = 2) -> PasswordHasher:
    """Return a hasher of the lowest possible cost: a hash takes under a millisecond.

    Warning: for tests alone. Its hashes protect nobody.
    """
    return _CheapHasher(memory_cost=8, time_cost=1, parallelism=1, threads=threads)


class Captured(Sequence[Event]):
    """The events that were emitted, in order; what was emitted by name alone is a `NamedEvent`."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def names(self) -> list[str]:
        """Their names, in order."""
        return [event.name for event in self._events]

    def of(self, kind: type[EventT]) -> list[EventT]:
        """Return those of one class."""
        cls: type[EventT] = get_origin(kind) or kind  # UserLogin, also for UserLogin[User]
        return [event for event in self._events if isinstance(event, cls)]

    def one(self, kind: type[EventT]) -> EventT:
        """Return the only one of its class.

        Raises:
            AssertionError: There is none, or several.
        """
        found = self.of(kind)
        if len(found) != 1:
            raise AssertionError(f"{len(found)} {kind.__name__} among {self.names or 'no events'}")
        return found[0]

    def assert_emitted(self, *names: str) -> None:
        """Check that exactly these were emitted, in this order.

        Raises:
            AssertionError: With what was emitted instead.
        """
        if self.names != list(names):
            raise AssertionError(f"emitted were {self.names}, not {list(names)}")

    def clear(self) -> None:
        """Forget them."""
        self._events.clear()

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        """Return one, or some, by position."""
        return self._events[index]

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self.names) or 'nothing'}>"


@contextmanager
def capture(emitter: EventEmitter, *, mute: bool = False) -> Iterator[Captured]:
    """Record what *emitter* emits; afterwards its listeners are as they were before.

    Example::

        with capture(emitter) as events:
            await auth.login("ada@example.com", password)
        events.assert_emitted("user_login")
        assert events.one(UserLogin).user == ada

    Args:
        emitter: The emitter to listen to.
        mute: Keep all other handlers from running meanwhile.
    """
    captured = Captured()
    with isolated(emitter):
        if mute:
            emitter.clear()
        # On the loop's own thread and before all others: it records even what they raise about.
        emitter.on("*", captured._events.append, priority=_FIRST, thread=False)
        yield captured


@contextmanager
def isolated(emitter: EventEmitter) -> Iterator[EventEmitter]:
    """Restore the listeners of *emitter* at the end, whatever was registered or removed."""
    registry = deliverer_of(emitter).registry
    before = registry.snapshot()
    try:
        yield emitter
    finally:
        registry.restore(before)
