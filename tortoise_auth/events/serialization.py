"""Events as JSON and back: a small, closed set of types, so that nothing else slips in."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import (
    Collection,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
    Set,
)
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, fields
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tortoise_auth.context import RequestContext
from tortoise_auth.legible import describe, legible

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_ARRAYS: Mapping[Any, type] = {
    **{kind: kind for kind in (tuple, list, set, frozenset)},
    Sequence: tuple,  # what an event is made of should not change, and has a hash
    Collection: tuple,
    MutableSequence: list,
    Set: frozenset,
    MutableSet: set,
}
_MAX_BITS = 14_000  # Python reads 4300 digits (CVE-2020-10735), which are 14 284 bits
_MAX_DEPTH = 29  # MariaDB reads 32 levels, and two of them are the event's own
_OBJECTS = frozenset({dict, Mapping, MutableMapping})


def plain(value: object, where: str) -> Any:  # noqa: ANN401 - JSON
    """Return *value* as JSON holds it.

    Raises:
        TypeError: It is of a type that an event must not carry; the message names *where*.
    """
    match value:
        # First: an `IntEnum` is an int, too, and a `StrEnum` is text.
        case Enum():
            return plain(value.value, where)
        case float() if not math.isfinite(value):
            raise TypeError(f"{where} holds {value}, which JSON cannot")
        case None | bool() | int() | float() | str():
            return value
        case UUID() | Decimal():
            return str(value)
        case datetime():
            return value.isoformat()
        case RequestContext():
            return asdict(value)
        case Mapping():
            members = {_name(key, where): plain(each, where) for key, each in value.items()}
            if len(members) < len(value):
                raise TypeError(f"{where} has two keys that are the same in JSON")
            return members
        case Sequence() | Set() if not isinstance(value, bytes | bytearray | memoryview):
            return [plain(each, where) for each in value]
        case _:
            raise TypeError(
                f"{where} holds a {type(value).__name__}; an event carries ids and plain values "
                "(text, numbers, UUID, datetime, Decimal, Enum, lists and dicts of them)"
            )


def require_storable(event: DataclassInstance) -> None:
    """Reject an event with a value that some database, or JSON, could not hold or give back.

    PostgreSQL holds no NUL in text, UTF-8 no lone surrogate, and Python reads no number of more
    than 4300 digits.

    Raises:
        ValueError: The message names the field.
    """
    for field in fields(event):
        if not field.metadata.get("live"):
            _require_storable(getattr(event, field.name), f"{type(event).__name__}.{field.name}", 0)


def _require_storable(value: object, where: str, depth: int) -> None:
    match value:
        case str() if "\0" in value or not _is_unicode(value):
            raise ValueError(
                f"{where} holds a NUL character or a lone surrogate, which not every database can "
                "store"
            )
        case int() if value.bit_length() > _MAX_BITS:
            raise ValueError(f"{where} holds a number that is too long for JSON")
        case str() | bytes() | bytearray() | memoryview():
            return
        case Mapping() | Sequence() | Set() if depth > _MAX_DEPTH:
            raise ValueError(f"{where} is nested too deep for JSON")
        case Mapping():
            for key, each in value.items():
                _require_storable(key, where, depth + 1)
                _require_storable(each, where, depth + 1)
        case Sequence() | Set():
            for each in value:
                _require_storable(each, where, depth + 1)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def restored(cls: type, names: Sequence[str], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of *cls* that *data* holds, in the types it declares.

    Raises:
        ValueError: A value does not fit its type, or a field without a default is missing.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name in names:
        if name not in data:
            continue
        try:
            values[name] = _as(hints[name], data[name])
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{cls.__name__}.{name}: {legible(describe(error), 200)}") from None
    missing = [name for name in names if name not in values and _is_required(cls, name)]
    if missing:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}")
    return values


def _as(hint: Any, value: Any) -> Any:  # noqa: ANN401
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return _as_one_of(inner, value)
    if kind is typing.Literal and value not in inner:
        raise ValueError(f"it is none of {', '.join(map(repr, inner))}")
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return tuple(_as(*each) for each in zip(inner, _json(list, value), strict=True))
    if kind in _ARRAYS:
        return _ARRAYS[kind](_as(inner[0] if inner else Any, each) for each in _json(list, value))
    if kind in _OBJECTS:
        of_key, of_member = inner or (Any, Any)
        members = _json(dict, value).items()
        return {_as_key(of_key, name): _as(of_member, each) for name, each in members}
    if kind is RequestContext:
        names = [each.name for each in fields(RequestContext)]
        values = restored(RequestContext, names, _json(dict, value))
        try:
            return RequestContext(**values)
        except ValueError:  # written by a program that took anything for an address
            return RequestContext(**{**values, "ip": None})
    if kind is UUID or kind is Decimal:
        return kind(_json(str, value))
    if kind is datetime:
        return datetime.fromisoformat(_json(str, value))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    # JSON has one kind of number, and JavaScript writes 1.0 as 1.
    if kind is float and type(value) is int:
        return value
    return _json(kind, value) if kind in (str, int, float, bool, types.NoneType) else value


def _as_one_of(hints: Sequence[Any], value: object) -> Any:  # noqa: ANN401
    """Return *value* as the member of a union that it is of already, or else as the first it fits."""
    for hint in sorted(hints, key=lambda hint: type(value) is not hint):
        with suppress(ValueError, TypeError, ArithmeticError):
            return _as(hint, value)
    raise ValueError(f"a {type(value).__name__} does not fit")


def _name(key: object, where: str) -> str:
    """Return a key of a mapping as JSON has it, which is text."""
    name = plain(key, where)
    if isinstance(name, list | dict):
        raise TypeError(
            f"{where} has a {type(key).__name__} as a key; take text, a number or an id"
        )
    return name if isinstance(name, str) else json.dumps(name)


def _as_key(hint: Any, name: str) -> Any:  # noqa: ANN401
    """Return the key that is written as *name*; where it may have been text, it was."""
    with suppress(ValueError, TypeError, ArithmeticError):
        return _as(hint, name)
    with suppress(ValueError, TypeError, ArithmeticError, RecursionError):
        return _as(hint, json.loads(name))
    raise ValueError("a key does not fit")


def _json(kind: type, value: Any) -> Any:  # noqa: ANN401
    """Return *value* if it is what JSON has for *kind*."""
    # Not `isinstance`: True is an int.
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} is not a {kind.__name__}")
    return value


def _is_required(cls: type, name: str) -> bool:
    declared: Field[Any] = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return declared.default is MISSING and declared.default_factory is MISSING
