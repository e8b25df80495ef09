"""Classifications: every event has one, each format derives from it, and mistakes are refused early."""

from __future__ import annotations

import importlib
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, get_args

import pytest

from tests.support.app import User
from tests.support.standards import (
    CANARY,
    LIBRARY,
    MILLISECONDS,
    as_sent,
    sample,
    standard,
    violations,
)
from tortoise_auth import events
from tortoise_auth.events import (
    Classification,
    Event,
    LoginThrottled,
    NamedEvent,
    PasswordChangeFailed,
    UserEvent,
    UserLogout,
    formats,
)
from tortoise_auth.events.classification import Activity, FailureReason, Severity, Signal
from tortoise_auth.events.formats import cloudevent, ecs, ocsf, set_claims

ACTIVITIES: tuple[Activity, ...] = get_args(Activity)


@dataclass(frozen=True, kw_only=True)
class InvoiceExported(Event):
    """An event of a host, about a thing of its own."""

    classification = Classification(
        activity="resource.export",
        message="An invoice was exported",
        severity="low",
        resource="invoice",
        resource_id="invoice_id",
    )

    invoice_id: int
    identifier: str = CANARY
    method: str = CANARY
    note: str = CANARY


@dataclass(frozen=True, kw_only=True)
class TrialExpired(UserEvent[User]):
    """An event of a host, about an account; other services are to end its sessions."""

    classification = Classification(
        activity="account.disable", message="The trial expired", signal="account-disabled"
    )


@dataclass(frozen=True, kw_only=True)
class ParcelSentUnclassified(Event):
    """An event of a host without a classification."""


def of(classification: Classification, **values: Any) -> Event:
    """Return an event of a new class of a host with this classification."""
    namespace = {"classification": classification, "__module__": __name__}
    kind: type[Event] = dataclass(frozen=True, kw_only=True)(type("OfTheHost", (Event,), namespace))
    event: Event = sample(kind, **values)
    return event


def conforms(event: Event) -> bool:
    """Whether an event keeps the rules of OCSF and of ECS."""
    record, document = ocsf(event), ecs(event)
    names = standard("ocsf-1.8.json")["activity_names"][str(record["class_uid"])]
    label = names.get(str(record["activity_id"]))
    assert label == record["activity_name"] or record["activity_id"] == 99
    assert violations(as_sent(record), "ocsf-1.8.json", str(record["class_uid"])) == []
    assert violations(as_sent(document), "ecs-9.4.json", "document") == []
    expected = standard("ecs-9.4.json")["expected_types"]
    for category in document["event"]["category"]:
        assert set(document["event"]["type"]) <= set(expected[category])
    return True


class TestLibrary:
    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_every_event_has_one(self, kind: type[Event]) -> None:
        """A new event of the library needs a classification, and with it has a form everywhere."""
        assert kind.classification is not None
        assert kind.classification.message[0].isupper()
        assert not kind.classification.message.endswith(".")
        event = sample(kind)
        assert conforms(event)
        assert cloudevent(event, "https://a.example")["data"] == event.to_dict()
        claims = set_claims(event, issuer="https://a.example", audience="shop")
        assert (claims is None) == (kind.classification.signal is None)

    @pytest.mark.parametrize("base", [Event, UserEvent, NamedEvent])
    def test_bases_have_none(self, base: type[Event]) -> None:
        """What is no event of its own has no classification that others could inherit unseen."""
        assert base.classification is None

    def test_of_one_event(self) -> None:
        """A classification may depend on what happened."""
        throttled = sample(LoginThrottled)
        assert throttled.classify() is LoginThrottled.classification
        change = replace(throttled, attempted="password_change").classify()
        assert change == replace(PasswordChangeFailed.classification, reason="throttled")
        assert sample(UserLogout).classify() is UserLogout.classification
        ended = sample(UserLogout, actor="admin").classify()
        assert ended.message == "The sessions of the user were ended"

    def test_exported(self) -> None:
        """A host imports it where it imports events, and cannot change one."""
        assert events.Classification is Classification
        with pytest.raises(FrozenInstanceError):
            UserLogout.classification.severity = "low"  # type: ignore[misc]

    def test_names_of_functions(self) -> None:
        """The functions keep their addresses, whatever modules of the package are imported."""
        for name in ("ocsf_records", "ecs_documents", "security_event_tokens", "cloudevents"):
            importlib.import_module(f"{formats.__name__}.{name}")
        for name in ("ocsf", "ecs", "security_event_token", "set_claims", "cloudevent"):
            assert callable(getattr(formats, name))


class TestHost:
    def test_ocsf(self) -> None:
        """An event about a thing of the host's is a Web Resources Activity that names that thing."""
        event: Event = sample(InvoiceExported, actor="user", subject_id="7", invoice_id=12)
        assert conforms(event)
        record = ocsf(event, unknown_identifiers=True)
        expected = {
            "category_uid": 6,
            "class_uid": 6001,
            "type_uid": 600107,
            "activity_name": "Export",
            "status": "Success",
            "severity": "Low",
            "message": "An invoice was exported",
            "time": MILLISECONDS,
            "actor": {"user": {"uid": "7"}},
            "web_resources": [{"name": "invoice", "type": "invoice", "uid": "12"}],
            "unmapped": {"actor": "user"},
        }
        assert {name: record[name] for name in expected} == expected
        assert record["metadata"]["event_code"] == "invoice_exported"

    def test_ecs(self) -> None:
        """In ECS it is an access by an API, and the thing is a label."""
        document = ecs(sample(InvoiceExported, actor="user", invoice_id=12))
        assert document["event"]["category"] == ["api"]
        assert document["event"]["type"] == ["access"]
        assert document["event"]["action"] == "invoice_exported"
        assert document["labels"]["resource_type"] == "invoice"
        assert document["labels"]["resource_uid"] == "12"
        assert document["user"] == {"id": "7"}

    def test_no_token(self) -> None:
        """Without a signal there is no Security Event Token."""
        event = sample(InvoiceExported, invoice_id=12)
        assert set_claims(event, issuer="https://a.example", audience="shop") is None

    def test_token(self) -> None:
        """With one there is, of the event type that it names."""
        claims = set_claims(sample(TrialExpired), issuer="https://a.example", audience="shop")
        assert claims is not None
        uri = "https://schemas.openid.net/secevent/risc/event-type/account-disabled"
        assert claims["events"] == {uri: {}}
        assert violations(as_sent(claims), "set-rfc8417.json", "claims") == []

    def test_only_what_is_declared_comes_out(self) -> None:
        """Fields of the host's stay out of OCSF and ECS, also if the library has some of that name."""
        event = replace(sample(InvoiceExported, invoice_id=12), identifier=CANARY)
        for convert in (ocsf, ecs):
            assert CANARY not in repr(convert(event, unknown_identifiers=True))

    @pytest.mark.parametrize("convert", [ocsf, ecs])
    def test_not_json(self, convert: Any) -> None:
        """An id that JSON cannot hold is an error that names the field."""
        with pytest.raises(TypeError, match=r"invoice_exported\.invoice_id"):
            convert(sample(InvoiceExported, invoice_id=object()))

    @pytest.mark.parametrize("activity", ACTIVITIES)
    @pytest.mark.parametrize("outcome", ["success", "failure"])
    def test_every_activity(self, activity: Activity, outcome: Any) -> None:
        """Each activity has a place in OCSF and ECS, whether it succeeded or not."""
        thing = "invoice" if activity.startswith("resource.") else None
        classification = Classification(
            activity=activity, message="It was done", outcome=outcome, resource=thing
        )
        event = of(classification)
        assert conforms(event)
        assert ocsf(event)["status"] == outcome.capitalize()
        assert ecs(event)["event"]["outcome"] == outcome

    @pytest.mark.parametrize("severity", get_args(Severity))
    def test_every_severity(self, severity: Severity) -> None:
        """What is high or critical is an alert in ECS."""
        event = of(Classification(activity="logon", message="It was done", severity=severity))
        assert ocsf(event)["severity"] == severity.capitalize()
        alert = severity in ("high", "critical")
        assert ecs(event)["event"]["kind"] == ("alert" if alert else "event")

    @pytest.mark.parametrize("signal", get_args(Signal))
    def test_every_signal(self, signal: Signal) -> None:
        """Each signal is an event type of CAEP or RISC."""
        event = of(Classification(activity="password.reset", message="It was done", signal=signal))
        claims = set_claims(event, issuer="https://a.example", audience="shop")
        assert violations(as_sent(claims), "set-rfc8417.json", "claims") == []

    @pytest.mark.parametrize("reason", get_args(FailureReason))
    def test_reason_of_the_class(self, reason: FailureReason) -> None:
        """A class may say why, for events that have no field for it."""
        event = of(Classification(activity="logon", message="No", outcome="failure", reason=reason))
        assert ocsf(event)["status_code"] == ecs(event)["event"]["reason"] == reason

    @pytest.mark.parametrize("convert", [ocsf, ecs])
    def test_unclassified(self, convert: Any) -> None:
        """An event without a classification is refused with what to do about it."""
        with pytest.raises(ValueError, match=r"declares no classification: .* Classification\(ac"):
            convert(ParcelSentUnclassified())
        assert cloudevent(ParcelSentUnclassified(), "https://a.example")["data"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ({"activity": "log on"}, "activity is 'log on'; allowed are 'logon', 'logoff', "),
            ({"outcome": "denied"}, "outcome is 'denied'; allowed are 'success', 'failure'"),
            ({"severity": 3}, "severity is 3; allowed are 'informational', 'low', 'medium', "),
            ({"reason": "hangover"}, "reason is 'hangover'; allowed are None, 'not_found', "),
            ({"signal": "session-ended"}, "signal is 'session-ended'; allowed are None, 'sessi"),
            ({"signal": "credential-change"}, "signal is 'credential-change', which goes with"),
            ({"message": " "}, "message is ' '; it must be a sentence"),
            ({"message": None}, "message is None; it must be a sentence"),
            ({"resource": 7}, "resource is 7; it must be text"),
            ({"resource": "invoice"}, "resource is 'invoice'; it goes with the 'resource.' activ"),
            ({"activity": "resource.read"}, "resource is None; it goes with the 'resource.' act"),
            ({"resource_id": "invoce_id"}, "resource_id is 'invoce_id'; fields are actor, conte"),
            ({"resource_id": "name"}, "resource_id is 'name'; fields are actor, context, "),
        ],
        ids=range(13),
    )
    def test_words(self, values: dict[str, Any], problem: str) -> None:
        """A word that no format knows is refused when the class is defined, with those there are."""
        given: dict[str, Any] = {"activity": "logon", "message": "It was done", **values}
        with pytest.raises(ValueError, match="ParcelLost") as refused:

            class ParcelLost(Event):
                classification = Classification(**given)

        where = f"{type(self).__name__}.test_words.<locals>.ParcelLost.classification: "
        assert str(refused.value).startswith(where + problem)

    @pytest.mark.parametrize("value", ["logon", {"activity": "logon"}, Classification])
    def test_something_else(self, value: Any) -> None:
        """What is no classification at all is refused with its type."""
        with pytest.raises(
            TypeError, match=r"ParcelLost.classification must be a Classification\("
        ):

            class ParcelLost(Event):
                classification = value

    def test_none(self) -> None:
        """A class derived from a classified one may have none, and stays out of the formats."""

        @dataclass(frozen=True, kw_only=True)
        class Unshipped(InvoiceExported):
            classification = None  # type: ignore[assignment]

        with pytest.raises(ValueError, match="'unshipped' is none of the library's"):
            ocsf(sample(Unshipped, invoice_id=1))
