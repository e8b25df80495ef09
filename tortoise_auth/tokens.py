"""Access tokens (signed, short-lived) and refresh tokens (random, stored as hashes).

An access token is a JWT after RFC 9068, checked by the rules of RFC 8725: one algorithm for each
key, keys from the configuration alone, an explicit type, every claim required. A refresh token is
256 random bits and means nothing to anybody but the database.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from tortoise_auth.clock import Clock
from tortoise_auth.exceptions import ConfigurationError, TokenExpiredError, TokenInvalidError

Algorithm: TypeAlias = Literal["HS256", "HS384", "HS512", "EdDSA", "ES256", "RS256"]

MAX_TOKEN_LENGTH = 8192
"""Characters. Longer input is refused before it is decoded."""

_ACCESS_TYPE = "at+jwt"
_COMPACT_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
_REGISTERED_CLAIMS = frozenset(
    {"iss", "aud", "sub", "sid", "jti", "iat", "exp", "nbf", "typ", "client_id"}
)
_HMAC_KEY_SIZES: Mapping[str, int] = {"HS256": 32, "HS384": 48, "HS512": 64}
_FAMILIES: Mapping[str, str] = {
    "HS256": "HMAC",
    "HS384": "HMAC",
    "HS512": "HMAC",
    "EdDSA": "EdDSA",
    "ES256": "ECDSA",
    "RS256": "RSA",
}
_PLACEHOLDERS = frozenset(
    "secret secretkey mysecret mysecretkey yoursecret yoursecretkey yoursecrethere supersecret "
    "supersecretkey topsecret changeme changethis changeit replaceme password default example "
    "placeholder insecure development django fixme todo yourbitsecret".split()
)
_MAKE_ONE = 'Make one with: python -c "import secrets; print(secrets.token_urlsafe(48))"'


@dataclass(frozen=True)
class SigningKey:
    """A key for access tokens, bound to one algorithm.

    Example:
        Rotation: put the new key first and keep the old one until its last token has expired::

            AuthConfig(secret=[SigningKey(new, kid="2026-11"), SigningKey(old, kid="2026-05")])

    Attributes:
        key: For HS256/384/512 a random secret of at least 32/48/64 bytes (RFC 7518, 3.2); for
            EdDSA, ES256 and RS256 a PEM key. A private key signs and verifies, a public one only
            verifies (RSA: at least 2048 bits).
        kid: The name that tokens carry. By default derived from the key, so that a secret given
            as a plain string today can be listed as an old key tomorrow.
        algorithm: ``HS256`` (default), ``HS384``, ``HS512``, ``EdDSA``, ``ES256`` or ``RS256``.

    Raises:
        ConfigurationError: The key is weak, a placeholder, or does not fit the algorithm.
    """

    key: str | bytes = field(repr=False)
    kid: str = ""
    algorithm: Algorithm = "HS256"

    def __post_init__(self) -> None:
        if not isinstance(self.algorithm, str) or self.algorithm not in _FAMILIES:
            raise ConfigurationError(
                f"Unknown signing algorithm {self.algorithm!r}. Use one of {', '.join(_FAMILIES)}."
            )
        if not isinstance(self.key, str | bytes):
            raise ConfigurationError(
                f"The secret must be str or bytes, not {type(self.key).__name__}. Is the "
                f"environment variable set? {_MAKE_ONE}"
            )
        if self.family == "HMAC":
            _check_secret(self._bytes, self.algorithm)
        else:
            self._check_asymmetric_key()
        if not self.kid:
            object.__setattr__(self, "kid", self._thumbprint())
        if not isinstance(self.kid, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.kid):
            raise ConfigurationError(
                "A kid is 1 to 64 letters, digits, dots, dashes or underscores"
            )
        if self._bytes in self.kid.encode():
            raise ConfigurationError("The kid contains the secret, and every token shows its kid")

    @property
    def family(self) -> str:
        """The kind of key: keys of different kinds are never configured together."""
        return _FAMILIES[self.algorithm]

    @property
    def can_sign(self) -> bool:
        """Whether this is a secret or private key."""
        return self.family == "HMAC" or b"PRIVATE KEY" in self._bytes

    @cached_property
    def verifying(self) -> Any:  # noqa: ANN401 - one of cryptography's key classes, or bytes
        """The key to verify with, in the form PyJWT takes."""
        if self.family == "HMAC":
            return self._bytes
        return self._private_key().public_key() if self.can_sign else self._public_key()

    @cached_property
    def signing(self) -> Any:  # noqa: ANN401
        """The key to sign with, in the form PyJWT takes."""
        return self._bytes if self.family == "HMAC" else self._private_key()

    def derive(self, purpose: str) -> bytes:
        """Return 256 bits for another purpose than signing, from which this key cannot be found."""
        return hmac.digest(self._bytes, b"tortoise_auth " + purpose.encode(), "sha256")

    @property
    def _bytes(self) -> bytes:
        return self.key.encode("utf-8", "surrogatepass") if isinstance(self.key, str) else self.key

    def _private_key(self) -> Any:  # noqa: ANN401
        return load_pem_private_key(self._bytes, password=None)

    def _public_key(self) -> Any:  # noqa: ANN401
        return load_pem_public_key(self._bytes)

    def _check_asymmetric_key(self) -> None:
        wanted: dict[str, tuple[type, ...]] = {
            "EdDSA": (ed25519.Ed25519PublicKey,),
            "ECDSA": (ec.EllipticCurvePublicKey,),
            "RSA": (rsa.RSAPublicKey,),
        }
        try:
            public = self.verifying
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigurationError(
                f"{self.algorithm} needs an unencrypted key in PEM form, private to sign or public to verify"
            ) from None
        if not isinstance(public, wanted[self.family]):
            raise ConfigurationError(
                f"The key is not one for {self.algorithm}. Name the algorithm that it was made for."
            )
        if isinstance(public, rsa.RSAPublicKey) and public.key_size < 2048:
            raise ConfigurationError("An RSA key must have at least 2048 bits (RFC 7518, 3.3)")
        if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name != "secp256r1":
            raise ConfigurationError("ES256 needs a key on the curve P-256 (RFC 7518, 3.4)")

    def _thumbprint(self) -> str:
        if self.family == "HMAC":
            material = self._bytes
        else:
            material = self.verifying.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return _base64(hashlib.sha256(b"tortoise_auth kid " + material).digest()[:9])


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """Settings of one `AuthService`, checked when they are made.

    Attributes:
        secret: What signs access tokens: a random string of at least 32 bytes, or a list of
            `SigningKey`, newest first. Warning: who knows it can be anybody. Keep it out of the
            code, read it from the environment.
        issuer, audience: Written into access tokens and required in them. Give each service of
            yours an audience of its own.
        access_token_lifetime: 15 minutes by default, at most a day. ``AuthService.authenticate``
            sees a logout at once; ``decode``, which asks no database, only when the token expires.
        refresh_token_lifetime: How long a session may lie idle (7 days).
        session_lifetime: When a session ends however busy it is (30 days; NIST SP 800-63B-4,
            2.1.3, asks for no more).
        leeway: How far the clocks of two machines may differ (10 seconds, at most 5 minutes).
        refresh_reuse_grace: For how long after a refresh the spent token is still exchanged, for
            clients that refresh twice at the same time. Off by default.
            Warning: within this window a stolen token goes unnoticed (RFC 9700, 4.14.2).

    Raises:
        ConfigurationError: A setting is missing, weak or makes no sense; the message says what to do.
    """

    secret: str | bytes | Sequence[SigningKey] = field(repr=False)
    issuer: str = "tortoise-auth"
    audience: str = "tortoise-auth"
    access_token_lifetime: timedelta = timedelta(minutes=15)
    refresh_token_lifetime: timedelta = timedelta(days=7)
    session_lifetime: timedelta = timedelta(days=30)
    leeway: timedelta = timedelta(seconds=10)
    refresh_reuse_grace: timedelta = timedelta(0)

    def __post_init__(self) -> None:
        self._check_keys()
        for name in ("issuer", "audience"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value.encode(errors="replace")) < 256:
                raise ConfigurationError(
                    f"AuthConfig.{name} must be a non-empty string of at most 255 bytes"
                )
        for name, least, most in self._bounds:
            value = getattr(self, name)
            if not isinstance(value, timedelta):
                raise ConfigurationError(
                    f"AuthConfig.{name} must be a timedelta, for example timedelta(minutes=15)"
                )
            if not least <= value <= most:
                raise ConfigurationError(
                    f"AuthConfig.{name} is {value}; it must be between {least} and {most}"
                )
        for name in ("refresh_token_lifetime", "session_lifetime"):
            if getattr(self, name) < self.access_token_lifetime:
                raise ConfigurationError(
                    f"AuthConfig.{name} must not be shorter than access_token_lifetime "
                    f"({self.access_token_lifetime})"
                )

    @cached_property
    def keys(self) -> tuple[SigningKey, ...]:
        """The signing keys, newest first."""
        if isinstance(self.secret, Sequence) and not isinstance(self.secret, str | bytes):
            return tuple(self.secret)
        return (SigningKey(self.secret),)

    _bounds: ClassVar[Sequence[tuple[str, timedelta, timedelta]]] = (
        ("access_token_lifetime", timedelta(seconds=1), timedelta(days=1)),
        ("refresh_token_lifetime", timedelta(seconds=1), timedelta(days=366)),
        ("session_lifetime", timedelta(seconds=1), timedelta(days=366)),
        ("leeway", timedelta(0), timedelta(minutes=5)),
        ("refresh_reuse_grace", timedelta(0), timedelta(minutes=1)),
    )

    def _check_keys(self) -> None:
        if not self.keys or not all(isinstance(key, SigningKey) for key in self.keys):
            raise ConfigurationError(
                f"AuthConfig.secret must be a string or a list of SigningKey, newest first. {_MAKE_ONE}"
            )
        if len({key.family for key in self.keys}) > 1:
            families = ", ".join(sorted({key.family for key in self.keys}))
            raise ConfigurationError(
                f"AuthConfig.secret mixes keys of different families ({families}), which invites "
                "algorithm confusion (RFC 8725, 3.1). Rotate within one family; to change it, "
                "switch at once: access tokens are short-lived, and refresh tokens go on."
            )
        if len({key.kid for key in self.keys}) < len(self.keys):
            raise ConfigurationError(
                "AuthConfig.secret has two keys with the same kid. List no key twice, and give "
                "each key a kid of its own, or none."
            )
        if not self.keys[0].can_sign:
            raise ConfigurationError(
                "The first key of AuthConfig.secret signs, so it must be a private key"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessClaims:
    """What a valid access token says.

    Attributes:
        subject: ``str(user.pk)``.
        session_id: The public id of the session.
        token_id: Unique (``jti``).
        issued_at, expires_at: Aware UTC.
        extra: The claims that the host gave to ``login``.
    """

    subject: str
    session_id: str
    token_id: str
    issued_at: datetime
    expires_at: datetime
    extra: Mapping[str, Any]


class AccessTokens:
    """Signs and reads access tokens with the keys of one configuration."""

    def __init__(self, config: AuthConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._keys = {key.kid: key for key in config.keys}
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
        self, *, subject: str, session_id: str, session_ends: datetime, extra: Mapping[str, object]
    ) -> tuple[str, datetime]:
        """Return a signed token and the time when it expires, not after its session.

        Raises:
            ValueError: *extra* names a claim that is ours, or holds something JSON cannot.
        """
        self.check_extra(extra)
        now = self._clock()
        expires_at = min(now + self._config.access_token_lifetime, session_ends)
        key = self._config.keys[0]
        expires = int(expires_at.timestamp())
        claims = {
            **extra,
            "iss": self._config.issuer,
            "aud": self._config.audience,
            "sub": subject,
            "sid": session_id,
            "jti": secrets.token_urlsafe(16),
            "iat": int(now.timestamp()),
            "exp": expires,
        }
        token = self._jwt.encode(
            claims,
            key.signing,
            algorithm=key.algorithm,
            headers={"typ": _ACCESS_TYPE, "kid": key.kid},
        )
        return token, datetime.fromtimestamp(expires, UTC)

    @staticmethod
    def check_extra(extra: Mapping[str, object]) -> None:
        """Refuse extra claims that would replace ours, or cannot be written.

        Raises:
            ValueError: They are such.
        """
        if not isinstance(extra, Mapping):
            raise ValueError("Extra claims must be a dict")
        ours = sorted(_REGISTERED_CLAIMS & extra.keys())
        if ours:
            raise ValueError(
                f"These claims are set by the service and cannot be given: {', '.join(ours)}"
            )
        try:
            size = len(json.dumps(dict(extra), allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            raise ValueError(
                "Extra claims must be JSON: text, numbers, lists and dicts of them"
            ) from None
        if size > MAX_TOKEN_LENGTH // 2:
            raise ValueError(f"Extra claims are too large: {size} characters of JSON")

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
        if key is None or typ not in (_ACCESS_TYPE, f"application/{_ACCESS_TYPE}"):
            raise TokenInvalidError
        _json_object(payload_part)  # PyJWT would also read UTF-16 (RFC 8725, 3.7)
        try:
            claims = self._jwt.decode(
                token,
                key.verifying,
                algorithms=[key.algorithm],
                issuer=self._config.issuer,
                audience=self._config.audience,
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise TokenInvalidError from None
        return self._typed(claims)

    def _typed(self, claims: Mapping[str, Any]) -> AccessClaims:
        texts = [claims[name] for name in ("sub", "sid", "jti")]
        times = [claims[name] for name in ("iat", "exp", "nbf") if name in claims]
        if not all(isinstance(text, str) and text for text in texts):
            raise TokenInvalidError
        if not all(type(time) is int and time >= 0 for time in times):
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
            extra=MappingProxyType(
                {name: value for name, value in claims.items() if name not in _REGISTERED_CLAIMS}
            ),
        )


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A refresh token: 128 random bits that its session keeps, 256 that change with every refresh.

    The first part finds the session; since nobody but a holder of one of its tokens knows it, an
    unknown second part behind a known first one is a spent token, however old. Four bytes of
    checksum tell damage in transit from reuse, and spare the database a look-up for garbage.

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
        return cls._made_of(secrets.token_bytes(cls._FAMILY_SIZE))

    def next(self) -> RefreshToken:
        """Return the token that follows this one in its session."""
        return self._made_of(self._decoded(self.text)[: self._FAMILY_SIZE])

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
        """Tell refresh tokens from access tokens."""
        return text.startswith(cls._PREFIX)

    @classmethod
    def _made_of(cls, family: bytes) -> RefreshToken:
        body = family + secrets.token_bytes(cls._SECRET_SIZE)
        raw = body + _digest(body)[: cls._CHECK_SIZE]
        return cls._of(cls._PREFIX + _base64(raw), raw)

    @classmethod
    def _of(cls, text: str, raw: bytes) -> RefreshToken:
        return cls(text, _digest(raw[: cls._FAMILY_SIZE]).hex(), _digest(raw).hex())

    @classmethod
    def _decoded(cls, text: str) -> bytes:
        size = cls._FAMILY_SIZE + cls._SECRET_SIZE + cls._CHECK_SIZE
        length = len(cls._PREFIX) + (size * 8 + 5) // 6
        if not isinstance(text, str) or len(text) != length or not cls.looks_like(text):
            raise TokenInvalidError
        raw = _unbase64(text[len(cls._PREFIX) :])
        if cls._PREFIX + _base64(raw) != text:  # a second spelling of the same bytes
            raise TokenInvalidError
        return raw


def _check_secret(secret: bytes, algorithm: str) -> None:
    needed = _HMAC_KEY_SIZES[algorithm]
    if not secret.strip():
        raise ConfigurationError(
            f"The secret is empty. Is the environment variable set? {_MAKE_ONE}"
        )
    unit = _period(secret[:1024])  # whose time grows with the square, and whose answer is there
    stem = unit.rstrip(unit[-1:])  # without what it was filled up with
    if {_letters(unit), _letters(stem)} & _PLACEHOLDERS:
        raise ConfigurationError(f"The secret is a placeholder. {_MAKE_ONE}")
    if len(secret) < needed:
        raise ConfigurationError(
            f"The secret has {len(secret)} bytes; {algorithm} needs at least {needed} "
            f"(RFC 7518, 3.2). {_MAKE_ONE}"
        )
    if len(unit) <= 8 or len(set(secret)) < 6:
        raise ConfigurationError(f"The secret repeats itself and can be guessed. {_MAKE_ONE}")
    try:
        jwt.PyJWS().get_algorithm_by_name(algorithm).prepare_key(secret)
    except jwt.InvalidKeyError:
        raise ConfigurationError(
            f"The secret is a key of another kind (PEM, SSH, DER or JWK), not one for {algorithm}. "
            f"Name its algorithm in a SigningKey, or use a random string. {_MAKE_ONE}"
        ) from None


def _period(text: bytes) -> bytes:
    """Return the shortest beginning that *text* repeats, up to a last part of it."""
    return next(text[:size] for size in range(1, len(text) + 1) if text.startswith(text[size:]))


def _letters(text: bytes) -> str:
    return re.sub(rb"[^a-z]", b"", text.lower()).decode()


def _json_object(part: str) -> dict[str, Any]:
    try:
        value = json.loads(_unbase64(part).decode("utf-8"))
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


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise TokenInvalidError from None
