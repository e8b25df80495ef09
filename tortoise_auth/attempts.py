"""Attempts whose outcome is open: who is refused because of them may wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeAlias

_PATIENCE = 5.0
"""Seconds for which somebody is kept waiting, however many others succeed meanwhile."""

_Key: TypeAlias = tuple[int, str]


class OpenAttempts:
    """The attempts of this process whose outcome is open, in groups: by account, by source.

    An attempt is counted before it is known to be right. Many who log in at the same moment behind
    one address, or a program that logs its user in many times at once, would be refused because of
    attempts that are about to succeed. So who is refused waits as long as an attempt of the group
    is open, and each that turns out to cost nothing lets one in again. Wrong ones let nobody in:
    a burst of guesses waits for the hashes of those that were counted, and no longer.
    """

    def __init__(self) -> None:
        self._groups: dict[_Key, _Group] = {}

    def attempt(self, *groups: str | None) -> OpenAttempt:
        """Return an attempt in some groups, to be entered with ``with``."""
        return OpenAttempt(self, [group for group in groups if group is not None])

    def enter(self, key: _Key) -> None:
        """Count an attempt as open."""
        self._groups.setdefault(key, _Group()).open += 1

    def leave(self, key: _Key, *, let_in: bool) -> None:
        """Count it no more; if it cost nothing, let the first one in that waits."""
        group = self._groups[key]
        group.open -= 1
        while let_in and group.waiting:
            first = group.waiting.popleft()
            if not first.done():
                first.set_result(True)
                group.open += 1  # from now on, lest somebody believes that all is over
                break
        if not group.open:
            del self._groups[key]
            for each in group.waiting:
                if not each.done():
                    each.set_result(False)

    def is_first_to_tell(self, key: _Key) -> bool:
        """Tell whether none of the open attempts has asked this before."""
        group = self._groups[key]
        first, group.told = not group.told, True
        return first

    def wait(self, key: _Key) -> asyncio.Future[bool] | None:
        """Return what tells whether one is let in; ``None`` if there is nobody to wait for."""
        group = self._groups.get(key)
        if group is None:
            return None
        place: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        group.waiting.append(place)
        return place


class OpenAttempt:
    """One attempt, open inside of its ``with`` block.

    Attributes:
        costs_nothing: The password was right, or could not be checked: another one may try.
    """

    def __init__(self, others: OpenAttempts, groups: list[str]) -> None:
        loop = asyncio.get_running_loop()
        self.costs_nothing = False
        self._others = others
        self._keys = [(id(loop), group) for group in groups]
        self._entered: list[_Key] = []
        self._now = loop.time
        self._gives_up = loop.time() + _PATIENCE

    def __enter__(self) -> Self:
        for key in self._keys:
            self._others.enter(key)
        self._entered = list(self._keys)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._step_back(let_in=self.costs_nothing)

    async def is_let_in(self, group: str) -> bool:
        """Step back, and wait until an attempt of *group* has cost nothing.

        Returns:
            Whether it is open again and may be tried once more; false if none is left that could
            let it in, or it has waited for too long.
        """
        self._step_back(let_in=False)
        (key,) = (each for each in self._keys if each[1] == group)
        place = self._others.wait(key)
        if place is None:
            return False
        try:
            async with asyncio.timeout(self._gives_up - self._now()):
                let_in = await place
        except (TimeoutError, asyncio.CancelledError) as error:
            if place.done() and not place.cancelled() and place.result():
                # It was let in at the same moment: that is the next one's turn.
                self._others.leave(key, let_in=True)
            if isinstance(error, TimeoutError):
                return False
            raise
        if let_in:
            for other in self._keys:
                if other != key:
                    self._others.enter(other)
            self._entered = list(self._keys)
        return let_in

    def is_first_to_tell(self, group: str) -> bool:
        """Tell whether none of the open attempts of *group* has asked this before."""
        (key,) = (each for each in self._keys if each[1] == group)
        return self._others.is_first_to_tell(key)

    def _step_back(self, *, let_in: bool) -> None:
        entered, self._entered = self._entered, []
        for key in entered:
            self._others.leave(key, let_in=let_in)


@dataclass(eq=False, slots=True)
class _Group:
    open: int = 0
    told: bool = False
    waiting: deque[asyncio.Future[bool]] = field(default_factory=deque)
