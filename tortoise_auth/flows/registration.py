"""An account is created."""

from __future__ import annotations

from collections.abc import Mapping

from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.flows.core import Core
from tortoise_auth.users import UserT
from tortoise_auth.users.creation import CreationParts, create_account


async def create_user(
    core: Core[UserT],
    password: str | None,
    values: Mapping[str, object],
    context: RequestContext | None,
) -> UserT:
    """Create an account with the parts of the service. Emits ``user_registered``."""
    model = core.user_model
    parts = CreationParts(
        policy=core.policy, passwords=core.passwords, emitter=core.emitter, clock=core.clock
    )
    return await create_account(
        model,
        model.values_to_create(values),
        password,
        identifiers=model.identifiers(),
        parts=parts,
        context=current_context(context),
    )
