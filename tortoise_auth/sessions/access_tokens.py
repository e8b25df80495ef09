"""Access tokens: signed, short-lived.

A JWT after RFC 9068, checked by the rules of RFC 8725: one algorithm for each key, keys from the
configuration alone, an explicit type, every claim required.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tortoise_auth.clock import Clock
from tortoise_auth.config import AuthConfig
from tortoise_auth.context import sanitize_text
from tortoise_auth.exceptions import ConfigurationError, TokenExpiredError, TokenInvalidError
from tortoise_auth.frozen import FrozenDict
from tortoise_auth.lazy import LazyModule
from tortoise_auth.sessions.encoding import from_base64url

if TYPE_CHECKING:
    import jwt
else:
    jwt = LazyModule("jwt")

MAX_TOKEN_LENGTH = 8192
"""Characters. Longer input is refused before it is decoded, and no longer token is issued."""

MAX_SUBJECT_LENGTH = 255
"""Characters of a primary key."""

_MAX_CLAIMS = MAX_TOKEN_LENGTH // 2
"""Characters of the JSON of extra claims; fewer where the rest of a token leaves no room for them."""

_MIN_CLAIMS = 1024

_MAX_DEPTH = 50
"""How deep extra claims may be nested: readers of JSON have limits, and each another."""


_ACCESS_TYPE = "at+jwt"


# PyJWT also reads padded parts, a second spelling of a token (RFC 7515, 2: no padding).
_COMPACT_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)


_OF_ENCRYPTION = frozenset({"enc", "zip"})  # what only an encrypted token has in its header


_REGISTERED_CLAIMS = frozenset(
    {
        "user_table",
        "iss",
        "aud",
        "sub",
        "sid",
        "jti",
        "iat",
        "exp",
        "nbf",
        "typ",
        "client_id",
        "auth_time",
        "amr",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessClaims:
    """What a valid access token says.

    Attributes:
        subject: ``str(user.pk)``.
        session_id: The public id of the session.
        token_id: Unique (``jti``).
        issued_at, expires_at: Aware UTC.
        authenticated_at: When the owner of the session proved who they are (``auth_time``).
        methods: How, as RFC 8176 names it (``amr``): ``("pwd",)``.
        extra: The claims that the host gave to ``login``.
    """

    subject: str
    session_id: str
    token_id: str
    issued_at: datetime
    expires_at: datetime
    authenticated_at: datetime | None
    methods: tuple[str, ...]
    extra: Mapping[str, Any]


class AccessTokens:
    """Signs and reads access tokens with the keys of one configuration.

    Args:
        config: The keys and lifetimes.
        clock: The time, in UTC.
        user_table: The table of the users that tokens are for; others are not read.
        longest_subject: How many characters a primary key of these users may have.

    Raises:
        ConfigurationError: The settings alone fill a token.
    """

    def __init__(
        self,
        config: AuthConfig,
        clock: Clock,
        user_table: str = "",
        *,
        longest_subject: int = MAX_SUBJECT_LENGTH,
    ) -> None:
        self._config = config
        self._user_table = user_table
        self._clock = clock
        self._keys = {key.kid: key for key in config.keys}
        self._longest_subject = longest_subject
        self._room = self._room_for_claims()
        self._jwt = jwt.PyJWT(
            options={
                "require": ["iss", "aud", "sub", "sid", "jti", "iat", "exp"],
                "enforce_minimum_key_length": True,
                # Checked below, against our clock.
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            }
        )

    def issue(
        self,
        *,
        subject: str,
        session_id: str,
        session_ends: datetime,
        authenticated_at: datetime | None = None,
        methods: Sequence[str] = (),
        extra: Mapping[str, object],
    ) -> tuple[str, datetime]:
        """Return a signed token and the time when it expires, not after its session.

        Raises:
            ValueError: *extra* names a claim that is ours, or holds something JSON cannot.
        """
        self.check_extra(extra)
        now = self._clock()
        expires_at = min(now + self._config.access_token_lifetime, session_ends)
        key = self._config.keys[0]
        issued, expires = int(now.timestamp()), int(expires_at.timestamp())
        claims = {**extra, **self._own_claims(subject, session_id, issued, expires)}
        if authenticated_at is not None:
            claims |= {"auth_time": int(authenticated_at.timestamp()), "amr": [*methods]}
        token = self._jwt.encode(
            claims, key.signing, algorithm=key.algorithm, headers=self._header()
        )
        return token, datetime.fromtimestamp(expires, UTC)

    def _header(self) -> dict[str, str]:
        return {"typ": _ACCESS_TYPE, "kid": self._config.keys[0].kid}

    def _own_claims(
        self, subject: str, session_id: str, issued: int, expires: int
    ) -> dict[str, object]:
        return {
            "iss": self._config.issuer,
            "aud": self._config.audience,
            "sub": subject,
            "sid": session_id,
            "user_table": self._user_table,
            "jti": secrets.token_urlsafe(16),
            "iat": issued,
            "exp": expires,
        }

    def _room_for_claims(self) -> int:
        """Return how many characters of JSON extra claims may have."""
        key = self._config.keys[0]
        latest = 10**11
        own = self._own_claims("x" * self._longest_subject, "x" * 36, latest, latest)
        # `Session.authentication_methods` holds 128 characters: the longest JSON are short methods.
        own |= {"auth_time": latest, "amr": ["x"] * 64}
        header = _base64_length(len(_json({"alg": key.algorithm, **self._header()})))
        signature = _base64_length(key.signature_size)
        # 8: two parts are rounded up in base64, and a comma joins both kinds of claims.
        room = (MAX_TOKEN_LENGTH - header - signature - 2) * 3 // 4 - len(_json(own)) - 8
        if room < _MIN_CLAIMS:
            raise ConfigurationError(
                f"An access token may have {MAX_TOKEN_LENGTH} characters. The issuer, the audience "
                f"and a signature of {key.algorithm} leave {max(room, 0)} for claims, and "
                f"{_MIN_CLAIMS} are needed. Use a shorter issuer and audience, in ASCII, and a "
                "smaller key."
            )
        return min(room, _MAX_CLAIMS)

    def check_extra(self, extra: Mapping[str, object], subject: str | None = None) -> None:
        """Refuse extra claims that would replace ours, cannot be written, or make a token too long.

        Args:
            extra: The claims of the host.
            subject: The primary key that stands in the token, once it is known.

        Raises:
            ValueError: They are such, or no token can be made for *subject*.
        """
        if not isinstance(extra, Mapping):
            raise ValueError("Extra claims must be a dict")
        ours = sorted(_REGISTERED_CLAIMS & extra.keys())
        if ours:
            raise ValueError(
                f"These claims are set by the service and cannot be given: {', '.join(ours)}"
            )
        try:
            size = len(_json(dict(extra)))
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                "Extra claims must be JSON: text, numbers, lists and dicts of them"
            ) from None
        if _is_deeper(extra, _MAX_DEPTH):
            raise ValueError(f"Extra claims must be JSON that is nested at most {_MAX_DEPTH} deep")
        if subject is not None and not _is_text(subject):
            raise ValueError(
                "No token can name an empty primary key, or one with a NUL or a lone surrogate"
            )
        longer = max(0, len(_json(subject or "")) - 2 - self._longest_subject)
        if size > self._room - longer:
            raise ValueError(
                f"Extra claims are too large: {size} characters of JSON. Beside the rest of a token "
                f"there is room for {max(0, self._room - longer)}."
            )

    def read(self, token: str, *, even_if_expired: bool = False) -> AccessClaims:
        """Verify *token* and return what it says.

        Raises:
            TokenInvalidError: It is not one of ours.
            TokenExpiredError: It was.
        """
        claims = self._verified(token)
        if not even_if_expired and claims.expires_at <= self._clock() - self._config.leeway:
            raise TokenExpiredError
        return claims

    def _verified(self, token: str) -> AccessClaims:
        if (
            not isinstance(token, str)
            or len(token) > MAX_TOKEN_LENGTH
            or not _COMPACT_JWS.fullmatch(token)
        ):
            raise TokenInvalidError
        header_part, payload_part, _ = token.split(".")
        header = _json_object(header_part)
        kid, typ = header.get("kid"), header.get("typ")
        key = self._keys.get(kid) if isinstance(kid, str) else None
        # RFC 9068, 4: no JWT of another kind that is signed with the same key passes for an access
        # token.
        if key is None or typ not in (_ACCESS_TYPE, f"application/{_ACCESS_TYPE}"):
            raise TokenInvalidError
        if _OF_ENCRYPTION & header.keys():
            raise TokenInvalidError
        _json_object(payload_part)  # PyJWT would also read UTF-16 (RFC 8725, 3.7)
        try:
            claims = self._jwt.decode(
                token,
                key.verifying,
                algorithms=[key.algorithm],  # the key's, not the header's (RFC 8725, 3.1)
                issuer=self._config.issuer,
                audience=self._config.audience,
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise TokenInvalidError from None
        return self._typed(claims)

    def _typed(self, claims: Mapping[str, Any]) -> AccessClaims:
        texts = [claims[name] for name in ("sub", "sid", "jti")]
        times = [claims[name] for name in ("iat", "exp", "nbf", "auth_time") if name in claims]
        # No primary key is written with what drivers refuse.
        if not all(isinstance(text, str) and _is_text(text) for text in texts):
            raise TokenInvalidError
        # Not `isinstance`: True is an int, and JSON's 1e400 is read as infinity.
        if not all(type(time) is int and time >= 0 for time in times):
            raise TokenInvalidError
        # Two services may share one configuration: user 7 of the one is not user 7 of the other.
        if claims.get("user_table", "") != self._user_table:
            raise TokenInvalidError
        methods = claims.get("amr", [])
        if not isinstance(methods, list) or not all(isinstance(each, str) for each in methods):
            raise TokenInvalidError
        latest_start = (self._clock() + self._config.leeway).timestamp()
        if max(claims["iat"], claims.get("nbf", 0)) > latest_start:
            raise TokenInvalidError
        return AccessClaims(
            subject=claims["sub"],
            session_id=claims["sid"],
            token_id=claims["jti"],
            issued_at=_moment(claims["iat"]),
            expires_at=_moment(claims["exp"]),
            authenticated_at=_moment(claims["auth_time"]) if "auth_time" in claims else None,
            methods=tuple(methods),
            extra=FrozenDict(
                {name: value for name, value in claims.items() if name not in _REGISTERED_CLAIMS}
            ),
        )


def _is_text(text: str) -> bool:
    return text != "" and sanitize_text(text, len(text)) == text


def _json(value: object) -> str:
    """Return *value* as PyJWT writes it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _base64_length(size: int) -> int:
    return (size * 8 + 5) // 6


def _is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, Mapping):
        inside: Iterable[object] = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    else:
        return False
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inside)


def _json_object(part: str) -> dict[str, Any]:
    try:
        value = json.loads(from_base64url(part).decode("utf-8"))
    except (ValueError, RecursionError):
        raise TokenInvalidError from None
    if not isinstance(value, dict):
        raise TokenInvalidError
    return value


def _moment(seconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        raise TokenInvalidError from None
