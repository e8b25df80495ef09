"""What the front objects take and show: mistakes get an answer, and secrets stay inside."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pydantic
import pydantic_core
import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET, assert_live, log_in
from tests.support.app import NamedUser, StrUser, User
from tests.support.keys import pem
from tortoise_auth import (
    AuthConfig,
    AuthenticationError,
    AuthService,
    RequestContext,
    Revocation,
    SigningKey,
)
from tortoise_auth.events import NamedEvent, UserLogin
from tortoise_auth.exceptions import ThrottledError, TokenInvalidError
from tortoise_auth.models import Session
from tortoise_auth.sessions.access_tokens import AccessTokens
from tortoise_auth.testing import FakeClock
from tortoise_auth.throttling import source_of

CONFIG = AuthConfig(secret=SECRET)


class TestLogout:
    @pytest.mark.parametrize(
        ("mistake", "error", "message"),
        [
            ("bearer", ValueError, 'without "Bearer "'),
            ("user", TypeError, "not User"),
            ("session", TypeError, "not Session"),
            ("session id", TypeError, "not UUID"),
            ("session id as text", TypeError, "not the id of a session"),
            ("result", TypeError, "takes result.access_token"),
            ("none", TypeError, "not NoneType"),
            ("bytes", TypeError, "not bytes"),
        ],
    )
    async def test_no_token(
        self,
        auth: AuthService[User],
        ada: User,
        mistake: str,
        error: type[Exception],
        message: str,
    ) -> None:
        """What is no token at all is an error that says what to pass, not a logout of no one."""
        result = await log_in(auth)
        mistakes: dict[str, Any] = {
            "bearer": f"Bearer {result.access_token}",
            "user": ada,
            "session": result.session,
            "session id": result.session.id,
            "session id as text": str(result.session.id),
            "result": result,
            "none": None,
            "bytes": result.access_token.encode(),
        }
        with pytest.raises(error) as raised:
            await auth.logout(mistakes[mistake])
        assert message in str(raised.value)
        assert result.access_token not in str(raised.value)
        await assert_live(auth, result)

    async def test_garbage(self, auth: AuthService[User], ada: User) -> None:
        """Text that is no token of ours ends nothing."""
        for text in ("", "x", "a.b.c", "tart_" + "A" * 70, "bearer"):
            assert await auth.logout(text) == Revocation(0, None)


class TestAddress:
    @pytest.mark.parametrize(
        "ip", ["1.2.3.4:80", "1.2.3.4, 5.6.7.8", "unknown", "", " ", "localhost", "1.2.3", "[::1]"]
    )
    def test_is_none(self, ip: str) -> None:
        """What is no address is refused, with what to pass."""
        with pytest.raises(ValueError, match="takes one address"):
            RequestContext(ip=ip)

    @pytest.mark.parametrize("ip", [("1.2.3.4", 80), object(), 7, b"1.2.3.4", ["1.2.3.4"]])
    def test_is_no_text(self, ip: Any) -> None:
        """Nor is an object of a framework."""
        with pytest.raises(TypeError, match=r"request\.client\.host"):
            RequestContext(ip=ip)

    @pytest.mark.parametrize(
        ("ip", "normal", "source"),
        [
            (" 203.0.113.7 ", "203.0.113.7", "203.0.113.7"),
            ("::ffff:203.0.113.7", "203.0.113.7", "203.0.113.7"),
            ("::203.0.113.7", "203.0.113.7", "203.0.113.7"),
            ("64:ff9b::203.0.113.7", "203.0.113.7", "203.0.113.7"),
            ("64:ff9b::cb00:7107", "203.0.113.7", "203.0.113.7"),
            ("2001:DB8:0:0::7", "2001:db8::7", "2001:db8::/64"),
            ("fe80::1%eth0", "fe80::1", "fe80::/64"),
            ("::1", "::1", "::/64"),
            ("::", "::", "::/64"),
        ],
    )
    def test_one_spelling(self, ip: str, normal: str, source: str) -> None:
        """An address has one spelling, and an IPv4 client is one source however it comes."""
        context = RequestContext(ip=ip)
        assert context.ip == normal
        assert source_of(context.ip) == source

    def test_stored_before(self) -> None:
        """An event that was stored with something else can be read."""
        event = UserLogin(user=User(id=7, email=EMAIL), session_id="s", subject_id="7")
        written = event.to_dict() | {"context": {"ip": "testclient", "request_id": "r"}}
        assert UserLogin.from_dict(written).context == RequestContext(request_id="r")


class TestTwoUserModels:
    async def test_one_configuration(self, db: TortoiseContext, clock: FakeClock) -> None:
        """A token of the one is none for the other, neither with the database nor without."""
        users = AuthService(User, CONFIG, clock=clock)
        others = AuthService(NamedUser, CONFIG, clock=clock)
        await User.create_user(email=EMAIL, password=PASSWORD)
        await NamedUser.create_user(email=EMAIL, username="ada", password=PASSWORD)
        token = (await users.login(EMAIL, PASSWORD)).access_token
        assert users.decode(token).subject == "1"
        with pytest.raises(TokenInvalidError):
            others.decode(token)
        with pytest.raises(TokenInvalidError):
            await others.authenticate(token)
        assert await others.logout(token) == Revocation(0, None)
        assert await users.authenticate(token)

    @pytest.mark.parametrize("subject", ["\ud800", "a\0b"])
    async def test_subject_no_database_takes(
        self, db: TortoiseContext, clock: FakeClock, subject: str
    ) -> None:
        """A signed subject that no driver takes is an invalid token."""
        auth = AuthService(StrUser, CONFIG, clock=clock)
        forged, _ = AccessTokens(CONFIG, clock, "app_str_user").issue(
            subject=subject,
            session_id="0e98e265-a156-4090-8d07-e70e3b9cbcaf",
            session_ends=clock() + timedelta(days=1),
            extra={},
        )
        with pytest.raises(TokenInvalidError):
            auth.decode(forged)
        with pytest.raises(TokenInvalidError):
            await auth.authenticate(forged)

    async def test_key_that_no_token_names(self, db: TortoiseContext, clock: FakeClock) -> None:
        """An account with an empty key has no session, instead of one whose token is refused."""
        auth = AuthService(StrUser, CONFIG, clock=clock)
        await StrUser.create_user(email=EMAIL, password=PASSWORD, code="")
        with pytest.raises(ValueError, match="empty primary key"):
            await auth.login(EMAIL, PASSWORD)
        assert await Session.all().count() == 0

    @pytest.mark.parametrize("key", ["k" * 40, "😀" * 40], ids=["ASCII", "long in JSON"])
    async def test_any_key_and_the_largest_claims(
        self, db: TortoiseContext, clock: FakeClock, key: str
    ) -> None:
        """A login returns tokens that can be used, or opens no session, however long its parts are."""
        config = AuthConfig(secret=SECRET, issuer="\x01" * 255, audience="\x01" * 255)
        auth = AuthService(StrUser, config, clock=clock)
        await StrUser.create_user(email=EMAIL, password=PASSWORD, code=key)
        opened = 0
        for size in range(0, 3000, 100):
            claims = {"claim": "x" * size}
            try:
                result = await auth.login(EMAIL, PASSWORD, claims=claims)
            except ValueError as error:
                assert "too large" in str(error)
                continue
            opened += 1
            assert (await auth.authenticate(result.access_token)).pk == key
            result = await auth.refresh(result.refresh_token, claims=claims)
            assert (await auth.authenticate(result.access_token)).pk == key
        assert await Session.all().count() == opened
        assert 10 < opened < 30


class TestCopies:
    async def test_claims(self, auth: AuthService[User], ada: User) -> None:
        """Claims can be copied, pickled and made a dict."""
        claims = auth.decode((await auth.login(EMAIL, PASSWORD, claims={"a": [1]})).access_token)
        assert dataclasses.asdict(claims)["extra"] == {"a": [1]}
        assert pickle.loads(pickle.dumps(claims)) == copy.deepcopy(claims) == claims

    def test_named_event(self) -> None:
        """So can events that were emitted by name."""
        event = NamedEvent.of("shipped", (1,), {"by": "mail"})
        for other in (pickle.loads(pickle.dumps(event)), copy.deepcopy(event)):
            assert (other.name, other.args, other.kwargs) == ("shipped", (1,), {"by": "mail"})


def as_pydantic(value: Any) -> str:
    """Dump a settings object as a field of a pydantic model."""
    model = pydantic.create_model(
        "Settings", __config__=pydantic.ConfigDict(arbitrary_types_allowed=True), held=(Any, ...)
    )
    dumped = ""
    for dump in ("model_dump", "model_dump_json"):
        try:
            dumped += str(getattr(model(held=value), dump)())
        except pydantic_core.PydanticSerializationError:
            continue
    return dumped


class TestSecrets:
    @pytest.mark.parametrize("kind", ["text", "key", "EdDSA"])
    def test_configuration(self, kind: str) -> None:
        """Neither ``vars``, ``asdict``, a pickle nor a dump of pydantic shows the secret."""
        secret = SECRET if kind != "EdDSA" else pem("EdDSA").decode()
        key = SigningKey(secret, algorithm="EdDSA" if kind == "EdDSA" else "HS256")
        config = AuthConfig(secret=secret if kind == "text" else [key])
        AccessTokens(config, FakeClock()).issue(
            subject="7", session_id="s", session_ends=datetime.max.replace(tzinfo=UTC), extra={}
        )
        shown = "".join(
            str(show(each))
            for each in (config, config.keys[0])
            for show in (repr, vars, dataclasses.asdict, as_pydantic, copy.deepcopy)
        )
        text = secret
        assert text[:20] not in shown
        assert text.splitlines()[-2 if kind == "EdDSA" else 0][:16] not in shown
        for each in (config, config.keys[0]):
            with pytest.raises(TypeError, match="is not pickled"):
                pickle.dumps(each)
        assert dataclasses.replace(config, issuer="x").keys == config.keys
        assert copy.deepcopy(config) == config
        assert len({config, copy.deepcopy(config)}) == 1


class TestSummerTime:
    @pytest.mark.parametrize("moment", ["2026-10-25T00:50", "2026-03-29T00:50"])
    async def test_token_lives_as_long(self, ada: User, moment: str) -> None:
        """A clock in a zone with summer time changes nothing in the two nights of the year."""
        clock = FakeClock(datetime.fromisoformat(moment).replace(tzinfo=UTC))
        auth = AuthService(
            User, CONFIG, clock=lambda: clock().astimezone(ZoneInfo("Europe/Berlin"))
        )
        result = await auth.login(EMAIL, PASSWORD)
        assert result.access_expires_at - clock() == timedelta(minutes=15)
        clock.advance(timedelta(minutes=14))
        assert await auth.authenticate(result.access_token)
        clock.advance(timedelta(minutes=2))
        with pytest.raises(Exception, match="expired"):
            await auth.authenticate(result.access_token)


class TestErrors:
    def test_throttled_is_refused(self) -> None:
        """``except AuthenticationError`` around a login is complete."""
        with pytest.raises(AuthenticationError):
            raise ThrottledError(1)
        assert str(ThrottledError(1)).endswith("try again in 1 second")
        assert str(ThrottledError(1.5)).endswith("try again in 2 seconds")
        assert pickle.loads(pickle.dumps(ThrottledError(3))).retry_after == 3

    def test_name_on_pypi(self) -> None:
        """No page, example or message tells people to install another project of that name."""
        root = Path(__file__).parents[1]
        files = [root / "README.md", *(root / "docs").glob("*.md")]
        for folder in ("tortoise_auth", "examples"):
            files += (root / folder).rglob("*.py")
        wrong = re.compile(r"pip install [^\n]*tortoise[-_]auth")
        assert [file.name for file in files if wrong.search(file.read_text())] == []
        assert len(files) > 90
