"""A row of the user model is created: what its columns may hold, the insert, the event."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from tortoise.exceptions import BaseORMException, IntegrityError, ValidationError
from tortoise.fields import Field, JSONField
from tortoise.fields.relational import RelationalField
from tortoise.models import Model

from tortoise_auth.clock import Clock
from tortoise_auth.context import RequestContext, sanitize_text
from tortoise_auth.database import connection_for, is_unique_violation, violated_columns
from tortoise_auth.events.catalog import UserRegistered
from tortoise_auth.events.event_emitter import EventEmitter
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import IdentifierTakenError
from tortoise_auth.fields import UtcDatetimeField
from tortoise_auth.legible import listed
from tortoise_auth.passwords import PasswordHasher, PasswordPolicy, unusable_hash

ModelT = TypeVar("ModelT", bound=Model)

# Mass assignment (CWE-915): one more field in a form must not open or unlock an account.
_NOT_FOR_FORMS = frozenset(
    {
        "is_active",
        "session_version",
        "last_login",
        "password_locked_at",
        "created_at",
        "updated_at",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreationParts:
    """What creates an account: the parts of a user model, or of a service."""

    policy: PasswordPolicy
    passwords: PasswordHasher
    emitter: EventEmitter
    clock: Clock


async def create_account(
    model: type[ModelT],
    values: Mapping[str, object],
    password: str | None,
    *,
    identifiers: Collection[str],
    parts: CreationParts,
    context: RequestContext,
) -> ModelT:
    """Apply the password policy, hash, save, emit ``user_registered``.

    Args:
        model: The user model.
        values: The columns, checked and normalised.
        password: The password, or ``None`` for an account that cannot log in with one.
        identifiers: The columns that tell people apart.
        parts: What does it.
        context: Circumstances of the request.

    Raises:
        IdentifierTakenError: There is such an account.
        PasswordPolicyError: The password was refused.
        ValueError: The database refuses the row; the message names columns and no value.
    """
    # Hashed before the database knows whether the address is taken: a sign-up takes as long
    # either way (ASVS 6.3.8).
    if password is None:
        hashed = unusable_hash()
    else:
        words = [word for name in identifiers if isinstance(word := values.get(name), str)]
        await parts.policy.acheck(password, about=words)
        hashed = await parts.passwords.hash(password)
    try:
        async with UnitOfWork(connection_for(model), parts.emitter, clock=parts.clock) as unit:
            now = parts.clock()
            if isinstance(model._meta.fields_map.get("created_at"), UtcDatetimeField):
                values = {**values, "created_at": now}
            user = await model.create(password=hashed, using_db=unit.connection, **values)
            unit.record(
                UserRegistered(user=user, subject_id=str(user.pk), context=context, occurred_at=now)
            )
    except (IntegrityError, ValidationError) as error:
        refusal = await _refusal(model, error, identifiers)
    else:
        return user
    raise refusal  # outside of `except`: the text of what was caught quotes values


def refuse_unfit(model: type[Model], values: Mapping[str, object]) -> None:
    """Refuse columns that a form must not set, and those that do not exist.

    Raises:
        ValueError: There is one; the message names it.
    """
    protected = sorted(_NOT_FOR_FORMS & values.keys())
    if protected:
        raise ValueError(
            f"create_user() does not set {listed(protected)}: a form could smuggle it in. "
            "Set it on the saved user, or use AuthService.deactivate()."
        )
    meta = model._meta
    settable = meta.fields_db_projection.keys() | meta.fk_fields | meta.o2o_fields
    if unknown := sorted(values.keys() - settable):
        raise ValueError(
            f"{model.__name__} has no field {listed(unknown)} that create_user() can set. "
            f"It has: {', '.join(sorted(settable - _NOT_FOR_FORMS))}."
        )


def refuse_misfits(model: type[Model], values: Mapping[str, object]) -> None:
    """Refuse values that no database stores, or of another type than their column.

    Tortoise and drivers raise anything for them.

    Raises:
        ValueError: There is one; the message names its column.
    """
    unstorable = sorted(
        name for name, value in values.items() if isinstance(value, str) and not is_storable(value)
    )
    if unstorable:
        raise ValueError(
            f"{model.__name__}: {', '.join(unstorable)} holds a NUL character or a lone "
            "surrogate, which not every database can store"
        )
    misfits = sorted(
        name
        for name, value in values.items()
        if value is not None and not _fits(model, model._meta.fields_map[name], value)
    )
    if misfits:
        raise ValueError(f"{model.__name__}: {', '.join(misfits)} cannot hold such a value")


def is_storable(text: str) -> bool:
    """Return whether every database stores *text* as it is."""
    return sanitize_text(text, len(text)) == text


async def _refusal(
    model: type[Model], error: IntegrityError | ValidationError, identifiers: Collection[str]
) -> Exception:
    """Return what to raise for a row that was not written; it names columns and no value."""
    if isinstance(error, ValidationError):
        name = str(error).partition(":")[0]  # Tortoise puts it before all else
        column = name if name in model._meta.fields_db_projection else "a column"
        return ValueError(f"{model.__name__}: {column} cannot hold such a value, or needs one")
    if not is_unique_violation(error):
        return ValueError(
            f"{model.__name__}: the database refuses a value, by a foreign key or a check"
        )
    columns = model._meta.fields_db_projection
    taken = await violated_columns(error, model, connection_for(model))
    violated = {name for name in columns if columns[name] in taken}
    # A database that does not say which column it was most likely means the identifier.
    if not violated or violated & {*identifiers, model._meta.pk_attr}:
        return IdentifierTakenError()
    verb = "has a value" if len(violated) == 1 else "have values"
    return ValueError(
        f"{model.__name__}: {', '.join(sorted(violated))} {verb} that another account has"
    )


def _fits(model: type[Model], field: Field[Any], value: object) -> bool:
    if isinstance(field, RelationalField):
        return isinstance(value, field.related_model) and value.pk is not None
    try:
        if isinstance(field, JSONField):
            return _is_storable_json(field.to_db_value(value, model))
        held = field.to_python_value(value)
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        BaseORMException,
    ):
        return False
    least, most = (field.constraints.get(bound, held) for bound in ("ge", "le"))
    return not isinstance(held, int) or least <= held <= most


def _is_storable_json(text: str | bytes | None) -> bool:
    """Return whether every database takes JSON: PostgreSQL no NUL, no lone surrogate, no NaN.

    Raises:
        ValueError: It is no JSON.
    """
    todo = [json.loads(text or "null", parse_constant=_refuse_constant)]
    for each in todo:
        if isinstance(each, dict):
            todo += [*each, *each.values()]
        elif isinstance(each, list):
            todo += each
        elif isinstance(each, str) and not is_storable(each):
            return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
