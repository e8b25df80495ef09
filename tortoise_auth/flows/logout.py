"""Sessions end at the wish of their owner or of an administrator: one, or all of an account."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID

from tortoise_auth.context import RequestContext
from tortoise_auth.events.catalog import Actor, Event, SessionRevoked, UserLogout
from tortoise_auth.exceptions import TokenError
from tortoise_auth.flows.core import Core, require_actor, session_id_of
from tortoise_auth.flows.signin import AuthResult
from tortoise_auth.models import Session
from tortoise_auth.sessions import RefreshToken, SessionWithUser
from tortoise_auth.users import UserT


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a logout or revocation ended.

    Attributes:
        sessions: How many sessions ended; 0 if there was nothing to end.
        user_id: ``str(user.pk)`` of their owner, if it is known.
    """

    sessions: int
    user_id: str | None


async def logout(core: Core[UserT], token: str, context: RequestContext | None) -> Revocation:
    """End the session of an access or refresh token. Emits ``user_logout``."""
    _require_token(token)
    pair = await _session_of(core, token)
    if pair is None:
        return Revocation(0, None)
    return await _end(core, pair, UserLogout, context, actor="user")


async def logout_all(
    core: Core[UserT],
    user: UserT,
    keep: Session | UUID | str | None,
    actor: Actor,
    context: RequestContext | None,
) -> Revocation:
    """End every session of an account but *keep*. Emits ``user_logout``, once."""
    core.require_own(user, actor)
    async with core.unit_of_work() as unit:
        ended = await core.sessions.revoke_all(user, unit.connection, keep=session_id_of(keep))
        if ended:
            unit.record(
                core.event(
                    UserLogout, user, context, sessions_ended=ended, everywhere=True, actor=actor
                )
            )
    return Revocation(ended, str(user.pk))


async def revoke_session(
    core: Core[UserT],
    session_id: Session | UUID | str,
    user: UserT | None,
    actor: Actor,
    context: RequestContext | None,
) -> Revocation:
    """End one session by its public id. Emits ``session_revoked``."""
    require_actor(actor)
    if user is not None:
        core.require_own(user)
    if isinstance(session_id, Session):
        session_id = session_id.id
    if isinstance(session_id, AuthResult):
        raise TypeError("revoke_session() takes result.session, not the AuthResult itself")
    pair = await core.sessions.find_by_id(session_id)
    # The id comes from a request: with `user` it ends a session of theirs, or none, and the answer
    # does not say whether there is one of another account.
    if pair is None or (user is not None and pair.session.user_id != str(user.pk)):
        return Revocation(0, None)
    return await _end(core, pair, SessionRevoked, context, actor=actor)


async def _end(
    core: Core[UserT],
    pair: SessionWithUser[UserT],
    kind: Callable[..., Event],
    context: RequestContext | None,
    *,
    actor: Actor,
) -> Revocation:
    """Revoke one session; emit and count that only if the session was alive."""
    ended = False
    if pair.session.revoked_at is None:
        async with core.unit_of_work() as unit:
            revoked = await core.sessions.revoke(pair.session, unit.connection)
            ended = revoked and pair.is_alive(core.clock())
            if ended:
                session_id = str(pair.session.id)
                unit.record(
                    core.event(kind, pair.user, context, session_id=session_id, actor=actor)
                )
    return Revocation(int(ended), pair.session.user_id)


async def _session_of(core: Core[UserT], token: str) -> SessionWithUser[UserT] | None:
    try:
        if isinstance(token, str) and RefreshToken.looks_like(token):
            return await core.sessions.find_by_refresh_token(RefreshToken.parse(token))
        # A session outlives its access tokens by weeks, and the client may hold no other.
        claims = core.tokens.read(token, even_if_expired=True)
    except TokenError:
        # RFC 7009, 2.2: an invalid token is no error, since what the client asked for is so
        # already.
        return None
    return await core.sessions.find(claims.session_id, claims.subject)


def _require_token(token: object) -> None:
    """Reject what is no token at all; text that is none of ours ends nothing and is no error.

    Raises:
        TypeError: It is no text.
        ValueError: It is a header or the id of a session.
    """
    if isinstance(token, AuthResult):
        raise TypeError("logout() takes result.access_token, not the AuthResult itself")
    if not isinstance(token, str):
        raise TypeError(
            f"logout() takes the text of an access or refresh token, not {type(token).__name__}; "
            "to end a session without its token use revoke_session, or logout_all for a user"
        )
    if token[:7].lower() == "bearer ":
        raise ValueError('logout() takes the token alone, without "Bearer " before it')
    with suppress(ValueError):
        UUID(token)
        raise TypeError("logout() takes a token, not the id of a session: use revoke_session")
