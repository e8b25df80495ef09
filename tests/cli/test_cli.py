"""The command line: real processes, on a project in a folder, on an SQLite file and on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import AuditRow, User
from tests.support.database import SHARED_DATABASES, address, connection_of, database
from tortoise_auth import AuthConfig, AuthService, EventEmitter
from tortoise_auth.clock import utc_now
from tortoise_auth.models import DeadLetter, OutboxEntry
from tortoise_auth.users.changes import replace_values

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("tortoise-auth")
EMAIL = "ada@example.com"
DEADLINE = 60
"""Seconds until a test gives up waiting for another process; nothing takes that long."""

SHOP = """
import asyncio, os, pathlib, sys, time
from tests.support.app import AuditRow, User
from tortoise_auth import AuthConfig, AuthService, EventEmitter
from tortoise_auth.events import UserLogin
from tortoise_auth.testing import cheap_hasher

TORTOISE_ORM = {
    "connections": {"default": os.environ["SHOP_DATABASE"]},
    "apps": {"models": {"models": ["tests.support.app", "tortoise_auth.models"]}},
}
emitter = EventEmitter()
config = AuthConfig(secret=os.environ["SHOP_SECRET"])
auth = AuthService(User, config, emitter=emitter, passwords=cheap_hasher())


class Container:
    service = auth


def say(text):
    print(text, file=sys.stderr, flush=True)
"""

RECORD = """
@emitter.on("user_login", delivery="durable", name="shop:record")
async def record(user, event):
    await AuditRow.create(event=f"{event.name} {event.id}", subject=user.email, at=event.occurred_at)
    say("recorded")
"""

BROKEN = """
@emitter.on("user_login", delivery="durable", name="shop:record")
async def record(user):
    raise RuntimeError("no mail \\x1b[2J today\\nnor tomorrow")
"""


@dataclass
class Project:
    """A host's program in a folder, and its database, in which this process writes, too.

    Attributes:
        folder: Where ``shop.py`` is, and where commands run.
        context: The database.
        environment: What commands find in theirs.
    """

    folder: Path
    context: TortoiseContext
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, *code: str) -> None:
        """Write ``shop.py``, with handlers."""
        (self.folder / "shop.py").write_text("\n".join((SHOP, *code)))

    def run(
        self, *arguments: str, stdin: int = subprocess.DEVNULL
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with the database that belongs to the project."""
        return run(*arguments, folder=self.folder, values=self.environment, stdin=stdin)

    def outbox(self, *arguments: str) -> str:
        """Return what a command for the outbox prints when all is well."""
        finished = self.run("outbox", *arguments)
        assert (finished.returncode, finished.stderr) == (0, "")
        return finished.stdout

    @asynccontextmanager
    async def relay(self, *options: str) -> AsyncIterator[RelayProcess]:
        """Run a relay process, and see to it that it is gone afterwards."""
        process = await asyncio.create_subprocess_exec(
            *(str(COMMAND), "relay", "shop:auth", "--poll-interval", "0.05", *options),
            cwd=self.folder,
            env=environment(self.environment),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        relay = RelayProcess(process)
        try:
            yield relay
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def log_in(self, subscription: str = "shop:record") -> None:
        """Log in as Ada, as a web process of the host that knows the subscription by name."""
        emitter = EventEmitter()

        @emitter.on("user_login", delivery="durable", name=subscription)
        async def elsewhere(user: User) -> None:
            raise AssertionError("the relay process delivers")

        if not await User.exists(email=EMAIL):
            await User.create_user(email=EMAIL, password=PASSWORD)
        auth = AuthService(User, AuthConfig(secret=SECRET), emitter=emitter)
        await auth.login(EMAIL, PASSWORD)

    async def entry(self, **values: Any) -> OutboxEntry:
        """Write a row as if it had been there for an hour."""
        hour_ago = utc_now() - timedelta(hours=1)
        defaults: dict[str, Any] = {
            "event_id": uuid4(),
            "event_name": "user_login",
            "subscription": "shop:record",
            "subject_id": "7",
            "payload": {},
            "created_at": hour_ago,
        }
        return await OutboxEntry.create(**defaults | values)

    async def dead_letter(self, *, days: int = 0, **values: Any) -> DeadLetter:
        """Write a dead letter that died some days and an hour ago."""
        died = utc_now() - timedelta(days=days, hours=1)
        row = await self.entry(attempts=10, last_error="KeyError: 'x'", **values)
        await row.delete()
        kept = {name: getattr(row, name) for name in DeadLetter._meta.db_fields - {"dead_at"}}
        return await DeadLetter.create(dead_at=died, **kept)


@dataclass
class RelayProcess:
    """A running ``tortoise-auth relay``."""

    process: asyncio.subprocess.Process
    log: list[str] = field(default_factory=list)

    async def says(self, text: str) -> str:
        """Wait for a line with *text* on its standard error."""
        assert self.process.stderr is not None
        async with asyncio.timeout(DEADLINE):
            while line := (await self.process.stderr.readline()).decode():
                self.log.append(line)
                if text in line:
                    return line
        raise AssertionError(f"it ended without saying {text!r}:\n{''.join(self.log)}")

    async def ends(self, number: signal.Signals) -> tuple[int, float]:
        """Send a signal; return the exit code, and how many seconds it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        assert self.process.stderr is not None
        async with asyncio.timeout(DEADLINE):
            self.log.append((await self.process.stderr.read()).decode())
            return await self.process.wait(), time.monotonic() - began


def environment(values: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a command: ours without settings, and *values*."""
    inherited = {name: value for name, value in os.environ.items() if name != "TORTOISE_ORM"}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **values}


def run(
    *arguments: str, folder: Path, values: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=folder,
        env=environment(values),
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


async def eventually(true: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something is true of the database."""
    async with asyncio.timeout(DEADLINE):
        while not await true():  # noqa: ASYNC110 - another process sends no event
            await asyncio.sleep(0.02)


@asynccontextmanager
async def project_on(kind: str, folder: Path) -> AsyncIterator[Project]:
    """Make a project with an empty database."""
    async with database(kind, folder) as context:
        project = Project(
            folder,
            context,
            {
                "SHOP_DATABASE": address(context),
                "SHOP_SECRET": SECRET,
                "TORTOISE_ORM": "shop:TORTOISE_ORM",
            },
        )
        project.write(RECORD)
        yield project


@pytest.fixture(params=SHARED_DATABASES)
async def project(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Project]:
    """A project on each database that two processes can share."""
    async with project_on(request.param, tmp_path) as project:
        yield project


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Project]:
    """A project on an SQLite file, for what no database changes."""
    async with project_on("file", tmp_path) as project:
        yield project


class TestRelay:
    """``tortoise-auth relay``: a relay as a process."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
    async def test_delivers(self, project: Project, number: signal.Signals) -> None:
        """Rows that other processes write are delivered once each, and a signal ends it with 0."""
        await project.log_in()
        async with project.relay() as relay:
            await relay.says("delivers to shop:record")
            await relay.says("recorded")
            await project.log_in()
            await relay.says("recorded")
            await eventually(lambda: _is_empty())
            code, seconds = await relay.ends(number)
        assert code == 0
        assert seconds < 10
        rows = await AuditRow.all()
        assert [row.subject for row in rows] == [EMAIL, EMAIL]
        assert len({row.event for row in rows}) == 2
        assert "Traceback" not in "".join(relay.log)

    @pytest.mark.parametrize(
        "handler",
        [
            'def record(user):\n    say("working")\n    time.sleep(600)',
            'async def record(user):\n    say("working")\n    time.sleep(600)',
            'async def record(user):\n    say("working")\n    await asyncio.sleep(600)',
            'async def record(user):\n    say("working")\n    while True:\n        try:\n'
            "            await asyncio.sleep(600)\n        except asyncio.CancelledError: pass",
        ],
        ids=["thread", "blocks-the-loop", "sleeps", "refuses"],
    )
    async def test_ends_in_time(self, shop: Project, handler: str) -> None:
        """A handler that hangs does not hold up the end: its row is left to the lease."""
        shop.write(
            f'@emitter.on("user_login", delivery="durable", name="shop:record")\n{handler}\n'
        )
        await shop.log_in()
        async with shop.relay("--stop-timeout", "0.5", "--lease", "300") as relay:
            await relay.says("working")
            code, seconds = await relay.ends(signal.SIGTERM)
        row = await OutboxEntry.get()
        assert code == 0
        assert seconds < 10
        assert row.attempts == 1
        assert row.last_error is None
        assert row.due_at is not None
        assert row.due_at - utc_now() > timedelta(seconds=200)

    async def test_waits_for_a_handler(self, shop: Project) -> None:
        """A handler that ends within the time to stop is waited for, and its row is gone."""
        shop.write(
            '@emitter.on("user_login", delivery="durable", name="shop:record")\n'
            "async def record(user):\n"
            '    say("working")\n'
            '    while not pathlib.Path("go").exists():\n'
            "        await asyncio.sleep(0.01)\n"
            '    say("finished")\n'
        )
        await shop.log_in()
        async with shop.relay("--stop-timeout", str(DEADLINE)) as relay:
            await relay.says("working")
            relay.process.send_signal(signal.SIGTERM)
            await relay.says("stops")
            (shop.folder / "go").touch()
            await relay.says("finished")
            async with asyncio.timeout(DEADLINE):
                assert await relay.process.wait() == 0
        assert await _is_empty()

    async def test_second_signal(self, shop: Project) -> None:
        """A second signal ends it at once."""
        shop.write(
            '@emitter.on("user_login", delivery="durable", name="shop:record")\n'
            'async def record(user):\n    say("working")\n    await asyncio.sleep(600)\n'
        )
        await shop.log_in()
        async with shop.relay("--stop-timeout", "600") as relay:
            await relay.says("working")
            relay.process.send_signal(signal.SIGINT)
            await relay.says("stops")
            code, seconds = await relay.ends(signal.SIGINT)
        assert code == -signal.SIGINT
        assert seconds < 10

    async def test_dies_visibly(self, shop: Project) -> None:
        """A relay that cannot go on ends its process with an error, so that a supervisor restarts it."""
        shop.write(
            RECORD
            + "from tortoise_auth.events import outbox\n"
            + "class Panic(BaseException): pass\n"
            + 'async def claim(*args, **options): raise Panic("no")\n'
            + "outbox.claim = claim\n"
        )
        async with shop.relay() as relay:
            await relay.says("failed and has ended")
            assert relay.process.stderr is not None
            async with asyncio.timeout(DEADLINE):
                log = (await relay.process.stderr.read()).decode()
                assert await relay.process.wait() == 1
        assert "The relay has ended by itself; its log says why" in log

    async def test_finishes_the_background(self, shop: Project) -> None:
        """What a durable handler emitted into the background is done before it ends."""
        shop.write(
            '@emitter.on("user_login", delivery="durable", name="shop:record")\n'
            'async def record(user):\n    await emitter.emit("greeted")\n    say("emitted")\n'
            '@emitter.on("greeted", delivery="background")\n'
            "async def greet():\n"
            '    while not pathlib.Path("go").exists():\n'
            "        await asyncio.sleep(0.01)\n"
            '    say("greeted")\n'
        )
        await shop.log_in()
        async with shop.relay("--stop-timeout", str(DEADLINE)) as relay:
            await relay.says("emitted")
            relay.process.send_signal(signal.SIGTERM)
            await relay.says("stops")
            (shop.folder / "go").touch()
            await relay.says("greeted")
            async with asyncio.timeout(DEADLINE):
                assert await relay.process.wait() == 0

    async def test_options(self, project: Project) -> None:
        """``--max-attempts`` decides when a row is a dead letter, and the log says so readably."""
        project.write(BROKEN)
        await project.log_in()
        async with project.relay("--max-attempts", "1") as relay:
            line = await relay.says("is a dead letter after 1 attempts")
            await eventually(lambda: DeadLetter.exists())
            assert (await relay.ends(signal.SIGTERM))[0] == 0
        assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ERROR tortoise_auth.relay: ", line)
        assert "RuntimeError: no mail \\x1b[2J today\\nnor tomorrow" in line

    async def test_survives_a_missing_table(self, tmp_path: Path) -> None:
        """Started before the database is ready, it tries again, and delivers when it is."""
        async with project_on("file", tmp_path) as shop:
            await connection_of(shop.context).execute_script("DROP TABLE tortoise_auth_outbox")
            async with shop.relay() as relay:
                await relay.says("could not work; it will try again")
                await shop.context.generate_schemas()
                await shop.log_in()
                await relay.says("recorded")
                assert (await relay.ends(signal.SIGTERM))[0] == 0

    async def test_lifespan(self, shop: Project) -> None:
        """What the handlers need is open before the first delivery and closed after the last."""
        shop.write(
            "from contextlib import asynccontextmanager\n"
            "@asynccontextmanager\n"
            "async def lifespan():\n"
            "    await User.all().count()\n"
            '    say("opened")\n'
            "    yield\n"
            '    say("closed")\n',
            RECORD,
        )
        await shop.log_in()
        async with shop.relay("--lifespan", "shop:lifespan") as relay:
            await relay.says("recorded")
            assert (await relay.ends(signal.SIGTERM))[0] == 0
        said = "".join(relay.log)
        assert said.index("opened") < said.index("recorded") < said.index("closed")

    async def test_lifespan_that_fails(self, shop: Project) -> None:
        """A broker that is down ends the command with a reason, so that a supervisor restarts it."""
        shop.write(
            "from contextlib import asynccontextmanager\n"
            "@asynccontextmanager\n"
            "async def lifespan():\n"
            '    raise OSError("no broker")\n'
            "    yield\n",
        )
        relay = shop.run("relay", "shop:auth", "--lifespan", "shop:lifespan")
        assert relay.returncode == 1
        last = relay.stderr.splitlines()[-1]
        assert last == "tortoise-auth: The lifespan could not begin: OSError: no broker"
        assert "shop.py" in relay.stderr

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("emitter", "wanted is a function made by @asynccontextmanager"),
            ("bare", "'shop:bare' is not made by @asynccontextmanager"),
            ("plain", "'shop:plain' is not made by @asynccontextmanager"),
            ("of_the_app", "'shop:of_the_app' must need no arguments, and it needs: app"),
        ],
    )
    async def test_lifespan_that_is_none(self, shop: Project, name: str, error: str) -> None:
        """A mistake is reported before anything runs."""
        shop.write(
            "from contextlib import asynccontextmanager\n"
            "async def bare():\n    yield\n"
            "async def plain():\n    pass\n"
            "@asynccontextmanager\nasync def of_the_app(app):\n    yield\n"
        )
        relay = shop.run("relay", "shop:auth", "--lifespan", f"shop:{name}")
        assert relay.returncode == 2
        assert error in relay.stderr
        assert "Traceback" not in relay.stderr

    async def test_nothing_to_do(self, shop: Project) -> None:
        """A relay whose program registers no durable handler says so."""
        shop.write()
        async with shop.relay() as relay:
            line = await relay.says("nothing to deliver to")
            assert "importing shop:auth registers no durable handler" in line
            assert (await relay.ends(signal.SIGTERM))[0] == 0


class TestStatus:
    """``tortoise-auth outbox status``: numbers for operators and monitors."""

    async def test_json(self, project: Project) -> None:
        """The JSON has counts, the oldest age, rows by subscription, and the unknown subscriptions."""
        now = utc_now()
        await project.entry(due_at=now)
        await project.entry(due_at=now + timedelta(hours=1))
        await project.entry(due_at=now, subscription="old:gone")
        await project.dead_letter()
        numbers = json.loads(project.outbox("status", "shop:auth", "--json"))
        age = numbers.pop("oldest_waiting_seconds")
        assert 3600 <= age < 3600 + 2 * DEADLINE
        assert numbers == {
            "waiting": 3,
            "due": 2,
            "dead": 1,
            "subscriptions": {"shop:record": 2, "old:gone": 1},
            "unknown_subscriptions": ["old:gone"],
        }

    async def test_empty(self, project: Project) -> None:
        """Every number of an empty outbox is 0, and without a service no subscription is unknown."""
        assert json.loads(project.outbox("status", "--json")) == {
            "waiting": 0,
            "due": 0,
            "dead": 0,
            "oldest_waiting_seconds": 0.0,
            "subscriptions": {},
            "unknown_subscriptions": None,
        }

    async def test_text(self, shop: Project) -> None:
        """The text has the same numbers, and marks subscriptions without a handler in this program."""
        await shop.entry(due_at=utc_now())
        await shop.entry(due_at=utc_now(), subscription="old:\x1b[31mgone")
        lines = [line.split() for line in shop.outbox("status", "shop:auth").splitlines()]
        assert lines[:3] == [["waiting", "2"], ["due", "2"], ["dead", "0"]]
        assert ["shop:record", "1"] in lines
        assert ["old:\\x1b[31mgone", "1", "no", "handler", "here"] in lines


class TestList:
    """``tortoise-auth outbox list``: waiting rows and dead letters."""

    async def test_waiting(self, shop: Project) -> None:
        """Each waiting row is one line: event, subscription, subject, attempts, age, when it is due."""
        first = await shop.entry(due_at=utc_now(), attempts=2)
        second = await shop.entry(due_at=utc_now() + timedelta(hours=3), subject_id=None)
        await shop.dead_letter()
        lines = shop.outbox("list").splitlines()
        assert len(lines) == 3
        assert lines[0].split()[:4] == ["Id", "Event", "Subscription", "Subject"]
        cells = ("user_login", "shop:record", "7", "2", "1.0", "h", "due")
        assert lines[1].split() == [str(first.id), *cells]
        assert re.fullmatch(
            rf"{second.id} +user_login +shop:record +0 +1\.0 h +in (3\.0|2\.9|2\.8) h", lines[2]
        )

    async def test_dead(self, shop: Project) -> None:
        """``--dead`` shows the dead letters with their last error, and only those."""
        await shop.entry(due_at=utc_now())
        dead = await shop.dead_letter()
        header, line = shop.outbox("list", "--dead").splitlines()
        assert header.endswith("Last error")
        assert line.split()[0] == str(dead.id)
        assert line.endswith("dead   KeyError: 'x'")

    async def test_escaped(self, shop: Project) -> None:
        """No control character of a row reaches the terminal."""
        hostile = "\x1b]0;owned\x07\x9b2J\r\n\x7f\u202e[red]\u2028\ud800\U000e0001é"
        hostile_name = "a\x1b[8m\nb"
        await shop.dead_letter(
            event_name=hostile_name, subscription=hostile_name, subject_id=hostile_name
        )
        await connection_of(shop.context).execute_query(
            "UPDATE tortoise_auth_dead_letter SET last_error = ?", [hostile.replace("\ud800", "")]
        )
        output = shop.outbox("list", "--dead")
        assert all(each.isprintable() for line in output.split("\n") for each in line)
        assert len(output.splitlines()) == 2
        assert "\\x1b]0;owned\\x07\\x9b2J\\r\\n\\x7f\\u202e[red]\\u2028\\U000e0001é" in output
        assert output.count("a\\x1b[8m\\nb") == 3

    async def test_json(self, project: Project) -> None:
        """``--json`` prints every value in full, errors of any length included."""
        dead = await project.dead_letter()
        error = "\x1b" + "e" * 1999
        await DeadLetter.filter(id=dead.id).update(last_error=error)
        (row,) = json.loads(project.outbox("list", "--dead", "--json"))
        assert row["id"] == dead.id
        assert row["event_id"] == str(dead.event_id)
        assert row["last_error"] == error
        assert (row["event"], row["subscription"]) == ("user_login", "shop:record")
        assert (row["subject_id"], row["attempts"], row["due_at"]) == ("7", 10, None)
        assert "payload" not in row

    async def test_limit(self, shop: Project) -> None:
        """``--limit`` shows the oldest; an empty list says so."""
        rows = [await shop.entry(due_at=utc_now()) for _ in range(3)]
        shown = json.loads(shop.outbox("list", "--json", "--limit", "2"))
        assert [row["id"] for row in shown] == [row.id for row in rows[:2]]
        assert shop.outbox("list", "--dead") == "No dead letters.\n"


class TestRetry:
    """``tortoise-auth outbox retry``: a new start."""

    async def test_ids(self, project: Project) -> None:
        """The given rows are retried with no attempts made, and no others."""
        chosen, backing_off, other = (
            await project.dead_letter(),
            await project.entry(due_at=utc_now() + timedelta(hours=1), attempts=4),
            await project.dead_letter(),
        )
        output = project.outbox("retry", str(chosen.id), str(backing_off.id), str(chosen.id))
        assert output == "Rows that start again: 2\n"
        for old in (chosen, backing_off):
            row = await OutboxEntry.get(id=old.id)
            assert row.attempts == 0
            assert row.due_at is not None
            assert row.due_at <= utc_now()
        (left,) = await DeadLetter.all()
        assert (left.id, left.attempts) == (other.id, 10)

    async def test_all_dead(self, project: Project) -> None:
        """``--all-dead`` retries every dead letter, and a relay then delivers it."""
        project.write(BROKEN)
        await project.log_in()
        async with project.relay("--max-attempts", "1") as relay:
            await relay.says("is a dead letter")
            await eventually(lambda: DeadLetter.exists())
            await relay.ends(signal.SIGTERM)
        project.write(RECORD)
        async with project.relay() as relay:
            await relay.says("delivers to")
            assert project.outbox("retry", "--all-dead") == "Rows that start again: 1\n"
            await relay.says("recorded")
            await eventually(lambda: _is_empty())
        assert await AuditRow.all().count() == 1

    async def test_all_dead_leaves_others(self, project: Project) -> None:
        """``--all-dead`` does not change rows that back off."""
        later = utc_now() + timedelta(hours=1)
        waiting = await project.entry(due_at=later, attempts=3)
        assert project.outbox("retry", "--all-dead") == "Rows that start again: 0\n"
        await waiting.refresh_from_db()
        assert (waiting.attempts, waiting.due_at) == (3, later)

    async def test_missing(self, shop: Project) -> None:
        """Ids without a row are reported, with exit code 1; the others are retried."""
        row = await shop.dead_letter()
        finished = shop.run("outbox", "retry", str(row.id), "123456789")
        assert finished.returncode == 1
        assert finished.stdout == "Rows that start again: 1\n"
        assert finished.stderr == "tortoise-auth: 1 of the ids are not in the outbox\n"


class TestPurge:
    """``tortoise-auth outbox purge``: the end of old dead letters."""

    async def test_older_than(self, project: Project) -> None:
        """Only older dead letters are deleted, without a question where there is no terminal."""
        old, young = await project.dead_letter(days=30), await project.dead_letter(days=29)
        waiting = await project.entry(due_at=utc_now(), created_at=old.created_at)
        assert project.outbox("purge", "--older-than", "30") == "Rows deleted: 1\n"
        assert await DeadLetter.all().values_list("id", flat=True) == [young.id]
        assert await OutboxEntry.all().values_list("id", flat=True) == [waiting.id]

    @pytest.mark.parametrize(
        ("options", "answer", "code", "left"),
        [((), b"n\n", 1, 1), ((), b"y\n", 0, 0), (("--yes",), b"", 0, 0)],
        ids=["no", "yes", "not-asked"],
    )
    async def test_asks(
        self, shop: Project, options: tuple[str, ...], answer: bytes, code: int, left: int
    ) -> None:
        """At a terminal the command asks first, unless ``--yes`` is given."""
        await shop.dead_letter(days=2)
        ours, theirs = pty.openpty()
        try:
            os.write(ours, answer)
            finished = shop.run("outbox", "purge", "--older-than", "1", *options, stdin=theirs)
        finally:
            os.close(ours)
            os.close(theirs)
        assert finished.returncode == code
        assert ("Delete the dead letters" in finished.stdout) is not bool(options)
        assert await DeadLetter.all().count() == left


class TestAdopt:
    """``tortoise-auth adopt``: the accounts of a table that another program filled."""

    async def test_text(self, project: Project) -> None:
        """It says what it would change, changes it with ``--apply``, and has nothing to do then."""
        await former_user("Ada@Example.com", DJANGO)
        planned = project.run("adopt", "shop:auth")
        assert (planned.returncode, planned.stderr) == (0, "")
        assert planned.stdout.splitlines() == [
            "Accounts: 1",
            "",
            "Password              Accounts  Logs in here",
            "Django PBKDF2-SHA256  1         yes",
            "",
            "Accounts  To be changed",
            "1         email: the spelling under which it is looked up",
            "1         session_version: a random number",
            "",
            "Nothing was changed. To do it, add --apply.",
        ]
        assert await User.exists(session_version=0)
        done = project.run("adopt", "shop:auth", "--apply")
        assert (done.returncode, done.stderr) == (0, "")
        text = planned.stdout.replace("To be changed", "Changed")
        assert done.stdout.splitlines() == text.splitlines()[:-2]
        assert await User.exists(email="ada@example.com", session_version__not=0)
        again = project.run("adopt", "shop:auth", "--apply")
        assert again.stdout.endswith("\n\nNothing is to be changed.\n")

    async def test_decisions(self, shop: Project) -> None:
        """What it leaves alone is named by key, with exit code 1, and no address is printed."""
        for typed in ("Ada@example.com", "ada@example.com", "\x1b[2J nonsense"):
            await former_user(typed, "5f4dcc3b5aa765d61d8327deb882cf99")
        finished = shop.run("adopt", "shop:auth", "--apply")
        assert finished.returncode == 1
        assert "  email: these would become one: 1, 2\n" in finished.stdout
        assert "  email: cannot be one: 3\n" in finished.stdout
        assert "no format that is known here: 1, 2, 3\n" in finished.stdout
        assert finished.stderr == (
            "tortoise-auth: Some accounts need a decision of yours: they are listed above\n"
        )
        for secret in ("ada@", "nonsense", "5f4dcc"):
            assert secret not in finished.stdout.lower() + finished.stderr

    async def test_many(self, shop: Project) -> None:
        """The text names twenty of many, and says how many more there are."""
        for number in range(23):
            await former_user(f"nonsense {number}", "")
        finished = shop.run("adopt", "shop:auth")
        assert "email: cannot be one: 1, 2, 3, " in finished.stdout
        assert ", 19, 20, and 3 more\n" in finished.stdout
        assert "none      23        no\n" in finished.stdout

    async def test_json(self, project: Project) -> None:
        """The JSON has every number, and the keys of the accounts that are left alone."""
        await former_user("Ada@example.com", DJANGO)
        await former_user("nonsense", "clear text")
        finished = project.run("adopt", "shop:auth", "--json")
        assert finished.returncode == 1
        assert json.loads(finished.stdout) == {
            "applied": False,
            "accounts": 2,
            "passwords": [
                {"scheme": "Django PBKDF2-SHA256", "obstacle": None, "count": 1, "keys": []},
                {
                    "scheme": None,
                    "obstacle": "It is no hash, or of no format that is known here",
                    "count": 1,
                    "keys": ["2"],
                },
            ],
            "without_password": 0,
            "normalized": {"email": 1},
            "hashes_copied": 0,
            "session_versions_set": 2,
            "session_versions_in_use": 0,
            "unreadable": {"email": {"count": 1, "keys": ["2"]}},
            "colliding": {},
            "changed_meanwhile": {"count": 0, "keys": []},
        }

    async def test_wrong_column(self, shop: Project) -> None:
        """A column that is not there is a mistake of what was typed, in one line."""
        await former_user(EMAIL, DJANGO)
        finished = shop.run("adopt", "shop:auth", "--hash-column", "hashed_password")
        assert (finished.returncode, finished.stdout) == (2, "")
        assert finished.stderr.startswith(
            "tortoise-auth: The table app_user has no column hashed_password. It has: id, email, "
        )
        assert finished.stderr.count("\n") == 1

    @pytest.mark.parametrize(("terminal", "shown"), [("xterm", True), ("dumb", False)])
    async def test_progress(self, shop: Project, terminal: str, shown: bool) -> None:
        """A bar is shown at a terminal that can draw one, and nowhere else."""
        await former_user(EMAIL, DJANGO)
        printed = at_a_terminal(shop, terminal, "adopt", "shop:auth")
        assert "Accounts: 1" in printed
        assert ("Rows" in printed) is shown
        finished = shop.run("adopt", "shop:auth")
        assert "Rows" not in finished.stdout + finished.stderr


DJANGO = "pbkdf2_sha256$1$salt$" + "A" * 43 + "="


async def former_user(email: str, password: str) -> None:
    """Insert an account as another program does."""
    user = await User.create(email=f"{uuid4().hex}@example.com", session_version=0)
    new = {"email": email, "password": password}
    await replace_values(User, user.pk, User._meta.db, read={}, new=new)


def at_a_terminal(project: Project, kind: str, *arguments: str) -> str:
    """Run a command at a terminal, and return what appears there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, *arguments],
        cwd=project.folder,
        env=environment(project.environment | {"TERM": kind}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65_536):
            shown += part
    except OSError:
        pass  # on Linux the end of the other side is an error
    finally:
        os.close(ours)
        process.wait(DEADLINE)
    return shown.decode()


class TestEvents:
    """``tortoise-auth events``: the subscriptions of each event."""

    async def test_table(self, shop: Project) -> None:
        """Each line is one handler: event, turn, delivery, priority and what is special about it."""
        shop.write(
            RECORD,
            '@emitter.on("user_login", priority=1, timeout=2.5, once=True)\n'
            "async def first(user): ...\n"
            '@emitter.on("password_changed", delivery="background")\n'
            "def warn(user): ...\n",
        )
        finished = shop.run("events", "shop:Container.service")
        assert (finished.returncode, finished.stderr) == (0, "")
        assert [line.split() for line in finished.stdout.splitlines()] == [
            ["Event", "Turn", "Handler", "Delivery", "Priority", "Options"],
            ["password_changed", "1", "shop:warn", "background", "10", "on", "a", "thread"],
            ["user_login", "1", "shop:first", "inline", "1", "once,", "timeout=2.5", "s"],
            ["user_login", "2", "shop:record", "durable", "10"],
        ]

    async def test_named(self, shop: Project) -> None:
        """A name that is not the function's own is shown, because rows have it."""
        shop.write('@emitter.on("*", delivery="durable", name="mail")\nasync def f(event): ...')
        output = shop.run("events", "shop:auth").stdout
        assert output.splitlines()[1].split() == ["*", "1", "shop:f", "durable", "10", "name=mail"]

    async def test_without_a_subscription(self, shop: Project) -> None:
        """Without subscriptions the command says so."""
        shop.write()
        assert shop.run("events", "shop:auth").stdout == "There are no subscriptions.\n"


MISTAKES = {
    "no colon": (["events", "shop"], "'shop' does not name an AuthService, as in myapp.main:auth"),
    "no name": (["events", "shop:"], "'shop:' does not name an AuthService"),
    "no module": (["events", "shpo:auth"], "There is no module 'shpo', neither in "),
    "no submodule": (["events", "shop.main:auth"], "There is no module 'shop.main'"),
    "no attribute": (["events", "shop:auht"], "'shop' has no 'auht'; wanted is an AuthService"),
    "suggestion": (["events", "shop:auht"], "There is shop:auth"),
    "no inner attribute": (["events", "shop:Container.auth"], "has no 'Container.auth'"),
    "another type": (["relay", "shop:emitter"], "'shop:emitter' is of type EventEmitter; wanted"),
    "no settings module": (["outbox", "list", "-c", "settings.TORTOISE_ORM"], "no module 'settin"),
    "no settings": (["outbox", "list", "-c", "shop.TORTOISE"], "There is shop:TORTOISE_ORM"),
    "settings type": (["outbox", "list", "-c", "shop:auth"], "is of type AuthService; wanted is"),
    "settings path": (["outbox", "list", "-c", "shop"], "'shop' does not name Tortoise settings"),
    "empty lease": (["relay", "shop:auth", "--lease", "0"], "lease must be a positive timedelta"),
    "no rows": (["outbox", "retry"], "either their ids or --all-dead"),
    "no user model": (
        ["adopt", "shop:User"],
        "'shop:User' is of type ModelMeta; wanted is an Auth",
    ),
    "two kinds": (["outbox", "retry", "1", "--all-dead"], "either their ids or --all-dead"),
}


class TestMistakes:
    """A mistake is answered in one line that says what to type, and with exit code 2."""

    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_typed(self, mistake: str, tmp_path: Path) -> None:
        """Each mistake has one line that names it, and no traceback."""
        arguments, message = MISTAKES[mistake]
        finished = _in_a_folder(tmp_path, SHOP, *arguments, TORTOISE_ORM="shop:TORTOISE_ORM")
        assert (finished.returncode, finished.stdout) == (2, "")
        assert finished.stderr.startswith("tortoise-auth: ")
        assert message in finished.stderr
        assert finished.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            ["outbox", "purge"],
            ["outbox", "retry", "9223372036854775808"],
            ["relay", "shop:auth", "--batch-size", "0"],
            ["nonsense"],
        ],
        ids=" ".join,
    )
    def test_usage(self, arguments: list[str], tmp_path: Path) -> None:
        """Wrong options and values are refused with exit code 2 before anything is touched."""
        finished = _in_a_folder(tmp_path, SHOP, *arguments, TORTOISE_ORM="shop:TORTOISE_ORM")
        assert (finished.returncode, finished.stdout) == (2, "")
        assert "Error: " in finished.stderr
        assert "Traceback" not in finished.stderr
        assert not list(tmp_path.glob("*.sqlite3"))

    def test_no_settings(self, tmp_path: Path) -> None:
        """Without settings it says the three ways to give them."""
        finished = _in_a_folder(tmp_path, SHOP, "outbox", "status")
        assert finished.returncode == 2
        assert finished.stderr.startswith("tortoise-auth: Which database? Say --config ")
        assert "set TORTOISE_ORM" in finished.stderr
        assert "[tool.tortoise]" in finished.stderr

    def test_unreadable_pyproject(self, tmp_path: Path) -> None:
        """A malformed pyproject.toml is reported."""
        (tmp_path / "pyproject.toml").write_text("[tool.tortoise\n")
        finished = _in_a_folder(tmp_path, SHOP, "outbox", "status")
        assert finished.returncode == 2
        assert finished.stderr.startswith("tortoise-auth: pyproject.toml cannot be read: ")

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("import shop_settings", "cannot be imported: No module named 'shop_settings'"),
            ('{}["AUTH_SECRET"]', "The module 'shop' cannot be imported: KeyError: 'AUTH_SECRET'"),
            ("x = (", "cannot be imported: SyntaxError"),
        ],
        ids=["import", "key", "syntax"],
    )
    def test_broken_module(self, tmp_path: Path, code: str, message: str) -> None:
        """A module that fails when it is imported shows where, and then the one line."""
        finished = _in_a_folder(tmp_path, code, "events", "shop:auth")
        assert (finished.returncode, finished.stdout) == (2, "")
        assert 'shop.py", line 1' in finished.stderr
        assert message in finished.stderr.splitlines()[-1]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"apps": {}}, "Tortoise refuses its settings: ConfigurationError: "),
            ({"connections": {"default": "nosql://x"}}, "Unknown DB scheme: nosql"),
            (
                {"apps": {"models": {"models": ["tests.support.app"]}}},
                "OutboxEntry is not registered with",
            ),
            (
                {"apps": {"models": {"models": ["tortoise_auth.models"]}}},
                "User is not registered with Tortoise",
            ),
            (
                {"apps": {"models": {"models": ["tests.support.ap", "tortoise_auth.models"]}}},
                'Module "tests.support.ap" not found',
            ),
        ],
        ids=["empty", "scheme", "no outbox", "no user", "no models"],
    )
    def test_refused_settings(
        self, tmp_path: Path, settings: dict[str, object], message: str
    ) -> None:
        """Settings that Tortoise refuses, or that lack our tables or the users, are reported."""
        code = f"{SHOP}\nTORTOISE_ORM |= {settings!r}\n"
        finished = _in_a_folder(tmp_path, code, "relay", "shop:auth", "-c", "shop:TORTOISE_ORM")
        assert finished.returncode == 2
        assert message in finished.stderr
        assert "Traceback" not in finished.stderr

    def test_missing_table(self, tmp_path: Path) -> None:
        """A database that fails gives exit code 1, and its own message."""
        finished = _in_a_folder(tmp_path, SHOP, "outbox", "list", "-c", "shop:TORTOISE_ORM")
        assert finished.returncode == 1
        assert finished.stderr == (
            "tortoise-auth: The database failed: OperationalError: "
            "no such table: tortoise_auth_outbox\n"
        )

    def test_no_server(self, tmp_path: Path) -> None:
        """A database that cannot be reached is reported without the password of its address."""
        url = "postgres://shop:hunter2@127.0.0.1:1/shop"
        code = f"{SHOP}\nTORTOISE_ORM['connections']['default'] = {url!r}\n"
        finished = _in_a_folder(tmp_path, code, "outbox", "list", "-c", "shop:TORTOISE_ORM")
        assert finished.returncode == 1
        assert finished.stderr.startswith("tortoise-auth: The database failed: ")
        assert "hunter2" not in finished.stderr


class TestSettings:
    """Where the database settings come from: the option, the environment, pyproject.toml."""

    @pytest.mark.parametrize("source", ["option", "dotted", "environment", "pyproject"])
    async def test_sources(self, shop: Project, source: str) -> None:
        """Each source is read, written with a colon or as Tortoise writes it."""
        del shop.environment["TORTOISE_ORM"]
        options: tuple[str, ...] = ()
        if source == "environment":
            shop.environment["TORTOISE_ORM"] = "shop.TORTOISE_ORM"
        elif source == "pyproject":
            text = '[tool.tortoise]\ntortoise_orm = "shop.TORTOISE_ORM"\n'
            (shop.folder / "pyproject.toml").write_text(text)
        else:
            options = ("-c", "shop:TORTOISE_ORM" if source == "option" else "shop.TORTOISE_ORM")
        assert shop.outbox("list", *options) == "Nothing waits.\n"

    async def test_option_first(self, shop: Project) -> None:
        """The option wins over the environment."""
        shop.environment["TORTOISE_ORM"] = "nowhere.TORTOISE_ORM"
        assert shop.outbox("list", "--config", "shop:TORTOISE_ORM") == "Nothing waits.\n"


class TestExtra:
    """Typer and Rich are needed by the command alone."""

    @pytest.mark.parametrize("package", ["typer", "rich"])
    def test_missing(self, package: str) -> None:
        """Without the extra the command is one line that says what to install."""
        finished = _python(
            f"import sys; sys.modules['{package}'] = None; from tortoise_auth.cli import main; main()"
        )
        assert finished.returncode == 1
        assert finished.stderr == (
            f"The command tortoise-auth needs {package}: pip install typer rich\n"
        )

    def test_not_imported(self) -> None:
        """Importing the library imports neither."""
        finished = _python(
            "import sys, tortoise_auth, tortoise_auth.service; "
            "print(sorted({'typer', 'rich', 'tortoise_auth.cli'} & set(sys.modules)))"
        )
        assert (finished.stdout, finished.stderr) == ("[]\n", "")

    def test_as_a_module(self, tmp_path: Path) -> None:
        """``python -m tortoise_auth.cli`` is the same command."""
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tortoise_auth.cli", "outbox", "--help"],
            cwd=tmp_path,
            env=environment({}),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (finished.returncode, finished.stderr) == (0, "")
        assert "Usage: tortoise-auth outbox" in finished.stdout


async def _is_empty() -> bool:
    return not await OutboxEntry.exists()


def _in_a_folder(
    folder: Path, code: str, *arguments: str, **values: str
) -> subprocess.CompletedProcess[str]:
    """Run a command where ``shop.py`` is *code*, and the database a file that is not there yet."""
    (folder / "shop.py").write_text(code)
    settings = {"SHOP_DATABASE": f"sqlite://{folder / 'new.sqlite3'}", "SHOP_SECRET": SECRET}
    return run(*arguments, folder=folder, values=settings | values)


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
