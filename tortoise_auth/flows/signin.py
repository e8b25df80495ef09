"""The gate: a proof of identity goes in, a session comes out. No other module opens one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Generic

from tortoise_auth.context import RequestContext
from tortoise_auth.events.catalog import SessionEvicted, UserLogin
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.flows.core import Claims, Core
from tortoise_auth.models import Session
from tortoise_auth.sessions import RefreshToken
from tortoise_auth.users import UserT
from tortoise_auth.users.changes import store_login


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof(Generic[UserT]):
    """What was proven: that the user of this request is the owner of an account.

    Attributes:
        user: The account, as it was read before the proof was checked.
        method: What was proven, as the event ``user_login`` names it: ``password``.
        amr: By which methods, as RFC 8176 names them: ``("pwd",)``.
        proven_at: When, aware UTC.
        spend: Uses the proof up, in the transaction that opens the session: replaces an outdated
            hash, spends a link. False if it cannot be used any more.
    """

    user: UserT
    method: str
    amr: tuple[str, ...]
    proven_at: datetime
    spend: Callable[[UnitOfWork], Awaitable[bool]] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthResult(Generic[UserT]):
    """A session that was opened or refreshed.

    Attributes:
        user: The account, as your own model.
        session: The session; ``session.id`` may be shown and logged.
        access_token: Send it as ``Authorization: Bearer``; not stored anywhere.
        refresh_token: Exchange it once, at ``refresh``. Warning: as good as a password while it
            lives; in a browser keep it in a ``HttpOnly``, ``Secure``, ``SameSite`` cookie.
        access_expires_at: Aware UTC.
        refresh_expires_at: Aware UTC.
    """

    user: UserT
    session: Session
    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    access_expires_at: datetime
    refresh_expires_at: datetime


async def sign_in(
    core: Core[UserT],
    proof: Proof[UserT],
    context: RequestContext,
    claims: Claims | None,
    lifetime: timedelta | None = None,
) -> AuthResult[UserT] | None:
    """Open a session for a proof. Emits ``user_login``, and ``session_evicted`` for one too many.

    The first statement of the transaction decides: it matches no row if the password was changed
    or the account deactivated while the proof was checked. It is a write, because on SQLite a
    transaction that reads before it writes fails under contention.

    Returns:
        The session with its tokens; ``None`` if the proof does not hold any more.

    Raises:
        ValueError: No access token can be made with the claims for this account, or *lifetime* is
            no lifetime.
    """
    user = proof.user
    require_lifetime(lifetime)
    # No session without a token that can be read, and no transaction for claims that cannot be written.
    core.tokens.check_extra(claims or {}, str(user.pk))
    opened: tuple[Session, RefreshToken] | None = None
    extra: Claims = {}
    unit = core.unit_of_work()
    try:
        async with unit:
            version = user.session_version
            stored = await store_login(user, unit, session_version=version, at=core.clock())
            if not stored or not await proof.spend(unit):
                raise _ProofIsSpentError  # rolls ``last_login`` back
            async for evicted in core.sessions.evict(user, unit.connection):
                evicted_id = str(evicted.id)
                unit.record(core.event(SessionEvicted, user, context, session_id=evicted_id))
            opened = await core.sessions.open(
                user,
                context,
                unit.connection,
                authenticated_at=proof.proven_at,
                methods=proof.amr,
                lifetime=lifetime,
            )
            # Before the commit: what it raises leaves nothing behind.
            extra = await core.claims_of(user, opened[0], claims)
            session_id = str(opened[0].id)
            unit.record(
                core.event(UserLogin, user, context, session_id=session_id, method=proof.method)
            )
    except _ProofIsSpentError:
        return None
    except BaseException:
        if unit.committed and opened is not None:
            # The caller was cancelled, or a handler raised: no client ever holds the tokens.
            await core.end_orphan_later(user, opened[0], context)
        raise
    # Signed after the commit: no token exists for a session that was rolled back. That it can be
    # signed was checked before.
    return result_of(core, user, *opened, extra)


def require_lifetime(lifetime: object) -> None:
    """Reject what cannot shorten a session.

    Raises:
        ValueError: It is neither ``None`` nor a timedelta of a second or more.
    """
    if lifetime is None:
        return
    if not isinstance(lifetime, timedelta) or lifetime < timedelta(seconds=1):
        raise ValueError(
            "lifetime= takes a timedelta of a second or more, for example timedelta(hours=12), or None"
        )


class _ProofIsSpentError(Exception):
    """The proof does not hold any more; nothing of the sign-in is kept."""


def result_of(
    core: Core[UserT],
    user: UserT,
    session: Session,
    refresh_token: RefreshToken,
    claims: Claims,
) -> AuthResult[UserT]:
    """Return a session with its refresh token and a new access token."""
    access_token, access_expires_at = core.tokens.issue(
        subject=session.user_id,  # not the live object's: a handler may have changed that
        session_id=str(session.id),
        session_ends=session.expires_at,
        authenticated_at=session.authenticated_at,
        methods=session.authentication_methods.split(),
        extra=claims,
    )
    return AuthResult(
        user=user,
        session=session,
        access_token=access_token,
        refresh_token=refresh_token.text,
        access_expires_at=access_expires_at,
        refresh_expires_at=session.refresh_expires_at,
    )
