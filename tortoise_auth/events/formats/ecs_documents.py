"""Events as the Elastic Common Schema 9 has them: for Elasticsearch and what stands on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC
from typing import Any

from tortoise_auth.events.classification import Activity, Classification
from tortoise_auth.events.event import Event
from tortoise_auth.events.formats import reading

ECS_VERSION = "9.4.0"

# Categories, types.
_ACTIVITIES: Mapping[Activity, tuple[str, str]] = {
    "logon": ("authentication session", "start"),
    "logoff": ("authentication session", "end"),
    "session.revoke": ("session", "end"),
    "session.refresh": ("session", "info"),
    "token.reuse": ("authentication session", "info"),
    "password.change": ("iam", "user change"),
    "password.reset": ("iam", "user change"),
    "password.rehash": ("iam", "user info"),
    "account.create": ("iam", "user creation"),
    "account.update": ("iam", "user change"),
    "account.enable": ("iam", "user change"),
    "account.disable": ("iam", "user change"),
    "account.lock": ("iam", "user change"),
    "account.unlock": ("iam", "user change"),
    "account.delete": ("iam", "user deletion"),
    "factor.enable": ("iam", "user change"),
    "factor.disable": ("iam", "user change"),
    "resource.create": ("api", "creation"),
    "resource.read": ("api", "access"),
    "resource.update": ("api", "change"),
    "resource.delete": ("api", "deletion"),
    "resource.search": ("api", "access"),
    "resource.import": ("api", "creation"),
    "resource.export": ("api", "access"),
    "resource.share": ("api", "access"),
}


def ecs(
    event: Event, *, service: str | None = None, unknown_identifiers: bool = False
) -> dict[str, Any]:
    """Return an event as the Elastic Common Schema 9 has it.

    An account to which an administrator or the system did something is ``user.target``, and ``user``
    the administrator, if ``event.context.actor_id`` is set; any other account is ``user``.
    ``related.user`` has both.

    Args:
        event: See `ocsf`.
        service: The name of your application.
        unknown_identifiers: See `ocsf`.

    Raises:
        ValueError, TypeError: See `ocsf`.
    """
    classified = reading.classification_of(event)
    context, ip = event.context, event.context.ip
    name = None
    if classified.resource is None:
        name = reading.identifier(event, unknown=unknown_identifiers)
    account = {"id": reading.account(event), "name": name}
    administrator = reading.administrator(event)
    targeted = {"id": administrator, "target": account}
    related = [*account.values(), administrator]
    record = {
        "@timestamp": event.occurred_at.astimezone(UTC).isoformat(timespec="microseconds"),
        "ecs": {"version": ECS_VERSION},
        "message": classified.message,
        "event": {
            **_categorisation(classified),
            "action": event.name,
            "reason": reading.reason(event, classified),
            "id": str(event.id),
            "module": "tortoise_auth",
            "provider": "tortoise_auth",
            "dataset": "tortoise_auth.events",
        },
        "user": targeted if event.actor in ("admin", "system") else account,
        "source": {"ip": ip, "address": ip},
        "user_agent": {"original": context.user_agent},
        "http": {"request": {"id": context.request_id}},
        "service": {"name": service},
        "related": {"user": [each for each in related if each], "ip": [ip] if ip else []},
        "labels": _labels(event, classified),
    }
    return reading.tidy(record)


def _categorisation(classified: Classification) -> dict[str, Any]:
    categories, types = (words.split() for words in _ACTIVITIES[classified.activity])
    if classified.activity == "logon" and classified.outcome == "failure":
        categories.remove("session")  # none was opened
    return {
        "kind": "alert" if classified.severity in ("high", "critical") else "event",
        "category": categories,
        "type": types,
        "outcome": classified.outcome,
    }


def _labels(event: Event, classified: Classification) -> dict[str, str]:
    values = reading.details(event, classified, "method", "session_id")
    values |= {
        f"resource_{name}": value for name, value in reading.resource(event, classified).items()
    }
    return {
        # In ECS labels are flat, and their values are text.
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }
