"""Slow down guessing: a protocol, and the rules that throttles share.

An attempt is *reserved* before the password is hashed, so that a burst cannot be heard faster than
it is counted. After a few free failures each one doubles the pause. Live sessions, refresh and
password resets are not touched, and a source from which the user has logged in before has a budget
of its own: guessing from elsewhere cannot keep the user out.
"""

from __future__ import annotations

import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from tortoise_auth.exceptions import ConfigurationError, ThrottledError
from tortoise_auth.throttling.counters import Count

_ACCOUNT = "account:"


_FAMILIAR = "familiar:"


_SOURCE = "source:"


FAILURES_KEPT = timedelta(days=400)
"""How long failures in a row are remembered after the last one."""


LOCKED = 1 << 20
"""Added to the failures in a row of an account when it is locked for good: it needs no column."""


TOLD = 1 << 24
"""Added when that has been told."""


TELLING = timedelta(minutes=1)
"""How long whoever has undertaken to tell it may take: after that he is believed to be dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Somebody tries a password.

    Attributes:
        account: Stands for the account, existing or not. Opaque: a throttle stores it as it is.
        source: Stands for the network it comes from; ``None`` if it is not known. Opaque, too.
        familiar: Tells whether the user has logged in from there before. Asked only when it matters.
    """

    account: str
    source: str | None
    familiar: Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Leave to check one password.

    Attributes:
        attempt: The attempt.
        locked: The account has had so many failures in a row that no password is right any more,
            until it is changed. The caller must refuse, as if the password were wrong.
        locks: If this attempt fails, the account is to be locked: `Throttle.lock` it.
        untold: It had so many failures before, but nobody has been told that it is locked. Either
            the last of them is still being checked, or whoever was to tell it failed: then `lock` it.
        counted: What was counted, for the throttle alone.
    """

    attempt: Attempt
    locked: bool = False
    locks: bool = False
    untold: bool = False
    counted: tuple[Counted, ...] = field(default=(), repr=False)


_YEAR = timedelta(days=366)


class Throttle(Protocol):
    """Decides how often passwords may be tried. Any failure to decide must be an exception."""

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Count an attempt before its password is checked.

        Raises:
            ThrottledError: Too many came before; it was not counted and must not be heard.
        """
        ...

    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong."""
        ...

    async def succeeded(self, reservation: Reservation) -> None:
        """It was right: forget the failures of the account, but not those of the source."""
        ...

    async def released(self, reservation: Reservation) -> None:
        """It could not be checked, and that was our fault: give the attempt back."""
        ...

    async def lock(self, reservation: Reservation) -> bool:
        """Lock the account for good, unless its failures have been forgotten meanwhile.

        Returns:
            Whether the caller is to tell that it is locked: nobody has, and nobody else is about to.
        """
        ...

    async def told(self, reservation: Reservation) -> None:
        """That the account is locked has been told; ``untold`` is not true of it any more."""
        ...


class TooEarly(ThrottledError):
    """What our own throttles raise; the same error, but it knows the counter.

    Attributes:
        of_source: Too much came from the source, and not only for the account.
    """

    def __init__(self, retry_after: float, *, of_source: bool) -> None:
        super().__init__(retry_after)
        self.of_source = of_source


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Free failures, then a pause that doubles with each.

    Attributes:
        free: Attempts without a pause.
        pause: The first pause.
        longest: The longest pause.
        quiet: After so long without an attempt the pauses begin anew.

    Raises:
        ConfigurationError: A number or duration makes no sense.
    """

    free: int
    pause: timedelta = timedelta(seconds=1)
    longest: timedelta = timedelta(minutes=15)
    quiet: timedelta = timedelta(days=1)

    def __post_init__(self) -> None:
        durations = (self.pause, self.longest, self.quiet)
        if type(self.free) is not int or not all(isinstance(each, timedelta) for each in durations):
            raise ConfigurationError(
                "A limit is made of a whole number and of timedeltas: "
                "Limit(free=10, longest=timedelta(minutes=15))"
            )
        if self.free < 1 or not timedelta(0) < self.pause <= self.longest <= self.quiet <= _YEAR:
            raise ConfigurationError(
                "A limit needs free >= 1 and durations with 0 < pause <= longest <= quiet <= 366 days"
            )

    def after(self, count: int) -> timedelta:
        """Return the pause after *count* attempts."""
        if count < self.free:
            return timedelta(0)
        enough = (self.longest // self.pause).bit_length()
        return min(self.pause * (1 << min(count - self.free, enough)), self.longest)


@dataclass(frozen=True, slots=True)
class Counted:
    """One attempt, as it was counted by one counter.

    Attributes:
        key: The counter.
        failures: Failures in a row, if this one fails.
        limited: It counts against the limit, and not only as a failure in a row.
        count: What the counter showed then.
        at, before: When it was counted, and the one before it.
    """

    key: str
    failures: int
    limited: bool = True
    count: int = 0
    at: datetime | None = None
    before: datetime | None = None

    @property
    def of_source(self) -> bool:
        """It counts what comes from one source, whatever the account."""
        return self.key.startswith(_SOURCE)


class CountingThrottle(ABC):
    """The rules that throttles share; where the counts are kept is left to subclasses.

    Source first, then the account, but who is refused for the account counts nowhere. If the
    account is blocked and the source is one from which the user has logged in before, a counter of
    the two together decides instead, while the failures in a row still count for the account.

    Args:
        max_failures: Failures in a row after which the password is disabled until it is changed
            (NIST SP 800-63B-4, 3.2.2: at most 100).

    Raises:
        ConfigurationError: ``max_failures`` is not between 1 and 100.
    """

    def __init__(self, max_failures: int) -> None:
        if type(max_failures) is not int or not 1 <= max_failures <= 100:
            raise ConfigurationError(
                "A throttle must disable a password after at most 100 failures in a row "
                "(NIST SP 800-63B-4, 3.2.2): choose max_failures between 1 and 100"
            )
        self._max_failures = max_failures

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Count an attempt before its password is checked.

        Raises:
            ThrottledError: Too many came before; it was not counted.
        """
        seen = await self._look(attempt)
        source = None
        if attempt.source is not None:
            source = await self._take(_SOURCE + attempt.source)
        try:
            counted = await self._take_account(attempt, seen)
        except Exception:  # not a cancellation: nobody waits any more, least of all for a store
            if source is not None:
                await self._give_back(source)
            raise
        failures = counted[0].failures
        return Reservation(
            attempt=attempt,
            locked=failures > self._max_failures,
            locks=failures == self._max_failures,
            untold=self._max_failures < failures < TOLD,
            counted=counted if source is None else (*counted, source),
        )

    async def failed(self, reservation: Reservation) -> None:  # noqa: B027 - the usual case, not a gap
        """The password was wrong: what was counted stays."""

    async def succeeded(self, reservation: Reservation) -> None:
        """Forget the failures of the account; give the source its attempt back, and no more.

        An account that was locked while this attempt was checked stays so.
        """
        for counted in reservation.counted:
            await (self._give_back(counted) if counted.of_source else self._forget(counted))

    async def released(self, reservation: Reservation) -> None:
        """Give every counter its attempt back."""
        for counted in reservation.counted:
            await self._give_back(counted)

    async def lock(self, reservation: Reservation) -> bool:
        """Lock the account for good, unless its failures have been forgotten meanwhile.

        Returns:
            Whether the caller is to tell it. He has a minute: he may be killed, or the database may
            refuse the row of a handler, and then an attempt after that minute tells it.
        """
        account = reservation.counted[0]
        return await self._lock(account) and await self._undertake_to_tell(account)

    async def told(self, reservation: Reservation) -> None:
        """Remember that somebody knows of the lock."""
        await self._remember_told(reservation.counted[0])

    async def _look(self, attempt: Attempt) -> Count | None:
        """Look at the account without counting, so that refusing an attempt writes nothing."""
        try:
            return await self._peek(_ACCOUNT + attempt.account)
        except TooEarly:
            if attempt.source is None or not await attempt.familiar():
                raise
        return None

    async def _take_account(self, attempt: Attempt, seen: Count | None) -> tuple[Counted, ...]:
        key = _ACCOUNT + attempt.account
        try:
            return (await self._take(key, seen=seen),)
        except TooEarly:
            if attempt.source is None or not await attempt.familiar():
                raise
        own = await self._take(f"{_FAMILIAR}{attempt.account}:{attempt.source}")
        try:
            return await self._take(key, unlimited=True), own
        except Exception:
            await self._give_back(own)
            raise

    @staticmethod
    def _is_source(key: str) -> bool:
        return key.startswith(_SOURCE)

    @staticmethod
    def _is_account(key: str) -> bool:
        """Failures in a row are those of an account, and of nothing else."""
        return key.startswith(_ACCOUNT)

    async def _peek(self, key: str) -> Count | None:
        """Return a counter as it is, for `_take` to go by, if looking is cheaper than counting.

        Raises:
            TooEarly: It would refuse one more.
        """
        return None

    @abstractmethod
    async def _take(
        self, key: str, *, unlimited: bool = False, seen: Count | None = None
    ) -> Counted:
        """Count one attempt in one atomic step; if *unlimited* only its failure in a row.

        Raises:
            TooEarly: It is.
        """

    @abstractmethod
    async def _give_back(self, counted: Counted) -> None:
        """Take one attempt off a counter."""

    @abstractmethod
    async def _forget(self, counted: Counted) -> None:
        """Set a counter to zero, unless it is that of a locked account."""

    @abstractmethod
    async def _lock(self, counted: Counted) -> bool:
        """Add `LOCKED` to the failures in a row once, if they are so many.

        Returns:
            Whether it is added, by whomever, and `TOLD` is not.
        """

    @abstractmethod
    async def _undertake_to_tell(self, counted: Counted) -> bool:
        """Tell whether nobody has called this within the last minute."""

    @abstractmethod
    async def _remember_told(self, counted: Counted) -> None:
        """Add `TOLD` to the failures in a row of a locked account, if it has not been added."""


def source_of(ip: str | None) -> str | None:
    """Return the network that counts as one source: an IPv4 address, the /64 of an IPv6 address.

    Anything else is taken as it is: the caller knows what it gives.
    """
    if ip is None or not ip.strip():
        return None
    try:
        address = ipaddress.ip_address(ip.strip())
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)
