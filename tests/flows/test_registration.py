"""Sign-up through the service: with its own parts, by the rules of the model."""

from __future__ import annotations

from typing import Any

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET
from tests.support.app import NamedUser, StrUser, User, UuidUser
from tests.support.rows import row
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthService,
    EventEmitter,
    PasswordPolicy,
    PasswordPolicyError,
    RequestContext,
    TortoiseAuthError,
)
from tortoise_auth.context import request_context
from tortoise_auth.events import UserRegistered
from tortoise_auth.exceptions import EventError, IdentifierTakenError, InvalidIdentifierError
from tortoise_auth.testing import Captured, FakeClock, capture, cheap_hasher

HOSTS = [
    pytest.param(User, {"email": EMAIL, "display_name": "Ada"}, EMAIL, id="int"),
    pytest.param(UuidUser, {"email": EMAIL}, EMAIL, id="uuid"),
    pytest.param(StrUser, {"email": EMAIL, "code": "ada/Löve 1"}, EMAIL, id="str"),
    pytest.param(NamedUser, {"email": EMAIL, "username": "Ada"}, "Ada", id="username"),
]
CONTEXT = RequestContext(ip="203.0.113.7", user_agent="Firefox", request_id="r-1")


class TestAccount:
    @pytest.mark.parametrize(("model", "values", "identifier"), HOSTS)
    async def test_can_log_in(
        self,
        db: TortoiseContext,
        events: Captured,
        clock: FakeClock,
        model: type[AbstractUser],
        values: dict[str, Any],
        identifier: str,
    ) -> None:
        """The account is stored with its columns, its event is emitted once, and its password works."""
        auth = AuthService(model, AuthConfig(secret=SECRET), clock=clock)
        user = await auth.create_user(password=PASSWORD, **values)
        assert type(user) is model
        stored = await row(model, user.pk)
        assert values.items() <= stored.items()
        assert events.names == ["user_registered"]
        event = events.one(UserRegistered)
        assert (event.user, event.subject_id, event.actor) == (user, str(user.pk), "user")
        assert (await auth.login(identifier, PASSWORD)).user == user

    async def test_without_password(self, db: TortoiseContext, auth: AuthService[User]) -> None:
        """An account without a password is one that no password opens."""
        user = await auth.create_user(email=" Ada@Example.COM")
        assert (user.email, user.has_usable_password()) == (EMAIL, False)


class TestParts:
    async def test_are_those_of_the_service(
        self,
        db: TortoiseContext,
        events: Captured,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Policy, hasher, emitter and clock are the service's; those of the model are not asked."""
        own, passwords = EventEmitter(), cheap_hasher()
        monkeypatch.setattr(User, "password_hasher", None)
        auth = AuthService(
            User,
            AuthConfig(secret=SECRET),
            emitter=own,
            passwords=passwords,
            policy=PasswordPolicy(min_length=20),
            clock=clock,
        )
        with capture(own) as heard:
            with pytest.raises(PasswordPolicyError):
                await auth.create_user(email=EMAIL, password="wrong donkey")
            user = await auth.create_user(email=EMAIL, password=PASSWORD)
        assert events.names == []
        assert heard.one(UserRegistered).occurred_at == clock()
        assert user.created_at == clock()
        assert (await passwords.verify(PASSWORD, user.password)).valid

    async def test_are_looked_up_at_each_call(
        self, sqlite: TortoiseContext, auth: AuthService[User], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A service without parts of its own goes by what the model has now."""
        monkeypatch.setattr(User, "password_policy", PasswordPolicy(min_length=60))
        with pytest.raises(PasswordPolicyError):
            await auth.create_user(email=EMAIL, password=PASSWORD)
        replaced = cheap_hasher()
        monkeypatch.setattr(User, "password_policy", PasswordPolicy())
        monkeypatch.setattr(User, "password_hasher", replaced)
        assert await (await auth.create_user(email=EMAIL, password=PASSWORD)).check_password(
            PASSWORD
        )

    async def test_handler_may_refuse(
        self, db: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A handler in the transaction can veto the account; then there is none."""

        @emitter.on("user_registered", delivery="transaction")
        async def refuse() -> None:
            raise RuntimeError("no")

        with pytest.raises(EventError):
            await auth.create_user(email=EMAIL, password=PASSWORD)
        assert not await User.exists()


class TestContext:
    async def test_given(
        self, sqlite: TortoiseContext, auth: AuthService[User], events: Captured
    ) -> None:
        """The context of the call is on the event, or else the one that a middleware set."""
        token = request_context.set(RequestContext(request_id="r-2"))
        try:
            await auth.create_user(email=EMAIL, context=CONTEXT)
            await auth.create_user(email="bob@example.com")
        finally:
            request_context.reset(token)
        given, ambient = events.of(UserRegistered)
        assert given.context == CONTEXT
        assert ambient.context.request_id == "r-2"

    async def test_something_else(self, sqlite: TortoiseContext, auth: AuthService[User]) -> None:
        """A value that is no context is refused before anything is stored."""
        wrong: Any = {"ip": "203.0.113.7"}
        with pytest.raises(TypeError, match="context= takes a RequestContext"):
            await auth.create_user(email=EMAIL, password=PASSWORD, context=wrong)
        assert not await User.exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "error"),
        [
            ({"email": "ada"}, InvalidIdentifierError),
            ({}, InvalidIdentifierError),
            ({"email": "ada@example.org", "password": "short"}, PasswordPolicyError),
            ({"email": "ada@example.org", "is_active": False}, ValueError),
            ({"email": "ada@example.org", "nonsense": 1}, ValueError),
            ({"email": "ada@example.org", "display_name": "\0"}, ValueError),
            ({"email": "ADA@example.com"}, IdentifierTakenError),
        ],
    )
    async def test_like_by_the_model(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, values: Any, error: Any
    ) -> None:
        """What `User.create_user` refuses is refused with the same error and text."""
        given = {"password": NEW_PASSWORD, **values}
        with pytest.raises(error) as by_service:
            await auth.create_user(**given)
        with pytest.raises(error) as by_model:
            await User.create_user(**given)
        assert type(by_service.value) is type(by_model.value)
        assert str(by_service.value) == str(by_model.value)
        assert isinstance(by_service.value, TortoiseAuthError | ValueError)
        assert await User.all().count() == 1
