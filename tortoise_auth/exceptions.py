"""Every error the library raises, in one tree.

::

    TortoiseAuthError
    ├── ConfigurationError        wrong settings, models not registered, tables missing
    ├── AuthenticationError       login refused; one text and code for every reason
    │   └── ThrottledError        too many attempts; carries ``retry_after``
    ├── PasswordPolicyError       a new password was refused; carries ``failures``
    ├── InvalidIdentifierError    an e-mail address or user name that cannot be one
    ├── IdentifierTakenError      an account with this identifier exists
    ├── TokenError
    │   ├── NotAuthenticatedError no token came along
    │   ├── TokenInvalidError     not a token of this service
    │   ├── TokenExpiredError     genuine, but expired
    │   ├── TokenRevokedError     its session ended, or its user is inactive or deleted
    │   └── TokenReusedError      a refresh token that was already spent
    ├── ReauthenticationRequiredError  the session is too old for this; log in again
    ├── CrossOriginError          a page of another origin sent a request with our cookies
    ├── EventError                a handler failed, and the error policy is to raise
    │   └── EventErrorGroup       several failed, and the policy is "group"; also an ExceptionGroup
    ├── SubscriptionError         a handler cannot be registered like this
    └── ServiceUnavailableError   the database failed; the credentials may be right

Every class has a stable ``code`` for APIs and logs. Details are attributes. No message carries a
password, token, key, hash or SQL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from tortoise_auth.legible import describe, legible, named


class TortoiseAuthError(Exception):
    """The base class of every error the library raises.

    Attributes:
        code: A stable machine-readable word, safe to send to clients.
    """

    code: ClassVar[str] = "auth_error"


class ConfigurationError(TortoiseAuthError):
    """Settings, models or tables are wrong; the message says what to do."""

    code = "configuration_error"


class AuthenticationError(TortoiseAuthError):
    """The credentials were refused.

    Text and code are the same for every reason, so that they do not reveal which accounts exist
    (OWASP ASVS 6.3.8).
    """

    code = "invalid_credentials"

    def __init__(self, message: str = "Invalid credentials") -> None:
        super().__init__(message)


class ThrottledError(AuthenticationError):
    """Too many attempts; try again later.

    Attributes:
        retry_after: Seconds to wait.
    """

    code = "throttled"

    def __init__(self, retry_after: float) -> None:
        self.retry_after = max(0.0, retry_after)
        seconds = math.ceil(self.retry_after)
        Exception.__init__(
            self, f"Too many attempts; try again in {seconds} second{'' if seconds == 1 else 's'}"
        )

    def __reduce__(self) -> tuple[type[ThrottledError], tuple[float]]:
        return type(self), (self.retry_after,)


@dataclass(frozen=True, slots=True)
class PolicyFailure:
    """One rule that a new password breaks.

    Attributes:
        code: A stable machine-readable word, for example ``too_short``.
        message: One sentence for the person who chose the password.
    """

    code: str
    message: str


class PasswordPolicyError(TortoiseAuthError):
    """A new password was refused (NIST SP 800-63B-4, 3.1.1.2: the reason must be given).

    Attributes:
        failures: Every rule that was broken, in a fixed order.
    """

    code = "password_refused"

    def __init__(self, failures: Sequence[PolicyFailure]) -> None:
        super().__init__(" ".join(failure.message for failure in failures))
        self.failures = tuple(failures)

    def __reduce__(self) -> tuple[type[PasswordPolicyError], tuple[tuple[PolicyFailure, ...]]]:
        return type(self), (self.failures,)


class InvalidIdentifierError(TortoiseAuthError, ValueError):
    """The value cannot be an identifier: no valid e-mail address, empty, too long, or not text."""

    code = "invalid_identifier"


class IdentifierTakenError(TortoiseAuthError):
    """An account with this identifier exists already.

    Warning:
        Shown to an anonymous visitor, this error reveals which accounts exist. Answer a sign-up
        form the same way in both cases, and send the difference by e-mail (OWASP ASVS 6.3.8).
    """

    code = "identifier_taken"

    def __init__(self, message: str = "An account with this identifier exists already") -> None:
        super().__init__(message)


class TokenError(TortoiseAuthError):
    """A token was refused. Over HTTP every kind is ``401 invalid_token`` (RFC 6750, 3.1)."""

    code = "token_refused"


class NotAuthenticatedError(TokenError):
    """No token came along: neither a bearer token nor a cookie."""

    code = "not_authenticated"

    def __init__(self, message: str = "Log in first") -> None:
        super().__init__(message)


class TokenInvalidError(TokenError):
    """Not a token of this service: malformed, forged, of another kind or for another audience."""

    code = "token_invalid"

    def __init__(self, message: str = "The token is not valid") -> None:
        super().__init__(message)


class TokenExpiredError(TokenError):
    """The token is genuine, but it or its session has expired."""

    code = "token_expired"

    def __init__(self, message: str = "The token has expired") -> None:
        super().__init__(message)


class TokenRevokedError(TokenError):
    """The token is genuine, but its session ended, or its user is inactive or deleted."""

    code = "token_revoked"

    def __init__(self, message: str = "The session has ended") -> None:
        super().__init__(message)


class TokenReusedError(TokenError):
    """A refresh token was presented that was already spent.

    Either the client lost its newest token or an older one was stolen. The server cannot tell
    which, so the whole session ended (RFC 9700, 4.14.2).
    """

    code = "token_reused"

    def __init__(self, message: str = "The refresh token was used before") -> None:
        super().__init__(message)


class ReauthenticationRequiredError(TortoiseAuthError):
    """The session is live, but its owner proved who they are too long ago for this.

    Over HTTP it is a 401 with ``insufficient_user_authentication`` (RFC 9470, 3).

    Attributes:
        max_age: Seconds that may have passed since then.
    """

    code = "reauthentication_required"

    def __init__(self, max_age: float) -> None:
        super().__init__("Log in again to do this")
        self.max_age = max_age

    def __reduce__(self) -> tuple[type[ReauthenticationRequiredError], tuple[float]]:
        return type(self), (self.max_age,)


class CrossOriginError(TortoiseAuthError):
    """A request with our cookies may come from a page of another origin, so it was refused."""

    code = "cross_origin"

    def __init__(
        self,
        message: str = (
            "The request came from another site, or does not say from where. "
            "Programs and test clients send the header Sec-Fetch-Site: same-origin"
        ),
    ) -> None:
        super().__init__(message)


class EventError(TortoiseAuthError):
    """A handler failed.

    Attributes:
        event_name: The event that was emitted.
        handler_name: The handler that failed.
        original: What the handler raised.
    """

    code = "event_handler_failed"

    def __init__(self, event_name: str, handler_name: str, original: BaseException) -> None:
        super().__init__(
            f"Handler '{named(handler_name)}' for event '{named(event_name)}' raised "
            f"{type(original).__name__}: {legible(describe(original))}"
        )
        self.event_name = event_name
        self.handler_name = handler_name
        self.original = original

    def __reduce__(self) -> tuple[type[EventError], tuple[str, str, BaseException]]:
        return type(self), (self.event_name, self.handler_name, self.original)


class EventErrorGroup(EventError, ExceptionGroup[EventError]):
    """Several handlers of one event failed, and the emitter was made with ``errors="group"``.

    It is an `EventError`, of the first failure, and a group of all of them for ``except*``.

    Attributes:
        exceptions: One `EventError` for each handler that failed, in their order.
    """

    code = "event_handlers_failed"

    def __new__(cls, event_name: str, failures: Sequence[EventError]) -> Self:
        """Make the group; Python makes a group of its arguments here."""
        return super().__new__(cls, f"Handlers for event '{named(event_name)}' failed", failures)

    def __init__(self, event_name: str, failures: Sequence[EventError]) -> None:
        first = failures[0]
        super().__init__(event_name, first.handler_name, first.original)

    def derive(self, failures: Sequence[EventError]) -> Self:  # type: ignore[override]
        """Return the same of some of the failures; it never holds others."""
        return type(self)(self.event_name, failures)

    def __str__(self) -> str:
        return ExceptionGroup.__str__(self)

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:  # type: ignore[override]
        return type(self), (self.event_name, self.exceptions)


class SubscriptionError(TortoiseAuthError, TypeError):
    """A handler cannot be registered like this.

    It takes arguments that its event does not have, or an option is wrong. The message names the
    handler, the event and the arguments there are.
    """

    code = "subscription_error"


class ServiceUnavailableError(TortoiseAuthError):
    """The database or the throttle's store failed, or there was no memory to compute a hash.

    The credentials or the token may be valid; try again later.
    """

    code = "service_unavailable"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Return an error, what it wraps, and what it was raised from."""
    seen: list[BaseException] = []
    todo: list[object] = [error]
    while todo:
        each = todo.pop(0)
        if isinstance(each, BaseException) and not any(each is other for other in seen):
            seen.append(each)
            todo += [*each.args[:1], each.__cause__, each.__context__]
    return iter(seen)
