"""What can happen: one frozen dataclass per lifecycle event. This page is the published interface.

An event names something that *did* happen. No event has a field for a password, token, key or hash.

Define your own events the same way::

    @dataclass(frozen=True, kw_only=True)
    class InvoicePaid(Event):
        invoice_id: int

    await emitter.emit(InvoicePaid(invoice_id=7))     # for @on(InvoicePaid) and @on("invoice_paid")
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from tortoise_auth.events.classification import Classification, FailureReason
from tortoise_auth.events.event import (
    Actor,
    Event,
    NamedEvent,
    UserEvent,
    UserT,
    declared_events,
)

__all__ = [
    "AccountLocked",
    "Actor",
    "Event",
    "FailureReason",
    "LoginThrottled",
    "NamedEvent",
    "PasswordChangeFailed",
    "PasswordChanged",
    "PasswordRehashed",
    "RefreshTokenReused",
    "SessionEvicted",
    "SessionRefreshed",
    "SessionRevoked",
    "UserActivated",
    "UserDeactivated",
    "UserEvent",
    "UserLogin",
    "UserLoginFailed",
    "UserLogout",
    "UserRegistered",
    "UserT",
    "declared_events",
]


@dataclass(frozen=True, kw_only=True)
class UserLogin(UserEvent[UserT]):
    """A session was opened.

    Attributes:
        session_id: The public id of the session.
        method: How the user was authenticated.
    """

    classification = Classification(
        activity="logon", message="A session was opened", signal="session-established"
    )

    session_id: str
    method: str = "password"


@dataclass(frozen=True, kw_only=True)
class UserLoginFailed(Event):
    """A login was refused.

    Attributes:
        identifier: What was typed, bounded, NUL and lone surrogates replaced. People type their
            password into this box: do not log it as it is.
        reason: Why. Warning: for your audit, never for the visitor.
        user_id: ``str(user.pk)`` if such an account exists.
    """

    classification = Classification(
        activity="logon", message="A login was refused", outcome="failure", severity="low"
    )

    keywords: ClassVar[tuple[str, ...]] = ("identifier", "reason")

    identifier: str = field(repr=False)
    reason: FailureReason
    user_id: str | None = None
    actor: Actor = "unauthenticated"


@dataclass(frozen=True, kw_only=True)
class UserLogout(UserEvent[UserT]):
    """One session ended at the user's wish, or (``everywhere``) all of them.

    Attributes:
        session_id: The session that ended; ``None`` if ``everywhere``.
        sessions_ended: How many ended, at least 1.
        everywhere: It was ``logout_all``.
    """

    classification = Classification(
        activity="logoff", message="The user logged out", signal="session-revoked"
    )

    session_id: str | None = None
    sessions_ended: int = 1
    everywhere: bool = False

    def classify(self) -> Classification:
        """Return a logout that the user did not do with a sentence of its own."""
        if self.actor == "user":
            return self.classification
        return replace(self.classification, message="The sessions of the user were ended")


@dataclass(frozen=True, kw_only=True)
class PasswordChanged(UserEvent[UserT]):
    """A new password was stored.

    Attributes:
        sessions_ended: How many sessions ended for it.
    """

    classification = Classification(
        activity="password.change", message="The password was changed", signal="credential-change"
    )

    sessions_ended: int = 0


@dataclass(frozen=True, kw_only=True)
class PasswordChangeFailed(UserEvent[UserT]):
    """A password change was refused because of the current password. The old one stays.

    The caller had a session of the user but may be another person: warn the user.

    Attributes:
        reason: Why.
    """

    classification = Classification(
        activity="password.change",
        message="A password change was refused",
        outcome="failure",
        severity="medium",
    )

    keywords: ClassVar[tuple[str, ...]] = ("reason",)

    reason: FailureReason


@dataclass(frozen=True, kw_only=True)
class PasswordRehashed(UserEvent[UserT]):
    """The password is the same, its stored hash was replaced by one of today's cost."""

    classification = Classification(
        activity="password.rehash", message="The stored hash of the password was renewed"
    )

    actor: Actor = "system"


@dataclass(frozen=True, kw_only=True)
class SessionRefreshed(UserEvent[UserT]):
    """A refresh token was spent and replaced. Repeated answers within the grace period emit nothing.

    Attributes:
        session_id: The public id of the session.
        generation: How often it has been refreshed.
    """

    classification = Classification(activity="session.refresh", message="A session was refreshed")

    session_id: str
    generation: int


@dataclass(frozen=True, kw_only=True)
class SessionRevoked(UserEvent[UserT]):
    """One session was ended from a list of sessions.

    Attributes:
        session_id: The public id of the session.
    """

    classification = Classification(
        activity="session.revoke", message="A session was ended", signal="session-revoked"
    )

    session_id: str


@dataclass(frozen=True, kw_only=True)
class SessionEvicted(UserEvent[UserT]):
    """The session used least recently was ended for a new login (``AuthConfig.max_sessions``).

    Attributes:
        session_id: The public id of the session that ended.
    """

    classification = Classification(
        activity="session.revoke",
        message="The session used least recently was ended for a new one",
        signal="session-revoked",
    )

    session_id: str
    actor: Actor = "system"


@dataclass(frozen=True, kw_only=True)
class RefreshTokenReused(UserEvent[UserT]):
    """A spent refresh token was presented, and the session ended for it (RFC 9700, 4.14.2).

    Attributes:
        session_id: The public id of the session that ended.
    """

    classification = Classification(
        activity="token.reuse",
        message="A session was ended because a spent refresh token was presented",
        outcome="failure",
        severity="high",
        signal="session-revoked",
    )

    session_id: str
    actor: Actor = "unauthenticated"


@dataclass(frozen=True, kw_only=True)
class UserRegistered(UserEvent[UserT]):
    """An account was created by ``create_user``."""

    classification = Classification(activity="account.create", message="The account was created")


@dataclass(frozen=True, kw_only=True)
class UserDeactivated(UserEvent[UserT]):
    """An account was deactivated, and all its sessions ended.

    Attributes:
        sessions_ended: How many.
    """

    classification = Classification(
        activity="account.disable", message="The account was deactivated", signal="account-disabled"
    )

    sessions_ended: int
    actor: Actor = "admin"


@dataclass(frozen=True, kw_only=True)
class UserActivated(UserEvent[UserT]):
    """An account was activated again. No session came back."""

    classification = Classification(
        activity="account.enable",
        message="The account was activated again",
        signal="account-enabled",
    )

    actor: Actor = "admin"


@dataclass(frozen=True, kw_only=True)
class LoginThrottled(Event):
    """A login, or a password change, was rejected before any check because there had been too many.

    Attributes:
        identifier: What was typed, see `UserLoginFailed`; at a password change that of the account.
        retry_after: Seconds to wait.
        attempted: What was refused.
    """

    classification = Classification(
        activity="logon",
        message="A login was refused because there had been too many",
        outcome="failure",
        severity="medium",
        reason="throttled",
    )

    keywords: ClassVar[tuple[str, ...]] = ("identifier", "retry_after")

    identifier: str = field(repr=False)
    retry_after: float
    attempted: Literal["login", "password_change"] = "login"
    actor: Actor = "unauthenticated"

    def classify(self) -> Classification:
        """Return a throttled password change as a password change that was refused."""
        if self.attempted == "login":
            return self.classification
        return replace(PasswordChangeFailed.classification, reason=self.classification.reason)


@dataclass(frozen=True, kw_only=True)
class AccountLocked(UserEvent[UserT]):
    """So many logins failed in a row that the password is locked until it is changed.

    Sessions go on, and a password reset unlocks it (NIST SP 800-63B-4, 3.2.2).
    """

    classification = Classification(
        activity="account.lock",
        message="The password was disabled after too many failed logins",
        severity="medium",
    )

    actor: Actor = "unauthenticated"


@dataclass(frozen=True, kw_only=True)
class AccountUnlocked(UserEvent[UserT]):
    """A locked password works again, without a new one. Not emitted for a password change."""

    classification = Classification(
        activity="account.unlock",
        message="The password was unlocked",
        signal="account-enabled",
    )

    actor: Actor = "admin"
