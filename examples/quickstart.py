"""One account, one session, from sign-up to logout, with every handler printing what it received.

Run it with ``make demo``, or ``python examples/quickstart.py``. It needs no service: the database
is an SQLite file in a temporary folder.
"""

import asyncio
import secrets
import tempfile
from pathlib import Path

from tortoise import Tortoise, fields

from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthenticationError,
    AuthService,
    RequestContext,
    TokenError,
    on,
)


class User(AbstractUser):
    """The host's own model: a table of its own, and whatever columns it needs."""

    display_name = fields.CharField(max_length=100, default="")


@on("user_registered")
async def welcome(user: User) -> None:
    received("user_registered", f"welcome, {user.display_name}")


@on("user_login")
async def audit_login(user: User) -> None:
    received("user_login", f"{user.email} is in")


@on("user_login_failed")
async def audit_failure(*, identifier: str, reason: str) -> None:
    received("user_login_failed", f"{identifier!r}: {reason} (the visitor does not see the reason)")


@on("session_refreshed")
async def audit_refresh(user: User) -> None:
    received("session_refreshed", f"{user.email} got a new pair of tokens")


@on("refresh_token_reused")
async def alarm(user: User) -> None:
    received("refresh_token_reused", f"there is a copy of a token of {user.email}")


@on("password_changed")
async def notify(user: User) -> None:
    received("password_changed", f"mail to {user.email}: was that you?")


@on("user_logout")
async def audit_logout(user: User) -> None:
    received("user_logout", f"{user.email} is out")


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        await Tortoise.init(
            db_url=f"sqlite://{Path(folder) / 'quickstart.sqlite3'}",
            modules={"models": ["__main__", "tortoise_auth.models"]},
        )
        try:
            await Tortoise.generate_schemas()
            await tour()
        finally:
            await Tortoise.close_connections()


async def tour() -> None:
    # In an application the secret comes from the environment.
    auth = AuthService(User, AuthConfig(secret=secrets.token_urlsafe(48)))
    browser = RequestContext(ip="203.0.113.7", user_agent="Firefox")
    password = "correct horse battery staple"

    step("Sign up")
    await auth.create_user(email="Ada@Example.com", password=password, display_name="Ada")

    step("Log in with a wrong password")
    try:
        await auth.login("ada@example.com", "incorrect horse", context=browser)
    except AuthenticationError as error:
        outcome(f"AuthenticationError: {error}")

    step("Log in")
    laptop = await auth.login("ada@example.com", password, context=browser)
    phone = await auth.login("ada@example.com", password)
    outcome(f"access token until {laptop.access_expires_at:%H:%M:%S} UTC")
    outcome(f"{len(await auth.sessions(laptop.user))} sessions: a laptop and a phone")

    step("Call with the access token")
    user = await auth.authenticate(laptop.access_token)
    outcome(f"it is {user.display_name}, in one SQL query")

    step("Refresh")
    renewed = await auth.refresh(laptop.refresh_token)
    outcome("a new access token and a new refresh token; the old refresh token is spent")

    step("Replay the spent refresh token, as a thief would")
    await refused(auth.refresh(laptop.refresh_token))
    outcome("the whole session of the laptop is over, for the thief and for the owner:")
    await refused(auth.refresh(renewed.refresh_token))
    await refused(auth.authenticate(renewed.access_token))

    step("Change the password, on the phone, and keep the phone logged in")
    await auth.change_password(user, password, "wrong donkey charger nail", keep=phone.session)
    await auth.authenticate(phone.access_token)
    outcome("every other session is over; the phone goes on")

    step("Log out")
    ended = await auth.logout(phone.access_token)
    outcome(f"{ended.sessions} session ended, and neither of its tokens works any more:")
    await refused(auth.authenticate(phone.access_token))
    await refused(auth.refresh(phone.refresh_token))


async def refused(call) -> None:  # type: ignore[no-untyped-def]
    try:
        await call
    except TokenError as error:
        outcome(f"{type(error).__name__}: {error}")


def step(title: str) -> None:
    print(f"\n{title}")


def outcome(text: str) -> None:
    print(f"  {text}")


def received(event: str, text: str) -> None:
    print(f"  handler of {event}: {text}")


if __name__ == "__main__":
    asyncio.run(main())
