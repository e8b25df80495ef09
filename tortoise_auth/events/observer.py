"""What the observer of an emitter is called with: for metrics, logs and feeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeAlias
from uuid import UUID

from tortoise_auth.events.invocation import Emitted, is_handler_failure
from tortoise_auth.events.subscription import Delivery, Subscription
from tortoise_auth.legible import logger_of, named

logger = logger_of("tortoise_auth.events")

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


class Observed:
    """A block that calls a handler; the observer is called when it has ended."""

    __slots__ = ("_attempt", "_began", "_emitted", "_observer", "_subscription")

    def __init__(
        self, observer: Observer, emitted: Emitted, subscription: Subscription, attempt: int
    ) -> None:
        self._observer = observer
        self._emitted = emitted
        self._subscription = subscription
        self._attempt = attempt

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._began
        event = self._emitted.event
        try:
            self._observer(
                Delivered(
                    event_name=self._emitted.name,
                    event_id=event.id if event is not None else None,
                    subscription=self._subscription.name,
                    delivery=self._subscription.delivery,
                    outcome=self._outcome(failure, seconds),
                    seconds=seconds,
                    attempt=self._attempt,
                )
            )
        except BaseException as reporting:
            if not is_handler_failure(reporting):
                raise
            logger.exception("The observer failed for event '%s'", named(self._emitted.name))

    def _outcome(self, failure: BaseException | None, seconds: float) -> Outcome:
        if failure is None:
            return "succeeded"
        if not is_handler_failure(failure):
            return "cancelled"
        limit = self._subscription.timeout
        late = isinstance(failure, TimeoutError) and limit is not None and seconds >= limit
        return "timed_out" if late else "failed"
