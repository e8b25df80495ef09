"""Events as CloudEvents 1.0, and back: for other programs of the same owner, through a broker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC
from typing import Any, ClassVar

from tortoise_auth.events.event import Event
from tortoise_auth.events.formats import reading
from tortoise_auth.exceptions import TortoiseAuthError
from tortoise_auth.legible import describe, quoted

TYPE_PREFIX = "io.github.tortoise_auth."
"""What the ``type`` of every CloudEvent of ours begins with."""

_URI_REFERENCE = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")

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
        envelope["subject"] = reading.clean(event.subject_id)
    return envelope


def event_from_cloudevent(envelope: Mapping[str, Any]) -> Event:
    """Return the event that a CloudEvent carries, of its own class, without the live user.

    Raises:
        CloudEventError: It is no CloudEvent, none of ours, of a class that is not declared here or
            is newer than the one here, or its data do not fit that class.
    """
    name, data = event_name(envelope), envelope.get("data")
    if name is None:
        raise CloudEventError("The CloudEvent is of a type that is not ours")
    if not isinstance(data, Mapping):
        raise CloudEventError("The CloudEvent has no data")
    # Brokers and `feed` choose by the type, handlers by the data: it must be one event.
    if envelope["type"] != _type(data.get("name"), data.get("schema_version")):
        raise CloudEventError("The type of the CloudEvent is not that of its data")
    try:
        event = Event.from_dict(data)
    except Exception as error:
        reason = describe(error)[:_MAX_REASON_LENGTH]
        raise CloudEventError(f"The CloudEvent does not hold an event: {reason}") from error
    # Brokers deduplicate by the one, handlers by the other.
    if envelope["id"] != str(event.id):
        raise CloudEventError("The id of the CloudEvent is not that of its event")
    return event


def event_name(envelope: object) -> str | None:
    """Return which of our events a CloudEvent carries; ``None`` if it is of another type.

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
            f"'https://shop.example.com/auth', not {quoted(text)}"
        )
    return text


def _type(name: object, version: object) -> str:
    return f"{TYPE_PREFIX}{reading.clean(str(name))}.v{version}"
