"""An access token is exchanged for the user it stands for."""

from __future__ import annotations

from tortoise_auth.exceptions import TokenRevokedError
from tortoise_auth.flows.core import Core
from tortoise_auth.users import UserT


async def authenticate(core: Core[UserT], access_token: str) -> UserT:
    """Return the user of an access token, if token, session and user are alive now."""
    claims = core.tokens.read(access_token)
    pair = await core.sessions.find(claims.session_id, claims.subject)
    if pair is None:
        raise TokenRevokedError
    pair.require_alive(core.clock())
    return pair.user
