"""Authentication for Tortoise ORM applications, with lifecycle hooks that can be trusted.

Example::

    class User(AbstractUser):
        display_name = fields.CharField(max_length=100, default="")

    auth = AuthService(User, AuthConfig(secret=os.environ["AUTH_SECRET"]))

    @on("user_login")
    async def audit(user): ...

    await auth.create_user(email="ada@example.com", password="correct horse battery staple")
    result = await auth.login("ada@example.com", "correct horse battery staple")
    user = await auth.authenticate(result.access_token)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from tortoise_auth.service import Authenticated, AuthResult, AuthService, Revocation
    from tortoise_auth.sessions import AccessClaims
    from tortoise_auth.users import AbstractUser

__version__ = "0.1.0"

__all__ = [
    "AbstractUser",
    "AccessClaims",
    "AuthConfig",
    "AuthResult",
    "AuthService",
    "Authenticated",
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

# Every name above by the module that defines it. They are imported on first use: pytest imports
# this package in every run, for the plugin, and Tortoise alone takes half a second.
_MODULES = {
    "config": ("AuthConfig",),
    "context": ("RequestContext", "request_context"),
    "events": ("EventEmitter", "add_listener", "emit", "emitter", "on", "remove_listener"),
    "exceptions": (
        "AuthenticationError",
        "ConfigurationError",
        "PasswordPolicyError",
        "ServiceUnavailableError",
        "ThrottledError",
        "TokenError",
        "TortoiseAuthError",
    ),
    "keys": ("SigningKey",),
    "models": ("app_config",),
    "passwords": ("PasswordHasher", "PasswordPolicy"),
    "service": ("AuthResult", "AuthService", "Authenticated", "Revocation"),
    "sessions": ("AccessClaims",),
    "users": ("AbstractUser",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take it to mean that any name exists

    def __getattr__(name: str) -> object:
        """Import a name of ``__all__``, or a module of this package, on first use."""
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = value  # this function is not asked again
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
