"""Events as JSON and back: a small, closed set of types, so that nothing else slips in."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence, Set
from dataclasses import MISSING, Field, asdict
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from tortoise_auth.context import RequestContext


def plain(value: object, where: str) -> Any:  # noqa: ANN401 - JSON
    """Return *value* as JSON holds it.

    Raises:
        TypeError: It is of a type that an event must not carry; the message names *where*.
    """
    match value:
        case Enum():
            return plain(value.value, where)
        case None | bool() | int() | float() | str():
            return value
        case UUID() | Decimal():
            return str(value)
        case datetime():
            return value.isoformat()
        case RequestContext():
            return asdict(value)
        case Mapping():
            return {str(key): plain(each, where) for key, each in value.items()}
        case Sequence() | Set() if not isinstance(value, bytes | bytearray | memoryview):
            return [plain(each, where) for each in value]
        case _:
            raise TypeError(
                f"{where} holds a {type(value).__name__}; an event carries ids and plain values "
                "(text, numbers, UUID, datetime, Decimal, Enum, lists and dicts of them)"
            )


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
            raise ValueError(f"{cls.__name__}.{name}: {error}") from None
    missing = [name for name in names if name not in values and _is_required(cls, name)]
    if missing:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}")
    return values


def _as(hint: Any, value: Any) -> Any:  # noqa: ANN401
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _as(_first_fitting(arguments, value), value)
    if origin in (tuple, list, set, frozenset):
        inner = arguments[0] if arguments else Any
        return origin(_as(inner, each) for each in value)
    if hint is RequestContext:
        return RequestContext(**value)
    if hint is UUID or hint is Decimal:
        return hint(value)
    if hint is datetime:
        return datetime.fromisoformat(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return value


def _first_fitting(hints: Sequence[Any], value: object) -> Any:  # noqa: ANN401
    """Choose among the members of a union: one that the JSON value is of already, or else the first."""
    real = [hint for hint in hints if hint is not type(None)]
    return next((hint for hint in real if type(value) is hint), real[0])


def _is_required(cls: type, name: str) -> bool:
    declared: Field[Any] = cls.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return declared.default is MISSING and declared.default_factory is MISSING
