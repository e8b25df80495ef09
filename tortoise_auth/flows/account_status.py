"""Accounts are deactivated and activated."""

from __future__ import annotations

from tortoise_auth.context import RequestContext
from tortoise_auth.events.catalog import Actor, UserActivated, UserDeactivated
from tortoise_auth.flows.core import Core
from tortoise_auth.flows.logout import Revocation
from tortoise_auth.users import UserT
from tortoise_auth.users.changes import store_status


async def deactivate(
    core: Core[UserT], user: UserT, actor: Actor, context: RequestContext | None
) -> Revocation:
    """Deactivate an account and end its sessions. Emits ``user_deactivated``."""
    core.require_own(user, actor)
    ended = 0
    async with core.unit_of_work() as unit:
        if await store_status(user, unit, is_active=False, at=core.clock()):
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
