"""An access token is exchanged for the user it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from tortoise_auth.exceptions import TokenRevokedError
from tortoise_auth.flows.core import Core
from tortoise_auth.models import Session
from tortoise_auth.sessions import AccessClaims
from tortoise_auth.users import UserT


@dataclass(frozen=True, slots=True, kw_only=True)
class Authenticated(Generic[UserT]):
    """An access token that is valid, with the session and the user it belongs to.

    Attributes:
        user: The account, as your own model.
        session: The session of this token, as it is in the database now: what ``keep=`` takes, and
            the current one in a list of sessions.
        claims: What the token says, your own claims in ``claims.extra``.
    """

    user: UserT
    session: Session
    claims: AccessClaims


async def authenticated(core: Core[UserT], access_token: str) -> Authenticated[UserT]:
    """Return what an access token stands for, if token, session and user are alive now."""
    claims = core.tokens.read(access_token)
    pair = await core.sessions.find(claims.session_id, claims.subject)
    if pair is None:
        raise TokenRevokedError
    pair.require_alive(core.clock())
    return Authenticated(user=pair.user, session=pair.session, claims=claims)


async def authenticate(core: Core[UserT], access_token: str) -> UserT:
    """Return the user of an access token, if token, session and user are alive now."""
    return (await authenticated(core, access_token)).user
