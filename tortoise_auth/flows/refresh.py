"""A refresh token is exchanged for a new pair, or turns out to be spent."""

from __future__ import annotations

from collections.abc import Mapping

from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.database import is_transaction, root_of, transaction
from tortoise_auth.events.catalog import RefreshTokenReused, SessionRefreshed
from tortoise_auth.events.unit_of_work import emit_failure
from tortoise_auth.exceptions import (
    EventError,
    TokenExpiredError,
    TokenInvalidError,
    TokenReusedError,
)
from tortoise_auth.flows.core import Core
from tortoise_auth.flows.signin import AuthResult, result_of
from tortoise_auth.models import Session
from tortoise_auth.sessions import RefreshToken, SessionWithUser
from tortoise_auth.users import UserT


async def refresh(
    core: Core[UserT],
    refresh_token: str,
    context: RequestContext | None,
    claims: Mapping[str, object] | None,
) -> AuthResult[UserT]:
    """Spend a refresh token. Emits ``session_refreshed`` or ``refresh_token_reused``."""
    core.tokens.check_extra(claims or {})
    context = current_context(context)
    presented = RefreshToken.parse(refresh_token)
    while True:
        pair = await core.sessions.find_by_refresh_token(presented)
        if pair is None:
            raise TokenInvalidError
        following = await _rotate(core, pair, presented, context)
        if following is not None:
            return result_of(core, pair.user, pair.session, following, claims)
        # Another caller was first: the next look sees a spent token.


async def _rotate(
    core: Core[UserT],
    pair: SessionWithUser[UserT],
    presented: RefreshToken,
    context: RequestContext,
) -> RefreshToken | None:
    session, user, now = pair.session, pair.user, core.clock()
    if session.refresh_expires_at <= now or session.expires_at <= now:
        raise TokenExpiredError
    if not core.sessions.is_spendable(session, presented):
        raise await _reused(core, pair, context)
    pair.require_alive(now)
    following: RefreshToken | None = None
    unit = core.unit_of_work()
    try:
        async with unit:
            following = await core.sessions.rotate(session, presented, context, unit)
            if following is not None:
                unit.record(
                    core.event(
                        SessionRefreshed,
                        user,
                        context,
                        session_id=str(session.id),
                        generation=session.generation,
                    )
                )
    except BaseException:
        if unit.committed and following is not None and not core.config.refresh_reuse_grace:
            # The caller was cancelled, or a handler raised: no client ever holds the new token,
            # and the old one would be taken for a stolen one.
            await core.end_orphan_later(user, session, context)
        raise
    return following


async def _reused(
    core: Core[UserT], pair: SessionWithUser[UserT], context: RequestContext
) -> TokenReusedError:
    """End the session of a spent token; emit that once, and only if the session was alive."""
    if not pair.is_alive(core.clock()):
        return TokenReusedError()
    session_id = str(pair.session.id)
    event = core.event(RefreshTokenReused, pair.user, context, session_id=session_id)
    connection = core.sessions.connection()
    if is_transaction(connection):
        # The caller's transaction sees the session end now, and it ends for good even if that
        # transaction is rolled back, most likely because of the error that is raised next.
        if await core.sessions.revoke(pair.session, connection):
            core.spawn(_revoke_for_good(core, pair.session), "session revocation")
            await emit_failure(event, connection=connection, emitter=core.emitter, clock=core.clock)
        return TokenReusedError()
    unit = core.unit_of_work()
    try:
        async with unit:
            if await core.sessions.revoke(pair.session, unit.connection):
                unit.record(event)
    except EventError:
        if not unit.committed:  # a handler may veto the event, but keeps no session alive
            await _revoke_for_good(core, pair.session)
        raise
    return TokenReusedError()


async def _revoke_for_good(core: Core[UserT], session: Session) -> None:
    async with transaction(root_of(core.sessions.connection())) as own:
        await core.sessions.revoke(session, own)
