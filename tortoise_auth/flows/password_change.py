"""A new password is stored, and all other sessions of the account end."""

from __future__ import annotations

from uuid import UUID

from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.events.catalog import Actor, PasswordChanged
from tortoise_auth.flows.core import Core, session_id_of
from tortoise_auth.flows.password_check import PasswordCheck
from tortoise_auth.models import Session
from tortoise_auth.users import UserT
from tortoise_auth.users.changes import store_password


async def set_password(
    core: Core[UserT],
    user: UserT,
    new_password: str,
    keep: Session | UUID | str | None,
    actor: Actor,
    context: RequestContext | None,
) -> None:
    """Store a new password without asking for the current one. Emits ``password_changed``."""
    core.require_own(user, actor)
    await core.policy.acheck(new_password, about=user.words_about())
    # Before the transaction, so that no row is locked while it is computed.
    hashed = await core.passwords.hash(new_password)
    await _replace(core, user, hashed, keep=keep, instead_of=None, actor=actor, context=context)


async def change_password(
    core: Core[UserT],
    passwords: PasswordCheck[UserT],
    user: UserT,
    current_password: str,
    new_password: str,
    keep: Session | UUID | str | None,
    context: RequestContext | None,
) -> None:
    """Check the current password, then store a new one. Emits ``password_changed``."""
    core.require_own(user)
    context = current_context(context)
    stored = await passwords.check_current(user, current_password, context)
    await core.policy.acheck(new_password, about=user.words_about())
    hashed = await core.passwords.hash(new_password)
    changed = await _replace(
        core, user, hashed, keep=keep, instead_of=stored, actor="user", context=context
    )
    # A reset was faster: what was checked is not the current password any more.
    if not changed:
        raise await passwords.refuse(passwords.change_failed(user, context, "bad_password"))


async def _replace(
    core: Core[UserT],
    user: UserT,
    hashed: str,
    *,
    keep: Session | UUID | str | None,
    instead_of: str | None,
    actor: Actor,
    context: RequestContext | None,
) -> bool:
    kept, now = session_id_of(keep), core.clock()
    async with core.unit_of_work() as unit:
        version = await store_password(user, hashed, unit, instead_of=instead_of, at=now)
        if version is not None:
            ended = await core.sessions.revoke_all(user, unit.connection, keep=kept)
            if kept is not None:
                await core.sessions.carry_over(kept, user, version, unit.connection)
            unit.record(
                core.event(PasswordChanged, user, context, sessions_ended=ended, actor=actor)
            )
    return version is not None
