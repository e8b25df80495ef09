"""Slow down guessing, in the database or wherever a host keeps its counters."""

from tortoise_auth.throttling.database import DatabaseThrottle
from tortoise_auth.throttling.protocol import (
    Attempt,
    Backoff,
    CountingThrottle,
    Reservation,
    Throttle,
    TooEarly,
    source_of,
)
from tortoise_auth.throttling.unlimited import Unlimited

__all__ = [
    "Attempt",
    "Backoff",
    "CountingThrottle",
    "DatabaseThrottle",
    "Reservation",
    "Throttle",
    "TooEarly",
    "Unlimited",
    "source_of",
]
