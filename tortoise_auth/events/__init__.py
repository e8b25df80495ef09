"""Hooks: the events, the handlers for them, and what happens when a handler fails."""

from tortoise_auth.events.background import Backend, BackgroundQueue, BackgroundQueueFull, Job
from tortoise_auth.events.catalog import (
    AccountLocked,
    AccountUnlocked,
    Actor,
    Event,
    LoginThrottled,
    NamedEvent,
    PasswordChanged,
    PasswordChangeFailed,
    PasswordRehashed,
    RefreshTokenReused,
    SessionEvicted,
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
from tortoise_auth.events.checks import SubscriptionWarning
from tortoise_auth.events.classification import Classification
from tortoise_auth.events.default import (
    add_listener,
    emit,
    emit_nowait,
    emit_sync,
    emitter,
    off,
    on,
    once,
    remove_listener,
)
from tortoise_auth.events.event_emitter import EventEmitter
from tortoise_auth.events.observer import Delivered
from tortoise_auth.events.registry import Listening
from tortoise_auth.events.subscription import Delivery, Subscription
from tortoise_auth.exceptions import EventError, EventErrorGroup, SubscriptionError

__all__ = [
    "AccountLocked",
    "AccountUnlocked",
    "Actor",
    "Backend",
    "BackgroundQueue",
    "BackgroundQueueFull",
    "Classification",
    "Delivered",
    "Delivery",
    "Event",
    "EventEmitter",
    "EventError",
    "EventErrorGroup",
    "Job",
    "Listening",
    "LoginThrottled",
    "NamedEvent",
    "PasswordChangeFailed",
    "PasswordChanged",
    "PasswordRehashed",
    "RefreshTokenReused",
    "SessionEvicted",
    "SessionRefreshed",
    "SessionRevoked",
    "Subscription",
    "SubscriptionError",
    "SubscriptionWarning",
    "UserActivated",
    "UserDeactivated",
    "UserEvent",
    "UserLogin",
    "UserLoginFailed",
    "UserLogout",
    "UserRegistered",
    "add_listener",
    "emit",
    "emit_nowait",
    "emit_sync",
    "emitter",
    "off",
    "on",
    "once",
    "remove_listener",
]
