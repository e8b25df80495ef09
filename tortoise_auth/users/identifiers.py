"""User names: one spelling each, and none that looks like another one by what cannot be seen."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from tortoise_auth.context import sanitize_text
from tortoise_auth.exceptions import InvalidIdentifierError
from tortoise_auth.lazy import LazyModule

if TYPE_CHECKING:
    import precis_i18n
else:
    precis_i18n = LazyModule("precis_i18n")


def normalize_username(value: object, limit: int) -> str:
    """Return the one spelling of a user name that is to be created.

    NFKC without surrounding white space, its case kept; then the profile UsernameCasePreserved of
    RFC 8265 (3.4) for each of the parts between single spaces (3.5). So control characters, marks
    of direction, zero-width characters, symbols and mixed directions are refused.

    Raises:
        InvalidIdentifierError: It cannot be one.
    """
    normal = comparable_username(value, limit)
    if normal is None:
        raise InvalidIdentifierError("it is empty, too long or no text")
    profile = precis_i18n.get_profile("UsernameCasePreserved")
    try:
        normal = " ".join(profile.enforce(part) for part in normal.split(" "))
    except UnicodeEncodeError:
        raise InvalidIdentifierError(
            "it holds a character that names may not have, or two spaces in a row (RFC 8265)"
        ) from None
    return normal


def comparable_username(value: object, limit: int) -> str | None:
    """Return the spelling under which a user name is looked up; ``None`` if no row can hold it.

    Milder than `normalize_username`: an account that exists must be able to log in.
    """
    # Bounded before the work; NFKC composes at most four code points into one.
    if not isinstance(value, str) or len(value) > 4 * limit:
        return None
    normal = unicodedata.normalize("NFKC", value).strip()
    storable = sanitize_text(normal, len(normal)) == normal
    return normal if normal and len(normal) <= limit and storable else None
