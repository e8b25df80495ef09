"""The context of a request, on every event."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import PASSWORD
from tests.support.app import User
from tortoise_auth import AuthService, RequestContext
from tortoise_auth.context import current_context, request_context
from tortoise_auth.events import UserLoginFailed
from tortoise_auth.exceptions import AuthenticationError, TokenReusedError
from tortoise_auth.models import Session
from tortoise_auth.testing import Captured

GIVEN = RequestContext(
    ip="203.0.113.7", user_agent="Firefox", request_id="r-1", actor_id="9", known_device=True
)
EVERY_EVENT = {
    "user_registered",
    "user_login_failed",
    "user_login",
    "session_refreshed",
    "refresh_token_reused",
    "session_revoked",
    "password_changed",
    "user_logout",
    "user_deactivated",
    "user_activated",
}


async def live(auth: AuthService[User], context: RequestContext | None) -> None:
    """Do everything that emits an event."""
    ada = await User.create_user(email="ada@example.com", password=PASSWORD)
    with pytest.raises(AuthenticationError):
        await auth.login("ada@example.com", "wrong", context=context)
    first = await auth.login("ada@example.com", PASSWORD, context=context)
    await auth.refresh(first.refresh_token, context=context)
    with pytest.raises(TokenReusedError):
        await auth.refresh(first.refresh_token, context=context)
    second = await auth.login("ada@example.com", PASSWORD, context=context)
    await auth.revoke_session(second.session.id, context=context)
    await auth.set_password(ada, "wrong donkey charger nail", context=context)
    third = await auth.login("ada@example.com", "wrong donkey charger nail", context=context)
    await auth.logout(third.access_token, context=context)
    await auth.login("ada@example.com", "wrong donkey charger nail", context=context)
    await auth.logout_all(ada, context=context)
    await auth.deactivate(ada, context=context)
    await auth.activate(ada, context=context)


@pytest.mark.parametrize("given", [{"ip": "203.0.113.7"}, "203.0.113.7", RequestContext])
def test_something_else(given: Any) -> None:
    """A value that is no context is refused by name."""
    with pytest.raises(TypeError, match=r"^context= takes a RequestContext\(ip=...\), not "):
        current_context(given)


class TestEveryEvent:
    async def test_carries_what_was_given(
        self, sqlite: TortoiseContext, auth: AuthService[User], events: Captured
    ) -> None:
        """An explicit context is on every event of the call."""
        await live(auth, GIVEN)
        assert {event.name for event in events} == EVERY_EVENT
        assert {event.context for event in events if event.name != "user_registered"} == {GIVEN}

    async def test_carries_what_a_middleware_set(
        self, sqlite: TortoiseContext, auth: AuthService[User], events: Captured
    ) -> None:
        """Without an explicit context the context variable is on every event."""
        token = request_context.set(GIVEN)
        try:
            await live(auth, None)
        finally:
            request_context.reset(token)
        assert {event.name for event in events} == EVERY_EVENT
        assert {event.context for event in events} == {GIVEN}

    async def test_is_empty_otherwise(
        self, sqlite: TortoiseContext, auth: AuthService[User], events: Captured
    ) -> None:
        """Without either the context of the event is empty."""
        await live(auth, None)
        assert {event.context for event in events} == {RequestContext()}


class TestRequestContext:
    def test_is_bounded_and_sanitized(self) -> None:
        """Clients choose most of it, so it is cut, and what no database stores is replaced."""
        hostile = RequestContext(
            user_agent="a\0\ud800" * 1000, request_id="r" * 999, actor_id="\0" * 999
        )
        assert hostile.user_agent is not None
        assert hostile.user_agent.startswith("a\ufffd\ufffda")
        assert len(hostile.user_agent) == 255
        assert hostile.request_id == "r" * 128
        assert hostile.actor_id == "\ufffd" * 255

    @pytest.mark.parametrize("known", [0, 1, "true", "", [], object()])
    def test_device_is_known_or_not(self, known: Any) -> None:
        """A value that is neither true nor false is refused, and does not count as either."""
        with pytest.raises(TypeError, match=r"^RequestContext\(known_device=...\) takes True, "):
            RequestContext(known_device=known)

    @pytest.mark.parametrize("known", [True, False, None])
    def test_in_json(self, known: bool | None) -> None:
        """Actor and device survive JSON, for a durable handler."""
        context = RequestContext(actor_id="9", known_device=known)
        event = UserLoginFailed(identifier="ada", reason="not_found", context=context)
        sent = json.loads(json.dumps(event.to_dict()))
        assert sent["context"]["actor_id"] == "9"
        assert sent["context"]["known_device"] is known
        assert UserLoginFailed.from_dict(sent) == event

    def test_in_json_of_before(self) -> None:
        """An event that was stored before there was an actor or a device is still read."""
        event = UserLoginFailed(identifier="ada", reason="not_found", context=GIVEN)
        stored = event.to_dict()
        del stored["context"]["actor_id"], stored["context"]["known_device"]
        read = UserLoginFailed.from_dict(stored)
        assert read.context == replace(GIVEN, actor_id=None, known_device=None)

    async def test_is_not_in_the_session(
        self, sqlite: TortoiseContext, auth: AuthService[User]
    ) -> None:
        """Actor and device are on the event alone: no column of ours holds them."""
        await User.create_user(email="ada@example.com", password=PASSWORD)
        marked = RequestContext(actor_id="actor-7f3a", known_device=True)
        await auth.login("ada@example.com", PASSWORD, context=marked)
        (stored,) = await Session.all().values()
        assert "actor-7f3a" not in str(stored)
