"""Durable delivery: a program is killed right after a login, and its mail arrives all the same.

Run it with ``python examples/outbox_relay.py``. It needs no service: the database is an SQLite file
in a temporary folder, and the mail server is a class that may refuse. The program that is killed
and started again is this file, in processes of their own. What went wrong is mended with the
command ``tortoise-auth``, from ``pip install ".[cli]"``.
"""

import asyncio
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from tortoise import Tortoise

from tortoise_auth import AbstractUser, AuthConfig, AuthService, on
from tortoise_auth.events import UserLogin
from tortoise_auth.models import OutboxEntry

TORTOISE_ORM = {
    "connections": {"default": os.environ.get("SHOP_DATABASE", "sqlite://outbox_relay.sqlite3")},
    "apps": {"models": {"models": [__name__, "tortoise_auth.models"]}},
}
EMAIL, PASSWORD = "ada@example.com", "correct horse battery staple"


class User(AbstractUser):
    """The host's own model."""


auth = AuthService(User, AuthConfig(secret=secrets.token_urlsafe(48)))


class MailServer:
    """Refuses as many mails as ``refusals`` says."""

    refusals = 0


# Rows are kept for a name. It stays when the function moves, or when this file runs as __main__.
@on("user_login", delivery="durable", name="mail.new_login")
async def send_mail(user: User, event: UserLogin[User]) -> None:
    """Send a notice. It may be called twice for one event; ``event.id`` is then the same."""
    if MailServer.refusals > 0:
        MailServer.refusals -= 1
        raise ConnectionError("the mail server is down")
    outcome(f"mail to {user.email}: there was a login ({event.id})")


async def log_in_and_die() -> None:
    @on("user_login")  # an inline handler runs after the commit, before any relay
    async def crash(user: User) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async with database():
        await Tortoise.generate_schemas()
        await auth.create_user(email=EMAIL, password=PASSWORD)
        await auth.login(EMAIL, PASSWORD)


async def start_again() -> None:
    async with database():
        step("The program starts again, with a relay")
        outcome(f"rows delivered: {await auth.relay().drain()}")
        outbox("list")

        step("Ada logs in while the mail server refuses twice")
        await log_in(refusals=2)
        await deliver(max_attempts=10)

        step("Ada logs in while it refuses three times, and three times is all the relay tries")
        await log_in(refusals=3)
        await deliver(max_attempts=3)
        outbox("list", "--dead")

        step("The mail server works again, and an operator gives the dead letter a new start")
        outbox("retry", "--all-dead")
        await deliver(max_attempts=3)
        outbox("list", "--dead")


async def log_in(refusals: int) -> None:
    MailServer.refusals = refusals
    await auth.login(EMAIL, PASSWORD)
    outcome("the login itself knows nothing of mail, and succeeds")


async def deliver(max_attempts: int) -> None:
    """Relay until nothing waits. An application has a relay running: ``async with auth.relay():``."""
    relay = auth.relay(max_attempts=max_attempts, backoff=timedelta(milliseconds=20))
    while await OutboxEntry.exists():
        await relay.drain()


@asynccontextmanager
async def database() -> AsyncIterator[None]:
    await Tortoise.init(config=TORTOISE_ORM)
    try:
        yield
    finally:
        await Tortoise.close_connections()


def outbox(*arguments: str) -> None:
    """Run ``tortoise-auth outbox``, as an operator would."""
    print(f"  $ tortoise-auth outbox {' '.join(arguments)}", flush=True)
    run("-m", "tortoise_auth.cli", "outbox", *arguments, "--config", "outbox_relay:TORTOISE_ORM")


def run(*arguments: str) -> int:
    """Run Python, which finds this file as a module; return the exit code."""
    paths = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode


def step(title: str) -> None:
    print(f"\n{title}", flush=True)


def outcome(text: str) -> None:
    print(f"  {text}", flush=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHOP_DATABASE"] = f"sqlite://{Path(folder) / 'shop.sqlite3'}"
        step("A program logs Ada in, and is killed right after the commit")
        ended = run(__file__, "log in and die")
        outcome(f"it ended with {signal.Signals(-ended).name}; no mail was sent, but a row waits:")
        outbox("list")
        return run(__file__, "start again")


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="  log: %(message)s")
    match sys.argv[1:]:
        case ["log in and die"]:
            asyncio.run(log_in_and_die())
        case ["start again"]:
            asyncio.run(start_again())
        case _:
            sys.exit(main())
