"""Every method of the service, cut short at every step and failed at every call of the database."""

from __future__ import annotations

import functools
import inspect
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import asyncpg
import pytest
from passlib.hash import pbkdf2_sha256
from tortoise.context import TortoiseContext
from tortoise.exceptions import OperationalError

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET
from tests.support.app import User
from tests.support.concurrency import Cancelled, Steps, finished
from tests.support.database import assert_no_connection_is_held, database, root
from tests.support.deliveries import quiet
from tests.support.services import POSTGRES_URL, needs_postgres
from tests.support.statements import transaction_class
from tortoise_auth import (
    AuthConfig,
    AuthResult,
    AuthService,
    EventEmitter,
    RequestContext,
    Revocation,
)
from tortoise_auth.events import Event
from tortoise_auth.exceptions import (
    AuthenticationError,
    ServiceUnavailableError,
    ThrottledError,
    TokenReusedError,
    TortoiseAuthError,
)
from tortoise_auth.models import AttemptCount, OutboxEntry, Session
from tortoise_auth.passwords import PasswordHasher
from tortoise_auth.testing import FakeClock

pytestmark = pytest.mark.slow

Row: TypeAlias = dict[str, Any]
Work: TypeAlias = Callable[[], Coroutine[Any, Any, object]]

HOME = RequestContext(ip="203.0.113.7")
ELSEWHERE = RequestContext(ip="198.51.100.1")
OUTDATED_HASH = pbkdf2_sha256.using(rounds=1).hash(PASSWORD)


@dataclass(frozen=True)
class Snapshot:
    """What is committed, as another connection sees it."""

    users: dict[object, Row]
    sessions: dict[object, Row]
    attempts: dict[object, Row]
    told: list[Row]

    @property
    def live(self) -> set[object]:
        """The ids of the sessions that are not over."""
        return {
            key
            for key, session in self.sessions.items()
            if session["revoked_at"] is None
            and any(
                str(user["id"]) == session["user_id"]
                and user["is_active"]
                and user["session_version"] == session["session_version"]
                for user in self.users.values()
            )
        }

    @property
    def locked(self) -> set[object]:
        """The accounts whose password is locked."""
        return {key for key, row in self.users.items() if row["password_locked_at"] is not None}

    @property
    def failures(self) -> int:
        """How many attempts stand against the account."""
        return sum(int(row["failures"]) for row in self.attempts.values())


@dataclass
class Onlooker:
    """Another connection to the database of the test."""

    client: Any
    connection: asyncpg.Connection | None

    async def look(self) -> Snapshot:
        """Read everything."""
        return Snapshot(
            await self._table("app_user"),
            await self._table("tortoise_auth_session"),
            await self._table("tortoise_auth_attempts", "key"),
            [*(await self._table("tortoise_auth_outbox")).values()],
        )

    async def _table(self, name: str, key: str = "id") -> dict[object, Row]:
        sql = f"SELECT * FROM {name} ORDER BY {key}"
        if self.connection is not None:
            rows = [dict(row) for row in await self.connection.fetch(sql)]
        else:
            with closing(sqlite3.connect(self.client.filename)) as second:
                second.row_factory = sqlite3.Row
                rows = [dict(row) for row in second.execute(sql)]
        return {str(row[key]): row for row in rows}


@dataclass
class Stage:
    """An account with two sessions, the first of which was refreshed, and a service to try.

    Attributes:
        auth: The service, every event of which is heard at once and in a durable row.
        heard: Those heard at once.
        ada: The account.
        spent: The first session, as it was before the refresh.
        current: The first session now.
        other: The second session.
    """

    context: TortoiseContext
    auth: AuthService[User]
    backstage: AuthService[User]
    onlooker: Onlooker
    stored: Row
    stored_sessions: list[Session]
    heard: list[Event]
    ada: User
    spent: AuthResult[User]
    current: AuthResult[User]
    other: AuthResult[User]

    @classmethod
    async def set(
        cls,
        context: TortoiseContext,
        auth: AuthService[User],
        backstage: AuthService[User],
        onlooker: Onlooker,
    ) -> Stage:
        """Create the account, its sessions, and somebody who hears every event."""
        heard: list[Event] = []
        auth.emitter.on("*", heard.append, thread=False)
        auth.emitter.on("*", heard.append, thread=False, delivery="durable", name="row")
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        (stored,) = await User.filter(pk=ada.pk).values()
        del stored["id"]
        spent = await backstage.login(EMAIL, PASSWORD, context=HOME)
        current = await backstage.refresh(spent.refresh_token)
        other = await backstage.login(EMAIL, PASSWORD, context=HOME)
        sessions = await Session.all()
        return cls(
            context, auth, backstage, onlooker, stored, sessions, heard, ada, spent, current, other
        )

    async def reset(self) -> None:
        """Begin anew: an account that has never logged in, with the same sessions."""
        for model in (Session, AttemptCount, OutboxEntry):
            await model.all().delete()
        await User.filter(email=EMAIL).update(**self.stored)
        await Session.bulk_create(self.stored_sessions)
        self.ada = await User.get(email=EMAIL)
        self.heard.clear()

    async def settled(self) -> Snapshot:
        """Let everything that is under way come to its end; return what is there then.

        Whatever changed was told at once and in a durable row, and nothing else.
        """
        await quiet(self.auth.emitter)
        await finished(User.exists())  # waits until asyncpg has called a cancelled statement off
        assert_no_connection_is_held(self.context)
        now = await self.onlooker.look()
        rows = [(str(row["event_id"]), row["event_name"]) for row in now.told]
        assert sorted(rows) == sorted((str(event.id), event.name) for event in self.heard)
        return now

    def told(self) -> Counter[str]:
        """Return what the events say has happened, in the words of `changes`."""
        happened = Counter[str]()
        for event in self.heard:
            happened["opened"] += event.name == "user_login"
            happened["entered"] += event.name == "user_login"
            happened["refreshed"] += event.name == "session_refreshed"
            happened["rehashed"] += event.name == "password_rehashed"
            happened["changed"] += event.name == "password_changed"
            happened["closed"] += event.name == "user_deactivated"
            happened["reopened"] += event.name == "user_activated"
            happened["locked"] += event.name == "account_locked"
            happened["unlocked"] += event.name == "account_unlocked"
            ends_one = event.name in ("session_revoked", "refresh_token_reused")
            happened["ended"] += getattr(event, "sessions_ended", int(ends_one))
        return +happened


def changes(before: Snapshot, after: Snapshot) -> Counter[str]:
    """Return what has happened in the tables."""
    happened = Counter[str]()
    for key, session in after.sessions.items():
        old = before.sessions.get(key, {"generation": 0, "revoked_at": None})
        happened["opened"] += key not in before.sessions
        happened["refreshed"] += session["generation"] - old["generation"]
        happened["ended"] += session["revoked_at"] is not None and old["revoked_at"] is None
    for key, user in after.users.items():
        old = before.users[key]
        raised = user["session_version"] - old["session_version"]
        is_active, was_active = bool(user["is_active"]), bool(old["is_active"])
        happened["entered"] += user["last_login"] != old["last_login"]
        happened["closed"] += was_active and not is_active
        happened["reopened"] += is_active and not was_active
        happened["changed"] += raised - (was_active != is_active)
        happened["rehashed"] += user["password"] != old["password"] and not raised
    happened["locked"] += len(after.locked - before.locked)
    happened["unlocked"] += len(before.locked - after.locked)
    return +happened


@pytest.fixture(params=["file", pytest.param("postgres", marks=needs_postgres)])
async def stage(
    request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[Stage]:
    """A stage on a database with one connection, so that a lost one is missed at once."""
    config = AuthConfig(secret=SECRET)
    auth = AuthService(User, config, clock=clock)
    backstage = AuthService(User, config, clock=clock, emitter=EventEmitter())
    async with database(request.param, tmp_path, maxsize=1) as context:
        client: Any = root(context)
        connection = None
        if request.param == "postgres":
            connection = await asyncpg.connect(
                POSTGRES_URL, server_settings={"search_path": client.schema}
            )
        try:
            yield await Stage.set(context, auth, backstage, Onlooker(client, connection))
        finally:
            if connection is not None:
                await connection.close()


# ---- what is called -------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A call, and what comes of it if nothing comes in between.

    Attributes:
        call: Makes the call.
        outcome: The class of what it returns or raises.
        told: The names of the events.
        before: What else must be there.
        follows: ``stage.ada`` is passed to it, and must be as stored afterwards.
    """

    call: Callable[[Stage], Coroutine[Any, Any, object]]
    outcome: type
    told: tuple[str, ...] = ()
    before: Callable[[Stage], Awaitable[object]] | None = None
    follows: bool = False


async def with_outdated_hash(stage: Stage) -> None:
    await User.filter(pk=stage.ada.pk).update(password=OUTDATED_HASH)


async def closed(stage: Stage) -> None:
    await stage.backstage.deactivate(stage.ada)


async def with_something_to_purge(stage: Stage) -> None:
    long_ago = stage.other.session.created_at - timedelta(days=40)
    await Session.filter(id=stage.other.session.id).update(expires_at=long_ago)
    at = round(long_ago.timestamp() * 1_000_000)
    await AttemptCount.create(key="old", count=3, counted_at=at, previous_at=at, reserved_at=at)


async def locked(stage: Stage) -> None:
    await User.filter(pk=stage.ada.pk).update(password_locked_at=stage.ada.created_at)


async def attacked(stage: Stage) -> None:
    """So many guessed the password of Ada that she has to wait, unless she is at home."""
    with pytest.raises(AuthenticationError):
        await stage.backstage.login(EMAIL, "wrong")
    await AttemptCount.all().update(count=30, failures=30)


async def nearly_locked(stage: Stage) -> None:
    """So many have failed that one more locks the account, and none of them today."""
    with pytest.raises(AuthenticationError):
        await stage.backstage.login(EMAIL, "wrong")
    await AttemptCount.filter(key__startswith="account:").update(count=0, failures=99)


LOCKING = Scenario(
    lambda stage: stage.auth.login(EMAIL, "wrong", context=HOME),
    AuthenticationError,
    ("account_locked", "user_login_failed"),
    nearly_locked,
)
SCENARIOS: dict[str, Scenario] = {
    "login": Scenario(
        lambda stage: stage.auth.login(EMAIL, PASSWORD, context=HOME), AuthResult, ("user_login",)
    ),
    "login_rehash": Scenario(
        lambda stage: stage.auth.login(EMAIL, PASSWORD),
        AuthResult,
        ("password_rehashed", "user_login"),
        with_outdated_hash,
    ),
    "login_familiar": Scenario(
        lambda stage: stage.auth.login(EMAIL, PASSWORD, context=HOME),
        AuthResult,
        ("user_login",),
        attacked,
    ),
    "login_failed": Scenario(
        lambda stage: stage.auth.login(EMAIL, "wrong", context=HOME),
        AuthenticationError,
        ("user_login_failed",),
    ),
    "login_throttled": Scenario(
        lambda stage: stage.auth.login(EMAIL, PASSWORD, context=ELSEWHERE),
        ThrottledError,
        ("user_login_failed", "login_throttled"),
        attacked,
    ),
    "authenticate": Scenario(
        lambda stage: stage.auth.authenticate(stage.current.access_token), User
    ),
    "refresh": Scenario(
        lambda stage: stage.auth.refresh(stage.current.refresh_token, context=HOME),
        AuthResult,
        ("session_refreshed",),
    ),
    "refresh_reused": Scenario(
        lambda stage: stage.auth.refresh(stage.spent.refresh_token),
        TokenReusedError,
        ("refresh_token_reused",),
    ),
    "logout_access": Scenario(
        lambda stage: stage.auth.logout(stage.current.access_token), Revocation, ("user_logout",)
    ),
    "logout_refresh": Scenario(
        lambda stage: stage.auth.logout(stage.spent.refresh_token), Revocation, ("user_logout",)
    ),
    "logout_all": Scenario(
        lambda stage: stage.auth.logout_all(stage.ada, keep=stage.other.session),
        Revocation,
        ("user_logout",),
    ),
    "set_password": Scenario(
        lambda stage: stage.auth.set_password(stage.ada, NEW_PASSWORD, keep=stage.other.session),
        NoneType,
        ("password_changed",),
        follows=True,
    ),
    "change_password": Scenario(
        lambda stage: stage.auth.change_password(stage.ada, PASSWORD, NEW_PASSWORD, context=HOME),
        NoneType,
        ("password_changed",),
        follows=True,
    ),
    "change_password_failed": Scenario(
        lambda stage: stage.auth.change_password(stage.ada, "wrong", NEW_PASSWORD, context=HOME),
        AuthenticationError,
        ("password_change_failed",),
        follows=True,
    ),
    "revoke_session": Scenario(
        lambda stage: stage.auth.revoke_session(stage.other.session.id, user=stage.ada),
        Revocation,
        ("session_revoked",),
    ),
    "deactivate": Scenario(
        lambda stage: stage.auth.deactivate(stage.ada),
        Revocation,
        ("user_deactivated",),
        follows=True,
    ),
    "activate": Scenario(
        lambda stage: stage.auth.activate(stage.ada),
        NoneType,
        ("user_activated",),
        closed,
        follows=True,
    ),
    "unlock": Scenario(
        lambda stage: stage.auth.unlock(stage.ada),
        NoneType,
        ("account_unlocked",),
        locked,
        follows=True,
    ),
    "sessions": Scenario(lambda stage: stage.auth.sessions(stage.ada), list),
    "purge_expired": Scenario(
        lambda stage: stage.auth.purge_expired(), int, (), with_something_to_purge
    ),
}

every_method = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())


def test_every_method_is_swept() -> None:
    """No method of the service that asks a database is forgotten here."""
    public = {name: method for name, method in vars(AuthService).items() if name[0] != "_"}
    asking = {name for name, method in public.items() if inspect.iscoroutinefunction(method)}
    assert len(asking) >= 12
    assert {
        name for name in asking if not any(each.startswith(name) for each in SCENARIOS)
    } == set()


@dataclass
class Trial:
    """A scenario, tried once.

    Attributes:
        outcome: What was returned or raised; an ellipsis if the caller was cut off before.
    """

    stage: Stage
    scenario: Scenario
    hasher: PasswordHasher
    before: Snapshot
    verified: int = 0
    outcome: object = ...

    @classmethod
    async def prepared(cls, stage: Stage, scenario: Scenario, hasher: PasswordHasher) -> Trial:
        """Return it when everything is ready."""
        await stage.reset()
        if scenario.before is not None:
            await scenario.before(stage)
        return cls(stage, scenario, hasher, await stage.onlooker.look())

    async def work(self) -> None:
        """Make the call, and count the passwords that are looked at."""
        verify = self.hasher.verify

        async def verify_and_count(*args: Any) -> Any:
            self.verified += 1
            return await verify(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.hasher, "verify", verify_and_count)
            try:
                self.outcome = await self.scenario.call(self.stage)
            except TortoiseAuthError as error:
                self.outcome = error

    async def check(self) -> Counter[str]:
        """Check that all is in order, whatever happened; return what has changed."""
        after = await self.stage.settled()
        happened = changes(self.before, after)
        assert happened == self.stage.told()
        gone = self.before.sessions.keys() - after.sessions.keys()
        assert gone <= self._purgeable()
        new = after.live - self.before.live
        if isinstance(self.outcome, AuthResult):
            assert str(self.outcome.session.id) in after.live
        assert new <= {str(getattr(getattr(self.outcome, "session", None), "id", None))}
        if self.scenario.outcome is AuthenticationError:
            assert after.failures >= self.verified
        if self.scenario.follows:
            (stored,) = after.users.values()
            follower = self.stage.ada
            assert follower.password == stored["password"]
            assert follower.session_version == stored["session_version"]
            assert follower.is_active == bool(stored["is_active"])
        return happened

    def assert_complete(self) -> None:
        """It came to its ordinary end, and that was told."""
        assert isinstance(self.outcome, self.scenario.outcome)
        assert tuple(event.name for event in self.stage.heard) == self.scenario.told

    def _purgeable(self) -> set[object]:
        purges = self.scenario.before is with_something_to_purge
        return {str(self.stage.other.session.id)} if purges else set()


# ---- cancellation ---------------------------------------------------------------------------


async def at_each_step(work: Work, step: int) -> bool:
    """Cancel where the call, or a task that it waits for, begins to wait or goes on."""
    steps = Steps(cancel_at=step)
    task = await finished(steps.run(work))
    assert task.cancelled() or not task.cancelling()
    return steps.taken >= step


async def when_the_answer_is_there(work: Work, step: int) -> bool:
    """Cancel when that has come for which the call waits, and before it hears of it."""
    cancelled = Cancelled(work(), step, late=True)
    await finished(cancelled.run())
    return cancelled.reached


class TestCancellation:
    @pytest.mark.parametrize(
        "scenario", [*SCENARIOS.values(), LOCKING], ids=[*SCENARIOS.keys(), "login_locking"]
    )
    @pytest.mark.parametrize(
        "cut", [at_each_step, when_the_answer_is_there], ids=lambda cut: cut.__name__
    )
    async def test_at_every_step(
        self,
        stage: Stage,
        scenario: Scenario,
        hasher: PasswordHasher,
        cut: Callable[[Work, int], Awaitable[bool]],
    ) -> None:
        """What happened is told and what did not is not; no session is without a holder, nothing leaks.

        No password is looked at for free either.
        """
        happened: list[Counter[str]] = []
        for step in count(1):
            trial = await Trial.prepared(stage, scenario, hasher)
            reached = await cut(trial.work, step)
            happened.append(await trial.check())
            if not reached:
                break
        trial.assert_complete()
        *cut_short, complete = happened
        undone = complete + Counter(ended=complete["opened"] + complete["refreshed"])
        assert all(changed in (Counter(), complete, undone) for changed in cut_short)
        assert not cut_short[0]
        assert any(cut_short) is bool(complete)


# ---- failure --------------------------------------------------------------------------------


@contextmanager
def failing(context: TortoiseContext, fails: Callable[[int], bool]) -> Iterator[list[str]]:
    """Let those calls of the database fail whose number, counted from 1, is one to; note all."""
    seen: list[str] = []

    def watch(patch: pytest.MonkeyPatch, owner: type, method: str) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        async def watched(self: object, *args: Any, **kwargs: Any) -> Any:
            seen.append(method)
            if fails(len(seen)):
                raise OperationalError("canary")
            return await original(self, *args, **kwargs)

        patch.setattr(owner, method, watched)

    wrapper = transaction_class(context)
    with pytest.MonkeyPatch.context() as patch:
        for owner in (type(root(context)), wrapper):
            for method in CALLS & vars(owner).keys():
                watch(patch, owner, method)
        yield seen


CALLS = {
    "execute_insert",
    "execute_many",
    "execute_query",
    "execute_query_dict",
    "execute_script",
    "begin",
    "commit",
}
FAILURES = {"user_login_failed", "password_change_failed", "login_throttled"}
"""Events of which it is true that they happened although nothing changed."""


class TestDatabaseFailure:
    """`tests.flows.test_service` fails every statement of a service without handlers or addresses.

    Here the throttle counts sources, too, and every event is to be stored.
    """

    @every_method
    @pytest.mark.parametrize("times", ["once", "from then on"])
    async def test_at_every_call(
        self, stage: Stage, scenario: Scenario, hasher: PasswordHasher, times: str
    ) -> None:
        """It is never the fault of the credentials, nothing changes, and afterwards all is well."""
        for number in count(1):
            trial = await Trial.prepared(stage, scenario, hasher)
            fails = number.__eq__ if times == "once" else number.__le__
            with failing(stage.context, fails) as calls:
                await finished(trial.work())
            changed = await trial.check()
            if len(calls) < number:
                break
            assert type(trial.outcome) is ServiceUnavailableError
            assert changed == Counter()
            assert {event.name for event in stage.heard} <= FAILURES
            assert (await stage.onlooker.look()).failures <= trial.before.failures + 1

            again = Trial(stage, scenario, hasher, await stage.onlooker.look())
            heard = len(stage.heard)
            await finished(again.work())
            await again.check()
            assert isinstance(again.outcome, scenario.outcome)
            assert tuple(event.name for event in stage.heard[heard:]) == scenario.told
        trial.assert_complete()
        assert number > 1

    @pytest.mark.parametrize("times", ["once", "from then on"])
    async def test_while_an_account_is_locked(
        self, stage: Stage, hasher: PasswordHasher, clock: FakeClock, times: str
    ) -> None:
        """It is told of none that is not; and if it could not be told, a later attempt tells it."""
        for number in count(1):
            trial = await Trial.prepared(stage, LOCKING, hasher)
            fails = number.__eq__ if times == "once" else number.__le__
            with failing(stage.context, fails) as calls:
                await finished(trial.work())
            at_once = changes(trial.before, await stage.settled())["locked"]
            assert stage.told()["locked"] <= at_once
            if len(calls) < number:
                break
            assert type(trial.outcome) is ServiceUnavailableError
            clock.advance(timedelta(hours=1))
            for password in ("wrong", PASSWORD):
                with pytest.raises(AuthenticationError):
                    await stage.auth.login(EMAIL, password)
                clock.advance(timedelta(hours=1))
            assert (await stage.settled()).locked
            assert 1 <= stage.told()["locked"] <= 1 + at_once
        trial.assert_complete()
        assert number > 1
