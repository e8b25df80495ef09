"""CloudEvents: every event as the specification wants it, and nothing but events back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tortoise_auth import RequestContext
from tortoise_auth.events import (
    Event,
    PasswordChanged,
    SessionRefreshed,
    UserDeactivated,
    UserEvent,
    UserLogin,
    UserLoginFailed,
)
from tortoise_auth.events.catalog import declared_events
from tortoise_auth.events.formats import (
    TYPE_PREFIX,
    CloudEventError,
    cloudevent,
    event_from_cloudevent,
    event_name,
)
from tortoise_auth.exceptions import TortoiseAuthError

SOURCE = "https://shop.example.com/auth"
NONCHARACTERS = [*range(0xFDD0, 0xFDF0)] + [
    plane << 16 | last for plane in range(17) for last in (0xFFFE, 0xFFFF)
]
FORBIDDEN = {*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), *NONCHARACTERS}
"""What a CloudEvents String must not hold (CloudEvents 1.0.2, "Type System")."""

REQUIRED: dict[str, Any] = {
    "session_id": "s-1",
    "generation": 3,
    "sessions_ended": 2,
    "identifier": "eve@example.com",
    "reason": "not_found",
    "retry_after": 1.5,
}
"""Values for the fields that some event has no default for."""


@dataclass(frozen=True, kw_only=True)
class ParcelSentForFormats(Event):
    """An event of a host."""

    parcel: UUID
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise LookupError("a parcel that weighs nothing")


def example(kind: type[Event]) -> Event:
    """Return an event of one class, with every kind of circumstance."""
    values: dict[str, Any] = {
        "subject_id": "7",
        "context": RequestContext(ip="203.0.113.7", user_agent="Firefox", request_id="r-1"),
    }
    if issubclass(kind, UserEvent):
        values["user"] = None
    names = {each.name for each in fields(kind)}
    return kind(**values, **{name: REQUIRED[name] for name in REQUIRED.keys() & names})


def login(**values: Any) -> UserLogin[Any]:
    return UserLogin(user=None, session_id="s-1", **{"subject_id": "7", **values})


def over_the_wire(envelope: Mapping[str, Any]) -> dict[str, Any]:
    received: dict[str, Any] = json.loads(json.dumps(envelope, allow_nan=False))
    return received


class TestEnvelope:
    def test_attributes(self) -> None:
        """The attributes are those of CloudEvents 1.0, and the data are the event's own dict."""
        event = login(
            id=UUID("6f1c6dd2-4a3b-4a53-9d2e-0d0a3c1e1f00"),
            occurred_at=datetime(2026, 1, 1, 12, tzinfo=UTC),
        )
        assert cloudevent(event, SOURCE) == {
            "specversion": "1.0",
            "id": "6f1c6dd2-4a3b-4a53-9d2e-0d0a3c1e1f00",
            "source": SOURCE,
            "type": f"{TYPE_PREFIX}user_login.v1",
            "time": "2026-01-01T12:00:00+00:00",
            "subject": "7",
            "datacontenttype": "application/json",
            "data": event.to_dict(),
        }

    @pytest.mark.parametrize("hours", [-11.5, 0, 5.75])
    def test_time(self, hours: float) -> None:
        """The time is RFC 3339 and the same moment, whatever zone the event was stamped in."""
        zone = timezone(timedelta(hours=hours))
        moment = datetime(2026, 2, 28, 23, 59, 59, 999999, tzinfo=zone)
        text = cloudevent(login(occurred_at=moment), SOURCE)["time"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
        assert datetime.fromisoformat(text) == moment

    @pytest.mark.parametrize("subject", [None, ""])
    def test_no_subject(self, subject: str | None) -> None:
        """An event about no account has no subject, because a subject must not be empty."""
        assert "subject" not in cloudevent(login(subject_id=subject), SOURCE)

    @given(st.text(st.characters(), min_size=1))
    def test_clean_subject(self, subject: str) -> None:
        """A subject holds no character that CloudEvents forbids, and every other one unchanged."""
        cleaned = cloudevent(login(subject_id=subject), SOURCE)["subject"]
        assert len(cleaned) == len(subject)
        for given_character, character in zip(subject, cleaned, strict=True):
            assert ord(character) not in FORBIDDEN
            assert character == ("\ufffd" if ord(given_character) in FORBIDDEN else given_character)

    def test_every_forbidden_character(self) -> None:
        """Exactly the forbidden characters are replaced among the first planes."""
        every = "".join(map(chr, range(0x30000)))
        cleaned = cloudevent(login(subject_id=every), SOURCE)["subject"]
        replaced = {ord(old) for old, new in zip(every, cleaned, strict=True) if old != new}
        assert replaced == {code for code in FORBIDDEN if code < 0x30000}

    @pytest.mark.parametrize("source", ["", " ", "two words", "shop\n", "tür", "%zz", "a\0b"])
    def test_bad_source(self, source: str) -> None:
        """What is no URI reference cannot be a source."""
        with pytest.raises(ValueError, match="URI reference"):
            cloudevent(login(), source)

    @pytest.mark.parametrize("source", ["/auth", "urn:uuid:6e8bc430", "a%20b", SOURCE + "?x=1#y"])
    def test_good_source(self, source: str) -> None:
        """Relative references, URNs and escapes are URI references."""
        assert cloudevent(login(), source)["source"] == source

    def test_no_secret_attribute(self) -> None:
        """What was typed into the login form is in the data, never in an attribute."""
        event = UserLoginFailed(identifier="hunter2", reason="not_found")
        envelope = cloudevent(event, SOURCE)
        data = envelope.pop("data")
        assert data["identifier"] == "hunter2"
        assert "hunter2" not in json.dumps(envelope)


class TestBack:
    @pytest.mark.parametrize(
        "kind",
        [each for each in declared_events() if each.__module__.startswith("tortoise_auth.")],
        ids=lambda kind: kind.name,
    )
    def test_round_trip(self, kind: type[Event]) -> None:
        """Every event of the library comes back equal, of its own class, without a user."""
        event = example(kind)
        envelope = over_the_wire(cloudevent(event, SOURCE))
        back = event_from_cloudevent(envelope)
        assert type(back) is kind
        assert back == event
        assert event_name(envelope) == kind.name

    def test_event_of_the_host(self) -> None:
        """A class of the host's own comes back as that class, its fields in their types."""
        event = ParcelSentForFormats(parcel=UUID(int=7))
        back = event_from_cloudevent(over_the_wire(cloudevent(event, SOURCE)))
        assert isinstance(back, ParcelSentForFormats)
        assert back.parcel == UUID(int=7)

    def test_newer_producer(self) -> None:
        """Attributes, extensions and fields that this program does not know are left out."""
        envelope = over_the_wire(cloudevent(login(), SOURCE))
        envelope |= {"traceparent": "00-1", "dataschema": "https://example.com/1"}
        envelope["data"] |= {"device": "phone", "context": {"planet": "Earth"}}
        assert isinstance(event_from_cloudevent(envelope), UserLogin)

    @given(st.text(st.characters(), max_size=40))
    def test_any_subject(self, subject: str) -> None:
        """The event keeps the subject as it was, even where the attribute had to be cleaned."""
        envelope = over_the_wire(cloudevent(login(subject_id=subject), SOURCE))
        assert event_from_cloudevent(envelope).subject_id == subject


class TestMalformed:
    @pytest.mark.parametrize("envelope", [None, 7, "text", b"{}", [], {}, {"specversion": 1.0}])
    def test_no_cloudevent(self, envelope: Any) -> None:
        """What is no CloudEvent 1.0 is refused with an error of ours, which is a ValueError too."""
        with pytest.raises(CloudEventError, match="is no CloudEvent") as caught:
            event_from_cloudevent(envelope)
        assert isinstance(caught.value, TortoiseAuthError)
        assert isinstance(caught.value, ValueError)
        assert caught.value.code == "cloudevent_error"

    @pytest.mark.parametrize("attribute", ["id", "source", "type"])
    @pytest.mark.parametrize("value", [None, "", 7, ["x"]])
    def test_missing_attribute(self, attribute: str, value: object) -> None:
        """A required attribute must be there, and be text that is not empty."""
        envelope = cloudevent(login(), SOURCE) | {attribute: value}
        with pytest.raises(CloudEventError, match=f"has no {attribute}"):
            event_name(envelope)

    @pytest.mark.parametrize(
        "kind",
        ["com.example.order.v1", TYPE_PREFIX, f"{TYPE_PREFIX}user_login", f"{TYPE_PREFIX}x.vy"],
    )
    def test_of_others(self, kind: str) -> None:
        """A CloudEvent of another type is recognised as such and holds no event of the library."""
        envelope = cloudevent(login(), SOURCE) | {"type": kind}
        assert event_name(envelope) is None
        with pytest.raises(CloudEventError, match="is not ours"):
            event_from_cloudevent(envelope)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"data": None}, "no data"),
            ({"data": "{}"}, "no data"),
            ({"data": {}}, "not that of its data"),
            ({"type": f"{TYPE_PREFIX}user_logout.v1"}, "not that of its data"),
            ({"type": f"{TYPE_PREFIX}user_login.v2"}, "not that of its data"),
            ({"id": "6f1c6dd2-4a3b-4a53-9d2e-0d0a3c1e1f00"}, "id of the CloudEvent"),
        ],
    )
    def test_contradiction(self, changes: dict[str, Any], reason: str) -> None:
        """An envelope that contradicts its data is refused, and the error names the attribute."""
        with pytest.raises(CloudEventError, match=reason):
            event_from_cloudevent(cloudevent(login(), SOURCE) | changes)

    @pytest.mark.parametrize(
        ("kind", "field", "value"),
        [
            (UserLogin, "id", 7),
            (UserLogin, "id", "not a uuid"),
            (UserLogin, "occurred_at", "yesterday"),
            (UserLogin, "occurred_at", {}),
            (UserLogin, "context", "here"),
            (UserLogin, "context", {"ip": []}),
            (SessionRefreshed, "generation", None),
            (UserDeactivated, "sessions_ended", []),
            (PasswordChanged, "schema_version", 99),
            (PasswordChanged, "name", "nobody_declared_this"),
            (ParcelSentForFormats, "weight", -1.0),
            (ParcelSentForFormats, "parcel", None),
        ],
    )
    def test_wrong_data(self, kind: type[Event], field: str, value: object) -> None:
        """Data that do not fit the class are refused, even when the class itself raises."""
        event = ParcelSentForFormats(parcel=UUID(int=7)) if kind is ParcelSentForFormats else None
        envelope = over_the_wire(cloudevent(event or example(kind), SOURCE))
        envelope["data"][field] = value
        data = envelope["data"]
        envelope["type"] = f"{TYPE_PREFIX}{data['name']}.v{data['schema_version']}"
        with pytest.raises(CloudEventError, match="does not hold an event"):
            event_from_cloudevent(envelope)

    def test_bounded_reason(self) -> None:
        """The text of the error does not repeat a message of any size."""
        envelope = cloudevent(login(), SOURCE)
        envelope["data"]["name"] = "x" * 1_000_000
        envelope["type"] = f"{TYPE_PREFIX}{envelope['data']['name']}.v1"
        with pytest.raises(CloudEventError) as caught:
            event_from_cloudevent(envelope)
        assert len(str(caught.value)) < 400

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        ),
        st.sampled_from([*login().to_dict(), "data"]),
    )
    def test_fuzzed(self, value: Any, field: str) -> None:
        """Any JSON gives an event or a `CloudEventError`, and no other error."""
        envelope = over_the_wire(cloudevent(login(), SOURCE))
        if field == "data":
            envelope["data"] = value
        else:
            envelope["data"][field] = value
        try:
            back = event_from_cloudevent(envelope)
        except CloudEventError:
            return
        assert isinstance(back, UserLogin)
