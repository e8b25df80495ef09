"""Tokens: which keys and settings are accepted, and that forged and damaged tokens are refused."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import hmac
import json
import random
import secrets
import socket
import string
from bisect import bisect_left
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, get_args
from uuid import uuid4

import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.accounts import SECRET
from tortoise_auth import AccessClaims, AuthConfig, SigningKey
from tortoise_auth.exceptions import (
    ConfigurationError,
    TokenExpiredError,
    TokenInvalidError,
)
from tortoise_auth.keys import Algorithm
from tortoise_auth.sessions.access_tokens import MAX_TOKEN_LENGTH, AccessTokens
from tortoise_auth.sessions.refresh_tokens import RefreshToken
from tortoise_auth.testing import FakeClock

SHA = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}
MAKE_ONE = "secrets.token_urlsafe"
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)


@functools.cache
def private_key(kind: str) -> PrivateKeyTypes:
    """Return the key of a kind that all tests share."""
    make: dict[str, Callable[[], PrivateKeyTypes]] = {
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
        "other EdDSA": ed25519.Ed25519PrivateKey.generate,
        "Ed448": ed448.Ed448PrivateKey.generate,
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
        "RS256": lambda: rsa.generate_private_key(65537, 2048),
        "RSA 1024": lambda: rsa.generate_private_key(65537, 1024),
    }
    return make[kind]()


def pem(kind: str) -> str:
    return (
        private_key(kind).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    )


def encrypted_pem(kind: str) -> str:
    return (
        private_key(kind)
        .private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
        .decode()
    )


def public(kind: str, encoding: Encoding = Encoding.PEM) -> bytes:
    return private_key(kind).public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)


def public_pem(kind: str) -> str:
    return public(kind).decode()


def key_for(algorithm: str) -> str:
    return pem(algorithm) if algorithm in {"EdDSA", "ES256", "RS256"} else SECRET


def part(value: object) -> str:
    """Return JSON, or bytes as they are, in base64url."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(
    header: object, payload: object, *, key: str | bytes = SECRET, algorithm: str = "HS256"
) -> str:
    """Return a token that is signed with *key*, made without any JWT library."""
    text = f"{part(header)}.{part(payload)}"
    secret = key.encode() if isinstance(key, str) else key
    return f"{text}.{part(hmac.new(secret, text.encode(), SHA[algorithm]).digest())}"


def opened(token: str, index: int) -> dict[str, Any]:
    """Return one part of a token, unverified."""
    text = token.split(".")[index]
    value: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return value


def issue(tokens: AccessTokens, clock: FakeClock, **extra: object) -> str:
    token, _ = tokens.issue(
        subject="42", session_id="sid", session_ends=clock() + timedelta(days=30), extra=extra
    )
    return token


CONFIG = AuthConfig(secret=SECRET)
KID = CONFIG.keys[0].kid
HEADER = {"alg": "HS256", "typ": "at+jwt", "kid": KID}
NOW = int(FakeClock()().timestamp())
CLAIMS: dict[str, Any] = {
    "iss": "tortoise-auth",
    "aud": "tortoise-auth",
    "sub": "42",
    "sid": "sid",
    "jti": "jti",
    "iat": NOW,
    "exp": NOW + 900,
}


@pytest.fixture
def tokens(clock: FakeClock) -> AccessTokens:
    return AccessTokens(CONFIG, clock)


_OF_A_TUTORIAL = "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7"

UNFIT_SECRETS: dict[str, tuple[Any, str]] = {
    "empty": ("", "is empty"),
    "no bytes": (b"", "is empty"),
    "spaces": (" " * 40, "is empty"),
    "white space": ("\t\n" * 20, "is empty"),
    "None": (None, "environment variable"),
    "number": (1234567890, "environment variable"),
    "key without a list": (SigningKey(SECRET), "str or bytes"),
    "no keys": ([], "list of SigningKey"),
    "list of text": ([SECRET], "list of SigningKey"),
    "list with None": ([SigningKey(SECRET), None], "list of SigningKey"),
    "bytearray": (bytearray(SECRET.encode()), "list of SigningKey"),
    "one character": ("x", "at least 32"),
    "31 characters": (SECRET[:31], "at least 32"),
    "31 bytes": (SECRET[:31].encode(), "at least 32"),
    "changeme": ("changeme", "placeholder"),
    "CHANGE_ME": ("CHANGE_ME_CHANGE_ME_CHANGE_ME_CHANGE_ME", "placeholder"),
    "changeme and digits": ("changeme1234567890123456789012345678", "placeholder"),
    "secret repeated to 40": (("secret" * 7)[:40], "placeholder"),
    "changeme repeated to 36": (("changeme" * 5)[:36], "placeholder"),
    "secret filled up": ("secret" + "x" * 34, "placeholder"),
    "your-256-bit-secret": ("your-256-bit-secret", "placeholder"),
    "your-256-bit-secret twice": ("your-256-bit-secret" * 2, "placeholder"),
    "your-256-bit-secret with noughts": ("your-256-bit-secret" + "0" * 20, "placeholder"),
    "your-256-bit-secret with signs": ("your-256-bit-secret" + "=" * 20, "placeholder"),
    "your-256-bit-secret with letters": ("your-256-bit-secret" + "x" * 20, "placeholder"),
    "three words": ("SuperSecretKey-SuperSecretKey-SuperSecretKey", "placeholder"),
    "placeholder in a sentence": ("change-me-in-production-please-now", "placeholder"),
    "placeholder in capitals": ("CHANGE_ME_IN_PRODUCTION_PLEASE_NOW_1", "placeholder"),
    "placeholder in humps": ("PleaseChangeMeToSomethingThatNobodyKnows", "placeholder"),
    "jwt.io": ("a-string-secret-at-least-256-bits-long", "placeholder"),
    "Django's": ("django-insecure-" + secrets.token_urlsafe(38), "placeholder"),
    "FastAPI's": (_OF_A_TUTORIAL, "placeholder"),
    "FastAPI's with a line feed": (_OF_A_TUTORIAL.upper() + "\n", "placeholder"),
    "digits in order": ("0123456789" * 4, "repeats itself"),
    "a row of keys": ("qwertyuiop" * 4, "repeats itself"),
    "one character repeated": ("a" * 64, "repeats itself"),
    "four characters repeated": ("ab12" * 16, "repeats itself"),
    "eight characters repeated": ("kQ7!xZ2p" * 8, "repeats itself"),
    "eight characters in part": (("kQ7!xZ2p" * 8)[:61], "repeats itself"),
    "two characters": ("01" * 17 + "10" * 17, "repeats itself"),
    "noughts": (bytes(64), "repeats itself"),
    "RSA key": (pem("RS256"), "another kind"),
    "Ed25519 key": (pem("EdDSA"), "another kind"),
    "public key": (public("RS256"), "another kind"),
    "DER": (public("RS256", Encoding.DER), "another kind"),
    "JWK": ('{"kty": "oct", "k": "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ"}', "another kind"),
}

FIT_SECRETS: dict[str, str | bytes] = {
    "text": SECRET,
    "32 characters": SECRET[:32],
    "hexadecimal": secrets.token_hex(16),
    "bytes": secrets.token_bytes(32),
    "16 characters of two bytes": "áéíóúàèìòùâêîôûä",
    "words": "correct horse battery staple and secret",
    "digits": "".join(random.Random(1).choices(string.digits, k=40)),
    "ends as it begins": SECRET[:32] + SECRET[:7],
    "32 characters twice": SECRET[:32] * 2,
    "words before hexadecimal": "my-secret-key-" + secrets.token_hex(32),
    "words before base64": "shop-secret-key-" + SECRET,
    "a phrase by chance": "q3Vt8mXw0cJr5ZChangeMe7uKd4PsAoE1gTfIi6RvUk",
    "one that says it is for tests": "test-secret-do-not-use-in-production-1",
}


class TestSecrets:
    @pytest.mark.parametrize("what", UNFIT_SECRETS)
    def test_refused(self, what: str) -> None:
        """A secret that is missing, short, published or guessable is refused with advice."""
        secret, complaint = UNFIT_SECRETS[what]
        with pytest.raises(ConfigurationError) as refused:
            AuthConfig(secret=secret)
        message = str(refused.value)
        assert complaint in message
        assert MAKE_ONE in message
        if isinstance(secret, str | bytes) and len(secret) > 8:
            assert repr(secret)[2:-1] not in repr(message)

    @pytest.mark.parametrize("what", FIT_SECRETS)
    def test_accepted(self, what: str) -> None:
        """A secret of 32 bytes that do not repeat is accepted."""
        assert AuthConfig(secret=FIT_SECRETS[what]).keys[0].can_sign

    @pytest.mark.parametrize("size", [32, 33, 48, 64])
    def test_random_ones_are_never_refused(self, size: int) -> None:
        """No rule against guessable secrets refuses a random one, whatever its encoding."""
        source = random.Random(size)
        for _ in range(500):
            raw = source.randbytes(size)
            letters = "".join(source.choices(string.ascii_lowercase, k=size))
            for secret in (raw, raw.hex(), base64.urlsafe_b64encode(raw), letters):
                assert SigningKey(secret).can_sign

    @pytest.mark.parametrize(("algorithm", "size"), [("HS256", 32), ("HS384", 48), ("HS512", 64)])
    def test_size_for_the_algorithm(self, algorithm: Algorithm, size: int) -> None:
        """An HMAC key has at least the size of the hash (RFC 7518, 3.2)."""
        secret = secrets.token_bytes(64)
        assert SigningKey(secret[:size], algorithm=algorithm).algorithm == algorithm
        with pytest.raises(ConfigurationError, match=f"{algorithm} needs at least {size}"):
            SigningKey(secret[: size - 1], algorithm=algorithm)

    def test_hs512_with_32_bytes(self) -> None:
        """A secret that is long enough for HS256 is too short for HS512."""
        with pytest.raises(ConfigurationError, match="needs at least 64"):
            AuthConfig(secret=[SigningKey(SECRET[:32], algorithm="HS512")])


WRONG_PEM: dict[str, Callable[[str], str | bytes]] = {
    "encrypted": encrypted_pem,
    "no key": lambda kind: SECRET,
    "empty": lambda kind: "",
    "other label": lambda kind: pem(kind).replace("PRIVATE KEY", "PRIVATE TREE"),
    "private cut off": lambda kind: pem(kind)[:100],
    "public cut off": lambda kind: public_pem(kind)[:60],
    "DER": lambda kind: public(kind, Encoding.DER),
    "empty PEM": lambda kind: "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n",
    "surrogate": lambda kind: "-----BEGIN PUBLIC KEY-----\n\ud800\n-----END PUBLIC KEY-----\n",
}


class TestKeys:
    @pytest.mark.parametrize(
        ("algorithm", "kind", "complaint"),
        [
            ("RS256", "RSA 1024", "at least 2048 bits"),
            ("RS256", "ES256", "Name the algorithm"),
            ("RS256", "EdDSA", "Name the algorithm"),
            ("ES256", "P-384", "curve P-256"),
            ("ES256", "secp256k1", "curve P-256"),
            ("ES256", "RS256", "Name the algorithm"),
            ("EdDSA", "ES256", "Name the algorithm"),
            ("EdDSA", "Ed448", "Name the algorithm"),
        ],
    )
    def test_key_does_not_fit(self, algorithm: Algorithm, kind: str, complaint: str) -> None:
        """A key that is too small or of another kind is refused, private or public."""
        for text in (pem(kind), public_pem(kind)):
            with pytest.raises(ConfigurationError, match=complaint) as refused:
                SigningKey(text, algorithm=algorithm)
            assert text[30:80] not in str(refused.value)

    @pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
    @pytest.mark.parametrize("what", WRONG_PEM)
    def test_wrong_pem(self, algorithm: Algorithm, what: str) -> None:
        """An encrypted, damaged or missing PEM key is refused with what is expected."""
        with pytest.raises(ConfigurationError, match="unencrypted key in PEM form") as refused:
            SigningKey(WRONG_PEM[what](algorithm), algorithm=algorithm)
        assert refused.value.__cause__ is None

    @pytest.mark.parametrize("algorithm", ["none", "HS1", "hs256", "PS256", "", None])
    def test_unknown_algorithm(self, algorithm: Any) -> None:
        """An algorithm that is not on the list is refused, and the message names the list."""
        with pytest.raises(ConfigurationError, match="HS256, HS384, HS512, EdDSA, ES256, RS256"):
            SigningKey(SECRET, algorithm=algorithm)

    @pytest.mark.parametrize("kid", ["a b", "ä", "k" * 65, "k\n", "k/../k", "k'--", "\0"])
    def test_kid(self, kid: str) -> None:
        """A kid is a short plain word, which no lookup can misread."""
        with pytest.raises(ConfigurationError, match="1 to 64 letters"):
            SigningKey(SECRET, kid=kid)
        assert SigningKey(SECRET, kid="2026-11_a.B").kid == "2026-11_a.B"

    def test_default_kid(self) -> None:
        """The kid of a key is stable, differs from that of another key, and reveals nothing."""
        assert SigningKey(SECRET).kid == SigningKey(SECRET.encode()).kid == KID
        assert len({SigningKey(secrets.token_bytes(32)).kid for _ in range(100)}) == 100
        assert KID not in SECRET
        assert hashlib.sha256(SECRET.encode()).hexdigest()[:8] not in KID

    @pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
    def test_public_half(self, algorithm: Algorithm) -> None:
        """A private key and its public half have the same kid, and only the private one signs."""
        private = SigningKey(pem(algorithm), algorithm=algorithm)
        half = SigningKey(public_pem(algorithm), algorithm=algorithm)
        assert private.kid == half.kid
        assert (private.can_sign, half.can_sign) == (True, False)


class TestConfig:
    @pytest.mark.parametrize(
        "keys",
        [
            [SigningKey(SECRET), SigningKey(pem("EdDSA"), algorithm="EdDSA")],
            [SigningKey(public_pem("RS256"), algorithm="RS256"), SigningKey(SECRET)],
            [
                SigningKey(pem("ES256"), algorithm="ES256"),
                SigningKey(pem("EdDSA"), algorithm="EdDSA"),
            ],
        ],
    )
    def test_mixed_families(self, keys: list[SigningKey]) -> None:
        """Keys of two families in one configuration are refused, with an alternative."""
        with pytest.raises(ConfigurationError, match="Rotate within one family"):
            AuthConfig(secret=keys)

    @pytest.mark.parametrize(
        "keys",
        [
            [SigningKey(SECRET, kid="k"), SigningKey(SECRET[::-1], kid="k")],
            [SigningKey(SECRET), SigningKey(SECRET)],
            [SigningKey(SECRET, kid="k"), SigningKey(SECRET * 2, kid="k", algorithm="HS512")],
        ],
    )
    def test_duplicate_kid(self, keys: list[SigningKey]) -> None:
        """Two keys with the same kid are refused, even for two algorithms."""
        with pytest.raises(ConfigurationError, match="give each key a kid of its own"):
            AuthConfig(secret=keys)

    @pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
    def test_public_key_first(self, algorithm: Algorithm) -> None:
        """The first key signs, so it cannot be a public one."""
        half = SigningKey(public_pem(algorithm), algorithm=algorithm)
        with pytest.raises(ConfigurationError, match="must be a private key"):
            AuthConfig(secret=[half])

    @pytest.mark.parametrize(
        "name",
        [
            "access_token_lifetime",
            "refresh_token_lifetime",
            "session_lifetime",
            "leeway",
            "refresh_reuse_grace",
        ],
    )
    def test_lifetimes(self, name: str) -> None:
        """Numbers, negative and huge lifetimes are refused, with the range."""
        for nonsense in (900, 15.0, "15 min", None, True):
            with pytest.raises(ConfigurationError, match=rf"{name} must be a timedelta, for"):
                AuthConfig(secret=SECRET, **{name: nonsense})  # type: ignore[arg-type]
        for lifetime in (timedelta(seconds=-1), timedelta(days=400), timedelta.max, timedelta.min):
            with pytest.raises(ConfigurationError, match=rf"{name} is .* must be between"):
                AuthConfig(secret=SECRET, **{name: lifetime})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "name", ["access_token_lifetime", "refresh_token_lifetime", "session_lifetime"]
    )
    def test_zero(self, name: str) -> None:
        """A lifetime of zero is refused."""
        for lifetime in (timedelta(0), timedelta(microseconds=999_999)):
            with pytest.raises(ConfigurationError, match="between 0:00:01"):
                AuthConfig(secret=SECRET, **{name: lifetime})  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["refresh_token_lifetime", "session_lifetime"])
    def test_shorter_than_access(self, name: str) -> None:
        """The lifetimes of refresh token and session are at least that of an access token."""
        with pytest.raises(ConfigurationError, match="must not be shorter than access_token"):
            AuthConfig(secret=SECRET, **{name: timedelta(minutes=14)})  # type: ignore[arg-type]
        AuthConfig(secret=SECRET, **{name: timedelta(minutes=15)})  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["issuer", "audience"])
    def test_names(self, name: str) -> None:
        """Issuer and audience must be non-empty names."""
        for nonsense in ("", None, 5, ["us"]):
            with pytest.raises(ConfigurationError, match=f"{name} must be a non-empty string"):
                AuthConfig(secret=SECRET, **{name: nonsense})  # type: ignore[arg-type]

    def test_defaults(self) -> None:
        """The defaults are the documented ones."""
        assert CONFIG.access_token_lifetime == timedelta(minutes=15)
        assert CONFIG.refresh_token_lifetime == timedelta(days=7)
        assert CONFIG.session_lifetime == timedelta(days=30)
        assert CONFIG.leeway == timedelta(seconds=10)
        assert CONFIG.refresh_reuse_grace == timedelta(0)
        assert [key.algorithm for key in CONFIG.keys] == ["HS256"]

    def test_immutable(self, clock: FakeClock) -> None:
        """Neither an attribute nor the list of keys that was given changes a configuration."""
        new, old = SigningKey(SECRET, kid="new"), SigningKey(SECRET[::-1], kid="old")
        given = [new, old]
        config = AuthConfig(secret=given)
        before = AccessTokens(config, clock)
        given.reverse()
        given.pop()
        given.append(SigningKey("attacker's own key, 32 bytes and more", kid="evil"))
        after = AccessTokens(config, clock)
        assert config.keys == (new, old)
        for tokens in (before, after):
            assert opened(issue(tokens, clock), 0)["kid"] == "new"
        for thing, name in ((config, "issuer"), (config, "secret"), (new, "key"), (new, "kid")):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, name, "x")

    @pytest.mark.parametrize("algorithm", get_args(Algorithm))
    def test_repr(self, algorithm: Algorithm) -> None:
        """No representation shows a key."""
        key = SigningKey(
            key_for(algorithm) * (2 if algorithm == "HS512" else 1), algorithm=algorithm
        )
        config = AuthConfig(secret=[key])
        shown = repr(key) + repr(config) + str(config) + f"{key}" + repr(config.keys)
        middle = str(key.key)[len(str(key.key)) // 2 :][:12]
        assert middle not in shown
        assert key.kid in repr(key)
        assert repr(CONFIG).startswith("AuthConfig(issuer='tortoise-auth'")
        assert "secret" not in repr(CONFIG)


class TestAccessTokens:
    @pytest.mark.parametrize("algorithm", get_args(Algorithm))
    def test_round_trip(self, algorithm: Algorithm, clock: FakeClock) -> None:
        """With every algorithm, what was issued is read back."""
        key = SigningKey(key_for(algorithm), algorithm=algorithm)
        tokens = AccessTokens(AuthConfig(secret=[key], issuer="us", audience="them"), clock)
        token, expires_at = tokens.issue(
            subject="42",
            session_id="a-b-c",
            session_ends=clock() + timedelta(days=1),
            authenticated_at=clock() - timedelta(hours=1),
            methods=("pwd", "otp"),
            extra={"role": "admin", "scopes": ["a", {"b": None}], "naïve 🐢": 1.5},
        )
        claims = tokens.read(token)
        assert claims == AccessClaims(
            subject="42",
            session_id="a-b-c",
            token_id=claims.token_id,
            issued_at=clock(),
            expires_at=clock() + timedelta(minutes=15),
            authenticated_at=clock() - timedelta(hours=1),
            methods=("pwd", "otp"),
            extra={"role": "admin", "scopes": ["a", {"b": None}], "naïve 🐢": 1.5},
        )
        assert expires_at == claims.expires_at
        assert opened(token, 0) == {"alg": algorithm, "typ": "at+jwt", "kid": key.kid}
        assert opened(token, 1)["iss"] == "us"
        assert opened(token, 1)["aud"] == "them"

    def test_session_without_a_time(self, clock: FakeClock) -> None:
        """A session without a time of authentication yields neither `auth_time` nor `amr`."""
        tokens = AccessTokens(CONFIG, clock)
        token, _ = tokens.issue(
            subject="42", session_id="a", session_ends=clock() + timedelta(days=1), extra={}
        )
        claims = tokens.read(token)
        assert (claims.authenticated_at, claims.methods) == (None, ())
        assert not {"auth_time", "amr"} & opened(token, 1).keys()

    @pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
    def test_other_service(self, algorithm: Algorithm, clock: FakeClock) -> None:
        """A service that knows only the public key reads tokens and can sign none."""
        ours = AccessTokens(
            AuthConfig(secret=[SigningKey(pem(algorithm), algorithm=algorithm)]), clock
        )
        signer = SigningKey(
            pem("other EdDSA") if algorithm == "EdDSA" else pem(algorithm),
            algorithm=algorithm,
            kid="signs-nothing-here",
        )
        half = SigningKey(public_pem(algorithm), algorithm=algorithm)
        theirs = AccessTokens(AuthConfig(secret=[signer, half]), clock)
        assert theirs.read(issue(ours, clock)).subject == "42"

    def test_every_token_is_unique(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """Two tokens of one session at one time differ in their jti, which is random."""
        ids = {tokens.read(issue(tokens, clock)).token_id for _ in range(1000)}
        assert len(ids) == 1000
        assert {len(token_id) for token_id in ids} == {22}

    def test_not_after_the_session(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """An access token ends with its session if that is sooner."""
        ends = clock() + timedelta(minutes=5, microseconds=700)
        token, expires_at = tokens.issue(
            subject="42", session_id="sid", session_ends=ends, extra={}
        )
        assert expires_at == clock() + timedelta(minutes=5)
        assert tokens.read(token).expires_at == expires_at

    def test_expiry(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """A token is valid until the leeway after its expiry, and then expired, not invalid."""
        token = issue(tokens, clock)
        clock.advance(timedelta(minutes=15, seconds=10) - timedelta(microseconds=1))
        assert tokens.read(token)
        clock.advance(timedelta(microseconds=1))
        with pytest.raises(TokenExpiredError):
            tokens.read(token)
        assert tokens.read(token, even_if_expired=True).subject == "42"
        clock.advance(timedelta(days=10_000))
        assert tokens.read(token, even_if_expired=True).subject == "42"

    @pytest.mark.parametrize("even_if_expired", [True, False])
    def test_expired_and_forged(
        self, tokens: AccessTokens, clock: FakeClock, even_if_expired: bool
    ) -> None:
        """A forged token is refused as invalid, not as expired."""
        with pytest.raises(TokenInvalidError):
            tokens.read(
                signed(HEADER, CLAIMS | {"exp": 1}, key="x" * 40), even_if_expired=even_if_expired
            )

    @pytest.mark.parametrize("claim", ["iat", "nbf"])
    def test_not_yet(self, tokens: AccessTokens, claim: str) -> None:
        """A token from the future is valid within the leeway and invalid beyond it."""
        assert tokens.read(signed(HEADER, CLAIMS | {claim: NOW + 10}))
        with pytest.raises(TokenInvalidError):
            tokens.read(signed(HEADER, CLAIMS | {claim: NOW + 11}))

    @pytest.mark.parametrize("seconds", [0, 60])
    def test_leeway_is_a_setting(self, clock: FakeClock, seconds: int) -> None:
        """The configured leeway applies, even if it is zero."""
        leeway = timedelta(seconds=seconds)
        tokens = AccessTokens(AuthConfig(secret=SECRET, leeway=leeway), clock)
        token = issue(tokens, clock)
        clock.advance(timedelta(minutes=15) + leeway - timedelta(seconds=1))
        assert tokens.read(token)
        clock.advance(timedelta(seconds=1))
        with pytest.raises(TokenExpiredError):
            tokens.read(token)

    def test_extra_is_read_only(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """The claims of the host are read without the reserved ones, and cannot be changed."""
        claims = tokens.read(issue(tokens, clock, role="admin"))
        assert dict(claims.extra) == {"role": "admin"}
        with pytest.raises(TypeError):
            claims.extra["role"] = "root"  # type: ignore[index]


def circular() -> object:
    ring: list[object] = []
    ring.append(ring)
    return ring


def nested(depth: int) -> object:
    value: object = None
    for _ in range(depth):
        value = [value]
    return value


NOT_JSON: dict[str, object] = {
    "object": object(),
    "set": {1, 2},
    "bytes": b"bytes",
    "time": LONG_AGO,
    "no number": float("nan"),
    "infinity": float("inf"),
    "deep infinity": [1, {"deeper": -float("inf")}],
    "key of bytes": {b"key": 1},
    "circular": circular(),
    "too deep": nested(100_000),
}


class TestExtraClaims:
    @pytest.mark.parametrize(
        "name",
        [
            *("iss", "aud", "sub", "sid", "jti", "iat", "exp", "nbf", "typ", "client_id"),
            *("auth_time", "amr"),
        ],
    )
    def test_reserved(self, tokens: AccessTokens, clock: FakeClock, name: str) -> None:
        """A reserved claim is refused by name."""
        with pytest.raises(ValueError, match=rf"cannot be given: {name}$"):
            issue(tokens, clock, **{name: "x", "harmless": 1})

    @pytest.mark.parametrize("what", NOT_JSON)
    def test_not_json(self, tokens: AccessTokens, clock: FakeClock, what: str) -> None:
        """A value that other services could not read as JSON is refused before anything is signed."""
        with pytest.raises(ValueError, match="must be JSON"):
            issue(tokens, clock, claim=NOT_JSON[what])

    def test_too_large(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """Claims may fill at most half a token, which can still be read."""
        most = MAX_TOKEN_LENGTH // 2 - len('{"claim":""}')
        token = issue(tokens, clock, claim="x" * most)
        assert len(token) <= MAX_TOKEN_LENGTH
        assert tokens.read(token).extra["claim"] == "x" * most
        with pytest.raises(ValueError, match="too large"):
            issue(tokens, clock, claim="x" * (most + 1))


class TestLongestTokens:
    """What is issued can be read: everything that ends in a token is bounded."""

    @pytest.mark.parametrize("text", ["x" * 255, "é" * 127, "😀" * 63, '"' * 255, "\x01" * 255])
    @pytest.mark.parametrize("algorithm", ["HS256", "HS512", "EdDSA", "ES256", "RS256"])
    def test_settings_at_their_limits(self, clock: FakeClock, algorithm: Any, text: str) -> None:
        """With the longest issuer, audience and kid the largest claims still make a token to read."""
        key = SigningKey(key_for(algorithm), "k" * 64, algorithm)
        config = AuthConfig(secret=[key], issuer=text, audience=text)
        tokens = AccessTokens(config, clock, "t" * 128)
        for claim in ("x", "é", '"'):
            fits = partial(self.fits, tokens, claim)
            most = bisect_left(range(MAX_TOKEN_LENGTH), True, key=lambda n: not fits(n)) - 1
            assert most > 100
            token, _ = tokens.issue(
                subject="s" * 255,
                session_id=str(uuid4()),
                session_ends=clock() + timedelta(days=1),
                authenticated_at=clock(),
                methods=("pwd", "otp"),
                extra={"claim": claim * most},
            )
            assert tokens.read(token).extra["claim"] == claim * most

    @staticmethod
    def fits(tokens: AccessTokens, claim: str, count: int) -> bool:
        """Return whether a claim of so many characters is accepted."""
        try:
            tokens.check_extra({"claim": claim * count})
        except ValueError:
            return False
        return True

    def test_settings_that_fill_a_token(
        self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Settings that leave no room for claims are refused at construction."""
        monkeypatch.setattr(SigningKey, "signature_size", 16384 // 8)  # which takes minutes to make
        AccessTokens(AuthConfig(secret=SECRET, issuer="x" * 255, audience="x" * 255), clock)
        config = AuthConfig(secret=SECRET, issuer="\x01" * 255, audience="\x01" * 255)
        with pytest.raises(ConfigurationError, match="shorter issuer and audience, in ASCII"):
            AccessTokens(config, clock)

    def test_claims_say_how_much_room_there_is(self, clock: FakeClock) -> None:
        """A long issuer leaves less for claims, and the error names both numbers."""
        tokens = AccessTokens(AuthConfig(secret=SECRET, issuer="\x01" * 255), clock)
        with pytest.raises(
            ValueError, match=r"4012 characters of JSON.* there is room for 3\d\d\d"
        ):
            issue(tokens, clock, claim="x" * 4000)

    def test_a_longer_spelling_of_the_key(self, clock: FakeClock) -> None:
        """A primary key that JSON escapes takes its room from the claims."""
        tokens = AccessTokens(CONFIG, clock, longest_subject=64)
        tokens.check_extra({"claim": "x" * 4000}, "k" * 64)
        with pytest.raises(ValueError, match="too large"):
            tokens.check_extra({"claim": "x" * 4000}, "😀" * 255)

    def test_depth(self, clock: FakeClock, tokens: AccessTokens) -> None:
        """Claims are nested no deeper than every reader of JSON can follow."""
        assert tokens.read(issue(tokens, clock, claim=nested(49))).extra["claim"]
        with pytest.raises(ValueError, match="nested at most 50"):
            issue(tokens, clock, claim=nested(50))


class TestRotation:
    def test_new_key_first(self, clock: FakeClock) -> None:
        """The first key signs, all keys verify, and a dropped key no longer verifies."""
        k1, k2 = SigningKey(SECRET, kid="k1"), SigningKey(SECRET[::-1], kid="k2")
        first = AccessTokens(AuthConfig(secret=[k1]), clock)
        both = AccessTokens(AuthConfig(secret=[k2, k1]), clock)
        second = AccessTokens(AuthConfig(secret=[k2]), clock)
        old, new = issue(first, clock), issue(both, clock)
        assert opened(old, 0)["kid"] == "k1"
        assert opened(new, 0)["kid"] == "k2"
        assert both.read(old).subject == both.read(new).subject == "42"
        assert second.read(new).subject == "42"
        for tokens, token in ((second, old), (first, new)):
            with pytest.raises(TokenInvalidError):
                tokens.read(token)

    def test_from_a_plain_secret(self, clock: FakeClock) -> None:
        """A secret that was configured as a string verifies when it is listed as an old key."""
        old = issue(AccessTokens(AuthConfig(secret=SECRET), clock), clock)
        keys = [SigningKey(secrets.token_urlsafe(48), kid="2026-11"), SigningKey(SECRET)]
        assert AccessTokens(AuthConfig(secret=keys), clock).read(old).subject == "42"

    def test_to_a_longer_hash(self, clock: FakeClock) -> None:
        """Within a family the algorithm can change, and each key verifies only its own."""
        old = SigningKey(SECRET, kid="old")
        new = SigningKey(SECRET * 2, kid="new", algorithm="HS512")
        tokens = AccessTokens(AuthConfig(secret=[new, old]), clock)
        assert tokens.read(issue(AccessTokens(AuthConfig(secret=[old]), clock), clock))
        assert opened(issue(tokens, clock), 0)["alg"] == "HS512"
        for algorithm, key, kid in (("HS256", SECRET * 2, "new"), ("HS512", SECRET, "old")):
            header = {"alg": algorithm, "typ": "at+jwt", "kid": kid}
            with pytest.raises(TokenInvalidError):
                tokens.read(signed(header, CLAIMS, key=key, algorithm=algorithm))

    def test_kid_of_the_other_key(self, clock: FakeClock) -> None:
        """A token is verified with the key that it names and with no other."""
        k1, k2 = SigningKey(SECRET, kid="k1"), SigningKey(SECRET[::-1], kid="k2")
        tokens = AccessTokens(AuthConfig(secret=[k1, k2]), clock)
        with pytest.raises(TokenInvalidError):
            tokens.read(signed(HEADER | {"kid": "k2"}, CLAIMS, key=SECRET))


def dropped(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


FORGED_HEADERS: dict[str, object] = {
    **{
        f"alg {algorithm!r}": HEADER | {"alg": algorithm}
        for algorithm in (
            *("none", "None", "NoNe", "NONE", "", None, ["HS256"], {"HS256": 1}, 0, 1, True),
            *("hs256", "HS256 ", "HS384", "HS512", "RS256", "ES256", "EdDSA", "PS256", "dir"),
        )
    },
    "no alg": dropped(HEADER, "alg"),
    **{
        f"typ {typ!r}": HEADER | {"typ": typ}
        for typ in (
            *("JWT", "jwt", "at+JWT", "AT+JWT", "rt+jwt", "secevent+jwt", "at", "", None, 1, True),
            *(["at+jwt"], {"at+jwt": 1}, "at+jwt ", "application/at+JWT", "application/jwt"),
        )
    },
    "no typ": dropped(HEADER, "typ"),
    **{
        f"kid {str(kid)[:20]!r}": HEADER | {"kid": kid}
        for kid in (
            *("", None, 1, 0, True, [KID], {KID: KID}, KID + " ", KID[:-1], KID.swapcase()),
            *("../../dev/null", "x' OR '1'='1", "k" * 5000),
        )
    },
    "no kid": dropped(HEADER, "kid"),
    "crit unknown": HEADER | {"crit": ["x"], "x": 1},
    "crit empty": HEADER | {"crit": []},
    "crit no list": HEADER | {"crit": "b64"},
    "b64 false": HEADER | {"b64": False, "crit": ["b64"]},
    "b64 false quietly": HEADER | {"b64": False},
    **{
        f"{name} {value!r}": HEADER | {name: value}
        for name in ("enc", "zip")
        for value in ("A256GCM", "DEF", "", None)
    },
    "a list": [HEADER],
    "a string": "HS256",
    "null": b"null",
    "no JSON": b"{",
    "empty": b"",
    "UTF-16": json.dumps(HEADER).encode("utf-16"),
    "UTF-16 without a mark": json.dumps(HEADER).encode("utf-16-le"),
    "UTF-32": json.dumps(HEADER).encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(HEADER).encode(),
    "bad UTF-8": b'{"alg": "HS256", "x": "\xff"}',
    "deeply nested": b'{"x":' + b"[" * 2500 + b"]" * 2500 + b"}",
}

FORGED_CLAIMS: dict[str, object] = {
    **{f"no {name}": dropped(CLAIMS, name) for name in CLAIMS},
    **{f"null {name}": CLAIMS | {name: None} for name in CLAIMS},
    **{
        f"{name} {value!r}": CLAIMS | {name: value}
        for name in ("sub", "sid", "jti")
        for value in (42, 0, True, "", ["42"], {"42": 42}, 1.5)
    },
    **{
        f"{name} {str(value)[:20]!r}": CLAIMS | {name: value}
        for name in ("iat", "exp", "nbf")
        for value in (
            *(str(NOW), f"{NOW}.0", float(NOW), True, False, [NOW], {"": NOW}, -1, 1 << 40),
            *(10**15, 10**400, float("nan"), float("inf"), -float("inf"), "", "now"),
        )
    },
    "nbf null": CLAIMS | {"nbf": None},
    "auth_time text": CLAIMS | {"auth_time": str(NOW)},
    "auth_time too late": CLAIMS | {"auth_time": 10**15},
    "amr text": CLAIMS | {"amr": "pwd"},
    "amr numbers": CLAIMS | {"amr": ["pwd", 1]},
    **{
        f"iss {issuer!r}": CLAIMS | {"iss": issuer}
        for issuer in (
            *("tortoise", "tortoise-auth-2", "tortoise-auth ", "Tortoise-Auth", "", 1),
            *(["tortoise-auth"], {"tortoise-auth": 1}),
        )
    },
    **{
        f"aud {audience!r}": CLAIMS | {"aud": audience}
        for audience in (
            *("tortoise", "tortoise-auth ", "Tortoise-Auth", "", 1, True, [], ["them"], [1]),
            *(["tortoise-auth", 1], {"tortoise-auth": 1}, [["tortoise-auth"]]),
        )
    },
    "a list": [CLAIMS],
    "a string": "CLAIMS",
    "a number": 1,
    "null": b"null",
    "empty": b"",
    "no JSON": b"{}{}",
    "UTF-16": json.dumps(CLAIMS).encode("utf-16"),
    "UTF-16 without a mark": json.dumps(CLAIMS).encode("utf-16-be"),
    "UTF-32": json.dumps(CLAIMS).encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(CLAIMS).encode(),
    "bad UTF-8": json.dumps(CLAIMS).encode()[:-1] + b', "x": "\xff"}',
    "deeply nested": b'{"x":' + b"[" * 2500 + b"]" * 2500 + b"}",
    "thousands of digits": json.dumps(CLAIMS).encode()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
}


def rsa_jwk(key: PrivateKeyTypes) -> bytes:
    public_key = key.public_key()
    assert isinstance(public_key, rsa.RSAPublicKey)
    return jwt.algorithms.RSAAlgorithm.to_jwk(public_key).encode()


PUBLIC_FORMS: dict[str, Callable[[], bytes]] = {
    "PEM": lambda: public("RS256"),
    "PEM without its last line break": lambda: public("RS256").strip(),
    "PEM with CRLF": lambda: public("RS256").replace(b"\n", b"\r\n"),
    "PEM with a byte order mark": lambda: b"\xef\xbb\xbf" + public("RS256"),
    "DER": lambda: public("RS256", Encoding.DER),
    "JWK": lambda: rsa_jwk(private_key("RS256")),
    "JWKS": lambda: b'{"keys": [%s]}' % rsa_jwk(private_key("RS256")),
    "nothing": lambda: b"",
}


class TestForgery:
    def test_a_true_token(self, tokens: AccessTokens) -> None:
        """The genuine token from which these tests make forgeries is accepted."""
        assert tokens.read(signed(HEADER, CLAIMS)).subject == "42"
        assert tokens.read(signed(HEADER | {"typ": "application/at+jwt"}, CLAIMS)).subject == "42"

    @pytest.mark.parametrize("what", FORGED_HEADERS)
    def test_header(self, tokens: AccessTokens, what: str) -> None:
        """A header that is not exactly ours is refused, though the signature is valid."""
        header = FORGED_HEADERS[what]
        text = f"{part(header)}.{part(CLAIMS)}."
        forgeries = [signed(header, CLAIMS), text, text + "AA", text[:-1]]
        algorithm = header.get("alg") if isinstance(header, dict) else None
        if isinstance(algorithm, str) and algorithm in SHA:
            forgeries.append(signed(header, CLAIMS, algorithm=algorithm))
        for forged in forgeries:
            with pytest.raises(TokenInvalidError):
                tokens.read(forged)

    @pytest.mark.parametrize("what", FORGED_CLAIMS)
    @pytest.mark.parametrize("even_if_expired", [True, False])
    def test_claims(self, tokens: AccessTokens, what: str, even_if_expired: bool) -> None:
        """Claims that are missing, of the wrong type or for others are refused, though signed."""
        with pytest.raises(TokenInvalidError):
            tokens.read(signed(HEADER, FORGED_CLAIMS[what]), even_if_expired=even_if_expired)

    def test_audiences(self, tokens: AccessTokens) -> None:
        """A list of audiences that names us is for us, too (RFC 7519, 4.1.3)."""
        token = signed(HEADER, CLAIMS | {"aud": ["them", "tortoise-auth"]})
        assert tokens.read(token).subject == "42"

    def test_duplicate_claim(self, tokens: AccessTokens) -> None:
        """The last value of a duplicate claim counts (RFC 7519, 4)."""
        twice = b'{"sub": "1", ' + json.dumps(CLAIMS).encode()[1:]
        assert tokens.read(signed(HEADER, twice)).subject == "42"

    @pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
    @pytest.mark.parametrize("form", PUBLIC_FORMS)
    def test_confusion(self, clock: FakeClock, algorithm: str, form: str) -> None:
        """The public key is no HMAC secret, in whatever form an attacker uses it."""
        ours = SigningKey(pem("RS256"), algorithm="RS256")
        tokens = AccessTokens(AuthConfig(secret=[ours]), clock)
        assert tokens.read(issue(tokens, clock))
        header = {"alg": algorithm, "typ": "at+jwt", "kid": ours.kid}
        with pytest.raises(TokenInvalidError):
            tokens.read(signed(header, CLAIMS, key=PUBLIC_FORMS[form](), algorithm=algorithm))

    @pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c", "x5t"])
    def test_keys_in_the_header(
        self, tokens: AccessTokens, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """A key that comes with the token, or an address of one, is never used nor fetched."""

        def no_network(*args: object, **kwargs: object) -> None:
            raise AssertionError("the network was asked")

        for function in ("socket", "create_connection", "getaddrinfo"):
            monkeypatch.setattr(socket, function, no_network)
        evil = b"the attacker's own secret, long enough"
        values: dict[str, object] = {
            "jwk": {"kty": "oct", "k": part(evil), "alg": "HS256", "kid": KID},
            "jku": "http://evil.example/jwks.json",
            "x5u": "http://evil.example/certificate.pem",
            "x5c": [base64.b64encode(public("RS256", Encoding.DER)).decode()],
            "x5t": "x",
        }
        header = HEADER | {name: values[name]}
        for forged in (
            signed(header, CLAIMS, key=evil),
            signed(dropped(header, "kid"), CLAIMS, key=evil),
            signed(header | {"kid": "evil"}, CLAIMS, key=evil),
        ):
            with pytest.raises(TokenInvalidError):
                tokens.read(forged)
        assert tokens.read(signed(header, CLAIMS)).subject == "42"

    def test_rsa_key_in_the_header(self, clock: FakeClock) -> None:
        """An RSA key in the header does not replace the configured one either."""
        ours = SigningKey(pem("RS256"), algorithm="RS256")
        tokens = AccessTokens(AuthConfig(secret=[ours]), clock)
        evil = rsa.generate_private_key(65537, 2048)
        jwk = json.loads(rsa_jwk(evil))
        header = {"alg": "RS256", "typ": "at+jwt", "kid": ours.kid, "jwk": jwk}
        text = f"{part(header)}.{part(CLAIMS)}"
        signature = evil.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
        with pytest.raises(TokenInvalidError):
            tokens.read(f"{text}.{part(signature)}")

    def test_other_secret(self, tokens: AccessTokens) -> None:
        """A signature with another secret, or with the hash of ours, is refused."""
        for key in (SECRET[:-1], SECRET + "=", SECRET.swapcase(), KID, b"", b"\0" * 32):
            with pytest.raises(TokenInvalidError):
                tokens.read(signed(HEADER, CLAIMS, key=key))

    def test_swapped_payload(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """Parts of two genuine tokens do not make a third."""
        one, other = issue(tokens, clock, user="a").split("."), issue(tokens, clock).split(".")
        for mixed in (
            [one[0], other[1], one[2]],
            [one[0], one[1], other[2]],
            [one[1], one[0], one[2]],
            [one[0], part(opened(".".join(one), 1) | {"sub": "1"}), one[2]],
        ):
            with pytest.raises(TokenInvalidError):
                tokens.read(".".join(mixed))

    @pytest.mark.parametrize("algorithm", get_args(Algorithm))
    def test_signature(self, algorithm: Algorithm, clock: FakeClock) -> None:
        """A truncated signature, or one with any bit flipped, is refused."""
        key = SigningKey(key_for(algorithm), algorithm=algorithm)
        tokens = AccessTokens(AuthConfig(secret=[key]), clock)
        head, payload, signature = issue(tokens, clock).split(".")
        raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
        damaged = ["", "AA", signature[:-1], signature[1:], signature + "A", signature * 2]
        damaged += [part(b""), part(bytes(len(raw))), part(raw[::-1]), part(raw + b"\0")]
        damaged += [
            part(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
            for at in range(0, len(raw), max(1, len(raw) // 32))
            for bit in (0, 7)
        ]
        alphabet = string.ascii_letters + string.digits + "-_"
        damaged += [signature[:-1] + last for last in alphabet if last != signature[-1]]
        for text in damaged:
            with pytest.raises(TokenInvalidError):
                tokens.read(f"{head}.{payload}.{text}")

    def test_another_form(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """A token has one spelling; paddings, spaces and other alphabets are refused."""
        token = issue(tokens, clock)
        head, payload, signature = token.split(".")
        forms = [
            *(token + tail for tail in ("=", "==", ".", "..", " ", "\n", "\0", "\ud800", "é", "%")),
            *(head_ + token for head_ in (" ", ".", "\0", "Bearer ", "\ufeff", "=")),
            *(f"{head}={dot}{payload}{dot}{signature}" for dot in (".", "=.")),
            f"{head}.{payload}=.{signature}",
            f"{head}..{signature}",
            f".{payload}.{signature}",
            f"{head}.{payload}",
            f"{head}.{payload}.{signature}.{signature}",
            f"{head}.{payload}.{signature}.x.y",
            f"{head}.{payload}\0.{signature}",
            f"{head}.{payload}\ud800.{signature}",
            token.replace(".", " "),
            token.swapcase(),
            f"{head}.{payload}.{signature[:10]}+/{signature[12:]}",
            json.dumps({"protected": head, "payload": payload, "signature": signature}),
            *("", ".", "..", "...", "a.b.c", "null", "{}", "." * 1000),
        ]
        for text in forms:
            with pytest.raises(TokenInvalidError):
                tokens.read(text)

    @pytest.mark.parametrize(
        "value", [None, 1, 1.5, True, b"a.b.c", ["a.b.c"], {"a": 1}, object(), bytearray(b"a.b.c")]
    )
    def test_no_text(self, tokens: AccessTokens, value: Any) -> None:
        """A value that is not text is no token."""
        with pytest.raises(TokenInvalidError):
            tokens.read(value)

    def test_genuine_as_bytes(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """A genuine token as bytes is refused."""
        with pytest.raises(TokenInvalidError):
            tokens.read(issue(tokens, clock).encode())  # type: ignore[arg-type]

    def test_longest(self, tokens: AccessTokens, monkeypatch: pytest.MonkeyPatch) -> None:
        """8192 characters are read, and anything longer is refused before it is decoded."""
        by_length = {
            len(token): token
            for size in range(5800, 5950)
            for filler in range(3)
            for token in [signed(HEADER | {"f": "x" * filler}, CLAIMS | {"x": "x" * size})]
        }
        assert tokens.read(by_length[MAX_TOKEN_LENGTH]).subject == "42"

        def undecoded(*args: object, **kwargs: object) -> None:
            raise AssertionError("it was decoded")

        for function in ("b64decode", "urlsafe_b64decode"):
            monkeypatch.setattr(base64, function, undecoded)
        for token in (
            by_length[MAX_TOKEN_LENGTH + 1],
            "a" * 10_000_000,
            "a.b." + "c" * 1_000_000,
            "." * 1_000_000,
        ):
            with pytest.raises(TokenInvalidError):
                tokens.read(token)

    def test_refresh_token(self, tokens: AccessTokens, clock: FakeClock) -> None:
        """Neither kind of token is accepted as the other."""
        with pytest.raises(TokenInvalidError):
            tokens.read(RefreshToken.new().text)
        with pytest.raises(TokenInvalidError):
            RefreshToken.parse(issue(tokens, clock))
        assert RefreshToken.looks_like(RefreshToken.new().text)
        assert not RefreshToken.looks_like(issue(tokens, clock))

    def test_error_reveals_nothing(self, tokens: AccessTokens) -> None:
        """The error reveals neither what was wrong nor what was presented."""
        messages = set()
        for forged in (*map(str, FORGED_CLAIMS), signed(HEADER, {}), signed({}, CLAIMS)):
            with pytest.raises(TokenInvalidError) as refused:
                tokens.read(forged)
            messages.add((str(refused.value), refused.value.__cause__))
        assert messages == {("The token is not valid", None)}


FUZZED = AccessTokens(CONFIG, FakeClock())
GENUINE = issue(FUZZED, FakeClock(), role="admin")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@pytest.mark.slow
class TestFuzz:
    @given(data=st.data())
    @settings(max_examples=3000, deadline=None)
    def test_damaged(self, data: st.DataObject) -> None:
        """No change to a genuine token, however small, leaves a valid one."""
        text = GENUINE
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(text)))
            end = data.draw(st.integers(start, min(start + 3, len(text))))
            put_in = data.draw(
                st.text("ABab01-_.=+/ \0", max_size=3) | st.text(max_size=2) | st.just(text[:start])
            )
            text = text[:start] + put_in + text[end:]
        if text == GENUINE:
            assert FUZZED.read(text).subject == "42"
        else:
            with pytest.raises(TokenInvalidError):
                FUZZED.read(text)

    @given(anything=st.text() | st.binary() | JSON | st.from_regex(r"[\w-]+\.[\w-]+\.[\w-]+"))
    @settings(max_examples=400, deadline=None)
    def test_anything(self, anything: Any) -> None:
        """Any other value raises the usual error."""
        for read in (FUZZED.read, RefreshToken.parse):
            with pytest.raises(TokenInvalidError):
                read(anything)

    @given(header=st.dictionaries(st.sampled_from([*HEADER, "crit", "b64", "jwk", "zip"]), JSON))
    @settings(max_examples=400, deadline=None)
    def test_signed_header(self, header: dict[str, Any]) -> None:
        """Whatever else the header holds, a signed token is read or refused."""
        for extended in (header, HEADER | header, header | HEADER):
            read_or_refused(signed(extended, CLAIMS))

    @given(claims=st.dictionaries(st.sampled_from([*CLAIMS, "nbf", "role"]), JSON), more=JSON)
    @settings(max_examples=400, deadline=None)
    def test_signed_claims(self, claims: dict[str, Any], more: Any) -> None:
        """Whatever the payload holds, a signed token is read, expired or refused."""
        for payload in (claims, CLAIMS | claims, more):
            read_or_refused(signed(HEADER, payload))

    @given(payload=st.binary(max_size=200))
    @settings(max_examples=400, deadline=None)
    def test_signed_bytes(self, payload: bytes) -> None:
        """A payload that is no JSON raises the usual error."""
        read_or_refused(signed(HEADER, payload))


def read_or_refused(token: str) -> None:
    try:
        claims = FUZZED.read(token)
    except (TokenInvalidError, TokenExpiredError):
        return
    assert claims.subject
    assert claims.session_id
    assert claims.issued_at.tzinfo is UTC
    assert claims.expires_at + CONFIG.leeway > FakeClock()()


KEY = bytes(range(32))


class TestRefreshTokens:
    def test_round_trip(self) -> None:
        """The token that a client presents is the one that was made."""
        token = RefreshToken.new()
        assert RefreshToken.parse(token.text) == token
        assert len(token.text) == 75
        assert token.text.startswith("tart_")

    def test_next(self) -> None:
        """Each next token is of the same family and otherwise new."""
        token = RefreshToken.new()
        line = [token]
        for _ in range(50):
            line.append(line[-1].next(KEY))
        assert {each.family_hash for each in line} == {token.family_hash}
        assert len({each.hash for each in line}) == len({each.text for each in line}) == 51
        assert all(RefreshToken.parse(each.text) == each for each in line)

    def test_next_is_derived(self) -> None:
        """The next token follows from the whole token and the key, and from nothing less."""
        token, other = RefreshToken.new(), RefreshToken.new()
        assert token.next(KEY) == RefreshToken.parse(token.text).next(KEY)
        others = [other.next(KEY), token.next(bytes(32)), token.next(KEY).next(KEY)]
        assert len({each.hash for each in [token, token.next(KEY), *others]}) == 5

    def test_unique(self) -> None:
        """No two tokens share a part, and no hash contains a part of its token."""
        tokens = [RefreshToken.new() for _ in range(10_000)]
        for attribute in ("text", "hash", "family_hash"):
            assert len({getattr(token, attribute) for token in tokens}) == 10_000
        assert not {token.hash for token in tokens} & {token.family_hash for token in tokens}

    def test_hashes(self) -> None:
        """The stored values are SHA-256 hashes of the whole token and of its family."""
        token = RefreshToken.new()
        raw = base64.urlsafe_b64decode(token.text.removeprefix("tart_") + "==")
        assert len(raw) == 16 + 32 + 4
        assert token.hash == hashlib.sha256(raw).hexdigest()
        assert token.family_hash == hashlib.sha256(raw[:16]).hexdigest()

    def test_damaged_in_transit(self) -> None:
        """Any changed character is damage, not reuse."""
        text = RefreshToken.new().text
        alphabet = string.ascii_letters + string.digits + "-_+/=. \0é"
        for at, right in enumerate(text):
            for character in alphabet:
                if character != right:
                    with pytest.raises(TokenInvalidError):
                        RefreshToken.parse(text[:at] + character + text[at + 1 :])

    def test_bits(self) -> None:
        """Any flipped bit is damage."""
        raw = base64.urlsafe_b64decode(RefreshToken.new().text.removeprefix("tart_") + "==")
        for bit in range(len(raw) * 8):
            flipped = (int.from_bytes(raw, "big") ^ 1 << bit).to_bytes(len(raw), "big")
            with pytest.raises(TokenInvalidError):
                RefreshToken.parse("tart_" + part(flipped))

    def test_second_spelling(self) -> None:
        """Another spelling of the same bytes is refused, so that a token has only one."""
        text = RefreshToken.new().text
        last = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
        value = last.index(text[-1])
        spellings = [text[:-1] + last[value ^ spare] for spare in (1, 2, 3)]
        spellings += [text + tail for tail in ("=", "==", " ", "\n", "A", "\0")]
        spellings += [" " + text, text.upper(), text.replace("tart_", "TART_"), "tart_" + text]
        with_signs = next(
            each.text
            for each in iter(RefreshToken.new, None)
            if "-" in each.text or "_" in each.text[5:]
        )
        spellings.append("tart_" + with_signs[5:].replace("-", "+").replace("_", "/"))
        for spelling in spellings:
            with pytest.raises(TokenInvalidError):
                RefreshToken.parse(spelling)

    @pytest.mark.parametrize(
        "unit", [*"A=.+/-_ 0\0é\ud800", "AA", "A" * 100_000], ids=lambda unit: ascii(unit)[:9]
    )
    def test_garbage(self, unit: str) -> None:
        """Text of the right and of the wrong length that was never a token is refused."""
        for size in (0, 1, 69, 70, 71, 75):
            for text in ("tart_" + unit * size, unit * size):
                with pytest.raises(TokenInvalidError):
                    RefreshToken.parse(text)

    @pytest.mark.parametrize("value", [None, 1, True, b"x", ["x"], {"x": 1}, object()])
    def test_no_text(self, value: Any) -> None:
        """A value that is not text is no token, and a genuine token as bytes is none either."""
        with pytest.raises(TokenInvalidError):
            RefreshToken.parse(value)
        with pytest.raises(TokenInvalidError):
            RefreshToken.parse(RefreshToken.new().text.encode())  # type: ignore[arg-type]

    @pytest.mark.parametrize("size", [0, 4, 16, 47, 49, 64, 100_000])
    def test_other_sizes(self, size: int) -> None:
        """A token of another size is refused, though its checksum is right."""
        body = secrets.token_bytes(size)
        with pytest.raises(TokenInvalidError):
            RefreshToken.parse("tart_" + part(body + hashlib.sha256(body).digest()[:4]))

    def test_repr(self) -> None:
        """The representation shows neither the token nor its hashes."""
        assert repr(RefreshToken.new()) == str(RefreshToken.new()) == "RefreshToken()"

    def test_frozen(self) -> None:
        """A token is immutable."""
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            RefreshToken.new().text = "x"  # type: ignore[misc]
