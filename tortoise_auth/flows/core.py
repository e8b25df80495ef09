"""What every flow needs: the model, the settings, the clock, the sessions, and a unit of work."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from inspect import isawaitable
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args
from uuid import UUID

from tortoise.fields import CharField, TextField

from tortoise_auth.clock import Clock
from tortoise_auth.config import AuthConfig, checked_clock
from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.database import on_commit, wait_for
from tortoise_auth.events.catalog import Actor, Event, SessionRevoked
from tortoise_auth.events.event_emitter import EventEmitter, deliverer_of
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.legible import quoted
from tortoise_auth.models import Session, user_table
from tortoise_auth.passwords import PasswordHasher, PasswordPolicy
from tortoise_auth.sessions import AccessTokens, Sessions
from tortoise_auth.sessions.access_tokens import MAX_SUBJECT_LENGTH
from tortoise_auth.throttling import DatabaseThrottle, Throttle
from tortoise_auth.users import AbstractUser, UserT

EventT = TypeVar("EventT", bound=Event)

Claims: TypeAlias = Mapping[str, object]
ClaimsSource: TypeAlias = Callable[[UserT, Session], Claims | Awaitable[Claims]]
"""Returns the further claims of an access token of a user."""

_MAX_TABLE_NAME = 128
"""Characters in ``Session.user_table``."""


class Core(Generic[UserT]):
    """The parts of one service, checked and put together.

    Args:
        user_model: The host's user model.
        config: Keys and lifetimes.
        emitter, passwords, policy: ``None`` for those of the user model, looked up at each call.
        throttle: How often passwords may be tried; ``"database"`` for a `DatabaseThrottle`.
        clock: The time.
        claims: Returns the further claims of each access token.

    Raises:
        ConfigurationError: A part is of another type, or the model cannot be used.
    """

    def __init__(
        self,
        user_model: type[UserT],
        config: AuthConfig,
        *,
        emitter: EventEmitter | None,
        passwords: PasswordHasher | None,
        policy: PasswordPolicy | None,
        throttle: Throttle | Literal["database"] | None,
        clock: Clock,
        claims: ClaimsSource[UserT] | None,
    ) -> None:
        _check_model(user_model)
        if not isinstance(config, AuthConfig):
            raise ConfigurationError("AuthService takes an AuthConfig: AuthConfig(secret=...)")
        _check_parts(emitter, passwords, policy, throttle)
        if claims is not None and not callable(claims):
            raise ConfigurationError(
                "AuthService: claims= takes a function of a user and a session that returns a dict"
            )
        # Address parsing takes 40 ms to import. A program may take them while it starts; the first
        # login would take them from the event loop.
        importlib.import_module("email_validator")
        self.user_model = user_model
        self.config = config
        self.clock = checked_clock(clock)
        self.sessions = Sessions(user_model, config, self.clock)
        self.tokens = AccessTokens(
            config,
            self.clock,
            user_table(user_model),
            longest_subject=_longest_key(user_model),
        )
        self.throttle = DatabaseThrottle(clock=clock) if throttle == "database" else throttle
        self._emitter = emitter
        self._passwords = passwords
        self._policy = policy
        self._claims = claims

    @property
    def emitter(self) -> EventEmitter:
        """Where events go."""
        return self.user_model.emitter if self._emitter is None else self._emitter

    @property
    def passwords(self) -> PasswordHasher:
        """Hashes and verifies passwords."""
        return self.user_model.password_hasher if self._passwords is None else self._passwords

    @property
    def policy(self) -> PasswordPolicy:
        """Says which new passwords are accepted."""
        return self.user_model.password_policy if self._policy is None else self._policy

    def unit_of_work(self) -> UnitOfWork:
        """Return a unit of work on the connection of users and sessions."""
        return UnitOfWork(self.sessions.connection(), self.emitter, clock=self.clock)

    def event(
        self,
        kind: Callable[..., EventT],
        user: UserT,
        context: RequestContext | None,
        **details: object,
    ) -> EventT:
        """Return an event that happened to *user* now."""
        return kind(
            user=user,
            subject_id=str(user.pk),
            context=current_context(context),
            occurred_at=self.clock(),
            **details,
        )

    async def claims_of(self, user: UserT, session: Session, given: Claims | None) -> Claims:
        """Return the further claims of an access token: those of the service, then *given* ones.

        Raises:
            ValueError: There is one that is ours, or that JSON cannot hold, or there are too many.
        """
        claims = {**(given or {})}
        if self._claims is not None:
            asked = self._claims(user, session)
            if isawaitable(asked):
                asked = await asked
            self.tokens.check_extra(asked)
            claims = {**asked, **claims}
        self.tokens.check_extra(claims, session.user_id)
        return claims

    def require_own(self, user: UserT, actor: Actor = "user") -> None:
        """Reject an account of another model, whose key means another account here.

        Raises:
            TypeError: The account is of another model.
            ValueError: The account is not saved, or there is no such actor.
        """
        require_actor(actor)
        # A subclass with a table of its own is refused, too: its user 7 is another person than
        # ours.
        if not isinstance(user, self.user_model) or (
            user_table(type(user)) != user_table(self.user_model)
        ):
            raise TypeError(
                f"This AuthService serves {self.user_model.__name__}, not {type(user).__name__}"
            )
        if user.pk is None:
            raise ValueError(f"{quoted(user)} is not in the database; save it first")

    def spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Do *work* in a task of its own, outside any transaction; the emitter's end waits for it."""
        deliverer_of(self.emitter).spawn(work, what)

    async def end_orphan_later(
        self, user: UserT, session: Session, context: RequestContext
    ) -> None:
        """End a session whose tokens no client holds, once other connections see the session."""
        with suppress(Exception):  # a transaction that takes no statement any more is not committed
            ending = on_commit(
                self.sessions.connection(),
                lambda: self.spawn(self._end_orphan(user, session, context), "orphan session"),
            )
            await wait_for(ending)  # the caller may be in a scope that cancels again and again

    async def _end_orphan(self, user: UserT, session: Session, context: RequestContext) -> None:
        async with self.unit_of_work() as unit:
            if await self.sessions.revoke(session, unit.connection):
                session_id = str(session.id)
                unit.record(
                    self.event(SessionRevoked, user, context, session_id=session_id, actor="system")
                )


def require_actor(actor: object) -> None:
    """Reject an actor that does not exist.

    Raises:
        ValueError: There is no such actor.
    """
    if actor not in get_args(Actor):
        raise ValueError(f"actor={quoted(actor)} is none of {', '.join(get_args(Actor))}")


def session_id_of(session: Session | UUID | str | None) -> UUID | None:
    """Return the id of a session that is given as ``keep=``.

    Raises:
        ValueError: It is neither a session nor an id.
    """
    if session is None or isinstance(session, UUID):
        return session
    if isinstance(session, Session):
        return session.id
    try:
        return UUID(session)
    except (ValueError, TypeError, AttributeError):
        raise ValueError("keep= takes a session or its id") from None


def _check_parts(emitter: object, passwords: object, policy: object, throttle: object) -> None:
    kinds: Mapping[str, tuple[object, type]] = {
        "emitter": (emitter, EventEmitter),
        "passwords": (passwords, PasswordHasher),
        "policy": (policy, PasswordPolicy),
    }
    for name, (part, kind) in kinds.items():
        if part is not None and not isinstance(part, kind):
            raise ConfigurationError(f"AuthService: {name}= takes an instance of {kind.__name__}")
    steps = ("reserve", "failed", "succeeded", "released")
    if throttle in (None, "database"):
        return
    # A class has the methods as well: `throttle=DatabaseThrottle`, without the brackets.
    if isinstance(throttle, type) or not all(hasattr(throttle, step) for step in steps):
        raise ConfigurationError(
            "AuthService: throttle= takes DatabaseThrottle(...), LimitsThrottle(...) for Redis, "
            "another Throttle, or None for no limit at all"
        )


def _check_model(user_model: type[AbstractUser]) -> None:
    if not isinstance(user_model, type) or not issubclass(user_model, AbstractUser):
        raise ConfigurationError(
            "AuthService takes your user model: a class of yours that subclasses AbstractUser"
        )
    meta = user_model._meta
    if meta.abstract:
        raise ConfigurationError(
            f"{user_model.__name__} is abstract. Subclass it, or say `abstract = False` in its Meta."
        )
    if any(
        getattr(meta.fields_map[name], "pk", False) for name in meta.fk_fields | meta.o2o_fields
    ):
        raise ConfigurationError(
            f"The primary key of {user_model.__name__} is a relation. Give the model a key of its "
            "own, and the relation unique=True, or make it a OneToOneField beside the key."
        )
    longest = _MAX_TABLE_NAME
    if len(user_table(user_model)) > longest:
        raise ConfigurationError(
            f"The name of the table of {user_model.__name__} has more than {longest} characters, "
            "which a session cannot name"
        )
    if _longest_key(user_model) > MAX_SUBJECT_LENGTH:
        raise ConfigurationError(
            f"The primary key of {user_model.__name__} may have at most {MAX_SUBJECT_LENGTH} "
            "characters: sessions and access tokens hold it"
        )
    _check_identifiers(user_model)


def _check_identifiers(user_model: type[AbstractUser]) -> None:
    named = user_model.identifier_fields
    name = user_model.__name__
    if not isinstance(named, tuple | list) or len({*named}) < max(1, len(named)):
        raise ConfigurationError(
            f"{name}.identifier_fields takes the names of columns, each once, as a tuple: "
            'identifier_fields = ("username", "email")'
        )
    if named[0] != user_model.identifier_field:
        raise ConfigurationError(
            f"{name}.identifier_field is {user_model.identifier_field!r}, but the first of "
            f"{name}.identifier_fields is {named[0]!r}. Name one of the two, or the same column first."
        )
    for each in named:
        field = user_model._meta.fields_map.get(each)
        if not isinstance(field, CharField | TextField) or not (field.unique or field.pk):
            which = "identifier_field is" if len(named) == 1 else "identifier_fields has"
            raise ConfigurationError(
                f"{name}.{which} {each!r}; the model needs such a field, a CharField with unique=True"
            )


def _longest_key(user_model: type[AbstractUser]) -> int:
    """Return how many characters the text of a primary key may have; of a number or UUID, 40."""
    field = user_model._meta.pk
    # A UUID has 36, a number of 64 bits at most 20.
    return field.max_length if isinstance(field, CharField) else 40
