"""A password is exchanged for a session."""

from __future__ import annotations

from collections.abc import Mapping

from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.flows.core import Core
from tortoise_auth.flows.password_check import PasswordCheck, Verified
from tortoise_auth.flows.signin import AuthResult, Proof, sign_in
from tortoise_auth.users import UserT
from tortoise_auth.users.changes import replace_outdated_hash


async def login(
    core: Core[UserT],
    passwords: PasswordCheck[UserT],
    identifier: str,
    password: str,
    context: RequestContext | None,
    claims: Mapping[str, object] | None,
) -> AuthResult[UserT]:
    """Check a password and open a session. Emits ``user_login`` or ``user_login_failed``."""
    core.tokens.check_extra(claims or {})
    context = current_context(context)
    verified = await passwords.check_login(identifier, password, context)
    result = await sign_in(core, _proof(core, verified), context, claims)
    if result is None:
        # The password was changed or the account deactivated while the hash was computed.
        failed = passwords.login_failed(identifier, verified.user, context, "bad_password")
        raise await passwords.refuse(failed)
    return result


def _proof(core: Core[UserT], verified: Verified[UserT]) -> Proof[UserT]:
    async def replace_hash(unit: UnitOfWork) -> bool:
        if verified.replacement is not None:
            await replace_outdated_hash(
                verified.user, verified.replacement, unit, instead_of=verified.stored
            )
        return True

    return Proof(
        user=verified.user,
        method="password",
        amr=("pwd",),
        proven_at=core.clock(),
        spend=replace_hash,
    )
