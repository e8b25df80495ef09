"""Sessions are listed, and what is left of old ones is deleted."""

from __future__ import annotations

from tortoise_auth.flows.core import Core
from tortoise_auth.models import Session
from tortoise_auth.throttling import DatabaseThrottle
from tortoise_auth.users import UserT


async def list_sessions(
    core: Core[UserT], user: UserT, limit: int, before: Session | None
) -> list[Session]:
    """Return live sessions of an account, the one used last first."""
    core.require_own(user)
    if not isinstance(limit, int) or limit < 1:
        raise ValueError("limit must be a whole number of sessions, at least 1")
    if not isinstance(before, Session | None):
        raise TypeError("before must be a Session: the last one of the page before")
    return await core.sessions.list(user, limit=limit, before=before)


async def purge_expired(core: Core[UserT]) -> int:
    """Delete the rows of sessions whose lifetime is over, and old counters of the throttle."""
    purged = await core.sessions.purge()
    if isinstance(core.throttle, DatabaseThrottle):
        await core.throttle.purge()
    return purged
