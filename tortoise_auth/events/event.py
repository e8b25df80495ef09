"""What an event is: `Event`, its bases, and which classes of events there are.

An event names something that *did* happen. It carries ids and plain values; the live ``user`` is
along for handlers in this process and never part of ``to_dict()``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import KeysView, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from inspect import get_annotations
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeAlias
from uuid import UUID, uuid4
from weakref import WeakSet

from tortoise.models import Model
from typing_extensions import TypeVar

from tortoise_auth.clock import utc_now
from tortoise_auth.context import RequestContext
from tortoise_auth.events.classification import Classification
from tortoise_auth.events.serialization import plain, restored
from tortoise_auth.frozen import FrozenDict
from tortoise_auth.legible import quoted

UserT = TypeVar("UserT", bound=Model, default=Any)
"""The host's user model: annotate a handler with ``UserLogin[User]`` to have ``event.user`` typed.

Without it the user is not checked: type checkers take the default for ``@on(UserLogin)``, too, and
pyright would refuse a handler of ``UserLogin[User]`` there for any other default.
"""

Actor: TypeAlias = Literal["user", "admin", "system", "unauthenticated"]

# Weak, so that classes and emitters that tests make and drop do not pile up.
_classes: dict[str, WeakSet[type[Event]]] = {}
class_names: KeysView[str] = _classes.keys()
"""The names of all classes of events: a live view, without a lock, for the path of every emit."""

_observers: WeakSet[DeclarationObserver] = WeakSet()
_declaring = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        id: Unique, also for a delivery that is repeated: deduplicate by it.
        occurred_at: When it happened, aware UTC.
        subject_id: ``str(user.pk)`` of the account it happened to, if there is one.
        actor: What kind of person or program did it.
        context: Circumstances of the request.
    """

    name: ClassVar[str] = "event"
    schema_version: ClassVar[int] = 1
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that a handler subscribed by name receives as positional arguments."""
    keywords: ClassVar[tuple[str, ...]] = ()
    """Fields that it receives as keyword arguments. By default all that the class adds."""
    classification: ClassVar[Classification | None] = None
    """What kind of thing it names. `tortoise_auth.events.formats` covers events that have one."""

    id: UUID = field(default_factory=uuid4)
    occurred_at: datetime = field(default_factory=utc_now)
    subject_id: str | None = None
    actor: Actor = "system"
    context: RequestContext = field(default_factory=RequestContext)

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        if "classification" in cls.__dict__:
            _check_classification(cls)
        _declare(cls)

    def classify(self) -> Classification | None:
        """Return the classification of this one event; override it where that depends on a field."""
        return self.classification

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

        Called on `Event` it looks the class up by the name. Unknown fields are left out, so that an
        older program reads what a newer one wrote.

        Raises:
            ValueError: It is not an event, its name is not declared, or a field is missing or wrong.
        """
        name = data.get("name") if isinstance(data, Mapping) else None
        named = (each for each in declared_events() if each.name == name)
        kind = next((each for each in named if issubclass(each, cls)), None)
        if kind is None:
            raise ValueError(f"{quoted(name)} is not the name of a declared {cls.__name__}")
        if type(version := data.get("schema_version")) is not int or version > kind.schema_version:
            raise ValueError(
                f"{kind.name} has schema version {quoted(version)}, not {kind.schema_version}"
            )
        values: dict[str, Any] = dict.fromkeys(_live(kind))
        values |= restored(kind, _stored(kind), data)
        return kind(**values)

    @classmethod
    def _added_fields(cls) -> tuple[str, ...]:
        if cls.positional:
            return ()
        common = {each.name for each in fields(Event)}
        return tuple(each.name for each in fields(cls) if each.name not in common)


def _declare(cls: type[Event]) -> None:
    with _declaring:
        _classes.setdefault(cls.name, WeakSet()).add(cls)
        observers = tuple(_observers)
    for observer in observers:  # without the lock: they have their own
        observer.event_declared()


def _check_classification(cls: type[Event]) -> None:
    """Refuse a classification with a word that no format knows, when the class is defined."""
    declared: object = cls.classification
    if declared is None:
        return
    where = f"{cls.__qualname__}.classification"
    if not isinstance(declared, Classification):
        raise TypeError(f"{where} must be a Classification(...), not {type(declared).__name__}")
    annotations = (get_annotations(each) for each in cls.__mro__)
    names = {name for each in annotations for name in each if "ClassVar" not in str(each[name])}
    problem = declared.problem(names)
    if problem:
        raise ValueError(f"{where}: {problem}")


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
class NamedEvent(Event):
    """The object for an event that was emitted by name alone, for subscribers to every event.

    Attributes:
        args, kwargs: The payload. In ``to_dict()`` whatever JSON cannot hold is named by its type;
            ``repr()`` leaves it out, since it may hold anything.
    """

    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> NamedEvent:
        """Return the event *name* with a payload."""
        event = cls(args=tuple(args), kwargs=FrozenDict(kwargs))
        # The name is of the class elsewhere. Here it is of the one event, and events are frozen.
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


def classes_named(name: str) -> tuple[type[Event], ...]:
    """Return the classes of events of one name: one, unless two modules chose the same name."""
    with _declaring:
        return tuple(_classes.get(name, ()))


class DeclarationObserver(Protocol):
    """Wants to know when there is a new class of events; the reference to it is weak."""

    def event_declared(self) -> None:
        """Take note that which class has which name has changed."""


def observe_declarations(observer: DeclarationObserver) -> None:
    """Call ``observer.event_declared()`` after each new class of events, as long as it lives."""
    with _declaring:
        _observers.add(observer)


def _stored(event: Event | type[Event]) -> list[str]:
    return [each.name for each in fields(event) if not each.metadata.get("live")]


def _live(event: type[Event]) -> list[str]:
    return [each.name for each in fields(event) if each.metadata.get("live")]


def _plain_or_type(value: object) -> object:
    try:
        return plain(value, "payload")
    except TypeError:
        return f"<{type(value).__name__}>"
