"""Base64 as tokens use it: URL-safe, without padding, one spelling (RFC 7515, section 2)."""

from __future__ import annotations

import base64

from tortoise_auth.exceptions import TokenInvalidError


def base64url(data: bytes) -> str:
    """Return *data* as text."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def from_base64url(text: str) -> bytes:
    """Return the bytes that *text* stands for.

    Raises:
        TokenInvalidError: It has other characters, or another length.
    """
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise TokenInvalidError from None
