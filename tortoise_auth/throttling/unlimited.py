"""No throttle: what ``throttle=None`` stands for."""

from __future__ import annotations

from tortoise_auth.throttling.protocol import Attempt, Reservation


class Unlimited:
    """Admits every attempt and counts none.

    Warning: passwords may be guessed as fast as they are hashed.
    """

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Admit it."""
        return Reservation(attempt=attempt)

    async def failed(self, reservation: Reservation) -> None:
        """Count nothing."""

    async def succeeded(self, reservation: Reservation) -> None:
        """Reset nothing."""

    async def released(self, reservation: Reservation) -> None:
        """Give nothing back."""
