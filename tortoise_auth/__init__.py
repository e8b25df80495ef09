"""Authentication for Tortoise ORM applications, with lifecycle hooks that can be trusted.

Example::

    class User(AbstractUser):
        display_name = fields.CharField(max_length=100, default="")

    auth = AuthService(User, AuthConfig(secret=os.environ["AUTH_SECRET"]))

    @on("user_login")
    async def audit(user): ...

    result = await auth.login("ada@example.com", "correct horse battery staple")
    user = await auth.authenticate(result.access_token)
"""

from tortoise_auth.config import AuthConfig
from tortoise_auth.context import RequestContext, request_context
from tortoise_auth.events import (
    EventEmitter,
    add_listener,
    emit,
    emitter,
    on,
    remove_listener,
)
from tortoise_auth.exceptions import (
    AuthenticationError,
    ConfigurationError,
    PasswordPolicyError,
    ServiceUnavailableError,
    ThrottledError,
    TokenError,
    TortoiseAuthError,
)
from tortoise_auth.keys import SigningKey
from tortoise_auth.models import app_config
from tortoise_auth.passwords import PasswordHasher, PasswordPolicy
from tortoise_auth.service import AuthResult, AuthService, Revocation
from tortoise_auth.sessions import AccessClaims
from tortoise_auth.users import AbstractUser

__version__ = "0.1.0"

__all__ = [
    "AbstractUser",
    "AccessClaims",
    "AuthConfig",
    "AuthResult",
    "AuthService",
    "AuthenticationError",
    "ConfigurationError",
    "EventEmitter",
    "PasswordHasher",
    "PasswordPolicy",
    "PasswordPolicyError",
    "RequestContext",
    "Revocation",
    "ServiceUnavailableError",
    "SigningKey",
    "ThrottledError",
    "TokenError",
    "TortoiseAuthError",
    "__version__",
    "add_listener",
    "app_config",
    "emit",
    "emitter",
    "on",
    "remove_listener",
    "request_context",
]
