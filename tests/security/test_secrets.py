"""R92 and A122 to A126: no password, token, key or hash can be read where it does not belong."""

from __future__ import annotations

import base64
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from itertools import count
from typing import Any
from urllib.parse import quote

import pytest
from passlib.hash import pbkdf2_sha256
from tortoise.context import TortoiseContext
from tortoise.exceptions import BaseORMException, OperationalError

from tests.security.canaries import (
    EVENTS,
    OTHERS,
    OURS,
    RAISED,
    Places,
    forms,
    new_secret,
    recording_places,
)
from tests.support.app import User
from tests.support.statements import statements
from tortoise_auth import (
    AuthConfig,
    AuthResult,
    AuthService,
    EventEmitter,
    RequestContext,
    SigningKey,
    TortoiseAuthError,
)
from tortoise_auth.events import Event
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.models import Session
from tortoise_auth.sessions.refresh_tokens import RefreshToken
from tortoise_auth.testing import FakeClock
from tortoise_auth.throttling import Backoff, DatabaseThrottle

EMAIL = "ada@example.com"
HOSTILE = "eve\r\n2026-01-01 CRITICAL tortoise_auth: all is lost\x1b[2J\u2028\u0085"

Call = Callable[[], Awaitable[object]]


class Life:
    """A user and the calls for her, with every secret recorded."""

    def __init__(self, clock: FakeClock, places: Places) -> None:
        self.places = places
        self.clock = clock
        self.clear = {name: new_secret() for name in ("password", "new password", "wrong", "key")}
        self.clear["typed as identifier"] = new_secret()
        self.stored: dict[str, str] = {}
        config = AuthConfig(secret=self.clear["key"])
        self.clear["throttle key"] = config.keys[0].derive("throttle").hex()
        throttle = DatabaseThrottle(account=Backoff(free_attempts=9), clock=clock)
        self.auth = AuthService(User, config, clock=clock, throttle=throttle)
        places.show(config, *config.keys, config.keys, self.auth, vars(self.auth), throttle)

    async def does(self, call: Call) -> Any:
        """Make a call, and record the secrets that it made or stored."""
        result = await self.tries(call)
        if isinstance(result, AuthResult):
            self.places.show(result.user, result.session, [result], {"result": result})
            self.places.show(RefreshToken.parse(result.refresh_token))
            number = len(self.clear)
            self.clear[f"access token {number}"] = result.access_token
            self.clear[f"signature {number}"] = result.access_token.rpartition(".")[2]
            self.clear[f"refresh token {number}"] = result.refresh_token
            self.clear[f"refresh secret {number}"] = result.refresh_token[-50:]
        await self._record_what_is_stored()
        return result

    async def tries(self, call: Call) -> Any:
        """Make a call, and record its result or its error."""
        try:
            result = await call()
        except (TortoiseAuthError, BaseORMException, ValueError) as error:
            self.places.error(error)
            return None
        self.places.show(result)
        return result

    async def _record_what_is_stored(self) -> None:
        for hashed in await User.all().values_list("password", flat=True):
            self.stored[f"password hash {hashed}"] = str(hashed)
            self.stored[f"digest of {hashed}"] = str(hashed).rpartition("$")[2]
        for each in await Session.all():
            for name in ("refresh_hash", "family_hash"):
                self.stored[f"{name} {getattr(each, name)}"] = getattr(each, name)

    @property
    def everything(self) -> dict[str, str]:
        """All canaries."""
        return self.clear | self.stored


@pytest.fixture
async def life(db: TortoiseContext, clock: FakeClock) -> AsyncIterator[Life]:
    """The life of Ada, with every place recorded."""
    with recording_places() as places:
        yield Life(clock, places)


def listen(emitter: EventEmitter, places: Places) -> None:
    """Record every event as it would be logged, stored and sent; and fail, so that it is logged."""

    def note(event: Event) -> None:
        places.texts[EVENTS] += [repr(event), f"{event}", repr(event.context)]
        places.texts[EVENTS].append(json.dumps(event.to_dict()))

    async def fail(event: Event) -> None:
        raise RuntimeError(f"nothing works: {event}")

    emitter.on("*", note, thread=False)
    emitter.on("*", fail)
    emitter.on("*", fail, delivery="background", name="in the background")
    emitter.on("*", fail, delivery="durable", name="durable")


async def every_operation(life: Life) -> None:
    """Make every call, with right and wrong values."""
    auth, does, clear = life.auth, life.does, life.clear
    password, new, wrong = clear["password"], clear["new password"], clear["wrong"]
    context = RequestContext(ip="192.0.2.7", user_agent=HOSTILE, request_id="r-1")

    ada = await does(lambda: User.create_user(email=EMAIL, password=password))
    await does(lambda: User.create_user(email=EMAIL, password=new))
    await does(lambda: User.create_user(email=password, password=password))
    await does(lambda: User.create_user(email="bob@example.com", password="x" + wrong[:3]))
    await does(lambda: User.create_user(email="bob@example.com", password=wrong + "\0"))
    await does(lambda: User.create_user(email="bob@example.com", password=wrong, is_active=True))
    await does(lambda: User.create_user(email="bob@example.com", password=wrong, nonsense=wrong))

    await does(lambda: auth.login(EMAIL, wrong, context=context))
    await does(lambda: auth.login("nobody@example.com", wrong, context=context))
    await does(lambda: auth.login(clear["typed as identifier"], password, context=context))
    await does(lambda: auth.login(HOSTILE, password, context=context))
    first = await does(lambda: auth.login(EMAIL, password, context=context))
    await does(lambda: auth.login(EMAIL, password, claims={"sub": password}))
    await User.filter(pk=ada.pk).update(password=pbkdf2_sha256.using(rounds=1).hash(password))
    await does(lambda: auth.login(EMAIL, password))
    await does(lambda: ada.check_password(wrong))

    await does(lambda: auth.authenticate(first.access_token))
    life.places.show(auth.decode(first.access_token))
    second = await does(lambda: auth.refresh(first.refresh_token, context=context))
    for token in (first.access_token + "=", first.access_token[:-4], second.refresh_token[:-1]):
        for door in (auth.authenticate, auth.refresh, auth.logout):
            await does(lambda door=door, token=token: door(token))  # type: ignore[misc]
    await does(lambda: auth.refresh(second.access_token))
    await does(lambda: auth.authenticate(second.refresh_token))
    await does(lambda: auth.refresh(first.refresh_token, context=context))
    await does(lambda: auth.authenticate(second.access_token))

    third = await does(lambda: auth.login(EMAIL, password))
    await does(lambda: auth.logout(third.access_token, context=context))
    await does(lambda: auth.logout(third.refresh_token))
    fourth = await does(lambda: auth.login(EMAIL, password))
    await does(lambda: auth.sessions(ada))
    await does(lambda: auth.revoke_session(fourth.session.id))
    await does(lambda: auth.revoke_session(fourth.refresh_token))
    life.clock.advance(timedelta(days=8))
    await does(lambda: auth.refresh(fourth.refresh_token))
    await does(lambda: auth.authenticate(fourth.access_token))

    await does(lambda: auth.change_password(ada, wrong, new))
    await does(lambda: auth.change_password(ada, password, wrong[:9]))
    await does(lambda: auth.change_password(ada, password, new, context=context))
    await does(lambda: auth.set_password(ada, "password" * 2))
    await does(lambda: auth.set_password(User(email=password), new))
    await does(lambda: ada.set_password(password))
    await does(lambda: auth.set_password(ada, new))
    await does(lambda: auth.logout_all(ada))
    for _ in range(12):
        await does(lambda: auth.login(EMAIL, wrong))
    await does(lambda: auth.login(EMAIL, new))
    await does(lambda: auth.deactivate(ada))
    await does(lambda: auth.change_password(ada, new, password))
    await does(lambda: auth.activate(ada))
    await does(auth.purge_expired)
    await auth.emitter.aclose(10)
    await auth.relay().drain()
    life.places.show(ada, [ada], auth.emitter, auth.passwords, auth.policy, auth.config)


class TestSearch:
    """The search for canaries finds each of them."""

    @pytest.mark.parametrize(
        "write",
        [
            pytest.param(lambda secret: f"before {secret} behind", id="plain"),
            pytest.param(repr, id="repr"),
            pytest.param(ascii, id="ascii"),
            pytest.param(lambda secret: repr({"x": [secret.encode()]}), id="bytes"),
            pytest.param(lambda secret: json.dumps({"x": secret}), id="json"),
            pytest.param(lambda secret: quote(f"?x={secret}"), id="url"),
            pytest.param(lambda secret: f"a {secret}".encode().hex(), id="hex"),
            *(
                pytest.param(
                    lambda secret, filler=filler: base64.b64encode(
                        f"{filler}{secret} and more".encode()
                    ).decode(),
                    id=f"base64-{len(filler)}",
                )
                for filler in ("", "a", "ab", "abc")
            ),
            pytest.param(
                lambda secret: base64.urlsafe_b64encode(secret.encode()).decode(), id="base64-url"
            ),
        ],
    )
    def test_finds_every_form(self, write: Callable[[str], str]) -> None:
        """R92: the search reports a planted secret in each form, and no secret that was not planted."""
        places, planted, other = Places(), new_secret(), new_secret()
        places.texts[OURS].append(write(planted))
        assert places.leaks({"planted": planted, "other": other}) == {(OURS, "planted")}

    def test_finds_what_is_behind_an_error(self) -> None:
        """R92: causes, contexts, notes and attributes of an error are searched, too."""
        names = ("text", "cause", "context", "note", "fact")
        planted = {name: new_secret() for name in names}
        places = Places()
        try:
            try:
                raise KeyError(planted["context"])
            except KeyError:
                error = ValueError(planted["text"])
                error.add_note(planted["note"])
                error.fact = planted["fact"]  # type: ignore[attr-defined]
                raise error from TypeError(planted["cause"])
        except ValueError as caught:
            places.error(caught)
        assert places.leaks(planted) == {(RAISED, name) for name in names}

    async def test_records_everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        """R92: logs at DEBUG, ours and others', their arguments and tracebacks, and what is printed."""
        planted = {name: new_secret() for name in ("ours", "argument", "traceback", "printed")}
        with recording_places() as places:
            logging.getLogger("tortoise_auth.events").debug("%s", planted["ours"])
            logging.getLogger("tortoise.db_client").debug("%s", planted["argument"])
            try:
                raise ValueError(planted["traceback"])
            except ValueError:
                logging.getLogger("tortoise_auth").exception("failed")
            print(planted["printed"])
        assert places.leaks(planted) == {
            (OURS, "ours"),
            (OTHERS, "argument"),
            (OURS, "traceback"),
            ("output", "printed"),
        }


class TestEverything:
    async def test_no_secret_leaves(self, life: Life, emitter: EventEmitter) -> None:
        """R48, R92, R94, A122, A123: no secret is in our logs, events, results, errors or output.

        Drivers log the values of their statements at DEBUG: hashes are there, and what was
        never stored is not.
        """
        listen(emitter, life.places)
        await every_operation(life)
        texts = life.places.texts
        assert all(texts[place] for place in (OURS, OTHERS, EVENTS, RAISED))
        assert len(life.clear) > 20
        assert len(life.stored) > 10

        leaks = life.places.leaks(life.everything)
        allowed = {(OTHERS, name) for name in life.stored} | {(EVENTS, "typed as identifier")}
        # The host's audit gets what was typed; see `UserLoginFailed`.
        assert leaks - allowed == set()
        assert (EVENTS, "typed as identifier") in leaks
        assert any(place == OTHERS for place, _ in leaks)  # so keep those logs off

    async def test_identifiers_stay_out_of_our_logs(
        self, life: Life, emitter: EventEmitter
    ) -> None:
        """R93, A122: neither addresses nor other typed text is logged, and no text forges a line."""
        listen(emitter, life.places)
        await every_operation(life)
        ours = "\n".join(life.places.texts[OURS])
        assert "nothing works" in ours
        assert EMAIL not in ours
        assert "nobody@example.com" not in ours
        lines = [line for text in life.places.texts[OURS] for line in text.splitlines()]
        assert not [line for line in lines if line.startswith("2026-01-01 CRITICAL")]
        assert "\x1b" not in ours

    async def test_identifier_is_hidden_in_the_text_of_an_event(
        self, life: Life, emitter: EventEmitter
    ) -> None:
        """A122, A123: an event that is logged as a whole does not show what was typed."""
        shown: list[str] = []
        emitter.on("*", lambda event: shown.append(f"{event!r} {event}"), thread=False)
        await every_operation(life)
        assert len(shown) > 20
        text = "\n".join(shown)
        assert not [form for form in forms(life.clear["typed as identifier"]) if form in text]
        assert EMAIL not in text


class TestFaults:
    async def test_of_the_database(self, db: TortoiseContext, life: Life) -> None:
        """R92, R94, A10: whatever values a driver puts into its errors, none of them leaves."""
        auth, password, new = life.auth, life.clear["password"], life.clear["new password"]
        ada = await life.does(lambda: User.create_user(email=EMAIL, password=password))
        first = await life.does(lambda: auth.login(EMAIL, password))
        second = await life.does(lambda: auth.refresh(first.refresh_token))
        other = await life.does(lambda: auth.login(EMAIL, password))
        calls: list[Call] = [
            lambda: User.create_user(email="bob@example.com", password=new),
            lambda: auth.login(EMAIL, password),
            lambda: auth.login(EMAIL, life.clear["wrong"]),
            lambda: auth.authenticate(second.access_token),
            lambda: auth.refresh(second.refresh_token),
            lambda: auth.refresh(first.refresh_token),
            lambda: auth.logout(other.refresh_token),
            lambda: auth.change_password(ada, password, new),
            lambda: auth.set_password(ada, password),
            lambda: ada.set_password(new),
        ]
        values = " ".join(life.everything.values())
        error = OperationalError(ValueError(f"Key (password)=({values}) already exists."))
        for call in calls:
            for number in count(1):
                before = len(life.places.texts[RAISED])
                with statements(db, fail_at=number, error=error) as seen:
                    await life.tries(call)
                if len(seen) < number:
                    break
                assert "ServiceUnavailableError" in life.places.texts[RAISED][before]
            assert number > 1
        leaks = life.places.leaks(life.everything)
        assert leaks - {(OTHERS, name) for name in life.stored} == set()


class TestConfiguration:
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda text: AuthConfig(secret=text[:31]), id="short"),
            pytest.param(lambda text: AuthConfig(secret=text[:8] * 9), id="repeated"),
            pytest.param(lambda text: SigningKey(text, algorithm="EdDSA"), id="no-key"),
            pytest.param(
                lambda text: SigningKey(
                    f"-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----",
                    algorithm="RS256",
                ),
                id="broken-key",
            ),
            pytest.param(lambda text: SigningKey(text, kid=text), id="as-its-own-name"),
            pytest.param(lambda text: AuthConfig(secret=[text]), id="list-of-text"),
            pytest.param(lambda text: AuthService(User, text), id="instead-of-settings"),
            pytest.param(
                lambda text: AuthConfig(secret=text, leeway=timedelta(days=1)), id="other-setting"
            ),
        ],
    )
    def test_refused_keys_are_not_repeated(self, make: Callable[[str], object]) -> None:
        """R92, A70: the error of a refused key does not hold the key, whatever is wrong with it."""
        text, places = secrets.token_urlsafe(48), Places()
        with pytest.raises(ConfigurationError) as refusal:
            make(text)
        places.error(refusal.value)
        # The frames of this test hold it, and belong to the caller.
        parts = {name: text[start : start + 8] for name, start in (("first", 0), ("later", 16))}
        assert places.leaks(parts) == set()
