"""Subscriptions to names: order, refusals at registration, threads, growth."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tests.support.memory import blocks
from tortoise_auth import AuthConfig, AuthService, events
from tortoise_auth.events import (
    Event,
    EventEmitter,
    Listening,
    SubscriptionError,
    SubscriptionWarning,
    UserLogin,
    UserLogout,
)
from tortoise_auth.events.event_emitter import deliverer_of
from tortoise_auth.events.registry import _MAX_SHAPES
from tortoise_auth.events.subscription import Delivery

Handler = Callable[..., Any]

ADA = User(id=7, email="ada@example.com")
MEMBERS = ("actor", "context", "event", "id", "occurred_at", "subject_id")


@pytest.fixture
def strict() -> EventEmitter:
    return EventEmitter(strict=True)


def noting(order: list[Any], what: object) -> Handler:
    async def handler(*args: object) -> None:
        order.append(what)

    return handler


@dataclass(frozen=True, kw_only=True)
class ParcelSent(Event):
    """An event of the host's own."""

    parcel_id: int


class TestOrder:
    async def test_lower_priority_first(self, emitter: EventEmitter) -> None:
        """Handlers run by priority, lower first and 10 by default, whatever was registered first."""
        order: list[Any] = []
        for priority in (30, 10, -5, 0):
            emitter.on("evt", noting(order, priority), priority=priority)
        emitter.on("evt", noting(order, "default"))
        await emitter.emit("evt")
        assert order == [-5, 0, 10, "default", 30]

    async def test_ties_in_order_of_registration(self, emitter: EventEmitter) -> None:
        """Handlers of equal priority run in the order of registration, also across ``*``."""
        order: list[Any] = []
        for number in range(5):
            emitter.on("evt", noting(order, number))
            emitter.on("evt", noting(order, -number), priority=5)
        await emitter.emit("evt")
        assert order == [0, -1, -2, -3, -4, 0, 1, 2, 3, 4]

    async def test_listeners_to_everything_take_their_turn(self, emitter: EventEmitter) -> None:
        """``*`` is ordered among the others: by priority, and equals by registration."""
        order: list[Any] = []
        emitter.on("*", noting(order, "all"))
        emitter.on("*", noting(order, "all, early"), priority=1)
        emitter.on("evt", noting(order, "evt"))
        emitter.on("evt", noting(order, "evt, late"), priority=20)
        await emitter.emit("evt")
        assert order == ["all, early", "all", "evt", "evt, late"]


class TestForms:
    async def test_decorator_with_options(self, emitter: EventEmitter) -> None:
        """Options stand beside the names, and one handler may have several names."""
        order: list[str] = []

        @emitter.on("a", "b", priority=1)
        async def early() -> None:
            order.append("early")

        emitter.on("a", noting(order, "late"))
        emitter.on("b", noting(order, "late"))
        await emitter.emit("a")
        await emitter.emit("b")
        assert order == ["early", "late"] * 2

    async def test_direct(self, emitter: EventEmitter) -> None:
        """With a function at the end, `on` and `once` register at once and return that function."""
        order: list[str] = []
        handler = noting(order, "on")
        assert emitter.on("a", handler) is handler
        assert emitter.once("a", handler) is handler
        await emitter.emit("a")
        await emitter.emit("a")
        assert order == ["on"] * 3

    async def test_several_classes_and_names(self, emitter: EventEmitter) -> None:
        """Classes, classes with their user, and names can stand side by side."""
        received: list[str] = []

        async def note(event: Event) -> None:
            received.append(event.name)

        for form in (UserLogin, UserLogout[User]):
            emitter.on(form, note)
        await emitter.emit(UserLogin(user=ADA, session_id="s"))
        await emitter.emit(UserLogout(user=ADA))
        assert received == ["user_login", "user_logout"]

    async def test_off(self, emitter: EventEmitter) -> None:
        """`off` removes every registration of a handler, or of all, by name or class, silently."""
        order: list[str] = []
        gone, stays = noting(order, "gone"), noting(order, "stays")
        for handler in (gone, stays, gone):
            emitter.on("user_login", handler)
        emitter.once("user_login", gone)
        emitter.off(UserLogin, gone)
        emitter.off("user_login", gone)
        emitter.off("never registered")
        await emitter.emit("user_login")
        assert order == ["stays"]
        emitter.off("user_login")
        assert emitter.events() == []

    def test_clear_all(self, emitter: EventEmitter) -> None:
        """After `clear` there are no subscriptions, and every name is free again."""
        for event in ("a", "b", "*"):
            emitter.on(event, noting([], event), name=event)
        emitter.clear()
        assert emitter.events() == []
        for event in ("a", "b", "*"):
            emitter.on(event, noting([], event), name=event)
        assert emitter.events() == ["*", "a", "b"]


class TestRefused:
    def test_missing_argument_on_a_strict_emitter(self, strict: EventEmitter) -> None:
        """A parameter that the event never has is refused, with its name, the handler and the choices."""

        async def audit(user: object, reason: str) -> None: ...

        with pytest.raises(SubscriptionError) as refused:
            strict.on("user_login", audit)
        available = ", ".join(sorted([*MEMBERS, "user", "session_id", "method"]))
        assert str(refused.value) == (
            "Handler 'audit' for event 'user_login' requires 'reason', which this event never "
            f"has. It may name: {available}."
        )
        assert isinstance(refused.value, TypeError)
        assert strict.events() == []

    def test_on_the_library_s_own_emitter(self) -> None:
        """The shared emitter is strict."""

        async def audit(*, password: str) -> None: ...

        with pytest.raises(SubscriptionError, match="'audit' for event 'user_login_failed' req"):
            events.on("user_login_failed", audit)
        assert audit not in events.emitter.listeners("user_login_failed")

    def test_all_events_or_none(self, strict: EventEmitter) -> None:
        """A handler that fits one of its events and not the other is registered for neither."""

        async def audit(user: object) -> None: ...

        with pytest.raises(SubscriptionError, match="for event 'user_login_failed'"):
            strict.on("user_login", "user_login_failed")(audit)
        assert strict.events() == []

    def test_host_events_are_checked_too(self, strict: EventEmitter) -> None:
        """The host's own classes are declared events like those of the library."""

        async def track(parcel_id: int, weight: float) -> None: ...

        with pytest.raises(SubscriptionError, match="'weight', which this event never has"):
            strict.on("parcel_sent", track)

    @pytest.mark.parametrize(
        "handler",
        [
            lambda: None,
            lambda event, more: None,
            lambda event, *, more: None,
            lambda *, event: None,
        ],
        ids=["nothing", "two", "a keyword more", "a keyword"],
    )
    @pytest.mark.parametrize("event", [UserLogin, Event, "*"], ids=str)
    def test_handlers_that_cannot_take_the_event(
        self, emitter: EventEmitter, event: Any, handler: Handler
    ) -> None:
        """By class and with ``*`` the event is the one argument; other handlers are refused anywhere."""
        with pytest.raises(
            SubscriptionError, match="with the event object alone and must take one"
        ):
            emitter.on(event, handler)

    def test_by_class_and_everything_there_is_nothing_to_check(self, strict: EventEmitter) -> None:
        """A handler that receives the event object may call it what it likes."""

        async def handler(whatever: Event) -> None: ...

        strict.on(UserLogin, handler)
        strict.on("*", handler)
        assert strict.events() == ["*", "user_login"]

    def test_private_emitters_are_free(self, emitter: EventEmitter) -> None:
        """Other emitters may use the names of the catalogue for any payload, without a word."""

        async def handler(anything: int, at: int, all_: int) -> None: ...

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in ("user_login", "user_logged_in", "userlogin"):
                emitter.on(name, handler)
        assert emitter.events() == ["user_logged_in", "user_login", "userlogin"]

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("user_logged_in", "user_login"),
            ("userlogin", "user_login"),
            ("user_login_fail", "user_login_failed"),
            ("passwort_changed", "password_changed"),
            ("parcel_send", "parcel_sent"),
            ("UserLogin", "user_login"),
            ("login", "user_login"),
            ("LOGOUT", "user_logout"),
            ("user-login-failed", "user_login_failed"),
            ("user.login", "user_login"),
            ("ParcelSent", "parcel_sent"),
            ("password_change", "password_changed"),
            ("on_user_login", "user_login"),
        ],
    )
    def test_near_misses_warn(self, strict: EventEmitter, name: str, meant: str) -> None:
        """A name that is nearly a declared one is registered with a warning at the caller's line."""

        def handler() -> None: ...

        forms: list[Callable[[], object]] = [
            lambda: strict.on(name)(handler),
            lambda: strict.on(name, handler),
            lambda: strict.once(name, handler),
            lambda: strict.add_listener(name, handler),
        ]
        for register in forms:
            with pytest.warns(SubscriptionWarning, match=f"'{name}'.*mean '{meant}'") as caught:
                register()
            assert caught[0].filename == __file__
        assert strict.events() == [name]

    @pytest.mark.parametrize(
        "name",
        [
            "order_paid",
            "password_reset",
            "user_deleted",
            "email_changed",
            "session",
            "password_expired",
        ],
    )
    def test_names_of_the_host_s_own(self, strict: EventEmitter, name: str) -> None:
        """A name that is another event, whatever words it shares, is free on strict emitters too."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            strict.on(name, lambda order_id, amount: None)
        assert strict.events() == [name]

    @pytest.mark.parametrize("checked", [False, True])
    def test_a_taken_name(self, checked: bool) -> None:
        """Two subscriptions cannot have one ``name``, on any emitter, for any events."""
        kind = EventEmitter(strict=checked)
        kind.on("a", noting([], 1), name="shop.audit")
        with pytest.raises(SubscriptionError) as refused:
            kind.on("b", noting([], 2), name="shop.audit")
        assert str(refused.value) == (
            "Handler 'handler' for event 'b': the name 'shop.audit' is taken by a handler for 'a'. "
            "Give another one with name=."
        )
        assert kind.events() == ["a"]

    async def test_a_name_is_free_again(self, emitter: EventEmitter) -> None:
        """A subscription that is removed, consumed or undone by `restore` frees its name."""
        ways: list[Callable[[Handler], object]] = [
            lambda handler: emitter.off("evt", handler),
            lambda handler: emitter.remove_listener("evt", handler),
            lambda handler: emitter.clear("evt"),
            lambda handler: emitter.clear(),
            lambda handler: deliverer_of(emitter).registry.restore({}),
        ]
        for free in ways:
            handler = noting([], 1)
            emitter.on("evt", handler, name="shop.audit")
            free(handler)
        emitter.once("evt", noting([], 2), name="shop.audit")
        await emitter.emit("evt")
        emitter.on("evt", noting([], 3), name="shop.audit")
        before = deliverer_of(emitter).registry.snapshot()
        emitter.clear()
        deliverer_of(emitter).registry.restore(before)
        with pytest.raises(SubscriptionError, match="taken"):
            emitter.on("evt", noting([], 4), name="shop.audit")

    def test_several_events_share_a_name(self, emitter: EventEmitter) -> None:
        """One registration for several events is one name, taken until the last of them is gone."""
        handler = noting([], 1)
        emitter.on("a", "b", name="shop.audit")(handler)
        emitter.off("a")
        with pytest.raises(SubscriptionError, match="taken by a handler for 'b'"):
            emitter.on("c", handler, name="shop.audit")
        emitter.off("b")
        emitter.on("c", handler, name="shop.audit")
        assert [row.name for row in emitter.describe()] == ["shop.audit"]

    def test_durable_names_must_differ(self, emitter: EventEmitter) -> None:
        """Rows are delivered by name, so durable handlers of one default name are refused."""
        emitter.on("a", noting([], 1), delivery="durable")
        with pytest.raises(SubscriptionError, match=r"noting.*handler' is taken"):
            emitter.on("b", noting([], 2), delivery="durable")
        emitter.on("b", noting([], 2), delivery="durable", name="second")
        emitter.on("a", noting([], 3))
        assert [row.delivery for row in emitter.describe()] == ["inline", "durable", "durable"]

    @pytest.mark.parametrize("durable_first", [True, False])
    def test_a_function_may_be_durable_and_not(
        self, emitter: EventEmitter, durable_first: bool
    ) -> None:
        """A default name conflicts with durable ones alone, whichever is registered first."""
        handler = noting([], 1)
        registrations = [
            partial(emitter.on, "a", handler, delivery="durable"),
            partial(emitter.on, "b", handler),
        ]
        for register in registrations if durable_first else reversed(registrations):
            register()
        assert emitter.events() == ["a", "b"]

    @pytest.mark.parametrize(
        "register",
        [
            lambda emitter, handler: emitter.on(handler),
            lambda emitter, handler: emitter.on()(handler),
            lambda emitter, handler: emitter.once(handler),
            lambda emitter, handler: emitter.once()(handler),
        ],
        ids=["on", "on()", "once", "once()"],
    )
    def test_no_event(
        self, emitter: EventEmitter, register: Callable[[EventEmitter, Handler], object]
    ) -> None:
        """``@on`` without parentheses or a name is refused with the right form."""
        with pytest.raises(SubscriptionError, match=r'Say which event.*@on\("user_login"\)'):
            register(emitter, noting([], 1))
        assert emitter.events() == []

    @pytest.mark.parametrize("handler", [None, 7, "name"])
    def test_no_handler(self, emitter: EventEmitter, handler: Any) -> None:
        """What cannot be called is no handler."""
        with pytest.raises(SubscriptionError, match=f"not {handler!r}"):
            emitter.add_listener("evt", handler)
        with pytest.raises(SubscriptionError, match=f"not {handler!r}"):
            emitter.on("evt")(handler)
        assert emitter.events() == []

    @pytest.mark.parametrize(
        "handler", [None, 7, [], {}, object(), b"mail"], ids=lambda value: type(value).__name__
    )
    @pytest.mark.parametrize("event", ["evt", UserLogin, "user_*", "*"])
    def test_no_handler_comes_last(self, emitter: EventEmitter, event: Any, handler: Any) -> None:
        """In the direct form, too, what cannot be called is refused, and not taken for an event."""
        for method in (emitter.on, emitter.once):
            with pytest.raises(SubscriptionError, match="A handler is a function"):
                method(event, handler)
            with pytest.raises(SubscriptionError, match="A handler is a function"):
                method(event, "evt", handler)
        assert emitter.events() == []

    @pytest.mark.parametrize(
        "event", [None, 7, [], object(), "", int], ids=lambda value: type(value).__name__
    )
    def test_no_event_is_refused_at_once(self, emitter: EventEmitter, event: Any) -> None:
        """What is no event is refused where it is named, and not when the decorator is used."""
        with pytest.raises(SubscriptionError, match=r"named by text or by its class|which event"):
            emitter.on(event)
        with pytest.raises(SubscriptionError, match=r"named by text or by its class|A handler is"):
            emitter.on(event, "evt")

    @pytest.mark.parametrize("arguments", [("evt",), ("evt", "audit"), (UserLogin, "audit")])
    def test_no_handler_at_all(self, emitter: EventEmitter, arguments: Any) -> None:
        """A decorator that is used for no function warns: a name in place of a function is an event."""
        for method in (emitter.on, emitter.once):
            with pytest.warns(SubscriptionWarning, match="was given no handler") as caught:
                method(*arguments)
            assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            emitter.on(*arguments)(noting([], 1))

    def test_generator_functions(self, emitter: EventEmitter) -> None:
        """A call of a generator function runs nothing, so it is refused, however it is wrapped."""

        async def pages(user: object) -> AsyncIterator[int]:
            yield 1

        def lines(user: object) -> Iterator[int]:
            yield 1

        class Callable_:
            async def __call__(self, user: object) -> AsyncIterator[int]:
                """Yield one."""
                yield 1

            def method(self, user: object) -> Iterator[int]:
                """Yield one."""
                yield 1

        for handler in (pages, lines, partial(pages), Callable_(), Callable_().method):
            with pytest.raises(SubscriptionError, match="is a generator function"):
                emitter.on("evt", handler)
        assert emitter.events() == []

    def test_methods_of_builtins(self, emitter: EventEmitter) -> None:
        """A handler without a module has a name."""
        emitter.on("evt", dict.get)
        emitter.on("evt", str.upper, delivery="background")
        names = [each.handler for each in emitter.describe()]
        assert names == ["builtins:dict.get", "builtins:str.upper"]

    def test_the_event_as_a_keyword(self, emitter: EventEmitter) -> None:
        """``event_name=`` names the event, as in older emitters."""
        handler = noting([], 1)
        emitter.on(event_name="a")(handler)
        emitter.once(event_name="b", priority=3)(handler)
        emitter.add_listener(event_name="c", handler=handler)
        assert emitter.events() == ["a", "b", "c"]
        emitter.remove_listener(event_name="c", handler=handler)
        emitter.clear(event_name="a")
        assert [each.priority for each in emitter.describe()] == [3]


class TestLooking:
    def test_describe(self, emitter: EventEmitter) -> None:
        """`describe` lists the handlers of each event, in order, with their delivery."""

        @emitter.on("user_login", priority=20, timeout=2)
        async def audit() -> None: ...

        @emitter.on("user_login", delivery="background", name="mail", once=True)
        def greet() -> None: ...

        here = f"{__name__}:{type(self).__name__}.test_describe.<locals>"
        row = partial(Listening, event="user_login", priority=10)
        assert emitter.describe() == [
            row(
                position=1,
                handler=f"{here}.audit",
                name=f"{here}.audit",
                delivery="inline",
                priority=20,
                once=False,
                timeout=2,
                threaded=False,
            ),
            row(
                position=2,
                handler=f"{here}.greet",
                name="mail",
                delivery="background",
                once=True,
                timeout=None,
                threaded=True,
            ),
        ]

    async def test_describe_is_the_order_of_the_calls(self, sqlite: TortoiseContext) -> None:
        """The positions are the turns in which one change calls its handlers, whatever their priority."""
        emitter, order = EventEmitter(), list[Any]()
        for priority, delivery in enumerate(reversed(get_args(Delivery))):
            handler = noting(order, delivery)
            emitter.on("user_login", handler, delivery=delivery, priority=priority, name=delivery)
        service = AuthService(User, AuthConfig(secret=SECRET), emitter=emitter)
        await User.create_user(email=EMAIL, password=PASSWORD)
        await service.login(EMAIL, PASSWORD)
        await emitter.aclose()
        await service.relay().drain()
        assert order == [each.name for each in emitter.describe()]
        assert len(order) == 4

    def test_events(self, emitter: EventEmitter) -> None:
        """`events` are the names that have a subscription, sorted."""
        handler = noting([], 1)
        emitter.on("b", "*", "a")(handler)
        emitter.off("b")
        assert emitter.events() == ["*", "a"]

    def test_known_events(self, emitter: EventEmitter) -> None:
        """The catalogue and the host's classes are known, bases and placeholders are not."""
        known = emitter.known_events()
        assert {"user_login", "login_throttled", "parcel_sent"} <= set(known)
        assert not {"event", "user_event", "named_event"} & set(known)
        assert known == sorted(known)

    def test_listeners_include_those_to_everything(self, emitter: EventEmitter) -> None:
        """`listeners` are what an emit would run: in order, as they were registered, in a new list."""
        all_, own = noting([], 1), partial(noting([], 2))
        emitter.on("*", all_)
        emitter.on("evt", own)
        assert emitter.listeners("evt") == [all_, own]
        assert emitter.listeners("other") == [all_]
        emitter.listeners("evt").clear()
        assert emitter.listeners("evt") == [all_, own]

    def test_subscriptions_by_delivery(self, emitter: EventEmitter) -> None:
        """Subscriptions can be asked for by how they are delivered."""
        emitter.on("evt", noting([], 1), delivery="background", name="later")
        emitter.on("evt", noting([], 2), name="now")
        assert [each.name for each in emitter.subscriptions("evt", "background")] == ["later"]
        assert [each.name for each in emitter.subscriptions("evt")] == ["later", "now"]
        assert emitter.subscriptions("other") == ()


class TestChangesDuringAnEmit:
    @pytest.mark.parametrize("limit", [None, 60], ids=["short path", "general path"])
    async def test_wait_for_the_next(self, emitter: EventEmitter, limit: float | None) -> None:
        """Handlers added or removed by a handler count from the next emit on."""
        order: list[str] = []
        removed, added = noting(order, "removed"), noting(order, "added")

        async def changing() -> None:
            order.append("changing")
            emitter.off("evt", removed)
            emitter.on("evt", added, priority=-1)

        emitter.on("evt", changing, timeout=limit)
        emitter.on("evt", removed)
        await emitter.emit("evt")
        assert order == ["changing", "removed"]
        order.clear()
        emitter.off("evt", changing)
        await emitter.emit("evt")
        assert order == ["added"]

    async def test_clearing_everything(self, emitter: EventEmitter) -> None:
        """An emit in progress finishes with the handlers it began with."""
        order: list[str] = []

        async def clearing() -> None:
            emitter.clear()

        emitter.on("evt", clearing)
        emitter.on("evt", noting(order, "after"))
        emitter.on("*", noting(order, "all"))
        await emitter.emit("evt")
        await emitter.emit("evt")
        assert order == ["after", "all"]


class TestThreads:
    async def test_registering_while_a_loop_emits(self, emitter: EventEmitter) -> None:
        """Threads register and remove while a loop emits: nothing breaks, the rest stays correct."""
        threads, rounds = 4, 60
        received: list[object] = []
        failed: list[BaseException] = []
        emitter.on("evt", noting(received, "constant"))

        def hammer(number: int) -> None:
            try:
                for turn in range(rounds):
                    name = f"{number}.{turn}"
                    handler = noting(received, name)
                    emitter.on("evt", f"only {name}", name=name, priority=turn % 3)(handler)
                    emitter.on("*", handler)
                    emitter.describe()
                    emitter.off("*", handler)
                    emitter.remove_listener("evt", handler)
                    if turn % 2:
                        emitter.off(f"only {name}")
            except Exception as error:  # noqa: BLE001 - whatever it is
                failed.append(error)

        running = [threading.Thread(target=hammer, args=(number,)) for number in range(threads)]
        for thread in running:
            thread.start()
        emits = 0
        while any(thread.is_alive() for thread in running):
            await emitter.emit("evt")
            emits += 1
        for thread in running:
            thread.join()
        assert failed == []
        assert received.count("constant") == emits > 0
        assert len(emitter.listeners("evt")) == 1
        kept = {f"only {n}.{turn}" for n in range(threads) for turn in range(0, rounds, 2)}
        assert set(emitter.events()) == kept | {"evt"}

    async def test_once_for_one_of_many_loops(self, emitter: EventEmitter) -> None:
        """Loops in several threads that emit at the same moment share one ``once`` call."""
        ran: list[int] = []
        threads, rounds = 4, 50
        barrier = threading.Barrier(threads)

        def emit() -> None:
            async def emits() -> None:
                for _ in range(rounds):
                    if barrier.wait(timeout=10) == 0:
                        emitter.once("evt", lambda: ran.append(1), thread=False)
                    barrier.wait(timeout=10)
                    await emitter.emit("evt")

            asyncio.run(emits())

        await asyncio.gather(*(asyncio.to_thread(emit) for _ in range(threads)))
        assert len(ran) == rounds


def seconds_to_register(count: int, options: Callable[[int], dict[str, Any]]) -> float:
    emitter = EventEmitter()
    handler = noting([], 1)
    began = time.thread_time()
    for number in range(count):
        emitter.on("evt", handler, **options(number))
    assert len(emitter.listeners("evt")) == count
    return time.thread_time() - began


class TestGrowth:
    @pytest.mark.parametrize(
        "options",
        [lambda number: {}, lambda number: {"name": f"n{number}", "priority": -number}],
        ids=["plain", "named"],
    )
    def test_registering_is_linear(self, options: Callable[[int], dict[str, Any]]) -> None:
        """Ten thousand handlers cost five times what two thousand do, with room for noise."""
        seconds_to_register(100, options)
        ratios = [
            seconds_to_register(10_000, options) / seconds_to_register(2_000, options)
            for _ in range(5)
        ]
        assert min(ratios) < 12  # quadratic would be 25, however busy the machine is

    async def test_ten_thousand_run_in_order(self, emitter: EventEmitter) -> None:
        """All of ten thousand handlers run, in their order."""
        order: list[int] = []
        for number in range(10_000):
            emitter.on("evt", noting(order, number))
        await emitter.emit("evt")
        assert order == list(range(10_000))

    @pytest.mark.parametrize(
        "everything", [False, True], ids=["no listener", "a listener to everything"]
    )
    async def test_unknown_names_leave_nothing(
        self, emitter: EventEmitter, everything: bool
    ) -> None:
        """A hundred thousand distinct names leave nothing behind, also with a subscription to ``*``."""
        received = [0]

        async def count(event: Event) -> None:
            received[0] += 1

        if everything:
            emitter.on("*", count)
        for warm_up in range(100):
            await emitter.emit(f"warm {warm_up}")
        received[0] = 0
        before = blocks()
        for number in range(100_000):
            await emitter.emit(f"unknown {number}")
        assert blocks() - before < 1_000
        assert received[0] == (100_000 if everything else 0)
        assert emitter.events() == (["*"] if everything else [])

    async def test_asking_leaves_nothing_either(self, emitter: EventEmitter) -> None:
        """Listing, removing and clearing names without a subscription leave nothing behind."""
        before, refused = blocks(), 0
        for number in range(10_000):
            name = f"unknown {number}"
            emitter.listeners(name)
            emitter.off(name)
            emitter.clear(name)
            emitter.emit_nowait(name)
            try:
                emitter.remove_listener(name, print)
            except ValueError:
                refused += 1
        assert refused == 10_000
        assert blocks() - before < 1_000

    def test_handlers_that_are_gone_leave_nothing(self, emitter: EventEmitter) -> None:
        """Handlers that are removed, and their names, leave nothing behind."""

        def come_and_go(number: int) -> None:
            handler = noting([], number)
            emitter.on(f"evt {number}", "*", name=f"name {number}")(handler)
            emitter.listeners(f"evt {number}")
            emitter.off(f"evt {number}")
            emitter.remove_listener("*", handler)

        come_and_go(-1)
        before = blocks()
        for number in range(3_000):
            come_and_go(number)
        assert blocks() - before < 500

    async def test_made_up_keywords_do_not_fill_memory(self, emitter: EventEmitter) -> None:
        """However many payload shapes are emitted, a bounded number is remembered."""
        received: list[int] = []

        async def handler(wanted: int) -> None:
            received.append(wanted)

        emitter.on("evt", handler)
        table = deliverer_of(emitter).registry.table("evt")
        assert table is not None
        for number in range(10 * _MAX_SHAPES):
            await emitter.emit("evt", wanted=number, **{f"made up {number}": 0})
            assert len(table._calls) <= _MAX_SHAPES
        assert received == list(range(10 * _MAX_SHAPES))
