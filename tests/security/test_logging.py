"""R90 to R93: what every operation emits, and that no text forges a line of a log."""

from __future__ import annotations

from datetime import UTC, timedelta
from typing import Any

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, log_in
from tests.support.app import User
from tortoise_auth import (
    AuthConfig,
    AuthService,
    EventEmitter,
    RequestContext,
    TortoiseAuthError,
    request_context,
)
from tortoise_auth.events import Event
from tortoise_auth.events.formats import ecs
from tortoise_auth.testing import FakeClock, capture
from tortoise_auth.throttling import Backoff, DatabaseThrottle

CONTEXT = RequestContext(ip="192.0.2.7", user_agent="Firefox", request_id="r-1")
HOSTILE = "\r\n\x1b[31m\x00\x07\u2028\u2029\u0085\ud800CRITICAL"

Fact = tuple[str, str, str | None, str]
"""Name, actor, reason and outcome of an event."""


async def emitted_by(
    emitter: EventEmitter, call: Any, user: User | None, clock: FakeClock
) -> list[Fact]:
    """Return the facts of the events of a call, whose time, subject and context are checked."""
    with capture(emitter) as events:
        try:
            await call
        except TortoiseAuthError:
            pass
    for event in events:
        assert event.occurred_at.utcoffset() == timedelta(0)
        assert event.occurred_at == clock() or event.name in (
            "user_registered",
            "password_rehashed",
        )
        assert event.context == CONTEXT
        if user is not None:
            assert event.subject_id == str(user.pk)
    return [
        (event.name, event.actor, getattr(event, "reason", None), outcome_of(event))
        for event in events
    ]


def outcome_of(event: Event) -> str:
    """Return the outcome that a security monitor receives."""
    outcome: str = ecs(event)["event"]["outcome"]
    return outcome


async def test_every_operation_is_emitted(
    db: TortoiseContext, clock: FakeClock, emitter: EventEmitter
) -> None:
    """R90, R91: every success and failure emits its time, subject, context, action, outcome and reason."""
    throttle = DatabaseThrottle(account=Backoff(free_attempts=2), clock=clock)
    auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)
    token = request_context.set(CONTEXT)
    try:
        ada = await User.create_user(email=EMAIL, password=PASSWORD)

        async def emitted(call: Any, user: User | None = ada) -> list[Fact]:
            return await emitted_by(emitter, call, user, clock)

        sign_up = User.create_user(email="bob@example.com", password=PASSWORD)
        assert await emitted(sign_up, None) == [("user_registered", "user", None, "success")]
        unknown = auth.login("nobody@example.com", PASSWORD)
        failed = ("user_login_failed", "unauthenticated")
        assert await emitted(unknown, None) == [(*failed, "not_found", "failure")]

        assert await emitted(log_in(auth)) == [("user_login", "user", None, "success")]
        wrong = auth.login(EMAIL, "wrong")
        assert await emitted(wrong) == [(*failed, "bad_password", "failure")]
        change = auth.change_password(ada, "wrong", NEW_PASSWORD)
        assert await emitted(change) == [
            ("password_change_failed", "user", "bad_password", "failure")
        ]
        for _ in range(2):  # the source is known and has a budget of its own
            await emitted(auth.login(EMAIL, "wrong"))
        assert await emitted(log_in(auth)) == [
            (*failed, "throttled", "failure"),
            ("login_throttled", "unauthenticated", None, "failure"),
        ]
        clock.advance(timedelta(hours=1))

        first, second = await log_in(auth), await log_in(auth)
        refresh = auth.refresh(first.refresh_token)
        assert await emitted(refresh) == [("session_refreshed", "user", None, "success")]
        replay = auth.refresh(first.refresh_token)
        assert await emitted(replay) == [
            ("refresh_token_reused", "unauthenticated", None, "failure")
        ]
        logout = auth.logout(second.access_token)
        assert await emitted(logout) == [("user_logout", "user", None, "success")]
        third = await log_in(auth)
        revocation = auth.revoke_session(third.session.id)
        assert await emitted(revocation) == [("session_revoked", "user", None, "success")]
        await log_in(auth)
        everywhere = auth.logout_all(ada)
        assert await emitted(everywhere) == [("user_logout", "user", None, "success")]

        change = auth.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert await emitted(change) == [("password_changed", "user", None, "success")]
        assert await emitted(auth.deactivate(ada)) == [
            ("user_deactivated", "admin", None, "success")
        ]
        closed = auth.login(EMAIL, NEW_PASSWORD)
        assert await emitted(closed) == [(*failed, "inactive", "failure")]
        assert await emitted(auth.activate(ada)) == [("user_activated", "admin", None, "success")]
    finally:
        request_context.reset(token)


@pytest.mark.parametrize("field", ["user_agent", "request_id", "actor_id"])
async def test_hostile_request_makes_no_line(
    db: TortoiseContext, auth: AuthService[User], emitter: EventEmitter, field: str
) -> None:
    """R93: whatever a client sends, an event in a log is one line of printable text."""
    values: dict[str, Any] = {field: HOSTILE * 100}
    context = RequestContext(**values)
    await User.create_user(email=EMAIL, password=PASSWORD)
    with capture(emitter) as events:
        result = await auth.login(EMAIL, PASSWORD, context=context)
        await log_in_under_a_hostile_name(auth)
    assert events.names == ["user_login", "user_login_failed"]
    for thing in (*events, result, result.session, context):
        assert repr(thing).isprintable()
        assert len(repr(thing)) < 3000
    assert len(getattr(context, field)) <= 255


async def log_in_under_a_hostile_name(auth: AuthService[User]) -> None:
    """Log in under a name that would forge a line of a log."""
    with pytest.raises(TortoiseAuthError):
        await auth.login(HOSTILE * 1000, PASSWORD)


async def test_times_are_in_utc(sqlite: TortoiseContext, auth: AuthService[User]) -> None:
    """R90: whatever the zone of the clock, stored and emitted times are in UTC."""
    await User.create_user(email=EMAIL, password=PASSWORD)
    result = await log_in(auth)
    for moment in (
        result.access_expires_at,
        result.refresh_expires_at,
        result.session.created_at,
        result.user.last_login,
    ):
        assert moment is not None
        assert moment.tzinfo is UTC
