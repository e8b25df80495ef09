"""Throttling across many machines: the contract of throttles, in memory and in a real Redis."""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.storage import storage_from_string
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET, assert_live, log_in
from tests.support.app import User
from tests.support.hashing import argon2_costs
from tests.support.services import REDIS_URL, needs_redis
from tests.support.snippets import run, snippets
from tests.support.throttles import (
    ABROAD,
    BUDGET,
    BURST,
    LIMIT,
    Make,
    ThrottleContract,
    attempt,
    burst,
    fail,
    granted_to_processes,
    race,
    refused,
    storm,
    yes,
)
from tortoise_auth import AuthConfig, AuthenticationError, AuthService, RequestContext
from tortoise_auth.exceptions import ConfigurationError, ServiceUnavailableError, ThrottledError
from tortoise_auth.flows import password_check
from tortoise_auth.integrations.limits import LimitsThrottle, _CountedInWindows
from tortoise_auth.testing import Captured, FakeClock, capture
from tortoise_auth.throttling.protocol import Counted, Reservation, TooEarly

PAGE = Path(__file__).parent.parent.parent / "docs" / "throttling.md"
DAY = 24 * 60 * 60


def redis_storage(prefix: str, url: str = REDIS_URL) -> RedisStorage:
    return RedisStorage(f"async+{url}", implementation="redispy", key_prefix=prefix)


def client_of(storage: RedisStorage) -> Any:
    bridge: Any = storage.bridge
    return bridge.storage


@asynccontextmanager
async def redis() -> AsyncIterator[RedisStorage]:
    """A storage with keys of its own, which are deleted at the end."""
    storage = redis_storage(f"tortoise_auth_{secrets.token_hex(8)}")
    try:
        yield storage
    finally:
        await storage.reset()
        await client_of(storage).aclose()


@contextmanager
def refused_url() -> Iterator[str]:
    """A URL at which every connection is refused: the port is taken, and nothing accepts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"redis://127.0.0.1:{taken.getsockname()[1]}"


def made_of(storage: Storage) -> Make:
    def make(*, account: int = 1000, source: int = 1000, max_failures: int = 100) -> LimitsThrottle:
        return LimitsThrottle(
            storage,
            account=f"{account} per hour; {account} per day",
            source=f"{source} per hour",
            max_failures=max_failures,
        )

    return make


class TestInMemory(ThrottleContract):
    @pytest.fixture
    def make(self) -> Make:
        """Make a throttle in the memory of this process."""
        storage = storage_from_string("async+memory://")
        assert isinstance(storage, Storage)
        return made_of(storage)


@needs_redis
class TestInRedis(ThrottleContract):
    @pytest.fixture
    async def make(self) -> AsyncIterator[Make]:
        """Make a throttle in a real Redis."""
        async with redis() as storage:
            yield made_of(storage)

    async def test_two_processes(self) -> None:
        """Two processes share one budget."""
        async with redis() as storage:
            prefix = storage.bridge.key_prefix
            granted = await granted_to_processes(["-m", "tests.integrations.test_limits", prefix])
        assert sum(granted) == BUDGET

    async def test_everything_expires(self) -> None:
        """Every key in Redis expires, whatever the outcome of the attempts."""
        async with redis() as storage:
            throttle = made_of(storage)(account=2, source=4)
            await fail(throttle, attempt(source=ABROAD), 2)
            await throttle.released(await throttle.reserve(attempt(known_source=yes)))
            await fail(throttle, attempt(known_source=yes), 2)
            await refused(throttle, attempt(known_source=yes))
            await throttle.succeeded(await throttle.reserve(attempt("bob")))
            client = client_of(storage)
            keys = [key async for key in client.scan_iter(f"{storage.bridge.key_prefix}:*")]
            assert len(keys) > 5
            lifetimes = [await client.ttl(key) for key in keys]
            assert min(lifetimes) > 0
            assert max(lifetimes) <= 4000 * DAY

    async def test_window_ends_during_a_burst(self, clock: FakeClock) -> None:
        """However many guesses are in flight when a window ends, each window keeps its budget."""
        async with redis() as storage:
            throttle = LimitsThrottle(storage, account=f"{BUDGET} per minute", clock=clock)
            granted: Counter[str] = Counter()
            over, full = False, asyncio.Event()

            async def guess_on() -> None:
                while not over:
                    try:
                        reservation = await throttle.reserve(attempt(source=None))
                    except ThrottledError:
                        continue
                    (account,) = reservation.counted
                    assert isinstance(account, _CountedInWindows)
                    granted[account.windows[0].key] += 1
                    if granted[account.windows[0].key] == BUDGET:
                        full.set()

            async with asyncio.timeout(LIMIT):
                guessing = [asyncio.ensure_future(guess_on()) for _ in range(BURST)]
                for _ in range(10):
                    await full.wait()
                    full.clear()
                    clock.advance(timedelta(seconds=60))
                await full.wait()
                over = True
                await asyncio.gather(*guessing)
            assert len(granted) == 11
            assert set(granted.values()) == {BUDGET}
            client = client_of(storage)
            assert await client.ttl(f"{storage.bridge.key_prefix}:{[*granted][-1]}") > 60


class SlowStorage(MemoryStorage):
    """A storage in which other tasks may run between two steps."""

    chance = random.Random()

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        """Add, after a while."""
        await self._hesitate()
        value = await super().incr(key, expiry, amount)
        await self._hesitate()
        return value

    async def get(self, key: str) -> int:
        """Read, after a while."""
        value = await super().get(key)
        await self._hesitate()
        return value

    async def clear(self, key: str) -> None:
        """Clear, after a while."""
        await self._hesitate()
        await super().clear(key)

    async def _hesitate(self) -> None:
        for _ in range(self.chance.randrange(3)):
            await asyncio.sleep(0)


class TestSteps:
    """Other callers act between any two steps, as several processes do."""

    @pytest.mark.parametrize("seed", range(0, 1000, 100))
    async def test_in_a_storm(self, seed: int) -> None:
        """In whatever order the steps are taken, only the allowed attempts are checked."""
        for each in range(seed, seed + 100):
            storage = SlowStorage()
            storage.chance = random.Random(each)
            most = storage.chance.randint(2, 5)
            throttle = LimitsThrottle(storage, account="1000 per day", max_failures=most)
            failed = await storm(throttle, storage.chance, most)
            assert sum(not reservation.exceeded for reservation in failed) <= most, each

    async def test_counts_on_after_a_storm(self) -> None:
        """Attempts that were rejected or given back count no failure."""
        for seed in range(100):
            storage = SlowStorage()
            storage.chance = random.Random(seed)
            throttle = LimitsThrottle(storage, account="1000 per day", max_failures=3)
            failed = await storm(throttle, storage.chance, 3)
            (later,) = await fail(throttle, attempt(source=None))
            assert later.failures == len(failed) + 1, seed

    async def test_success_of_an_earlier_round(self) -> None:
        """A success that was reserved in an earlier round resets the failures of the current one, too."""
        throttle = LimitsThrottle("async+memory://", max_failures=2)
        slow, quick = [await throttle.reserve(attempt()) for _ in range(2)]
        await throttle.succeeded(quick)
        assert [each.locks for each in await fail(throttle, attempt(), 2)] == [False, True]
        await throttle.succeeded(slow)
        (later,) = await fail(throttle, attempt())
        assert later.failures == 1

    async def test_given_back_in_a_later_round(self) -> None:
        """An attempt that is given back is subtracted from the round in which it was counted."""
        throttle = LimitsThrottle("async+memory://", max_failures=3)
        slow, right = [await throttle.reserve(attempt()) for _ in range(2)]
        await throttle.succeeded(right)
        await fail(throttle, attempt())
        await throttle.released(slow)
        (later,) = await fail(throttle, attempt())
        assert later.failures == 2

    async def test_in_flight(self) -> None:
        """The error names the counter while attempts are in flight, and no counter once they are decided."""
        throttle = LimitsThrottle("async+memory://", account="1 per day")
        reservation = await throttle.reserve(attempt(source=None))
        with pytest.raises(TooEarly) as early:
            await throttle.reserve(attempt(source=None))
        assert early.value.in_flight == "account:ada"
        await throttle.failed(reservation)
        with pytest.raises(TooEarly) as late:
            await throttle.reserve(attempt(source=None))
        assert late.value.in_flight is None


@asynccontextmanager
async def refused_late(
    throttle: LimitsThrottle, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Reservation]]:
    """Let many guess at once, and subtract those that are refused only after the block."""
    uncount, go_on = throttle._uncount, asyncio.Event()

    async def late(windows: Any) -> None:
        await go_on.wait()
        await uncount(windows)

    monkeypatch.setattr(throttle, "_uncount", late)
    tried = [attempt(source=None)] * 90
    guesses = [asyncio.ensure_future(throttle.reserve(each)) for each in tried]
    for _ in range(100):
        await asyncio.sleep(0)
    granted: list[Reservation] = []
    yield granted
    go_on.set()
    outcomes = await asyncio.gather(*guesses, return_exceptions=True)
    granted += [each for each in outcomes if isinstance(each, Reservation)]


class TestWindows:
    async def test_each_is_waited_for(self, clock: FakeClock) -> None:
        """A caller that has used up several windows waits for the longest, and a refusal uses up none."""
        throttle = LimitsThrottle(
            "async+memory://", account="2 per minute; 5 per hour; 6 per day", clock=clock
        )
        clock.advance(datetime(2027, 1, 1, tzinfo=UTC) - clock())
        await fail(throttle, attempt(), 2)
        for _ in range(10):
            assert await refused(throttle, attempt()) == 60
        clock.advance(timedelta(seconds=60))
        await fail(throttle, attempt(), 2)
        clock.advance(timedelta(seconds=61))
        await fail(throttle, attempt(), 1)
        assert await refused(throttle, attempt()) == 3600 - 121
        clock.advance(timedelta(seconds=3600))
        await fail(throttle, attempt(), 1)
        assert await refused(throttle, attempt()) == DAY - 3721

    @pytest.mark.parametrize("counted", [0, 1, 2])
    async def test_gives_nothing_back_to_the_next(self, clock: FakeClock, counted: int) -> None:
        """An attempt of a window that has ended adds nothing to the next window."""
        throttle = LimitsThrottle("async+memory://", source="2 per minute", clock=clock)
        reservations = [await throttle.reserve(attempt(name)) for name in ("own", "also own")]
        clock.advance(timedelta(seconds=60))
        await fail(throttle, attempt(), counted)
        await throttle.succeeded(reservations[0])
        await throttle.released(reservations[1])
        await fail(throttle, attempt(), 2 - counted)
        await refused(throttle, attempt())

    async def test_refusals_of_the_last_one_add_nothing(
        self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A refusal that is subtracted just after its window has ended buys no guess."""
        throttle = LimitsThrottle("async+memory://", account="2 per minute", clock=clock)
        async with refused_late(throttle, monkeypatch) as granted_before:
            clock.advance(timedelta(seconds=60))
            await throttle.reserve(attempt(source=None))
        assert len(granted_before) == 2
        granted, _ = await burst(throttle, [attempt(source=None)] * 90)
        assert len(granted) == 1

    async def test_refusals_before_a_success_add_nothing(
        self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A refusal that is subtracted after the user has logged in buys no guess either."""
        throttle = LimitsThrottle("async+memory://", account="2 per minute", clock=clock)
        right = await throttle.reserve(attempt(source=None))
        async with refused_late(throttle, monkeypatch) as granted_before:
            await throttle.succeeded(right)
        assert len(granted_before) == 1
        granted, _ = await burst(throttle, [attempt(source=None)] * 90)
        assert len(granted) == 2

    async def test_that_ends_at_this_moment(self, clock: FakeClock) -> None:
        """A refusal asks for a wait of at least one second."""
        throttle = LimitsThrottle("async+memory://", account="1 per minute", clock=clock)
        clock.advance(datetime(2027, 1, 1, 0, 0, 59, 900_000, tzinfo=UTC) - clock())
        await fail(throttle, attempt())
        assert await refused(throttle, attempt()) == 1

    async def test_of_equal_length(self, clock: FakeClock) -> None:
        """Two windows of equal length are counted separately."""
        throttle = LimitsThrottle("async+memory://", account="3/minute; 2/minute", clock=clock)
        await fail(throttle, attempt(), 2)
        await refused(throttle, attempt())

    async def test_reservation_of_another_throttle(self, clock: FakeClock) -> None:
        """A reservation of another throttle is refused."""
        throttle = LimitsThrottle("async+memory://", clock=clock)
        strange = Reservation(attempt=attempt(), counted=(Counted("account:ada", 1),))
        with pytest.raises(TypeError, match="another throttle"):
            await throttle.released(strange)

    async def test_defaults(self) -> None:
        """By default ten attempts are free for an account."""
        throttle = LimitsThrottle("async+memory://")
        await fail(throttle, attempt(), 10)
        assert await refused(throttle, attempt()) <= 60

    @pytest.mark.parametrize("window", ["account", "source"])
    @pytest.mark.parametrize(
        "notation",
        ["", ";", "ten per minute", "5 per fortnight", "0 per minute", "5/minute; 0/day"],
    )
    def test_nonsense(self, window: str, notation: str) -> None:
        """A window that is malformed, or would refuse every login, is a configuration error."""
        with pytest.raises(ConfigurationError, match="cannot read"):
            LimitsThrottle("async+memory://", **{window: notation})  # type: ignore[arg-type]


class TestStorage:
    @pytest.mark.parametrize("storage", ["memory://", "redis://localhost", 7, None])
    def test_must_be_asynchronous(self, storage: Any) -> None:
        """A storage that would block the loop is refused."""
        with pytest.raises(ConfigurationError, match="begins with async"):
            LimitsThrottle(storage)

    @pytest.mark.parametrize(
        "uri", ["nonsense://:canary@localhost", "canary", "async+nonsense://canary"]
    )
    def test_must_exist(self, uri: str) -> None:
        """An unknown storage is refused, and the error hides the password in its URI."""
        with pytest.raises(ConfigurationError, match="cannot use this storage") as error:
            LimitsThrottle(uri)
        assert "canary" not in str(error.value)
        assert error.value.__cause__ is None

    def test_needs_the_library(self) -> None:
        """Without the library the error of the import names what to install."""
        code = (
            "import sys; sys.modules['limits'] = None; import tortoise_auth\n"
            "import tortoise_auth.integrations.limits"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        assert "pip install limits redis" in done.stderr.splitlines()[-1]


@pytest.fixture
async def ada(sqlite: TortoiseContext) -> User:
    return await User.create_user(email=EMAIL, password=PASSWORD)


@pytest.fixture
def events(ada: User) -> Iterator[Captured]:
    with capture(User.emitter) as captured:
        yield captured


class TestService:
    async def test_login(self, ada: User, events: Captured) -> None:
        """The service throttles as with the database, and writes no row."""
        throttle = LimitsThrottle("async+memory://", account="3 per hour", max_failures=4)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=throttle)
        here = RequestContext(ip="203.0.113.7")
        session = await auth.login(EMAIL, PASSWORD, context=here)
        with argon2_costs() as costs:
            for _ in range(3):
                with pytest.raises(AuthenticationError):
                    await auth.login(EMAIL, "wrong")
            with pytest.raises(ThrottledError) as error:
                await auth.login(EMAIL, PASSWORD)
            assert 0 < error.value.retry_after <= 3600
            with pytest.raises(AuthenticationError):
                await auth.login(EMAIL, "wrong", context=here)
        assert len(costs) == 4
        assert "account_locked" in events.names
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, PASSWORD, context=here)
        await assert_live(auth, session)
        await auth.set_password(ada, "another donkey charger")
        assert await auth.login(EMAIL, "another donkey charger")
        assert await auth.purge_expired() == 0


class TestRedisIsDown:
    @staticmethod
    def service(url: str) -> AuthService[User]:
        """Return a service whose Redis does not answer."""
        throttle = LimitsThrottle(redis_storage("down", url))
        return AuthService(User, AuthConfig(secret=SECRET), throttle=throttle)

    @pytest.mark.parametrize("password", [PASSWORD, "wrong"])
    async def test_refused(self, ada: User, events: Captured, password: str) -> None:
        """No login succeeds, nothing is hashed, and no credential is blamed (A174)."""
        with refused_url() as url, argon2_costs() as costs:
            auth = self.service(url)
            for call in (
                lambda: auth.login(EMAIL, password),
                lambda: auth.login("nobody@example.com", password),
                lambda: auth.change_password(ada, password, "another donkey charger"),
            ):
                with pytest.raises(ServiceUnavailableError) as error:
                    await call()
                assert url.rpartition("/")[2] not in str(error.value)
        assert costs == []
        assert events.names == []

    async def test_silent(self, ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
        """A Redis that accepts the connection and never answers delays no caller for ever."""
        monkeypatch.setattr(password_check, "_PATIENCE", 0.2)

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        async with server, asyncio.timeout(30):
            port = server.sockets[0].getsockname()[1]
            auth = self.service(f"redis://127.0.0.1:{port}")
            with argon2_costs() as costs, pytest.raises(ServiceUnavailableError):
                await log_in(auth)
        assert costs == []

    @needs_redis
    async def test_goes_down_meanwhile(
        self, ada: User, events: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A login whose outcome cannot be counted fails, even with the right password."""
        async with redis() as storage:
            auth = AuthService(User, AuthConfig(secret=SECRET), throttle=LimitsThrottle(storage))

            verify = User.password_hasher.verify

            async def goes_down(*args: Any) -> Any:
                verification = await verify(*args)
                monkeypatch.setattr(storage, "incr", down)
                return verification

            async def down(*_: object, **__: object) -> None:
                raise ConnectionRefusedError("canary")

            monkeypatch.setattr(User.password_hasher, "verify", goes_down)
            with pytest.raises(ServiceUnavailableError) as error:
                await log_in(auth)
            assert "canary" not in str(error.value)
            assert await auth.sessions(ada) == []
            assert events.names == []


@needs_redis
class TestPage:
    async def test_example_runs(self, ada: User, monkeypatch: pytest.MonkeyPatch) -> None:
        """The example for many machines runs as it stands, but for the address."""
        (source,) = [each for each in snippets(PAGE) if "redis" in each]
        assert "async+redis://localhost:6379" in source
        namespace: dict[str, Any] = {
            "AuthService": AuthService,
            "User": User,
            "config": AuthConfig(secret=SECRET),
        }
        own = f"{REDIS_URL}/9"  # a database of its own, as every throttle has this prefix
        await run(source.replace("redis://localhost:6379", own), namespace, PAGE.name)
        auth, throttle = namespace["auth"], namespace["throttle"]
        storage = throttle._storage
        try:
            for _ in range(10):
                with pytest.raises(AuthenticationError):
                    await auth.login(EMAIL, "wrong")
            with pytest.raises(ThrottledError):
                await log_in(auth)
        finally:
            await storage.reset()
            await client_of(storage).aclose()


async def _race_in_redis(prefix: str) -> None:
    storage = redis_storage(prefix)
    await race(LimitsThrottle(storage, account=f"{BUDGET} per day"))
    await client_of(storage).aclose()


if __name__ == "__main__":
    asyncio.run(_race_in_redis(sys.argv[1]))
