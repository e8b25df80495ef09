"""What the observer of an emitter is called with: for metrics, logs and feeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias
from uuid import UUID

from tortoise_auth.events.subscription import Delivery

Outcome: TypeAlias = Literal["succeeded", "failed", "timed_out", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """One call of a handler, as the observer of an emitter sees it when it is over.

    Attributes:
        event_name: The event.
        event_id: The id of the event object; ``None`` for what was emitted by name alone.
        subscription: The name of the subscription.
        delivery: The delivery of the subscription.
        outcome: ``succeeded``, ``failed`` (it raised), ``timed_out`` (its ``timeout=``) or
            ``cancelled`` (its caller was).
        seconds: How long it took.
        attempt: 1, and for a durable delivery how often the relay has called it for this row.
    """

    event_name: str
    event_id: UUID | None
    subscription: str
    delivery: Delivery
    outcome: Outcome
    seconds: float
    attempt: int = 1


Observer: TypeAlias = Callable[[Delivered], object]
