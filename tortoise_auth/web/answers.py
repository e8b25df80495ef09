"""What an error looks like over HTTP: one table for every framework."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tortoise_auth.exceptions import (
    AuthenticationError,
    CrossOriginError,
    EventError,
    InvalidIdentifierError,
    NotAuthenticatedError,
    PasswordPolicyError,
    ReauthenticationRequiredError,
    ServiceUnavailableError,
    ThrottledError,
    TokenError,
    TokenExpiredError,
    TortoiseAuthError,
)
from tortoise_auth.web.cookies import Cookies


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a request, for any framework.

    Attributes:
        status: The status code.
        headers: Names in lower case; ``set-cookie`` may come more than once.
        body: A JSON object with ``code`` and ``detail``.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Row:
    """The answer to one kind of error; ``code`` and ``detail`` are those of the error if ``None``."""

    status: int
    header: tuple[str, str] | None = None
    code: str | None = None
    detail: str | None = None


_ROWS: dict[type[TortoiseAuthError], _Row] = {
    AuthenticationError: _Row(401, ("www-authenticate", "Bearer")),
    # Without an error attribute: the request had no credentials (RFC 6750, 3.1).
    NotAuthenticatedError: _Row(401, ("www-authenticate", "Bearer")),
    TokenError: _Row(401, ("www-authenticate", 'Bearer error="invalid_token"')),
    ReauthenticationRequiredError: _Row(401),
    CrossOriginError: _Row(403),
    PasswordPolicyError: _Row(422),
    InvalidIdentifierError: _Row(422),
    ThrottledError: _Row(429),
    ServiceUnavailableError: _Row(
        503, ("retry-after", "5"), detail="The service cannot answer now; try again later"
    ),
    # The text of the error names the handler and what it raised.
    EventError: _Row(503, code="refused", detail="The request was refused"),
}


def answer_to(error: BaseException, *, cookies: Cookies | None = None) -> Answer | None:
    """Return the answer to an error of this library, or ``None`` for what must be a 500.

    ``None`` are mistakes of the program, whose texts are for its makers, and `IdentifierTakenError`:
    answer a sign-up the same way whether or not there is an account (OWASP ASVS 6.3.8).

    A handler with ``delivery="transaction"`` may have refused the request by an HTTP error of your
    framework. Look at ``error.original`` of an `EventError` before you ask this table.

    Args:
        error: What was raised.
        cookies: Pass them if the token came as a cookie: the answer clears them, unless the access
            token has only expired, which a refresh mends.
    """
    row = next((_ROWS[kind] for kind in type(error).__mro__ if kind in _ROWS), None)
    if row is None or not isinstance(error, TortoiseAuthError):
        return None
    headers = [("cache-control", "no-store")]
    if row.header is not None:
        headers.append(row.header)
    headers.extend(_details(error))
    body: dict[str, object] = {
        "code": row.code or error.code,
        "detail": row.detail or str(error),
    }
    if isinstance(error, PasswordPolicyError):
        body["failures"] = [
            {"code": failure.code, "message": failure.message} for failure in error.failures
        ]
    if cookies is not None and _ends_session(error):
        headers.extend(("set-cookie", value) for value in cookies.clear())
    return Answer(row.status, tuple(headers), body)


def _details(error: TortoiseAuthError) -> Iterator[tuple[str, str]]:
    """Yield the headers that depend on more than the kind of an error."""
    if isinstance(error, ThrottledError):
        yield "retry-after", str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, ReauthenticationRequiredError):
        yield (
            "www-authenticate",
            'Bearer error="insufficient_user_authentication", '
            f'max_age="{max(0, int(error.max_age))}"',
        )


def _ends_session(error: TortoiseAuthError) -> bool:
    """Return whether a token is of no use any more, and no refresh can mend it.

    Without an access cookie the refresh cookie may still be there: browsers drop the former when its
    token expires.
    """
    return isinstance(error, TokenError) and not isinstance(
        error, TokenExpiredError | NotAuthenticatedError
    )
