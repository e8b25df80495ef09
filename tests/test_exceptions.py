"""Errors: one tree, stable codes, and copies that survive pickling."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest

import tortoise_auth
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
from tortoise_auth.legible import describe

CODES: dict[type[TortoiseAuthError], str] = {
    EventErrorGroup: "event_handlers_failed",
    TortoiseAuthError: "auth_error",
    ConfigurationError: "configuration_error",
    AuthenticationError: "invalid_credentials",
    ThrottledError: "throttled",
    PasswordPolicyError: "password_refused",
    InvalidIdentifierError: "invalid_identifier",
    IdentifierTakenError: "identifier_taken",
    TokenError: "token_refused",
    NotAuthenticatedError: "not_authenticated",
    TokenInvalidError: "token_invalid",
    TokenExpiredError: "token_expired",
    TokenRevokedError: "token_revoked",
    TokenReusedError: "token_reused",
    CrossOriginError: "cross_origin",
    ReauthenticationRequiredError: "reauthentication_required",
    EventError: "event_handler_failed",
    SubscriptionError: "subscription_error",
    ServiceUnavailableError: "service_unavailable",
}

FAILURES = [PolicyFailure("too_short", "Too short."), PolicyFailure("common", "Too common.")]

WITH_DETAILS = {
    *(ThrottledError, PasswordPolicyError, ReauthenticationRequiredError),
    *(EventError, EventErrorGroup),
}

EXAMPLES: list[TortoiseAuthError] = [
    *(kind() for kind in CODES if kind not in WITH_DETAILS),
    *(kind("a text") for kind in CODES if kind not in WITH_DETAILS),
    ThrottledError(1.5),
    ReauthenticationRequiredError(300),
    PasswordPolicyError(FAILURES),
    EventError("user_login", "greet", ValueError("no")),
    EventErrorGroup("user_login", [EventError("user_login", "greet", ValueError("no"))]),
]


def through_pickle(protocol: int) -> Callable[[TortoiseAuthError], TortoiseAuthError]:
    def copied(error: TortoiseAuthError) -> TortoiseAuthError:
        other = pickle.loads(pickle.dumps(error, protocol))
        assert isinstance(other, TortoiseAuthError)
        return other

    return copied


COPIES: dict[str, Callable[[TortoiseAuthError], TortoiseAuthError]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": through_pickle(protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


class TestTree:
    def test_drawn(self) -> None:
        """The tree in the documentation is the tree of the classes."""
        drawn: dict[str, str | None] = {}
        branch: list[str] = []
        for line in (exceptions.__doc__ or "").splitlines():
            match = re.match(r"( {4}(?:│   |    )*(?:├── |└── )?)(\w+Error(?:Group)?)\b", line)
            if match:
                depth = len(match[1]) // 4 - 1
                branch[depth:] = [match[2]]
                drawn[match[2]] = branch[depth - 1] if depth else None
        assert drawn == {
            kind.__name__: kind.__bases__[0].__name__ if kind is not TortoiseAuthError else None
            for kind in CODES
        }

    def test_complete(self) -> None:
        """The tree holds every error of the package."""
        here = {
            value
            for value in vars(exceptions).values()
            if isinstance(value, type) and issubclass(value, BaseException)
        }
        assert here == set(CODES)

    def test_codes(self) -> None:
        """The codes are the documented ones, and all differ."""
        assert {kind: kind.code for kind in CODES} == CODES
        assert len(set(CODES.values())) == len(CODES)

    def test_roots(self) -> None:
        """One `except` catches all of them, and none is an unrelated built-in error."""
        assert all(issubclass(kind, TortoiseAuthError) for kind in CODES)
        assert issubclass(InvalidIdentifierError, ValueError)
        assert issubclass(SubscriptionError, TypeError)
        for kind in set(CODES) - {InvalidIdentifierError, SubscriptionError}:
            assert not issubclass(
                kind, ValueError | TypeError | OSError | RuntimeError | LookupError
            )
        assert issubclass(ThrottledError, AuthenticationError)
        for kind in set(CODES) - {AuthenticationError, ThrottledError}:
            assert not issubclass(kind, AuthenticationError)

    def test_public_names(self) -> None:
        """The errors that the package itself offers are these."""
        offered = {
            value
            for value in (getattr(tortoise_auth, name) for name in tortoise_auth.__all__)
            if isinstance(value, type) and issubclass(value, Exception)
        }
        assert offered
        assert offered <= set(CODES)


class TestCopies:
    @pytest.mark.parametrize("way", COPIES)
    @pytest.mark.parametrize(
        "error", EXAMPLES, ids=[f"{type(each).__name__} {each}"[:40] for each in EXAMPLES]
    )
    def test_the_same(self, error: TortoiseAuthError, way: str) -> None:
        """A copy has the type, the text, the code and the facts."""
        other = COPIES[way](error)
        assert type(other) is type(error)
        assert other is not error
        assert str(other) == str(error)
        assert other.code == error.code
        assert repr(vars(other)) == repr(vars(error))

    @pytest.mark.parametrize("way", COPIES)
    def test_event_error(self, way: str) -> None:
        """A copy of an `EventError` keeps what failed, and why."""
        error = COPIES[way](EventError("user_login", "greet", KeyError("key")))
        assert isinstance(error, EventError)
        assert (error.event_name, error.handler_name) == ("user_login", "greet")
        assert isinstance(error.original, KeyError)
        assert error.original.args == ("key",)

    @pytest.mark.parametrize("way", COPIES)
    def test_facts(self, way: str) -> None:
        """A copy keeps the seconds and the failures."""
        throttled, refused = (
            COPIES[way](ThrottledError(2.25)),
            COPIES[way](PasswordPolicyError(FAILURES)),
        )
        assert isinstance(throttled, ThrottledError)
        assert throttled.retry_after == 2.25
        assert isinstance(refused, PasswordPolicyError)
        assert refused.failures == tuple(FAILURES)


class TestMessages:
    def test_texts(self) -> None:
        """The default text of an error is fixed, and reveals no reason."""
        assert [str(error) for error in (AuthenticationError(), IdentifierTakenError())] == [
            "Invalid credentials",
            "An account with this identifier exists already",
        ]
        assert {str(kind()) for kind in TokenError.__subclasses__()} == {
            "Log in first",
            "The token is not valid",
            "The token has expired",
            "The session has ended",
            "The refresh token was used before",
        }

    @pytest.mark.parametrize(
        ("seconds", "said"), [(30, "30"), (1, "1"), (0.4, "1"), (59.5, "60"), (60.0, "60")]
    )
    def test_throttled(self, seconds: float, said: str) -> None:
        """The seconds in the text are at least those to wait."""
        error = ThrottledError(seconds)
        unit = "second" if said == "1" else "seconds"
        assert str(error) == f"Too many attempts; try again in {said} {unit}"
        assert error.retry_after == seconds

    def test_failures(self) -> None:
        """The text of a rejected password is that of its failures, which are immutable."""
        given = list(FAILURES)
        error = PasswordPolicyError(given)
        given.clear()
        assert str(error) == "Too short. Too common."
        assert error.failures == tuple(FAILURES)

    def test_event_error(self) -> None:
        """The text names handler, event, type and reason."""
        error = EventError("user_login", "greet", RuntimeError("something went wrong"))
        assert str(error) == (
            "Handler 'greet' for event 'user_login' raised RuntimeError: something went wrong"
        )

    def test_describe(self) -> None:
        """An error whose `str` fails is described, too."""

        class MuteError(Exception):
            def __str__(self) -> str:
                raise LookupError("x")

        assert describe(ValueError("why")) == "why"
        assert describe(MuteError()) == "<no text: LookupError in __str__>"
        assert "<no text: LookupError in __str__>" in str(EventError("e", "h", MuteError()))
