"""`EventEmitter`: emitting from wherever the program is, and the end of what is under way."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from types import TracebackType
from typing import Any, Self

from tortoise_auth.events.background import BackgroundQueue
from tortoise_auth.events.catalog import Event
from tortoise_auth.events.delivery import Dispatcher
from tortoise_auth.events.invocation import Emission

logger = logging.getLogger("tortoise_auth.events")


class EventEmitter(Dispatcher):
    """Calls handlers when something happened.

    By default handlers run one after the other, lower ``priority`` first, ties in the order of
    registration; each sees what the one before did to a mutable payload. A handler that fails is
    logged with its traceback, and the next one runs.

    Example::

        emitter = EventEmitter()

        @emitter.on("user_login", timeout=2)
        async def audit(user): ...

        @emitter.on(UserLogin, delivery="background")
        async def greet(event: UserLogin[User]): ...

    Args:
        propagate_errors: The same as ``errors="raise"``.
        errors: ``"log"`` failures and go on (default), ``"raise"`` the first as `EventError` and
            stop, or run all and raise one ``ExceptionGroup`` of them (``"group"``).
        concurrent: Run the async handlers of an event at the same time, after the plain functions.
            No failure cancels another handler. Inside a transaction they run one by one, because
            savepoints of one connection cannot overlap.
        strict: Refuse handlers that need arguments which their event never has, and warn of names
            that are nearly those of known events.
        on_error: Called with every `EventError`, whatever the policy: for metrics.
        backend: Carries out background deliveries; by default a `BackgroundQueue` in memory.

    Raises:
        ValueError: ``errors`` is unknown, or contradicts ``propagate_errors``.
    """

    def emit_nowait(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run all handlers of *event* in the background, after those of earlier calls; return at once.

        Warning: it waits for no transaction that is open here, and nothing can be vetoed: what it
        tells of must have happened. `emit` waits for the commit with its background handlers.

        Raises:
            RuntimeError: No event loop is running: use `emit_sync`, or `emit_threadsafe` from a
                thread beside it.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "emit_nowait() needs a running event loop. Use emit_sync() where there is none, or "
                "emit_threadsafe(loop, ...) from another thread."
            ) from None
        emission = Emission.of(event, args, kwargs)
        self._submit(emission, self.subscriptions(emission.name))

    def emit_sync(self, event: str | Event, /, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Run all handlers of *event*, async ones too, from code without an event loop.

        Returns when they are done, those in the background included, unless a backend of your own
        takes these.

        Raises:
            RuntimeError: An event loop is running in this thread; await `emit`.
            EventError: As `emit` does.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._emit_and_drain(event, args, kwargs))
        else:
            raise RuntimeError(
                "emit_sync() would block the running event loop. Use `await emit(...)`, or "
                "emit_nowait(...)."
            )

    def emit_threadsafe(
        self,
        loop: asyncio.AbstractEventLoop,
        event: str | Event,
        /,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> concurrent.futures.Future[None]:
        """Run `emit` on *loop* from another thread.

        Returns:
            A future of that thread's world; ``result()`` waits for the handlers.
        """
        return asyncio.run_coroutine_threadsafe(self.emit(event, *args, **kwargs), loop)

    # ---- background -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start the backend, where it has something to start; the built-in one has not."""
        await self.backend.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self, timeout: float | None = None) -> list[str]:  # noqa: ASYNC109 - the deadline is the feature
        """Finish what is under way in the background, also what that emits; then stop.

        The emitter works on as before afterwards.

        Args:
            timeout: Seconds; after that the rest is cancelled.

        Returns:
            Descriptions of the deliveries that were lost; they have been logged, too.
        """
        now = asyncio.get_running_loop().time
        ends = None if timeout is None else now() + timeout

        def left() -> float | None:
            return None if ends is None else max(0.0, ends - now())

        lost = await self._finish_tasks(left())
        if not isinstance(self.backend, BackgroundQueue):
            lost += await self._leave_backend(left())
            return lost + await self._finish_tasks(left())
        lost += await self.backend.drain(left())
        while not lost and self._under_way():  # what the background began, which may fill it again
            lost += await self._finish_tasks(left())
            lost += await self.backend.drain(left())
        return lost

    async def _leave_backend(self, timeout: float | None) -> list[str]:  # noqa: ASYNC109 - as above
        try:
            async with asyncio.timeout(timeout) as scope:
                await self.backend.__aexit__(None, None, None)
        except TimeoutError:
            if not scope.expired():
                raise
            lost = f"what {type(self.backend).__name__} had not finished"
            logger.error("Closed with deliveries lost: %s", lost)
            return [lost]
        return []

    def _under_way(self) -> list[asyncio.Task[Any]]:
        """Return the tasks of handlers in this loop, but the one that asks."""
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        return [
            task
            for task in tuple(self._stragglers)  # other loops, in other threads, add theirs
            if task.get_loop() is loop and task is not current
        ]

    async def _finish_tasks(self, timeout: float | None) -> list[str]:  # noqa: ASYNC109 - as above
        """Wait for the tasks of handlers in this loop; cancel those that are late, and name them."""
        waiting = self._under_way()
        if not waiting:
            return []
        _, late = await asyncio.wait(waiting, timeout=timeout)
        for task in late:
            task.cancel()
            logger.error("%s was not over when the emitter was closed", task.get_name())
        return [task.get_name() for task in late]

    async def _emit_and_drain(
        self, event: str | Event, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            await self.emit(event, *args, **kwargs)
        finally:
            if isinstance(self.backend, BackgroundQueue):
                await self.aclose()
            else:  # which may be running in another loop
                await self._finish_tasks(None)


emitter = EventEmitter(strict=True)
"""The emitter that models and services use unless they are given another."""

on = emitter.on
once = emitter.once
off = emitter.off
emit = emitter.emit
emit_nowait = emitter.emit_nowait
emit_sync = emitter.emit_sync
add_listener = emitter.add_listener
remove_listener = emitter.remove_listener
