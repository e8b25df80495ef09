"""Rotation within the grace period: any number of tabs and lost answers share one chain of tokens."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest

from tests.support.accounts import (
    NEW_PASSWORD,
    SECRET,
    assert_live,
    assert_over,
    log_in,
)
from tests.support.app import User
from tests.support.rows import row
from tortoise_auth import AuthConfig, AuthService, EventEmitter, RequestContext, SigningKey
from tortoise_auth.exceptions import (
    EventError,
    ServiceUnavailableError,
    TokenError,
    TokenInvalidError,
    TokenReusedError,
    TokenRevokedError,
)
from tortoise_auth.models import Session
from tortoise_auth.sessions import Sessions
from tortoise_auth.testing import Captured, FakeClock

GRACE = timedelta(seconds=30)
INSTANT = timedelta(microseconds=1)


@pytest.fixture
def auth(clock: FakeClock) -> AuthService[User]:
    """A service with a grace period of half a minute."""
    return AuthService(User, AuthConfig(secret=SECRET, refresh_reuse_grace=GRACE), clock=clock)


class TestWithin:
    async def test_spent_token(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A spent token is answered with the successor it has, a new access token, and no event."""
        first = await log_in(auth)
        events.clear()
        second = await auth.refresh(first.refresh_token)
        before = await row(Session, first.session.id)
        clock.advance(GRACE - INSTANT)
        third = await auth.refresh(first.refresh_token, context=RequestContext(ip="203.0.113.9"))

        assert third.refresh_token == second.refresh_token
        assert third.access_token != second.access_token
        assert third.access_expires_at > second.access_expires_at
        assert third.refresh_expires_at == second.refresh_expires_at
        assert third.session.generation == second.session.generation == 1
        assert await auth.authenticate(second.access_token) == ada
        assert await auth.authenticate(third.access_token) == ada
        assert events.names == ["session_refreshed"]
        assert await row(Session, first.session.id) == before

    async def test_successor(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """The successor is answered with itself, and rotates as soon as the period is over."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        clock.advance(GRACE - INSTANT)
        third = await auth.refresh(second.refresh_token)
        assert third.refresh_token == second.refresh_token
        clock.advance(INSTANT)
        fourth = await auth.refresh(second.refresh_token)
        assert fourth.refresh_token != second.refresh_token
        assert fourth.session.generation == 2
        assert events.names.count("session_refreshed") == 2

    async def test_first_token_rotates_at_once(self, auth: AuthService[User], ada: User) -> None:
        """A login is no rotation: its token is spent by the first refresh, however soon."""
        first = await log_in(auth)
        assert (await auth.refresh(first.refresh_token)).refresh_token != first.refresh_token

    async def test_lost_answer(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A client that lost the answer, because a handler raised, may refresh again."""

        async def fail() -> None:
            raise RuntimeError

        first = await log_in(auth)
        emitter.errors = "raise"
        emitter.on("session_refreshed", fail)
        with pytest.raises(EventError):
            await auth.refresh(first.refresh_token)
        await emitter.aclose(10)
        await assert_live(auth, await auth.refresh(first.refresh_token))

    @pytest.mark.parametrize("which", ["first", "second"])
    @pytest.mark.parametrize("end", ["logout", "set_password", "deactivate"])
    async def test_session_that_ended(
        self, auth: AuthService[User], ada: User, events: Captured, end: str, which: str
    ) -> None:
        """The period revives no session that was ended, and raises no alarm."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        if end == "logout":
            await auth.logout(second.access_token)
        elif end == "set_password":
            await auth.set_password(ada, NEW_PASSWORD)
        else:
            await auth.deactivate(ada)
        with pytest.raises(TokenRevokedError):
            await auth.refresh((first if which == "first" else second).refresh_token)
        await assert_over(auth, second)
        assert "refresh_token_reused" not in events.names


class TestTooLate:
    async def test_after(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """After the period a spent token ends its session."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        clock.advance(GRACE)
        with pytest.raises(TokenReusedError):
            await auth.refresh(first.refresh_token)
        await assert_over(auth, second)
        assert events.names[-1] == "refresh_token_reused"

    async def test_only_the_token_before(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """Within the period a token that was spent earlier still ends its session."""
        first = await log_in(auth)
        second = await auth.refresh(first.refresh_token)
        clock.advance(GRACE)
        third = await auth.refresh(second.refresh_token)
        with pytest.raises(TokenReusedError):
            await auth.refresh(first.refresh_token)
        await assert_over(auth, third)
        assert events.names[-1] == "refresh_token_reused"


class TestTurns:
    async def test_end(
        self, auth: AuthService[User], ada: User, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A refresh that never sees that the token was spent gives up, and ends no session."""
        first = await log_in(auth)
        turns = 0

        async def lose(*_: object) -> None:
            nonlocal turns
            turns += 1

        with monkeypatch.context() as patch:
            patch.setattr(Sessions, "rotate", lose)
            with pytest.raises(ServiceUnavailableError, match="READ COMMITTED"):
                await auth.refresh(first.refresh_token)
        assert turns == 5
        await assert_live(auth, first)


class TestKeys:
    async def test_new_key_first(self, ada: User, clock: FakeClock) -> None:
        """A successor that an older key derived is found as long as that key is configured."""
        old, new = SigningKey(SECRET, kid="old"), SigningKey("n3w-" + SECRET, kid="new")
        before = _service(clock, [old])
        after = _service(clock, [new, old])
        first = await log_in(before)
        second = await before.refresh(first.refresh_token)
        assert (await after.refresh(first.refresh_token)).refresh_token == second.refresh_token
        clock.advance(GRACE)
        third = await after.refresh(second.refresh_token)
        assert (await after.refresh(second.refresh_token)).refresh_token == third.refresh_token

    async def test_key_is_gone(self, ada: User, clock: FakeClock, events: Captured) -> None:
        """Where no key derives the successor, the spent token is refused without an alarm."""
        before = _service(clock, [SigningKey(SECRET)])
        after = _service(clock, [SigningKey("n3w-" + SECRET)])
        first = await log_in(before)
        second = await before.refresh(first.refresh_token)
        with pytest.raises(TokenInvalidError):
            await after.refresh(first.refresh_token)
        assert "refresh_token_reused" not in events.names
        assert (await after.refresh(second.refresh_token)).session.id == first.session.id


class Tabs:
    """What tabs of one browser do with one stored token, and what must be answered.

    Requests are answered late, and answers are delivered late or lost. The model of the server is a
    chain of tokens with the time of its last rotation.
    """

    def __init__(self, auth: AuthService[User], clock: FakeClock, seed: int) -> None:
        self.auth, self.clock = auth, clock
        self.random = random.Random(seed)
        self.chain: list[str] = []
        self.rotated_at = clock() - GRACE
        self.over = False
        self.alarms = 0
        self.requests: list[str] = []
        self.answers: list[str] = []
        self.stored = ""

    async def run(self, steps: int) -> None:
        """Log in, and do *steps* random things."""
        self.stored = (await log_in(self.auth)).refresh_token
        self.chain = [self.stored]
        for _ in range(steps):
            choice = self.random.choices(
                [self.send, self.process, self.deliver, self.lose, self.wait, self.steal],
                weights=[6, 6, 5, 1, 3, 0.2],
            )[0]
            await choice()

    async def send(self) -> None:
        """A tab sends what is stored."""
        self.requests.append(self.stored)

    async def process(self) -> None:
        """The server answers any of the requests under way."""
        if self.requests:
            position = self.random.randrange(len(self.requests))
            await self.present(self.requests.pop(position))

    async def deliver(self) -> None:
        """Any of the answers under way arrives and is stored."""
        if self.answers:
            self.stored = self.answers.pop(self.random.randrange(len(self.answers)))

    async def lose(self) -> None:
        """An answer is lost."""
        if self.answers:
            self.answers.pop()

    async def wait(self) -> None:
        """Time passes, now and then more than the grace period."""
        self.clock.advance(GRACE * self.random.choice([0.05, 0.1, 0.2, 0.4, 1]))

    async def steal(self) -> None:
        """A thief presents any token there ever was."""
        await self.present(self.random.choice(self.chain))

    async def present(self, token: str) -> None:
        """Present *token*, and compare the outcome with the model's."""
        place, newest = self.chain.index(token), len(self.chain) - 1
        within = newest > 0 and self.clock() < self.rotated_at + GRACE
        try:
            answer = (await self.auth.refresh(token)).refresh_token
        except TokenError as error:
            reused = place < newest and not (within and place == newest - 1)
            assert self.over or reused, error
            assert type(error) is (TokenReusedError if reused else TokenRevokedError)
            self.alarms += not self.over
            self.over = True
            return
        assert not self.over
        if not within and place == newest:
            assert answer not in self.chain
            self.chain.append(answer)
            self.rotated_at = self.clock()
        else:
            assert within
            assert place >= newest - 1
            assert answer == self.chain[newest]
        self.answers.append(answer)


class TestAnyOrder:
    async def test_of_tabs_losses_delays_and_thieves(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """Whatever happens in whatever order, the answer is the model's; so is the alarm."""
        alarms, longest, repeated = 0, 0, 0
        for seed in range(40):
            events.clear()
            tabs = Tabs(auth, clock, seed)
            await tabs.run(60)
            assert events.names.count("session_refreshed") == len(tabs.chain) - 1
            assert events.names.count("refresh_token_reused") == tabs.alarms <= 1
            alarms += tabs.alarms
            longest = max(longest, len(tabs.chain))
            repeated += len(tabs.answers) > 1
        assert 0 < alarms < 40, "each outcome is among those that were tried"
        assert longest > 3
        assert repeated

    async def test_of_tabs_that_answer_in_time(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """Tabs that refresh at once, at every expiry, share one chain for weeks."""
        stored = (await log_in(auth)).refresh_token
        for generation in range(1, 30):
            clock.advance(timedelta(hours=20))
            answers = {(await auth.refresh(stored)).refresh_token for _ in range(3)}
            clock.advance(GRACE - INSTANT)
            answers |= {(await auth.refresh(each)).refresh_token for each in (stored, *answers)}
            (stored,) = answers
            assert events.names.count("session_refreshed") == generation
        assert "refresh_token_reused" not in events.names


def _service(clock: FakeClock, keys: list[SigningKey]) -> AuthService[User]:
    config = AuthConfig(secret=keys, refresh_reuse_grace=GRACE)
    return AuthService(User, config, clock=clock)
