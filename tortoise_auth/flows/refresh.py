"""A refresh token is exchanged for a new pair, or turns out to be spent."""

from __future__ import annotations

from tortoise_auth.context import RequestContext, current_context
from tortoise_auth.database import is_transaction, root_of, transaction
from tortoise_auth.events.catalog import RefreshTokenReused, SessionRefreshed
from tortoise_auth.events.unit_of_work import emit_failure
from tortoise_auth.exceptions import (
    EventError,
    ServiceUnavailableError,
    TokenExpiredError,
    TokenInvalidError,
    TokenReusedError,
)
from tortoise_auth.flows.core import Claims, Core
from tortoise_auth.flows.signin import AuthResult, result_of
from tortoise_auth.models import Session
from tortoise_auth.sessions import RefreshToken, SessionWithUser
from tortoise_auth.users import UserT

_TURNS = 5
"""How often a refresh looks at a token that another caller has just spent; the second look sees it."""


async def refresh(
    core: Core[UserT],
    refresh_token: str,
    context: RequestContext | None,
    claims: Claims | None,
) -> AuthResult[UserT]:
    """Spend a refresh token. Emits ``session_refreshed`` or ``refresh_token_reused``.

    A token that is presented again within the grace period is answered with the successor that it
    already has: nothing changes, and nothing is emitted.
    """
    core.tokens.check_extra(claims or {})
    context = current_context(context)
    presented = RefreshToken.parse(refresh_token)
    for _ in range(_TURNS):
        pair = await core.sessions.find_by_refresh_token(presented)
        if pair is None:
            raise TokenInvalidError
        core.tokens.check_extra(claims or {}, pair.session.user_id)
        exchanged = await _exchange(core, pair, presented, context, claims)
        if exchanged is not None:
            return result_of(core, pair.user, pair.session, *exchanged)
        # Another caller was first: the next look sees a spent token.
    # Unless the caller's transaction always reads what was there when it began.
    raise ServiceUnavailableError(
        "refresh() cannot see that the token was spent meanwhile. Call it outside the transaction, "
        "or in one of the isolation level READ COMMITTED"
    )


async def _exchange(
    core: Core[UserT],
    pair: SessionWithUser[UserT],
    presented: RefreshToken,
    context: RequestContext,
    claims: Claims | None,
) -> tuple[RefreshToken, Claims] | None:
    session, now = pair.session, core.clock()
    if session.refresh_expires_at <= now or session.expires_at <= now:
        raise TokenExpiredError
    repeated = core.sessions.is_repeated(session, presented)
    if not repeated and not core.sessions.is_unspent(session, presented):
        raise await _reused(core, pair, context)
    pair.require_alive(now)
    if not repeated:
        return await _rotate(core, pair, presented, context, claims)
    newest = core.sessions.newest(session, presented)
    if newest is None:  # the signing key was replaced within these seconds: that is no theft
        raise TokenInvalidError
    return newest, await core.claims_of(pair.user, session, claims)


async def _rotate(
    core: Core[UserT],
    pair: SessionWithUser[UserT],
    presented: RefreshToken,
    context: RequestContext,
    claims: Claims | None,
) -> tuple[RefreshToken, Claims] | None:
    session, user = pair.session, pair.user
    following: RefreshToken | None = None
    extra: Claims = {}
    unit = core.unit_of_work()
    try:
        async with unit:
            following = await core.sessions.rotate(session, presented, context, unit)
            if following is not None:
                # Before the commit: if it raises, the presented token is unspent.
                extra = await core.claims_of(user, session, claims)
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
    return None if following is None else (following, extra)


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
