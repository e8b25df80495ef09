"""A program that logs in, changes passwords, and notes the events it receives, until it is killed."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from tortoise.context import TortoiseContext

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import User
from tests.support.database import MODULES
from tortoise_auth import AuthConfig, AuthenticationError, AuthService, EventEmitter
from tortoise_auth.events import PasswordChanged, UserLogin
from tortoise_auth.models import Session
from tortoise_auth.testing import cheap_hasher

ACCOUNTS = [f"user{number}@example.com" for number in range(3)]
LEASE = timedelta(seconds=0.3)


@dataclass(frozen=True)
class Note:
    """An event that a durable handler received, and what it saw of the change.

    Attributes:
        event_id: ``event.id``.
        name: ``event.name``.
        user: The primary key of the account that it was given.
        session: The id of the session, of a login.
        there: The change was there to be seen.
    """

    event_id: str
    name: str
    user: str
    session: str | None
    there: bool


class Journal:
    """Notes that outlive the process: each is on the disk before the handler returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, note: Note) -> None:
        """Append a note."""
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, json.dumps(asdict(note)).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)

    def read(self) -> list[Note]:
        """Return the notes of all processes."""
        return [Note(**json.loads(line)) for line in self._path.read_text().splitlines()]


def service(journal: Journal) -> AuthService[User]:
    """Return the service of the program, with its durable handler."""
    emitter = EventEmitter()

    @emitter.on("user_login", "password_changed", delivery="durable", name="journal")
    async def note(user: User, event: UserLogin[User] | PasswordChanged[User]) -> None:
        session = event.session_id if isinstance(event, UserLogin) else None
        there = (
            user.session_version > 0
            if session is None
            else await Session.exists(id=session, user_id=str(user.pk))
        )
        journal.write(Note(str(event.id), event.name, str(user.pk), session, there))

    return AuthService(
        User,
        AuthConfig(secret=SECRET),
        emitter=emitter,
        passwords=cheap_hasher(threads=1),
        throttle=None,
    )


def run(url: str, connection: str, journal: Path, ready: Connection) -> None:
    """Run on a database of the test until killed."""
    asyncio.run(_live(url, connection, Journal(journal), ready))


async def _live(url: str, connection: str, journal: Journal, ready: Connection) -> None:
    config = {
        "connections": {connection: url},
        "apps": {"models": {"models": MODULES, "default_connection": connection}},
    }
    async with TortoiseContext() as context:
        await context.init(config=config)
        auth = service(journal)
        # Each kill costs an attempt, and so does each handler that a busy machine slows down.
        pause = timedelta(milliseconds=50)
        async with auth.relay(lease=LEASE, poll_interval=pause, max_attempts=10_000):
            await asyncio.gather(*(_use(auth, email, ready) for email in ACCOUNTS))


async def _use(auth: AuthService[User], email: str, ready: Connection) -> None:
    while True:
        try:
            result = await auth.login(email, PASSWORD)
        except AuthenticationError:
            continue  # the server ended the COMMIT of a killed process while this hash was computed
        ready.send("ready")
        await auth.set_password(result.user, PASSWORD)
