"""Slow down guessing: a protocol, and the rules that throttles share.

An attempt is *reserved* before the password is hashed, so that a burst cannot check more passwords
than are counted. After a few free failures each one doubles the pause. Live sessions, refresh and
password resets are not touched, and a source from which the user has logged in before has a budget
of its own: guessing from elsewhere cannot keep the user out.
"""

from __future__ import annotations

import ipaddress
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Protocol

from tortoise_auth.exceptions import ConfigurationError, ThrottledError

_ACCOUNT = "account:"
_KNOWN_SOURCE = "known_source:"
_SOURCE = "source:"
_YEAR = timedelta(days=366)

FAILURES_KEPT = timedelta(days=400)
"""How long failures in a row are remembered after the last one."""

UNDECIDED = timedelta(minutes=1)
"""How long an attempt may be in flight. After that its process was killed, and it has failed."""


async def _unknown() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt to prove a password.

    Attributes:
        account: Stands for the account, existing or not. Opaque: a throttle stores it as it is.
        source: Stands for the network it comes from; ``None`` if it is not known. Opaque, too.
        known_source: Says whether the user has logged in from there before. Called only when it
            matters.
    """

    account: str
    source: str | None
    known_source: Callable[[], Awaitable[bool]] = _unknown


@dataclass(frozen=True, slots=True)
class Counted:
    """One attempt, as it was counted by one counter.

    Attributes:
        key: The counter.
        failures: Failures in a row, if this one fails.
        limited: It counts against the budget, and not only as a failure in a row.
    """

    key: str
    failures: int = 0
    limited: bool = True

    @property
    def of_source(self) -> bool:
        """It counts what comes from one source, whatever the account."""
        return self.key.startswith(_SOURCE)

    @property
    def of_account(self) -> bool:
        """It counts failures in a row, which only the counter of an account does."""
        return self.key.startswith(_ACCOUNT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Permission to check one password.

    Attributes:
        attempt: The attempt.
        failures: Failures of the account in a row, if this attempt fails.
        max_failures: How many of them lock the password; ``None`` if none do.
        counted: What was counted, for the throttle alone.
    """

    attempt: Attempt
    failures: int = 0
    max_failures: int | None = None
    counted: tuple[Counted, ...] = field(default=(), repr=False)

    @property
    def locks(self) -> bool:
        """It is the last one that is allowed: if it fails, the password is to be locked."""
        return self.failures == self.max_failures

    @property
    def exceeded(self) -> bool:
        """So many have failed before that the password must not be checked, even if no lock is set.

        The process of the last failure was killed before the lock was written.
        """
        return self.max_failures is not None and self.failures > self.max_failures


class Throttle(Protocol):
    """Decides how often passwords may be tried. Any failure to decide must be an exception."""

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Count an attempt before its password is checked.

        Raises:
            ThrottledError: Too many came before; it was not counted and must not be checked.
        """
        ...

    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong."""
        ...

    async def succeeded(self, reservation: Reservation) -> None:
        """It was right: reset the failures of the account, but not those of the source.

        Also called for an account that was unlocked, with a reservation that counted nothing.
        """
        ...

    async def released(self, reservation: Reservation) -> None:
        """It could not be checked, and that was our fault: give the attempt back."""
        ...


class TooEarly(ThrottledError):
    """What our own throttles raise; the same error, with what may be waited for.

    Attributes:
        in_flight: The counter, if attempts that it counts are still being checked.
    """

    def __init__(self, retry_after: float, *, in_flight: str | None = None) -> None:
        super().__init__(retry_after)
        self.in_flight = in_flight


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Free attempts, then a delay that doubles with each failure.

    Attributes:
        free_attempts: Attempts without a delay.
        initial_delay: The first delay.
        max_delay: The longest delay.
        reset_after: After so long without an attempt the delays begin anew.

    Raises:
        ConfigurationError: A number or duration makes no sense.
    """

    free_attempts: int
    initial_delay: timedelta = timedelta(seconds=1)
    max_delay: timedelta = timedelta(minutes=15)
    reset_after: timedelta = timedelta(days=1)

    def __post_init__(self) -> None:
        durations = (self.initial_delay, self.max_delay, self.reset_after)
        if type(self.free_attempts) is not int or not all(
            isinstance(each, timedelta) for each in durations
        ):
            raise ConfigurationError(
                "A back-off is made of a whole number and of timedeltas: "
                "Backoff(free_attempts=10, max_delay=timedelta(minutes=15))"
            )
        ordered = timedelta(0) < self.initial_delay <= self.max_delay <= self.reset_after <= _YEAR
        if self.free_attempts < 1 or not ordered:
            raise ConfigurationError(
                "A back-off needs free_attempts >= 1 and durations with "
                "0 < initial_delay <= max_delay <= reset_after <= 366 days"
            )

    @property
    def doublings(self) -> int:
        """After so many doublings the delay is the longest one."""
        return (self.max_delay // self.initial_delay).bit_length()

    def after(self, count: int) -> timedelta:
        """Return the delay after *count* attempts."""
        if count < self.free_attempts:
            return timedelta(0)
        # Bounded before the shift, which makes a number of as many bits.
        doubled = min(count - self.free_attempts, self.doublings)
        return min(self.initial_delay * (1 << doubled), self.max_delay)


class CountingThrottle(ABC):
    """The rules that throttles share; where the counts are kept is left to subclasses.

    Source first, then the account, but what is rejected for the account counts nowhere. If the
    account is blocked and the source is one from which the user has logged in before, a counter of
    the two together decides instead, while the failures in a row still count for the account.

    Args:
        max_failures: Failures in a row after which the password is locked until it is changed
            (NIST SP 800-63B-4, 3.2.2: at most 100).

    Raises:
        ConfigurationError: ``max_failures`` is not between 1 and 100.
    """

    def __init__(self, max_failures: int) -> None:
        if type(max_failures) is not int or not 1 <= max_failures <= 100:
            raise ConfigurationError(
                "A throttle must lock a password after at most 100 failures in a row "
                "(NIST SP 800-63B-4, 3.2.2): choose max_failures between 1 and 100"
            )
        self._max_failures = max_failures

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Count an attempt before its password is checked.

        Raises:
            ThrottledError: Too many came before; it was not counted.
        """
        account = Counted(_ACCOUNT + attempt.account)
        await self._look(attempt, account)
        source = None
        if attempt.source is not None:
            source = await self._take(Counted(_SOURCE + attempt.source))
        try:
            counted = await self._take_account(attempt, account)
        except Exception:  # not a cancellation: the caller waits for no store any more
            if source is not None:
                await self._give_back(source)
            raise
        return Reservation(
            attempt=attempt,
            failures=counted[0].failures,
            max_failures=self._max_failures,
            counted=counted if source is None else (*counted, source),
        )

    async def released(self, reservation: Reservation) -> None:
        """Give every counter its attempt back."""
        for counted in reservation.counted:
            await self._give_back(counted)

    async def succeeded(self, reservation: Reservation) -> None:
        """Reset the failures of the account; give the source its attempt back, and no more."""
        for counted in self._to_reset(reservation):
            await (self._give_back(counted) if counted.of_source else self._reset(counted))

    @staticmethod
    def _to_reset(reservation: Reservation) -> tuple[Counted, ...]:
        """Return what was counted; the account, if it is unlocked without an attempt."""
        return reservation.counted or (Counted(_ACCOUNT + reservation.attempt.account),)

    async def _look(self, attempt: Attempt, account: Counted) -> None:
        """Look at the account first, so that rejecting an attempt writes nothing."""
        if attempt.source is None:
            return
        try:
            await self._peek(account)
        except TooEarly:
            if not await attempt.known_source():
                raise

    async def _take_account(self, attempt: Attempt, account: Counted) -> tuple[Counted, ...]:
        try:
            return (await self._take(account),)
        except TooEarly:
            if attempt.source is None or not await attempt.known_source():
                raise
        own = await self._take(Counted(f"{_KNOWN_SOURCE}{attempt.account}:{attempt.source}"))
        try:
            # The row of failures is one for the account, from wherever they come: NIST allows 100
            # of them (SP 800-63B-4, 3.2.2).
            return await self._take(replace(account, limited=False)), own
        except Exception:
            await self._give_back(own)
            raise

    async def _peek(self, counted: Counted) -> None:  # noqa: B027 - only where it is cheap
        """Look at a counter without counting.

        Raises:
            TooEarly: It would reject one more.
        """

    @abstractmethod
    async def _take(self, counted: Counted) -> Counted:
        """Count one attempt in one atomic step; if it is not limited, only its failure in a row.

        Raises:
            TooEarly: There were too many.
        """

    @abstractmethod
    async def failed(self, reservation: Reservation) -> None:
        """The password was wrong: what was counted stays."""

    @abstractmethod
    async def _give_back(self, counted: Counted) -> None:
        """Take one attempt off a counter."""

    @abstractmethod
    async def _reset(self, counted: Counted) -> None:
        """Set a counter to zero, but for attempts that are still being checked."""


def source_of(ip: str | None) -> str | None:
    """Return the network that counts as one source: an IPv4 address, the /64 of an IPv6 address."""
    if ip is None or ":" not in ip:
        return ip
    # A customer has all 2^64 addresses of a /64, and would have as many budgets.
    return str(ipaddress.ip_network((int(ipaddress.IPv6Address(ip)), 64), strict=False))
