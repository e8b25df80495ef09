"""Hooks: what can happen, who listens, and what happens when a handler fails."""

from tortoise_auth.events.catalog import (
    Event,
    PasswordChanged,
    PasswordRehashed,
    RefreshTokenReused,
    SessionRefreshed,
    SessionRevoked,
    UserActivated,
    UserDeactivated,
    UserEvent,
    UserLogin,
    UserLoginFailed,
    UserLogout,
    UserRegistered,
)
from tortoise_auth.events.dispatch import (
    EventEmitter,
    add_listener,
    emit,
    emitter,
    on,
    remove_listener,
)
from tortoise_auth.exceptions import EventError

__all__ = [
    "Event",
    "EventEmitter",
    "EventError",
    "PasswordChanged",
    "PasswordRehashed",
    "RefreshTokenReused",
    "SessionRefreshed",
    "SessionRevoked",
    "UserActivated",
    "UserDeactivated",
    "UserEvent",
    "UserLogin",
    "UserLoginFailed",
    "UserLogout",
    "UserRegistered",
    "add_listener",
    "emit",
    "emitter",
    "on",
    "remove_listener",
]
