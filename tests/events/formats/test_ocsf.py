"""OCSF: every event of the library as version 1.8 wants it, whatever was typed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, get_args

import pytest
from hypothesis import given, settings

from tests.support.app import User
from tests.support.standards import (
    CANARY,
    EVENT_ID,
    FORBIDDEN,
    LIBRARY,
    MILLISECONDS,
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
from tortoise_auth.events.formats import LIFECYCLE_EVENTS, ocsf

FILE = "ocsf-1.8.json"

EXPECTED: dict[type[Event], tuple[int, str, str, str | None]] = {
    UserLogin: (300201, "Success", "Informational", None),
    UserLoginFailed: (300201, "Failure", "Low", "USER_DOES_NOT_EXIST"),
    LoginThrottled: (300201, "Failure", "Medium", "ACCOUNT_LOCKED_OUT"),
    AccountLocked: (300109, "Success", "Medium", None),
    AccountUnlocked: (300112, "Success", "Informational", None),
    UserLogout: (300202, "Success", "Informational", "LOGOFF_USER_INITIATED"),
    SessionRevoked: (300202, "Success", "Informational", "LOGOFF_OTHER"),
    SessionRefreshed: (300299, "Success", "Informational", None),
    RefreshTokenReused: (300299, "Failure", "High", "REFRESH_TOKEN_REUSED"),
    PasswordChanged: (300103, "Success", "Informational", None),
    PasswordChangeFailed: (300103, "Failure", "Medium", "USER_DOES_NOT_EXIST"),
    PasswordRehashed: (300199, "Success", "Informational", None),
    UserRegistered: (300101, "Success", "Informational", None),
    UserDeactivated: (300105, "Success", "Informational", None),
    UserActivated: (300102, "Success", "Informational", None),
}
"""Type, status, severity, status detail."""


@dataclass(frozen=True, kw_only=True)
class ParcelSentForOcsf(Event):
    """An event of a host."""


@dataclass(frozen=True, kw_only=True)
class KioskLogin(UserLogin[User]):
    """A login with something of the host's own."""

    pin: str


def assert_conforms(record: dict[str, Any]) -> None:
    """Check a record against the fixture, and what a schema cannot say."""
    rules = standard(FILE)
    assert violations(as_sent(record), FILE, str(record["class_uid"])) == []
    assert record["type_uid"] == record["class_uid"] * 100 + record["activity_id"]
    assert record["status_id"] == rules["status_ids"][record["status"]]
    assert record["severity_id"] == rules["severity_ids"][record["severity"]]
    names = rules["activity_names"][str(record["class_uid"])]
    if record["activity_id"] == 99:
        assert record["activity_name"] not in names.values()
    else:
        assert record["activity_name"] == names[str(record["activity_id"])]


class TestEveryEvent:
    def test_table_is_complete(self) -> None:
        """Every event of the library is in the table."""
        assert set(LIFECYCLE_EVENTS) == set(LIBRARY) == EXPECTED.keys()

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_place(self, kind: type[Event]) -> None:
        """Each event has the class, activity, status and severity of the table."""
        record = ocsf(sample(kind))
        actual = (record["type_uid"], record["status"], record["severity"])
        assert (*actual, record.get("status_detail")) == EXPECTED[kind]

    def test_conforms(self) -> None:
        """Every event, of any actor and in any request, keeps the rules of OCSF 1.8."""
        records = [ocsf(event) for event in variants()]
        assert len(records) >= 200
        for record in records:
            assert_conforms(record)

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_common_attributes(self, kind: type[Event]) -> None:
        """A record has the time in milliseconds, the user, the source and the event."""
        record = ocsf(sample(kind), product="door", service="shop")
        assert record["time"] == MILLISECONDS
        assert record["user"]["uid"] == "7"
        assert record["src_endpoint"] == {"ip": "203.0.113.7"}
        assert record["http_request"] == {"user_agent": "Firefox", "uid": "r-1"}
        assert record["metadata"] == {
            "version": "1.8.0",
            "product": {"name": "door"},
            "uid": str(EVENT_ID),
            "event_code": kind.name,
            "correlation_uid": "r-1",
        }
        assert ("service" in record) == (record["class_uid"] == 3002)
        assert record.get("service", {"name": "shop"}) == {"name": "shop"}

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_pure(self, kind: type[Event]) -> None:
        """The same event gives the same record, whatever became of the one before."""
        event = sample(kind)
        first = ocsf(event)
        kept = copy.deepcopy(first)
        _spoil(first)
        assert ocsf(event) == kept


class TestChecker:
    """The checks of this file can fail."""

    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_damage_is_refused(self, kind: type[Event]) -> None:
        """A record without a required attribute, with an unknown one, or a wrong type is refused."""
        record = ocsf(sample(kind))
        damaged = list(_damaged(record))
        assert len(damaged) > 15
        for each in damaged:
            assert violations(each, FILE, str(record["class_uid"])), each

    def test_conditions(self) -> None:
        """An authentication without its service, and a user with neither id nor name, is refused."""
        record = ocsf(sample(UserLogin))
        without = {name: value for name, value in record.items() if name != "service"}
        assert violations(without, FILE, "3002")
        assert violations({**record, "user": {}}, FILE, "3002")
        assert violations({**record, "src_endpoint": {"ip": "here"}}, FILE, "3002")


class TestTime:
    @pytest.mark.parametrize("hours", [-11.5, 0, 5.75])
    def test_zones(self, hours: float) -> None:
        """The time is the same moment, whatever zone the event was stamped in."""
        moment = OCCURRED.astimezone(timezone(timedelta(hours=hours)))
        assert ocsf(sample(UserLogin, occurred_at=moment))["time"] == MILLISECONDS

    def test_exact(self) -> None:
        """Milliseconds are counted without rounding, also long from now."""
        moment = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=OCCURRED.tzinfo)
        assert ocsf(sample(UserLogin, occurred_at=moment))["time"] == 253402300799999


class TestDetail:
    @pytest.mark.parametrize("reason", get_args(FailureReason))
    def test_refusals(self, reason: str) -> None:
        """Each reason for a refused login has a word that OCSF documents, and its own as the code."""
        record = ocsf(sample(UserLoginFailed, reason=reason))
        assert record["status_code"] == reason
        assert record["status_detail"] in standard(FILE)["documented_status_details"]

    def test_refusals_differ(self) -> None:
        """An unknown account, a closed one and a wrong password have different records."""
        words = [
            ocsf(sample(UserLoginFailed, reason=reason))["status_detail"]
            for reason in ("not_found", "inactive", "bad_password", "locked")
        ]
        assert words == [
            "USER_DOES_NOT_EXIST",
            "ACCOUNT_DISABLED",
            "INVALID_CREDENTIALS",
            "ACCOUNT_LOCKED_OUT",
        ]

    def test_password(self) -> None:
        """A login by password says so, and that it was the only factor."""
        record = ocsf(sample(UserLogin))
        assert (record["auth_protocol_id"], record["auth_protocol"]) == (99, "password")
        assert record["auth_factors"] == [{"factor_type_id": 11, "factor_type": "Password"}]
        assert record["is_mfa"] is False

    def test_other_method(self) -> None:
        """An unknown method is given by its name alone."""
        record = ocsf(sample(UserLogin, method="passkey"))
        assert record["auth_protocol"] == "passkey"
        assert record["auth_factors"] == [{"factor_type_id": 99, "factor_type": "passkey"}]
        assert "is_mfa" not in record

    def test_actor(self) -> None:
        """A user that acts on its own account is the actor; without more only the kind of another."""
        own, other = ocsf(sample(SessionRevoked)), ocsf(sample(SessionRevoked, actor="admin"))
        assert own["actor"] == {"user": {"uid": "7"}}
        assert "actor" not in other
        assert other["unmapped"] == {"actor": "admin"}

    def test_administrator(self) -> None:
        """An administrator that the context names is the actor; no other event names who is signed in."""
        context = RequestContext(actor_id="9")
        record = ocsf(sample(SessionRevoked, actor="admin", context=context))
        assert_conforms(record)
        assert record["actor"] == {"user": {"uid": "9"}}
        assert record["user"] == {"uid": "7"}
        for actor in ("user", "system", "unauthenticated"):
            assert "9" not in texts(ocsf(sample(SessionRevoked, actor=actor, context=context)))

    @pytest.mark.parametrize("known", [True, False])
    def test_device(self, known: bool) -> None:
        """Whether the device is known is kept, if that was found out."""
        record = ocsf(sample(UserLogin, context=RequestContext(known_device=known)))
        assert_conforms(record)
        assert record["unmapped"]["known_device"] is known
        assert "known_device" not in ocsf(sample(UserLogin))["unmapped"]

    def test_unmapped(self) -> None:
        """What OCSF has no attribute for is kept with its name and type."""
        everywhere = ocsf(sample(UserLogout, session_id=None, everywhere=True))
        assert everywhere["unmapped"] == {"everywhere": True, "sessions_ended": 2, "actor": "user"}
        assert "session" not in everywhere
        assert ocsf(sample(LoginThrottled))["unmapped"]["retry_after"] == 1.5
        assert ocsf(sample(SessionRefreshed))["unmapped"]["generation"] == 3

    def test_default_service(self) -> None:
        """Without a service the product stands for it, since an authentication must name one."""
        assert ocsf(sample(UserLogin))["service"] == {"name": "tortoise-auth"}

    def test_not_json(self) -> None:
        """A number that JSON does not have is an error, as it is in ``to_dict``."""
        with pytest.raises(TypeError, match=r"login_throttled\.retry_after"):
            ocsf(sample(LoginThrottled, retry_after=math.inf))


class TestOthers:
    @pytest.mark.parametrize(
        "event", [ParcelSentForOcsf(), NamedEvent.of("user_login", (), {}), Event()]
    )
    def test_refused(self, event: Event) -> None:
        """An event of the host's own, or one that only has the name of ours, is refused clearly."""
        with pytest.raises(ValueError, match=f"{event.name!r} is none of the library's"):
            ocsf(event)

    def test_derived(self) -> None:
        """A class derived from an event of the library has its record, without added fields."""
        record = ocsf(KioskLogin(user=User(id=7), subject_id="7", session_id="s-1", pin=CANARY))
        assert record["type_uid"] == 300201
        assert record["metadata"]["event_code"] == "kiosk_login"
        assert CANARY not in repr(record)


class TestSecrets:
    def test_user(self) -> None:
        """Neither the stored hash nor the e-mail address of the live user comes out."""
        for event in variants():
            assert CANARY not in repr(ocsf(event, unknown_identifiers=True))

    @pytest.mark.parametrize("kind", [UserLoginFailed, LoginThrottled])
    def test_unknown_identifier(self, kind: type[Event]) -> None:
        """An identifier of no known account, perhaps a password, is included only on request."""
        event = sample(kind, identifier=CANARY, subject_id=None)
        assert CANARY not in repr(ocsf(event))
        assert ocsf(event)["user"] == {"name": "unknown"}
        assert ocsf(event, unknown_identifiers=True)["user"] == {"name": CANARY}

    def test_known_identifier(self) -> None:
        """An identifier of a known account is included, beside the account's id."""
        known = sample(UserLoginFailed, reason="bad_password", subject_id=None, user_id="9")
        assert ocsf(known)["user"] == {"uid": "9", "name": "eve@example.com"}

    def test_bounded(self) -> None:
        """The record stays small, however long the identifier."""
        event = sample(UserLoginFailed, identifier="x" * 1_000_000)
        assert ocsf(event, unknown_identifiers=True)["user"]["name"] == "x" * 320


class TestHostile:
    @settings(max_examples=300, deadline=None)
    @given(event=hostile_events())
    def test_conforms(self, event: Event) -> None:
        """Any input gives a record that keeps the rules and holds no forbidden character."""
        record = ocsf(event, unknown_identifiers=True)
        assert_conforms(record)
        assert not any(FORBIDDEN.search(text) for text in texts(record))


def _spoil(record: Any) -> None:
    """Empty a record and everything in it."""
    for each in list(record.values() if isinstance(record, dict) else record):
        if isinstance(each, dict | list):
            _spoil(each)
    record.clear()


def _damaged(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    base = standard(FILE)["$defs"]["base_event"]
    for name in [*base["required"], "user"]:
        yield {other: value for other, value in record.items() if other != name}
        yield {**record, name: None}
    yield {**record, "colour": "blue"}
    yield {**record, "time": record["time"] / 1000}
    yield {**record, "time": OCCURRED.isoformat()}
    yield {**record, "severity_id": 7}
    yield {**record, "category_uid": 4}
    yield {**record, "metadata": {**record["metadata"], "version": "1.9.0"}}
    yield {**record, "message": ""}
