"""Waiting for attempts in flight: they may turn out to be right, and then there is room."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable

from tortoise_auth.throttling.protocol import Reservation, TooEarly

_PATIENCE = 5.0
"""Seconds for which an attempt waits."""
_MOST = 200
"""How many attempts of one process wait for one counter. The others are throttled at once."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.2


class Waiting:
    """The attempts of this process that wait until others are decided.

    Many who log in at the same moment behind one address, or a program that logs its user in many
    times at once, would be rejected because of attempts that are about to succeed. The counter says
    whether there are any, in whatever process; an attempt that it rejects is tried again.
    """

    def __init__(self) -> None:
        self._waiting: Counter[tuple[int, str]] = Counter()

    async def reserve(self, reserve: Callable[[], Awaitable[Reservation]]) -> Reservation:
        """Reserve an attempt, again and again while it may turn out that there is room.

        Raises:
            ThrottledError: There is none, or it did not turn out in time.
        """
        loop = asyncio.get_running_loop()
        gives_up, pause, key = loop.time() + _PATIENCE, _FIRST_PAUSE, None
        try:
            while True:
                try:
                    return await reserve()
                except TooEarly as early:
                    if early.in_flight is None or loop.time() >= gives_up:
                        raise
                    if key is None:
                        if self._waiting[id(loop), early.in_flight] >= _MOST:
                            raise
                        key = (id(loop), early.in_flight)
                        self._waiting[key] += 1
                # Not all at the same moment: each would find the others before it.
                await asyncio.sleep(pause * (1 - secrets.randbelow(500) / 1000))
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            if key is not None:
                self._waiting[key] -= 1
                self._waiting += Counter()  # forgets what is zero
