"""Refresh tokens: a random first one, each next one derived from the one before; stored as hashes.

128 bits for the session and 256 for the token itself. They mean nothing to anything but the
database.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import ClassVar

from tortoise_auth.exceptions import TokenInvalidError
from tortoise_auth.sessions.encoding import base64url, from_base64url


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A refresh token: 128 random bits that its session keeps, 256 that change with every rotation.

    The first part finds the session; only a holder of one of its tokens knows it. So an
    unknown second part behind a known first one is a spent token, however old. Four bytes of
    checksum distinguish damage in transit from reuse, and spare the database a look-up for garbage.

    Attributes:
        text: What the client holds. Never stored.
    """

    text: str = field(repr=False)
    family_hash: str = field(repr=False)
    hash: str = field(repr=False)

    _PREFIX: ClassVar[str] = "tart_"
    _FAMILY_SIZE: ClassVar[int] = 16
    _SECRET_SIZE: ClassVar[int] = 32
    _CHECK_SIZE: ClassVar[int] = 4

    @classmethod
    def new(cls) -> RefreshToken:
        """Return the first token of a new session."""
        family = secrets.token_bytes(cls._FAMILY_SIZE)
        return cls._made_of(family, secrets.token_bytes(cls._SECRET_SIZE))

    def next(self, key: bytes) -> RefreshToken:
        """Return the next token of the same session.

        It is derived, so that a client that presents this one again can be given the same answer,
        although only hashes are stored. Without *key* this token says nothing about the next.

        Args:
            key: 256 bits, of which no client knows anything.
        """
        body = self._decoded(self.text)[: -self._CHECK_SIZE]
        return self._made_of(body[: self._FAMILY_SIZE], hmac.digest(key, body, "sha256"))

    @classmethod
    def parse(cls, text: str) -> RefreshToken:
        """Read what a client presents.

        Raises:
            TokenInvalidError: It is not a refresh token, or a damaged one.
        """
        raw = cls._decoded(text)
        body, check = raw[: -cls._CHECK_SIZE], raw[-cls._CHECK_SIZE :]
        if not secrets.compare_digest(check, _digest(body)[: cls._CHECK_SIZE]):
            raise TokenInvalidError
        return cls._of(text, raw)

    @classmethod
    def looks_like(cls, text: str) -> bool:
        """Return whether *text* has the prefix of refresh tokens."""
        return text.startswith(cls._PREFIX)

    @classmethod
    def _made_of(cls, family: bytes, secret: bytes) -> RefreshToken:
        body = family + secret
        raw = body + _digest(body)[: cls._CHECK_SIZE]
        return cls._of(cls._PREFIX + base64url(raw), raw)

    @classmethod
    def _of(cls, text: str, raw: bytes) -> RefreshToken:
        # SHA-256 is enough: there is nothing to guess in so many random bits, as there is in a
        # password.
        return cls(text, _digest(raw[: cls._FAMILY_SIZE]).hex(), _digest(raw).hex())

    @classmethod
    def _decoded(cls, text: str) -> bytes:
        size = cls._FAMILY_SIZE + cls._SECRET_SIZE + cls._CHECK_SIZE
        length = len(cls._PREFIX) + (size * 8 + 5) // 6
        if not isinstance(text, str) or len(text) != length or not cls.looks_like(text):
            raise TokenInvalidError
        raw = from_base64url(text[len(cls._PREFIX) :])
        if cls._PREFIX + base64url(raw) != text:  # a second spelling of the same bytes
            raise TokenInvalidError
        return raw


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
