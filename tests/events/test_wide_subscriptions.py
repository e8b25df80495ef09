"""Subscriptions to a base class and to a pattern: what reaches them, in which order, at what cost."""

from __future__ import annotations

import gc
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, assert_type

import pytest
from tortoise.context import TortoiseContext

from tests.support.app import User
from tests.support.memory import blocks
from tortoise_auth import events
from tortoise_auth.database import connection_for
from tortoise_auth.events import (
    Event,
    EventEmitter,
    NamedEvent,
    SubscriptionError,
    UserEvent,
    UserLogin,
    UserLoginFailed,
    UserLogout,
)
from tortoise_auth.events.event_emitter import deliverer_of
from tortoise_auth.events.registry import _MAX_MADE_UP
from tortoise_auth.events.relay import Relay
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.models import OutboxEntry

ADA = User(id=7, email="ada@example.com")
LOGIN = UserLogin(user=ADA, session_id="s-1")


@dataclass(frozen=True, kw_only=True)
class Storefront(Event):
    """A base of a host's, which can be emitted as well."""

    shop: str = "Paris"


@dataclass(frozen=True, kw_only=True)
class CartFilled(Storefront):
    """Derived from it, with a name of its own form."""

    name: ClassVar[str] = "shop.cart_filled"

    items: int = 1


@dataclass(frozen=True, kw_only=True)
class CartEmptied(Storefront):
    """Derived from it as well."""

    name: ClassVar[str] = "shop.cart_emptied"


@dataclass(frozen=True, kw_only=True)
class KioskLogin(UserLogin[User]):
    """A login with another name."""


@pytest.fixture
def strict() -> EventEmitter:
    return EventEmitter(strict=True)


def noting(calls: list[Any], what: object = None) -> Callable[..., Any]:
    async def handler(*args: object) -> None:
        calls.append(what if what is not None else args[0])

    return handler


class TestBase:
    async def test_every_subclass(self, emitter: EventEmitter) -> None:
        """A handler of a base gets the objects of all classes that are derived from it, and no other."""
        received: list[Event] = []

        @emitter.on(UserEvent)
        async def audit(event: UserEvent[User]) -> None:
            assert_type(event.user, User)
            received.append(event)

        emitted = [LOGIN, UserLogout(user=ADA), KioskLogin(user=ADA, session_id="s-2")]
        for event in (*emitted, UserLoginFailed(identifier="x", reason="not_found"), CartFilled()):
            await emitter.emit(event)
        assert received == emitted

    async def test_itself(self, emitter: EventEmitter) -> None:
        """A base that is emitted itself reaches its handlers, but not those of a subclass."""
        received: list[Event] = []
        emitter.on(Storefront, noting(received))
        emitter.on(CartFilled, noting(received, "derived"))
        event = Storefront()
        await emitter.emit(event)
        assert received == [event]

    async def test_subclass_of_a_library_event(self, emitter: EventEmitter) -> None:
        """A class derived from an event reaches the handlers of that event by class, not by name."""
        received: list[Event] = []
        emitter.on(UserLogin, noting(received))
        emitter.on("user_login", noting(received, "by name"))
        event = KioskLogin(user=ADA, session_id="s-1")
        await emitter.emit(event)
        assert received == [event]

    async def test_declared_later(self, emitter: EventEmitter) -> None:
        """A class that is declared after the subscription, and after an emit of its name, counts."""
        received: list[Event] = []
        emitter.on(Storefront, noting(received))
        await emitter.emit("shop_closed_at_last")

        @dataclass(frozen=True, kw_only=True)
        class ShopClosedAtLast(Storefront):
            """Only now."""

        await emitter.emit(ShopClosedAtLast())
        assert [type(event) for event in received] == [ShopClosedAtLast]

        @dataclass(frozen=True, kw_only=True)
        class ShopSold(ShopClosedAtLast):
            """And only then."""

        await emitter.emit(ShopSold())
        assert [type(event) for event in received] == [ShopClosedAtLast, ShopSold]

    async def test_by_name_alone(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An emit by name has no object for a handler by class, which is logged as a failure."""
        emitter.on(Storefront, noting([]))
        await emitter.emit("shop.cart_filled")
        assert "needs an event object" in caplog.text

    async def test_once(self, emitter: EventEmitter) -> None:
        """`once` means the first event of any of the classes."""
        received: list[Event] = []
        emitter.once(Storefront, noting(received))
        for event in (CartEmptied(), CartFilled()):
            await emitter.emit(event)
        assert [event.name for event in received] == ["shop.cart_emptied"]
        assert emitter.events() == []

    def test_removal(self, emitter: EventEmitter) -> None:
        """It is removed by its class, and removing an event leaves handlers of its base alone."""
        handler = noting([])
        emitter.on(UserEvent, handler)
        emitter.off("user_login")
        emitter.clear(UserLogin)
        assert emitter.listeners("user_login") == emitter.listeners(UserEvent) == [handler]
        with pytest.raises(ValueError, match="not registered for event 'user_login'"):
            emitter.remove_listener(UserLogin, handler)
        emitter.remove_listener(UserEvent[User], handler)
        assert emitter.listeners("user_login") == []

    def test_looking(self, emitter: EventEmitter) -> None:
        """`events`, `subscriptions` and `describe` name it by its class."""
        emitter.on(UserEvent, noting([]), name="audit", delivery="background")
        assert emitter.events() == ["user_event"]
        assert [each.name for each in emitter.subscriptions("user_logout", "background")] == [
            "audit"
        ]
        assert emitter.subscriptions("shop.cart_filled") == ()
        assert [(row.event, row.name) for row in emitter.describe()] == [("user_event", "audit")]

    @pytest.mark.parametrize("checked", [False, True])
    def test_named_event(self, checked: bool) -> None:
        """`NamedEvent` is no base of anything."""
        with pytest.raises(SubscriptionError, match="has the name that it was emitted by"):
            EventEmitter(strict=checked).on(NamedEvent, noting([]))

    def test_abstract_class(self, strict: EventEmitter, emitter: EventEmitter) -> None:
        """A strict emitter refuses an abstract class as long as nothing is derived from it."""

        class Abstract(Event, ABC):
            @abstractmethod
            def total(self) -> int: ...

        with pytest.raises(SubscriptionError) as refused:
            strict.on(Abstract, noting([]))  # type: ignore[type-abstract]
        assert str(refused.value) == (
            "Handler 'handler' for Abstract: the class is abstract, and no class of events is "
            "derived from it, so that no event can reach the handler. Import the module that "
            "declares the events before this line."
        )
        assert strict.events() == []
        emitter.on(Abstract, noting([]))  # type: ignore[type-abstract]

        @dataclass(frozen=True, kw_only=True)
        class Concrete(Abstract):
            """Not abstract."""

            def total(self) -> int:
                return 1

        strict.on(Abstract, noting([]))  # type: ignore[type-abstract]
        assert len(strict.listeners(Concrete)) == len(emitter.listeners(Concrete)) == 1

    def test_the_library_s_own_emitter(self) -> None:
        """On the shared emitter, which is strict, bases and classes of the host are fine."""
        handler = noting([])
        for base in (UserEvent, Storefront):
            events.on(base, handler)
            events.off(base, handler)


class TestPattern:
    async def test_by_name(self, emitter: EventEmitter) -> None:
        """A pattern selects names; the handler gets the arguments, as by name."""
        received: list[object] = []

        @emitter.on("order.*")
        async def note(order_id: int, **rest: object) -> None:
            received.append((order_id, rest))

        await emitter.emit("order.paid", order_id=7, amount=3)
        await emitter.emit("orders", order_id=8)
        await emitter.emit("Order.paid", order_id=9)
        assert received == [(7, {"amount": 3})]

    async def test_of_an_object(self, emitter: EventEmitter) -> None:
        """From an object it gets the fields that it names."""
        received: list[object] = []

        @emitter.on("shop.*")
        async def note(shop: str, event: Event, items: int = 0) -> None:
            received.append((shop, event.name, items))

        await emitter.emit(CartFilled(items=3))
        await emitter.emit(CartEmptied())
        assert received == [("Paris", "shop.cart_filled", 3), ("Paris", "shop.cart_emptied", 0)]

    @pytest.mark.parametrize(
        ("pattern", "name", "selected"),
        [
            ("order.*", "order.paid", True),
            ("order.*", "order.", True),
            ("order.*", "reorder.paid", False),
            ("*.paid", "order.paid", True),
            ("order.?", "order.7", True),
            ("order.?", "order.77", False),
            ("order.[0-9]", "order.7", True),
            ("order.[!0-9]", "order.7", False),
            ("order.[[]7]", "order.[7]", True),
            ("order.[7]", "order.[7]", True),
            ("**", "anything", True),
            ("order.paid", "order.paid", True),
            ("order+paid", "orderrpaid", False),
        ],
    )
    async def test_rules(
        self, emitter: EventEmitter, pattern: str, name: str, selected: bool
    ) -> None:
        """The rules are those of `fnmatch`, whatever the case; a pattern selects itself, too."""
        calls: list[object] = []
        emitter.on(pattern, noting(calls, "called"))
        await emitter.emit(name)
        assert calls == ["called"] * selected

    async def test_everything_is_no_pattern(self, emitter: EventEmitter) -> None:
        """``*`` alone gets the object, ``**`` the arguments."""
        received: list[object] = []
        emitter.on("*", noting(received))
        emitter.on("**", noting(received))
        await emitter.emit("evt", 7)
        assert isinstance(received[0], NamedEvent)
        assert received[1] == 7

    def test_removal(self, emitter: EventEmitter) -> None:
        """It is removed by its text, and removing one name leaves it alone."""
        handler = noting([])
        emitter.on("order.*", handler)
        emitter.off("order.paid")
        assert emitter.listeners("order.paid") == [handler]
        emitter.off("order.*")
        assert emitter.listeners("order.paid") == []
        assert emitter.events() == []

    def test_without_a_match(self, strict: EventEmitter, emitter: EventEmitter) -> None:
        """A strict emitter refuses a pattern that matches no declared name; others do not."""
        with pytest.raises(SubscriptionError) as refused:
            strict.on("ordr.*", noting([]))
        assert str(refused.value) == (
            "Handler 'handler' for event 'ordr.*': no declared event has a name that matches this "
            "pattern, so that no event can reach the handler. Import the module that declares the "
            "events before this line, or use an emitter that is not strict."
        )
        assert strict.events() == []
        emitter.on("ordr.*", noting([]))
        strict.on("shop.*", noting([]))

    def test_missing_argument(self, strict: EventEmitter) -> None:
        """A strict emitter names the event that has not what the handler requires."""

        async def audit(user: object) -> None: ...

        with pytest.raises(SubscriptionError, match="for event 'user_login_failed' requires 'user"):
            strict.on("user_login*", audit)
        strict.on("session_*", audit)
        assert strict.events() == ["session_*"]


class TestOrder:
    async def test_of_all_kinds(self, emitter: EventEmitter) -> None:
        """Priority first, then registration, whatever kind a subscription is of."""
        calls: list[object] = []
        selectors: list[Any] = [
            "*",
            CartFilled,
            "shop.*",
            Storefront,
            "shop.cart_filled",
            Event,
            "*_filled",
        ]
        for number, selector in enumerate(selectors * 2):
            emitter.on(selector, noting(calls, number))
            emitter.on(selector, noting(calls, -number), priority=5)
        await emitter.emit(CartFilled())
        count = len(selectors) * 2
        assert calls == [*(-number for number in range(count)), *range(count)]

    async def test_one_registration_runs_once(self, emitter: EventEmitter) -> None:
        """Where several selectors of one call match an event, the handler runs once, as by name."""
        received: list[object] = []

        @emitter.on("*", "shop.*", "shop.cart_filled")
        async def note(event: Event) -> None:
            received.append(event)

        event = CartFilled()
        await emitter.emit(event)
        assert received == [event]
        emitter.off("shop.cart_filled")
        await emitter.emit(event)
        assert received == [event] * 2

    async def test_changes_count(self, emitter: EventEmitter) -> None:
        """What was added or removed counts from the next emit on, for names that were emitted before."""
        calls: list[object] = []
        for selector in ("shop.*", Storefront, "*", "shop.cart_filled"):
            handler = noting(calls, str(selector))
            await emitter.emit(CartFilled())
            await emitter.emit("shop.made_up")
            emitter.on(selector, handler)
            await emitter.emit(CartFilled())
            assert calls == [str(selector)]
            emitter.off(selector, handler)
            calls.clear()

    async def test_restored(self, emitter: EventEmitter) -> None:
        """`restore` brings patterns and bases back, and takes away what came since."""
        calls: list[object] = []
        emitter.on("order.*", noting(calls, "pattern"))
        emitter.on(Storefront, noting(calls, "base"))
        before = deliverer_of(emitter).registry.snapshot()
        emitter.clear()
        emitter.on("other.*", noting(calls, "other"))
        deliverer_of(emitter).registry.restore(before)
        for event in ("order.paid", "other.paid", CartFilled()):
            await emitter.emit(event)
        assert calls == ["pattern", "base"]


class TestDurable:
    @pytest.mark.parametrize("selector", [Storefront, "shop.*", "*"], ids=str)
    async def test_is_delivered(
        self, sqlite: TortoiseContext, emitter: EventEmitter, selector: Any
    ) -> None:
        """The relay finds the subscription of a row by the name of the event, and delivers once."""
        received: list[str] = []

        async def note(event: Event) -> None:
            received.append(event.name)

        emitter.on(selector, "shop.cart_emptied", delivery="durable", name="stock")(note)
        async with UnitOfWork(connection_for(OutboxEntry), emitter) as unit:
            for event in (CartFilled(), CartEmptied()):
                unit.record(event)
        assert await OutboxEntry.all().count() == 2
        assert await Relay(emitter, User).drain() == 2
        assert sorted(received) == ["shop.cart_emptied", "shop.cart_filled"]


class TestGrowth:
    async def test_made_up_names_of_a_pattern(self, emitter: EventEmitter) -> None:
        """Any number of names that a pattern matches is served, and a bounded number remembered."""
        calls: list[object] = []
        emitter.on("order.*", lambda number: calls.append(number), thread=False)
        emitter.on(Storefront, noting([]))
        emitter.on("*", lambda event: None, thread=False)
        for number in range(2 * _MAX_MADE_UP):
            await emitter.emit(f"order.{number}", number)
        calls.clear()
        before = blocks()
        for number in range(5_000):
            await emitter.emit(f"order.{number}", -1)
            await emitter.emit(f"other.{number}", -1)
            assert len(deliverer_of(emitter).registry._made_up) <= _MAX_MADE_UP
        assert calls == [-1] * 5_000
        assert blocks() - before < 6_000  # the calls, and no more
        assert len(deliverer_of(emitter).registry.tables) < 10

    async def test_made_up_names_beside_a_base(self, emitter: EventEmitter) -> None:
        """Names that no class has leave nothing behind where there are bases alone."""
        emitter.on(Storefront, noting([]))
        emitter.on(UserEvent, noting([]))
        await emitter.emit("warm up")
        before = blocks()
        for number in range(10_000):
            await emitter.emit(f"unknown {number}")
        assert blocks() - before < 500

    def test_emitters_are_not_kept(self) -> None:
        """That emitters learn of new classes keeps none of them alive."""
        gc.collect()
        before = blocks()
        for _ in range(200):
            EventEmitter().on(UserEvent, noting([]))
        assert blocks() - before < 500

    def test_declaring_while_threads_emit(self, emitter: EventEmitter) -> None:
        """Classes are declared in threads while others look subscriptions up: nothing breaks."""
        emitter.on(Storefront, noting([]))
        handler = noting([])
        failed: list[BaseException] = []

        def declare(number: int) -> None:
            try:
                for turn in range(30):
                    name = f"shop.thread_{number}_{turn}"
                    kind = type("Declared", (Storefront,), {"name": name})
                    assert emitter.listeners(name), kind
                    emitter.on("shop.*", handler)
                    emitter.off("shop.*")
            except BaseException as error:  # noqa: BLE001 - whatever it is
                failed.append(error)

        threads = [threading.Thread(target=declare, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
