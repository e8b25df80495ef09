"""Delivering where no event loop runs: plain functions are called here, the rest in a loop of its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tortoise_auth.events.delivery import Deliverer, Settled
from tortoise_auth.events.invocation import Emitted, Nested, call, is_handler_failure
from tortoise_auth.events.subscription import Subscription

ResultT = TypeVar("ResultT")


class OwnLoop:
    """An event loop that is made when there is something to run in it.

    It is never the current loop of the thread, which `asyncio.run` would replace and then unset.

    Args:
        finish: Run at the end, if anything was run.
    """

    def __init__(self, finish: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._finish = finish
        self._runner: asyncio.Runner | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._runner is not None:
            with self._runner as runner:
                runner.run(self._finish())

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run *work* to its end."""
        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        return self._runner.run(work)


def deliver_here(
    deliverer: Deliverer, emitted: Emitted, subscriptions: Sequence[Subscription], loop: OwnLoop
) -> None:
    """Deliver as `Deliverer.deliver` does, with plain functions on this thread.

    Those with a timeout need a thread that can be left behind, and those of a concurrent emitter
    run beside others.
    """
    if deliverer.concurrent or not any(map(_runs_here, subscriptions)):
        if subscriptions:
            loop.run(deliverer.deliver(emitted, subscriptions))
        return
    inline = [each for each in subscriptions if each.delivery == "inline"]
    before = [each for each in subscriptions if each.delivery in ("transaction", "durable")]
    background = [each for each in subscriptions if each.delivery == "background"]
    if before:
        loop.run(deliverer.deliver(emitted, before))
    try:
        settled: list[Settled] = []
        for each in inline:
            if _runs_here(each):
                settled.append(_settle(deliverer, emitted, each, loop))
            else:
                settled.append(loop.run(deliverer.settle(emitted, each)))
            if settled[-1].failure is not None and deliverer.errors == "raise":
                break
        deliverer.conclude(emitted, settled)
    finally:
        if background:
            loop.run(deliverer.deliver(emitted, background))


def _runs_here(subscription: Subscription) -> bool:
    plain = not subscription.is_async and subscription.timeout is None
    return plain and subscription.delivery == "inline"


def _settle(
    deliverer: Deliverer, emitted: Emitted, subscription: Subscription, loop: OwnLoop
) -> Settled:
    if subscription.once and not deliverer.registry.consume(subscription):
        return Settled([])
    try:
        with deliverer.observing(emitted, subscription), Nested():
            args, kwargs = emitted.arguments_for(subscription)
            result = call(subscription.handler, args, kwargs)
            if inspect.isawaitable(result):
                result = loop.run(_awaiting(result))
            return Settled([result])
    except BaseException as failure:
        if not is_handler_failure(failure):
            raise
        return Settled([], deliverer.failed(emitted.name, subscription.handler, failure))


async def _awaiting(result: Awaitable[object]) -> object:
    return await result
