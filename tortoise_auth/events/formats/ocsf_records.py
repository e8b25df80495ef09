"""Events as OCSF 1.8 has them: for a SIEM or a data lake."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from tortoise_auth.events.classification import (
    Activity,
    Classification,
    FailureReason,
    Outcome,
    Severity,
)
from tortoise_auth.events.event import Event
from tortoise_auth.events.formats import reading

OCSF_VERSION = "1.8.0"

# Authentication, Account Change, Web Resources Activity.
_AUTHENTICATION, _ACCOUNT, _RESOURCES = 3002, 3001, 6001
_OTHER = 99  # has no label but the one that is given
_ACTIVITIES: Mapping[Activity, tuple[int, int, str]] = {
    "logon": (_AUTHENTICATION, 1, "Logon"),
    "logoff": (_AUTHENTICATION, 2, "Logoff"),
    "session.revoke": (_AUTHENTICATION, 2, "Logoff"),
    "session.refresh": (_AUTHENTICATION, _OTHER, "Session Refresh"),
    "token.reuse": (_AUTHENTICATION, _OTHER, "Refresh Token Reuse"),
    "account.create": (_ACCOUNT, 1, "Create"),
    "account.enable": (_ACCOUNT, 2, "Enable"),
    "password.change": (_ACCOUNT, 3, "Password Change"),
    "password.reset": (_ACCOUNT, 4, "Password Reset"),
    "account.disable": (_ACCOUNT, 5, "Disable"),
    "account.delete": (_ACCOUNT, 6, "Delete"),
    "account.lock": (_ACCOUNT, 9, "Lock"),
    "factor.enable": (_ACCOUNT, 10, "MFA Factor Enable"),
    "factor.disable": (_ACCOUNT, 11, "MFA Factor Disable"),
    "account.unlock": (_ACCOUNT, 12, "Unlock"),
    "account.update": (_ACCOUNT, _OTHER, "Account Update"),
    "password.rehash": (_ACCOUNT, _OTHER, "Password Rehash"),
    "resource.create": (_RESOURCES, 1, "Create"),
    "resource.read": (_RESOURCES, 2, "Read"),
    "resource.update": (_RESOURCES, 3, "Update"),
    "resource.delete": (_RESOURCES, 4, "Delete"),
    "resource.search": (_RESOURCES, 5, "Search"),
    "resource.import": (_RESOURCES, 6, "Import"),
    "resource.export": (_RESOURCES, 7, "Export"),
    "resource.share": (_RESOURCES, 8, "Share"),
}
_STATUSES: Mapping[Outcome, tuple[int, str]] = {
    "success": (1, "Success"),
    "failure": (2, "Failure"),
}
_SEVERITIES: Mapping[Severity, tuple[int, str]] = {
    "informational": (1, "Informational"),
    "low": (2, "Low"),
    "medium": (3, "Medium"),
    "high": (4, "High"),
    "critical": (5, "Critical"),
}
_REFUSALS: Mapping[FailureReason, str] = {
    "not_found": "USER_DOES_NOT_EXIST",
    "inactive": "ACCOUNT_DISABLED",
    "bad_password": "INVALID_CREDENTIALS",
    "throttled": "ACCOUNT_LOCKED_OUT",
    "locked": "ACCOUNT_LOCKED_OUT",
}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def ocsf(
    event: Event,
    *,
    product: str = "tortoise-auth",
    service: str | None = None,
    unknown_identifiers: bool = False,
) -> dict[str, Any]:
    """Return an event as OCSF 1.8 has it.

    Its class is Authentication, Account Change or, for a ``resource`` activity of the host's, Web
    Resources Activity.

    Args:
        event: An event of the library, or of a class that declares a classification.
        product: What reports it.
        service: What people log in to: your application. By default *product*.
        unknown_identifiers: Also name what was typed when no account is known to have it.
            Warning: people type their password into that box.

    Raises:
        ValueError: The class of the event declares no classification.
        TypeError: It is no event, or a field of it holds something that JSON cannot.
    """
    classified = reading.classification_of(event)
    class_uid, activity, label = _ACTIVITIES[classified.activity]
    severity_id, severity = _SEVERITIES[classified.severity]
    status_id, status = _STATUSES[classified.outcome]
    reason, ip = reading.reason(event, classified), event.context.ip
    record = {
        "category_uid": class_uid // 1000,
        "class_uid": class_uid,
        "activity_id": activity,
        "activity_name": label,
        "type_uid": class_uid * 100 + activity,
        "time": (event.occurred_at.astimezone(UTC) - _EPOCH) // timedelta(milliseconds=1),
        "severity_id": severity_id,
        "severity": severity,
        "status_id": status_id,
        "status": status,
        "status_code": reason,
        "status_detail": _REFUSALS[reason] if reason else _detail(event, classified),
        "message": classified.message,
        "metadata": {
            "version": OCSF_VERSION,
            "product": {"name": product},
            "uid": str(event.id),
            "event_code": event.name,
            "correlation_uid": event.context.request_id,
        },
        **_subject(event, classified, unknown_identifiers),
        "src_endpoint": {"ip": ip},
        "http_request": {"user_agent": event.context.user_agent, "uid": event.context.request_id},
        "unmapped": reading.details(event, classified),
    }
    if class_uid == _AUTHENTICATION:
        record["service"] = {"name": service or product}
        record["session"] = {"uid": reading.session(event)}
    if classified.activity == "logon":
        record |= _method(reading.method(event))
    return reading.tidy(record)


def _subject(event: Event, classified: Classification, unknown: bool) -> dict[str, Any]:
    """Return whom or what the record is about, and which user did it."""
    account = reading.account(event)
    doer = account if event.actor == "user" else reading.administrator(event)
    actor = {"user": {"uid": doer}}
    if classified.resource is not None:  # this class has no attribute for another user
        thing = reading.resource(event, classified)
        return {"web_resources": [{"name": thing["type"], **thing}], "actor": actor}
    unnamed = None if account else "unknown"
    name = reading.identifier(event, unknown=unknown) or unnamed
    return {"user": {"uid": account, "name": name}, "actor": actor}


def _detail(event: Event, classified: Classification) -> str:
    match classified.activity:
        case "logoff":
            return "LOGOFF_USER_INITIATED" if event.actor == "user" else "LOGOFF_OTHER"
        case "session.revoke":
            return "LOGOFF_OTHER"
        case "token.reuse":
            return "REFRESH_TOKEN_REUSED"
        case _:
            return ""


def _method(method: str) -> dict[str, Any]:
    known = method == "password"
    factor = {"factor_type_id": 11 if known else 99, "factor_type": "Password" if known else method}
    protocol = {"auth_protocol_id": 99, "auth_protocol": method, "auth_factors": [factor]}
    return {**protocol, "is_mfa": False} if known else protocol
