"""Callers that are cancelled at any step, and changes that happen in the meantime."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import coroutine
from typing import Any, Generic, TypeVar

import pytest

from tortoise_auth.database import transactions as database_module
from tortoise_auth.passwords import PasswordHasher


async def cancel_after(owner: Any, step: str, call: Coroutine[Any, Any, object]) -> None:
    """Cancel a call while it awaits a step of *owner* whose work is already done."""
    take, taken, go_on = getattr(owner, step), asyncio.Event(), asyncio.Event()

    async def take_and_wait(*args: Any) -> Any:
        answer = await take(*args)
        taken.set()
        await go_on.wait()
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, step, take_and_wait)
        task = asyncio.ensure_future(call)
        async with asyncio.timeout(60):
            await taken.wait()
            task.cancel()
            go_on.set()
            await asyncio.wait([task])
    assert task.cancelled()


def meanwhile(
    monkeypatch: pytest.MonkeyPatch,
    hasher: PasswordHasher,
    method: str,
    change: Callable[[], Awaitable[object]],
) -> None:
    """Make *change* once, right after the next ``hash`` or ``verify`` is computed."""
    original = getattr(hasher, method)

    async def compute_then_change(*args: object) -> object:
        result = await original(*args)
        monkeypatch.setattr(hasher, method, original)
        await change()
        return result

    monkeypatch.setattr(hasher, method, compute_then_change)


ReturnT = TypeVar("ReturnT")


class Cancelled(Generic[ReturnT]):
    """Runs *work* in a task that is cancelled where it awaits for the *step*-th time.

    Args:
        work: What to run.
        step: Counted from 1. If *work* awaits less often, or at 0, it is not cancelled.
        late: Cancel when the result it awaits is ready, and before it resumes.
        lossy: The cancellation may be lost on its way. Before Python 3.12 ``asyncio.wait_for``, by
            which the pools of psycopg and asyncmy wait, forgets one that comes together with the
            result.
    """

    def __init__(
        self,
        work: Coroutine[Any, Any, ReturnT],
        step: int,
        *,
        late: bool = False,
        lossy: bool = False,
    ) -> None:
        self._work = work
        self._step = step
        self._late = late
        self._lossy = lossy
        self._seen = 0

    @property
    def reached(self) -> bool:
        """Whether *work* awaited as often as that."""
        return 0 < self._step <= self._seen

    async def run(self) -> asyncio.Task[ReturnT]:
        """Return the task when it is over: cancelled if the step was reached."""
        task = asyncio.ensure_future(self._stepping())
        await asyncio.wait([task])
        assert task.cancelled() is self.reached or (self._lossy and self.reached), task
        return task

    async def _stepping(self) -> ReturnT:
        return await self._steps()

    @coroutine
    def _steps(self) -> Generator[Any, Any, ReturnT]:
        resume, value = self._work.send, None
        try:
            while True:
                waited_for = resume(value)
                self._seen += 1
                if self._seen == self._step:
                    self._cancel(waited_for)
                try:
                    resume, value = self._work.send, (yield waited_for)
                except BaseException as error:  # noqa: BLE001 - handed on, as `await` does
                    resume, value = self._work.throw, error
        except StopIteration as stop:
            result: ReturnT = stop.value
            return result

    def _cancel(self, waited_for: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._late and asyncio.isfuture(waited_for):
            waited_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


async def finished(work: Awaitable[ReturnT]) -> ReturnT:
    """Await *work*, and fail rather than hang if it never ends."""
    async with asyncio.timeout(30):
        return await work


Work = Callable[[], Coroutine[Any, Any, object]]


async def settled() -> None:
    """Wait until no work of a cancelled caller is in flight."""
    while database_module._background:
        await asyncio.wait(database_module._background)


class Steps:
    """Cancels one task at the n-th step of any task, where one begins to wait or resumes.

    The transaction opens and ends in tasks of its own, so the steps of the caller's task alone
    would miss most of what happens.
    """

    def __init__(self, cancel_at: int, *, stubbornly: bool = False) -> None:
        self.taken = 0
        self._cancel_at = cancel_at
        self._stubbornly = stubbornly  # and at every step after it
        self._task: asyncio.Task[Any] | None = None

    async def run(self, work: Work) -> asyncio.Task[Any]:
        """Run *work* in a task, which is returned when it is done."""
        loop: Any = asyncio.get_running_loop()  # its factories are typed anew in each Python
        loop.set_task_factory(self._make_task)
        try:
            self._task = loop.create_task(work())
            await asyncio.wait([self._task])
            await settled()
        finally:
            loop.set_task_factory(None)
        return self._task

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any],
        **options: Any,
    ) -> asyncio.Task[Any]:
        async def counted() -> Any:
            return await self._drive(coroutine)

        return asyncio.Task(counted(), loop=loop, **options)

    @types.coroutine
    def _drive(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        proceed: Callable[[Any], Any] = coroutine.send
        value: Any = None
        while True:
            try:
                awaited = proceed(value)
            except StopIteration as done:
                return done.value
            self._step()
            try:
                value, proceed = (yield awaited), coroutine.send
            except BaseException as error:  # noqa: BLE001 - goes where it belongs
                value, proceed = error, coroutine.throw
            self._step()

    def _step(self) -> None:
        self.taken += 1
        due = self.taken == self._cancel_at
        again = self._stubbornly and self.taken > self._cancel_at
        if self._task is not None and (due or again):
            self._task.cancel()
