"""Events as JSON: what may be in them, and what is refused on the way back."""

from __future__ import annotations

import json
from collections.abc import (
    Collection,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, StrEnum
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.app import User
from tests.support.catalogue import CATALOGUE, as_json, by_name, example_of
from tortoise_auth.context import RequestContext
from tortoise_auth.events import Event
from tortoise_auth.events.serialization import plain

SHELF = UUID(int=7)
CODES = (UUID(int=1), UUID(int=2))


class Size(Enum):
    SMALL = 1
    LARGE = 2


class Color(StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class ParcelPacked(Event):
    """Every type that an event may carry."""

    text: str = "text"
    number: int = 1
    weight: float = 1.5
    fragile: bool = True
    price: Decimal = Decimal("9.90")
    shelf: UUID = SHELF
    due: datetime = datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    size: Size = Size.LARGE
    color: Color = Color.RED
    lane: Literal["fast", "slow"] = "fast"
    nothing: None = None
    note: str | None = None
    limit: float | None = None
    owner: UUID | int | None = None
    tags: list[str] = field(default_factory=lambda: ["a", "b"])
    codes: tuple[UUID, ...] = CODES
    position: tuple[str, int] = ("A", 3)
    sizes: frozenset[Size] = frozenset({Size.SMALL})
    prices: dict[str, Decimal] = field(default_factory=lambda: {"net": Decimal("8.32")})
    labels: Mapping[str, list[int]] = field(default_factory=lambda: {"x": [1, 2]})
    whatever: Any = None
    either: str | list[str] = "one"


PARCEL = ParcelPacked()


@dataclass(frozen=True, kw_only=True)
class ShelfCounted(Event):
    """Lists of types that JSON has not, and what it has as keys."""

    owners: Sequence[UUID] = CODES
    counts: Sequence[int] = ()
    prices: Collection[Decimal] = (Decimal("1.10"),)
    colors: AbstractSet[Color] = frozenset({Color.RED})
    rows: MutableSequence[datetime] = field(default_factory=lambda: [datetime(2026, 1, 1)])  # noqa: DTZ001
    sizes: MutableSet[Size] = field(default_factory=lambda: {Size.LARGE})
    by_number: dict[int, str] = field(default_factory=lambda: {-1: "a", 10**30: "b"})
    by_weight: Mapping[float, int] = field(default_factory=lambda: {1.5: 1, 2.0: 2, 3: 3})
    by_id: Mapping[UUID, Sequence[UUID]] = field(default_factory=lambda: {SHELF: CODES})
    by_time: dict[datetime, int] = field(
        default_factory=lambda: {datetime(2026, 1, 1, tzinfo=UTC): 1}
    )
    by_price: dict[Decimal, int] = field(default_factory=lambda: {Decimal("1.10"): 1})
    by_size: dict[Size, int] = field(default_factory=lambda: {Size.SMALL: 1})
    by_color: MutableMapping[Color, int] = field(default_factory=lambda: {Color.RED: 1})
    by_lane: dict[Literal[1, "2"], int] = field(default_factory=lambda: {1: 1, "2": 2})
    by_answer: dict[bool | None, int] = field(default_factory=lambda: {True: 1, False: 2, None: 3})
    by_either: dict[UUID | int, int] = field(default_factory=lambda: {SHELF: 1, 2: 2})
    loose: dict = field(default_factory=lambda: {"1": {"2": 3}})  # type: ignore[type-arg]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def changed(**values: object) -> dict[str, Any]:
    return as_json(PARCEL) | values


class TestThereAndBack:
    def test_every_type(self) -> None:
        """An event of the host's with every type there is comes back equal, types and all."""
        restored = ParcelPacked.from_dict(as_json(PARCEL))
        assert restored == PARCEL
        for name, value in vars(PARCEL).items():
            assert type(getattr(restored, name)) is type(value)

    def test_members_and_keys(self) -> None:
        """Members of abstract types and keys come back as what the field declares."""
        event = ShelfCounted()
        restored = ShelfCounted.from_dict(as_json(event))
        assert restored == event
        for name, value in vars(event).items():
            assert type(getattr(restored, name)) is type(value)
        assert [type(key) for key in restored.by_either] == [UUID, int]

    def test_what_a_list_was(self) -> None:
        """A Sequence comes back as a tuple, and a Set as a frozenset."""
        event = ShelfCounted(counts=[1, 2], prices={Decimal(1)}, colors={Color.RED})
        restored = ShelfCounted.from_dict(as_json(event))
        assert (restored.counts, restored.prices) == ((1, 2), (Decimal(1),))
        assert restored.colors == event.colors == frozenset({Color.RED})

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        by_number=st.dictionaries(st.integers(), st.text()),
        by_weight=st.dictionaries(st.floats(allow_nan=False, allow_infinity=False), st.integers()),
        by_id=st.dictionaries(st.uuids(), st.lists(st.uuids()).map(tuple)),
        by_time=st.dictionaries(st.datetimes(timezones=st.just(UTC)), st.integers()),
        owners=st.lists(st.uuids()).map(tuple),
    )
    def test_any_members_and_keys(self, **values: Any) -> None:
        """Whatever the keys are, the event comes back equal."""
        event = ShelfCounted(**values)
        assert Event.from_dict(as_json(event)) == event

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        price=st.decimals(allow_nan=False, allow_infinity=False),
        weight=st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
        due=st.datetimes(timezones=st.timezones()),
        text=st.text(),
        tags=st.lists(st.text()),
        codes=st.lists(st.uuids()).map(tuple),
        owner=st.none() | st.uuids() | st.integers(),
        either=st.text() | st.lists(st.text()),
        sizes=st.frozensets(st.sampled_from(Size)),
        prices=st.dictionaries(st.text(), st.decimals(allow_nan=False, allow_infinity=False)),
        whatever=st.none() | st.booleans() | st.text() | st.lists(st.integers()),
    )
    def test_any_values(self, **values: Any) -> None:
        """Whatever such fields hold, the event comes back equal."""
        event = ParcelPacked(**values)
        assert Event.from_dict(as_json(event)) == event

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (Size.LARGE, 2),
            (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
            (Decimal("1.10"), "1.10"),
            (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00+00:00"),
            (
                RequestContext(ip="192.0.2.1", known_device=False),
                {
                    "ip": "192.0.2.1",
                    "user_agent": None,
                    "request_id": None,
                    "actor_id": None,
                    "known_device": False,
                },
            ),
            ({1: (True, None)}, {"1": [True, None]}),
            ({"x"}, ["x"]),
        ],
        ids=repr,
    )
    def test_as_json(self, value: object, expected: object) -> None:
        """Values become what one would write by hand."""
        actual = plain(value, "test")
        assert actual == expected
        assert json.loads(json.dumps(actual)) == expected


class TestRefusedOnTheWayOut:
    @pytest.mark.parametrize(
        "value",
        [
            b"raw",
            bytearray(b"raw"),
            memoryview(b"raw"),
            User(id=7, email="ada@example.com"),
            object(),
            timedelta(1),
            float("nan"),
            float("inf"),
            [float("-inf")],
            {"deep": [{"inside": object()}]},
        ],
        ids=[
            "bytes",
            "bytearray",
            "memory",
            "model",
            "object",
            "delta",
            "nan",
            "inf",
            "-inf",
            "deep",
        ],
    )
    def test_other_types(self, value: object) -> None:
        """Bytes, ORM objects and whatever else JSON has not are refused, naming the field."""
        event = ParcelPacked(whatever=value)
        with pytest.raises(TypeError, match=r"^parcel_packed\.whatever holds "):
            event.to_dict()

    @pytest.mark.parametrize(
        "key", [(1, 2), b"x", User(id=7), frozenset({1}), float("nan")], ids=repr
    )
    def test_keys(self, key: object) -> None:
        """A key that no text can stand for is refused, and not written as some text."""
        with pytest.raises(TypeError, match=r"^parcel_packed\.whatever (holds|has) "):
            ParcelPacked(whatever={key: 1}).to_dict()

    def test_keys_that_become_one(self) -> None:
        """Two keys of one text would lose a member."""
        with pytest.raises(TypeError, match=r"^parcel_packed\.whatever has two keys"):
            ParcelPacked(whatever={1: "a", "1": "b"}).to_dict()


class TestRefusedOnTheWayIn:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("owners", ["x"]),
            ("owners", {"a": 1}),
            ("counts", "12"),
            ("counts", ["1"]),
            ("colors", ["blue"]),
            ("by_number", {"x": "a"}),
            ("by_number", {"1.5": "a"}),
            ("by_number", {"true": "a"}),
            ("by_number", {"01": "a"}),
            ("by_number", {"9" * 5000: "a"}),
            ("by_number", {"[" * 5000: "a"}),
            ("by_id", {"x": []}),
            ("by_id", {str(SHELF): ["x"]}),
            ("by_size", {"3": 1}),
            ("by_lane", {"2.0": 1}),
        ],
        ids=range(15),
    )
    def test_wrong_members_and_keys(self, name: str, value: object) -> None:
        """A wrong member or key is refused like a wrong value, and not quoted."""
        data = as_json(ShelfCounted()) | {name: value}
        with pytest.raises(ValueError, match=rf"^ShelfCounted\.{name}: .{{1,80}}$"):
            Event.from_dict(data)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("id", "not a uuid"),
            ("id", 7),
            ("id", None),
            ("occurred_at", "yesterday"),
            ("occurred_at", 7),
            ("subject_id", 7),
            ("actor", "nobody"),
            ("actor", ["user"]),
            ("context", None),
            ("context", "x"),
            ("context", ["ip"]),
            ("context", {"ip": 7}),
            ("text", 7),
            ("text", None),
            ("number", "7"),
            ("number", 7.5),
            ("number", True),
            ("weight", "heavy"),
            ("weight", False),
            ("fragile", 1),
            ("price", "cheap"),
            ("price", 9.9),
            ("shelf", [1]),
            ("size", 3),
            ("size", []),
            ("color", "blue"),
            ("lane", "middle"),
            ("nothing", 0),
            ("note", 7),
            ("limit", "7"),
            ("owner", 1.5),
            ("tags", "ab"),
            ("tags", [1]),
            ("tags", {"a": 1}),
            ("codes", ["x"]),
            ("position", ["A"]),
            ("position", ["A", 3, 4]),
            ("position", ["A", "3"]),
            ("sizes", [7]),
            ("prices", ["net"]),
            ("prices", {"net": 1}),
            ("labels", {"x": ["1"]}),
            ("either", 7),
            ("either", [7]),
        ],
        ids=repr,
    )
    def test_wrong_values(self, name: str, value: object) -> None:
        """A value of another type than the field's is a `ValueError` that names the field."""
        with pytest.raises(ValueError, match=rf"^ParcelPacked\.{name}: "):
            Event.from_dict(changed(**{name: value}))

    def test_the_message_does_not_quote_what_was_typed(self) -> None:
        """An identifier of the wrong type, perhaps a password, is not repeated in the message."""
        failed = next(event for event in CATALOGUE if event.name == "user_login_failed")
        data = as_json(example_of(failed)) | {"identifier": ["hunter2"]}
        with pytest.raises(ValueError, match=r"UserLoginFailed\.identifier") as refused:
            Event.from_dict(data)
        assert "hunter2" not in str(refused.value)

    @by_name
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_anything_in_any_field(self, event: type[Event], data: st.DataObject) -> None:
        """Junk in a field gives an event of that very class, or a `ValueError`; nothing else."""
        original = as_json(example_of(event))
        name = data.draw(st.sampled_from(sorted(original)))
        junk = original | {name: data.draw(ANYTHING)}
        try:
            actual = Event.from_dict(junk)
        except ValueError:
            return
        assert type(actual) is event

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(data=ANYTHING)
    def test_anything_at_all(self, data: Any) -> None:
        """What is not an event is a `ValueError`, whatever it is."""
        with pytest.raises(ValueError, match="declared"):
            Event.from_dict(data)

    def test_ids_are_made_where_they_are_missing(self) -> None:
        """An event without an id or a time gets new ones."""
        data = as_json(PARCEL)
        del data["id"], data["occurred_at"]
        first, second = Event.from_dict(data), Event.from_dict(data)
        assert len({first.id, second.id, PARCEL.id}) == 3
        assert first.occurred_at.utcoffset() == timedelta(0)
