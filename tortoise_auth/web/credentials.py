"""Which token of a request counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from tortoise_auth.web.asgi import Scope, lines
from tortoise_auth.web.cookies import Cookies


@dataclass(frozen=True, slots=True)
class Credentials:
    """The access token of a request. Nothing is known of it yet.

    Attributes:
        token: For ``AuthService.authenticate``.
        by_cookie: Whether a browser sent it by itself. Then ask a `CrossOriginCheck` first.
    """

    token: str = field(repr=False)
    by_cookie: bool


def credentials(scope: Scope, cookies: Cookies | None = None) -> Credentials | None:
    """Return the access token of a request: that of ``Authorization: Bearer``, else the cookie.

    A bearer token counts alone: if it is refused, the cookie is not tried. Other schemes are not
    ours; they neither authenticate nor keep the cookie from doing so.

    Args:
        scope: The connection.
        cookies: Where to look besides; ``None`` for a service without browsers.
    """
    # Several lines are one list (RFC 9110, 5.3), and a list is no token.
    scheme, _, token = ", ".join(lines(scope, "authorization")).partition(" ")
    token = token.strip(" \t")
    if scheme.lower() == "bearer" and token:
        return Credentials(token, by_cookie=False)
    access = cookies.read(scope).access if cookies is not None else None
    return None if access is None else Credentials(access, by_cookie=True)
