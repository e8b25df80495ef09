"""Every method of the service, cancelled at every step and failed at every call of the database."""

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
from tests.support.database import assert_no_connection_is_held, database, root, transaction_class
from tests.support.deliveries import quiet
from tests.support.services import POSTGRES_URL, needs_postgres
from tortoise_auth import (
    AuthConfig,
    Authenticated,
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
    """What is committed, as another connection reads it."""

    users: dict[object, Row]
    sessions: dict[object, Row]
    attempts: dict[object, Row]
    outbox: list[Row]

    @property
    def live(self) -> set[object]:
        """The ids of the live sessions."""
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
        """How many failures are counted."""
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
        auth: The service, whose events each have an inline and a durable delivery.
        received: The events that were delivered inline.
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
    received: list[Event]
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
        """Create the account, its sessions, and handlers of every event."""
        received: list[Event] = []
        auth.emitter.on("*", received.append, thread=False)
        auth.emitter.on("*", received.append, thread=False, delivery="durable", name="row")
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        (stored,) = await User.filter(pk=ada.pk).values()
        del stored["id"]
        spent = await backstage.login(EMAIL, PASSWORD, context=HOME)
        current = await backstage.refresh(spent.refresh_token)
        other = await backstage.login(EMAIL, PASSWORD, context=HOME)
        sessions = await Session.all()
        return cls(
            context,
            auth,
            backstage,
            onlooker,
            stored,
            sessions,
            received,
            ada,
            spent,
            current,
            other,
        )

    async def reset(self) -> None:
        """Restore an account that has never logged in, with the same sessions."""
        for model in (Session, AttemptCount, OutboxEntry):
            await model.all().delete()
        await User.exclude(email=EMAIL).delete()
        await User.filter(email=EMAIL).update(**self.stored)
        await Session.bulk_create(self.stored_sessions)
        self.ada = await User.get(email=EMAIL)
        self.received.clear()

    async def settled(self) -> Snapshot:
        """Wait for everything in flight, and return what is committed then.

        Every event was delivered inline and has a durable row, and no row is without its event.
        """
        await quiet(self.auth.emitter)
        await finished(User.exists())  # waits until asyncpg has called a cancelled statement off
        assert_no_connection_is_held(self.context)
        now = await self.onlooker.look()
        rows = [(str(row["event_id"]), row["event_name"]) for row in now.outbox]
        assert sorted(rows) == sorted((str(event.id), event.name) for event in self.received)
        return now

    def reported(self) -> Counter[str]:
        """Return what the events report, in the terms of `changes`."""
        happened = Counter[str]()
        for event in self.received:
            happened["created"] += event.name == "user_registered"
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
    """Return what has changed in the tables."""
    happened = Counter[str]()
    for key, session in after.sessions.items():
        old = before.sessions.get(key, {"generation": 0, "revoked_at": None})
        happened["opened"] += key not in before.sessions
        happened["refreshed"] += session["generation"] - old["generation"]
        happened["ended"] += session["revoked_at"] is not None and old["revoked_at"] is None
    for key, user in after.users.items():
        if key not in before.users:
            happened["created"] += 1
            continue
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
    """A stage on a database with one connection, so that a leaked connection fails the test."""
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
    """A call, and its outcome when nothing interrupts it.

    Attributes:
        call: Makes the call.
        outcome: The class of what it returns or raises.
        emitted: The names of the events.
        before: Prepares what the call needs.
        as_stored: Whether ``stage.ada`` is passed to it, and must equal its row afterwards.
    """

    call: Callable[[Stage], Coroutine[Any, Any, object]]
    outcome: type
    emitted: tuple[str, ...] = ()
    before: Callable[[Stage], Awaitable[object]] | None = None
    as_stored: bool = False


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
    """Throttle the account by failures, except for its known source."""
    with pytest.raises(AuthenticationError):
        await stage.backstage.login(EMAIL, "wrong")
    await AttemptCount.all().update(count=30, failures=30)


async def nearly_locked(stage: Stage) -> None:
    """Count so many failures that one more locks the account, and none of them recent."""
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
    "create_user": Scenario(
        lambda stage: stage.auth.create_user(email="eve@example.com", password=NEW_PASSWORD),
        User,
        ("user_registered",),
    ),
    "login": Scenario(
        lambda stage: stage.auth.login(EMAIL, PASSWORD, context=HOME), AuthResult, ("user_login",)
    ),
    "login_rehash": Scenario(
        lambda stage: stage.auth.login(EMAIL, PASSWORD),
        AuthResult,
        ("password_rehashed", "user_login"),
        with_outdated_hash,
    ),
    "login_known_source": Scenario(
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
    "authenticated": Scenario(
        lambda stage: stage.auth.authenticated(stage.current.access_token), Authenticated
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
        as_stored=True,
    ),
    "change_password": Scenario(
        lambda stage: stage.auth.change_password(stage.ada, PASSWORD, NEW_PASSWORD, context=HOME),
        NoneType,
        ("password_changed",),
        as_stored=True,
    ),
    "change_password_failed": Scenario(
        lambda stage: stage.auth.change_password(stage.ada, "wrong", NEW_PASSWORD, context=HOME),
        AuthenticationError,
        ("password_change_failed",),
        as_stored=True,
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
        as_stored=True,
    ),
    "activate": Scenario(
        lambda stage: stage.auth.activate(stage.ada),
        NoneType,
        ("user_activated",),
        closed,
        as_stored=True,
    ),
    "unlock": Scenario(
        lambda stage: stage.auth.unlock(stage.ada),
        NoneType,
        ("account_unlocked",),
        locked,
        as_stored=True,
    ),
    "sessions": Scenario(lambda stage: stage.auth.sessions(stage.ada), list),
    "purge_expired": Scenario(
        lambda stage: stage.auth.purge_expired(), int, (), with_something_to_purge
    ),
}

every_method = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())


def test_every_method_is_swept() -> None:
    """Every method of the service that uses a database has a scenario."""
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
        outcome: What was returned or raised; an ellipsis if the caller was cancelled before.
    """

    stage: Stage
    scenario: Scenario
    hasher: PasswordHasher
    before: Snapshot
    verified: int = 0
    outcome: object = ...

    @classmethod
    async def prepared(cls, stage: Stage, scenario: Scenario, hasher: PasswordHasher) -> Trial:
        """Return a trial on a stage that is reset and prepared."""
        await stage.reset()
        if scenario.before is not None:
            await scenario.before(stage)
        return cls(stage, scenario, hasher, await stage.onlooker.look())

    async def work(self) -> None:
        """Make the call, and count the passwords that are checked."""
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
        """Check that tables, events and outcome agree; return what has changed."""
        after = await self.stage.settled()
        happened = changes(self.before, after)
        assert happened == self.stage.reported()
        gone = self.before.sessions.keys() - after.sessions.keys()
        assert gone <= self._purgeable()
        new = after.live - self.before.live
        if isinstance(self.outcome, AuthResult):
            assert str(self.outcome.session.id) in after.live
        assert new <= {str(getattr(getattr(self.outcome, "session", None), "id", None))}
        if self.scenario.outcome is AuthenticationError:
            assert after.failures >= self.verified
        if self.scenario.as_stored:
            (stored,) = after.users.values()
            user = self.stage.ada
            assert user.password == stored["password"]
            assert user.session_version == stored["session_version"]
            assert user.is_active == bool(stored["is_active"])
        return happened

    def assert_complete(self) -> None:
        """The call returned or raised as expected, and its events were emitted."""
        assert isinstance(self.outcome, self.scenario.outcome)
        assert tuple(event.name for event in self.stage.received) == self.scenario.emitted

    def _purgeable(self) -> set[object]:
        purges = self.scenario.before is with_something_to_purge
        return {str(self.stage.other.session.id)} if purges else set()


# ---- cancellation ---------------------------------------------------------------------------


async def at_each_step(work: Work, step: int) -> bool:
    """Cancel where the call, or a task that it waits for, begins to wait or resumes."""
    steps = Steps(cancel_at=step)
    task = await finished(steps.run(work))
    assert task.cancelled() or not task.cancelling()
    return steps.taken >= step


async def when_the_answer_is_ready(work: Work, step: int) -> bool:
    """Cancel when the result that the call awaits is ready, and before the call resumes."""
    cancelled = Cancelled(work(), step, late=True)
    await finished(cancelled.run())
    return cancelled.reached


class TestCancellation:
    @pytest.mark.parametrize(
        "scenario", [*SCENARIOS.values(), LOCKING], ids=[*SCENARIOS.keys(), "login_locking"]
    )
    @pytest.mark.parametrize(
        "cut", [at_each_step, when_the_answer_is_ready], ids=lambda cut: cut.__name__
    )
    async def test_at_every_step(
        self,
        stage: Stage,
        scenario: Scenario,
        hasher: PasswordHasher,
        cut: Callable[[Work, int], Awaitable[bool]],
    ) -> None:
        """Events match the changes, every session has its tokens returned, and nothing leaks.

        Every password that is checked is counted, too.
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
    """Fail the calls of the database whose number, counted from 1, *fails* selects; record all."""
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

    wrapper = transaction_class(root(context))
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
"""Events that report an attempt, and so may be emitted although nothing changed."""


class TestDatabaseFailure:
    """`tests.flows.test_service` fails every statement of a service without handlers or addresses.

    Here the throttle counts sources, too, and every event has a durable delivery.
    """

    @every_method
    @pytest.mark.parametrize("times", ["once", "from then on"])
    async def test_at_every_call(
        self, stage: Stage, scenario: Scenario, hasher: PasswordHasher, times: str
    ) -> None:
        """The error never blames the credentials, nothing changes, and the next call succeeds."""
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
            assert {event.name for event in stage.received} <= FAILURES
            assert (await stage.onlooker.look()).failures <= trial.before.failures + 1

            again = Trial(stage, scenario, hasher, await stage.onlooker.look())
            earlier = len(stage.received)
            await finished(again.work())
            await again.check()
            assert isinstance(again.outcome, scenario.outcome)
            assert tuple(event.name for event in stage.received[earlier:]) == scenario.emitted
        trial.assert_complete()
        assert number > 1

    @pytest.mark.parametrize("times", ["once", "from then on"])
    async def test_while_an_account_is_locked(
        self, stage: Stage, hasher: PasswordHasher, clock: FakeClock, times: str
    ) -> None:
        """No event reports a lock that is not stored, and a later attempt emits what was not emitted."""
        for number in count(1):
            trial = await Trial.prepared(stage, LOCKING, hasher)
            fails = number.__eq__ if times == "once" else number.__le__
            with failing(stage.context, fails) as calls:
                await finished(trial.work())
            at_once = changes(trial.before, await stage.settled())["locked"]
            assert stage.reported()["locked"] <= at_once
            if len(calls) < number:
                break
            assert type(trial.outcome) is ServiceUnavailableError
            clock.advance(timedelta(hours=1))
            for password in ("wrong", PASSWORD):
                with pytest.raises(AuthenticationError):
                    await stage.auth.login(EMAIL, password)
                clock.advance(timedelta(hours=1))
            assert (await stage.settled()).locked
            assert 1 <= stage.reported()["locked"] <= 1 + at_once
        trial.assert_complete()
        assert number > 1
