"""The catalogue: what each event carries, what handlers get of it, and what it never shows."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import typing
from dataclasses import FrozenInstanceError, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.accounts import PASSWORD
from tests.support.catalogue import ADA, CATALOGUE, as_json, by_name, example_of
from tortoise_auth import events
from tortoise_auth.context import RequestContext
from tortoise_auth.events import (
    Event,
    LoginThrottled,
    NamedEvent,
    PasswordChanged,
    UserEvent,
    UserLogin,
    UserLoginFailed,
    UserLogout,
)
from tortoise_auth.events.catalog import declared_events

VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(),
    RequestContext: st.builds(
        RequestContext,
        ip=st.none() | st.ip_addresses().map(str),
        user_agent=st.none() | st.text(),
        request_id=st.none() | st.text(),
    ),
    datetime: st.datetimes(timezones=st.timezones() | st.just(UTC)),
    float: st.floats(allow_nan=False, allow_infinity=False),
}


def value_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return what a field may hold by its type."""
    if typing.get_origin(hint) in (typing.Union, type(str | None)):
        return st.one_of(*map(value_of, typing.get_args(hint)))
    return VALUES[hint] if hint in VALUES else st.from_type(hint)


def instances(event: type[Event]) -> st.SearchStrategy[Event]:
    """Return events of a class with any values that their types allow."""
    hints = typing.get_type_hints(event)
    return st.builds(
        event,
        **{
            each.name: st.just(ADA) if each.metadata.get("live") else value_of(hints[each.name])
            for each in fields(event)
        },
    )


@dataclass(frozen=True, kw_only=True)
class InvoicePaid(Event):
    """An event of the host's own."""

    invoice_id: int
    currency: str = "EUR"


@dataclass(frozen=True, kw_only=True)
class InvoiceSent(Event):
    """One with a name, a version and a contract of its own."""

    name: ClassVar[str] = "billing.sent"
    schema_version: ClassVar[int] = 3
    positional: ClassVar[tuple[str, ...]] = ("invoice_id",)
    keywords: ClassVar[tuple[str, ...]] = ("currency",)

    invoice_id: int
    currency: str = "EUR"
    note: str = ""


class TestContract:
    @pytest.mark.parametrize(
        ("event", "arguments"),
        [
            (UserLogin(user=ADA, session_id="s-1"), ((ADA,), {})),
            (
                UserLoginFailed(identifier="ada", reason="not_found", user_id="7"),
                ((), {"identifier": "ada", "reason": "not_found"}),
            ),
            (UserLogout(user=ADA, session_id="s-1"), ((ADA,), {})),
            (PasswordChanged(user=ADA), ((ADA,), {})),
            (
                LoginThrottled(identifier="ada", retry_after=2.0),
                ((), {"identifier": "ada", "retry_after": 2.0}),
            ),
        ],
        ids=lambda value: getattr(value, "name", ""),
    )
    def test_arguments(self, event: Event, arguments: object) -> None:
        """By name a handler gets the arguments of the published contract, and no others."""
        assert event.arguments() == arguments

    @by_name
    def test_events_of_an_account_carry_the_user(self, event: type[Event]) -> None:
        """Every event about an account gives handlers the user, positionally, and a reason by name."""
        example = example_of(event)
        if isinstance(example, UserEvent):
            args, kwargs = example.arguments()
            assert args == (ADA,)
            assert kwargs.keys() <= {"reason"}
        else:
            assert example.arguments()[0] == ()
            assert set(example.arguments()[1]) <= {each.name for each in fields(event)}

    def test_names(self) -> None:
        """An event is named by its class, and no two are named alike; all are exported."""
        names = [event.name for event in CATALOGUE]
        assert {"user_login", "user_login_failed", "refresh_token_reused"} <= set(names)
        assert len(set(names)) == len(names)
        for event in CATALOGUE:
            assert event.name.replace("_", "") == event.__name__.lower()
            assert getattr(events, event.__name__) is event

    @by_name
    def test_common_fields(self, event: type[Event]) -> None:
        """Every event has an id of its own, an aware time, an actor and a context."""
        first, second = example_of(event), example_of(event)
        assert first.id != second.id
        assert first.occurred_at.utcoffset() == timedelta(0)
        assert first.actor in {"user", "admin", "system", "unauthenticated"}
        assert first.context == RequestContext()
        assert first.schema_version == 1

    @by_name
    def test_frozen(self, event: type[Event]) -> None:
        """No field of an event can be set."""
        example = example_of(event)
        for each in fields(event):
            with pytest.raises(FrozenInstanceError):
                setattr(example, each.name, None)

    @by_name
    def test_documented(self, event: type[Event]) -> None:
        """Each event says what it means and what its own fields are."""
        text = event.__doc__ or ""
        assert text[0].isupper()
        inherited = {each.name for each in fields(UserEvent)}
        for each in fields(event):
            assert each.name in inherited or f"{each.name}:" in text

    def test_copies(self) -> None:
        """An event can be copied with changes, hashed and pickled."""
        event = UserLoginFailed(identifier="ada", reason="not_found")
        assert dataclasses.replace(event, reason="inactive").reason == "inactive"
        assert copy.copy(event) == event
        assert pickle.loads(pickle.dumps(event)) == event
        assert len({event, copy.copy(event)}) == 1


class TestSecrecy:
    @by_name
    def test_no_field_for_a_secret(self, event: type[Event]) -> None:
        """No field is there for a password, token, key, code or hash."""
        names = {each.name for each in fields(event)}
        words = {word for name in names for word in name.split("_")}
        assert not words & {"password", "token", "key", "hash", "secret", "code", "credential"}

    @by_name
    def test_no_user_in_json(self, event: type[Event]) -> None:
        """The JSON holds no ORM object, and nothing of the account but what identifies it."""
        data = as_json(example_of(event))
        assert "user" not in data
        text = json.dumps({**data, "identifier": None})
        assert ADA.email not in text
        assert ADA.password not in text

    @by_name
    def test_repr(self, event: type[Event]) -> None:
        """``repr`` shows neither the user nor what was typed as identifier."""
        text = repr(example_of(event))
        assert text.startswith(event.__name__)
        assert "user=" not in text
        assert ADA.email not in text

    def test_repr_of_a_payload(self) -> None:
        """A payload without a class is not shown, because its contents are unknown."""
        event = NamedEvent.of("user_login_failed", (PASSWORD,), {"identifier": PASSWORD})
        assert PASSWORD not in repr(event)
        assert "'user_login_failed'" in repr(event)


class TestJson:
    @by_name
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_round_trip(self, event: type[Event], data: st.DataObject) -> None:
        """Through JSON and back an event is equal to itself, whatever its fields hold."""
        original = data.draw(instances(event))
        read = as_json(original)
        for restored in (Event.from_dict(read), event.from_dict(read)):
            assert type(restored) is event
            assert restored == original
            assert restored.to_dict() == original.to_dict()
            assert getattr(restored, "user", None) is None

    @by_name
    def test_keys(self, event: type[Event]) -> None:
        """The JSON has the name, the schema version, and every field but the live user."""
        expected = {each.name for each in fields(event)} - {"user"}
        data = as_json(example_of(event))
        assert set(data) == expected | {"name", "schema_version"}
        assert (data["name"], data["schema_version"]) == (event.name, 1)

    @by_name
    def test_unknown_fields_are_left_out(self, event: type[Event]) -> None:
        """What a newer program added is ignored, in the context too."""
        original = example_of(event)
        data = as_json(original)
        data["added_later"] = {"any": ["thing"]}
        data["context"]["added_later"] = 1
        assert Event.from_dict(data) == original

    @by_name
    def test_missing_fields(self, event: type[Event]) -> None:
        """Fields with a default may be missing; without a required one it is no such event."""
        data = as_json(example_of(event))
        for each in fields(event):
            if each.metadata.get("live"):
                continue
            less = {name: value for name, value in data.items() if name != each.name}
            optional = (
                each.default is not dataclasses.MISSING
                or each.default_factory is not dataclasses.MISSING
            )
            if optional:
                assert type(Event.from_dict(less)) is event
            else:
                with pytest.raises(ValueError, match=f"{event.__name__} needs {each.name}"):
                    Event.from_dict(less)

    @pytest.mark.parametrize("version", [2, None, "1", 1.0, True, [1]], ids=repr)
    def test_schema_versions(self, version: object) -> None:
        """What a newer program wrote under a newer version is refused; it may mean something else."""
        data = as_json(UserLogin(user=ADA, session_id="s-1")) | {"schema_version": version}
        with pytest.raises(ValueError, match="user_login has schema version"):
            Event.from_dict(data)

    def test_older_versions_are_read(self) -> None:
        """A class that has moved on still reads what was written before."""
        sent = InvoiceSent(invoice_id=7)
        assert Event.from_dict(as_json(sent) | {"schema_version": 1}) == sent

    @pytest.mark.parametrize(
        "data",
        [None, 7, "user_login", [], {}, {"name": "nobody_s"}, {"name": None}, {"name": ["x"]}],
        ids=repr,
    )
    def test_no_event(self, data: Any) -> None:
        """A value that is no event, or an undeclared one, is refused."""
        with pytest.raises(ValueError, match="is not the name of a declared Event"):
            Event.from_dict(data)

    def test_of_another_class(self) -> None:
        """A class reads its own events, and a base those of its subclasses."""
        data = as_json(UserLogin(user=ADA, session_id="s-1"))
        with pytest.raises(
            ValueError, match="'user_login' is not the name of a declared UserLogout"
        ):
            UserLogout.from_dict(data)
        assert isinstance(UserEvent.from_dict(data), UserLogin)

    @pytest.mark.parametrize("name", ["event", "user_event", "named_event"])
    def test_bases_are_not_events(self, name: str) -> None:
        """Bases and placeholders cannot be read from outside."""
        with pytest.raises(ValueError, match="not the name of a declared"):
            Event.from_dict({"name": name, "schema_version": 1, "session_id": "s-1"})


class TestHostEvents:
    def test_defaults(self) -> None:
        """A subclass is named in snake case, and its own fields are its keywords."""
        event = InvoicePaid(invoice_id=7)
        assert InvoicePaid.name == "invoice_paid"
        assert event.arguments() == ((), {"invoice_id": 7, "currency": "EUR"})
        assert InvoicePaid in declared_events()

    def test_a_contract_of_its_own(self) -> None:
        """Name, version, positional and keyword arguments can be chosen."""
        event = InvoiceSent(invoice_id=7, note="internal")
        assert event.arguments() == ((7,), {"currency": "EUR"})
        assert event.to_dict()["name"] == "billing.sent"
        assert event.to_dict()["schema_version"] == 3
        assert Event.from_dict(as_json(event)) == event

    def test_two_of_one_name(self) -> None:
        """A class reads its own events, even if another module has a class of the same name."""

        @dataclass(frozen=True, kw_only=True)
        class Elsewhere(Event):
            name: ClassVar[str] = "invoice_paid"

        for event in (InvoicePaid(invoice_id=7), Elsewhere()):
            assert type(event).from_dict(as_json(event)) == event

    def test_must_be_frozen(self) -> None:
        """Python itself refuses a subclass that could be changed."""
        with pytest.raises(TypeError, match="frozen"):

            @dataclass(kw_only=True)
            class Changeable(Event):  # type: ignore[misc]
                pass


class TestNamedEvent:
    def test_payload(self) -> None:
        """It has the name and the payload, which cannot be changed through it."""
        event = NamedEvent.of("order_paid", [7], {"amount": 9.5})
        assert event.arguments() == ((7,), {"amount": 9.5})
        assert event.name == "order_paid"
        with pytest.raises(TypeError):
            event.kwargs["amount"] = 1  # type: ignore[index]

    def test_json(self) -> None:
        """In JSON, what JSON cannot hold is named by its type; no ORM object gets through."""
        event = NamedEvent.of("order_paid", (ADA, 7, b"raw"), {"at": float("nan"), "ok": [1]})
        data = as_json(event)
        assert data["name"] == "order_paid"
        assert data["args"] == ["<User>", 7, "<bytes>"]
        assert data["kwargs"] == {"at": "<float>", "ok": [1]}
        assert data["id"] == str(event.id)
