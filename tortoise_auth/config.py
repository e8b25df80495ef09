"""`AuthConfig`: keys and lifetimes of one service, validated at construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import ClassVar

from tortoise_auth.clock import Clock, utc_now
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.keys import MAKE_ONE, Hidden, SigningKey, revealed


def checked_clock(clock: Clock) -> Clock:
    """Return *clock* in UTC, if it returns aware datetimes.

    Sums in another zone are sums of its wall clock: a token of 15 minutes would live for 75 in the
    night when summer time ends.

    Raises:
        ConfigurationError: It returns something else, or cannot be called.
    """
    now = clock() if callable(clock) else None
    if not isinstance(now, datetime) or now.tzinfo is None:
        raise ConfigurationError(
            "clock= takes a function that returns an aware datetime, as "
            "`lambda: datetime.now(UTC)` does"
        )
    return clock if clock is utc_now else lambda: clock().astimezone(UTC)


@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """Settings of one `AuthService`, validated at construction.

    Attributes:
        secret: Signs access tokens: a random string of at least 32 bytes, or a list of
            `SigningKey`, newest first. Warning: the secret lets its holder sign in as any user.
            Keep it out of the code; read it from the environment.
        issuer, audience: Written into access tokens and required in them. Give each of your
            services an audience of its own.
        access_token_lifetime: 15 minutes by default, at most a day. ``AuthService.authenticate``
            rejects the tokens of a session that has ended; ``decode`` reads no database and accepts
            them until they expire.
        refresh_token_lifetime: How long a session may be idle (7 days).
        session_lifetime: When a session expires even if it is used (30 days, the maximum of
            NIST SP 800-63B-4, 2.1.3).
        leeway: How far the clocks of two machines may differ (10 seconds, at most 5 minutes).
        refresh_reuse_grace: How long after a rotation the spent token and its successor are both
            answered with that successor: for browsers, whose tabs refresh at the same time, and for
            clients that lose answers. 30 seconds are plenty; off by default.
            Warning: within this window a stolen token goes unnoticed (RFC 9700, 4.14.2).
        max_sessions: How many live sessions an account may have; a login beyond that ends the one
            used least recently, and emits ``session_evicted``. ``None``: any number.

    Raises:
        ConfigurationError: A setting is missing, weak or out of range; the message says what to do.
    """

    secret: str | bytes | Sequence[SigningKey] = field(repr=False)
    issuer: str = "tortoise-auth"
    audience: str = "tortoise-auth"
    access_token_lifetime: timedelta = timedelta(minutes=15)
    refresh_token_lifetime: timedelta = timedelta(days=7)
    session_lifetime: timedelta = timedelta(days=30)
    leeway: timedelta = timedelta(seconds=10)
    refresh_reuse_grace: timedelta = timedelta(0)
    max_sessions: int | None = None

    def __post_init__(self) -> None:
        Hidden.hide(self, "secret")
        self._check_keys()
        for name in ("issuer", "audience"):
            value = getattr(self, name)
            if not isinstance(value, str) or not 0 < len(value.encode(errors="replace")) < 256:
                raise ConfigurationError(
                    f"AuthConfig.{name} must be a non-empty string of at most 255 bytes"
                )
        for name, least, most in self._bounds:
            value = getattr(self, name)
            if not isinstance(value, timedelta):
                raise ConfigurationError(
                    f"AuthConfig.{name} must be a timedelta, for example timedelta(minutes=15)"
                )
            if not least <= value <= most:
                raise ConfigurationError(
                    f"AuthConfig.{name} is {value}; it must be between {least} and {most}"
                )
        for name in ("refresh_token_lifetime", "session_lifetime"):
            if getattr(self, name) < self.access_token_lifetime:
                raise ConfigurationError(
                    f"AuthConfig.{name} must not be shorter than access_token_lifetime "
                    f"({self.access_token_lifetime})"
                )

        if self.max_sessions is not None and (
            type(self.max_sessions) is not int or self.max_sessions < 1
        ):
            raise ConfigurationError(
                "AuthConfig.max_sessions must be a whole number of at least 1, or None for any number"
            )

    @cached_property
    def keys(self) -> tuple[SigningKey, ...]:
        """The signing keys, newest first."""
        secret = revealed(self.secret)
        if isinstance(secret, Sequence) and not isinstance(secret, str | bytes):
            return tuple(secret)
        return (SigningKey(secret),)

    _bounds: ClassVar[Sequence[tuple[str, timedelta, timedelta]]] = (
        ("access_token_lifetime", timedelta(seconds=1), timedelta(days=1)),
        ("refresh_token_lifetime", timedelta(seconds=1), timedelta(days=366)),
        ("session_lifetime", timedelta(seconds=1), timedelta(days=366)),
        ("leeway", timedelta(0), timedelta(minutes=5)),
        ("refresh_reuse_grace", timedelta(0), timedelta(minutes=1)),
    )

    def _check_keys(self) -> None:
        if not self.keys or not all(isinstance(key, SigningKey) for key in self.keys):
            raise ConfigurationError(
                f"AuthConfig.secret must be a string or a list of SigningKey, newest first. {MAKE_ONE}"
            )
        if len({key.family for key in self.keys}) > 1:
            families = ", ".join(sorted({key.family for key in self.keys}))
            raise ConfigurationError(
                f"AuthConfig.secret mixes keys of different families ({families}), which invites "
                "algorithm confusion (RFC 8725, 3.1). Rotate within one family; to change it, "
                "switch at once: access tokens are short-lived, and refresh tokens go on."
            )
        if len({key.kid for key in self.keys}) < len(self.keys):
            raise ConfigurationError(
                "AuthConfig.secret has two keys with the same kid. List no key twice, and give "
                "each key a kid of its own, or none."
            )
        if not self.keys[0].can_sign:
            raise ConfigurationError(
                "The first key of AuthConfig.secret signs, so it must be a private key"
            )
