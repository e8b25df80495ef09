"""What can happen: one frozen dataclass per lifecycle event. This page is the published interface.

An event names something that *did* happen. It carries ids and plain values; the live ``user`` is
along for handlers in this process and never part of ``to_dict()``. No event has a field for a
password, token, key or hash.

Define your own events the same way::

    @dataclass(frozen=True, kw_only=True)
    class InvoicePaid(Event):
        invoice_id: int

    await emitter.emit(InvoicePaid(invoice_id=7))     # heard by @on(InvoicePaid) and @on("invoice_paid")
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, Self, TypeAlias
from uuid import UUID, uuid4

from tortoise.models import Model
from typing_extensions import TypeVar

from tortoise_auth.clock import utc_now
from tortoise_auth.context import RequestContext
from tortoise_auth.events.serialization import plain, restored

UserT = TypeVar("UserT", bound=Model, default=Model)
"""The host's user model: annotate a handler with ``UserLogin[User]`` to have ``event.user`` typed."""

Actor: TypeAlias = Literal["user", "admin", "system", "unauthenticated"]
FailureReason: TypeAlias = Literal["not_found", "inactive", "bad_password", "throttled", "locked"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        id: Unique; recognise a repeated delivery by it.
        occurred_at: When it happened, aware UTC.
        subject_id: ``str(user.pk)`` of the account it happened to, if there is one.
        actor: Who did it.
        context: Circumstances of the request.
    """

    name: ClassVar[str] = "event"
    schema_version: ClassVar[int] = 1
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that a handler subscribed by name receives as positional arguments."""
    keywords: ClassVar[tuple[str, ...]] = ()
    """Fields that it receives as keyword arguments. By default all that the class adds."""

    id: UUID = field(default_factory=uuid4)
    occurred_at: datetime = field(default_factory=utc_now)
    subject_id: str | None = None
    actor: Actor = "system"
    context: RequestContext = field(default_factory=RequestContext)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a handler subscribed by name is called with."""
        return (
            tuple(getattr(self, name) for name in self.positional),
            {name: getattr(self, name) for name in self.keywords or self._added_fields()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain values for JSON: ``name``, ``schema_version``, every field.

        Raises:
            TypeError: A field holds something that JSON cannot.
        """
        values = {name: plain(getattr(self, name), f"{self.name}.{name}") for name in _stored(self)}
        return {"name": self.name, "schema_version": self.schema_version, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the event that ``to_dict`` was called on, without the live user.

        It is equal to it if its fields hold the types that they are declared with. JSON does not
        say what a list was: a field declared as a ``Sequence`` or ``Collection`` comes back as a
        tuple, an abstract ``Set`` as a frozenset, a ``Mapping`` as a dict. Declare ``list[...]``
        if it is to be a list.

        Called on `Event` it finds the class by the name. Fields it does not know are left out, so
        that an older program reads what a newer one wrote.

        Raises:
            ValueError: It is not an event, nobody declared its name, or a field is missing or wrong.
        """
        name = data.get("name") if isinstance(data, Mapping) else None
        named = (each for each in declared_events() if each.name == name)
        found = next((each for each in named if issubclass(each, cls)), None)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a declared {cls.__name__}")
        if type(version := data.get("schema_version")) is not int or version > found.schema_version:
            raise ValueError(f"{name} has schema version {version!r}, not {found.schema_version}")
        values: dict[str, Any] = dict.fromkeys(_live(found))
        values |= restored(found, _stored(found), data)
        return found(**values)

    @classmethod
    def _added_fields(cls) -> tuple[str, ...]:
        if cls.positional:
            return ()
        common = {each.name for each in fields(Event)}
        return tuple(each.name for each in fields(cls) if each.name not in common)


@dataclass(frozen=True, kw_only=True)
class UserEvent(Event, Generic[UserT]):
    """Something that happened to an account.

    Attributes:
        user: The account. ``None`` only in an event that was rebuilt from JSON after the account
            was deleted.
    """

    positional: ClassVar[tuple[str, ...]] = ("user",)

    user: UserT = field(repr=False, compare=False, metadata={"live": True})
    actor: Actor = "user"


@dataclass(frozen=True, kw_only=True)
class UserLogin(UserEvent[UserT]):
    """A session was opened.

    Attributes:
        session_id: The public id of the session.
        method: How the person proved who they are.
    """

    session_id: str
    method: str = "password"


@dataclass(frozen=True, kw_only=True)
class UserLoginFailed(Event):
    """A login was refused.

    Attributes:
        identifier: What was typed, bounded, NUL and lone surrogates replaced. People type their
            password into this box: do not log it as it is.
        reason: Why. Warning: for your audit, never for the visitor.
        user_id: ``str(user.pk)`` if such an account exists.
    """

    keywords: ClassVar[tuple[str, ...]] = ("identifier", "reason")

    identifier: str = field(repr=False)
    reason: FailureReason
    user_id: str | None = None
    actor: Actor = "unauthenticated"


@dataclass(frozen=True, kw_only=True)
class UserLogout(UserEvent[UserT]):
    """One session ended at the user's wish, or (``everywhere``) all of them.

    Attributes:
        session_id: The session that ended; ``None`` if ``everywhere``.
        sessions_ended: How many ended, at least 1.
        everywhere: It was ``logout_all``.
    """

    session_id: str | None = None
    sessions_ended: int = 1
    everywhere: bool = False


@dataclass(frozen=True, kw_only=True)
class PasswordChanged(UserEvent[UserT]):
    """A new password was stored.

    Attributes:
        sessions_ended: How many sessions ended for it.
    """

    sessions_ended: int = 0


@dataclass(frozen=True, kw_only=True)
class PasswordChangeFailed(UserEvent[UserT]):
    """A password change was refused because of the current password. The old one stays.

    Who asked for it had a session: warn the user, who may not have been the one.

    Attributes:
        reason: Why.
    """

    keywords: ClassVar[tuple[str, ...]] = ("reason",)

    reason: FailureReason


@dataclass(frozen=True, kw_only=True)
class PasswordRehashed(UserEvent[UserT]):
    """The password is the same, its stored hash was replaced by one of today's cost."""

    actor: Actor = "system"


@dataclass(frozen=True, kw_only=True)
class SessionRefreshed(UserEvent[UserT]):
    """A refresh token was spent and replaced.

    Attributes:
        session_id: The public id of the session.
        generation: How often it has been refreshed.
    """

    session_id: str
    generation: int


@dataclass(frozen=True, kw_only=True)
class SessionRevoked(UserEvent[UserT]):
    """One session was ended from a list of sessions.

    Attributes:
        session_id: The public id of the session.
    """

    session_id: str


@dataclass(frozen=True, kw_only=True)
class RefreshTokenReused(UserEvent[UserT]):
    """A spent refresh token was presented, and the session ended for it (RFC 9700, 4.14.2).

    Attributes:
        session_id: The public id of the session that ended.
    """

    session_id: str
    actor: Actor = "unauthenticated"


@dataclass(frozen=True, kw_only=True)
class UserRegistered(UserEvent[UserT]):
    """An account was created by ``create_user``."""


@dataclass(frozen=True, kw_only=True)
class UserDeactivated(UserEvent[UserT]):
    """An account was deactivated, and all its sessions ended.

    Attributes:
        sessions_ended: How many.
    """

    sessions_ended: int
    actor: Actor = "admin"


@dataclass(frozen=True, kw_only=True)
class UserActivated(UserEvent[UserT]):
    """An account was activated again. No session came back."""

    actor: Actor = "admin"


@dataclass(frozen=True, kw_only=True)
class LoginThrottled(Event):
    """A login, or a password change, was refused unheard because there had been too many.

    Attributes:
        identifier: What was typed, see `UserLoginFailed`; at a password change that of the account.
        retry_after: Seconds to wait.
        attempted: What was refused.
    """

    keywords: ClassVar[tuple[str, ...]] = ("identifier", "retry_after")

    identifier: str = field(repr=False)
    retry_after: float
    attempted: Literal["login", "password_change"] = "login"
    actor: Actor = "unauthenticated"


@dataclass(frozen=True, kw_only=True)
class AccountLocked(UserEvent[UserT]):
    """So many logins failed in a row that the password is disabled until it is changed.

    Sessions go on, and a password reset opens the account again (NIST SP 800-63B-4, 3.2.2).
    """

    actor: Actor = "unauthenticated"


@dataclass(frozen=True, kw_only=True)
class NamedEvent(Event):
    """What a listener to everything receives for an event that was emitted by name alone.

    Attributes:
        args, kwargs: The payload. In ``to_dict()`` whatever JSON cannot hold is named by its type;
            ``repr()`` leaves it out, since nobody knows what is in it.
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NamedEvent:
        """Return the event *name* with a payload."""
        event = cls(args=tuple(args), kwargs=MappingProxyType(dict(kwargs)))
        object.__setattr__(event, "name", name)
        return event

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.id}>"

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the payload."""
        return tuple(self.args), dict(self.kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain values for JSON."""
        bare = Event(
            id=self.id,
            occurred_at=self.occurred_at,
            subject_id=self.subject_id,
            actor=self.actor,
            context=self.context,
        )
        return {
            **bare.to_dict(),
            "name": self.name,
            "args": [_plain_or_type(value) for value in self.args],
            "kwargs": {name: _plain_or_type(value) for name, value in self.kwargs.items()},
        }


def declared_events() -> list[type[Event]]:
    """Return every class of event there is: the library's and the host's."""
    found: list[type[Event]] = []
    waiting = Event.__subclasses__()
    while waiting:
        each = waiting.pop(0)
        waiting += each.__subclasses__()
        if each not in (UserEvent, NamedEvent):
            found.append(each)
    return found


def _stored(event: Event | type[Event]) -> list[str]:
    return [each.name for each in fields(event) if not each.metadata.get("live")]


def _live(event: type[Event]) -> list[str]:
    return [each.name for each in fields(event) if each.metadata.get("live")]


def _plain_or_type(value: object) -> object:
    try:
        return plain(value, "payload")
    except TypeError:
        return f"<{type(value).__name__}>"
