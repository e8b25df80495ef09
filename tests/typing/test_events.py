"""What mypy accepts and what it refuses of handlers.

Every ``type: ignore`` here is a test: an error that stops to be one is reported as unused.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, assert_type
from uuid import UUID

import pytest

from tests.support.app import User, UuidUser
from tortoise_auth import events
from tortoise_auth.context import RequestContext
from tortoise_auth.events import (
    Event,
    EventEmitter,
    NamedEvent,
    PasswordChanged,
    SubscriptionError,
    UserEvent,
    UserLogin,
    UserLoginFailed,
    UserLogout,
)
from tortoise_auth.testing import capture

ResultT = TypeVar("ResultT")
Handling: TypeAlias = Coroutine[Any, Any, ResultT]


@dataclass(frozen=True, kw_only=True)
class InvoicePaid(Event):
    """An event of the host's own."""

    invoice_id: int


@dataclass(frozen=True, kw_only=True)
class TrialEnded(UserEvent[User]):
    """One about an account, of the host's own model."""

    days: int


async def welcome(event: UserLogin[User]) -> None:
    assert_type(event.user, User)
    assert_type(event.user.display_name, str)
    assert_type(event.session_id, str)
    assert_type(event.context, RequestContext)
    assert_type(event.id, UUID)


async def goodbye(event: UserLogout[User]) -> None:
    assert_type(event.user, User)
    assert_type(event.everywhere, bool)


async def takes_two(event: UserLogin[User], more: int) -> None: ...


async def takes_none() -> None: ...


async def takes_text(event: str) -> None: ...


async def takes_either(event: UserLogin[User] | UserLogout[User]) -> None: ...


async def takes_any_account(event: UserEvent[User]) -> None: ...


async def takes_any(event: Event) -> None: ...


class TestByClass:
    def test_handlers_that_fit(self, emitter: EventEmitter) -> None:
        """A handler may take the class, one above it, or a union with it; async or not."""
        emitter.on(UserLogin)(welcome)
        emitter.on(UserLogin)(takes_either)
        emitter.on(UserLogin)(takes_any_account)
        emitter.on(UserLogin)(takes_any)
        emitter.on(UserLogin)(print)
        emitter.on(UserLogin, welcome, priority=1, timeout=2.0)
        emitter.on(UserLogin[User])(welcome)
        emitter.once(UserLogin)(welcome)
        emitter.once(UserLogin, welcome, delivery="background")
        assert len(emitter.listeners(UserLogin)) == 9

    def test_handlers_that_do_not(self, emitter: EventEmitter) -> None:
        """Another event, another type, or another number of parameters is refused by mypy."""
        emitter.on(UserLogin)(goodbye)  # type: ignore[arg-type]
        emitter.on(UserLogin)(takes_text)  # type: ignore[arg-type]
        emitter.on(UserLogin, goodbye)  # type: ignore[arg-type]
        emitter.once(UserLogin)(goodbye)  # type: ignore[arg-type]
        emitter.once(UserLogin, goodbye)  # type: ignore[arg-type]
        emitter.on(UserLogin)(lambda event: event.no_such_field)  # type: ignore[attr-defined]
        with pytest.raises(SubscriptionError):
            emitter.on(UserLogin)(takes_two)  # type: ignore[arg-type]
        with pytest.raises(SubscriptionError):
            emitter.on(UserLogin)(takes_none)  # type: ignore[arg-type]

    def test_the_library_s_own_emitter(self) -> None:
        """The functions of the package check as the methods do."""

        def never_called() -> None:
            events.on(UserLogin)(goodbye)  # type: ignore[arg-type]
            events.once(UserLogin)(goodbye)  # type: ignore[arg-type]

        assert callable(never_called)

    def test_two_classes(self, emitter: EventEmitter) -> None:
        """A handler of two events must take both."""
        emitter.on(UserLogin, UserLogout)(takes_either)
        emitter.on(UserLogin, UserLogout)(takes_any_account)
        emitter.on(UserLogin, UserLogout)(welcome)  # type: ignore[arg-type]
        emitter.once(UserLogin, UserLogout)(goodbye)  # type: ignore[arg-type]
        assert len(emitter.listeners(UserLogout)) == 4

    def test_a_base(self, emitter: EventEmitter) -> None:
        """A handler of a base must take every event that is derived from it."""
        emitter.on(UserEvent)(takes_any_account)
        emitter.on(UserEvent[User], takes_any)
        emitter.on(UserEvent)(welcome)  # type: ignore[arg-type]
        emitter.once(UserEvent, takes_text)  # type: ignore[arg-type]
        assert len(emitter.listeners(UserLogin)) == 4

    def test_more_classes(self, emitter: EventEmitter) -> None:
        """Three and more may be named, too."""

        @emitter.on(UserLogin, UserLogout, PasswordChanged)
        async def audit(event: UserEvent[User]) -> str:
            return event.user.display_name

        assert_type(audit(UserLogin(user=User(id=7), session_id="s")), Handling[str]).close()
        assert emitter.events() == ["password_changed", "user_login", "user_logout"]

    def test_the_user_has_the_host_s_type(self, emitter: EventEmitter) -> None:
        """The user is of the model that the annotation names; without one it is not checked.

        If it were the base, pyright would refuse ``@on(UserLogin)`` for ``UserLogin[User]``.
        """

        @emitter.on(UserLogin)
        async def other_model(event: UserLogin[UuidUser]) -> None:
            assert_type(event.user.id, UUID)

        @emitter.on(UserLogin)
        async def bare(event: UserLogin) -> None:
            assert_type(event.user, Any)

        assert len(emitter.listeners(UserLogin)) == 2

    def test_failures_have_no_user(self, emitter: EventEmitter) -> None:
        """An event that is not about a known account has no ``user`` to reach for."""

        @emitter.on(UserLoginFailed)
        async def note(event: UserLoginFailed) -> None:
            assert_type(event.user_id, str | None)
            event.user  # type: ignore[attr-defined]  # noqa: B018

        assert len(emitter.listeners(UserLoginFailed)) == 1

    def test_events_of_the_host(self, emitter: EventEmitter) -> None:
        """The host's own classes are checked alike."""

        @emitter.on(InvoicePaid)
        async def book(event: InvoicePaid) -> None:
            assert_type(event.invoice_id, int)

        @emitter.on(TrialEnded)
        async def remind(event: TrialEnded) -> None:
            assert_type(event.user, User)

        emitter.on(InvoicePaid)(remind)  # type: ignore[arg-type]
        assert emitter.events() == ["invoice_paid", "trial_ended"]


class TestByName:
    def test_any_function(self, emitter: EventEmitter) -> None:
        """By name the payload is the caller's business; the function keeps its type."""

        @emitter.on("user_login", "order_paid", priority=3, timeout=1, thread=None)
        async def audit(user: User, order_id: int = 0) -> str:
            return f"{user.pk}:{order_id}"

        assert_type(audit(User(id=7), order_id=1), Handling[str]).close()
        assert_type(emitter.on("evt", takes_none)(), Handling[None]).close()
        assert_type(emitter.once("evt")(takes_none)(), Handling[None]).close()

    def test_options(self, emitter: EventEmitter) -> None:
        """Unknown options, and values that they cannot have, are refused by mypy, too."""
        with pytest.raises(SubscriptionError):
            emitter.on("evt", prio=3)(takes_none)  # type: ignore[call-overload]
        with pytest.raises(SubscriptionError):
            emitter.on("evt", delivery="later")(takes_none)  # type: ignore[call-overload]
        with pytest.raises(SubscriptionError):
            emitter.on("evt", priority="high")(takes_none)  # type: ignore[call-overload]
        with pytest.raises(SubscriptionError):
            emitter.on(takes_none)  # type: ignore[call-overload]
        with pytest.raises(SubscriptionError):
            emitter.on("evt", timeout="2")(takes_none)  # type: ignore[call-overload]
        assert emitter.events() == []


class TestElsewhere:
    async def test_fields_cannot_be_set(self) -> None:
        """Events are frozen for mypy as they are for Python."""
        event = InvoicePaid(invoice_id=7)
        with pytest.raises(AttributeError):
            event.invoice_id = 8  # type: ignore[misc]

    def test_fields_are_keywords_of_their_type(self) -> None:
        """An event is made with keywords, and its fields have types."""
        InvoicePaid(invoice_id="7")  # type: ignore[arg-type]
        UserLoginFailed(identifier="ada", reason="because")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            InvoicePaid(UUID(int=7))  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            InvoicePaid()  # type: ignore[call-arg]

    def test_from_dict(self) -> None:
        """An event that was read is of the class that read it."""
        data = InvoicePaid(invoice_id=7).to_dict()
        assert_type(InvoicePaid.from_dict(data), InvoicePaid)
        assert_type(Event.from_dict(data), Event)

    async def test_captured(self, emitter: EventEmitter) -> None:
        """What a capture finds is of the class that was asked for."""
        with capture(emitter) as captured:
            await emitter.emit(UserLogin(user=User(id=7), session_id="s"))
            await emitter.emit("evt")
        assert_type(captured.one(NamedEvent), NamedEvent)
        assert_type(captured.one(UserLogin[User]).user, User)
        assert_type(captured[0], Event)
