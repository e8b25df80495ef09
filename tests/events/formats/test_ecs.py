"""ECS: every event of the library as the Elastic Common Schema 9.4 wants it, whatever was typed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings

from tests.support.app import User
from tests.support.standards import (
    CANARY,
    EVENT_ID,
    FORBIDDEN,
    LIBRARY,
    OCCURRED,
    as_sent,
    hostile_events,
    sample,
    standard,
    texts,
    variants,
    violations,
)
from tortoise_auth import RequestContext
from tortoise_auth.events import (
    AccountLocked,
    AccountUnlocked,
    Event,
    LoginThrottled,
    NamedEvent,
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
from tortoise_auth.events.catalog import FailureReason
from tortoise_auth.events.formats import LIFECYCLE_EVENTS, ecs

FILE = "ecs-9.4.json"

EXPECTED: dict[type[Event], tuple[str, list[str], list[str], str]] = {
    UserLogin: ("event", ["authentication", "session"], ["start"], "success"),
    UserLoginFailed: ("event", ["authentication"], ["start"], "failure"),
    LoginThrottled: ("event", ["authentication"], ["start"], "failure"),
    AccountLocked: ("event", ["iam"], ["user", "change"], "success"),
    AccountUnlocked: ("event", ["iam"], ["user", "change"], "success"),
    UserLogout: ("event", ["authentication", "session"], ["end"], "success"),
    SessionRevoked: ("event", ["session"], ["end"], "success"),
    SessionRefreshed: ("event", ["session"], ["info"], "success"),
    RefreshTokenReused: ("alert", ["authentication", "session"], ["info"], "failure"),
    PasswordChanged: ("event", ["iam"], ["user", "change"], "success"),
    PasswordChangeFailed: ("event", ["iam"], ["user", "change"], "failure"),
    PasswordRehashed: ("event", ["iam"], ["user", "info"], "success"),
    UserRegistered: ("event", ["iam"], ["user", "creation"], "success"),
    UserDeactivated: ("event", ["iam"], ["user", "change"], "success"),
    UserActivated: ("event", ["iam"], ["user", "change"], "success"),
}
"""Kind, categories, types, outcome."""


@dataclass(frozen=True, kw_only=True)
class ParcelSentForEcs(Event):
    """An event of a host."""


def assert_conforms(record: dict[str, Any]) -> None:
    """Check a record against the fixture, and what a schema cannot say."""
    assert violations(as_sent(record), FILE, "document") == []
    categories, types = record["event"]["category"], record["event"]["type"]
    expected = [standard(FILE)["expected_types"][category] for category in categories]
    for each in types:
        assert all(each in allowed for allowed in expected)
    if categories == ["iam"]:
        assert len(set(types)) == 2
        assert "user" in types


class TestEveryEvent:
    def test_table_is_complete(self) -> None:
        """Every event of the library is in the table."""
        assert set(LIFECYCLE_EVENTS) == set(LIBRARY) == EXPECTED.keys()

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_place(self, kind: type[Event]) -> None:
        """Each event has the kind, categories, types and outcome of the table."""
        event = ecs(sample(kind))["event"]
        actual = (event["kind"], event["category"], event["type"], event["outcome"])
        assert actual == EXPECTED[kind]

    def test_conforms(self) -> None:
        """Every event, of any actor and in any request, keeps the rules of ECS 9.4."""
        records = [ecs(event) for event in variants()]
        assert len(records) >= 200
        for record in records:
            assert_conforms(record)

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_common_fields(self, kind: type[Event]) -> None:
        """A record has the time in ISO 8601 and UTC, the user, the source and the event."""
        record = ecs(sample(kind), service="shop")
        assert record["@timestamp"] == "2026-01-01T12:00:00.123456+00:00"
        assert record["ecs"] == {"version": "9.4.0"}
        assert record["event"]["action"] == kind.name
        assert record["event"]["id"] == str(EVENT_ID)
        assert record["event"]["provider"] == "tortoise_auth"
        assert record["event"]["dataset"] == "tortoise_auth.events"
        assert record["source"] == {"ip": "203.0.113.7", "address": "203.0.113.7"}
        assert record["user_agent"] == {"original": "Firefox"}
        assert record["http"] == {"request": {"id": "r-1"}}
        assert record["service"] == {"name": "shop"}
        assert "7" in record["related"]["user"]
        assert record["related"]["ip"] == ["203.0.113.7"]

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_pure(self, kind: type[Event]) -> None:
        """The same event gives the same record, whatever became of the one before."""
        event = sample(kind)
        first = ecs(event)
        kept = copy.deepcopy(first)
        for each in (first["event"]["category"], first["event"]["type"], first["event"], first):
            each.clear()
        assert ecs(event) == kept


class TestChecker:
    """The checks of this file can fail."""

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_damage_is_refused(self, kind: type[Event]) -> None:
        """A record without a required field, with an unknown one, or a wrong value is refused."""
        damaged = list(_damaged(ecs(sample(kind))))
        assert len(damaged) > 15
        for each in damaged:
            assert violations(each, FILE, "document"), each

    def test_wrong_combination(self) -> None:
        """A type that its category does not expect is refused."""
        record = ecs(sample(UserLogin))
        record["event"]["type"] = ["creation"]
        with pytest.raises(AssertionError):
            assert_conforms(record)


class TestTime:
    @pytest.mark.parametrize("hours", [-11.5, 0, 5.75])
    def test_zones(self, hours: float) -> None:
        """The time is the same moment in UTC, whatever zone the event was stamped in."""
        moment = OCCURRED.astimezone(timezone(timedelta(hours=hours)))
        text = ecs(sample(UserLogin, occurred_at=moment))["@timestamp"]
        assert text.endswith("+00:00")
        assert datetime.fromisoformat(text) == OCCURRED

    def test_one_form(self) -> None:
        """A whole second has its fraction, too, so that texts sort as times do."""
        moment = OCCURRED.replace(microsecond=0)
        text = ecs(sample(UserLogin, occurred_at=moment))["@timestamp"]
        assert text == "2026-01-01T12:00:00.000000+00:00"


class TestUser:
    @pytest.mark.parametrize("actor", ["user", "unauthenticated"])
    def test_oneself(self, actor: str) -> None:
        """A user that changes its own account, or tries to log in, is ``user``."""
        record = ecs(sample(UserLogout, actor=actor))
        assert record["user"] == {"id": "7"}
        assert record["labels"]["actor"] == actor

    @pytest.mark.parametrize("actor", ["admin", "system"])
    def test_target(self, actor: str) -> None:
        """An account that another actor changes is ``user.target``, and related."""
        record = ecs(sample(UserDeactivated, actor=actor))
        assert record["user"] == {"target": {"id": "7"}}
        assert record["related"]["user"] == ["7"]
        assert record["labels"]["actor"] == actor

    def test_administrator(self) -> None:
        """An administrator that the context names is ``user``, above its target, and related."""
        context = RequestContext(actor_id="9")
        record = ecs(sample(UserDeactivated, actor="admin", context=context))
        assert_conforms(record)
        assert record["user"] == {"id": "9", "target": {"id": "7"}}
        assert record["related"]["user"] == ["7", "9"]

    @pytest.mark.parametrize("actor", ["user", "system", "unauthenticated"])
    def test_signed_in_user_is_no_administrator(self, actor: str) -> None:
        """Who is signed in is named for what an administrator did, and for nothing else."""
        context = RequestContext(actor_id="9")
        assert "9" not in texts(ecs(sample(UserLogout, actor=actor, context=context)))

    @pytest.mark.parametrize(("known", "label"), [(True, "true"), (False, "false")])
    def test_device(self, known: bool, label: str) -> None:
        """Whether the device is known is a label, if that was found out."""
        record = ecs(sample(UserLogin, context=RequestContext(known_device=known)))
        assert_conforms(record)
        assert record["labels"]["known_device"] == label
        assert "known_device" not in ecs(sample(UserLogin))["labels"]

    def test_attempt(self) -> None:
        """A failed login names the account by its id and as it was typed, and both are related."""
        record = ecs(sample(UserLoginFailed, reason="bad_password", subject_id=None, user_id="9"))
        assert record["user"] == {"id": "9", "name": "eve@example.com"}
        assert record["related"]["user"] == ["9", "eve@example.com"]


class TestSource:
    @pytest.mark.parametrize(
        ("text", "ip"),
        [
            ("203.0.113.7", "203.0.113.7"),
            ("2001:db8::1", "2001:db8::1"),
        ],
    )
    def test_address(self, text: str, ip: str) -> None:
        """An IP address stands in its usual spelling, and as it was given."""
        record = ecs(sample(UserLogin, context=RequestContext(ip=text)))
        assert record["source"]["address"] == text
        (related,) = record["related"]["ip"]
        assert record["source"]["ip"] == related
        assert related == ip

    def test_no_request(self) -> None:
        """Outside of a request there is neither source, user agent nor request."""
        record = ecs(sample(UserLogin, context=RequestContext()))
        assert not {"source", "user_agent", "http"} & record.keys()


class TestDetail:
    @pytest.mark.parametrize("reason", get_args(FailureReason))
    def test_reason(self, reason: str) -> None:
        """A refused login has a reason."""
        assert ecs(sample(UserLoginFailed, reason=reason))["event"]["reason"] == reason

    def test_no_reason(self) -> None:
        """A success has no reason; a throttled login has one."""
        assert "reason" not in ecs(sample(UserLogin))["event"]
        assert ecs(sample(LoginThrottled))["event"]["reason"] == "throttled"

    def test_labels(self) -> None:
        """What ECS has no field for is a label, as text."""
        everywhere = sample(UserLogout, session_id=None, everywhere=True)
        assert ecs(everywhere)["labels"] == {
            "everywhere": "true",
            "sessions_ended": "2",
            "actor": "user",
        }
        assert ecs(sample(UserLogin))["labels"] == {
            "actor": "user",
            "method": "password",
            "session_id": "s-1",
        }
        assert ecs(sample(LoginThrottled))["labels"]["retry_after"] == "1.5"

    def test_not_json(self) -> None:
        """A number that JSON does not have is an error, as it is in ``to_dict``."""
        with pytest.raises(TypeError, match=r"login_throttled\.retry_after"):
            ecs(sample(LoginThrottled, retry_after=math.nan))

    @pytest.mark.parametrize("event", [ParcelSentForEcs(), NamedEvent.of("user_login", (), {})])
    def test_others(self, event: Event) -> None:
        """An event of the host's own, or one that only has the name of ours, is refused clearly."""
        with pytest.raises(ValueError, match=f"{event.name!r} is none of the library's"):
            ecs(event)


class TestSecrets:
    def test_user(self) -> None:
        """Neither the stored hash nor the e-mail address of the live user comes out."""
        for event in variants():
            assert CANARY not in repr(ecs(event, unknown_identifiers=True))

    @pytest.mark.parametrize("kind", [UserLoginFailed, LoginThrottled])
    def test_unknown_identifier(self, kind: type[Event]) -> None:
        """An identifier of no known account, perhaps a password, is included only on request."""
        event = sample(kind, identifier=CANARY, subject_id=None)
        record = ecs(event)
        assert CANARY not in repr(record)
        assert "user" not in record
        assert ecs(event, unknown_identifiers=True)["user"] == {"name": CANARY}


class TestHostile:
    @settings(max_examples=300, deadline=None)
    @given(event=hostile_events())
    @example(event=sample(UserLoginFailed, identifier="\0\ud800\r\n\x1b[2J\uffff"))
    def test_conforms(self, event: Event) -> None:
        """Any input gives a record that keeps the rules and holds no forbidden character."""
        record = ecs(event, unknown_identifiers=True)
        assert_conforms(record)
        assert not any(FORBIDDEN.search(text) for text in texts(record))

    def test_named_user_model(self) -> None:
        """A primary key may be any text."""
        event = sample(UserLogin, user=User(id=1), subject_id="a\nb\0c")
        assert ecs(event)["user"] == {"id": "a\ufffdb\ufffdc"}


def _damaged(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    document, event = (standard(FILE)["$defs"][name] for name in ("document", "event"))
    for name in document["required"]:
        yield {other: value for other, value in record.items() if other != name}
        yield {**record, name: None}
    for name in event["required"]:
        rest = {other: value for other, value in record["event"].items() if other != name}
        yield {**record, "event": rest}
    wrong: list[dict[str, Any]] = [
        {"kind": "incident"},
        {"category": ["login"]},
        {"category": "authentication"},
        {"type": []},
        {"outcome": "denied"},
        {"colour": "blue"},
    ]
    for changes in wrong:
        yield {**record, "event": {**record["event"], **changes}}
    yield {**record, "@timestamp": "2026-01-01T12:00:00"}
    yield {**record, "source": {"address": "x", "ip": "testclient"}}
    yield {**record, "labels": {"number": 7}}
    yield {**record, "colour": "blue"}
