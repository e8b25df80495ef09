"""What listeners written for Tina4 rely on: direct calls, priorities, once, code without a loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest

from tortoise_auth import events
from tortoise_auth.events import EventEmitter

PATIENCE = 10.0


class TestOn:
    def test_decorator(self, emitter: EventEmitter) -> None:
        """A decorated plain function hears the event and is returned as it was."""
        sent: list[str] = []

        @emitter.on("user.created")
        def send_welcome_email(user: dict[str, str]) -> str:
            sent.append(user["email"])
            return "sent"

        emitter.emit_sync("user.created", {"name": "Alice", "email": "alice@example.com"})
        assert sent == ["alice@example.com"]
        assert send_welcome_email({"email": "bob@example.com"}) == "sent"

    def test_direct_call(self, emitter: EventEmitter) -> None:
        """``on(event, handler)`` registers and returns the handler."""
        processed: list[int] = []

        def handle_order(order: dict[str, int]) -> None:
            processed.append(order["id"])

        assert emitter.on("order.placed", handle_order) is handle_order
        emitter.emit_sync("order.placed", {"id": 42})
        assert processed == [42]

    def test_direct_call_with_priority(self, emitter: EventEmitter) -> None:
        """The direct form takes the same options as the decorator."""
        late, early = MagicMock(), MagicMock()
        emitter.on("evt", late)
        emitter.on("evt", early, priority=1)
        assert emitter.listeners("evt") == [early, late]


class TestOff:
    def test_one_handler(self, emitter: EventEmitter) -> None:
        """After ``off(event, handler)`` the handler runs no more, and the others do."""
        logged: list[int] = []
        other = MagicMock()

        def log_purchase(payload: dict[str, int]) -> None:
            logged.append(payload["order_id"])

        emitter.on("order.placed", log_purchase)
        emitter.on("order.placed", other)
        emitter.emit_sync("order.placed", {"order_id": 101})
        emitter.off("order.placed", log_purchase)
        emitter.emit_sync("order.placed", {"order_id": 102})
        assert logged == [101]
        assert other.call_count == 2

    def test_all_handlers_of_an_event(self, emitter: EventEmitter) -> None:
        """``off(event)`` removes whoever listens to it, and nobody who listens to another."""
        emitter.on("a", MagicMock())
        emitter.once("a", MagicMock())
        stays = MagicMock()
        emitter.on("b", stays)
        emitter.off("a")
        assert emitter.listeners("a") == []
        assert emitter.listeners("b") == [stays]

    def test_every_registration_of_a_duplicate(self, emitter: EventEmitter) -> None:
        """A handler that was registered twice is gone after one ``off``."""
        handler = MagicMock()
        emitter.on("evt", handler)
        emitter.on("evt", handler)
        emitter.off("evt", handler)
        assert emitter.listeners("evt") == []

    def test_unknown_is_silent(self, emitter: EventEmitter) -> None:
        """To remove what is not there changes nothing and raises nothing."""
        handler = MagicMock()
        emitter.on("evt", handler)
        emitter.off("nonexistent.event")
        emitter.off("nonexistent.event", handler)
        emitter.off("evt", MagicMock())
        assert emitter.listeners("evt") == [handler]
        assert list(emitter.events()) == ["evt"]

    def test_a_once_handler(self, emitter: EventEmitter) -> None:
        """A handler that was to run once is removed by the function that was given."""
        handler = MagicMock()
        emitter.once("evt", handler)
        emitter.off("evt", handler)
        emitter.emit_sync("evt")
        handler.assert_not_called()


class TestPriority:
    def test_lower_runs_first(self, emitter: EventEmitter) -> None:
        """Stock, then payment, then confirmation, in whatever order they were registered."""
        ran: list[str] = []

        @emitter.on("order.placed", priority=10)
        def send_confirmation(payload: dict[str, int]) -> None:
            ran.append(f"confirmation {payload['order_id']}")

        @emitter.on("order.placed", priority=1)
        def validate_stock(payload: dict[str, int]) -> None:
            ran.append(f"stock {payload['order_id']}")

        @emitter.on("order.placed", priority=5)
        def charge_payment(payload: dict[str, int]) -> None:
            ran.append(f"payment {payload['order_id']}")

        emitter.emit_sync("order.placed", {"order_id": 200})
        assert ran == ["stock 200", "payment 200", "confirmation 200"]

    def test_ten_by_default(self, emitter: EventEmitter) -> None:
        """A handler without a priority runs after 9, before 11, and among those with 10."""
        handlers = {name: MagicMock() for name in ("11", "none", "10", "9", "-1", "0")}
        for name, handler in handlers.items():
            if name == "none":
                emitter.on("evt", handler)
            else:
                emitter.on("evt", handler, priority=int(name))
        order = [
            name for each in emitter.listeners("evt") for name in handlers if handlers[name] is each
        ]
        assert order == ["-1", "0", "9", "none", "10", "11"]

    @pytest.mark.parametrize("priority", [None, 3])
    async def test_ties_in_registration_order(
        self, emitter: EventEmitter, priority: int | None
    ) -> None:
        """Handlers of one priority run as they were registered, plain and async mixed."""
        order: list[int] = []

        def plain(number: int) -> Callable[[], None]:
            return lambda: order.append(number)

        def waiting(number: int) -> Callable[[], Awaitable[None]]:
            async def handler() -> None:
                order.append(number)

            return handler

        for number in range(20):
            handler: Callable[[], object] = (plain if number % 2 else waiting)(number)
            if priority is None:
                emitter.on("evt", handler)
            else:
                emitter.on("evt", handler, priority=priority)
        await emitter.emit("evt")
        assert order == list(range(20))

    async def test_registering_in_a_handler(self, emitter: EventEmitter) -> None:
        """A handler that registers one of higher rank is not run again by the same emit."""
        order: list[str] = []

        @emitter.on("evt")
        async def registers() -> None:
            order.append("registers")
            emitter.once("evt", lambda: order.append("urgent"), priority=1)

        await emitter.emit("evt")
        assert order == ["registers"]
        await emitter.emit("evt")
        assert order == ["registers", "urgent", "registers"]


class TestOnce:
    def test_decorator(self, emitter: EventEmitter) -> None:
        """A ``once`` handler runs for the first event and is gone; the function is returned."""
        runs: list[str] = []

        @emitter.once("app.started")
        def run_migrations(payload: dict[str, str]) -> str:
            runs.append("migrated")
            return "again"

        emitter.emit_sync("app.started", {})
        emitter.emit_sync("app.started", {})
        assert runs == ["migrated"]
        assert run_migrations({}) == "again"
        assert emitter.listeners("app.started") == []
        assert list(emitter.events()) == []

    @pytest.mark.parametrize("make", [MagicMock, AsyncMock])
    def test_direct_call(self, emitter: EventEmitter, make: type[Mock]) -> None:
        """``once(event, handler)`` works for plain and async handlers alike."""
        handler = make()
        assert emitter.once("evt", handler) is handler
        assert emitter.listeners("evt") == [handler]
        emitter.emit_sync("evt", 1)
        emitter.emit_sync("evt", 2)
        handler.assert_called_once_with(1)
        if isinstance(handler, AsyncMock):
            handler.assert_awaited_once_with(1)

    def test_option(self, emitter: EventEmitter) -> None:
        """``on(..., once=True)`` is the same."""
        handler = MagicMock()
        emitter.on("evt", handler, once=True)
        emitter.emit_sync("evt")
        emitter.emit_sync("evt")
        handler.assert_called_once_with()

    def test_priority(self, emitter: EventEmitter) -> None:
        """A ``once`` handler has its place in the order like any other."""
        order: list[str] = []
        emitter.on("evt", lambda: order.append("always"))
        emitter.once("evt", lambda: order.append("once"), priority=1)
        emitter.emit_sync("evt")
        emitter.emit_sync("evt")
        assert order == ["once", "always", "always"]

    async def test_consumed_even_if_it_fails(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A ``once`` handler that fails has had its one call."""
        handler = AsyncMock(side_effect=RuntimeError("boom"))
        emitter.once("evt", handler)
        await emitter.emit("evt")
        await emitter.emit("evt")
        assert handler.await_count == 1
        assert len(caplog.records) == 1

    async def test_consumed_before_the_call(self, emitter: EventEmitter) -> None:
        """While a ``once`` handler runs it is registered no more, and may emit its own event."""
        depth: list[list[Any]] = []

        @emitter.once("evt")
        async def recursive() -> None:
            depth.append(emitter.listeners("evt"))
            await emitter.emit("evt")

        await emitter.emit("evt")
        assert depth == [[]]

    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_overlapping_emits(self, concurrent: bool) -> None:
        """Of two emits under way at the same time one runs the handler, the other does not."""
        emitter = EventEmitter(concurrent=concurrent)
        entered, proceed = asyncio.Event(), asyncio.Event()
        calls: list[int] = []

        @emitter.once("evt")
        async def slow(number: int) -> None:
            calls.append(number)
            entered.set()
            await proceed.wait()

        first = asyncio.create_task(emitter.emit("evt", 1))
        async with asyncio.timeout(PATIENCE):
            await entered.wait()
            await emitter.emit("evt", 2)
            proceed.set()
            await first
        assert calls == [1]

    async def test_emits_that_both_saw_it(self, emitter: EventEmitter) -> None:
        """Two emits that began before the handler's turn came still run it one time."""
        queueing = asyncio.Barrier(2)
        handler = AsyncMock()
        emitter.on("evt", queueing.wait, priority=1)
        emitter.once("evt", handler, priority=2)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(emitter.emit("evt", 1), emitter.emit("evt", 2))
        assert handler.await_count == 1


class TestEmitSync:
    def test_async_handlers_run(self, emitter: EventEmitter) -> None:
        """Called where no loop runs, it runs async handlers to their end, and plain ones."""
        order: list[str] = []

        @emitter.on("order.placed", priority=1)
        async def notify_warehouse(order_id: int) -> None:
            await asyncio.to_thread(lambda: None)
            order.append(f"warehouse {order_id}")

        @emitter.on("order.placed", priority=2)
        def log_order(order_id: int) -> None:
            order.append(f"log {order_id}")

        emitter.emit_sync("order.placed", 300)
        assert order == ["warehouse 300", "log 300"]

    def test_any_payload(self, emitter: EventEmitter) -> None:
        """Positional and keyword arguments arrive, also under names of its own options elsewhere."""
        handler = MagicMock()
        emitter.on("evt", handler)
        emitter.emit_sync("evt", 1, strict=True, priority=2, event="x", once=False)
        handler.assert_called_once_with(1, strict=True, priority=2, event="x", once=False)

    def test_nothing_is_left_behind(self, emitter: EventEmitter) -> None:
        """Background handlers are done when it returns, also those of events emitted meanwhile."""
        order: list[str] = []

        @emitter.on("evt", delivery="background")
        async def background() -> None:
            order.append("background")

        @emitter.on("evt")
        async def inline() -> None:
            order.append("inline")
            emitter.emit_nowait("next")

        emitter.on("next", lambda: order.append("next"))
        emitter.emit_sync("evt")
        assert sorted(order) == ["background", "inline", "next"]

    def test_nobody_listens(self, emitter: EventEmitter) -> None:
        """An event without handlers does nothing and leaves nothing."""
        emitter.emit_sync("nonexistent.event", 1)
        assert list(emitter.events()) == []

    def test_failures_are_isolated(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A failing handler is logged by name, and the handlers after it run."""
        after = MagicMock()

        @emitter.on("evt")
        def broken() -> None:
            raise ValueError("no stock")

        emitter.on("evt", after)
        emitter.emit_sync("evt")
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.getMessage() == "Handler 'broken' for event 'evt' raised ValueError: no stock"
        after.assert_called_once_with()

    def test_failures_can_be_raised(self) -> None:
        """A propagating emitter raises the first failure to the sync caller."""
        emitter, after = EventEmitter(propagate_errors=True), MagicMock()
        emitter.on("evt", AsyncMock(side_effect=ValueError("no stock")))
        emitter.on("evt", after)
        with pytest.raises(events.EventError, match="no stock"):
            emitter.emit_sync("evt")
        after.assert_not_called()

    async def test_from_a_worker_thread(self, emitter: EventEmitter) -> None:
        """A plain route handler, which a framework runs on a thread, can emit and wait."""
        threads: list[int] = []

        @emitter.on("evt")
        async def handler() -> None:
            threads.append(threading.get_ident())

        await asyncio.to_thread(emitter.emit_sync, "evt")
        assert len(threads) == 1
        assert threads[0] != threading.get_ident()

    async def test_on_a_running_loop(self, emitter: EventEmitter) -> None:
        """Inside a coroutine it refuses, before any handler ran, instead of blocking the loop."""
        handler = MagicMock()
        emitter.on("evt", handler)
        with pytest.raises(RuntimeError):
            emitter.emit_sync("evt")
        handler.assert_not_called()


class TestAsync:
    async def test_both_kinds(self, emitter: EventEmitter) -> None:
        """One ``emit`` serves plain and async handlers."""
        plain, waiting = MagicMock(), AsyncMock()
        emitter.on("evt", plain)
        emitter.on("evt", waiting)
        await emitter.emit("evt", "value")
        plain.assert_called_once_with("value")
        waiting.assert_awaited_once_with("value")

    async def test_async_objects_are_awaited(self, emitter: EventEmitter) -> None:
        """An object with an async ``__call__`` is awaited, ``once`` included."""
        awaited: list[int] = []

        class Notifier:
            async def __call__(self, number: int) -> None:
                """Take a turn of the loop, so that a dropped coroutine would show."""
                await asyncio.to_thread(lambda: None)
                awaited.append(number)

        emitter.on("evt", Notifier())
        emitter.once("evt", Notifier())
        await emitter.emit("evt", 1)
        await emitter.emit("evt", 2)
        assert awaited == [1, 1, 2]

    @pytest.mark.parametrize("thread", [None, False], ids=["on a thread", "inline"])
    async def test_sync_first_then_async_together(self, thread: bool | None) -> None:
        """With ``concurrent=True`` plain handlers run by priority, then all async ones at once."""
        emitter = EventEmitter(concurrent=True)
        together = asyncio.Barrier(2)
        ran: list[str] = []

        @emitter.on("order.placed", priority=5)
        async def send_confirmation_email(payload: dict[str, int]) -> None:
            ran.append("async starts")
            await together.wait()
            ran.append("async ends")

        @emitter.on("order.placed", priority=5)
        async def sync_warehouse(payload: dict[str, int]) -> None:
            ran.append("async starts")
            await together.wait()
            ran.append("async ends")

        @emitter.on("order.placed", priority=10, thread=thread)
        def award_loyalty_points(payload: dict[str, int]) -> None:
            ran.append("points")

        @emitter.on("order.placed", priority=2, thread=thread)
        def charge_customer(payload: dict[str, int]) -> None:
            ran.append("charge")

        @emitter.on("order.placed", priority=1, thread=thread)
        def reserve_stock(payload: dict[str, int]) -> None:
            ran.append("stock")

        async with asyncio.timeout(PATIENCE):
            await emitter.emit("order.placed", {"order_id": 301})
        assert ran == ["stock", "charge", "points", *2 * ["async starts"], *2 * ["async ends"]]


class TestPayload:
    @pytest.mark.parametrize("concurrent", [False, True])
    async def test_changes_are_seen_by_later_handlers(self, concurrent: bool) -> None:
        """What a handler adds to a mutable payload, handlers after it find there."""
        emitter = EventEmitter(concurrent=concurrent)
        confirmed: list[str] = []

        @emitter.on("order.placed")
        async def send_confirmation(payload: dict[str, str]) -> None:
            confirmed.append(payload["payment_id"])

        @emitter.on("order.placed", priority=1)
        def charge(payload: dict[str, str]) -> None:
            payload["payment_id"] = "pay_1"

        order = {"order_id": "300"}
        await emitter.emit("order.placed", order)
        assert confirmed == ["pay_1"]
        assert order == {"order_id": "300", "payment_id": "pay_1"}


class TestLooking:
    def test_listeners_by_priority(self, emitter: EventEmitter) -> None:
        """`listeners` returns the functions themselves in the order they would run."""
        first, second, third = MagicMock(), AsyncMock(), MagicMock()
        emitter.on("evt", third)
        emitter.once("evt", first, priority=1)
        emitter.on("evt", second, priority=5, delivery="background")
        assert emitter.listeners("evt") == [first, second, third]
        assert emitter.listeners("unknown") == []

    def test_events(self, emitter: EventEmitter) -> None:
        """`events` names what somebody listens to, and forgets what nobody does any more."""
        handler = MagicMock()
        emitter.on("event.a", handler)
        emitter.on("event.b", handler)
        emitter.once("event.c", handler)
        assert sorted(emitter.events()) == ["event.a", "event.b", "event.c"]
        emitter.off("event.a", handler)
        emitter.remove_listener("event.b", handler)
        emitter.emit_sync("event.c")
        assert list(emitter.events()) == []

    def test_clear(self, emitter: EventEmitter) -> None:
        """`clear` leaves no handler of any event."""
        handler = MagicMock()
        emitter.on("event.a", handler)
        emitter.once("event.b", handler)
        emitter.clear()
        assert list(emitter.events()) == []
        assert emitter.listeners("event.a") == emitter.listeners("event.b") == []
        emitter.emit_sync("event.a")
        handler.assert_not_called()


class TestModuleFunctions:
    @pytest.fixture(autouse=True)
    def _clean(self) -> Iterator[None]:
        events.emitter.clear()
        yield
        events.emitter.clear()

    def test_user_lifecycle(self) -> None:
        """The functions of the module are enough for an application with one emitter."""
        told: list[str] = []

        @events.once("app.ready")
        def on_app_ready(payload: dict[str, str]) -> None:
            told.append("ready")

        @events.on("user.created", priority=2)
        def send_welcome_email(user: dict[str, str]) -> None:
            told.append(f"welcome {user['email']}")

        @events.on("user.created", priority=1)
        def log_user_created(user: dict[str, str]) -> None:
            told.append(f"log {user['email']}")

        async def create_default_profile(user: dict[str, str]) -> None:
            told.append(f"profile {user['email']}")

        events.on("user.created", create_default_profile, priority=5)

        for _ in range(2):
            events.emit_sync("app.ready", {})
        events.emit_sync("user.created", {"email": "bob@example.com"})
        events.off("user.created", create_default_profile)
        events.emit_sync("user.created", {"email": "eve@example.com"})
        assert told == [
            "ready",
            "log bob@example.com",
            "welcome bob@example.com",
            "profile bob@example.com",
            "log eve@example.com",
            "welcome eve@example.com",
        ]
