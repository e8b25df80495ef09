"""Accounts are deactivated, activated and unlocked."""

from __future__ import annotations

from tortoise_auth.context import RequestContext
from tortoise_auth.events.catalog import AccountUnlocked, Actor, UserActivated, UserDeactivated
from tortoise_auth.flows.core import Core
from tortoise_auth.flows.logout import Revocation
from tortoise_auth.flows.password_check import PasswordCheck
from tortoise_auth.users import UserT
from tortoise_auth.users.changes import store_status, unlock_password


async def deactivate(
    core: Core[UserT], user: UserT, actor: Actor, context: RequestContext | None
) -> Revocation:
    """Deactivate an account and end its sessions. Emits ``user_deactivated``."""
    core.require_own(user, actor)
    ended = 0
    async with core.unit_of_work() as unit:
        if await store_status(user, unit, is_active=False, at=core.clock()):
            # The raised version has ended them already. They are marked, too, so that counts and
            # lists are true.
            ended = await core.sessions.revoke_all(user, unit.connection)
            unit.record(
                core.event(UserDeactivated, user, context, sessions_ended=ended, actor=actor)
            )
    return Revocation(ended, str(user.pk))


async def activate(
    core: Core[UserT], user: UserT, actor: Actor, context: RequestContext | None
) -> None:
    """Activate an account again. Emits ``user_activated``."""
    core.require_own(user, actor)
    async with core.unit_of_work() as unit:
        if await store_status(user, unit, is_active=True, at=core.clock()):
            unit.record(core.event(UserActivated, user, context, actor=actor))


async def unlock(
    core: Core[UserT],
    passwords: PasswordCheck[UserT],
    user: UserT,
    actor: Actor,
    context: RequestContext | None,
) -> None:
    """Reset the failures of an account, and unlock its password. Emits ``account_unlocked``."""
    core.require_own(user, actor)
    # First: the counters may be in another store. If that is down nothing has changed, and if the
    # process is killed here the password stays locked.
    await passwords.forget_failures(user)
    async with core.unit_of_work() as unit:
        if await unlock_password(user, unit):
            unit.record(core.event(AccountUnlocked, user, context, actor=actor))
