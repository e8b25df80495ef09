"""A password is exchanged for a session."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Generic

from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.flows.core import Claims, Core
from tortoise_auth.flows.password_check import PasswordCheck, Verified
from tortoise_auth.flows.signin import AuthResult, Proof, require_lifetime, sign_in
from tortoise_auth.throttling import DatabaseThrottle
from tortoise_auth.users import UserT
from tortoise_auth.users.changes import replace_outdated_hash


async def login(
    core: Core[UserT],
    passwords: PasswordCheck[UserT],
    identifier: str,
    password: str,
    context: RequestContext | None,
    claims: Claims | None,
    lifetime: timedelta | None,
) -> AuthResult[UserT]:
    """Check a password and open a session. Emits ``user_login`` or ``user_login_failed``."""
    require_lifetime(lifetime)
    core.tokens.check_extra(claims or {})
    context = current_context(context)
    verified = await passwords.check_login(identifier, password, context)
    spending = _Spending(passwords, verified, within=passwords.resetting_in_login)
    try:
        await spending.begin()
        result = await sign_in(core, spending.proof(core), context, claims, lifetime)
    except BaseException:  # rolled back, or cancelled
        if spending.within and not spending.committed:
            passwords.release_later(spending.verified)
        raise
    if result is None:
        # The password was changed or locked, or the account deactivated, while it was hashed.
        if spending.within:
            await passwords.lost(spending.verified)
        reason = await passwords.reason_now(verified.user)
        failed = passwords.login_failed(identifier, verified.user, context, reason)
        raise await passwords.refuse(failed)
    return result


@dataclass(slots=True)
class _Spending(Generic[UserT]):
    """A right password, used up in the transaction that opens the session.

    Attributes:
        within: The throttle that is reset in that transaction; ``None`` if it is reset before.
        committed: It is committed.
    """

    passwords: PasswordCheck[UserT]
    verified: Verified[UserT]
    within: DatabaseThrottle | None
    committed: bool = False

    async def begin(self) -> None:
        """Reset what is reset before the transaction begins."""
        if self.within is None:
            # First, so that no session is opened if the store of the counters does not answer.
            await self.passwords.succeeded(self.verified)
        else:
            self.verified = await self.passwords.source_released(self.verified, self.within)

    def proof(self, core: Core[UserT]) -> Proof[UserT]:
        """Return the proof that the user knows the password."""
        return Proof(
            user=self.verified.user,
            method="password",
            amr=("pwd",),
            proven_at=core.clock(),
            spend=self._spend,
        )

    async def _spend(self, unit: UnitOfWork) -> bool:
        verified = self.verified
        if verified.replacement is not None:
            await replace_outdated_hash(
                verified.user, verified.replacement, unit, instead_of=verified.stored
            )
        if self.within is not None:
            await self.passwords.reset_within(unit, verified, self.within)
            unit.set_on_commit(self, committed=True)
        return True
