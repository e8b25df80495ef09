"""Logins in one service, handled in another: over Redis Streams, with FastStream.

Run it with ``python examples/broker.py``. It needs a Redis server, at ``REDIS_URL`` or on this
machine, and the extra: ``pip install '.[faststream]' 'faststream[redis]'``. Both
services run in this one program, so that there is something to watch; nothing but the stream
connects them. It leaves nothing behind.
"""

import asyncio
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path

from faststream.redis import RedisBroker, StreamSub
from tortoise import Tortoise, fields

from tortoise_auth import AbstractUser, AuthConfig, AuthService, EventEmitter, RequestContext
from tortoise_auth.events import UserLogin, UserLogout, emitter
from tortoise_auth.integrations.faststream import feed, publish_events
from tortoise_auth.models import OutboxEntry

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
STREAM = f"auth-events-{secrets.token_hex(4)}"
QUIET = logging.getLogger("example")  # FastStream's own logs every message

# ---- The shop: people log in here. -----------------------------------------------------------


class User(AbstractUser):
    """The shop's own model."""

    display_name = fields.CharField(max_length=100, default="")


shop = RedisBroker(REDIS_URL, logger=QUIET)
publish_events(
    emitter,
    shop.publisher(stream=STREAM),
    "user_login",
    "user_logout",
    source="https://shop.example.com/auth",
)

# ---- The audit service: another program, perhaps of another team. It has no user table. ------

audit_emitter = EventEmitter(propagate_errors=True)
audit = RedisBroker(REDIS_URL, logger=QUIET)
audit.subscriber(stream=StreamSub(STREAM, group="audit", consumer="audit-1"))(feed(audit_emitter))
audited = asyncio.Queue[str]()


@audit_emitter.on(UserLogin)
async def record_login(event: UserLogin) -> None:
    where = f"from {event.context.ip} by {event.method}"
    audited.put_nowait(f"UserLogin {event.id}: user {event.subject_id} {where}")


@audit_emitter.on(UserLogout)
async def record_logout(event: UserLogout) -> None:
    audited.put_nowait(f"UserLogout {event.id}: user {event.subject_id}")


# ---- Both at work. ---------------------------------------------------------------------------


async def main() -> int:
    async with shop, audit:
        if not await shop.ping(timeout=2):
            print(f"No Redis answers at {REDIS_URL}: start one, or set REDIS_URL", file=sys.stderr)
            return 2
        redis = await shop.connect()
        try:
            with tempfile.TemporaryDirectory() as folder:
                await in_database(Path(folder))
        finally:
            await audit.stop()
            await redis.delete(STREAM)
    return 0


async def in_database(folder: Path) -> None:
    await Tortoise.init(
        db_url=f"sqlite://{folder / 'shop.sqlite3'}",
        modules={"models": ["__main__", "tortoise_auth.models"]},
    )
    try:
        await Tortoise.generate_schemas()
        await tour()
    finally:
        await Tortoise.close_connections()


async def tour() -> None:
    auth = AuthService(User, AuthConfig(secret=secrets.token_urlsafe(48)))
    password = "correct horse battery staple"
    await auth.create_user(email="ada@example.com", password=password)
    await audit.start()
    await shop.start()
    print(f"Redis at {REDIS_URL}, stream {STREAM}")

    step("Ada logs in, and no relay is running yet")
    phone = RequestContext(ip="203.0.113.7")
    result = await auth.login("ada@example.com", password, context=phone)
    say("shop", f"she is in; {await OutboxEntry.all().count()} event waits in the outbox")

    step("A relay carries what is due to the broker")
    say("relay", f"published {await auth.relay().drain()} event to Redis")
    await next_delivery()

    step("With a relay in the application, events leave when the change is committed")
    async with auth.relay():
        await auth.logout(result.access_token)
        say("shop", "Ada has logged out")
        await next_delivery()

    say("shop", f"{await OutboxEntry.all().count()} events wait in the outbox")


async def next_delivery() -> None:
    async with asyncio.timeout(10):
        say("audit", f"received {await audited.get()}")


def step(title: str) -> None:
    print(f"\n{title}")


def say(speaker: str, text: str) -> None:
    print(f"  {speaker:<6} {text}")


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
