"""Events in standard formats: CloudEvents 1.0 and back, for a SIEM, and for other providers.

`ocsf` and `ecs` are for systems that collect security events, `security_event_token` is for services
that must learn that a session or account of theirs ended here. All are pure functions, and all but
`cloudevent` derive what they say from the `Classification` of the event.
"""

# The modules are not named as the functions are: the import of a module sets its name in this one.
from tortoise_auth.events.event import Event, declared_events
from tortoise_auth.events.formats.cloudevents import (
    TYPE_PREFIX,
    CloudEventError,
    cloudevent,
    event_from_cloudevent,
    event_name,
    uri_reference,
)
from tortoise_auth.events.formats.ecs_documents import ECS_VERSION, ecs
from tortoise_auth.events.formats.ocsf_records import OCSF_VERSION, ocsf
from tortoise_auth.events.formats.security_event_tokens import security_event_token, set_claims

__all__ = [
    "ECS_VERSION",
    "LIFECYCLE_EVENTS",
    "OCSF_VERSION",
    "TYPE_PREFIX",
    "CloudEventError",
    "cloudevent",
    "ecs",
    "event_from_cloudevent",
    "event_name",
    "ocsf",
    "security_event_token",
    "set_claims",
    "uri_reference",
]

LIFECYCLE_EVENTS: tuple[type[Event], ...] = tuple(
    each
    for each in declared_events()
    if each.__module__.startswith("tortoise_auth.") and each.classification is not None
)
"""The library's events that OCSF, ECS and Security Event Tokens cover. Subscribe to these and to
the classes of your own that declare a classification."""
