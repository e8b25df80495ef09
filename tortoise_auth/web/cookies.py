"""Two cookies that only this origin can set, and that no script can read."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime, timedelta

from tortoise_auth.clock import utc_now
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.legible import quoted
from tortoise_auth.service import AuthResult
from tortoise_auth.users import UserT
from tortoise_auth.web.asgi import Scope, raw_lines

MAX_COOKIE_SIZE = 4096
"""Bytes of name and value together. Browsers drop a larger cookie and report nothing."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PREFIXES = ("__host-", "__secure-", "__http-")


@dataclass(frozen=True, slots=True)
class CookieTokens:
    """The tokens that came as cookies.

    Attributes:
        access: The access token, or ``None``.
        refresh: The refresh token, or ``None``.
    """

    access: str | None = field(repr=False)
    refresh: str | None = field(repr=False)


@dataclass(frozen=True)
class Cookies:
    """The two cookies of a browser's session: names, attributes, ``Set-Cookie`` values.

    Both have the prefix ``__Host-`` (RFC 6265bis, 4.1.3.2): no other host and no plain HTTP can set
    them. So a page of a sibling domain cannot log your visitor into an account of its own. There is
    no ``Domain``: for several domains use bearer tokens.

    ======= ================================ ==========================================
    token   name                             attributes
    ======= ================================ ==========================================
    access  ``__Host-session``               ``Path=/; Secure; HttpOnly; SameSite=Lax``
    refresh ``__Host-session-refresh``       ``Path=/; Secure; HttpOnly; SameSite=Strict``
    ======= ================================ ==========================================

    Attributes:
        name: Without the prefix. Give two user models of one host different names.
        secure: ``False`` drops ``Secure`` and the prefix, for plain HTTP on your own machine.
        development: Must be ``True`` for that, so that it does not happen by a mistake.

    Raises:
        ConfigurationError: The name cannot be one, or ``secure=False`` is alone.
    """

    name: str = "session"
    _: KW_ONLY
    secure: bool = True
    development: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"Cookies({quoted(self.name)}): a name has 1 to 64 letters, digits or _.-"
            )
        if self.name.lower().startswith(_PREFIXES):
            raise ConfigurationError(
                f"Cookies({quoted(self.name)}): pass the name without its prefix, which secure= adds"
            )
        if not self.secure and not self.development:
            raise ConfigurationError(
                "Cookies(secure=False) sends tokens in the clear, and siblings can set them. On "
                "your own machine add development=True; browsers accept secure cookies of "
                "http://localhost, too"
            )

    @property
    def access_name(self) -> str:
        """The name of the cookie with the access token."""
        return f"__Host-{self.name}" if self.secure else self.name

    @property
    def refresh_name(self) -> str:
        """The name of the cookie with the refresh token."""
        return f"{self.access_name}-refresh"

    def set(self, result: AuthResult[UserT], *, now: datetime | None = None) -> tuple[str, str]:
        """Return the values of two ``Set-Cookie`` headers that hold the tokens of a session.

        Warning: answer with ``Cache-Control: no-store``.

        Args:
            result: What ``login`` or ``refresh`` returned.
            now: The time, from which the cookies live as long as their tokens.

        Raises:
            ConfigurationError: A browser would drop a cookie, because the token is too long.
        """
        now = now or utc_now()
        return (
            self._cookie(
                self.access_name, result.access_token, result.access_expires_at - now, "Lax"
            ),
            self._cookie(
                self.refresh_name, result.refresh_token, result.refresh_expires_at - now, "Strict"
            ),
        )

    def clear(self) -> tuple[str, str]:
        """Return the values of two ``Set-Cookie`` headers that delete the cookies."""
        return (
            self._cookie(self.access_name, "", timedelta(0), "Lax"),
            self._cookie(self.refresh_name, "", timedelta(0), "Strict"),
        )

    def read(self, scope: Scope) -> CookieTokens:
        """Return the tokens that a request has as cookies.

        A cookie that comes twice is not read: one of the two was set by somebody else.
        """
        return CookieTokens(
            access=self._one(scope, self.access_name), refresh=self._one(scope, self.refresh_name)
        )

    def sent(self, scope: Scope) -> bool:
        """Return whether a request has one of the cookies, readable or not."""
        return bool(_values(scope, self.access_name) or _values(scope, self.refresh_name))

    def _cookie(self, name: str, value: str, age: timedelta, same_site: str) -> str:
        size = len(name) + len(value)
        if size > MAX_COOKIE_SIZE:
            raise ConfigurationError(
                f"The cookie {name} has {size} bytes, and browsers drop what has more than "
                f"{MAX_COOKIE_SIZE}: put less into claims="
            )
        # Chromium ignores a deletion whose attributes do not fit the prefix: all are always there.
        secure = "; Secure" if self.secure else ""
        seconds = max(0, int(age.total_seconds()))
        return f"{name}={value}; Max-Age={seconds}; Path=/{secure}; HttpOnly; SameSite={same_site}"

    @staticmethod
    def _one(scope: Scope, name: str) -> str | None:
        values = _values(scope, name)
        return values[0].decode("latin-1") or None if len(values) == 1 else None


def _values(scope: Scope, name: str) -> list[bytes]:
    """Return every value of a cookie.

    Read by hand and as bytes: the parsers of the frameworks keep the last of two, and a text's
    ``strip()`` removes more blanks than a browser does, which would turn another name into ours.
    """
    wanted = name.encode("ascii")
    # HTTP/2 splits the header into several lines (RFC 9113, 8.2.3).
    pairs = (
        pair.partition(b"=") for line in raw_lines(scope, "cookie") for pair in line.split(b";")
    )
    return [value.strip(b" \t") for key, _, value in pairs if key.strip(b" \t") == wanted]
