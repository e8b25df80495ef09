"""Model fields that replace Tortoise's own, which are unsafe for authentication."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from tortoise import fields
from tortoise.exceptions import ValidationError
from tortoise.fields.base import DatabaseDefault
from tortoise.models import Model

from tortoise_auth.clock import utc_now
from tortoise_auth.context import sanitize_text
from tortoise_auth.database import reads_naive_times
from tortoise_auth.database.dialects.mysql_settings import EXACT
from tortoise_auth.exceptions import InvalidIdentifierError
from tortoise_auth.lazy import LazyModule
from tortoise_auth.passwords import is_hash

if TYPE_CHECKING:
    import email_validator
else:
    email_validator = LazyModule("email_validator")

MAX_EMAIL_LENGTH = 254
"""Characters; the longest address SMTP can carry (RFC 5321, 4.5.3.1.3)."""


MomentT = TypeVar("MomentT", datetime, "datetime | None")


class UtcDatetimeField(fields.DatetimeField[MomentT]):
    """A point in time: aware UTC in Python, UTC in the database, whatever the settings are.

    Tortoise's own field stores and compares mixed offsets as text on SQLite, and drops the offset
    with ``use_tz=False``, which lets expired sessions pass. This one ignores ``use_tz`` and
    ``timezone``.

    Raises:
        ValidationError: The value is a naive datetime, which could be in any time zone. On MariaDB
            and MySQL the constructor of a model takes it for UTC, as their drivers read times.
    """

    def to_python_value(self, value: Any) -> datetime | None:  # noqa: ANN401 - the signature of the base class
        """Return *value*, which comes from the database driver, as aware UTC."""
        if isinstance(value, datetime):
            if value.tzinfo is None and reads_naive_times():
                return value.replace(tzinfo=UTC)
            return self._in_utc(value)
        if value is None:
            return None
        # SQLite returns text, without an offset if CURRENT_TIMESTAMP wrote it, which is UTC.
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)

    def to_db_value(self, value: Any, instance: type[Model] | Model) -> Any:  # noqa: ANN401
        """Return *value* as aware UTC; with ``auto_now`` or ``auto_now_add`` set it first."""
        if isinstance(instance, Model) and self._fills_itself(instance):
            value = utc_now()
            setattr(instance, self.model_field_name, value)
        if value is None:
            self.validate(value)
        return self._in_utc(value)

    def get_db_default_value(self) -> DatabaseDefault | None:
        """Return what an object without a value holds; a column that fills itself is not left out."""
        return None if self.auto_now or self.auto_now_add else super().get_db_default_value()

    def _in_utc(self, value: object) -> datetime | None:
        if value is None:
            return None
        if not isinstance(value, datetime) or value.utcoffset() is None:
            raise ValidationError(
                f"{self.model_field_name}: give an aware datetime, for example datetime.now(UTC)"
            )
        return value.astimezone(UTC)

    def _fills_itself(self, instance: Model) -> bool:
        return self.auto_now or (
            self.auto_now_add and getattr(instance, self.model_field_name) is None
        )


class DatabaseClock(Enum):
    """The time that a database puts into a column which an INSERT or a migration leaves out.

    An enumeration, because Tortoise writes its members into migrations by their names; of any other
    expression it writes the text for one dialect. No ``SqlDefault``, because MySQL would get the
    column without the default first, and fill the rows that are there with ``0000-00-00``.
    """

    NOW = "CURRENT_TIMESTAMP"

    def get_sql(self, context: object = None, dialect: str | None = None) -> str:
        """Return the expression for a dialect of Tortoise."""
        return _CLOCKS.get(dialect, self.value)


_CLOCKS: dict[str | None, str] = {
    # SQLite adds no column with a default that changes to a table with rows.
    "sqlite": "'1970-01-01 00:00:00+00:00'",
    "mysql": "(UTC_TIMESTAMP(6))",
}


_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)", re.ASCII)
_ANY_DOMAIN = "mail.example.net"
"""Stands for an internal domain while the local part of an address is checked."""


def normalize_email(value: str, *, internal_domains: Collection[str] | None = ()) -> str:
    """Return the one spelling under which an address is stored and looked up.

    NFC, no surrounding white space, lower case, the domain normalised by IDNA. Lower case instead
    of case *folding*, which would merge addresses of different people ("straße" and "strasse").

    Args:
        value: An address as a person typed it.
        internal_domains: Domains without a place in the public DNS that are accepted, too, and the
            domains below them: ``["corp.local", "localhost"]``; ``None`` for any.

    Raises:
        InvalidIdentifierError: *value* is not an e-mail address; the message says which rule
            refused it, and quotes nothing of it.
    """
    if not isinstance(value, str) or len(value) > 2 * MAX_EMAIL_LENGTH:
        raise InvalidIdentifierError("That is not an e-mail address")
    local, at, domain = value.strip().rpartition("@")
    domain = domain.lower()
    internal = bool(at) and _is_internal(domain, internal_domains)
    text = f"{local}@{_ANY_DOMAIN}" if internal else value.strip()
    try:
        # No DNS: a login would wait for servers that the visitor chose.
        address = email_validator.validate_email(text, check_deliverability=False)
    except (email_validator.EmailNotValidError, UnicodeError):
        raise InvalidIdentifierError(_why_not(domain if local and at else "")) from None
    normal = address.normalized.lower()
    if internal:
        normal = f"{address.local_part.lower()}@{domain}"
    # Again: a small h with a macron below composes to U+1E96, and the capital to nothing.
    return unicodedata.normalize("NFC", normal)


def _is_internal(domain: str, internal_domains: Collection[str] | None) -> bool:
    """Return whether a domain is one of those that the public DNS does not know."""
    if not all(_LABEL.fullmatch(label) for label in domain.split(".")) or len(domain) > 200:
        return False
    if internal_domains is None:
        return _special_domain(domain) is not None
    return any(
        domain == each.lower() or domain.endswith("." + each.lower()) for each in internal_domains
    )


def _special_domain(domain: str) -> str | None:
    """Return the part of a domain that no public address ends with."""
    if "." not in domain:
        return "a domain without a dot"
    names: Sequence[str] = email_validator.SPECIAL_USE_DOMAIN_NAMES
    return next((f".{each}" for each in names if domain.endswith("." + each)), None)


def _why_not(domain: str) -> str:
    is_domain = all(_LABEL.fullmatch(label) for label in domain.split("."))
    special = _special_domain(domain) if is_domain else None
    if special is None:
        return "That is not an e-mail address"
    return (
        f"That is not a public e-mail address ({special}). If such addresses receive mail here, "
        "name the domain in internal_domains of the user model"
    )


class ExactCharField(fields.CharField[str]):
    """A text that equals no other one, on any database.

    MariaDB and MySQL take ``A`` for ``a`` and a blank at the end for none, unless the column says
    otherwise. Use it for the column that people log in with.

    Attributes:
        exact: Whether a column with another collation is refused.
    """

    exact = True

    class _db_mysql:
        def __init__(self, field: fields.CharField[str]) -> None:
            self._field = field

        @property
        def SQL_TYPE(self) -> str:
            return f"VARCHAR({self._field.max_length}) {EXACT}"


class PasswordField(ExactCharField):
    """The hash of a password; anything else is refused when it is written.

    Raises:
        ValueError: The value is no hash, for example a password.
    """

    exact = False  # in a table that exists it need not be: no two hashes differ by case alone

    def to_db_value(self, value: Any, instance: type[Model] | Model) -> Any:  # noqa: ANN401
        """Check what an UPDATE of many rows writes; an object is checked when it is assigned to."""
        if instance is None:
            # An inherited field does not know its model for sure, so the message names none.
            require_hash(value, self.model, name="User")
        return super().to_db_value(value, instance)


def require_hash(value: object, owner: type | None, *, name: str) -> None:
    """Refuse what is no hash of a password.

    Args:
        value: What is to be stored.
        owner: The model, whose ``password_hasher`` may know further schemes.
        name: What the message calls the model.

    Raises:
        ValueError: It is none. The message does not quote it.
    """
    hasher = getattr(owner, "password_hasher", None)
    if isinstance(value, str):
        known = hasher is not None and hasher.knows(value)
        if known or not value or is_hash(value):
            return
    raise ValueError(
        f"{name}.password holds the hash of a password, and this is none. Use "
        f"{name}.create_user(password=...) for a new account and set_password(...) for one "
        "that exists"
    )


class EmailField(ExactCharField):
    """An e-mail address, normalised when written *and* when looked up.

    So ``User.get(email="Ada@Example.COM ")`` returns the user stored as ``ada@example.com``, by a
    plain ``=`` on a unique column. (``__iexact`` compiles to ``UPPER()``, which confuses accounts:
    CVE-2019-19844.)

    Raises:
        ValidationError: The value to write is not an e-mail address. A lookup of it matches no row.
    """

    def __init__(self, max_length: int = MAX_EMAIL_LENGTH, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(max_length, **kwargs)

    def to_db_value(self, value: Any, instance: type[Model] | Model) -> Any:  # noqa: ANN401
        """Return the normalised address."""
        if value is not None:
            # Tortoise passes the class for a filter, and the object or None for what is written.
            looks_up = isinstance(instance, type)
            value = self._comparable(value) if looks_up else self._normalized(value, instance)
            if isinstance(instance, Model):
                setattr(instance, self.model_field_name, value)
        return super().to_db_value(value, instance)

    def _normalized(self, value: Any, instance: object) -> str:  # noqa: ANN401
        # An address that is stored already can always be saved again. An UPDATE of many rows does
        # not say of which model: `self.model` is the last one that inherits the field.
        stored = instance is None or getattr(instance, "_saved_in_db", False)
        own = getattr(instance, "internal_domains", ())
        try:
            return normalize_email(value, internal_domains=None if stored else own)
        except InvalidIdentifierError as error:
            raise ValidationError(f"{self.model_field_name}: {error}") from None

    def _comparable(self, value: Any) -> str:  # noqa: ANN401
        """Return the text to compare with; ``"@"``, which no row holds, if *value* cannot be sent.

        A lookup never raises for what a visitor typed. NUL and lone surrogates would: drivers
        refuse them.
        """
        try:
            text = normalize_email(value, internal_domains=None)
        except InvalidIdentifierError:
            text = str(value)
        return text if sanitize_text(text, self.max_length) == text else "@"
