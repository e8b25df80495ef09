"""What a type checker knows of a host's code. Checked by ``make types``, never run.

Each ``type: ignore`` marks a mistake that mypy must find: an ignore it does not need is an error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import assert_type
from uuid import UUID

from fastapi import FastAPI
from litestar import Litestar
from litestar.middleware import DefineMiddleware

from tests.support.app import NamedUser, StrUser, User, UuidUser
from tortoise_auth import (
    AbstractUser,
    AccessClaims,
    AuthConfig,
    Authenticated,
    AuthResult,
    AuthService,
    EventEmitter,
    RequestContext,
    Revocation,
    SigningKey,
)
from tortoise_auth.integrations.fastapi import Guard, auth_router, install
from tortoise_auth.models import Session
from tortoise_auth.web import Cookies, RequestContextMiddleware


def dependencies(config: AuthConfig) -> None:
    guard = Guard(AuthService(User, config), Cookies())
    assert_type(guard, Guard[User])
    assert_type(guard.user, Callable[..., Awaitable[User]])
    assert_type(guard.optional_user, Callable[..., Awaitable[User | None]])
    assert_type(guard.session, Callable[..., Awaitable[Authenticated[User]]])
    assert_type(guard.fresh_user(timedelta(minutes=5)), Callable[..., Awaitable[User]])
    Guard(User)  # type: ignore[arg-type]
    app = FastAPI()
    install(app, trusted_hops=1)
    app.include_router(auth_router(guard), responses=guard.responses)
    app.add_middleware(RequestContextMiddleware, trusted_hops=1)
    app.add_middleware(RequestContextMiddleware, trusted_hops="1")  # type: ignore[arg-type]
    Litestar(middleware=[DefineMiddleware(RequestContextMiddleware, trusted_hops=1)])


async def results(config: AuthConfig) -> None:
    users = AuthService(User, config)
    named = AuthService(NamedUser, config)
    assert_type(users, AuthService[User])
    assert_type(named, AuthService[NamedUser])
    ada = await users.create_user(email="ada@example.com", password="secret", display_name="Ada")
    assert_type(ada, User)
    assert_type(await named.create_user(username="ada", context=RequestContext()), NamedUser)
    result = await users.login("ada@example.com", "secret")
    assert_type(result, AuthResult[User])
    assert_type(result.user, User)
    assert_type(result.user.display_name, str)
    assert_type(result.session, Session)
    assert_type(result.session.id, UUID)
    assert_type(result.access_token, str)
    assert_type(result.refresh_expires_at, datetime)
    assert_type(await users.authenticate(result.access_token), User)
    assert_type(await named.authenticate(result.access_token), NamedUser)
    current = await named.authenticated(result.access_token)
    assert_type(current, Authenticated[NamedUser])
    assert_type(current.user.username, str)
    assert_type(current.session, Session)
    assert_type(current.claims, AccessClaims)
    assert_type((await named.refresh(result.refresh_token)).user.username, str)
    assert_type(users.decode(result.access_token), AccessClaims)
    assert_type(await users.logout(result.access_token), Revocation)
    assert_type(await users.logout_all(result.user, keep=result.session), Revocation)
    assert_type(await users.sessions(result.user), list[Session])
    assert_type(await users.revoke_session(result.session.id, user=result.user), Revocation)
    assert_type(await users.deactivate(result.user), Revocation)
    assert_type(await users.purge_expired(), int)
    for keep in (result.session, result.session.id, str(result.session.id), None):
        await users.set_password(result.user, "secret", keep=keep)
    await users.login(
        "ada@example.com",
        "secret",
        context=RequestContext(ip="::1"),
        claims={"a": 1},
        lifetime=timedelta(hours=1),
    )


def role_of(user: NamedUser, session: Session) -> dict[str, object]:
    return {"name": user.username, "at": session.generation}


async def role_in_time(user: NamedUser, session: Session) -> dict[str, str]:
    return {"name": user.username}


def claims(config: AuthConfig) -> None:
    AuthService(NamedUser, config, claims=role_of)
    AuthService(NamedUser, config, claims=role_in_time)
    AuthService(NamedUser, config, claims=lambda user, session: {"name": user.username})
    AuthService(User, config, claims=role_of)  # type: ignore[arg-type]
    AuthService(NamedUser, config, claims={"name": "ada"})  # type: ignore[arg-type]


async def models() -> None:
    user = await User.create_user(email="ada@example.com", password="secret", display_name="Ada")
    assert_type(user, User)
    assert_type(user.email, str)
    assert_type(user.is_active, bool)
    assert_type(user.last_login, datetime | None)
    assert_type(user.session_version, int)
    assert_type(user.created_at, datetime)
    assert_type(await user.check_password("secret"), bool)
    assert_type(user.has_usable_password(), bool)
    assert_type((await UuidUser.create_user(email="ada@example.com")).id, UUID)
    assert_type((await StrUser.create_user(email="ada@example.com", code="ada")).code, str)


async def generic_over(auth: AuthService[AbstractUser], token: str) -> None:
    """Code that is shared by hosts sees what every user has."""
    assert_type((await auth.authenticate(token)).email, str)


async def mistakes(users: AuthService[User], config: AuthConfig) -> None:
    result = await users.login("ada@example.com", "secret")
    wrong_user: NamedUser = result.user  # type: ignore[assignment]
    print(wrong_user, result.user.username)  # type: ignore[attr-defined]
    await users.set_password(wrong_user, "secret")  # type: ignore[arg-type]
    await users.logout_all(result.user, keep=result)  # type: ignore[arg-type]
    await users.login("ada@example.com")  # type: ignore[call-arg]
    await users.login(7, "secret")  # type: ignore[arg-type]
    await users.refresh(result)  # type: ignore[arg-type]
    await users.authenticate(result.access_token.encode())  # type: ignore[arg-type]
    users.decode(result.access_token).sub  # type: ignore[attr-defined]  # noqa: B018
    result.user = result.user  # type: ignore[misc]
    AuthService(Session, config)  # type: ignore[type-var]
    AuthService(User(), config)  # type: ignore[arg-type]
    AuthService(User, {"secret": ""})  # type: ignore[arg-type]
    AuthService(User, config, EventEmitter())  # type: ignore[call-arg]
    AuthConfig("")  # type: ignore[call-arg]
    SigningKey("", algorithm="none")  # type: ignore[arg-type]
