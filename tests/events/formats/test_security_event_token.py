"""Security Event Tokens: which events have one, its claims, and the keys that sign and verify it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, get_args

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given, settings

from tests.support.accounts import SECRET
from tests.support.app import User
from tests.support.keys import pem
from tests.support.standards import (
    CANARY,
    EVENT_ID,
    FORBIDDEN,
    LIBRARY,
    OCCURRED,
    SECONDS,
    as_sent,
    hostile_events,
    sample,
    standard,
    texts,
    variants,
    violations,
)
from tortoise_auth import AuthConfig, RequestContext, SigningKey
from tortoise_auth.events import (
    AccountUnlocked,
    Event,
    NamedEvent,
    PasswordChanged,
    RefreshTokenReused,
    SessionEvicted,
    SessionRevoked,
    UserActivated,
    UserDeactivated,
    UserLogin,
    UserLoginFailed,
    UserLogout,
)
from tortoise_auth.events.catalog import Actor
from tortoise_auth.events.formats import ecs, ocsf, security_event_token, set_claims
from tortoise_auth.exceptions import ConfigurationError, TokenInvalidError
from tortoise_auth.keys import Algorithm
from tortoise_auth.sessions.access_tokens import AccessTokens
from tortoise_auth.testing import FakeClock

FILE = "set-rfc8417.json"
ISSUER, AUDIENCE = "https://id.example.com/", "https://shop.example.com/caep"
CAEP = "https://schemas.openid.net/secevent/caep/event-type/"
RISC = "https://schemas.openid.net/secevent/risc/event-type/"

EXPECTED: dict[type[Event], str] = {
    UserLogin: CAEP + "session-established",
    UserLogout: CAEP + "session-revoked",
    SessionEvicted: CAEP + "session-revoked",
    SessionRevoked: CAEP + "session-revoked",
    RefreshTokenReused: CAEP + "session-revoked",
    PasswordChanged: CAEP + "credential-change",
    UserDeactivated: RISC + "account-disabled",
    UserActivated: RISC + "account-enabled",
    AccountUnlocked: RISC + "account-enabled",
}
"""The event type of those that have one."""

WITH_TOKEN = list(EXPECTED)
ASYMMETRIC: list[Algorithm] = ["RS256", "ES256", "EdDSA"]


@dataclass(frozen=True, kw_only=True)
class ParcelSentForSet(Event):
    """An event of a host."""


def key(algorithm: Algorithm = "RS256") -> SigningKey:
    return SigningKey(pem(algorithm), kid="set-1", algorithm=algorithm)


def claims(event: Event, **options: Any) -> dict[str, Any]:
    result = set_claims(event, **{"issuer": ISSUER, "audience": AUDIENCE, **options})
    assert result is not None
    return result


def token(event: Event, signing: SigningKey, **options: Any) -> str:
    text = security_event_token(event, signing, issuer=ISSUER, audience=AUDIENCE, **options)
    assert text is not None
    return text


def payload(event: Event, **options: Any) -> dict[str, Any]:
    """Return the payload of the one event of a token."""
    (result,) = claims(event, **options)["events"].values()
    return dict(result)


def received(text: str, algorithm: Algorithm = "RS256") -> dict[str, Any]:
    """Return the claims of a token as a receiver with the public key accepts them."""
    return jwt.decode(
        text,
        pem(algorithm, public=True),
        algorithms=[algorithm],
        audience=AUDIENCE,
        issuer=ISSUER,
        options={"require": ["iss", "iat", "jti", "aud", "events"], "verify_iat": False},
    )


class TestEveryEvent:
    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_event_type(self, kind: type[Event]) -> None:
        """Each event has the event type of the table, or no token."""
        result = set_claims(sample(kind), issuer=ISSUER, audience=AUDIENCE)
        signed = security_event_token(sample(kind), key(), issuer=ISSUER, audience=AUDIENCE)
        if kind in EXPECTED:
            assert result is not None
            assert list(result["events"]) == [EXPECTED[kind]]
            assert signed is not None
        else:
            assert result is None
            assert signed is None

    def test_conforms(self) -> None:
        """Every token, of any actor and in any request, keeps the rules of RFC 8417."""
        several = [set_claims(event, issuer=ISSUER, audience=AUDIENCE) for event in variants()]
        kept = [each for each in several if each is not None]
        assert len(kept) >= 60
        for each in kept:
            assert violations(as_sent(each), FILE, "claims") == []

    @pytest.mark.parametrize("kind", WITH_TOKEN, ids=lambda kind: kind.name)
    def test_common_claims(self, kind: type[Event]) -> None:
        """Times are in seconds, the token has the id of the event, and it never expires."""
        result = claims(sample(kind))
        assert result["iss"] == ISSUER
        assert result["aud"] == AUDIENCE
        assert result["jti"] == str(EVENT_ID)
        assert result["txn"] == "r-1"
        assert result["iat"] == result["toe"] == SECONDS
        assert not {"exp", "nbf", "sub"} & result.keys()

    @pytest.mark.parametrize("kind", WITH_TOKEN, ids=lambda kind: kind.name)
    def test_interoperable(self, kind: type[Event]) -> None:
        """An event about a session or password has a time, an initiator and a reason."""
        body = payload(sample(kind))
        if EXPECTED[kind].startswith(RISC):
            assert body == {}
            return
        assert body["event_timestamp"] == SECONDS
        for name in standard(FILE)["interoperable"]["required_in_caep_events"]:
            assert body[name]["en"]

    @pytest.mark.parametrize("kind", WITH_TOKEN, ids=lambda kind: kind.name)
    def test_pure(self, kind: type[Event]) -> None:
        """The same event gives the same claims, whatever became of those before."""
        event = sample(kind)
        first = claims(event)
        kept = copy.deepcopy(first)
        for each in (*first["events"].values(), first["events"], first["sub_id"], first):
            each.clear()
        assert claims(event) == kept


class TestChecker:
    """The checks of this file can fail."""

    @pytest.mark.parametrize("kind", WITH_TOKEN, ids=lambda kind: kind.name)
    def test_damage_is_refused(self, kind: type[Event]) -> None:
        """Claims without a required one, with a forbidden one, or a wrong type are refused."""
        damaged = list(_damaged(claims(sample(kind))))
        assert len(damaged) > 10
        for each in damaged:
            assert violations(each, FILE, "claims"), each

    def test_event_claims(self) -> None:
        """A changed credential must say which, and how it changed."""
        for name in ("credential_type", "change_type"):
            result = claims(sample(PasswordChanged))
            del result["events"][CAEP + "credential-change"][name]
            assert violations(result, FILE, "claims")


class TestSubject:
    @pytest.mark.parametrize(
        "kind", [PasswordChanged, UserDeactivated, UserActivated], ids=lambda kind: kind.name
    )
    def test_account(self, kind: type[Event]) -> None:
        """What happens to an account names the user, under the issuer."""
        assert claims(sample(kind))["sub_id"] == {"format": "iss_sub", "iss": ISSUER, "sub": "7"}

    @pytest.mark.parametrize(
        "kind",
        [UserLogin, UserLogout, SessionEvicted, SessionRevoked, RefreshTokenReused],
        ids=lambda kind: kind.name,
    )
    def test_session(self, kind: type[Event]) -> None:
        """What happens to one session names it too, so that the user's other sessions go on."""
        assert claims(sample(kind))["sub_id"] == {
            "format": "complex",
            "user": {"format": "iss_sub", "iss": ISSUER, "sub": "7"},
            "session": {"format": "opaque", "id": "s-1"},
        }

    def test_everywhere(self) -> None:
        """A logout everywhere names the user, whose every session ended."""
        everywhere = sample(UserLogout, session_id=None, everywhere=True)
        assert claims(everywhere)["sub_id"]["format"] == "iss_sub"

    def test_user_alone(self) -> None:
        """On request an event about a session names the user alone."""
        result = claims(sample(UserLogout), subject="user")["sub_id"]
        assert result == {"format": "iss_sub", "iss": ISSUER, "sub": "7"}

    @pytest.mark.parametrize("subject_id", [None, ""])
    def test_no_subject(self, subject_id: str | None) -> None:
        """A token must have a subject."""
        with pytest.raises(ValueError, match="user_logout does not say whom it is about"):
            claims(sample(UserLogout, subject_id=subject_id))


class TestContent:
    def test_password_login(self) -> None:
        """A login by password says ``pwd``, the word of RFC 8176."""
        assert payload(sample(UserLogin))["amr"] == ["pwd"]

    def test_other_login(self) -> None:
        """A method that is not in RFC 8176 gives no claim."""
        assert "amr" not in payload(sample(UserLogin, method="magic link"))

    def test_password_changed(self) -> None:
        """A changed password is an updated credential."""
        body = payload(sample(PasswordChanged))
        assert (body["credential_type"], body["change_type"]) == ("password", "update")

    @pytest.mark.parametrize("actor", get_args(Actor))
    def test_initiator(self, actor: str) -> None:
        """The initiator has a value of CAEP; without a known actor it is the policy."""
        body = payload(sample(SessionRevoked, actor=actor))
        assert body["initiating_entity"] == ("policy" if actor == "unauthenticated" else actor)

    def test_reuse_is_policy(self) -> None:
        """A session that ends for a reused token is ended by policy."""
        assert payload(sample(RefreshTokenReused))["initiating_entity"] == "policy"

    def test_now(self) -> None:
        """The time of issue can be given; that of the event stays."""
        result = claims(sample(UserLogout), now=OCCURRED + timedelta(minutes=5))
        assert (result["iat"], result["toe"]) == (SECONDS + 300, SECONDS)

    def test_no_request(self) -> None:
        """Without a request there is no transaction."""
        assert "txn" not in claims(sample(UserLogin, context=RequestContext()))

    def test_audiences(self) -> None:
        """There may be several receivers."""
        result = claims(sample(UserLogin), audience=("https://a.example", "https://b.example"))
        assert result["aud"] == ["https://a.example", "https://b.example"]

    @pytest.mark.parametrize("empty", [{"issuer": ""}, {"audience": ""}, {"audience": []}])
    @pytest.mark.parametrize("kind", [UserLogin, UserLoginFailed])
    def test_empty(self, kind: type[Event], empty: dict[str, Any]) -> None:
        """Issuer and audience are required, also for an event without a token."""
        with pytest.raises(ValueError, match="issuer and an audience"):
            set_claims(sample(kind), **{"issuer": ISSUER, "audience": AUDIENCE, **empty})

    @pytest.mark.parametrize("event", [ParcelSentForSet(), NamedEvent.of("user_login", (), {})])
    def test_others(self, event: Event) -> None:
        """An event of the host's own, or one that only has the name of ours, is refused clearly."""
        with pytest.raises(ValueError, match=f"{event.name!r} is none of the library's"):
            set_claims(event, issuer=ISSUER, audience=AUDIENCE)

    def test_no_secret(self) -> None:
        """Neither the stored hash nor the e-mail address of the live user comes out."""
        for kind in WITH_TOKEN:
            assert CANARY not in repr(claims(sample(kind)))


class TestSigning:
    @pytest.mark.parametrize("algorithm", ASYMMETRIC)
    def test_received(self, algorithm: Algorithm) -> None:
        """A receiver with the public key reads the claims, under a header with the type of the token."""
        event = sample(UserLogout)
        text = token(event, key(algorithm))
        assert received(text, algorithm) == claims(event)
        header = jwt.get_unverified_header(text)
        assert header == {"typ": "secevent+jwt", "alg": algorithm, "kid": "set-1"}
        assert violations(header, FILE, "header") == []

    def test_options(self) -> None:
        """The options of the claims are those of the token."""
        now = OCCURRED + timedelta(minutes=5)
        result = received(token(sample(UserLogout), key(), now=now, subject="user"))
        assert (result["iat"], result["sub_id"]["format"]) == (SECONDS + 300, "iss_sub")

    def test_interoperable(self) -> None:
        """An RS256 key that we accept is large enough for the interoperability profile."""
        least = standard(FILE)["interoperable"]["least_bits"]
        assert key().verifying.key_size >= least
        small = rsa.generate_private_key(65537, 1024)
        with pytest.raises(ConfigurationError, match="2048"):
            SigningKey(
                small.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
                algorithm="RS256",
            )

    def test_tampered(self) -> None:
        """A receiver refuses what was changed on the way."""
        head, _, signature = token(sample(UserLogout), key()).split(".")
        other = token(sample(UserDeactivated), key()).split(".")[1]
        with pytest.raises(jwt.InvalidSignatureError):
            received(f"{head}.{other}.{signature}")

    @pytest.mark.parametrize("kind", [UserLogout, UserLoginFailed])
    def test_hmac(self, kind: type[Event]) -> None:
        """An HMAC secret is refused, whether or not there would be a token."""
        with pytest.raises(ConfigurationError, match="private key") as caught:
            security_event_token(sample(kind), SigningKey(SECRET), issuer=ISSUER, audience=AUDIENCE)
        assert SECRET not in str(caught.value)

    @pytest.mark.parametrize("algorithm", ASYMMETRIC)
    def test_public_key(self, algorithm: Algorithm) -> None:
        """A public key cannot sign."""
        public = SigningKey(pem(algorithm, public=True), algorithm=algorithm)
        with pytest.raises(ConfigurationError, match="private key"):
            security_event_token(sample(UserLogout), public, issuer=ISSUER, audience=AUDIENCE)

    @pytest.mark.parametrize("kind", WITH_TOKEN, ids=lambda kind: kind.name)
    def test_no_access(self, kind: type[Event]) -> None:
        """A token with the key, issuer and audience of access tokens is refused as an access token."""
        config = AuthConfig(secret=[key()], issuer=ISSUER, audience=AUDIENCE)
        tokens = AccessTokens(config, FakeClock(OCCURRED))
        for even_if_expired in (False, True):
            with pytest.raises(TokenInvalidError):
                tokens.read(token(sample(kind), key()), even_if_expired=even_if_expired)

    def test_type_alone(self) -> None:
        """The type alone makes it refused, even with the claims of an access token."""
        config = AuthConfig(secret=[key()], issuer=ISSUER, audience=AUDIENCE)
        tokens = AccessTokens(config, FakeClock(OCCURRED))
        extended = claims(sample(UserLogin)) | {"sub": "7", "sid": "s-1", "exp": SECONDS + 60}
        for typ, good in (("at+jwt", True), ("secevent+jwt", False)):
            headers = {"typ": typ, "kid": "set-1"}
            text = jwt.encode(extended, key().signing, algorithm="RS256", headers=headers)
            if good:
                assert tokens.read(text).subject == "7"
            else:
                with pytest.raises(TokenInvalidError):
                    tokens.read(text)


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"issuer": ""}, "an issuer and an audience"),
            ({"issuer": 5}, "an issuer and an audience"),
            ({"issuer": None}, "an issuer and an audience"),
            ({"audience": ""}, "an issuer and an audience"),
            ({"audience": []}, "an issuer and an audience"),
            ({"audience": [5]}, "an issuer and an audience"),
            ({"audience": [AUDIENCE, ""]}, "an issuer and an audience"),
            ({"audience": 5}, "an issuer and an audience"),
            ({"audience": b"shop"}, "an issuer and an audience"),
            ({"audience": {AUDIENCE}}, "an issuer and an audience"),
            ({"now": OCCURRED.replace(tzinfo=None)}, "with a time zone"),
            ({"now": SECONDS}, "with a time zone"),
            ({"subject": "sesion"}, "'session' or 'user', not 'sesion'"),
            ({"subject": None}, "'session' or 'user'"),
        ],
        ids=range(14),
    )
    @pytest.mark.parametrize("kind", [UserLogout, UserLoginFailed])
    def test_refused(self, kind: type[Event], options: dict[str, Any], message: str) -> None:
        """Options that no receiver understands are refused, whether or not there would be a token."""
        terms = {"issuer": ISSUER, "audience": AUDIENCE, **options}
        with pytest.raises(ValueError, match=message):
            set_claims(sample(kind), **terms)
        with pytest.raises(ValueError, match=message):
            security_event_token(sample(kind), key(), **terms)

    def test_other_things(self) -> None:
        """A key that is still text, and what is no event, are named by their types alone."""
        text: Any = pem("RS256").decode()
        with pytest.raises(TypeError, match=r"key must be a SigningKey\(.*\), not str$"):
            security_event_token(sample(UserLogout), text, issuer=ISSUER, audience=AUDIENCE)
        other: Any = {"name": "user_logout"}
        for convert in (ocsf, ecs):
            with pytest.raises(TypeError, match=r"^event must be an Event, not dict$"):
                convert(other)
        with pytest.raises(TypeError, match=r"^event must be an Event, not dict$"):
            token(other, key())


class TestHostile:
    @settings(max_examples=300, deadline=None)
    @given(event=hostile_events())
    def test_conforms(self, event: Event) -> None:
        """Any input gives claims that keep the rules, or no token without a subject."""
        try:
            result = set_claims(event, issuer=ISSUER, audience=AUDIENCE)
        except ValueError:
            assert not event.subject_id
            assert type(event) in EXPECTED
            return
        assert (result is not None) == (type(event) in EXPECTED)
        if result is not None:
            assert violations(as_sent(result), FILE, "claims") == []
            assert not any(FORBIDDEN.search(text) for text in texts(result))

    @settings(max_examples=30, deadline=None)
    @given(event=hostile_events())
    def test_signed(self, event: Event) -> None:
        """The received claims are the signed ones, character for character."""
        if event.subject_id and type(event) in EXPECTED:
            assert received(token(event, key("ES256")), "ES256") == claims(event)

    def test_live_user_is_left_alone(self) -> None:
        """An event that was rebuilt after its account was deleted has a token like any other."""
        event = sample(UserLogout)
        assert isinstance(event.user, User)
        assert claims(UserLogout.from_dict(event.to_dict())) == claims(event)


def _damaged(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in standard(FILE)["$defs"]["claims"]["required"]:
        yield {other: value for other, value in result.items() if other != name}
    ((uri, body),) = result["events"].items()
    yield {**result, "sub": "7"}
    yield {**result, "exp": SECONDS + 60}
    yield {**result, "iat": OCCURRED.isoformat()}
    yield {**result, "toe": SECONDS + 0.5}
    yield {**result, "sub_id": {"format": "iss_sub", "sub": "7"}}
    yield {**result, "sub_id": {"format": "email", "iss": ISSUER, "sub": "7"}}
    yield {**result, "events": {}}
    yield {**result, "events": {uri: body, RISC + "account-purged": {}}}
    yield {**result, "events": {uri: {**body, "colour": "blue"}}}
    yield {**result, "events": {uri: []}}
