"""`AbstractUser`: what a host subclasses."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar

from tortoise import fields
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.models import Model

from tortoise_auth.clock import utc_now
from tortoise_auth.context import current_context
from tortoise_auth.database import connection_for, translates_database_errors
from tortoise_auth.events.catalog import PasswordChanged
from tortoise_auth.events.default import emitter
from tortoise_auth.events.event_emitter import EventEmitter
from tortoise_auth.events.unit_of_work import UnitOfWork, pending_values
from tortoise_auth.exceptions import ConfigurationError, InvalidIdentifierError
from tortoise_auth.fields import (
    DatabaseClock,
    EmailField,
    PasswordField,
    UtcDatetimeField,
    normalize_email,
    require_hash,
)
from tortoise_auth.legible import legible
from tortoise_auth.models import Session, user_table
from tortoise_auth.passwords import PasswordHasher, PasswordPolicy, is_usable_hash, unusable_hash
from tortoise_auth.users.changes import replace_outdated_hash, shared_connection, store_password
from tortoise_auth.users.creation import (
    CreationParts,
    create_account,
    is_storable,
    refuse_misfits,
    refuse_unfit,
)
from tortoise_auth.users.identifiers import comparable_username, normalize_username

AnswerT = TypeVar("AnswerT")
UserT = TypeVar("UserT", bound="AbstractUser")


_MAX_SHOWN_LENGTH = 64


def _first_session_version() -> int:
    """Return a number of 30 bits: the column has 31, and each end of all sessions adds one."""
    return secrets.randbelow(1 << 30)


class AbstractUser(Model):
    """An account. Subclass it in your own app, with any primary key.

    Example::

        class User(AbstractUser):
            display_name = fields.CharField(max_length=100, default="")

        user = await User.create_user(email="ada@example.com", password="correct horse battery staple")

    To log in by user name, add a unique column and name it::

        class User(AbstractUser):
            identifier_field = "username"
            username = fields.CharField(max_length=50, unique=True)

    Attributes:
        identifier_field: The unique column that people log in with.
        internal_domains: Domains of e-mail addresses without a place in the public DNS that are
            accepted, too: ``("corp.local", "localhost")``.
        emitter: Where ``set_password`` and ``create_user`` emit their events.
        password_hasher: What hashes and checks passwords.
        password_policy: Which passwords ``create_user`` accepts.
        email: Normalised when written and when looked up.
        password: The hash. Empty or unusable: no password logs in. Anything that is no hash is
            refused with a ``ValueError`` when it is assigned, created or updated.
        is_active: If false, no login succeeds and no session works.
        session_version: Raising it ends every session of the account at once. It starts at a
            random number, so that tokens of a deleted account do not open one that reuses its key.
            In rows that a migration or another program made it is 0; ``tortoise-auth adopt`` sets
            a random one.
        password_locked_at: When too many failures in a row locked the password, or ``None``. No
            password is right then, until it is changed or ``AuthService.unlock`` is called.
    """

    identifier_field: ClassVar[str] = "email"
    internal_domains: ClassVar[Collection[str]] = ()
    emitter: ClassVar[EventEmitter] = emitter
    password_hasher: ClassVar[PasswordHasher] = PasswordHasher()
    password_policy: ClassVar[PasswordPolicy] = PasswordPolicy()

    # `db_default` is for the rows that are there when a migration adds the columns.
    email = EmailField(unique=True)
    password = PasswordField(max_length=255, default="", db_default="")
    is_active = fields.BooleanField(default=True, db_default=True)
    last_login: UtcDatetimeField[datetime | None] = UtcDatetimeField(null=True)
    session_version = fields.IntField(default=_first_session_version, db_default=0)
    password_locked_at: UtcDatetimeField[datetime | None] = UtcDatetimeField(null=True)
    created_at: UtcDatetimeField[datetime] = UtcDatetimeField(
        auto_now_add=True, db_default=DatabaseClock.NOW
    )
    updated_at: UtcDatetimeField[datetime] = UtcDatetimeField(
        auto_now=True, db_default=DatabaseClock.NOW
    )

    class Meta(Model.Meta):
        abstract = True

    class PydanticMeta:
        # What `pydantic_model_creator` makes of the model may be an answer: it has no hash in it.
        exclude = ("password", "session_version")

    def __setattr__(self, key: str, value: Any) -> None:  # noqa: ANN401 - as the base class has it
        # What comes from the database does not pass here.
        if key == "password":
            # Here, because the host's column may be of another class.
            require_hash(value, type(self), name=type(self).__name__)
        elif key in ("email", self.identifier_field) and isinstance(value, str):
            value = self._comparable(key, value) or value
        super().__setattr__(key, value)

    async def save(
        self,
        using_db: BaseDBAsyncClient | None = None,
        update_fields: Iterable[str] | None = None,
        force_create: bool = False,
        force_update: bool = False,
    ) -> None:
        """Save the account; see Tortoise's ``Model.save``.

        In a transaction, columns that this library has changed are left alone until the commit: the
        object still holds their old values, such as the old password.
        """
        if update_fields is None and self._saved_in_db and not force_create:
            changed = await pending_values(self)
            if changed:
                update_fields = (
                    self._meta.fields_db_projection.keys() - changed - {self._meta.pk_attr}
                )
        await super().save(using_db, update_fields, force_create, force_update)

    @classmethod
    async def create_user(cls, *, password: str | None = None, **values: object) -> Self:
        """Create an account: normalise, apply the password policy, hash, save, emit.

        Safe to call with a form's fields: those of ours that decide about access are refused.
        Warning: your own, such as ``is_admin``, are not, nor is the primary key; take from a form
        what it may set, by name.

        Args:
            password: The password, or ``None`` for an account that cannot log in with one.
            **values: The columns: ``email=``, your own.

        Returns:
            The saved account. ``user_registered`` has been emitted.

        Raises:
            InvalidIdentifierError: The e-mail address or user name cannot be one.
            IdentifierTakenError: There is such an account.
            PasswordPolicyError: The password was refused.
            ValueError: A column was given that a form must not set, that does not exist, that
                cannot hold the value, or that is unique and has the value for another account.
            ServiceUnavailableError: The database failed.
        """
        return await cls._create_user(password, values)

    @classmethod
    @translates_database_errors
    async def _create_user(cls, password: str | None, values: dict[str, object]) -> Self:
        parts = CreationParts(
            policy=cls.password_policy,
            passwords=cls.password_hasher,
            emitter=cls.emitter,
            clock=utc_now,
        )
        return await create_account(
            cls,
            cls.values_to_create(values),
            password,
            identifiers=cls.identifiers(),
            parts=parts,
            context=current_context(),
        )

    @classmethod
    def identifiers(cls) -> tuple[str, ...]:
        """Return the columns that tell people apart: the identifier and the e-mail address."""
        return tuple(dict.fromkeys((cls.identifier_field, "email")))

    @classmethod
    def values_to_create(cls, values: Mapping[str, object]) -> dict[str, object]:
        """Return the columns of a new account, checked and normalised.

        Raises:
            InvalidIdentifierError: The e-mail address or user name cannot be one.
            ValueError: See `create_user`.
        """
        refuse_unfit(cls, values)
        identifier = cls.normalize_identifier(values.get(cls.identifier_field))
        normal = {**values, cls.identifier_field: identifier}
        if "email" in cls._meta.fields_map and normal.get("email") is not None:
            normal["email"] = cls._normalized_email(normal["email"])
        refuse_misfits(cls, normal)
        return normal

    @classmethod
    def normalize_identifier(cls, identifier: object) -> str:
        """Return the one spelling of an identifier, the same at sign-up and at login.

        An e-mail address: see `normalize_email`. Anything else: NFKC without surrounding white
        space, its case kept, by the rules of RFC 8265 for user names. Override it for other rules.

        Raises:
            InvalidIdentifierError: It cannot be one.
        """
        field = cls._meta.fields_map.get(cls.identifier_field)
        if field is None:
            raise ConfigurationError(
                f"{cls.__name__}.identifier_field is {cls.identifier_field!r}, but the model has "
                "no such field. Add it, with unique=True."
            )
        limit = getattr(field, "max_length", 255)
        if cls._holds_email(cls.identifier_field):
            normal = cls._normalized_email(identifier)
            if len(normal) > limit or not is_storable(normal):
                raise InvalidIdentifierError("That is not an e-mail address")
            return normal
        try:
            return normalize_username(identifier, limit)
        except InvalidIdentifierError as error:
            raise InvalidIdentifierError(
                f"That is not a valid {cls.identifier_field}: {error}"
            ) from None

    @classmethod
    def comparable_identifier(cls, identifier: object) -> str | None:
        """Return what to look up for an identifier typed at login; ``None`` if no row can hold it.

        By the rules for new accounts, else by milder ones: an account that exists, from an import
        or from before a rule, can log in.
        """
        try:
            return cls.normalize_identifier(identifier)
        except InvalidIdentifierError:
            return cls._comparable(cls.identifier_field, identifier)

    @classmethod
    def _comparable(cls, column: str, value: object) -> str | None:
        limit = getattr(cls._meta.fields_map.get(column), "max_length", 255)
        if not cls._holds_email(column):
            return comparable_username(value, limit)
        try:
            normal = normalize_email(value, internal_domains=None)  # type: ignore[arg-type]
        except InvalidIdentifierError:
            return None
        return normal if len(normal) <= limit and is_storable(normal) else None

    @classmethod
    def _holds_email(cls, column: str) -> bool:
        """Return whether a column holds addresses, whatever field class the host chose for it."""
        return column == "email" or isinstance(cls._meta.fields_map.get(column), EmailField)

    @classmethod
    def _normalized_email(cls, value: object) -> str:
        return normalize_email(value, internal_domains=cls.internal_domains)  # type: ignore[arg-type]

    @translates_database_errors
    async def set_password(self, raw_password: str) -> None:
        """Store a new password, end every session of the account, emit ``password_changed``.

        The password policy is not asked, only what can be hashed at all is required; use
        ``AuthService.set_password`` for passwords that people choose.

        Raises:
            PasswordPolicyError: The password cannot be hashed.
            ValueError: The account is not saved.
            ServiceUnavailableError: The database failed; the old password works.
        """
        hashed = await self.password_hasher.hash(raw_password)
        async with UnitOfWork(shared_connection(type(self)), self.emitter) as unit:
            now = utc_now()
            await store_password(self, hashed, unit, at=now)
            ended = await Session.end_all(
                user_table=user_table(type(self)),
                user_id=str(self.pk),
                at=now,
                using_db=unit.connection,
            )
            unit.record(
                PasswordChanged(
                    user=self,
                    subject_id=str(self.pk),
                    context=current_context(),
                    sessions_ended=ended,
                )
            )

    def check_password(self, raw_password: str) -> MustBeAwaited[bool]:
        """Check whether this is the password; replace an outdated hash if it is.

        Costs one full hash whatever the answer. Warning: ``await`` it. Its own truth value is a
        ``TypeError``, so that a forgotten ``await`` lets no one in.
        """
        return MustBeAwaited("check_password", partial(self._check_password, raw_password))

    @translates_database_errors
    async def _check_password(self, raw_password: str) -> bool:
        # Read once: another task may assign a new hash while this one is checked.
        stored = self.password
        verification = await self.password_hasher.verify(raw_password, stored)
        if verification.outdated:
            replacement = await self.password_hasher.hash(raw_password)
            async with UnitOfWork(connection_for(type(self)), self.emitter) as unit:
                await replace_outdated_hash(self, replacement, unit, instead_of=stored)
        return verification.valid

    def set_unusable_password(self) -> None:
        """Make every password wrong. Not saved: call ``save()``. Sessions go on."""
        self.password = unusable_hash()

    def has_usable_password(self) -> bool:
        """Tell whether some password could be right."""
        return is_usable_hash(self.password)

    @property
    def is_authenticated(self) -> bool:
        """Always true, unlike an anonymous visitor's."""
        return True

    @property
    def is_anonymous(self) -> bool:
        """Always false."""
        return False

    def __repr__(self) -> str:
        # The key alone: a `repr` ends in logs, and an address is personal.
        return f"<{type(self).__name__}: {legible(str(self.pk)[:_MAX_SHOWN_LENGTH], _MAX_SHOWN_LENGTH)}>"

    def __str__(self) -> str:
        return repr(self)

    def words_about(self) -> list[str]:
        """Return what a password must not consist of: the e-mail address and the user name."""
        words = (getattr(self, name, None) for name in self.identifiers())
        return [word for word in words if isinstance(word, str)]


class MustBeAwaited(Generic[AnswerT]):
    """An answer that has to be awaited; until then it is neither true nor false."""

    def __init__(self, method: str, ask: Callable[[], Awaitable[AnswerT]]) -> None:
        self._method = method
        self._ask = ask

    def __await__(self) -> Generator[Any, Any, AnswerT]:
        return self._ask().__await__()

    def __bool__(self) -> bool:
        raise TypeError(f"{self._method}() must be awaited: `if await user.{self._method}(...)`")
