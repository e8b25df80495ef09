"""Events in the words of others: as CloudEvents 1.0 and back, for a SIEM, and for other providers.

`ocsf` and `ecs` are for systems that collect security events, `security_event_token` is for services
that must learn that a session or account of theirs ended here. All are pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any, ClassVar, Literal

import jwt

from tortoise_auth.events.catalog import (
    AccountLocked,
    Event,
    FailureReason,
    LoginThrottled,
    PasswordChanged,
    PasswordChangeFailed,
    PasswordRehashed,
    RefreshTokenReused,
    SessionRefreshed,
    SessionRevoked,
    UserActivated,
    UserDeactivated,
    UserLogin,
    UserLoginFailed,
    UserLogout,
    UserRegistered,
)
from tortoise_auth.events.serialization import plain
from tortoise_auth.exceptions import ConfigurationError, TortoiseAuthError, describe
from tortoise_auth.keys import SigningKey

TYPE_PREFIX = "io.github.tortoise_auth."
"""What the ``type`` of every CloudEvent of ours begins with."""

_URI_REFERENCE = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")

# Control characters, lone surrogates and noncharacters.
_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)

_MAX_REASON_LENGTH = 200


class CloudEventError(TortoiseAuthError, ValueError):
    """A message is no CloudEvent, or not one that this program can turn back into an event."""

    code: ClassVar[str] = "cloudevent_error"


def cloudevent(event: Event, source: str) -> dict[str, Any]:
    """Return an event as CloudEvents 1.0 has it, ready for JSON.

    Args:
        event: The event.
        source: Which of your systems it comes from: a URI reference, for example
            ``https://shop.example.com/auth``. Together with ``id`` it is unique.

    Raises:
        ValueError: *source* is not a URI reference.
        TypeError: A field of the event holds something that JSON cannot.
    """
    envelope = {
        "specversion": "1.0",
        "id": str(event.id),
        "source": uri_reference(source),
        "type": _type(event.name, event.schema_version),
        "time": event.occurred_at.astimezone(UTC).isoformat(),
        "datacontenttype": "application/json",
        "data": event.to_dict(),
    }
    if event.subject_id:
        envelope["subject"] = _clean(event.subject_id)
    return envelope


def event_from_cloudevent(envelope: Mapping[str, Any]) -> Event:
    """Return the event that a CloudEvent carries, of its own class, without the live user.

    Raises:
        CloudEventError: It is no CloudEvent, none of ours, of a class that nobody declared here or
            that is newer than the one here, or its data do not fit that class.
    """
    name, data = event_name(envelope), envelope.get("data")
    if name is None:
        raise CloudEventError("The CloudEvent is of a type of somebody else's")
    if not isinstance(data, Mapping):
        raise CloudEventError("The CloudEvent has no data")
    if envelope["type"] != _type(data.get("name"), data.get("schema_version")):
        raise CloudEventError("The type of the CloudEvent is not that of its data")
    try:
        event = Event.from_dict(data)
    except Exception as error:
        reason = describe(error)[:_MAX_REASON_LENGTH]
        raise CloudEventError(f"The CloudEvent does not hold an event: {reason}") from error
    if envelope["id"] != str(event.id):
        raise CloudEventError("The id of the CloudEvent is not that of its event")
    return event


def event_name(envelope: object) -> str | None:
    """Return which of our events a CloudEvent carries; ``None`` if it is somebody else's.

    Raises:
        CloudEventError: It is no CloudEvent 1.0.
    """
    if not isinstance(envelope, Mapping) or envelope.get("specversion") != "1.0":
        raise CloudEventError("The message is no CloudEvent 1.0")
    for attribute in ("id", "source", "type"):
        if not isinstance(value := envelope.get(attribute), str) or not value:
            raise CloudEventError(f"The CloudEvent has no {attribute}")
    kind = str(envelope["type"])
    name, _, version = kind.removeprefix(TYPE_PREFIX).rpartition(".v")
    return name if kind.startswith(TYPE_PREFIX) and name and version.isdecimal() else None


def uri_reference(text: str) -> str:
    """Return *text* if it can be the ``source`` of a CloudEvent.

    Raises:
        ValueError: It cannot.
    """
    if not _URI_REFERENCE.fullmatch(text):
        raise ValueError(
            f"The source of a CloudEvent is a URI reference such as "
            f"'https://shop.example.com/auth', not {text!r}"
        )
    return text


def _type(name: object, version: object) -> str:
    return f"{TYPE_PREFIX}{_clean(str(name))}.v{version}"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)


_MESSAGES: Mapping[type[Event], str] = {
    UserLogin: "A session was opened",
    UserLoginFailed: "A login was refused",
    LoginThrottled: "A login was refused because there had been too many",
    AccountLocked: "The password was disabled after too many failed logins",
    UserLogout: "The user logged out",
    SessionRevoked: "A session was ended",
    SessionRefreshed: "A session was refreshed",
    RefreshTokenReused: "A session was ended because a spent refresh token was presented",
    PasswordChanged: "The password was changed",
    PasswordChangeFailed: "A password change was refused",
    PasswordRehashed: "The stored hash of the password was renewed",
    UserRegistered: "The account was created",
    UserDeactivated: "The account was deactivated",
    UserActivated: "The account was activated again",
}

LIFECYCLE_EVENTS: tuple[type[Event], ...] = tuple(_MESSAGES)
"""The events that OCSF, ECS and Security Event Tokens are made of: subscribe to these."""

OCSF_VERSION = "1.8.0"
_LOGIN, _ACCOUNT = 3002, 3001  # the classes Authentication and Account Change
# Class, activity, its name, status, severity, status detail.
_OCSF: Mapping[type[Event], tuple[int, int, str, int, int, str]] = {
    UserLogin: (_LOGIN, 1, "Logon", 1, 1, ""),
    UserLoginFailed: (_LOGIN, 1, "Logon", 2, 2, ""),
    LoginThrottled: (_LOGIN, 1, "Logon", 2, 3, ""),
    AccountLocked: (_ACCOUNT, 9, "Lock", 1, 3, ""),
    UserLogout: (_LOGIN, 2, "Logoff", 1, 1, "LOGOFF_USER_INITIATED"),
    SessionRevoked: (_LOGIN, 2, "Logoff", 1, 1, "LOGOFF_OTHER"),
    SessionRefreshed: (_LOGIN, 99, "Session Refresh", 1, 1, ""),
    RefreshTokenReused: (_LOGIN, 99, "Refresh Token Reuse", 2, 4, "REFRESH_TOKEN_REUSED"),
    PasswordChanged: (_ACCOUNT, 3, "Password Change", 1, 1, ""),
    PasswordChangeFailed: (_ACCOUNT, 3, "Password Change", 2, 3, ""),
    PasswordRehashed: (_ACCOUNT, 99, "Password Rehash", 1, 1, ""),
    UserRegistered: (_ACCOUNT, 1, "Create", 1, 1, ""),
    UserDeactivated: (_ACCOUNT, 5, "Disable", 1, 1, ""),
    UserActivated: (_ACCOUNT, 2, "Enable", 1, 1, ""),
}
_OCSF_STATUSES = {1: "Success", 2: "Failure"}
_OCSF_SEVERITIES = {1: "Informational", 2: "Low", 3: "Medium", 4: "High"}
_OCSF_REFUSALS: Mapping[FailureReason, str] = {
    "not_found": "USER_DOES_NOT_EXIST",
    "inactive": "ACCOUNT_DISABLED",
    "bad_password": "INVALID_CREDENTIALS",
    "throttled": "ACCOUNT_LOCKED_OUT",
    "locked": "ACCOUNT_LOCKED_OUT",
}

ECS_VERSION = "9.4.0"
# Kind, categories, types, outcome.
_ECS: Mapping[type[Event], tuple[str, str, str, str]] = {
    UserLogin: ("event", "authentication session", "start", "success"),
    UserLoginFailed: ("event", "authentication", "start", "failure"),
    LoginThrottled: ("event", "authentication", "start", "failure"),
    AccountLocked: ("event", "iam", "user change", "success"),
    UserLogout: ("event", "authentication session", "end", "success"),
    SessionRevoked: ("event", "session", "end", "success"),
    SessionRefreshed: ("event", "session", "info", "success"),
    RefreshTokenReused: ("alert", "authentication session", "info", "failure"),
    PasswordChanged: ("event", "iam", "user change", "success"),
    PasswordChangeFailed: ("event", "iam", "user change", "failure"),
    PasswordRehashed: ("event", "iam", "user info", "success"),
    UserRegistered: ("event", "iam", "user creation", "success"),
    UserDeactivated: ("event", "iam", "user change", "success"),
    UserActivated: ("event", "iam", "user change", "success"),
}

_SET: Mapping[type[Event], str] = {
    UserLogin: "caep/event-type/session-established",
    UserLogout: "caep/event-type/session-revoked",
    SessionRevoked: "caep/event-type/session-revoked",
    RefreshTokenReused: "caep/event-type/session-revoked",
    PasswordChanged: "caep/event-type/credential-change",
    UserDeactivated: "risc/event-type/account-disabled",
    UserActivated: "risc/event-type/account-enabled",
}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_IDENTIFIER_LENGTH = 320


def ocsf(
    event: Event,
    *,
    product: str = "tortoise-auth",
    service: str | None = None,
    unknown_identifiers: bool = False,
) -> dict[str, Any]:
    """Return an event as OCSF 1.8 has it, in the class Authentication or Account Change.

    Args:
        event: One of `LIFECYCLE_EVENTS`.
        product: What reports it.
        service: What people log in to: your application. By default *product*.
        unknown_identifiers: Also name what was typed when no account is known to have it.
            Warning: people type their password into that box.

    Raises:
        ValueError: The event is none of the library's.
        TypeError: It is no event, or a field of it holds something that JSON cannot.
    """
    kind = _kind(event)
    class_uid, activity, label, status, severity, detail = _OCSF[kind]
    if kind is UserLogout and event.actor != "user":
        detail = "LOGOFF_OTHER"
    reason, account, ip = _reason(event), _account(event), _ip(event.context.ip)
    unnamed = None if account else "unknown"
    record = {
        "category_uid": 3,
        "class_uid": class_uid,
        "activity_id": activity,
        "activity_name": label,
        "type_uid": class_uid * 100 + activity,
        "time": (event.occurred_at.astimezone(UTC) - _EPOCH) // timedelta(milliseconds=1),
        "severity_id": severity,
        "severity": _OCSF_SEVERITIES[severity],
        "status_id": status,
        "status": _OCSF_STATUSES[status],
        "status_code": reason,
        "status_detail": _OCSF_REFUSALS[reason] if reason else detail,
        "message": _message(event, kind),
        "metadata": {
            "version": OCSF_VERSION,
            "product": {"name": product},
            "uid": str(event.id),
            "event_code": event.name,
            "correlation_uid": event.context.request_id,
        },
        "user": {"uid": account, "name": _typed(event, unknown_identifiers) or unnamed},
        "actor": {"user": {"uid": account}} if event.actor == "user" else None,
        "src_endpoint": {"ip": ip, "name": None if ip else event.context.ip},
        "http_request": {"user_agent": event.context.user_agent, "uid": event.context.request_id},
        "unmapped": _details(event, "actor"),
    }
    if class_uid == _LOGIN:
        record["service"] = {"name": service or product}
        record["session"] = {"uid": getattr(event, "session_id", None)}
        record |= _ocsf_method(getattr(event, "method", "password")) if activity == 1 else {}
    return _tidy(record)


def ecs(
    event: Event, *, service: str | None = None, unknown_identifiers: bool = False
) -> dict[str, Any]:
    """Return an event as the Elastic Common Schema 9 has it.

    An account to which an administrator or the system did something is ``user.target``, any other
    is ``user``; ``related.user`` has both.

    Args:
        event: One of `LIFECYCLE_EVENTS`.
        service: The name of your application.
        unknown_identifiers: See `ocsf`.

    Raises:
        ValueError, TypeError: See `ocsf`.
    """
    kind = _kind(event)
    event_kind, categories, types, outcome = _ECS[kind]
    context, ip = event.context, _ip(event.context.ip)
    account = {"id": _account(event), "name": _typed(event, unknown_identifiers)}
    record = {
        "@timestamp": event.occurred_at.astimezone(UTC).isoformat(timespec="microseconds"),
        "ecs": {"version": ECS_VERSION},
        "message": _message(event, kind),
        "event": {
            "kind": event_kind,
            "category": categories.split(),
            "type": types.split(),
            "outcome": outcome,
            "action": event.name,
            "reason": _reason(event),
            "id": str(event.id),
            "module": "tortoise_auth",
            "provider": "tortoise_auth",
            "dataset": "tortoise_auth.events",
        },
        "user": {"target": account} if event.actor in ("admin", "system") else account,
        "source": {"ip": ip, "address": context.ip},
        "user_agent": {"original": context.user_agent},
        "http": {"request": {"id": context.request_id}},
        "service": {"name": service},
        "related": {"user": [each for each in account.values() if each], "ip": [ip] if ip else []},
        "labels": {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in _details(event, "actor", "method", "session_id").items()
        },
    }
    return _tidy(record)


def set_claims(
    event: Event,
    *,
    issuer: str,
    audience: str | Sequence[str],
    now: datetime | None = None,
    subject: Literal["session", "user"] = "session",
) -> dict[str, Any] | None:
    """Return the claims of a Security Event Token (RFC 8417); ``None`` if there is none for it.

    Sessions and passwords are told in the words of CAEP 1.0, accounts in those of RISC 1.0, which
    have none for a failed login, a refresh or a new account.

    Args:
        event: One of `LIFECYCLE_EVENTS`.
        issuer: The ``iss`` under which the receivers know you, and your users.
        audience: The receivers.
        now: When it is issued. By default when it happened, so that a second token is the same.
        subject: Whom an event about one session names: the user and the session, or the user
            alone, a form that every receiver knows. Warning: he may end all sessions for it.

    Raises:
        ValueError: The event is none of the library's or does not say whom it is about, or
            another argument is empty or not what it must be.
        TypeError: It is no event.
    """
    _refuse_bad_terms(issuer, audience, now, subject)
    kind = _kind(event)
    if kind not in _SET:
        return None
    occurred = int(event.occurred_at.timestamp())
    transaction = {"txn": _clean(event.context.request_id)} if event.context.request_id else {}
    return {
        "iss": issuer,
        "aud": audience if isinstance(audience, str) else [*audience],
        "iat": occurred if now is None else int(now.timestamp()),
        "jti": str(event.id),
        "toe": occurred,
        "sub_id": _sub_id(event, issuer, subject),
        "events": {
            f"https://schemas.openid.net/secevent/{_SET[kind]}": (
                _caep(event, kind, occurred) if _SET[kind].startswith("caep") else {}
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
        event: One of `LIFECYCLE_EVENTS`.
        key: A private key; CAEP's interoperability profile asks for RS256. HMAC is refused, since
            whoever can check such a token can forge it.
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
        raise ValueError(f"subject must be 'session' or 'user', not {subject!r}")


def _kind(event: Event) -> type[Event]:
    """Return which of the library's events it is, or is derived from."""
    if not isinstance(event, Event):
        raise TypeError(f"event must be an Event, not {type(event).__name__}")
    for kind in type(event).__mro__:
        if kind in _MESSAGES:
            changing = isinstance(event, LoginThrottled) and event.attempted == "password_change"
            return PasswordChangeFailed if changing else kind
    raise ValueError(
        f"{event.name!r} is none of the library's events and has no place in the standards; "
        "subscribe to LIFECYCLE_EVENTS, or derive its class from one of them"
    )


def _message(event: Event, kind: type[Event]) -> str:
    if kind is UserLogout and event.actor != "user":
        return "The sessions of the user were ended"
    return _MESSAGES[kind]


def _account(event: Event) -> str | None:
    return event.subject_id or getattr(event, "user_id", None)


def _typed(event: Event, unknown: bool) -> str | None:
    """Return what was typed into the login form, if it is an account's or wanted all the same."""
    typed: str = getattr(event, "identifier", "")
    return typed[:_MAX_IDENTIFIER_LENGTH] if unknown or _account(event) else None


def _reason(event: Event) -> FailureReason | None:
    if isinstance(event, UserLoginFailed | PasswordChangeFailed):
        return event.reason
    return "throttled" if isinstance(event, LoginThrottled) else None


def _details(event: Event, *more: str) -> dict[str, Any]:
    """Return what a standard has no field for. Named one by one, so that nothing else gets out."""
    names = ("everywhere", "generation", "retry_after", "sessions_ended", *more)
    found = {name: plain(getattr(event, name, None), f"{event.name}.{name}") for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _ip(text: str | None) -> str | None:
    """Return an address in its usual spelling; ``None`` if it is none, or means one link's alone."""
    try:
        address = str(ip_address(text or ""))
    except ValueError:
        return None
    return None if "%" in address else address


def _ocsf_method(method: str) -> dict[str, Any]:
    known = method == "password"
    factor = {"factor_type_id": 11 if known else 99, "factor_type": "Password" if known else method}
    protocol = {"auth_protocol_id": 99, "auth_protocol": method, "auth_factors": [factor]}
    return {**protocol, "is_mfa": False} if known else protocol


def _caep(event: Event, kind: type[Event], occurred: int) -> dict[str, Any]:
    initiator = "policy" if event.actor == "unauthenticated" else event.actor
    claims: dict[str, Any] = {"event_timestamp": occurred, "initiating_entity": initiator}
    claims["reason_admin"] = {"en": _message(event, kind)}
    if isinstance(event, PasswordChanged):
        claims |= {"credential_type": "password", "change_type": "update"}
    if isinstance(event, UserLogin) and event.method == "password":
        claims["amr"] = ["pwd"]
    return claims


def _sub_id(event: Event, issuer: str, subject: str) -> dict[str, Any]:
    account, session_id = _account(event), getattr(event, "session_id", None)
    if not account:
        raise ValueError(f"{event.name} does not say whom it is about: it has no subject_id")
    user = {"format": "iss_sub", "iss": issuer, "sub": _clean(account)}
    if subject == "user" or not session_id:
        return user
    session = {"format": "opaque", "id": _clean(session_id)}
    return {"format": "complex", "user": user, "session": session}


def _tidy(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its empty members, its texts clean."""
    members = ((name, _tidied(value)) for name, value in record.items())
    return {name: value for name, value in members if value not in (None, "", [], {})}


def _tidied(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return _tidy(value)
    if isinstance(value, list):
        return [_tidied(each) for each in value]
    return _clean(value) if isinstance(value, str) else value
