"""Keys that sign access tokens. Each is bound to one algorithm; weak ones are refused."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.lazy import LazyModule
from tortoise_auth.legible import quoted

if TYPE_CHECKING:
    import cryptography.exceptions as crypto_exceptions
    import jwt
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
else:
    jwt = LazyModule("jwt")
    crypto_exceptions = LazyModule("cryptography.exceptions")
    serialization = LazyModule("cryptography.hazmat.primitives.serialization")
    ec = LazyModule("cryptography.hazmat.primitives.asymmetric.ec")
    ed25519 = LazyModule("cryptography.hazmat.primitives.asymmetric.ed25519")
    rsa = LazyModule("cryptography.hazmat.primitives.asymmetric.rsa")

SecretT = TypeVar("SecretT")

Algorithm: TypeAlias = Literal["HS256", "HS384", "HS512", "EdDSA", "ES256", "RS256"]

_HMAC_KEY_SIZES: Mapping[str, int] = {"HS256": 32, "HS384": 48, "HS512": 64}
_SIGNATURE_SIZES: Mapping[str, int] = {
    "HS256": 32,
    "HS384": 48,
    "HS512": 64,
    "EdDSA": 64,
    "ES256": 64,
}
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
# These phrases mark a placeholder wherever they stand. "test" is not among them: a secret for tests
# may say so. Each has at least eight letters, see `_contains_placeholder`.
_PHRASES = tuple(
    "changeme changethis changeit replaceme replacethis yoursecret placeholder".split()
)
_PUBLISHED = (
    b"django-insecure-",  # what `startproject` writes into the settings that get committed
    b"09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",  # FastAPI's tutorial
    b"a-string-secret-at-least-256-bits-long",  # jwt.io
)
_REPEATED = 12
"""Bytes. A secret that repeats a unit of at most this length is refused: digits, keys, a word."""
MAKE_ONE = 'Make one with: python -c "import secrets; print(secrets.token_urlsafe(48))"'


class Hidden:
    """Holds a secret of a settings object, so that no dump, `vars` or pickle of that shows it."""

    __slots__ = ("reveal",)

    def __init__(self, value: object) -> None:
        self.reveal: Callable[[], object] = lambda: value

    @classmethod
    def hide(cls, owner: object, name: str) -> None:
        """Replace an attribute of a frozen object by a `Hidden` that holds it."""
        value = getattr(owner, name)
        if not isinstance(value, cls):
            object.__setattr__(owner, name, cls(value))

    def __repr__(self) -> str:
        return "<hidden>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hidden) and self.reveal() == other.reveal()

    def __hash__(self) -> int:
        return hash(Hidden)

    def __deepcopy__(self, memo: object) -> Hidden:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "A secret is not pickled: make the AuthConfig in each process, from its settings"
        )


@dataclass(frozen=True)
class SigningKey:
    """A key for access tokens, bound to one algorithm.

    Example:
        Rotation: put the new key first and keep the old one until its last token has expired::

            AuthConfig(secret=[SigningKey(new, kid="2026-11"), SigningKey(old, kid="2026-05")])

    Attributes:
        key: For HS256/384/512 a random secret of at least 32/48/64 bytes (RFC 7518, 3.2); for
            EdDSA, ES256 and RS256 a PEM key (RSA: at least 2048 bits). A private key signs and
            verifies, a public key only verifies.
        kid: The key's name, which tokens carry. The default is derived from the key, so that a
            secret given as a plain string today can be listed as an old key tomorrow.
        algorithm: ``HS256`` (default), ``HS384``, ``HS512``, ``EdDSA``, ``ES256`` or ``RS256``.

    Raises:
        ConfigurationError: The key is weak, a placeholder, or does not fit the algorithm.
    """

    key: str | bytes = field(repr=False)
    kid: str = ""
    algorithm: Algorithm = "HS256"

    def __post_init__(self) -> None:
        Hidden.hide(self, "key")
        if not isinstance(self.algorithm, str) or self.algorithm not in _FAMILIES:
            raise ConfigurationError(
                f"Unknown signing algorithm {quoted(self.algorithm)}. Use one of {', '.join(_FAMILIES)}."
            )
        key = revealed(self.key)
        if not isinstance(key, str | bytes):
            raise ConfigurationError(
                f"The secret must be str or bytes, not {type(key).__name__}. Is the "
                f"environment variable set? {MAKE_ONE}"
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

    @property
    def signature_size(self) -> int:
        """How many bytes its signatures have."""
        if self.family == "RSA":
            return (int(self.verifying.key_size) + 7) // 8
        return _SIGNATURE_SIZES[self.algorithm]

    @property
    def verifying(self) -> Any:  # noqa: ANN401 - one of cryptography's key classes, or bytes
        """The key to verify with, in the form PyJWT takes."""
        return self._bytes if self.family == "HMAC" else self._loaded_public_key

    @property
    def signing(self) -> Any:  # noqa: ANN401
        """The key to sign with, in the form PyJWT takes."""
        return self._bytes if self.family == "HMAC" else self._loaded_private_key.reveal()

    @cached_property
    def _loaded_public_key(self) -> Any:  # noqa: ANN401
        return self._private_key().public_key() if self.can_sign else self._public_key()

    @cached_property
    def _loaded_private_key(self) -> Hidden:
        return Hidden(self._private_key())

    def derive(self, purpose: str) -> bytes:
        """Return 256 bits for another purpose than signing. They do not reveal this key."""
        return hmac.digest(self._bytes, b"tortoise_auth " + purpose.encode(), "sha256")

    @property
    def _bytes(self) -> bytes:
        key = revealed(self.key)
        return key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key

    def _private_key(self) -> Any:  # noqa: ANN401
        return serialization.load_pem_private_key(self._bytes, password=None)

    def _public_key(self) -> Any:  # noqa: ANN401
        return serialization.load_pem_public_key(self._bytes)

    def _check_asymmetric_key(self) -> None:
        wanted: dict[str, tuple[type, ...]] = {
            "EdDSA": (ed25519.Ed25519PublicKey,),
            "ECDSA": (ec.EllipticCurvePublicKey,),
            "RSA": (rsa.RSAPublicKey,),
        }
        try:
            public = self.verifying
        except (ValueError, TypeError, crypto_exceptions.UnsupportedAlgorithm):
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
            material = self.verifying.public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        # Every token shows its kid: 72 bits of a hash, which say nothing about a random secret.
        digest = hashlib.sha256(b"tortoise_auth kid " + material).digest()
        return base64.urlsafe_b64encode(digest[:9]).decode("ascii")


def revealed(value: SecretT) -> SecretT:
    """Return what a `Hidden` holds; anything else as it is."""
    return cast("SecretT", value.reveal()) if isinstance(value, Hidden) else value


def _check_secret(secret: bytes, algorithm: str) -> None:
    needed = _HMAC_KEY_SIZES[algorithm]
    if not secret.strip():
        raise ConfigurationError(
            f"The secret is empty. Is the environment variable set? {MAKE_ONE}"
        )
    unit = _period(secret[:1024])  # quadratic time; a repetition shows in that much text
    stem = unit.rstrip(unit[-1:])  # "changeme0000" without its padding
    known = {_letters(unit), _letters(stem)} & _PLACEHOLDERS
    published = secret.strip().lower().startswith(_PUBLISHED)
    if known or published or _contains_placeholder(secret):
        raise ConfigurationError(f"The secret is a placeholder. {MAKE_ONE}")
    if len(secret) < needed:
        raise ConfigurationError(
            f"The secret has {len(secret)} bytes; {algorithm} needs at least {needed} "
            f"(RFC 7518, 3.2). {MAKE_ONE}"
        )
    if len(unit) <= _REPEATED or len(set(secret)) < 6:
        raise ConfigurationError(f"The secret repeats itself and can be guessed. {MAKE_ONE}")
    try:
        # PyJWT knows the forms of public keys: one taken for a secret lets anyone sign, since
        # anyone has it (algorithm confusion, CVE-2022-29217).
        jwt.PyJWS().get_algorithm_by_name(algorithm).prepare_key(secret)
    except jwt.InvalidKeyError:
        raise ConfigurationError(
            f"The secret is a key of another kind (PEM, SSH, DER or JWK), not one for {algorithm}. "
            f"Name its algorithm in a SigningKey, or use a random string. {MAKE_ONE}"
        ) from None


def _period(text: bytes) -> bytes:
    """Return the shortest prefix whose repetition is *text*; the last repeat may be cut off."""
    return next(text[:size] for size in range(1, len(text) + 1) if text.startswith(text[size:]))


def _contains_placeholder(secret: bytes) -> bool:
    """Return whether *secret* is handwritten text that contains a placeholder phrase.

    A random secret must never be refused. A phrase of eight letters occurs by chance in one of 10^9
    secrets of 32 lower-case letters, and never in hexadecimal. Base64 is full of digits and
    capitals, which handwritten text is not; that leaves one in 10^12. For the same reason a random
    secret may have words in front.
    """
    digits = len(re.findall(rb"[0-9]", secret))
    capitals, small = len(re.findall(rb"[A-Z]", secret)), len(re.findall(rb"[a-z]", secret))
    if 10 * digits > len(secret) or 4 * min(capitals, small) > capitals + small:
        return False
    letters = _letters(secret)
    return any(phrase in letters for phrase in _PHRASES)


def _letters(text: bytes) -> str:
    return re.sub(rb"[^a-z]", b"", text.lower()).decode()
