"""What the formats read of an event: each value checked, bounded and clean."""

from __future__ import annotations

import re
from typing import Any, get_args

from tortoise_auth.events.classification import Classification, FailureReason
from tortoise_auth.events.event import Event
from tortoise_auth.events.serialization import plain
from tortoise_auth.legible import quoted

_MAX_IDENTIFIER_LENGTH = 320

# Control characters, lone surrogates and noncharacters.
_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)


def classification_of(event: Event) -> Classification:
    """Return the classification of *event*, from which its record derives.

    Raises:
        ValueError: Its class declares none.
        TypeError: It is no event.
    """
    if not isinstance(event, Event):
        raise TypeError(f"event must be an Event, not {type(event).__name__}")
    classification = event.classify()
    if classification is None:
        raise ValueError(
            f"{quoted(event.name)} is none of the library's events and declares no classification: "
            "declare one, classification = Classification(activity=..., message=...), in the body "
            "of its class, or leave it out of the events that you subscribe to"
        )
    return classification


def account(event: Event) -> str | None:
    """Return the id of the account that the event is about."""
    return event.subject_id or _text(event, "user_id")


def administrator(event: Event) -> str | None:
    """Return the id of the administrator who did it, if one did and the context says which."""
    return event.context.actor_id if event.actor == "admin" else None


def session(event: Event) -> str | None:
    """Return the public id of the session that the event is about."""
    return _text(event, "session_id")


def method(event: Event) -> str:
    """Return how the user was authenticated."""
    named = _text(event, "method")
    return "password" if named is None else named


def identifier(event: Event, *, unknown: bool) -> str | None:
    """Return what was typed into the login form, if an account has it or *unknown* ones are wanted.

    Warning: people type their password into that box.
    """
    typed = _text(event, "identifier") or ""
    return typed[:_MAX_IDENTIFIER_LENGTH] if unknown or account(event) else None


def reason(event: Event, classification: Classification) -> FailureReason | None:
    """Return why it was refused: by the event itself, or else by its class."""
    if classification.outcome == "success":
        return None
    own: FailureReason | None = getattr(event, "reason", None)
    return own if own in get_args(FailureReason) else classification.reason


def details(event: Event, classification: Classification, *more: str) -> dict[str, Any]:
    """Return what a standard has no field for. Named one by one, so that nothing else gets out."""
    names: tuple[str, ...] = ("actor",)
    if classification.resource is None:
        names = ("everywhere", "generation", "retry_after", "sessions_ended", "actor", *more)
    values = {name: plain(getattr(event, name, None), f"{event.name}.{name}") for name in names}
    values["known_device"] = event.context.known_device
    return {name: value for name, value in values.items() if value is not None}


def resource(event: Event, classification: Classification) -> dict[str, str]:
    """Return the kind of thing that was acted upon, as ``type``, and its id as ``uid``."""
    if classification.resource is None:
        return {}
    field = classification.resource_id
    uid = None if field is None else plain(getattr(event, field), f"{event.name}.{field}")
    return {"type": classification.resource} | ({} if uid is None else {"uid": str(uid)})


def clean(text: str) -> str:
    """Return *text* with a replacement for each character that no standard permits."""
    return _FORBIDDEN.sub("\ufffd", text)


def tidy(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its empty members, its texts clean."""
    members = ((name, _tidied(value)) for name, value in record.items())
    return {name: value for name, value in members if value not in (None, "", [], {})}


def _tidied(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return tidy(value)
    if isinstance(value, list):
        return [_tidied(each) for each in value]
    return clean(value) if isinstance(value, str) else value


def _text(event: Event, name: str) -> str | None:
    """Return a field that the library's events have; another class may give it another type."""
    value = getattr(event, name, None)
    return value if isinstance(value, str) else None
