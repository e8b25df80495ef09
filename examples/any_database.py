"""Twenty lines that run unchanged on every database: only ``DATABASE_URL`` differs.

Without it they run on SQLite in memory.
"""

import asyncio
import os
import secrets

from tortoise import Tortoise

from tortoise_auth import AbstractUser, AuthConfig, AuthService, on


class User(AbstractUser):
    """The host's own model."""


auth = AuthService(
    User, AuthConfig(secret=os.environ.get("AUTH_SECRET", secrets.token_urlsafe(48)))
)


@on("user_login", delivery="durable", name="welcome")
async def welcome(user: User) -> None:
    print("delivered to", user.email)


async def main() -> None:
    await Tortoise.init(
        db_url=os.environ.get("DATABASE_URL", "sqlite://:memory:"),
        modules={"models": ["__main__", "tortoise_auth.models"]},
    )
    await Tortoise.generate_schemas()
    await auth.create_user(email="ada@example.com", password="correct horse battery staple")
    result = await auth.login("ada@example.com", "correct horse battery staple")
    result = await auth.refresh(result.refresh_token)
    print("authenticated as", (await auth.authenticate(result.access_token)).email)
    print("rows delivered:", await auth.relay().drain())
    print("sessions ended:", (await auth.logout(result.access_token)).sessions)
    await Tortoise.close_connections()


asyncio.run(main())
