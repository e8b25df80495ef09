"""One handler: the options it may have, its names, and which arguments it is called with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from unittest.mock import AsyncMock, Mock, create_autospec

import pytest

from tests.support.app import User
from tortoise_auth.context import RequestContext
from tortoise_auth.events import (
    Event,
    EventEmitter,
    NamedEvent,
    SubscriptionError,
    UserEvent,
    UserLogin,
    UserLoginFailed,
)
from tortoise_auth.events.subscription import (
    Parameters,
    Subscription,
    default_name,
    describe_handler,
    event_name,
    subscribe,
)

Handler = Callable[..., Any]
Note = Callable[..., None]

ADA = User(id=7, email="ada@example.com")
CONTEXT = RequestContext(ip="192.0.2.1")
LOGIN = UserLogin(user=ADA, subject_id="7", session_id="s-1", context=CONTEXT)
FAILED = UserLoginFailed(identifier="ada@example.com", reason="bad_password", user_id="7")


@pytest.fixture
def strict() -> EventEmitter:
    return EventEmitter(strict=True)


def shapes(note: Note) -> dict[str, Handler]:
    """Return handlers of every shape; each notes what it is called with."""

    async def named(user: object) -> None:
        note(user)

    async def alias(u: object) -> None:
        note(u)

    async def nothing() -> None:
        note()

    async def further_field(session_id: str) -> None:
        note(session_id)

    async def field_then_alias(session_id: str, u: object) -> None:
        note(session_id, u)

    async def alias_then_fields(u: object, method: str, session_id: str) -> None:
        note(u, method, session_id)

    async def event_itself(event: object) -> None:
        note(event)

    async def event_and_user(event: object, user: object) -> None:
        note(event, user)

    async def context_alone(*, context: object) -> None:
        note(context)

    async def keyword_only(*, user: object) -> None:
        note(user)

    async def positional_only(user: object, /) -> None:
        note(user)

    async def positional_only_alias(u: object, /) -> None:
        note(u)

    async def default_replaced(user: object = "default") -> None:
        note(user)

    async def default_kept(user: object, extra: object = "default") -> None:
        note(user, extra)

    async def defaults_out_of_reach(extra: object = "default", user: object = "own", /) -> None:
        note(extra, user)

    async def any_positional(*args: object) -> None:
        note(*args)

    async def any_keyword(**kwargs: object) -> None:
        note(kwargs)

    async def anything(*args: object, **kwargs: object) -> None:
        note(args, kwargs)

    async def field_and_any_keyword(session_id: str, **kwargs: object) -> None:
        note(session_id, kwargs)

    return {shape.__name__: shape for shape in locals().values() if shape is not note}


CALLED_WITH: dict[str, tuple[object, ...]] = {
    "named": (ADA,),
    "alias": (ADA,),
    "nothing": (),
    "further_field": ("s-1",),
    "field_then_alias": ("s-1", ADA),
    "alias_then_fields": (ADA, "password", "s-1"),
    "event_itself": (LOGIN,),
    "event_and_user": (LOGIN, ADA),
    "context_alone": (CONTEXT,),
    "keyword_only": (ADA,),
    "positional_only": (ADA,),
    "positional_only_alias": (ADA,),
    "default_replaced": (ADA,),
    "default_kept": (ADA, "default"),
    "defaults_out_of_reach": ("default", "own"),
    "any_positional": (ADA,),
    "any_keyword": ({"user": ADA},),
    "anything": ((ADA,), {}),
    "field_and_any_keyword": ("s-1", {"user": ADA}),
}


class Mailer:
    """Handlers that are not functions."""

    def __init__(self, note: Note) -> None:
        self.note = note

    async def send(self, user: object, subject: str = "Hello") -> None:
        """An async method."""
        self.note(user, subject)

    def post(self, user: object) -> None:
        """A plain method."""
        self.note(user)


class AsyncCallable(Mailer):
    async def __call__(self, user: object) -> None:
        """Calls like a coroutine function."""
        self.note(user)


class PlainCallable(Mailer):
    def __call__(self, user: object) -> None:
        """Calls like a function."""
        self.note(user)


def kinds(note: Note) -> dict[str, Handler]:
    """Return callables of every kind that want the user."""

    class Note:
        def __init__(self, user: object) -> None:
            note(user)

        async def __call__(self) -> None:
            raise AssertionError("an instance is not a handler")

    async def send(subject: str, user: object) -> None:
        note(user)

    def plain(user: object) -> None:
        note(user)

    async def inner(user: object) -> None:
        note(user)

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, None]:
        return inner(*args, **kwargs)

    return {
        "bound async method": Mailer(note).send,
        "bound method": Mailer(note).post,
        "async callable object": AsyncCallable(note),
        "callable object": PlainCallable(note),
        "class": Note,
        "partial": functools.partial(send, "Hello"),
        "partial with a keyword": functools.partial(Mailer(note).send, subject="Hello"),
        "plain function": plain,
        "lambda": lambda user: note(user),
        "lambda returning a coroutine": lambda u: send("Hello", u),
        "wrapper returning a coroutine": wrapper,
        "mock": Mock(side_effect=note),
        "async mock": AsyncMock(side_effect=note),
        "mock of a function": create_autospec(plain, side_effect=note),
    }


class TestArguments:
    @pytest.mark.parametrize("shape", CALLED_WITH)
    async def test_of_an_event(self, emitter: EventEmitter, shape: str) -> None:
        """By name a handler gets the fields it names, the event, and positionally the user."""
        calls: list[tuple[object, ...]] = []
        emitter.on("user_login", shapes(lambda *args: calls.append(args))[shape])
        await emitter.emit(LOGIN)
        assert calls == [CALLED_WITH[shape]]

    def test_every_shape_is_tried(self) -> None:
        """The table above has a line for every handler."""
        assert set(shapes(print)) == set(CALLED_WITH)

    @pytest.mark.parametrize("kind", kinds(print))
    @pytest.mark.parametrize("thread", [None, False])
    async def test_of_any_callable(
        self,
        emitter: EventEmitter,
        kind: str,
        thread: bool | None,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Functions, methods, objects, classes, partials and mocks are called alike, everywhere."""
        users: list[object] = []
        handler = kinds(lambda user, *_: users.append(user))[kind]
        emitter.on("user_login", handler, thread=thread)
        await emitter.emit(LOGIN)
        await emitter.emit("user_login", ADA)
        assert users == [ADA, ADA]
        assert caplog.messages == []

    async def test_keywords_of_an_event(self, emitter: EventEmitter) -> None:
        """A failure has keywords: any may be named, and ``**kwargs`` are those of the contract."""
        reasons, everything, more = [], [], []

        async def one(reason: str) -> None:
            reasons.append(reason)

        async def all_of_them(**kwargs: object) -> None:
            everything.append(kwargs)

        async def further(user_id: str | None, **kwargs: object) -> None:
            more.append((user_id, kwargs))

        for handler in (one, all_of_them, further):
            emitter.on("user_login_failed", handler)
        await emitter.emit(FAILED)
        contract = {"identifier": "ada@example.com", "reason": "bad_password"}
        assert reasons == ["bad_password"]
        assert everything == [contract]
        assert more == [("7", contract)]

    async def test_builtins(self, emitter: EventEmitter) -> None:
        """A builtin without a signature gets the whole payload, one with a signature what it accepts."""
        collected: dict[str, object] = {}
        users: list[object] = []
        emitter.on("user_login_failed", collected.update)
        emitter.on("user_login", users.append)
        await emitter.emit(FAILED)
        await emitter.emit(LOGIN)
        assert collected == {"identifier": "ada@example.com", "reason": "bad_password"}
        assert users == [ADA]

    async def test_by_class_the_event_alone(self, emitter: EventEmitter) -> None:
        """By class the one argument is the event, whatever the parameter is called."""
        got: list[object] = []

        async def handler(user: object) -> None:
            got.append(user)

        emitter.on(UserLogin, handler)
        await emitter.emit(LOGIN)
        assert got == [LOGIN]

    @pytest.mark.parametrize(
        ("parameters", "args", "kwargs"),
        [
            ("x", (1,), {}),
            ("x, y", (1, 2), {}),
            ("x, y, b", (1, 2), {"b": 4}),
            ("b", (1,), {}),
            ("*, b", (), {"b": 4}),
            ("x, *, a", (1,), {"a": 3}),
            ("x, y, a, b", (1, 2), {"a": 3, "b": 4}),
            ("x, y, a, b, z=5", (1, 2), {"a": 3, "b": 4}),
            ("x, /", (1,), {}),
            ("*args", (1, 2), {}),
            ("x, *args", (1, 2), {}),
            ("x, **kwargs", (1,), {"a": 3, "b": 4}),
            ("*args, **kwargs", (1, 2), {"a": 3, "b": 4}),
            ("", (), {}),
        ],
    )
    @pytest.mark.parametrize("limit", [None, 60])
    async def test_of_a_free_payload(
        self,
        emitter: EventEmitter,
        parameters: str,
        args: tuple[int, ...],
        kwargs: dict[str, int],
        limit: float | None,
    ) -> None:
        """Surplus arguments are left out, the last first; nothing is reordered or made up."""
        spied = Mock()
        namespace: dict[str, Any] = {"spied": spied}
        exec(f"async def handler({parameters}): spied(dict(locals()))", namespace)

        emitter.on("evt", namespace["handler"], timeout=limit)
        await emitter.emit("evt", 1, 2, a=3, b=4)
        expected: dict[str, Any] = {}
        exec(f"def expect({parameters}): return dict(locals())", expected)
        spied.assert_called_once_with(expected["expect"](*args, **kwargs))

    async def test_a_missing_argument_is_a_failure(
        self, emitter: EventEmitter, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An argument that the payload lacks is a failure of the handler, and the next one runs."""
        received: list[int] = []

        async def greedy(x: int, y: int, z: int) -> None:
            received.append(-1)

        async def modest(x: int) -> None:
            received.append(x)

        emitter.on("evt", greedy)
        emitter.on("evt", modest)
        await emitter.emit("evt", 1, y=2)
        assert received == [1]
        assert "Handler 'greedy' for event 'evt' raised TypeError" in caplog.text
        assert "'z'" in caplog.text


class TestNeverSupplied:
    @pytest.mark.parametrize(
        ("handler", "missing"),
        [
            (lambda user: None, []),
            (lambda u: None, []),
            (lambda u, session_id, event, context: None, []),
            (lambda **kwargs: None, []),
            (lambda *args: None, []),
            (lambda user, extra=None: None, []),
            (dict.update, []),
            (lambda user, password: None, ["password"]),
            (lambda a, b: None, ["b"]),
            (lambda *, token: None, ["token"]),
            (lambda user, reason, *, token: None, ["reason", "token"]),
        ],
    )
    def test_by_a_login(self, handler: Handler, missing: list[str]) -> None:
        """Required parameters beyond the fields and the one positional argument are never filled."""
        assert Parameters.of(handler).never_supplied_by(UserLogin) == missing

    def test_positional_alias_without_positional_arguments(self) -> None:
        """An event with keywords alone has nothing for a parameter of another name."""
        assert Parameters.of(lambda account: None).never_supplied_by(UserLoginFailed) == ["account"]


class Client:
    """What the injection below supplies."""


def inject(handler: Handler) -> Handler:
    """Supply ``client``, as libraries of dependency injection do."""

    @functools.wraps(handler)
    async def injected(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs, client=Client())

    return injected


def inject_for_one(handler: Handler) -> Handler:
    """Supply ``client`` to a function of one argument."""

    @functools.wraps(handler)
    async def injected(user: Any) -> Any:
        return await handler(user, client=Client())

    return injected


def inject_and_show(handler: Handler) -> Handler:
    """Supply ``client`` and show the remaining parameters."""
    injected = inject(handler)
    shown = inspect.signature(handler)
    parameters = [each for name, each in shown.parameters.items() if name != "client"]
    vars(injected)["__signature__"] = shown.replace(parameters=parameters)
    return injected


class Injected:
    """The same as a callable object."""

    def __init__(self, handler: Handler) -> None:
        functools.update_wrapper(self, handler)
        self._handler = handler

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it with a client."""
        return await self._handler(*args, **kwargs, client=Client())


def retried(handler: Handler) -> Handler:
    """Pass everything on, as a decorator that logs or repeats does."""

    @functools.wraps(handler)
    async def passed_on(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs)

    return passed_on


def with_keywords(handler: Handler) -> Handler:
    """Pass keywords on, and nothing else."""

    @functools.wraps(handler)
    async def passed_on(**kwargs: Any) -> Any:
        return await handler(**kwargs, client=Client())

    return passed_on


class Mails:
    """Has handlers that are methods."""

    def __init__(self, note: Note) -> None:
        self._note = note

    @inject
    async def mail(self, user: object, *, client: Annotated[Client, "supplied"]) -> None:
        """Note what arrives."""
        self._note(user, type(client))

    @functools.lru_cache  # noqa: B019 - a handler that is cached
    def cached(self, user: object) -> None:
        """Note what arrives."""
        self._note(user, Client)


WRAPPERS: dict[str, Callable[[Handler], Handler]] = {
    "inject": inject,
    "inject for one": inject_for_one,
    "inject and show": inject_and_show,
    "object": Injected,
    "retried": lambda handler: retried(inject(handler)),
    "retried for one": lambda handler: retried(inject_for_one(handler)),
    "keywords": with_keywords,
    "partial": lambda handler: functools.partial(inject(handler)),
    "inside": lambda handler: inject(functools.partial(handler)),
}


class TestWrappers:
    @pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
    async def test_may_supply_what_the_event_has_not(
        self, strict: EventEmitter, wrapper: Callable[[Handler], Handler]
    ) -> None:
        """A handler behind any wrapper is registered and called with what its outermost takes."""
        note = Mock()

        async def mail(user: object, client: Annotated[Client, "supplied"]) -> None:
            note(user, type(client))

        strict.on("user_login", wrapper(mail))
        await strict.emit(LOGIN)
        await strict.emit("user_login", user=ADA)

        assert note.mock_calls == [((ADA, Client),)] * 2

    async def test_by_class(self, strict: EventEmitter) -> None:
        """A handler of the event object may have further parameters that a wrapper supplies."""
        note = Mock()

        @strict.on(UserLogin)
        @inject
        async def mail(event: UserLogin[User], client: Annotated[Client, "supplied"]) -> None:
            note(event, type(client))

        await strict.emit(LOGIN)

        note.assert_called_once_with(LOGIN, Client)

    @pytest.mark.parametrize("method", ["mail", "cached"])
    async def test_around_methods(self, strict: EventEmitter, method: str) -> None:
        """The account of a wrapped method is the second argument of its function."""
        note = Mock()

        strict.on("user_login", getattr(Mails(note), method))
        await strict.emit(LOGIN)

        note.assert_called_once_with(ADA, Client)

    async def test_get_what_they_take(self, strict: EventEmitter) -> None:
        """A wrapper of certain parameters gets those, whatever the function inside takes."""
        note = Mock()

        async def mail(user: object, session_id: str) -> None: ...

        @functools.wraps(mail)
        async def without_session(user: object) -> None:
            note(user)

        strict.on("user_login", without_session)
        await strict.emit(LOGIN)

        note.assert_called_once_with(ADA)

    @pytest.mark.parametrize("shown", [True, False])
    def test_are_refused_for_what_they_require(self, strict: EventEmitter, shown: bool) -> None:
        """What the outermost function itself requires, the event has to have."""

        async def mail(user: object) -> None: ...

        @functools.wraps(mail)
        async def for_tenant(user: object, *, tenant: str) -> None: ...

        if shown:
            vars(for_tenant)["__signature__"] = inspect.signature(mail)

        with pytest.raises(SubscriptionError, match="requires 'tenant'"):
            strict.on("user_login", for_tenant)

    def test_one_that_binds_a_keyword(self, strict: EventEmitter) -> None:
        """A partial of a wrapped function is seen with its keywords."""

        async def mail(user: object, *, client: Client, tenant: str) -> None: ...

        bound = functools.partial(inject(mail), tenant="a")
        assert Parameters.of(bound).never_supplied_by(UserLogin) == []
        assert Parameters.of(functools.partial(mail, tenant="a")).never_supplied_by(UserLogin) == [
            "client"
        ]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"delivery": "later"}, "unknown delivery 'later'. Use one of 'inline', 'transaction'"),
            ({"delivery": None}, "unknown delivery None"),
            ({"priority": "high"}, "priority must be an int"),
            ({"priority": 1.5}, "priority must be an int"),
            ({"priority": None}, "priority must be an int"),
            ({"timeout": 0}, "timeout must be a positive number of seconds"),
            ({"timeout": -1}, "timeout must be a positive number of seconds"),
            ({"timeout": "2s"}, "timeout must be a positive number of seconds"),
            ({"timeout": float("nan")}, "timeout must be a positive number of seconds"),
            ({"name": ""}, "name must be text of 1 to 255 characters"),
            ({"name": "x" * 256}, "name must be text of 1 to 255 characters"),
            ({"name": 7}, "name must be text of 1 to 255 characters"),
            ({"once": True, "delivery": "durable"}, "once=True cannot be kept by a durable"),
            ({"prio": 1}, "unknown option prio. There are priority, once, delivery, timeout, name"),
        ],
    )
    def test_nonsense_is_refused(
        self, emitter: EventEmitter, options: dict[str, Any], message: str
    ) -> None:
        """An option that makes no sense is refused on any emitter, naming the handler."""

        async def handler() -> None: ...

        with pytest.raises(SubscriptionError, match=f"^Handler 'handler': {message}"):
            emitter.on("evt", handler, **options)
        with pytest.raises(TypeError, match="handler"):
            emitter.add_listener("evt", handler, **options)
        assert emitter.events() == []

    @pytest.mark.parametrize(
        "handler", [AsyncCallable(print), functools.partial(AsyncCallable(print), user=1)]
    )
    def test_no_thread_for_coroutine_functions(self, handler: Handler) -> None:
        """A coroutine function cannot run on a worker thread, and asking for it is refused."""
        with pytest.raises(
            SubscriptionError, match=r"AsyncCallable.*thread=True is for plain func"
        ):
            subscribe("evt", handler, thread=True)

    @pytest.mark.parametrize(
        ("handler", "thread", "threaded"),
        [
            (print, None, True),
            (print, True, True),
            (print, False, False),
            (AsyncCallable, None, True),
            (AsyncCallable(print), None, False),
            (AsyncCallable(print), False, False),
        ],
    )
    def test_plain_functions_run_on_threads(
        self, handler: Handler, thread: bool | None, threaded: bool
    ) -> None:
        """Plain functions and classes run on threads unless ``thread=False``."""
        assert subscribe("evt", handler, thread=thread).threaded is threaded

    @pytest.mark.parametrize("event", ["", None, 7, b"user_login", int, object()])
    def test_events_are_named_by_text_or_class(self, event: Any) -> None:
        """Nothing else names an event, and the message shows how it is done."""
        with pytest.raises(SubscriptionError, match=r'Write @on\("user_login"\) or @on\(UserLogin'):
            event_name(event)

    def test_a_class_without_a_name(self) -> None:
        """`NamedEvent` has no name of its own; what to subscribe to instead is in the message."""
        with pytest.raises(SubscriptionError, match="has the name that it was emitted by"):
            event_name(NamedEvent)

    def test_names_of_classes(self) -> None:
        """A class is registered under its name, with or without its user; `Event` means all events."""
        assert event_name(UserEvent) == event_name(UserEvent[User]) == "user_event"
        assert event_name(UserLogin) == event_name(UserLogin[User]) == "user_login"
        assert event_name(Event) == "*"


class TestNames:
    @pytest.mark.parametrize(
        ("handler", "name", "described"),
        [
            (shapes, "tests.events.test_subscription:shapes", "shapes"),
            (Mailer.send, "tests.events.test_subscription:Mailer.send", "send"),
            (Mailer(print).send, "tests.events.test_subscription:Mailer.send", "send"),
            (Mailer, "tests.events.test_subscription:Mailer", "Mailer"),
            (PlainCallable(print), "tests.events.test_subscription:PlainCallable", "PlainCallable"),
            (print, "builtins:print", "print"),
            (Mock(), "unittest.mock:Mock", "Mock"),
            (
                functools.partial(functools.partial(shapes), print),
                "tests.events.test_subscription:shapes",
                "shapes",
            ),
        ],
        ids=["function", "in a class", "method", "class", "object", "builtin", "mock", "partial"],
    )
    def test_of_every_kind(self, handler: Handler, name: str, described: str) -> None:
        """A handler has the name of its function; a partial or an object has none of its own."""
        assert default_name(handler) == name
        assert describe_handler(handler) == described

    def test_given_names_count(self) -> None:
        """``name=`` replaces the default."""
        subscription = subscribe("evt", shapes, name="shop.audit")
        assert subscription.name == "shop.audit"
        assert isinstance(subscription, Subscription)
