"""Sessions, and the two tokens that stand for one."""

from tortoise_auth.sessions.access_tokens import AccessClaims, AccessTokens
from tortoise_auth.sessions.lookup import SessionWithUser
from tortoise_auth.sessions.refresh_tokens import RefreshToken
from tortoise_auth.sessions.store import Sessions

__all__ = ["AccessClaims", "AccessTokens", "RefreshToken", "SessionWithUser", "Sessions"]
