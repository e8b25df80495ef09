"""The answer to each error over HTTP."""

from __future__ import annotations

import json

import pytest

from tortoise_auth import exceptions
from tortoise_auth.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrossOriginError,
    EventError,
    EventErrorGroup,
    IdentifierTakenError,
    InvalidIdentifierError,
    NotAuthenticatedError,
    PasswordPolicyError,
    PolicyFailure,
    ReauthenticationRequiredError,
    ServiceUnavailableError,
    SubscriptionError,
    ThrottledError,
    TokenError,
    TokenExpiredError,
    TokenInvalidError,
    TokenReusedError,
    TokenRevokedError,
    TortoiseAuthError,
)
from tortoise_auth.web import Cookies, answer_to

BEARER = {"www-authenticate": "Bearer"}
INVALID = {"www-authenticate": 'Bearer error="invalid_token"'}
STEP_UP = {"www-authenticate": 'Bearer error="insufficient_user_authentication", max_age="300"'}
VETO = EventError("user_login", "my_secret_handler", ValueError("internal"))
POLICY = PasswordPolicyError([PolicyFailure("too_short", "Too short.")])

ANSWERS: list[tuple[TortoiseAuthError, int, dict[str, str], str]] = [
    (NotAuthenticatedError(), 401, BEARER, "not_authenticated"),
    (AuthenticationError(), 401, BEARER, "invalid_credentials"),
    (TokenError("a text"), 401, INVALID, "token_refused"),
    (TokenInvalidError(), 401, INVALID, "token_invalid"),
    (TokenExpiredError(), 401, INVALID, "token_expired"),
    (TokenRevokedError(), 401, INVALID, "token_revoked"),
    (TokenReusedError(), 401, INVALID, "token_reused"),
    (ReauthenticationRequiredError(300), 401, STEP_UP, "reauthentication_required"),
    (CrossOriginError(), 403, {}, "cross_origin"),
    (POLICY, 422, {}, "password_refused"),
    (InvalidIdentifierError("a text"), 422, {}, "invalid_identifier"),
    (ThrottledError(1.2), 429, {"retry-after": "2"}, "throttled"),
    (ServiceUnavailableError("login: OSError"), 503, {"retry-after": "5"}, "service_unavailable"),
    (VETO, 503, {}, "refused"),
    (EventErrorGroup("user_login", [VETO]), 503, {}, "refused"),
]
UNANSWERED: list[BaseException] = [
    IdentifierTakenError(),
    ConfigurationError("a text"),
    SubscriptionError("a text"),
    TortoiseAuthError("a text"),
    ValueError("a text"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize(
    ("error", "status", "headers", "code"), ANSWERS, ids=[type(row[0]).__name__ for row in ANSWERS]
)
def test_table(error: TortoiseAuthError, status: int, headers: dict[str, str], code: str) -> None:
    """Each error has its status, its headers and its code, and is never cached."""
    answer = answer_to(error)
    assert answer is not None
    assert answer.status == status
    assert dict(answer.headers) == headers | {"cache-control": "no-store"}
    assert len(answer.headers) == len(headers) + 1
    assert answer.body["code"] == code
    assert json.loads(json.dumps(dict(answer.body)))["detail"]


@pytest.mark.parametrize("error", UNANSWERED, ids=lambda error: type(error).__name__)
def test_unanswered(error: BaseException) -> None:
    """A mistake of the program is a 500, and a sign-up is answered by the host."""
    assert answer_to(error) is None
    assert answer_to(error, cookies=Cookies()) is None


def test_complete() -> None:
    """The two tables have every error of the library."""
    every = {
        kind
        for kind in vars(exceptions).values()
        if isinstance(kind, type) and issubclass(kind, TortoiseAuthError)
    }
    assert every == {type(row[0]) for row in ANSWERS} | {
        type(error) for error in UNANSWERED if isinstance(error, TortoiseAuthError)
    }


@pytest.mark.parametrize("seconds", [0.0, 0.001, 1.0])
def test_at_least_a_second(seconds: float) -> None:
    """A client that is throttled waits for whole seconds, and at least for one."""
    answer = answer_to(ThrottledError(seconds))
    assert answer is not None
    assert ("retry-after", "1") in answer.headers


def test_failures() -> None:
    """Every broken rule of a password is named."""
    answer = answer_to(POLICY)
    assert answer is not None
    assert answer.body["failures"] == [{"code": "too_short", "message": "Too short."}]


@pytest.mark.parametrize("error", [VETO, EventErrorGroup("user_login", [VETO, VETO])])
def test_names_no_handler(error: TortoiseAuthError) -> None:
    """A veto shows neither the handler nor what it raised."""
    answer = answer_to(error)
    assert answer is not None
    assert not {"my_secret_handler", "internal", "ValueError"} & set(str(answer).split())
    assert answer.body == {"code": "refused", "detail": "The request was refused"}


def test_names_no_method() -> None:
    """An outage does not show what failed."""
    answer = answer_to(ServiceUnavailableError("login: OSError"))
    assert answer is not None
    assert "OSError" not in str(answer)


def test_subclasses() -> None:
    """An error of the host that is one of ours is answered as that, with its own code."""

    class Blocked(AuthenticationError):
        code = "blocked"

    class Unknown(TortoiseAuthError):
        code = "unknown"

    answer = answer_to(Blocked())
    assert answer is not None
    assert (answer.status, answer.body["code"]) == (401, "blocked")
    assert answer_to(Unknown()) is None


class TestCookies:
    @pytest.mark.parametrize("error", [row[0] for row in ANSWERS], ids=lambda e: type(e).__name__)
    def test_cleared(self, error: TortoiseAuthError) -> None:
        """The cookies of a dead session are cleared, and only those."""
        dead = {TokenError, TokenInvalidError, TokenRevokedError, TokenReusedError}
        answer = answer_to(error, cookies=Cookies())
        assert answer is not None
        cleared = [value for name, value in answer.headers if name == "set-cookie"]
        assert cleared == (list(Cookies().clear()) if type(error) in dead else [])
