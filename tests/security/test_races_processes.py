"""Two processes on each server, each of which has read before either writes.

Two tasks of one process might owe a correct outcome to its memory. Here nothing is shared
but the database.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
from passlib.hash import pbkdf2_sha256
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, counting_from_zero, log_in
from tests.support.app import User
from tests.support.database import MODULES, address, kind_of
from tests.support.servers import Second, second
from tortoise_auth import AuthResult, AuthService
from tortoise_auth.exceptions import TokenReusedError, TokenRevokedError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIMIT = 60
"""Seconds after which a race that has not ended fails."""
CROWD = 25
"""Calls of each process at the same time."""
CONNECTIONS = 15
"""Connections of each process, and so its calls that have read before any call writes."""
BUDGET = 5
"""Guesses that the throttle of the racers lets through."""

Message: TypeAlias = dict[str, Any]


class Racer:
    """A process with an `AuthService`; see `tests.security.racer`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.security.racer"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, **order: object) -> None:
        """Send an order; an empty one lets a stopped call go on."""
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)

    async def receive(self) -> Message:
        """Return the next answer."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(LIMIT):
                line = await asyncio.to_thread(self._process.stdout.readline)
        except TimeoutError:
            self._process.kill()  # ends the thread that reads
            raise
        answer: Message = json.loads(line)
        return answer

    async def run_to_the_end(self) -> Message:
        """Let the call run to its end, and return the last answer."""
        while "at" in (answer := await self.receive()):
            self.send()
        return answer

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.kill()


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[Racer, Racer]]:
    pair = Racer(), Racer()
    yield pair
    for racer in pair:
        racer.close()


@pytest.fixture
async def racers(processes: tuple[Racer, Racer], server: TortoiseContext) -> tuple[Racer, Racer]:
    """Both processes, connected to the database of the test."""
    kind = kind_of(server)
    database = {
        "connections": {kind: address(server, maxsize=CONNECTIONS)},
        "apps": {"models": {"models": MODULES, "default_connection": kind}},
    }
    for racer in processes:
        racer.send(database=database, secret=SECRET)
    for racer in processes:
        assert await racer.receive() == {"ready": True}
    return processes


@pytest.fixture
async def witness(server: TortoiseContext) -> AsyncIterator[Second]:
    async with second(server) as connection:
        yield connection


async def changes(witness: Second) -> Counter[str]:
    """Return what has changed in the tables."""
    (row,) = await witness.rows("""
        SELECT count(*) AS opened, count(revoked_at) AS ended, coalesce(sum(generation), 0)
        AS refreshed, (SELECT sum(session_version) FROM app_user) AS anchored
        FROM tortoise_auth_session
    """)
    return Counter({name: int(number) for name, number in row.items()})


@pytest.fixture
async def ada(server: TortoiseContext) -> User:
    return await counting_from_zero(await User.create_user(email=EMAIL, password=PASSWORD))


@pytest.fixture
async def session(auth: AuthService[User], ada: User) -> AuthResult[User]:
    return await log_in(auth)


def emitted(*answers: Message) -> Counter[str]:
    """Return what the events report, in the terms of `changes`."""
    happened = Counter[str]()
    for event in [event for answer in answers for event in answer["events"]]:
        name = event["name"]
        happened["opened"] += name == "user_login"
        happened["refreshed"] += name == "session_refreshed"
        happened["anchored"] += name in ("password_changed", "user_deactivated")
        happened["ended"] += event.get("sessions_ended", name == "refresh_token_reused")
    return happened


Order: TypeAlias = Literal["in turn", "overlapping"]
ORDERS: tuple[Order, ...] = ("in turn", "overlapping")


@dataclass
class Race:
    """Two racers, and the database that they race on.

    Attributes:
        first: The racer that commits first.
        second: The other racer.
    """

    first: Racer
    second: Racer
    witness: Second

    async def run(self, order: Order, one: Message, two: Message) -> tuple[Message, Message]:
        """Let both read, then write: one after the other, or *two* before *one* commits.

        Returns:
            The answer of each.
        """
        before = await changes(self.witness)
        for racer, call in ((self.first, one), (self.second, two)):
            racer.send(**call, stops=["begin", "commit"], times=1)
        for racer, call in ((self.first, one), (self.second, two)):
            stopped = await racer.receive()
            assert stopped["at"] == "begin"
            assert stopped["hashes"] >= ("password" in call)
        answers = await (self._in_turn() if order == "in turn" else self._overlapping())
        happened = await changes(self.witness) - before
        assert happened == emitted(*answers)
        return answers

    async def _in_turn(self) -> tuple[Message, Message]:
        self.first.send()
        first = await self.first.run_to_the_end()
        self.second.send()
        return first, await self.second.run_to_the_end()

    async def _overlapping(self) -> tuple[Message, Message]:
        """Let the second write what the first has written but not committed."""
        self.first.send()
        assert (await self.first.receive())["at"] == "commit"
        self.second.send()
        answer = asyncio.create_task(self.second.receive())
        async with asyncio.timeout(LIMIT):
            while not (answer.done() or await self.witness.waiting()):
                pass
        self.first.send()
        first, second = await self.first.run_to_the_end(), await answer
        if "at" in second:
            self.second.send()
            second = await self.second.run_to_the_end()
        return first, second


@pytest.fixture
def race(racers: tuple[Racer, Racer], witness: Second) -> Race:
    return Race(*racers, witness)


async def assert_dead(auth: AuthService[User], tokens: Message) -> None:
    """Check that neither of the tokens in an answer works."""
    with pytest.raises(TokenRevokedError):
        await auth.authenticate(tokens["access"])
    with pytest.raises(TokenRevokedError):
        await auth.refresh(tokens["refresh"])


async def assert_stored(password: str, *, not_: str) -> None:
    """Check which of two passwords is that of the account."""
    stored = await User.get(email=EMAIL)
    assert await stored.check_password(password)
    assert not await stored.check_password(not_)


def ender(name: str, ada: User, session: AuthResult[User] | None = None) -> Message:
    """Return the order to end the sessions of Ada."""
    orders: dict[str, Message] = {
        "logout_all": {"call": "logout_all", "user": ada.pk},
        "set_password": {"call": "set_password", "user": ada.pk, "password": NEW_PASSWORD},
        "deactivate": {"call": "deactivate", "user": ada.pk},
    }
    if session is not None:
        orders["logout_access"] = {"call": "logout", "token": session.access_token}
        orders["logout_refresh"] = {"call": "logout", "token": session.refresh_token}
    return orders[name]


LOGIN = {"call": "login", "identifier": EMAIL, "password": PASSWORD}


@pytest.mark.parametrize("order", ORDERS)
class TestRefresh:
    async def test_and_refresh(
        self, race: Race, auth: AuthService[User], session: AuthResult[User], order: Order
    ) -> None:
        """One refresh gets tokens; the other presents a spent token, and the session ends."""
        refresh = {"call": "refresh", "token": session.refresh_token}
        first, second = await race.run(order, refresh, refresh)
        (won,), (lost,) = first["outcomes"], second["outcomes"]
        assert lost == {"error": "TokenReusedError"}
        assert [event["name"] for event in first["events"]] == ["session_refreshed"]
        assert [event["name"] for event in second["events"]] == ["refresh_token_reused"]
        assert await race.witness.live_sessions() == 0
        await assert_dead(auth, won)

    @pytest.mark.parametrize(
        "name", ["logout_access", "logout_refresh", "logout_all", "set_password", "deactivate"]
    )
    @pytest.mark.parametrize("refresh_first", [True, False])
    async def test_and_end(
        self,
        race: Race,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        name: str,
        refresh_first: bool,
        order: Order,
    ) -> None:
        """Whichever call commits first, no token works once the call that ends the session has returned."""
        calls = [{"call": "refresh", "token": session.refresh_token}, ender(name, ada, session)]
        if refresh_first:
            refreshed, ended = await race.run(order, *calls)
            await assert_dead(auth, refreshed["outcomes"][0])
        else:
            ended, refreshed = await race.run(order, *reversed(calls))
            assert refreshed["outcomes"] == [{"error": "TokenRevokedError"}]
            assert refreshed["events"] == []
        assert ended["outcomes"] == [{"result": None} if name == "set_password" else {"ended": 1}]
        assert len(ended["events"]) == 1
        assert await race.witness.live_sessions() == 0
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(session.access_token)
        if name == "set_password":
            await assert_stored(NEW_PASSWORD, not_=PASSWORD)


@pytest.mark.parametrize("order", ORDERS)
class TestLogin:
    @pytest.mark.parametrize("name", ["set_password", "deactivate"])
    @pytest.mark.parametrize("login_first", [True, False])
    async def test_and_change_of_the_account(
        self,
        race: Race,
        auth: AuthService[User],
        ada: User,
        name: str,
        login_first: bool,
        order: Order,
    ) -> None:
        """A login whose password was checked before the change leaves no live session."""
        calls = [LOGIN, ender(name, ada)]
        if login_first:
            login, ended = await race.run(order, *calls)
            await assert_dead(auth, login["outcomes"][0])
        else:
            ended, login = await race.run(order, *reversed(calls))
            assert login["outcomes"] == [{"error": "AuthenticationError"}]
            assert [event["name"] for event in login["events"]] == ["user_login_failed"]
        assert "error" not in ended["outcomes"][0]
        assert await race.witness.live_sessions() == 0
        if name == "set_password":
            await assert_stored(NEW_PASSWORD, not_=PASSWORD)

    @pytest.mark.parametrize("login_first", [True, False])
    async def test_and_logout_everywhere(
        self,
        race: Race,
        auth: AuthService[User],
        ada: User,
        session: AuthResult[User],
        login_first: bool,
        order: Order,
    ) -> None:
        """A login that commits before the logout is ended by it; one that commits after it stays live."""
        calls = [LOGIN, ender("logout_all", ada)]
        if login_first:
            login, ended = await race.run(order, *calls)
        else:
            ended, login = await race.run(order, *reversed(calls))
        (tokens,) = login["outcomes"]
        # PostgreSQL does not see the session that the login has not committed. MariaDB waits for it.
        caught = login_first and (order == "in turn" or race.witness.language == "mysql")
        assert ended["outcomes"] == [{"ended": 1 + caught}]
        assert await race.witness.live_sessions() == (not caught)
        if caught:
            await assert_dead(auth, tokens)
        else:
            assert await auth.authenticate(tokens["access"]) == ada
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(session.access_token)


@pytest.mark.parametrize("order", ORDERS)
class TestRehash:
    @pytest.fixture
    async def ada(self, ada: User) -> User:
        """An account whose hash has an older scheme."""
        ada.password = pbkdf2_sha256.using(rounds=10).hash(PASSWORD)
        await ada.save(update_fields=["password"])
        return ada

    @pytest.mark.parametrize("check", ["login", "check_password"])
    @pytest.mark.parametrize("rehash_first", [True, False])
    async def test_and_new_password(
        self, race: Race, ada: User, check: str, rehash_first: bool, order: Order
    ) -> None:
        """A rehash of the old password never replaces the new password."""
        calls = [LOGIN | {"call": check, "user": ada.pk}, ender("set_password", ada)]
        if rehash_first:
            rehash, _ = await race.run(order, *calls)
        else:
            _, rehash = await race.run(order, *reversed(calls))
        names = [event["name"] for event in rehash["events"]]
        assert ("password_rehashed" in names) is rehash_first
        await assert_stored(NEW_PASSWORD, not_=PASSWORD)
        assert await race.witness.live_sessions() == 0


class TestCrowd:
    async def run(
        self, racers: tuple[Racer, Racer], witness: Second, table: str, order: Message
    ) -> tuple[Message, Message]:
        """Let every call that has a connection read before any of them writes to *table*."""
        await witness.lock(table)
        for racer in racers:
            racer.send(**order, stops=[], times=CROWD)
        await witness.until_waiting(2 * CONNECTIONS)
        await witness.unlock()
        return await racers[0].run_to_the_end(), await racers[1].run_to_the_end()

    async def test_of_refreshes(
        self,
        racers: tuple[Racer, Racer],
        witness: Second,
        auth: AuthService[User],
        session: AuthResult[User],
    ) -> None:
        """One of fifty refreshes gets tokens, one reuse is reported, and the session ends."""
        order = {"call": "refresh", "token": session.refresh_token}
        answers = await self.run(racers, witness, "tortoise_auth_session", order)
        outcomes = [outcome for answer in answers for outcome in answer["outcomes"]]
        (won,) = [outcome for outcome in outcomes if "access" in outcome]
        outcomes.remove(won)
        assert outcomes == [{"error": "TokenReusedError"}] * (2 * CROWD - 1)
        names = Counter(event["name"] for answer in answers for event in answer["events"])
        assert names == {"session_refreshed": 1, "refresh_token_reused": 1}
        assert await witness.live_sessions() == 0
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(won["access"])
        with pytest.raises(TokenReusedError):
            await auth.refresh(session.refresh_token)

    @pytest.mark.parametrize(
        ("identifier", "ip"),
        [(EMAIL, None), ("nobody@example.com", None), ("{}@example.com", "203.0.113.7")],
        ids=["account", "unknown", "source"],
    )
    @pytest.mark.parametrize("known", [True, False])
    async def test_of_guesses(
        self,
        racers: tuple[Racer, Racer],
        witness: Second,
        ada: User,
        identifier: str,
        ip: str | None,
        known: bool,
    ) -> None:
        """Of fifty guesses at once only the budget is hashed, whether the counter is new or not."""
        guess = {"call": "login", "identifier": identifier, "password": "wrong", "ip": ip}
        used = int(known)
        if known:
            racers[0].send(**guess, stops=[], times=1)
            assert (await racers[0].run_to_the_end())["hashes"] == 1
        answers = await self.run(racers, witness, "tortoise_auth_attempts", guess)
        outcomes = Counter(each["error"] for answer in answers for each in answer["outcomes"])
        checked = BUDGET - used
        assert outcomes == {"AuthenticationError": checked, "ThrottledError": 2 * CROWD - checked}
        assert sum(answer["hashes"] for answer in answers) == checked
