"""Every UPDATE of a row of the user model, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from pypika_tortoise.terms import Field
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.expressions import F
from tortoise.models import Model

from tortoise_auth.context import current_context
from tortoise_auth.database import connection_for
from tortoise_auth.events.catalog import PasswordRehashed
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.models import Session


def shared_connection(model: type[Model]) -> BaseDBAsyncClient:
    """Return the connection of the users of *model* and of sessions, which must be one.

    Raises:
        ConfigurationError: They live on two, so that no transaction can hold both.
    """
    users, sessions = connection_for(model), connection_for(Session)
    if users.connection_name != sessions.connection_name:
        raise ConfigurationError(
            f"{model.__name__} lives on the connection {users.connection_name!r}, "
            f"tortoise_auth.models on {sessions.connection_name!r}. A login writes to both in one "
            "transaction: register them on the same connection."
        )
    return users


async def store_password(
    user: Model,
    hashed: str,
    unit: UnitOfWork,
    *,
    instead_of: str | None = None,
    at: datetime,
) -> int | None:
    """Write a new hash and raise ``session_version``; nothing else of the row changes.

    Args:
        user: The account; its attributes change at the outermost commit.
        hashed: The new hash.
        unit: The unit of work to write in.
        instead_of: Write only if the stored hash is still this one.
        at: The time.

    Returns:
        The new ``session_version``; ``None`` if the stored hash is not *instead_of* any more.

    Raises:
        ValueError: There is no such row.
    """
    row = type(user).filter(pk=user.pk).using_db(unit.connection)
    matching = row if instead_of is None else row.filter(password=instead_of)
    changed = await matching.update(
        password=hashed,
        password_locked_at=None,
        # Added by the database: two changes at once must not end up with the same version.
        session_version=F("session_version") + 1,
        updated_at=at,  # `auto_now` is for `save` alone
    )
    if not changed:
        if await row.exists():
            return None
        raise ValueError(f"{user!r} is not in the database; save it before setting a password")
    # Our UPDATE holds the row until the end, so this is the version that it wrote.
    version = await stored_version(user, unit)
    unit.set_on_commit(user, password=hashed, password_locked_at=None, session_version=version)
    return version


async def stored_version(user: Model, unit: UnitOfWork) -> int:
    """Return ``session_version`` as this unit of work sees it."""
    rows = await type(user).filter(pk=user.pk).using_db(unit.connection).values("session_version")
    return int(rows[0]["session_version"])


async def replace_outdated_hash(
    user: Model, replacement: str, unit: UnitOfWork, *, instead_of: str
) -> None:
    """Replace the hash that was verified; a password that was changed meanwhile is left alone."""
    replaced = (
        await type(user)
        .filter(pk=user.pk, password=instead_of)
        .using_db(unit.connection)
        .update(password=replacement)
    )
    if replaced:
        unit.set_on_commit(user, password=replacement)
        unit.record(PasswordRehashed(user=user, subject_id=str(user.pk), context=current_context()))


async def store_login(user: Model, unit: UnitOfWork, *, session_version: int, at: datetime) -> bool:
    """Save ``last_login``, if nothing that decides about the login has changed since.

    Args:
        user: The account as it was read before its password was checked.
        unit: The unit of work to write in.
        session_version: ``session_version`` as it was read then.
        at: The time.

    Returns:
        False if the password was changed or locked, or the account deactivated meanwhile.
    """
    # One conditional UPDATE: PostgreSQL waits for another writer of the row and then compares with
    # what that has committed, where a SELECT before would show what was there earlier.
    unchanged = type(user).filter(
        pk=user.pk,
        session_version=session_version,
        is_active=True,
        password_locked_at__isnull=True,
    )
    if not await unchanged.using_db(unit.connection).update(last_login=at):
        return False
    unit.set_on_commit(user, last_login=at)
    return True


async def store_status(user: Model, unit: UnitOfWork, *, is_active: bool, at: datetime) -> bool:
    """Activate or deactivate an account, and raise ``session_version``.

    The version is raised at activation, too: not every program deactivates through the service.

    Returns:
        False if the account had this status already; then nothing was written.
    """
    row = type(user).filter(pk=user.pk, is_active=not is_active).using_db(unit.connection)
    changed = await row.update(
        is_active=is_active, session_version=F("session_version") + 1, updated_at=at
    )
    if not changed:
        return False
    version = await stored_version(user, unit)
    unit.set_on_commit(user, is_active=is_active, session_version=version)
    return True


async def lock_password(
    user_model: type[Model],
    identifier: str | None,
    user: Model | None,
    unit: UnitOfWork,
    *,
    at: datetime,
) -> bool:
    """Lock the password of an account, so that not even the right one logs in.

    Nothing is locked if the password was changed since *user* was read, or a login has succeeded,
    which breaks the row of failures.

    Args:
        user_model: The model of the account.
        identifier: What was typed, normalised.
        user: The account, as it was read before the attempt; ``None`` if there is none, which
            costs the same statement.
        unit: The unit of work to write in.
        at: The time.

    Returns:
        Whether it was locked now.
    """
    # By what people log in with: an account that does not exist has no key, and its statement must
    # be the same.
    field, held = user_model.identifier_field, identifier or ""  # type: ignore[attr-defined]
    password, last_login = "", None
    if user is not None:
        field, held = user.held_identifier()  # type: ignore[attr-defined]
        password, last_login = (getattr(user, name) for name in ("password", "last_login"))
    login = {"last_login__isnull": True} if last_login is None else {"last_login": last_login}
    row = user_model.filter(password=password, password_locked_at__isnull=True, **login)
    row = row.filter(**{field: held}).using_db(unit.connection)
    locked = bool(await row.update(password_locked_at=at))
    if user is not None and locked:
        unit.set_on_commit(user, password_locked_at=at)
    return locked


async def unlock_password(user: Model, unit: UnitOfWork) -> bool:
    """Unlock the password of an account; return False if it was not locked."""
    locked = type(user).filter(pk=user.pk, password_locked_at__isnull=False)
    if not await locked.using_db(unit.connection).update(password_locked_at=None):
        return False
    unit.set_on_commit(user, password_locked_at=None)
    return True


async def replace_values(
    user_model: type[Model],
    key: object,
    connection: BaseDBAsyncClient,
    *,
    read: Mapping[str, object],
    new: Mapping[str, object],
) -> bool:
    """Write columns of a row, if it still holds what was read.

    Past the fields, in the values of the driver: `EmailField` normalises what it compares with, and
    so matches no row that holds another spelling.

    Args:
        user_model: The model of the account.
        key: The primary key.
        connection: Where to write.
        read: What columns must still hold.
        new: What columns shall hold.

    Returns:
        False if the row was changed or deleted meanwhile; then nothing was written.
    """
    meta = user_model._meta
    query = connection.query_class.update(meta.basetable).where(Field(meta.db_pk_column) == key)
    for column, value in read.items():
        held = Field(column)
        query = query.where(held.isnull() if value is None else held == value)
    for column, value in new.items():
        query = query.set(column, value)
    changed, _ = await connection.execute_query(*query.get_parameterized_sql())
    return bool(changed)
