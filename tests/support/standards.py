"""What the tests of the formats share: events of every kind, and the pinned rules of the standards.

The files in ``fixtures`` are JSON Schemas of the parts of each standard that we use. `violations`
knows the few keywords they are written in and refuses any other, so that no rule is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

from hypothesis import strategies as st

from tests.support.app import User
from tortoise_auth import RequestContext
from tortoise_auth.events import Event, UserEvent, UserLoginFailed
from tortoise_auth.events.catalog import Actor, FailureReason, declared_events

LIBRARY = [each for each in declared_events() if each.__module__.startswith("tortoise_auth.")]
"""Every event of the library."""

FULL = RequestContext(ip="203.0.113.7", user_agent="Firefox", request_id="r-1")
EVENT_ID = UUID("6f1c6dd2-4a3b-4a53-9d2e-0d0a3c1e1f00")
OCCURRED = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
MILLISECONDS, SECONDS = 1767268800123, 1767268800
"""`OCCURRED` since the epoch."""

CANARY = "kanarienvogel-7f3a"
"""Text that no format may contain."""

FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Control characters, surrogates, and the noncharacters of the first plane."""

_VALUES: Mapping[str, Any] = {
    "session_id": "s-1",
    "generation": 3,
    "sessions_ended": 2,
    "identifier": "eve@example.com",
    "reason": "not_found",
    "retry_after": 1.5,
}


def sample(kind: type[Event], **values: Any) -> Any:
    """Return an event of one class; what *values* does not name has a value like any other."""
    names = {each.name for each in fields(kind)}
    given: dict[str, Any] = {"id": EVENT_ID, "occurred_at": OCCURRED, "subject_id": "7"}
    given["context"] = FULL
    given |= {name: _VALUES[name] for name in _VALUES.keys() & names}
    if issubclass(kind, UserEvent):
        given["user"] = User(id=7, email=f"{CANARY}@example.com", password=f"!{CANARY * 2}")
    return kind(**given | {name: value for name, value in values.items() if name in names})


def variants() -> Iterator[Any]:
    """Yield every event of the library, for every actor and reason, in and out of a request."""
    for kind in LIBRARY:
        for context in (FULL, RequestContext()):
            for actor in get_args(Actor):
                for reason in get_args(FailureReason) if kind is UserLoginFailed else [None]:
                    for subject_id in ("7", None) if not issubclass(kind, UserEvent) else ["7"]:
                        given = {"context": context, "actor": actor, "subject_id": subject_id}
                        yield sample(kind, **given, **({"reason": reason} if reason else {}))


hostile = st.text(
    st.characters() | st.sampled_from('\0\n\r\t\x1b\x7f\x85\ud800\udfff\ufdd0\uffff\u202e"\\%'),
    max_size=40,
)
"""Any text that a client may send."""


def _after_the_epoch(milliseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)


@st.composite
def hostile_events(draw: st.DrawFn) -> Any:
    """An event of the library in which every text is hostile."""
    texts = st.none() | hostile
    addresses = st.ip_addresses().map(str)
    return sample(
        draw(st.sampled_from(LIBRARY)),
        actor=draw(st.sampled_from(get_args(Actor))),
        context=RequestContext(
            ip=draw(st.none() | addresses),
            user_agent=draw(texts),
            request_id=draw(texts),
            actor_id=draw(texts),
            known_device=draw(st.none() | st.booleans()),
        ),
        occurred_at=draw(st.integers(0, 1 << 40).map(_after_the_epoch)),
        subject_id=draw(texts),
        user_id=draw(texts),
        identifier=draw(hostile),
        session_id=draw(hostile),
        method=draw(hostile),
        reason=draw(st.sampled_from(get_args(FailureReason))),
        sessions_ended=draw(st.integers()),
        retry_after=draw(st.floats(allow_nan=False, allow_infinity=False)),
    )


def as_sent(record: Any) -> Any:
    """Return what a receiver of *record* reads, which must be the same: plain JSON, in UTF-8."""
    sent = json.dumps(record, allow_nan=False, ensure_ascii=False).encode("utf-8")
    received = json.loads(sent)
    assert received == record
    return received


def texts(record: Any) -> Iterator[str]:
    """Yield every text in *record*, names of members included."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for name, value in record.items():
            yield from (name, *texts(value))
    elif isinstance(record, list):
        for value in record:
            yield from texts(value)


@cache
def standard(file: str) -> Mapping[str, Any]:
    """Return one of the fixtures."""
    path = Path(__file__).parent / "fixtures" / file
    rules: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return rules


def violations(value: Any, file: str, definition: str) -> list[str]:
    """Return what is wrong with *value* by the rules of one definition in a fixture."""
    return list(_wrong(value, {"$ref": f"#/$defs/{definition}"}, standard(file), "$"))


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
}
_KNOWN = frozenset(
    "$ref type const enum anyOf allOf required properties additionalProperties items minItems "
    "minLength minProperties maxProperties pattern format".split()
)


def _wrong(value: Any, schema: Any, root: Mapping[str, Any], where: str) -> Iterator[str]:
    if isinstance(schema, bool):
        if not schema:
            yield f"{where} must not be there"
        return
    assert schema.keys() <= _KNOWN, f"unknown keywords in {schema}"
    if "$ref" in schema:
        definition = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        yield from _wrong(value, definition, root, where)
    kind = schema.get("type")
    if kind and (not isinstance(value, _TYPES[kind]) or (kind == "integer" and value is True)):
        yield f"{where} is no {kind}: {value!r}"
        return
    yield from _wrong_in_itself(value, schema, where)
    for each in schema.get("allOf", []):
        yield from _wrong(value, each, root, where)
    choices = [list(_wrong(value, each, root, where)) for each in schema.get("anyOf", [])]
    if choices and all(choices):
        yield f"{where} is none of these: {choices}"
    if isinstance(value, dict):
        yield from _wrong_members(value, schema, root, where)
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _wrong(each, schema.get("items", True), root, f"{where}[{number}]")


def _wrong_in_itself(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    rules: dict[str, Callable[[Any], bool]] = {
        "const": lambda wanted: value == wanted and type(value) is type(wanted),
        "enum": lambda wanted: value in wanted and type(value) in {type(each) for each in wanted},
        "minItems": lambda least: len(value) >= least,
        "minLength": lambda least: len(value) >= least,
        "minProperties": lambda least: len(value) >= least,
        "maxProperties": lambda most: len(value) <= most,
        "pattern": lambda wanted: re.search(wanted, value) is not None,
        "format": lambda wanted: wanted == "ip" and _is_ip(value),
    }
    for keyword in schema.keys() & rules.keys():
        if not rules[keyword](schema[keyword]):
            yield f"{where} breaks {keyword} {schema[keyword]!r}: {value!r}"


def _wrong_members(
    value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> Iterator[str]:
    known = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}.{name} is missing"
    for name, each in value.items():
        rule = known.get(name, schema.get("additionalProperties", True))
        yield from _wrong(each, rule, root, f"{where}.{name}")


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text
