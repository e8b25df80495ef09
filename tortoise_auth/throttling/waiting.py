"""Attempts whose outcome is open: who is refused because of them may wait for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Self, TypeAlias

_PATIENCE = 5.0
"""Seconds for which somebody is kept waiting, however many others succeed meanwhile."""

_Key: TypeAlias = tuple[int, str]


class OpenAttempts:
    """The attempts of this process whose outcome is open, in groups: by account, by source.

    An attempt is counted before it is known to be right. Many who log in at the same moment behind
    one address, or a program that logs its user in many times at once, would be refused because of
    attempts that are about to succeed. So who is refused waits for those who came before him, and
    for nobody else: under a flood somebody always is. Once one of them has turned out to cost
    nothing, each that ends lets one in, until one of these is refused again.
    """

    def __init__(self) -> None:
        self._groups: dict[_Key, _Group] = {}
        self._numbers = count(1)

    def attempt(self, *groups: str | None) -> OpenAttempt:
        """Return an attempt in some groups, to be entered with ``with``."""
        return OpenAttempt(self, [group for group in groups if group is not None])

    def enter(self, key: _Key) -> _Place:
        """Take a place among the open attempts of a group."""
        number = next(self._numbers)
        self._groups.setdefault(key, _Group()).open[number] = None
        return _Place(number)

    def leave(self, key: _Key, place: _Place, *, cost_nothing: bool) -> None:
        """Give the place up: to somebody who waits, if there is something to hope for."""
        group = self._groups[key]
        if cost_nothing:
            group.hope = next(self._numbers)
        if group.hope and group.waiting:
            first = next(iter(group.waiting))
            del group.waiting[first]
            first.decided.set_result(_Place(place.number, group.hope))
            return
        self._close(key, place)

    def leave_refused(self, key: _Key, place: _Place) -> None:
        """Give the place up because there was no room in the group: there is nothing to hope for."""
        group = self._groups[key]
        if place.hope:  # a newcomer was faster: all wait for him, too
            group.taken = next(self._numbers)
        group.hope = 0
        self._close(key, place)

    def try_again(self, key: _Key, place: _Place) -> _Place | None:
        """Return the place for another try at once, if one has cost nothing since it was taken."""
        hope = self._groups[key].hope
        return _Place(place.number, hope) if hope > max(place.number, place.hope) else None

    def wait(self, key: _Key) -> _Waiting | None:
        """Begin to wait for those who have a place; ``None`` if nobody has."""
        group = self._groups.get(key)
        if group is None:
            return None
        waiting = _Waiting(next(self._numbers))
        group.waiting[waiting] = None
        return waiting

    def give_up(self, key: _Key, waiting: _Waiting) -> None:
        """Wait no more; who was let in at the same moment leaves that to the next one."""
        if not waiting.decided.done():
            waiting.decided.cancel()
            del self._groups[key].waiting[waiting]
        elif (place := waiting.decided.result()) is not None:
            self.leave(key, place, cost_nothing=False)

    def have_company(self, key: _Key) -> bool:
        """Tell whether more than one has a place."""
        return len(self._groups[key].open) > 1

    def _close(self, key: _Key, place: _Place) -> None:
        """Take a place away, and dismiss those for whom it was the last one to wait for."""
        group = self._groups[key]
        del group.open[place.number]
        oldest = next(iter(group.open), None)
        while group.waiting:
            first = next(iter(group.waiting))
            if oldest is not None and oldest < max(first.since, group.taken):
                break
            del group.waiting[first]
            first.decided.set_result(None)
        if oldest is None:
            del self._groups[key]


class OpenAttempt:
    """One attempt, open inside of its ``with`` block.

    Attributes:
        costs_nothing: The password was right, or could not be checked: another one may try.
    """

    def __init__(self, others: OpenAttempts, groups: list[str]) -> None:
        loop = asyncio.get_running_loop()
        self.costs_nothing = False
        self._others = others
        self._keys = {group: (id(loop), group) for group in groups}
        self._places: dict[str, _Place] = {}
        self._now = loop.time
        self._gives_up = loop.time() + _PATIENCE

    def __enter__(self) -> Self:
        self._enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        places, self._places = self._places, {}
        for group, place in places.items():
            self._others.leave(self._keys[group], place, cost_nothing=self.costs_nothing)

    def has_company(self, group: str) -> bool:
        """Tell whether another attempt of *group* is open, besides this one."""
        return group in self._places and self._others.have_company(self._keys[group])

    async def is_let_in(self, group: str) -> bool:
        """Step back because *group* has refused it, and wait for those who came before.

        Returns:
            Whether it is open again and may be tried once more; false if none is left that could
            let it in, or it has waited for too long.
        """
        key = self._keys[group]
        renewed = self._others.try_again(key, self._places[group])
        if renewed and self._now() < self._gives_up:
            self._places[group] = renewed
            return True
        places, self._places = self._places, {}
        self._others.leave_refused(key, places.pop(group))
        for each, place in places.items():  # which may have counted it meanwhile, and not for long
            self._others.leave(self._keys[each], place, cost_nothing=True)
        waiting = self._others.wait(key)
        if waiting is None:
            return False
        try:
            async with asyncio.timeout(self._gives_up - self._now()):
                place_now = await asyncio.shield(waiting.decided)
        except TimeoutError:
            self._others.give_up(key, waiting)
            return False
        except asyncio.CancelledError:
            self._others.give_up(key, waiting)
            raise
        if place_now is None:
            return False
        self._places[group] = place_now
        self._enter()
        return True

    def _enter(self) -> None:
        for group, key in self._keys.items():
            if group not in self._places:
                self._places[group] = self._others.enter(key)


@dataclass(frozen=True, slots=True)
class _Place:
    """A place among the open attempts; *hope* tells what let it in, 0 if it came by itself."""

    number: int
    hope: int = 0


@dataclass(eq=False, slots=True)
class _Waiting:
    """Somebody who waits for the places with lower numbers."""

    since: int
    decided: asyncio.Future[_Place | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(eq=False, slots=True)
class _Group:
    """Attempts of one account or source.

    Attributes:
        open: The numbers of the places, in ascending order.
        waiting: Who waits, in the order of coming.
        hope: When one has cost nothing, if nobody has been refused since; or 0.
        taken: When somebody last got what one who waited had been let in for.
    """

    open: OrderedDict[int, None] = field(default_factory=OrderedDict)
    waiting: OrderedDict[_Waiting, None] = field(default_factory=OrderedDict)
    hope: int = 0
    taken: int = 0
