"""Two model fields that replace Tortoise's own, which are unsafe for authentication."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from tortoise import fields
from tortoise.exceptions import ValidationError
from tortoise.models import Model

from tortoise_auth.clock import utc_now
from tortoise_auth.context import sanitize_text
from tortoise_auth.exceptions import InvalidIdentifierError
from tortoise_auth.lazy import LazyModule

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
        ValidationError: The value is a naive datetime, which could be in any time zone.
    """

    def to_python_value(self, value: Any) -> datetime | None:  # noqa: ANN401 - the signature of the base class
        """Return *value*, which comes from the database driver, as aware UTC."""
        if value is None or isinstance(value, datetime):
            return self._in_utc(value)
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


def normalize_email(value: str) -> str:
    """Return the one spelling under which an address is stored and looked up.

    NFC, no surrounding white space, lower case, the domain normalised by IDNA. Lower case instead
    of case *folding*, which would merge addresses of different people ("straße" and "strasse").

    Args:
        value: An address as a person typed it.

    Raises:
        InvalidIdentifierError: *value* is not an e-mail address.
    """
    if not isinstance(value, str) or len(value) > 2 * MAX_EMAIL_LENGTH:
        raise InvalidIdentifierError("That is not an e-mail address")
    try:
        address = email_validator.validate_email(value.strip(), check_deliverability=False)
    except (email_validator.EmailNotValidError, UnicodeError):
        raise InvalidIdentifierError("That is not an e-mail address") from None
    return unicodedata.normalize("NFC", address.normalized.lower())


class EmailField(fields.CharField[str]):
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
            looks_up = isinstance(instance, type)
            value = self._comparable(value) if looks_up else self._normalized(value)
            if isinstance(instance, Model):
                setattr(instance, self.model_field_name, value)
        return super().to_db_value(value, instance)

    def _normalized(self, value: Any) -> str:  # noqa: ANN401
        try:
            return normalize_email(value)
        except InvalidIdentifierError as error:
            raise ValidationError(f"{self.model_field_name}: {error}") from None

    def _comparable(self, value: Any) -> str:  # noqa: ANN401
        """Return the text to compare with; ``"@"``, which no row holds, if *value* cannot be sent.

        A lookup never raises for what a visitor typed. NUL and lone surrogates would: drivers
        refuse them.
        """
        try:
            text = normalize_email(value)
        except InvalidIdentifierError:
            text = str(value)
        return text if sanitize_text(text, self.max_length) == text else "@"
