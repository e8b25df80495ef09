"""Events as Security Event Tokens (RFC 8417): for services that end sessions of theirs with yours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import jwt

from tortoise_auth.events.classification import Classification, Signal
from tortoise_auth.events.event import Event
from tortoise_auth.events.formats import reading
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.keys import SigningKey
from tortoise_auth.legible import quoted

_PROFILES: Mapping[Signal, Literal["caep", "risc"]] = {
    "session-established": "caep",
    "session-revoked": "caep",
    "credential-change": "caep",
    "account-enabled": "risc",
    "account-disabled": "risc",
    "account-purged": "risc",
}


def set_claims(
    event: Event,
    *,
    issuer: str,
    audience: str | Sequence[str],
    now: datetime | None = None,
    subject: Literal["session", "user"] = "session",
) -> dict[str, Any] | None:
    """Return the claims of a Security Event Token (RFC 8417); ``None`` if there is none for it.

    Only an event whose classification has a ``signal`` has one: CAEP 1.0 has event types for sessions
    and passwords, RISC 1.0 for accounts, and neither for a failed login, a refresh or a new account.

    Args:
        event: See `ocsf`.
        issuer: The ``iss`` under which the receivers know you, and your users.
        audience: The receivers.
        now: When it is issued. By default when it happened, so that a second token is the same.
        subject: Whom an event about one session names: the user and the session, or the user
            alone, a form that every receiver knows. Warning: receivers may end all sessions for it.

    Raises:
        ValueError: The event has no classification or does not say whom it is about, or another
            argument is empty or not what it must be.
        TypeError: It is no event.
    """
    _refuse_bad_terms(issuer, audience, now, subject)
    classified = reading.classification_of(event)
    if classified.signal is None:
        return None
    profile = _PROFILES[classified.signal]
    occurred = int(event.occurred_at.timestamp())
    transaction = (
        {"txn": reading.clean(event.context.request_id)} if event.context.request_id else {}
    )
    # No `sub` and no `exp`, as the Shared Signals Framework demands, and a type of its own below:
    # no receiver takes it for another kind of token.
    return {
        "iss": issuer,
        "aud": audience if isinstance(audience, str) else [*audience],
        "iat": occurred if now is None else int(now.timestamp()),
        "jti": str(event.id),
        "toe": occurred,
        "sub_id": _sub_id(event, issuer, subject),
        "events": {
            f"https://schemas.openid.net/secevent/{profile}/event-type/{classified.signal}": (
                _caep(event, classified, occurred) if profile == "caep" else {}
            )
        },
        **transaction,
    }


def security_event_token(
    event: Event,
    key: SigningKey,
    *,
    issuer: str,
    audience: str | Sequence[str],
    now: datetime | None = None,
    subject: Literal["session", "user"] = "session",
) -> str | None:
    """Return a signed Security Event Token; ``None`` if there is none for the event.

    Args:
        event: See `ocsf`.
        key: A private key; CAEP's interoperability profile asks for RS256. HMAC is refused: a
            receiver that can check such a token can forge it.
        issuer, audience, now, subject: See `set_claims`.

    Raises:
        ConfigurationError: The key is public, or an HMAC secret.
        ValueError: See `set_claims`.
        TypeError: The key is no `SigningKey`, or the event none.
    """
    if not isinstance(key, SigningKey):
        raise TypeError(
            f"key must be a SigningKey(pem, algorithm='RS256'), not {type(key).__name__}"
        )
    if key.family == "HMAC" or not key.can_sign:
        raise ConfigurationError(
            "A Security Event Token is signed with a private key (RS256 for interoperability), "
            "neither with a public one nor with an HMAC secret that its receivers would share"
        )
    claims = set_claims(event, issuer=issuer, audience=audience, now=now, subject=subject)
    if claims is None:
        return None
    headers = {"typ": "secevent+jwt", "kid": key.kid}
    return jwt.encode(claims, key.signing, algorithm=key.algorithm, headers=headers)


def _refuse_bad_terms(issuer: object, audience: object, now: object, subject: object) -> None:
    receivers = [audience] if isinstance(audience, str) else audience
    if not isinstance(receivers, Sequence) or not all(
        isinstance(each, str) and each for each in (issuer, *(receivers or [""]))
    ):
        raise ValueError("A Security Event Token needs an issuer and an audience, as text")
    if now is not None and not (isinstance(now, datetime) and now.tzinfo):
        raise ValueError("now must be a datetime with a time zone, such as datetime.now(UTC)")
    if subject not in ("session", "user"):
        raise ValueError(f"subject must be 'session' or 'user', not {quoted(subject)}")


def _caep(event: Event, classified: Classification, occurred: int) -> dict[str, Any]:
    initiator = "policy" if event.actor == "unauthenticated" else event.actor
    claims: dict[str, Any] = {"event_timestamp": occurred, "initiating_entity": initiator}
    claims["reason_admin"] = {"en": reading.clean(classified.message)}
    if classified.signal == "credential-change":
        claims |= {"credential_type": "password", "change_type": "update"}
    if classified.signal == "session-established" and reading.method(event) == "password":
        claims["amr"] = ["pwd"]
    return claims


def _sub_id(event: Event, issuer: str, subject: str) -> dict[str, Any]:
    account, session_id = reading.account(event), reading.session(event)
    if not account:
        raise ValueError(f"{event.name} does not say whom it is about: it has no subject_id")
    user = {"format": "iss_sub", "iss": issuer, "sub": reading.clean(account)}
    if subject == "user" or not session_id:
        return user
    session = {"format": "opaque", "id": reading.clean(session_id)}
    return {"format": "complex", "user": user, "session": session}
