"""Checking a password: what guessing costs an attacker, and what it does not cost the owner."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import pytest
from passlib.hash import pbkdf2_sha256
from tortoise.context import TortoiseContext
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, assert_live, log_in
from tests.support.app import NamedUser, User
from tests.support.concurrency import Steps, cancel_after, meanwhile
from tests.support.database import DIALECTS, SERVERS, connection_of, database, kind_of
from tests.support.hashing import argon2_costs, full_cost
from tests.support.statements import statements
from tortoise_auth import (
    AuthConfig,
    AuthenticationError,
    AuthResult,
    AuthService,
    EventEmitter,
    PasswordHasher,
    RequestContext,
    SigningKey,
    TortoiseAuthError,
)
from tortoise_auth.events import (
    AccountLocked,
    AccountUnlocked,
    Event,
    LoginThrottled,
    PasswordChangeFailed,
    UserLoginFailed,
)
from tortoise_auth.exceptions import (
    ConfigurationError,
    EventError,
    ServiceUnavailableError,
    ThrottledError,
)
from tortoise_auth.flows import password_check
from tortoise_auth.flows.password_check import PasswordCheck
from tortoise_auth.models import AttemptCount, Session
from tortoise_auth.passwords import Verification
from tortoise_auth.testing import Captured, FakeClock
from tortoise_auth.throttling import Backoff, DatabaseThrottle, waiting
from tortoise_auth.throttling.protocol import Counted

UNKNOWN = "nobody@example.com"
WRONG = "a wrong donkey charger"
BURST, BUDGET = 50, 5
HERE, ELSEWHERE = RequestContext(ip="203.0.113.7"), RequestContext(ip="198.51.100.9")
LIMIT = 60
"""Seconds after which a test that has not ended fails."""

Call: TypeAlias = Callable[[], Awaitable[object]]


def waiting_at(auth: AuthService[User]) -> int:
    """Return how many attempts wait for attempts in flight."""
    return auth._passwords._waiting._waiting.total()


@pytest.fixture(params=DIALECTS)
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """A database of each dialect."""
    async with database(request.param, tmp_path) as context:
        yield context


@pytest.fixture
def strict(clock: FakeClock) -> AuthService[User]:
    """A service with `BUDGET` free attempts for an account."""
    return service(clock)


def service(
    clock: FakeClock,
    *,
    account: int = BUDGET,
    source: int = 1000,
    max_failures: int = 100,
    emitter: EventEmitter | None = None,
) -> AuthService[User]:
    throttle = DatabaseThrottle(
        account=Backoff(free_attempts=account),
        source=Backoff(free_attempts=source),
        max_failures=max_failures,
        clock=clock,
    )
    config = AuthConfig(secret=SECRET)
    return AuthService(User, config, emitter=emitter, throttle=throttle, clock=clock)


async def guess(
    auth: AuthService[Any],
    identifier: str = EMAIL,
    password: str = WRONG,
    context: RequestContext | None = None,
) -> str:
    """Try to log in; return the name of the error."""
    try:
        await auth.login(identifier, password, context=context)
    except TortoiseAuthError as error:
        return type(error).__name__
    return "in"


async def fail(
    auth: AuthService[Any],
    times: int,
    identifier: str = EMAIL,
    context: RequestContext | None = None,
) -> None:
    """Log in with a wrong password, which is checked each time."""
    for _ in range(times):
        assert await guess(auth, identifier, WRONG, context) == "AuthenticationError"


async def lock(auth: AuthService[User], clock: FakeClock) -> None:
    """Fail a hundred times, waiting as long as each error says."""
    failures = 0
    while failures < 100:
        try:
            await auth.login(EMAIL, WRONG)
        except ThrottledError as error:
            clock.advance(timedelta(seconds=error.retry_after))
        except AuthenticationError:
            failures += 1
    clock.advance(timedelta(minutes=15))


class TestSwitch:
    async def test_is_on(self, auth: AuthService[User], ada: User) -> None:
        """By default an account has ten free attempts, and pauses after them."""
        await fail(auth, 10)
        assert [await guess(auth) for _ in range(5)] == ["ThrottledError"] * 5
        await fail(auth, 10, "bob@example.com")

    async def test_is_off(self, db: TortoiseContext, ada: User, clock: FakeClock) -> None:
        """With None attempts are unlimited, and nothing is written."""
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=None, clock=clock)
        await fail(auth, 120, context=HERE)
        for _ in range(20):
            with pytest.raises(AuthenticationError):
                await auth.change_password(ada, WRONG, NEW_PASSWORD)
        await auth.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert await auth.login(EMAIL, NEW_PASSWORD)
        assert await AttemptCount.all().count() == 0

    async def test_fault_while_it_is_off(
        self, ada: User, clock: FakeClock, hasher: PasswordHasher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of the hasher reaches the caller unchanged."""
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=None, clock=clock)
        monkeypatch.setattr(hasher, "verify", broken)
        with pytest.raises(Broken):
            await log_in(auth)


class Broken(Exception):
    """The error of a hasher that cannot hash."""


async def broken(*_: object) -> object:
    raise Broken


async def nothing(*_: object) -> None:
    """Replace a step that a killed process has not taken."""


class TestBurst:
    """Fifty attempts at the same moment (R35, A160)."""

    @pytest.mark.parametrize("identifier", [EMAIL, UNKNOWN])
    async def test_logins(self, ada: User, strict: AuthService[User], identifier: str) -> None:
        """Only the free attempts are hashed, whether the account exists or not."""
        with argon2_costs() as costs:
            async with asyncio.timeout(LIMIT):
                outcomes = await asyncio.gather(*(guess(strict, identifier) for _ in range(BURST)))
        assert sorted(outcomes) == ["AuthenticationError"] * BUDGET + ["ThrottledError"] * (
            BURST - BUDGET
        )
        assert len(costs) == BUDGET

    async def test_doors_share_a_budget(self, ada: User, strict: AuthService[User]) -> None:
        """Logins and password changes share one budget (R39, A171)."""
        calls: list[Call] = [
            lambda: strict.login(EMAIL, WRONG),
            lambda: strict.change_password(ada, WRONG, NEW_PASSWORD),
        ]
        with argon2_costs() as costs:
            async with asyncio.timeout(LIMIT):
                outcomes = await asyncio.gather(
                    *(calls[number % 2]() for number in range(BURST)), return_exceptions=True
                )
        assert sum(isinstance(each, ThrottledError) for each in outcomes) == BURST - BUDGET
        assert sum(type(each) is AuthenticationError for each in outcomes) == BUDGET
        assert len(costs) == BUDGET

    async def test_right_passwords_wait_for_each_other(
        self, ada: User, strict: AuthService[User]
    ) -> None:
        """However many times one user logs in at once, attempts in flight throttle none of them."""
        async with asyncio.timeout(LIMIT):
            results = await asyncio.gather(*(log_in(strict) for _ in range(BURST)))
        assert len({result.session.id for result in results}) == BURST
        assert not strict._passwords._waiting._waiting

    async def test_login_does_not_wait_for_handlers_of_other_logins(
        self, ada: User, strict: AuthService[User], emitter: EventEmitter
    ) -> None:
        """Guesses whose events are still being delivered do not block the user (A163)."""
        delivered, go_on = asyncio.Semaphore(0), asyncio.Event()

        @emitter.on("user_login_failed")
        async def slow() -> None:
            delivered.release()
            await go_on.wait()

        await strict.login(EMAIL, PASSWORD, context=HERE)
        guesses = [asyncio.ensure_future(guess(strict, context=ELSEWHERE)) for _ in range(BURST)]
        async with asyncio.timeout(LIMIT):
            for _ in range(BURST):
                await delivered.acquire()
            assert await guess(strict, EMAIL, PASSWORD, HERE) == "in"
            go_on.set()
            outcomes = await asyncio.gather(*guesses)
        assert outcomes.count("AuthenticationError") == BUDGET


class TestPause:
    async def test_right_password_is_not_checked(
        self, ada: User, strict: AuthService[User], clock: FakeClock, events: Captured
    ) -> None:
        """The right password is refused like a wrong one, unhashed and uncounted (A165)."""
        await fail(strict, BUDGET)
        errors = []
        with argon2_costs() as costs:
            for password in (PASSWORD, WRONG, PASSWORD, "", "x" * 5000):
                with pytest.raises(ThrottledError) as error:
                    await strict.login(EMAIL, password)
                errors.append((type(error.value), error.value.args, error.value.retry_after))
        assert len(set(errors)) == 1
        assert errors[0][2] == 1
        assert costs == []
        clock.advance(timedelta(seconds=1))
        assert await log_in(strict)
        assert events.names[-1] == "user_login"

    async def test_wrong_password_after_it(
        self, ada: User, strict: AuthService[User], clock: FakeClock
    ) -> None:
        """A wrong password after the pause is refused as wrong, and doubles the next pause."""
        await fail(strict, BUDGET)
        for pause in (1, 2, 4, 8):
            with pytest.raises(ThrottledError) as error:
                await log_in(strict)
            assert error.value.retry_after == pause
            clock.advance(timedelta(seconds=pause))
            await fail(strict, 1)

    async def test_events(
        self, ada: User, strict: AuthService[User], clock: FakeClock, events: Captured
    ) -> None:
        """A throttled attempt emits a failed login, and an event of its own with the time to wait."""
        await fail(strict, BUDGET)
        await fail(strict, BUDGET, UNKNOWN)
        for identifier, subject in ((EMAIL, str(ada.pk)), (UNKNOWN, None)):
            events.clear()
            assert await guess(strict, identifier, PASSWORD, HERE) == "ThrottledError"
            assert events.names == ["user_login_failed", "login_throttled"]
            failed, throttled = events.one(UserLoginFailed), events.one(LoginThrottled)
            assert failed.reason == "throttled"
            assert failed.user_id == subject
            assert throttled.retry_after == 1
            for event in (failed, throttled):
                assert event.identifier == identifier
                assert event.subject_id == subject
                assert event.context == HERE
                assert event.occurred_at == clock()
                assert event.actor == "unauthenticated"

    async def test_handlers_by_name(
        self, ada: User, strict: AuthService[User], emitter: EventEmitter
    ) -> None:
        """Handlers receive identifier, reason and seconds as keywords."""
        received: list[object] = []

        @emitter.on("user_login_failed")
        async def failed(*, identifier: str, reason: str) -> None:
            received.append((identifier, reason))

        @emitter.on("login_throttled")
        async def throttled(*, identifier: str, retry_after: float) -> None:
            received.append((identifier, retry_after))

        await fail(strict, BUDGET)
        assert await guess(strict) == "ThrottledError"
        assert received == [(EMAIL, "bad_password")] * BUDGET + [(EMAIL, "throttled"), (EMAIL, 1)]

    async def test_hash_is_not_made_for_a_refused_change(
        self, ada: User, strict: AuthService[User], events: Captured
    ) -> None:
        """A password change is throttled like a login, and emits the same event."""
        await fail(strict, BUDGET)
        events.clear()
        with argon2_costs() as costs, pytest.raises(ThrottledError) as error:
            await strict.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert error.value.retry_after == 1
        assert costs == []
        assert events.names == ["password_change_failed", "login_throttled"]
        assert events.one(PasswordChangeFailed).reason == "throttled"
        assert events.one(LoginThrottled).identifier == EMAIL


class TestThrottledEvents:
    """Both events of a throttled attempt are emitted, whatever the caller and the handlers do."""

    @pytest.mark.parametrize("errors", ["log", "raise", "group"])
    async def test_handler_that_fails(
        self, ada: User, clock: FakeClock, errors: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A handler that fails on the first event does not suppress the second."""
        emitter, received = EventEmitter(errors=errors), []
        auth = service(clock, emitter=emitter)
        await fail(auth, BUDGET)

        @emitter.on("user_login_failed")
        async def broken() -> None:
            raise RuntimeError

        @emitter.on("login_throttled")
        async def note(event: LoginThrottled) -> None:
            received.append(event.name)

        with pytest.raises((ThrottledError, EventError, ExceptionGroup)):
            await auth.login(EMAIL, WRONG)
        await emitter.aclose(LIMIT)
        assert received == ["login_throttled"]

    @pytest.mark.parametrize("delivery", ["inline", "durable"])
    async def test_cancelled_caller(self, ada: User, clock: FakeClock, delivery: Any) -> None:
        """Wherever the caller is cancelled, a refusal emits its events once."""
        for step in range(1, 200):
            emitter = EventEmitter()
            received: list[Event] = []
            auth = service(clock, emitter=emitter)
            await fail(auth, BUDGET)
            for name in ("user_login_failed", "login_throttled"):
                emitter.on(
                    name,
                    lambda event, to=received: to.append(event),
                    delivery=delivery,
                    name=f"{name}:{step}",
                )
            steps = Steps(cancel_at=step)
            task = await steps.run(partial(guess, auth))
            await emitter.aclose(LIMIT)
            await auth.relay().drain()
            names = sorted(event.name for event in received)
            assert names in ([], ["login_throttled", "user_login_failed"])
            if steps.taken < step:
                break
            await AttemptCount.all().delete()
        assert names
        assert task.result() == "ThrottledError"


class TestNoOracle:
    @pytest.mark.parametrize("context", [RequestContext(), HERE], ids=["nowhere", "address"])
    async def test_unknown_accounts_answer_alike(
        self,
        db: TortoiseContext,
        ada: User,
        clock: FakeClock,
        hasher: PasswordHasher,
        context: RequestContext,
    ) -> None:
        """Errors, pauses, statements and hashes are the same with and without an account."""

        async def knock(identifier: str) -> tuple[list[object], int]:
            auth = service(clock, account=3, max_failures=8)
            answers: list[object] = []
            hashes = 0
            while len(answers) < 30:
                with statements(db) as seen, argon2_costs() as costs:
                    try:
                        await auth.login(identifier, WRONG, context=context)
                    except ThrottledError as error:
                        answers.append((type(error), error.args, error.retry_after, seen, costs))
                        clock.advance(timedelta(seconds=error.retry_after))
                    except AuthenticationError as error:
                        answers.append((type(error), error.args, error.code, seen, costs))
                assert set(costs) <= {full_cost(hasher)}
                hashes += len(costs)
            return answers, hashes

        await guess(service(clock), "first@example.com")  # MariaDB's settings are checked once
        await AttemptCount.all().delete()
        known, hashes = await knock(EMAIL)
        await AttemptCount.filter(key__startswith="source:").delete()
        assert (known, hashes) == await knock(UNKNOWN)
        assert hashes == 3 + 13

    async def test_closed_account_answers_alike(self, ada: User, strict: AuthService[User]) -> None:
        """Closed accounts and accounts without a password answer like unknown ones."""
        await User.create_user(email="bob@example.com")
        await strict.deactivate(ada)
        outcomes = [
            [await guess(strict, identifier, PASSWORD) for _ in range(8)]
            for identifier in (EMAIL, "bob@example.com", UNKNOWN)
        ]
        assert outcomes == [["AuthenticationError"] * BUDGET + ["ThrottledError"] * 3] * 3

    async def test_one_budget_for_all_spellings(self, ada: User, strict: AuthService[User]) -> None:
        """Capitals and blanks buy no further attempts, whether the account exists or not."""
        for identifier in (EMAIL, UNKNOWN):
            spellings = [identifier, identifier.upper(), f" {identifier}\n", identifier.title()]
            outcomes = [await guess(strict, spellings[number % 4]) for number in range(BUDGET + 4)]
            assert outcomes == ["AuthenticationError"] * BUDGET + ["ThrottledError"] * 4

    @pytest.mark.parametrize(
        "typed", ["", "\0", "\ud800", "not an address", "x" * 1_000_000, None, 7, b"ada"]
    )
    async def test_what_is_no_identifier(
        self, db: TortoiseContext, strict: AuthService[User], typed: Any
    ) -> None:
        """A value that cannot be an identifier is counted like an unknown identifier."""
        outcomes = [await guess(strict, typed) for _ in range(BUDGET + 2)]
        assert outcomes == ["AuthenticationError"] * BUDGET + ["ThrottledError"] * 2


class TestUnknownIdentifiers:
    async def test_cannot_fill_the_table(
        self, db: TortoiseContext, strict: AuthService[User], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many unknown identifiers are tried, they share a fixed number of counters."""
        monkeypatch.setattr(password_check, "_STRANGERS", 8)
        for _ in range(300):
            await guess(strict, f"{secrets.token_hex(8)}@example.com")
        assert await AttemptCount.all().count() == 8

    async def test_do_not_touch_accounts(
        self, ada: User, strict: AuthService[User], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unknown identifiers never share the counter of an account."""
        monkeypatch.setattr(password_check, "_STRANGERS", 1)
        for number in range(50):
            await guess(strict, f"unknown{number}@example.com")
        assert await guess(strict, UNKNOWN) == "ThrottledError"
        await fail(strict, BUDGET)

    async def test_table_reveals_nothing(self, ada: User, strict: AuthService[User]) -> None:
        """The table shows no identifier or address, and without the secret none can be tested."""
        for identifier in (EMAIL, UNKNOWN, PASSWORD):
            await fail(strict, BUDGET, identifier, HERE)
            await guess(strict, identifier, context=HERE)
        rows = await AttemptCount.all().values()
        text = repr(rows)
        assert len(rows) == 4
        for part in ("ada@", "example", "nobody", "horse", "203.0.113"):
            assert part not in text
        other = AuthService(
            User,
            AuthConfig(secret=secrets.token_urlsafe(48)),
            clock=FakeClock(),
        )
        await fail(other, 1, context=HERE)
        assert await AttemptCount.all().count() == 6

    async def test_fit_the_column(
        self, db: TortoiseContext, strict: AuthService[User], ada: User
    ) -> None:
        """However long the table name, the address and the identifier are, the key fits the column."""
        odd = RequestContext(ip="2001:db8:1111:2222:3333:4444:5555:6666")
        await strict.login(EMAIL, PASSWORD, context=odd)
        await fail(strict, BUDGET, context=ELSEWHERE)
        await fail(strict, BUDGET, context=odd)
        await fail(strict, 1, "x" * 300 + "@example.com", odd)
        keys = [row.key for row in await AttemptCount.all()]
        assert max(map(len, keys)) <= 191


class TestSource:
    async def test_spraying(self, db: TortoiseContext, clock: FakeClock) -> None:
        """One address that tries many accounts is throttled, whichever account it tries next (A161)."""
        auth = service(clock, source=BUDGET)
        for number in range(BUDGET):
            await fail(auth, 1, f"person{number}@example.com", HERE)
        assert await guess(auth, "one.more@example.com", context=HERE) == "ThrottledError"
        await fail(auth, 1, "one.more@example.com", ELSEWHERE)

    async def test_own_logins_buy_nothing(self, ada: User, clock: FakeClock) -> None:
        """Logins to the attacker's own account between the guesses buy no attempts (A166)."""
        auth = service(clock, source=BUDGET)
        checked = 0
        for number in range(20):
            checked += await guess(auth, f"p{number}@example.com", WRONG, HERE) != "ThrottledError"
            await guess(auth, EMAIL, PASSWORD, HERE)
        assert checked == BUDGET

    @pytest.mark.parametrize(
        ("addresses", "sources"),
        [
            ([f"2001:db8:0:1::{number:x}" for number in range(1, 9)], 1),
            ([f"2001:db8:0:{number:x}::1" for number in range(1, 9)], 8),
            (["203.0.113.7", "::ffff:203.0.113.7", "::ffff:cb00:7107", " 203.0.113.7"], 1),
            (["198.51.100.1", "198.51.100.2"], 2),
            ([None, None], 0),
        ],
        ids=["one /64", "many /64", "mapped", "neighbours", "unknown"],
    )
    async def test_is_a_network(
        self,
        db: TortoiseContext,
        strict: AuthService[User],
        addresses: list[str | None],
        sources: int,
    ) -> None:
        """Addresses of one network are one source (A170)."""
        for number, ip in enumerate(addresses):
            await fail(strict, 1, f"p{number}@example.com", RequestContext(ip=ip))
        assert await AttemptCount.filter(key__startswith="source:").count() == sources


class TestAttemptsInFlight:
    """Attempts that are counted but not decided yet refuse no other attempt."""

    async def test_many_users_behind_one_address(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """All users behind one address who log in at once with the right password get in."""
        auth = service(clock, source=BUDGET)
        names = [f"user{number}@example.com" for number in range(BURST)]
        for name in names:
            await User.create_user(email=name, password=PASSWORD)
        async with asyncio.timeout(LIMIT):
            outcomes = await asyncio.gather(*(guess(auth, each, PASSWORD, HERE) for each in names))
        assert outcomes == ["in"] * BURST
        assert not auth._passwords._waiting._waiting

    async def test_right_one_among_guesses(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A wrong password admits no waiting attempt; a right one admits one, right or wrong."""
        auth = service(clock, source=BUDGET)
        await User.create_user(email=EMAIL, password=PASSWORD)
        passwords = [PASSWORD, *[WRONG] * (BURST - 1)]
        with argon2_costs() as costs:
            async with asyncio.timeout(LIMIT):
                outcomes = await asyncio.gather(
                    *(
                        guess(
                            auth,
                            EMAIL if password == PASSWORD else f"{number}@example.com",
                            password,
                            HERE,
                        )
                        for number, password in enumerate(passwords)
                    )
                )
        assert outcomes.count("AuthenticationError") == BUDGET
        assert len(costs) == BUDGET + outcomes.count("in")

    async def test_guesses_at_another_account(self, ada: User, clock: FakeClock) -> None:
        """An attempt that its account refuses takes nothing from the budget of the address."""
        auth = service(clock, source=2 * BUDGET)
        await User.create_user(email="bob@example.com", password=PASSWORD)
        async with asyncio.timeout(LIMIT):
            guesses = [asyncio.ensure_future(guess(auth, context=HERE)) for _ in range(BURST)]
            bob = asyncio.ensure_future(guess(auth, "bob@example.com", PASSWORD, HERE))
            outcomes = await asyncio.gather(*guesses)
            assert await bob == "in"
        assert outcomes.count("AuthenticationError") == BUDGET

    async def test_flood_does_not_block_the_user(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """While hundreds of guesses wait, the user gets in from a known source (A163)."""
        # 300 counts share a pool of five connections; on a busy machine that takes longer than 5 s.
        monkeypatch.setattr(password_check, "_PATIENCE", LIMIT)
        await strict.login(EMAIL, PASSWORD, context=HERE)
        verify, go_on, began = hasher.verify, asyncio.Event(), asyncio.Semaphore(0)

        async def slowly(password: str, hashed: str | None) -> Verification:
            if password == WRONG:
                began.release()
                await go_on.wait()
            return await verify(password, hashed)

        monkeypatch.setattr(hasher, "verify", slowly)
        flood = [asyncio.ensure_future(guess(strict, context=ELSEWHERE)) for _ in range(300)]
        async with asyncio.timeout(LIMIT):
            for _ in range(BUDGET):
                await began.acquire()
            assert await guess(strict, EMAIL, PASSWORD, HERE) == "in"
            go_on.set()
            outcomes = await asyncio.gather(*flood)
        assert outcomes.count("in") == 0
        assert len(outcomes) == outcomes.count("ThrottledError") + outcomes.count(
            "AuthenticationError"
        )

    @pytest.mark.parametrize(
        "passwords",
        [[PASSWORD] * 3, [PASSWORD, WRONG, PASSWORD], [PASSWORD, WRONG, WRONG, WRONG, PASSWORD]],
    )
    async def test_success_admits_every_waiting_attempt(
        self,
        ada: User,
        strict: AuthService[User],
        clock: FakeClock,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        passwords: list[str],
    ) -> None:
        """An attempt that waited for a right password is checked, whatever the attempts before it were."""
        await fail(strict, BUDGET)
        clock.advance(timedelta(seconds=1))
        verify, first, go_on = hasher.verify, asyncio.Event(), asyncio.Event()

        async def slowly(password: str, hashed: str | None) -> Verification:
            first.set()
            await go_on.wait()
            return await verify(password, hashed)

        monkeypatch.setattr(hasher, "verify", slowly)
        async with asyncio.timeout(LIMIT):
            calls = [asyncio.ensure_future(guess(strict, EMAIL, passwords[0]))]
            await first.wait()
            for number, each in enumerate(passwords[1:], 1):
                calls.append(asyncio.ensure_future(guess(strict, EMAIL, each)))
                while waiting_at(strict) < number:  # noqa: ASYNC110 - no event says so
                    await asyncio.sleep(0)
            go_on.set()
            outcomes = await asyncio.gather(*calls)
        expected = {PASSWORD: "in", WRONG: "AuthenticationError"}
        assert outcomes == [expected[each] for each in passwords]

    async def test_wait_ends(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """No caller waits for ever for attempts that do not end."""
        monkeypatch.setattr(waiting, "_PATIENCE", 0.05)
        began = asyncio.Semaphore(0)

        async def for_ever(*args: object) -> Verification:
            began.release()
            await asyncio.Event().wait()
            raise AssertionError

        monkeypatch.setattr(hasher, "verify", for_ever)
        stuck = [asyncio.ensure_future(guess(strict)) for _ in range(BUDGET)]
        async with asyncio.timeout(LIMIT):
            for _ in range(BUDGET):
                await began.acquire()
            assert await guess(strict) == "ThrottledError"
        for each in stuck:
            each.cancel()
        await asyncio.wait(stuck)
        assert not strict._passwords._waiting._waiting

    async def test_fault_admits_a_waiting_attempt(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An attempt that could not be checked is given back to an attempt that waits."""
        verify, go_on, began = hasher.verify, asyncio.Event(), asyncio.Semaphore(0)

        async def fault(password: str, hashed: str | None) -> Verification:
            if password == WRONG:
                began.release()
                await go_on.wait()
                raise ServiceUnavailableError("no memory")
            return await verify(password, hashed)

        monkeypatch.setattr(hasher, "verify", fault)
        stuck = [asyncio.ensure_future(guess(strict)) for _ in range(BUDGET)]
        async with asyncio.timeout(LIMIT):
            for _ in range(BUDGET):
                await began.acquire()
            user = asyncio.ensure_future(guess(strict, EMAIL, PASSWORD))
            while not waiting_at(strict):  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0)
            go_on.set()
            assert await user == "in"
            assert await asyncio.gather(*stuck) == ["ServiceUnavailableError"] * BUDGET


class TestVictim:
    """What guessing at an account does not do to its owner (A163)."""

    @pytest.mark.parametrize("state", ["paused", "locked"])
    async def test_goes_on(
        self, db: TortoiseContext, ada: User, clock: FakeClock, state: str
    ) -> None:
        """Live sessions, refresh, logout and a new password work, and other users log in."""
        auth = service(clock, max_failures=BUDGET)
        await User.create_user(email="bob@example.com", password=PASSWORD)
        first, second, third = [await log_in(auth) for _ in range(3)]
        await fail(auth, BUDGET)
        if state == "paused":
            assert await guess(auth, EMAIL, PASSWORD) == "ThrottledError"
        else:
            clock.advance(timedelta(seconds=1))
            assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        for _ in range(3):
            assert await auth.authenticate(first.access_token) == ada
            first = await auth.refresh(first.refresh_token)
        assert (await auth.logout(second.access_token)).sessions == 1
        assert (await auth.revoke_session(third.session.id)).sessions == 1
        assert [each.id for each in await auth.sessions(ada)] == [first.session.id]
        assert await auth.login("bob@example.com", PASSWORD)
        await auth.set_password(ada, NEW_PASSWORD, keep=first.session)
        await assert_live(auth, first)
        assert await auth.login(EMAIL, NEW_PASSWORD)

    @pytest.mark.parametrize(
        ("known", "now"),
        [
            ("203.0.113.7", "203.0.113.7"),
            ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2"),
            ("203.0.113.7", "::ffff:203.0.113.7"),
        ],
        ids=["same address", "same /64", "mapped"],
    )
    async def test_gets_in_from_a_known_source(
        self, ada: User, strict: AuthService[User], known: str, now: str
    ) -> None:
        """While another source blocks the account, its owner logs in from a known source."""
        await strict.login(EMAIL, PASSWORD, context=RequestContext(ip=known))
        await fail(strict, BUDGET, context=ELSEWHERE)
        for _ in range(100):
            assert await guess(strict, EMAIL, PASSWORD, ELSEWHERE) == "ThrottledError"
        assert await guess(strict, EMAIL, PASSWORD) == "ThrottledError"
        home = RequestContext(ip=now)
        await fail(strict, BUDGET - 1, context=home)
        assert await guess(strict, EMAIL, PASSWORD, home) == "in"

    @pytest.mark.parametrize("moved", ["by a refresh", "to a new signing key"])
    async def test_source_stays_known(
        self, ada: User, strict: AuthService[User], clock: FakeClock, moved: str
    ) -> None:
        """A source is known from where a session was used last, and under every configured key."""
        auth, home = strict, RequestContext(ip="203.0.113.7")
        first = await auth.login(EMAIL, PASSWORD, context=HERE if moved[0] == "b" else home)
        if moved == "by a refresh":
            await auth.refresh(first.refresh_token, context=home)
        else:
            keys = [SigningKey("n3w-" + SECRET), SigningKey(SECRET)]
            throttle = auth._core.throttle
            assert throttle is not None
            auth = AuthService(User, AuthConfig(secret=keys), throttle=throttle, clock=clock)
        await fail(auth, BUDGET, context=ELSEWHERE)
        assert await guess(auth, EMAIL, PASSWORD, ELSEWHERE) == "ThrottledError"
        assert await guess(auth, EMAIL, PASSWORD, home) == "in"

    async def test_known_by_one_look_up(
        self, db: TortoiseContext, ada: User, strict: AuthService[User]
    ) -> None:
        """Whether a source is known is one row of an index, however many addresses an account has."""
        first = (await strict.login(EMAIL, PASSWORD, context=HERE)).session
        copies = [first.clone(pk=uuid4()) for _ in range(500)]
        for number, each in enumerate(copies):
            each.family_hash, each.network_hash = f"f{number}", f"n{number}"
        await Session.bulk_create(copies)
        await fail(strict, BUDGET, context=ELSEWHERE)
        with statements(db) as sent:
            assert await guess(strict, EMAIL, PASSWORD, ELSEWHERE) == "ThrottledError"
        (look_up,) = {each for each in sent if "network_hash" in each}
        assert look_up.startswith("SELECT 1")
        assert look_up.endswith(("LIMIT 1", "LIMIT ?", "LIMIT $4", "LIMIT %s"))
        explain = "EXPLAIN QUERY PLAN " if kind_of(db) == "memory" else "EXPLAIN "
        given = len(re.findall(r"\?|\$\d|%s", look_up))
        values = [str(ada.pk), "app_user", "n7", 1][:given]
        _, plan = await connection_of(db).execute_query(explain + look_up, values)
        text = " ".join(str(dict(step)) for step in plan)
        # MariaDB names the columns of no index, but how many of them are compared.
        assert ("const,const,const" if kind_of(db) == "mariadb" else "network_hash") in text
        for whole in ("Seq Scan", "SCAN", "'type': 'ALL'", "'type': 'index'"):
            assert whole not in text

    async def test_known_source_of_another_account(
        self, ada: User, strict: AuthService[User]
    ) -> None:
        """A source that is known for one account is not known for another."""
        await User.create_user(email="eve@example.com", password=PASSWORD)
        await strict.login("eve@example.com", PASSWORD, context=ELSEWHERE)
        await fail(strict, BUDGET, context=HERE)
        assert await guess(strict, context=ELSEWHERE) == "ThrottledError"

    async def test_success_of_the_owner_resets_the_failures(
        self, ada: User, clock: FakeClock
    ) -> None:
        """An owner who logs in now and then is never locked out, however long the guessing lasts."""
        auth = service(clock, max_failures=BUDGET)
        await auth.login(EMAIL, PASSWORD, context=HERE)
        for _ in range(10):
            await fail(auth, BUDGET - 1, context=ELSEWHERE)
            assert await guess(auth, EMAIL, PASSWORD, HERE) == "in"


class TestLocked:
    """After a number of failures in a row no password is accepted (R33, A175)."""

    async def test_after_a_hundred(
        self, ada: User, auth: AuthService[User], clock: FakeClock, events: Captured
    ) -> None:
        """The right password is refused like a wrong one, and `account_locked` is emitted once."""
        await lock(auth, clock)
        locked = events.one(AccountLocked)
        assert locked.user == ada
        assert (locked.subject_id, locked.actor) == (str(ada.pk), "unauthenticated")
        assert events.names.index("account_locked") == len(events.names) - 2
        assert events.of(UserLoginFailed)[-1].reason == "bad_password"

        errors = []
        for password in (PASSWORD, WRONG):
            events.clear()
            with argon2_costs() as costs, pytest.raises(AuthenticationError) as error:
                await auth.login(EMAIL, password)
            errors.append((type(error.value), error.value.args, error.value.code, costs))
            assert events.names == ["user_login_failed"]
            assert events.one(UserLoginFailed).reason == "locked"
            assert events.one(UserLoginFailed).user_id == str(ada.pk)
            clock.advance(timedelta(minutes=15))
        assert errors[0] == errors[1]
        assert len(errors[0][3]) == 1
        with pytest.raises(AuthenticationError):
            await auth.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert "account_locked" not in events.names

    async def test_for_good(self, ada: User, clock: FakeClock) -> None:
        """No time unlocks the account, not even the time after which counters are purged."""
        auth = service(clock, max_failures=BUDGET)
        await fail(auth, BUDGET)
        clock.advance(timedelta(days=365))
        await auth.purge_expired()
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"

    async def test_unlocked(self, ada: User, clock: FakeClock, events: Captured) -> None:
        """`unlock` accepts the password again, resets the failures, and emits one event."""
        auth = service(clock, account=1000, max_failures=BUDGET)
        for _ in range(2):
            await fail(auth, BUDGET)
            assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
            assert (await User.get(pk=ada.pk)).password_locked_at == clock()
            events.clear()
            await auth.unlock(ada)
            await auth.unlock(ada)
            assert events.names == ["account_unlocked"]
            unlocked = events.one(AccountUnlocked)
            assert (unlocked.user, unlocked.actor) == (ada, "admin")
            assert ada.password_locked_at is None
            await fail(auth, BUDGET - 1)
            assert await guess(auth, EMAIL, PASSWORD) == "in"

    async def test_unlock_ends_a_pause(
        self, ada: User, strict: AuthService[User], events: Captured
    ) -> None:
        """`unlock` resets an account that is only throttled, too, and emits no event."""
        await fail(strict, BUDGET)
        assert await guess(strict, EMAIL, PASSWORD) == "ThrottledError"
        events.clear()
        await strict.unlock(ada)
        assert events.names == []
        assert await guess(strict, EMAIL, PASSWORD) == "in"

    async def test_unlock_without_a_throttle(self, ada: User, clock: FakeClock) -> None:
        """The lock belongs to the account, so a service without a throttle refuses it, too."""
        await fail(service(clock, max_failures=1), 1)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=None, clock=clock)
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        await auth.unlock(ada)
        assert await guess(auth, EMAIL, PASSWORD) == "in"

    async def test_process_was_killed_before_the_lock(
        self, ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """The next attempt, right or wrong, is refused and locks the account."""
        auth = service(clock, max_failures=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PasswordCheck, "_lock", nothing)
            await fail(auth, 1)
        assert events.names == ["user_login_failed"]
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        assert events.names.count("account_locked") == 1
        assert events.of(UserLoginFailed)[-1].reason == "locked"

    @pytest.mark.parametrize("setter", ["service", "model"])
    async def test_new_password_unlocks(
        self, ada: User, clock: FakeClock, events: Captured, setter: str
    ) -> None:
        """However a password is set, it unlocks the account and ends the pause."""
        auth = service(clock, max_failures=BUDGET)
        for _ in range(2):
            await fail(auth, BUDGET)
            clock.advance(timedelta(seconds=1))
            assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
            if setter == "service":
                await auth.set_password(ada, PASSWORD)
            else:
                await ada.set_password(PASSWORD)
            assert await guess(auth, EMAIL, PASSWORD) == "in"
        assert events.names.count("account_locked") == 2

    async def test_right_at_the_last_attempt(
        self, ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A right password at the attempt that would lock the account leaves it unlocked."""
        auth = service(clock, max_failures=BUDGET)
        await fail(auth, BUDGET - 1)
        assert await log_in(auth)
        assert "account_locked" not in events.names
        await fail(auth, BUDGET - 1)
        assert await log_in(auth)

    async def test_by_changing_the_password(
        self, ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """Failed changes count in the same row, lock the account and emit the event; the lock refuses changes."""
        auth = service(clock, max_failures=BUDGET)
        session = await log_in(auth)
        await fail(auth, BUDGET - 1)
        with pytest.raises(AuthenticationError):
            await auth.change_password(ada, WRONG, NEW_PASSWORD, context=HERE)
        assert events.one(AccountLocked).context == HERE
        clock.advance(timedelta(seconds=1))
        with argon2_costs() as costs, pytest.raises(AuthenticationError):
            await auth.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert len(costs) == 1
        reasons = [event.reason for event in events.of(PasswordChangeFailed)]
        assert reasons == ["bad_password", "locked"]
        assert await auth.authenticate(session.access_token) == ada

    async def test_deactivation_and_activation_keep_it(self, ada: User, clock: FakeClock) -> None:
        """Activating a closed account does not unlock it; a new password does."""
        auth = service(clock, max_failures=3)
        await fail(auth, 3)
        await auth.deactivate(ada)
        await auth.activate(ada)
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        await auth.set_password(ada, NEW_PASSWORD)
        assert await guess(auth, EMAIL, NEW_PASSWORD) == "in"

    async def test_by_a_cancelled_caller(
        self,
        ada: User,
        clock: FakeClock,
        emitter: EventEmitter,
        events: Captured,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The attempt that locks emits its event though its caller is cancelled before the answer."""
        auth = service(clock, max_failures=3)
        await fail(auth, 2)
        hashing = asyncio.Event()

        async def verify_for_ever(*args: Any) -> Any:
            hashing.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(hasher, "verify", verify_for_ever)
            call = asyncio.ensure_future(guess(auth))
            async with asyncio.timeout(LIMIT):
                await hashing.wait()
            call.cancel()
            await asyncio.wait([call])
        await emitter.aclose(LIMIT)
        assert events.names.count("account_locked") == 1
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"

    @pytest.mark.parametrize("step", ["reserve", "failed"])
    async def test_by_a_caller_cancelled_in_the_throttle(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, events: Captured, step: str
    ) -> None:
        """The lock is kept if the caller is cancelled before the throttle has answered."""
        throttle = DatabaseThrottle(max_failures=3, clock=clock)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)
        await fail(auth, 2)
        await cancel_after(throttle, step, guess(auth))
        await emitter.aclose(LIMIT)
        assert events.names.count("account_locked") == 1
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        clock.advance(timedelta(hours=1))
        assert await guess(auth) == "AuthenticationError"
        assert events.names.count("account_locked") == 1

    async def test_handler_refuses_the_event(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, events: Captured
    ) -> None:
        """If a handler refuses the event, the next attempt emits it, and no later one does."""
        auth = service(clock, max_failures=3)

        @emitter.on("account_locked", delivery="transaction")
        async def refuse() -> None:
            raise Broken

        await fail(auth, 2)
        with pytest.raises(EventError):
            await auth.login(EMAIL, WRONG)
        assert "account_locked" not in events.names
        emitter.off("account_locked", refuse)
        await fail(auth, 1)
        clock.advance(timedelta(hours=1))
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        assert events.names.count("account_locked") == 1

    @pytest.mark.parametrize("account", [BUDGET, 1000])
    async def test_right_ones_at_once(
        self, ada: User, clock: FakeClock, events: Captured, account: int
    ) -> None:
        """While the attempt that may lock is checked, other attempts wait for its outcome."""
        auth = service(clock, account=account, max_failures=BUDGET)
        await fail(auth, BUDGET - 1)
        async with asyncio.timeout(LIMIT):
            outcomes = await asyncio.gather(*(guess(auth, EMAIL, PASSWORD) for _ in range(4)))
        assert outcomes == ["in"] * 4
        assert "account_locked" not in events.names
        assert {event.reason for event in events.of(UserLoginFailed)} == {"bad_password"}

    async def test_wrong_ones_at_once(self, ada: User, clock: FakeClock, events: Captured) -> None:
        """If that attempt was wrong, the attempts that waited for it are refused, right or wrong."""
        auth = service(clock, account=1000, max_failures=BUDGET)
        await fail(auth, BUDGET - 1)
        passwords = [WRONG, *[PASSWORD] * 4]
        with argon2_costs() as costs:
            async with asyncio.timeout(LIMIT):
                outcomes = await asyncio.gather(*(guess(auth, EMAIL, each) for each in passwords))
        assert outcomes == ["AuthenticationError"] * 5
        assert len(costs) == 5
        assert events.names.count("account_locked") == 1
        reasons = [event.reason for event in events.of(UserLoginFailed)]
        assert reasons[-4:] == ["locked"] * 4

    @pytest.mark.parametrize("services", [1, 3])
    async def test_handler_is_slow(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, services: int
    ) -> None:
        """While the event is delivered, no other attempt emits it, in this process or another."""
        delivered, go_on = asyncio.Semaphore(0), asyncio.Event()
        calls = 0

        @emitter.on("account_locked")
        async def mail() -> None:
            nonlocal calls
            calls += 1
            delivered.release()
            await go_on.wait()

        auths = [service(clock, account=1000, max_failures=3) for _ in range(services)]
        await fail(auths[0], 2)
        locking = asyncio.ensure_future(guess(auths[0]))
        async with asyncio.timeout(LIMIT):
            await delivered.acquire()
            for auth in auths * 2:
                assert await guess(auth) == "AuthenticationError"
            go_on.set()
            assert await locking == "AuthenticationError"
            assert await guess(auths[-1]) == "AuthenticationError"
        assert calls == 1

    async def test_cancelled_while_another_caller_emits(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, events: Captured
    ) -> None:
        """A caller cancelled then has its refusal emitted like any other, and no second lock."""
        auth, other = (service(clock, account=1000, max_failures=3) for _ in range(2))
        await fail(auth, 2)
        delivered, reported, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

        @emitter.on("account_locked")
        async def mail() -> None:
            delivered.set()
            await go_on.wait()

        @emitter.on("user_login_failed")
        async def note(event: UserLoginFailed) -> None:
            if event.reason == "locked":
                reported.set()
                await go_on.wait()

        locking = asyncio.ensure_future(guess(auth))
        async with asyncio.timeout(LIMIT):
            await delivered.wait()
            call = asyncio.ensure_future(guess(other))
            await reported.wait()
            call.cancel()
            await asyncio.wait([call])
            go_on.set()
            assert await locking == "AuthenticationError"
            await emitter.aclose(LIMIT)
        assert events.names.count("account_locked") == 1
        assert [event.reason for event in events.of(UserLoginFailed)].count("locked") == 1

    async def test_cancelled_while_the_event_is_delivered(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, events: Captured
    ) -> None:
        """If the caller is cancelled during the delivery, the event is still emitted once."""
        auth = service(clock, account=1000, max_failures=3)
        await fail(auth, 2)
        delivered, go_on = asyncio.Event(), asyncio.Event()

        @emitter.on("account_locked")
        async def mail() -> None:
            delivered.set()
            await go_on.wait()

        call = asyncio.ensure_future(guess(auth))
        async with asyncio.timeout(LIMIT):
            await delivered.wait()
            call.cancel()
            await asyncio.wait([call])
            assert await guess(auth) == "AuthenticationError"
            go_on.set()
            await emitter.aclose(LIMIT)
        clock.advance(timedelta(hours=1))
        assert await guess(auth) == "AuthenticationError"
        assert events.names.count("account_locked") == 1

    async def test_store_fails_right_then(
        self, ada: User, clock: FakeClock, events: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lock that could not be stored emits no event; a later attempt locks."""
        throttle = DatabaseThrottle(max_failures=3, clock=clock)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)
        await fail(auth, 2)

        async def down(*_: object, **__: object) -> bool:
            raise OSError

        with monkeypatch.context() as patch:
            patch.setattr(password_check, "lock_password", down)
            assert await guess(auth) == "ServiceUnavailableError"
            await auth.emitter.aclose(LIMIT)
        assert events.names == ["user_login_failed"] * 3
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        assert events.names.count("account_locked") == 1

    async def test_by_many_at_once(self, ada: User, clock: FakeClock, events: Captured) -> None:
        """However many attempts lock the account at once, the event is emitted once."""
        auth = service(clock, account=1000, max_failures=BUDGET)
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*(guess(auth) for _ in range(BURST)))
        assert events.names.count("account_locked") == 1

    async def test_unknown_identifier(
        self, db: TortoiseContext, clock: FakeClock, events: Captured
    ) -> None:
        """An identifier without an account is locked, too, but emits no event of a lock."""
        auth = service(clock, max_failures=3)
        await fail(auth, BUDGET, UNKNOWN)
        assert set(events.names) == {"user_login_failed"}
        assert {event.reason for event in events.of(UserLoginFailed)} == {"not_found"}

    async def test_closed_account(self, ada: User, clock: FakeClock, events: Captured) -> None:
        """A closed account that is locked as well is reported as closed."""
        auth = service(clock, max_failures=3)
        await auth.deactivate(ada)
        events.clear()
        await fail(auth, BUDGET)
        assert {event.reason for event in events.of(UserLoginFailed)} == {"inactive"}
        assert events.names.count("account_locked") == 1

    async def test_new_hash_is_not_made(self, ada: User, clock: FakeClock) -> None:
        """The outdated hash of a locked account is not replaced."""
        auth = service(clock, max_failures=3)
        ada.password = pbkdf2_sha256.using(rounds=10).hash(PASSWORD)
        await ada.save(update_fields=["password"])
        await fail(auth, 3)
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        assert (await User.get(pk=ada.pk)).password == ada.password


class TestChange:
    @pytest.mark.parametrize("account", ["closed", "deleted"])
    async def test_account_is_closed_or_deleted(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        events: Captured,
        account: str,
    ) -> None:
        """The change costs a hash and an attempt, and its event does not call the password wrong."""
        if account == "closed":
            await strict.deactivate(ada)
        else:
            await User.filter(pk=ada.pk).delete()
        events.clear()
        with argon2_costs() as costs:
            for _ in range(BUDGET):
                with pytest.raises(AuthenticationError):
                    await strict.change_password(ada, PASSWORD, NEW_PASSWORD)
            with pytest.raises(ThrottledError):
                await strict.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert costs == [full_cost(hasher)] * BUDGET
        reason = "inactive" if account == "closed" else "not_found"
        emitted = [(event.reason, event.user) for event in events.of(PasswordChangeFailed)]
        assert emitted == [(reason, ada)] * BUDGET + [("throttled", ada)]


class TestSuccess:
    async def test_resets_the_count(self, ada: User, strict: AuthService[User]) -> None:
        """Each success resets the count, so four failures before it cause no pause (R34)."""
        for _ in range(4):
            await fail(strict, BUDGET - 1, context=HERE)
            assert await guess(strict, EMAIL, PASSWORD, HERE) == "in"

    async def test_of_a_change(self, ada: User, strict: AuthService[User]) -> None:
        """The right current password of a change resets the count, too."""
        passwords = [PASSWORD, NEW_PASSWORD]
        for number in range(4):
            await fail(strict, BUDGET - 1)
            current, new = passwords[number % 2], passwords[1 - number % 2]
            await strict.change_password(ada, current, new)

    async def test_changed_meanwhile(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
    ) -> None:
        """A password that is replaced while it is checked is refused, and its attempt is counted."""
        other = await User.get(pk=ada.pk)
        meanwhile(monkeypatch, hasher, "verify", lambda: other.set_password(NEW_PASSWORD))
        assert await guess(strict, EMAIL, PASSWORD) == "AuthenticationError"
        assert events.one(UserLoginFailed).reason == "bad_password"
        await fail(strict, BUDGET)

    async def test_changed_meanwhile_without_a_throttle(
        self,
        ada: User,
        clock: FakeClock,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
    ) -> None:
        """Such a password opens nothing where no attempts are counted, either."""
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=None, clock=clock)
        other = await User.get(pk=ada.pk)
        meanwhile(monkeypatch, hasher, "verify", lambda: other.set_password(NEW_PASSWORD))
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        assert events.one(UserLoginFailed).reason == "bad_password"
        assert await auth.sessions(ada) == []


class TestFault:
    """A password that was not checked (A173)."""

    @pytest.mark.parametrize("method", ["verify", "hash"])
    async def test_costs_no_attempt(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
        method: str,
    ) -> None:
        """If hashing fails, no attempt is counted for the account or the source."""
        if method == "hash":
            ada.password = pbkdf2_sha256.using(rounds=10).hash(PASSWORD)
            await ada.save(update_fields=["password"])
        events.clear()
        with monkeypatch.context() as patch:
            patch.setattr(hasher, method, broken)
            for _ in range(2 * BUDGET):
                with pytest.raises(Broken):
                    await strict.login(EMAIL, PASSWORD, context=HERE)
            if method == "verify":
                with pytest.raises(Broken):
                    await strict.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert events.names == []
        assert await AttemptCount.all().values_list("count", "failures") == [(0, 0), (0, 0)]
        await fail(strict, BUDGET)
        assert await guess(strict) == "ThrottledError"

    async def test_cancelled_costs_one(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A caller that is cancelled while the hash is computed has used an attempt."""
        with monkeypatch.context() as patch:
            for _ in range(BUDGET):
                hashing = asyncio.Event()

                async def never_ends(*_: object, begun: asyncio.Event = hashing) -> object:
                    begun.set()
                    return await asyncio.Event().wait()

                patch.setattr(hasher, "verify", never_ends)
                login = asyncio.ensure_future(log_in(strict))
                async with asyncio.timeout(LIMIT):
                    await hashing.wait()
                login.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await login
        assert await guess(strict, EMAIL, PASSWORD) == "ThrottledError"


class TestStoreIsDown:
    """Without the store no login succeeds, and none is refused as a wrong password (A174)."""

    @pytest.mark.parametrize("password", [PASSWORD, WRONG])
    async def test_table_is_gone(
        self,
        db: TortoiseContext,
        ada: User,
        strict: AuthService[User],
        events: Captured,
        password: str,
    ) -> None:
        """Without the table there is an error, no hash and no event."""
        session = await log_in(strict)
        await connection_of(db).execute_script("DROP TABLE tortoise_auth_attempts")
        events.clear()
        calls: list[Call] = [
            lambda: strict.login(EMAIL, password, context=HERE),
            lambda: strict.login(EMAIL, password),
            lambda: strict.login(UNKNOWN, password),
            lambda: strict.change_password(ada, password, NEW_PASSWORD),
        ]
        with argon2_costs() as costs:
            for call in calls:
                with pytest.raises(ConfigurationError, match="Run your migrations") as error:
                    await call()
                assert error.value.code == "configuration_error"
                assert (error.value.__cause__, error.value.__context__) == (None, None)
        assert costs == []
        assert events.names == []
        assert [each.id for each in await strict.sessions(ada)] == [session.session.id]
        await assert_live(strict, session)

    @pytest.mark.parametrize("method", ["reserve", "failed", "succeeded", "released"])
    @pytest.mark.parametrize(
        "error", [RuntimeError("canary"), OSError("canary"), KeyError("canary")]
    )
    async def test_any_error_of_any_store(
        self,
        ada: User,
        clock: FakeClock,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
        caplog: pytest.LogCaptureFixture,
        method: str,
        error: Exception,
    ) -> None:
        """Whatever a throttle raises, the login is refused it is logged once, and the caller sees no text."""
        throttle = DatabaseThrottle(clock=clock)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)

        async def down(_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(throttle, method, down)
        if method == "released":
            monkeypatch.setattr(hasher, "verify", broken)
        with pytest.raises(ServiceUnavailableError) as failure:
            await auth.login(EMAIL, WRONG if method == "failed" else PASSWORD)
        assert "canary" not in str(failure.value)
        assert type(error).__name__ in str(failure.value)
        (logged,) = [each for each in caplog.records if each.levelname == "ERROR"]
        assert logged.getMessage().startswith(str(failure.value))
        assert "in down" in caplog.text, "with its traceback"
        await auth.emitter.aclose(LIMIT)
        assert events.names == (["user_login_failed"] if method == "failed" else [])
        assert await auth.sessions(ada) == []

    async def test_lock_without_its_count(
        self,
        ada: User,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
    ) -> None:
        """The event of a lock is emitted even if the throttle fails right then."""
        throttle = DatabaseThrottle(max_failures=1, clock=clock)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)

        async def down(_: object) -> None:
            raise OSError

        monkeypatch.setattr(throttle, "failed", down)
        with pytest.raises(ServiceUnavailableError):
            await auth.login(EMAIL, WRONG)
        await auth.emitter.aclose(LIMIT)
        assert sorted(events.names) == ["account_locked", "user_login_failed"]

    @pytest.mark.parametrize("answer", [None, True, 5])
    async def test_no_reservation(
        self,
        ada: User,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
        answer: object,
    ) -> None:
        """A throttle that returns no reservation is an error, not a permission."""
        throttle = DatabaseThrottle(clock=clock)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)

        async def forget(_: object) -> object:
            return answer

        monkeypatch.setattr(throttle, "reserve", forget)
        with argon2_costs() as costs:
            with pytest.raises(ConfigurationError, match="must return a Reservation") as error:
                await log_in(auth)
        assert type(answer).__name__ in str(error.value)
        assert costs == []

    async def test_no_reservation_for_a_cancelled_caller(
        self, ada: User, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A cancelled caller gets its cancellation, not the error of the throttle."""
        throttle = DatabaseThrottle(clock=clock)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)

        async def forget(_: object) -> None:
            return None

        monkeypatch.setattr(throttle, "reserve", forget)
        await cancel_after(throttle, "reserve", log_in(auth))

    async def test_never_answers(
        self, ada: User, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No caller waits for the store for ever."""
        monkeypatch.setattr(password_check, "_PATIENCE", 0.1)
        throttle = DatabaseThrottle(clock=clock)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)

        async def wait(_: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(throttle, "reserve", wait)
        async with asyncio.timeout(LIMIT):
            with argon2_costs() as costs, pytest.raises(ServiceUnavailableError):
                await log_in(auth)
        assert costs == []

    async def test_error_of_a_handler(self, ada: User, clock: FakeClock) -> None:
        """An error that a handler propagates is not mistaken for one of the store."""
        emitter = EventEmitter(propagate_errors=True)
        auth = AuthService(User, AuthConfig(secret=SECRET), emitter=emitter, clock=clock)

        @emitter.on("user_login_failed")
        async def raise_something() -> None:
            raise RuntimeError("something")

        with pytest.raises(EventError):
            await auth.login(EMAIL, WRONG)


class Undo(Exception):
    """Rolls a transaction back."""


class TestTransactionOfTheCaller:
    async def test_lock_within_one(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, events: Captured
    ) -> None:
        """However many guesses one transaction makes, only the allowed number are checked."""
        auth = service(clock, account=1000, max_failures=3)
        async with in_transaction():
            with argon2_costs() as costs:
                outcomes = [await guess(auth) for _ in range(9)]
        assert outcomes[:3] == ["AuthenticationError"] * 3
        assert "in" not in outcomes
        assert len(costs) - outcomes[3:].count("AuthenticationError") == 3
        await emitter.aclose()
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        assert events.names.count("account_locked") == 1

    @staticmethod
    async def guess_and_undo(auth: AuthService[User], password: str = WRONG) -> str:
        """Try to log in, in a transaction that is rolled back."""
        outcome = "none"
        try:
            async with in_transaction():
                outcome = await guess(auth, EMAIL, password)
                raise Undo
        except Undo:
            return outcome

    async def test_rollback_keeps_the_count(
        self, ada: User, strict: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A guess stays counted when the transaction of the caller is rolled back."""
        for _ in range(BUDGET):
            assert await self.guess_and_undo(strict) == "AuthenticationError"
        assert await self.guess_and_undo(strict, PASSWORD) == "ThrottledError"
        await emitter.aclose()
        assert await AttemptCount.all().values_list("count", "failures") == [(BUDGET, BUDGET)]
        assert await guess(strict, EMAIL, PASSWORD) == "ThrottledError"

    async def test_error_of_the_login_rolls_back(
        self, ada: User, strict: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A guess stays counted when its own error rolls the transaction back."""
        for _ in range(BUDGET):
            with pytest.raises(AuthenticationError):
                async with in_transaction():
                    await strict.login(EMAIL, WRONG, context=HERE)
        with pytest.raises(ThrottledError):
            async with in_transaction():
                await strict.login(EMAIL, PASSWORD, context=HERE)
        await emitter.aclose()
        counts = await AttemptCount.all().order_by("key").values_list("count", "failures")
        assert counts == [(BUDGET, BUDGET), (BUDGET, 0)]

    async def test_counts_hold_in_another_process(
        self, ada: User, clock: FakeClock, emitter: EventEmitter
    ) -> None:
        """When the transaction is over the counts are in the database, not only in memory."""
        for _ in range(BUDGET):
            assert await self.guess_and_undo(service(clock)) == "AuthenticationError"
            await emitter.aclose()
        assert await guess(service(clock)) == "ThrottledError"

    async def test_commit_counts_once(
        self, ada: User, strict: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A committed transaction counts nothing twice."""
        async with in_transaction():
            for _ in range(BUDGET):
                assert await guess(strict) == "AuthenticationError"
            assert await guess(strict, EMAIL, PASSWORD) == "ThrottledError"
        await emitter.aclose()
        assert await AttemptCount.all().values_list("count", "failures") == [(BUDGET, BUDGET)]

    @pytest.mark.parametrize("ending", ["commit", "rollback"])
    async def test_success(
        self, ada: User, strict: AuthService[User], emitter: EventEmitter, ending: str
    ) -> None:
        """A right password resets the count when the transaction is committed or rolled back."""
        await fail(strict, BUDGET - 1)
        if ending == "commit":
            async with in_transaction():
                assert isinstance(await log_in(strict), AuthResult)
        else:
            assert await self.guess_and_undo(strict, PASSWORD) == "in"
        await emitter.aclose()
        await fail(strict, BUDGET)
        assert await guess(strict) == "ThrottledError"

    async def test_fault(
        self,
        ada: User,
        strict: AuthService[User],
        emitter: EventEmitter,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An attempt that could not be checked in a transaction is given back, too."""
        with monkeypatch.context() as patch:
            patch.setattr(hasher, "verify", broken)
            for _ in range(BUDGET):
                with pytest.raises(Broken):
                    async with in_transaction():
                        await log_in(strict)
                await emitter.aclose()
        await fail(strict, BUDGET)

    async def test_lock(
        self, ada: User, clock: FakeClock, emitter: EventEmitter, events: Captured
    ) -> None:
        """An account is locked, and its event emitted, though every transaction is rolled back."""
        auth = service(clock, max_failures=3)
        for _ in range(3):
            assert await self.guess_and_undo(auth) == "AuthenticationError"
        await emitter.aclose()
        assert events.names.count("account_locked") == 1
        assert await guess(auth, EMAIL, PASSWORD) == "AuthenticationError"
        assert events.of(UserLoginFailed)[-1].reason == "locked"

    async def test_cancelled(
        self,
        ada: User,
        strict: AuthService[User],
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A caller whose cancellation rolls the transaction back has used an attempt."""
        with monkeypatch.context() as patch:
            for _ in range(BUDGET):
                hashing = asyncio.Event()

                async def never_ends(*_: object, begun: asyncio.Event = hashing) -> object:
                    begun.set()
                    return await asyncio.Event().wait()

                patch.setattr(hasher, "verify", never_ends)
                login = asyncio.ensure_future(self.guess_and_undo(strict))
                async with asyncio.timeout(LIMIT):
                    await hashing.wait()
                login.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await login
        assert await guess(strict, EMAIL, PASSWORD) == "ThrottledError"

    async def test_fifty_at_once(
        self,
        db: TortoiseContext,
        ada: User,
        strict: AuthService[User],
        emitter: EventEmitter,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Fifty guesses in transactions that are rolled back cost no more hashes than free attempts.

        Where they take every connection of the pool, those that hold one wait for a second, and
        are refused; no caller waits for ever.
        """
        monkeypatch.setattr(password_check, "_PATIENCE", 0.3)
        with argon2_costs() as costs:
            async with asyncio.timeout(LIMIT):
                outcomes = await asyncio.gather(
                    *(self.guess_and_undo(strict) for _ in range(BURST))
                )
            assert set(outcomes) <= {
                "AuthenticationError",
                "ThrottledError",
                "ServiceUnavailableError",
            }
            assert outcomes.count("AuthenticationError") == len(costs) <= BUDGET
            await emitter.aclose()
            most = BUDGET
            if connection_of(db).capabilities.dialect != "sqlite":
                # What ran out of time is in flight for a minute; then the first delay is over, too.
                clock.advance(timedelta(minutes=1))
                most += 1
            for _ in range(BUDGET):
                await guess(strict)
            assert await guess(strict, EMAIL, PASSWORD) == "ThrottledError"
            assert len(costs) <= most
        if connection_of(db).capabilities.dialect == "sqlite":
            assert outcomes.count("ThrottledError") == BURST - BUDGET

    async def test_does_not_wait_for_attempts_that_wait_for_it(
        self,
        ada: User,
        strict: AuthService[User],
        emitter: EventEmitter,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A login in a transaction proceeds while logins to the same account wait for its connection."""
        verify = hasher.verify
        hashing, go_on = asyncio.Semaphore(0), asyncio.Event()

        async def verify_when_released(*args: Any) -> Any:
            hashing.release()
            await go_on.wait()
            return await verify(*args)

        monkeypatch.setattr(hasher, "verify", verify_when_released)
        others = [asyncio.ensure_future(guess(strict, EMAIL, PASSWORD)) for _ in range(4)]
        async with asyncio.timeout(LIMIT):
            for _ in others:
                await hashing.acquire()
            monkeypatch.setattr(hasher, "verify", verify)
            async with in_transaction():
                go_on.set()
                assert await guess(strict, EMAIL, PASSWORD) == "in"
            assert await asyncio.gather(*others) == ["in"] * 4
        await emitter.aclose()

    @pytest.mark.parametrize("kind", SERVERS)
    @pytest.mark.parametrize("size", [1, 2])
    async def test_small_pool(
        self,
        kind: str,
        tmp_path: Path,
        clock: FakeClock,
        emitter: EventEmitter,
        monkeypatch: pytest.MonkeyPatch,
        size: int,
    ) -> None:
        """Where the caller's transactions hold every connection, the login is refused in time."""
        monkeypatch.setattr(password_check, "_PATIENCE", 0.3)
        async with database(kind, tmp_path, maxsize=size):
            await User.create_user(email=EMAIL, password=PASSWORD)
            auth = service(clock)
            all_are_in = asyncio.Barrier(size)

            async def log_in_within() -> None:
                async with in_transaction():
                    await all_are_in.wait()
                    with pytest.raises(ServiceUnavailableError):
                        await auth.login(EMAIL, PASSWORD, context=HERE)

            with argon2_costs() as costs:
                async with asyncio.timeout(LIMIT):
                    await asyncio.gather(*(log_in_within() for _ in range(size)))
            assert costs == []
            assert await guess(auth, EMAIL, PASSWORD) == "in"
            await emitter.aclose()

    @pytest.mark.parametrize("kind", SERVERS)
    async def test_pool_runs_dry_half_way(
        self,
        kind: str,
        tmp_path: Path,
        clock: FakeClock,
        emitter: EventEmitter,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The login is refused, too, if the pool runs dry after the source was counted."""
        monkeypatch.setattr(password_check, "_PATIENCE", 0.3)
        async with database(kind, tmp_path, maxsize=2) as context:
            await User.create_user(email=EMAIL, password=PASSWORD)
            throttle = DatabaseThrottle(clock=clock)
            auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)
            pool: Any = connection_of(context)
            take, held = throttle._take, []

            async def take_when_dry(counted: Counted) -> Counted:
                if counted.of_account:
                    held.append(await pool._pool.acquire())
                return await take(counted)

            monkeypatch.setattr(throttle, "_take", take_when_dry)
            async with asyncio.timeout(LIMIT):
                async with in_transaction():
                    with pytest.raises(ServiceUnavailableError):
                        await auth.login(EMAIL, PASSWORD, context=HERE)
            assert len(held) == 1
            await pool._pool.release(held[0])
            await emitter.aclose()


class TestTwoServices:
    async def test_two_secrets(self, ada: User, clock: FakeClock) -> None:
        """Services with different secrets count separately, for accounts and for sources."""
        config = AuthConfig(secret=secrets.token_urlsafe(48))
        throttle = DatabaseThrottle(
            account=Backoff(free_attempts=BUDGET), source=Backoff(free_attempts=BUDGET), clock=clock
        )
        one = service(clock, source=BUDGET)
        two = AuthService(User, config, throttle=throttle, clock=clock)
        for auth in (one, two):
            await fail(auth, BUDGET, context=HERE)
            assert await guess(auth, context=HERE) == "ThrottledError"
            assert await guess(auth, "bob@example.com", context=HERE) == "ThrottledError"

    async def test_two_models(self, ada: User, clock: FakeClock) -> None:
        """An account with the same key and identifier in another model is another account."""
        named = await NamedUser.create_user(email=EMAIL, username=EMAIL, password=PASSWORD)
        assert named.pk == ada.pk
        throttle = DatabaseThrottle(
            account=Backoff(free_attempts=BUDGET), source=Backoff(free_attempts=BUDGET), clock=clock
        )
        config = AuthConfig(secret=SECRET)
        for model in (User, NamedUser):
            auth: AuthService[Any] = AuthService(model, config, throttle=throttle, clock=clock)
            await fail(auth, BUDGET, context=HERE)
            assert await guess(auth, context=HERE) == "ThrottledError"
            assert await guess(auth, UNKNOWN, context=HERE) == "ThrottledError"

    async def test_two_processes(self, ada: User, clock: FakeClock) -> None:
        """Two processes with one secret share one budget, which is not in memory."""
        for _ in range(BUDGET):
            await fail(service(clock), 1, context=HERE)
        assert await guess(service(clock), context=HERE) == "ThrottledError"

    async def test_a_user_name_that_is_an_address(
        self, db: TortoiseContext, clock: FakeClock
    ) -> None:
        """A user name in the form of another user's address blocks only its own account (A169)."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=BUDGET), clock=clock)
        auth = AuthService(NamedUser, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)
        await NamedUser.create_user(email=EMAIL, username="ada", password=PASSWORD)
        await NamedUser.create_user(email=UNKNOWN, username=EMAIL, password=PASSWORD)
        await fail(auth, BUDGET, EMAIL)
        assert await guess(auth, EMAIL, PASSWORD) == "ThrottledError"
        assert await guess(auth, "ada", PASSWORD) == "in"
