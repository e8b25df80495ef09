"""The service: what each method does, on every database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from itertools import count
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import pytest
from passlib.hash import bcrypt, django_pbkdf2_sha256, pbkdf2_sha256
from tortoise.context import TortoiseContext
from tortoise.exceptions import BaseORMException, OperationalError
from tortoise.transactions import in_transaction

from tests.support.accounts import (
    EMAIL,
    GARBAGE,
    NEW_PASSWORD,
    PASSWORD,
    SECRET,
    assert_live,
    assert_over,
    log_in,
    signed,
)
from tests.support.app import NamedUser, StrUser, User, UuidUser, store
from tests.support.concurrency import meanwhile
from tests.support.database import connection_of
from tests.support.hashing import argon2_costs, full_cost
from tests.support.rows import changed, columns, row, rows
from tests.support.statements import statements
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    Authenticated,
    AuthenticationError,
    AuthResult,
    AuthService,
    EventEmitter,
    PasswordHasher,
    PasswordPolicy,
    PasswordPolicyError,
    RequestContext,
    Revocation,
)
from tortoise_auth.context import sanitize_text
from tortoise_auth.events import (
    Actor,
    PasswordChanged,
    PasswordChangeFailed,
    UserDeactivated,
    UserLogin,
)
from tortoise_auth.exceptions import (
    ServiceUnavailableError,
    TokenError,
    TokenExpiredError,
    TokenInvalidError,
    TokenReusedError,
    TokenRevokedError,
    TortoiseAuthError,
)
from tortoise_auth.models import Session
from tortoise_auth.passwords import MAX_PASSWORD_LENGTH, unusable_hash
from tortoise_auth.testing import Captured, FakeClock

Host: TypeAlias = tuple[type[AbstractUser], str, dict[str, str]]
"""A user model, the identifier to log in with, and the columns to sign up with."""

HOSTS = [
    pytest.param((User, EMAIL, {"email": EMAIL}), id="int"),
    pytest.param((UuidUser, EMAIL, {"email": EMAIL}), id="uuid"),
    pytest.param((StrUser, EMAIL, {"email": EMAIL, "code": "ada/Löve 1"}), id="str"),
    pytest.param((NamedUser, "Ada", {"email": EMAIL, "username": "Ada"}), id="username"),
]


@pytest.fixture
async def bob(db: TortoiseContext) -> User:
    return await User.create_user(email="bob@example.com", password=PASSWORD)


class TestLifeCycle:
    @pytest.mark.parametrize("host", HOSTS)
    async def test_from_sign_up_to_deactivation(
        self, db: TortoiseContext, host: Host, clock: FakeClock
    ) -> None:
        """Whatever the primary key and the identifier, every method does its work."""
        model, identifier, values = host
        auth = AuthService(model, AuthConfig(secret=SECRET), clock=clock)
        user = await model.create_user(password=PASSWORD, **values)

        first = await auth.login(identifier, PASSWORD)
        assert type(first.user) is model
        assert first.user == user
        assert auth.decode(first.access_token).subject == str(user.pk)
        assert await auth.authenticate(first.access_token) == user

        second = await auth.refresh(first.refresh_token)
        assert second.user == user
        with pytest.raises(TokenReusedError):
            await auth.refresh(first.refresh_token)
        await assert_over(auth, second)

        third = await auth.login(identifier, PASSWORD)
        assert [session.id for session in await auth.sessions(user)] == [third.session.id]
        assert await auth.logout(third.access_token) == Revocation(1, str(user.pk))
        await assert_over(auth, third)

        fourth, fifth = [await auth.login(identifier, PASSWORD) for _ in range(2)]
        await auth.change_password(user, PASSWORD, NEW_PASSWORD, keep=fifth.session)
        await assert_over(auth, fourth)
        await assert_live(auth, fifth)
        assert await user.check_password(NEW_PASSWORD)
        assert await auth.revoke_session(fifth.session.id, user=user) == Revocation(1, str(user.pk))

        sixth = await auth.login(identifier, NEW_PASSWORD)
        assert await auth.logout_all(user) == Revocation(1, str(user.pk))
        await assert_over(auth, sixth)

        seventh = await auth.login(identifier, NEW_PASSWORD)
        assert await auth.deactivate(user) == Revocation(1, str(user.pk))
        await assert_over(auth, seventh)
        await auth.activate(user)
        await assert_over(auth, seventh)
        await assert_live(auth, await auth.login(identifier, NEW_PASSWORD))

        clock.advance(timedelta(days=31))
        assert await auth.purge_expired() == 7
        assert await Session.all().count() == 0


class TestLogin:
    async def test_opens_a_session(
        self, auth: AuthService[User], ada: User, clock: FakeClock, events: Captured
    ) -> None:
        """A login gives the host's own user, two tokens that work, and their true expiry."""
        events.clear()
        result = await log_in(auth)

        assert result.user == ada
        assert await auth.authenticate(result.access_token) == ada
        assert result.access_expires_at == clock() + timedelta(minutes=15)
        assert result.access_expires_at == auth.decode(result.access_token).expires_at
        assert result.refresh_expires_at == clock() + timedelta(days=7)
        assert result.session.expires_at == clock() + timedelta(days=30)
        assert events.names == ["user_login"]

    async def test_event(
        self,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        events: Captured,
        clock: FakeClock,
    ) -> None:
        """A handler receives the user by name, and the event carries the rest."""
        received: list[object] = []

        @emitter.on("user_login")
        async def note(user: User) -> None:
            received.append(user)

        context = RequestContext(ip="203.0.113.7")
        result = await auth.login(EMAIL, PASSWORD, context=context)

        assert received == [ada]
        event = events.one(UserLogin)
        assert event.session_id == str(result.session.id)
        assert event.subject_id == str(ada.pk)
        assert event.occurred_at == clock()
        assert event.context == context

    async def test_each_login_is_a_new_session(self, auth: AuthService[User], ada: User) -> None:
        """Two logins in the same second share neither session nor tokens."""
        first, second = await log_in(auth), await log_in(auth)
        for name in ("access_token", "refresh_token"):
            assert getattr(first, name) != getattr(second, name)
        assert first.session.id != second.session.id

    async def test_tokens_are_not_stored(self, auth: AuthService[User], ada: User) -> None:
        """No column of any row holds a token or the password."""
        result = await log_in(auth)
        stored = repr(await rows(User))
        for secret in (result.access_token, result.refresh_token, PASSWORD):
            assert secret not in stored

    async def test_repr_of_the_result_hides_the_tokens(
        self, auth: AuthService[User], ada: User
    ) -> None:
        """The `repr` of a result holds no token."""
        result = await log_in(auth)
        assert result.access_token not in repr(result)
        assert result.refresh_token not in repr(result)

    async def test_saves_last_login_and_nothing_else(
        self,
        auth: AuthService[User],
        ada: User,
        clock: FakeClock,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A column that another process wrote while the hash was computed keeps its value."""
        before = await row(User, ada.pk)
        meanwhile(
            monkeypatch,
            hasher,
            "verify",
            lambda: User.filter(pk=ada.pk).update(display_name="Countess"),
        )
        result = await log_in(auth)

        changed = {"last_login": clock(), "display_name": "Countess"}
        assert await row(User, ada.pk) == before | changed
        assert result.user.last_login == clock()

    async def test_context_is_stored_and_emitted(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """The session and its event carry the context of the login."""
        context = RequestContext(ip="203.0.113.7", user_agent="Firefox")
        result = await auth.login(EMAIL, PASSWORD, context=context)
        stored = await Session.get(id=result.session.id)
        assert (stored.ip, stored.user_agent) == ("203.0.113.7", "Firefox")

    async def test_extra_claims(self, auth: AuthService[User], ada: User) -> None:
        """Claims of the host are in the token, and a refresh drops them."""
        claims = {"role": "editor", "limits": {"pages": 3}}
        result = await auth.login(EMAIL, PASSWORD, claims=claims)
        assert auth.decode(result.access_token).extra == claims
        refreshed = await auth.refresh(result.refresh_token, claims={"role": "reader"})
        assert auth.decode(refreshed.access_token).extra == {"role": "reader"}
        refreshed = await auth.refresh(refreshed.refresh_token)
        assert auth.decode(refreshed.access_token).extra == {}

    @pytest.mark.parametrize(
        "claims",
        [{name: "x"} for name in ("sub", "sid", "jti", "iss", "aud", "iat", "exp", "nbf")]
        + [{"unwritable": object()}, {"long": "x" * 10_000}],
        ids=lambda claims: next(iter(claims)),
    )
    async def test_refused_claims(
        self, auth: AuthService[User], ada: User, claims: dict[str, object], events: Captured
    ) -> None:
        """A reserved claim, or one that JSON cannot hold, is a ValueError before anything happens."""
        result = await log_in(auth)
        before = await rows(User)
        events.clear()
        with pytest.raises(ValueError, match="claims"):
            await auth.login(EMAIL, PASSWORD, claims=claims)
        with pytest.raises(ValueError, match="claims"):
            await auth.refresh(result.refresh_token, claims=claims)
        assert await rows(User) == before
        assert events.names == []


class TestIdentifier:
    @pytest.mark.parametrize(
        "typed", ["ada@example.com", "  ADA@Example.COM\n", "ada@EXAMPLE.com", "\tAda@example.com"]
    )
    async def test_email_in_any_spelling(
        self, auth: AuthService[User], ada: User, typed: str
    ) -> None:
        """Case and surrounding white space of an e-mail address do not matter."""
        assert (await auth.login(typed, PASSWORD)).user == ada

    async def test_email_in_any_unicode_form(
        self, db: TortoiseContext, auth: AuthService[User]
    ) -> None:
        """A composed address matches its decomposed spelling, in an international domain, too."""
        user = await User.create_user(email="ren\u00e9e@b\u00fccher.example", password=PASSWORD)
        for typed in (
            "rene\u0301e@bu\u0308cher.example",
            "REN\u00c9E@B\u00dcCHER.example",
            "ren\u00e9e@xn--bcher-kva.example",
        ):
            assert (await auth.login(typed, PASSWORD)).user == user

    async def test_similar_addresses_are_different_users(
        self, db: TortoiseContext, auth: AuthService[User]
    ) -> None:
        """Addresses that only a careless comparison equates are different accounts."""
        await User.create_user(email="mike@example.com", password=PASSWORD)
        await User.create_user(email="strasse@example.com", password=PASSWORD)
        for typed in ("m\u0131ke@example.com", "m\u0456ke@example.com", "stra\u00dfe@example.com"):
            with pytest.raises(AuthenticationError):
                await auth.login(typed, PASSWORD)

    async def test_user_name(self, db: TortoiseContext) -> None:
        """A user name matches in any compatible form, and its case matters."""
        auth = AuthService(NamedUser, AuthConfig(secret=SECRET))
        user = await NamedUser.create_user(email=EMAIL, username="Ada", password=PASSWORD)
        for typed in ("Ada", " Ada\n", "\uff21\uff44\uff41"):
            assert (await auth.login(typed, PASSWORD)).user == user
        for typed in ("ada", "ADA", EMAIL):
            with pytest.raises(AuthenticationError):
                await auth.login(typed, PASSWORD)

    @pytest.mark.parametrize(
        "typed", ["a" * 10_000_000, "a" * 400 + "@example.com", "\0", "", " ", "not an address"]
    )
    async def test_invalid_identifier_reads_no_account(
        self, db: TortoiseContext, typed: str
    ) -> None:
        """Text that cannot be an identifier costs one hash, and only the statements that count it."""
        config = AuthConfig(secret=SECRET)
        by_email = AuthService(User, config, throttle=None)
        named = AuthService(NamedUser, config, throttle=None)
        for service in (by_email, named) if typed != "not an address" else (by_email,):
            with statements(db) as seen, pytest.raises(AuthenticationError):
                await service.login(typed, PASSWORD)
            assert seen == []

    async def test_event_holds_a_bounded_identifier(
        self, db: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
    ) -> None:
        """A handler receives at most 320 characters of what was typed, each of which can be stored."""
        received: list[str] = []

        @emitter.on("user_login_failed")
        async def note(*, identifier: str, reason: str) -> None:
            received.append(identifier)

        for typed in ("x\0\ud800" + "y" * 10_000, EMAIL):
            with pytest.raises(AuthenticationError):
                await auth.login(typed, PASSWORD)
        assert received == ["x\ufffd\ufffd" + "y" * 317, EMAIL]


REFUSED: list[Any] = [
    pytest.param("nobody@example.com", PASSWORD, {}, "not_found", id="unknown"),
    pytest.param(EMAIL, "wrong", {}, "bad_password", id="wrong"),
    pytest.param(EMAIL, PASSWORD + " ", {}, "bad_password", id="trailing-space"),
    pytest.param(EMAIL, PASSWORD.upper(), {}, "bad_password", id="other-case"),
    pytest.param(EMAIL, PASSWORD, {"is_active": False}, "inactive", id="inactive"),
    pytest.param(EMAIL, "wrong", {"is_active": False}, "inactive", id="inactive-and-wrong"),
    *(
        pytest.param(EMAIL, password, {"password": stored}, "bad_password", id=name)
        for name, stored, password in [
            ("unusable", unusable_hash(), PASSWORD),
            ("unusable-bare", "!", "!"),
            ("no-hash", "", ""),
            ("null-word", "null", "null"),
            ("none-word", "None", "None"),
            ("plain-text", PASSWORD, PASSWORD),
            ("corrupt-argon2", "$argon2id$v=19$m=8,t=1,p=1$", PASSWORD),
            ("corrupt-salt", "$argon2id$v=19$m=8,t=1,p=1$!$!", PASSWORD),
            ("corrupt-bcrypt", "$2b$12$short", PASSWORD),
            ("corrupt-django", "pbkdf2_sha256$many$salt$hash", PASSWORD),
            ("not-ascii", "h\u00e4sh", PASSWORD),
            ("outdated-bcrypt", bcrypt.using(rounds=4).hash(PASSWORD), "wrong"),
            ("outdated-bcrypt-72", bcrypt.using(rounds=4).hash("x" * 72), "x" * 73),
            ("outdated-pbkdf2", pbkdf2_sha256.using(rounds=1).hash(PASSWORD), "wrong"),
            ("outdated-django", django_pbkdf2_sha256.using(rounds=1).hash(PASSWORD), "wrong"),
        ]
    ),
    *(
        pytest.param(EMAIL, password, {}, "bad_password", id=f"password-{name}")
        for name, password in [
            ("empty", ""),
            ("too-long", "x" * (MAX_PASSWORD_LENGTH + 1)),
            ("huge", "x" * 10_000_000),
            ("nul", PASSWORD + "\0"),
            ("surrogate", PASSWORD + "\ud800"),
            ("none", None),
            ("int", 7),
            ("bool", True),
            ("bytes", PASSWORD.encode()),
            ("list", [PASSWORD]),
        ]
    ),
    *(
        pytest.param(identifier, PASSWORD, {}, "not_found", id=f"identifier-{name}")
        for name, identifier in [
            ("empty", ""),
            ("too-long", "x" * 400 + "@example.com"),
            ("nul", EMAIL + "\0"),
            ("surrogate", "\ud800" + EMAIL),
            ("none", None),
            ("int", 1),
            ("bool", True),
            ("bytes", EMAIL.encode()),
            ("list", [EMAIL]),
            ("dict", {"email": EMAIL}),
        ]
    ),
]


class TestRefusedLogin:
    @pytest.mark.parametrize(("identifier", "password", "stored", "reason"), REFUSED)
    async def test_is_the_same_for_every_reason(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        emitter: EventEmitter,
        identifier: Any,
        password: Any,
        stored: dict[str, object],
        reason: str,
    ) -> None:
        """Every refusal looks alike, costs one full hash, changes nothing and emits its reason once."""
        emitted: list[tuple[str, str]] = []

        @emitter.on("user_login_failed")
        async def note(*, identifier: str, reason: str) -> None:
            emitted.append((identifier, reason))

        if stored:
            if "password" in stored:
                await store(ada, password=str(stored["password"]))
            else:
                await User.filter(pk=ada.pk).update(**stored)
        before = await rows(User)
        with argon2_costs() as costs, pytest.raises(AuthenticationError) as refusal:
            await auth.login(identifier, password)

        error = refusal.value
        assert type(error) is AuthenticationError
        assert (error.args, error.code, vars(error)) == (
            ("Invalid credentials",),
            "invalid_credentials",
            {},
        )
        assert (error.__cause__, error.__context__) == (None, None)
        assert costs == [full_cost(hasher)]
        assert await rows(User) == before
        ((typed, reason_emitted),) = emitted
        assert reason_emitted == reason
        assert typed == (sanitize_text(identifier, 320) if isinstance(identifier, str) else "")

    async def test_same_statements_for_every_account(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, bob: User
    ) -> None:
        """Unknown, inactive and mistyped accounts cost the same statements, with and without a throttle."""
        await User.filter(pk=bob.pk).update(is_active=False)
        uncounted = AuthService(User, AuthConfig(secret=SECRET), throttle=None)
        for service, expected in ((uncounted, 1), (auth, 3), (auth, 3)):
            for identifier in ("nobody@example.com", EMAIL, "bob@example.com"):
                with statements(db) as seen, pytest.raises(AuthenticationError):
                    await service.login(identifier, "wrong")
                assert len(seen) == expected

    async def test_value_that_is_no_hash_is_logged(
        self, auth: AuthService[User], ada: User, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A password stored with `create`, or a hash that was cut off, is logged."""
        for stored, logged in ((PASSWORD, 1), (unusable_hash(), 0), ("$2b$12$short", 1)):
            caplog.clear()
            await store(ada, password=stored)
            with pytest.raises(AuthenticationError):
                await auth.login(EMAIL, PASSWORD)
            assert len(caplog.records) == logged
            assert PASSWORD not in caplog.text
            assert EMAIL not in caplog.text
            assert not logged or f"<User: {ada.pk}>" in caplog.text

    async def test_policy_is_not_asked(
        self, auth: AuthService[User], ada: User, hasher: PasswordHasher
    ) -> None:
        """A password that is older than the policy still logs in."""
        await User.filter(pk=ada.pk).update(password=await hasher.hash("short"))
        assert (await auth.login(EMAIL, "short")).user == ada


class TestLoginOvertaken:
    """What happens to an account between the check of the password and the commit."""

    @pytest.mark.parametrize(
        "change",
        [
            "set_password",
            "model_set_password",
            "deactivate",
            "deactivate_activate",
            "close_by_hand",
            "delete",
        ],
    )
    async def test_is_refused(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
        change: str,
    ) -> None:
        """A login whose account changed while the password was checked opens no session."""
        other = await User.get(pk=ada.pk)

        async def deactivate_activate() -> None:
            await auth.deactivate(other)
            await auth.activate(other)

        changes: dict[str, Callable[[], Awaitable[object]]] = {
            "set_password": lambda: auth.set_password(other, NEW_PASSWORD),
            "model_set_password": lambda: other.set_password(NEW_PASSWORD),
            "deactivate": lambda: auth.deactivate(other),
            "deactivate_activate": deactivate_activate,
            "close_by_hand": lambda: User.filter(pk=ada.pk).update(is_active=False),
            "delete": other.delete,
        }
        meanwhile(monkeypatch, hasher, "verify", changes[change])
        events.clear()
        with pytest.raises(AuthenticationError) as refusal:
            await log_in(auth)

        assert refusal.value.args == ("Invalid credentials",)
        assert await Session.all().count() == 0
        assert await User.filter(last_login__isnull=False).count() == 0
        assert events.names.count("user_login") == 0
        assert events.names[-1] == "user_login_failed"

    async def test_by_a_logout_everywhere_is_a_new_session(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A logout from every session does not refuse a login that commits after it."""
        meanwhile(monkeypatch, hasher, "verify", lambda: auth.logout_all(ada))
        await assert_live(auth, await log_in(auth))


LEGACY = [
    pytest.param(bcrypt.using(rounds=4).hash(PASSWORD), id="bcrypt"),
    pytest.param(pbkdf2_sha256.using(rounds=1000).hash(PASSWORD), id="pbkdf2"),
    pytest.param(django_pbkdf2_sha256.using(rounds=1000).hash(PASSWORD), id="django"),
]


class TestRehash:
    @pytest.mark.parametrize("legacy", LEGACY)
    async def test_at_login(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        events: Captured,
        legacy: str,
    ) -> None:
        """A hash of another scheme is replaced at the first login, once, and no session ends."""
        await User.filter(pk=ada.pk).update(password=legacy)
        events.clear()
        first = await log_in(auth)
        stored = (await row(User, ada.pk))["password"]
        assert str(stored).startswith("$argon2id$")
        assert first.user.password == stored
        second = await log_in(auth)

        assert (await row(User, ada.pk))["password"] == stored
        assert events.names == [
            "user_login",
            "password_rehashed",
            "user_login",
        ] or events.names == [
            "password_rehashed",
            "user_login",
            "user_login",
        ]
        await assert_live(auth, first)
        await assert_live(auth, second)

    async def test_of_another_cost(self, auth: AuthService[User], ada: User) -> None:
        """A hash of an outdated cost is replaced by one of the current cost."""
        owasp = PasswordHasher(memory_cost=19456, time_cost=2, parallelism=1)
        stronger = AuthService(User, auth.config, passwords=owasp)
        await stronger.login(EMAIL, PASSWORD)
        assert "$m=19456,t=2,p=1$" in str((await row(User, ada.pk))["password"])

    async def test_never_replaces_a_newer_password(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
    ) -> None:
        """A password that is set while the old one is rehashed stays, and the login is refused."""
        await User.filter(pk=ada.pk).update(password=pbkdf2_sha256.using(rounds=1).hash(PASSWORD))
        other = await User.get(pk=ada.pk)
        meanwhile(monkeypatch, hasher, "hash", lambda: auth.set_password(other, NEW_PASSWORD))
        with pytest.raises(AuthenticationError):
            await log_in(auth)

        assert "password_rehashed" not in events.names
        assert (await auth.login(EMAIL, NEW_PASSWORD)).user == ada

    async def test_twice_at_the_same_time(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
    ) -> None:
        """Of two logins that both rehash, one replaces the hash, and both succeed."""
        await User.filter(pk=ada.pk).update(password=pbkdf2_sha256.using(rounds=1).hash(PASSWORD))
        inner: list[AuthResult[User]] = []

        async def log_in_too() -> None:
            inner.append(await log_in(auth))

        meanwhile(monkeypatch, hasher, "hash", log_in_too)
        await assert_live(auth, await log_in(auth))
        await assert_live(auth, inner[0])
        assert events.names.count("password_rehashed") == 1
        assert await (await User.get(pk=ada.pk)).check_password(PASSWORD)


class TestAuthenticate:
    async def test_one_statement(
        self, db: TortoiseContext, auth: AuthService[User], ada: User
    ) -> None:
        """Session and user are read together, without a transaction."""
        result = await log_in(auth)
        with statements(db) as seen:
            assert await auth.authenticate(result.access_token) == ada
        assert len(seen) == 1

    async def test_with_session_and_claims(
        self, db: TortoiseContext, auth: AuthService[User], ada: User
    ) -> None:
        """``authenticated`` returns the stored session and the claims, too, in the same statement."""
        context = RequestContext(ip="203.0.113.7")
        result = await auth.login(EMAIL, PASSWORD, context=context, claims={"tenant": "blue"})
        with statements(db) as seen:
            await auth.authenticate(result.access_token)
        with statements(db) as seen_again:
            current = await auth.authenticated(result.access_token)
        assert seen_again == seen
        assert type(current) is Authenticated
        assert current.user == ada
        assert columns(current.session) == columns(await Session.get(id=result.session.id))
        assert current.claims == auth.decode(result.access_token)
        assert current.claims.extra == {"tenant": "blue"}

    async def test_session_of_this_request(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """The session that ``authenticated`` returns is what ``keep`` and ``revoke_session`` take."""
        result, other = await log_in(auth), await log_in(auth)
        current = await auth.authenticated(result.access_token)
        await auth.logout_all(current.user, keep=current.session)
        await assert_over(auth, other)
        assert await auth.revoke_session(current.session) == Revocation(1, str(ada.pk))
        with pytest.raises(TokenRevokedError):
            await auth.authenticated(result.access_token)

    async def test_expired(self, auth: AuthService[User], ada: User, clock: FakeClock) -> None:
        """An access token works until its expiry and the leeway have passed, and no longer."""
        result = await log_in(auth)
        clock.advance(timedelta(minutes=15, seconds=9))
        assert await auth.authenticate(result.access_token) == ada
        clock.advance(timedelta(seconds=1))
        with pytest.raises(TokenExpiredError):
            await auth.authenticate(result.access_token)

    async def test_session_over(self, db: TortoiseContext, ada: User, clock: FakeClock) -> None:
        """The leeway of a token does not outlast its session."""
        lifetime = timedelta(hours=1)
        config = AuthConfig(
            secret=SECRET,
            access_token_lifetime=lifetime,
            refresh_token_lifetime=lifetime,
            session_lifetime=lifetime,
        )
        auth = AuthService(User, config, clock=clock)
        result = await log_in(auth)
        clock.advance(lifetime)
        with pytest.raises(TokenExpiredError):
            await auth.authenticate(result.access_token)

    async def test_deactivated_by_hand(self, auth: AuthService[User], ada: User) -> None:
        """An account that was closed with plain SQL is closed."""
        result = await log_in(auth)
        await User.filter(pk=ada.pk).update(is_active=False)
        await assert_over(auth, result)

    async def test_version_raised_by_hand(self, auth: AuthService[User], ada: User) -> None:
        """Raising session_version ends every session, with plain SQL, too."""
        results = [await log_in(auth) for _ in range(2)]
        await User.filter(pk=ada.pk).update(session_version=ada.session_version + 1)
        for result in results:
            await assert_over(auth, result)

    async def test_deleted_user(self, auth: AuthService[User], ada: User, events: Captured) -> None:
        """A session of a deleted user authenticates nothing, and there is nothing to end."""
        result = await log_in(auth)
        await ada.delete()
        events.clear()
        await assert_over(auth, result)
        for token in (result.access_token, result.refresh_token):
            assert await auth.logout(token) == Revocation(0, None)
        assert await auth.revoke_session(result.session.id) == Revocation(0, None)
        assert events.names == []

    async def test_session_of_another_user(
        self, auth: AuthService[User], ada: User, bob: User, clock: FakeClock
    ) -> None:
        """A genuine signature over the key of one user and the session of another is refused."""
        result = await log_in(auth)
        for subject, session in [
            (str(bob.pk), str(result.session.id)),
            (str(ada.pk), str(uuid4())),
            (str(ada.pk), "1"),
            (f" {ada.pk}", str(result.session.id)),
            ("True", str(result.session.id)),
            ("9" * 30, str(result.session.id)),
            ("nobody", str(result.session.id)),
        ]:
            token = signed(auth, clock, subject, session)
            with pytest.raises(TokenRevokedError):
                await auth.authenticate(token)
            assert await auth.logout(token) == Revocation(0, None)
        assert await auth.authenticate(signed(auth, clock, str(ada.pk), str(result.session.id)))

    async def test_garbage(self, db: TortoiseContext, auth: AuthService[User]) -> None:
        """A value that is no token is refused, at both doors, without a statement."""
        with statements(db) as seen:
            for token in GARBAGE:
                with pytest.raises(TokenInvalidError):
                    await auth.authenticate(token)
                with pytest.raises(TokenInvalidError):
                    await auth.authenticated(token)
                with pytest.raises(TokenInvalidError):
                    await auth.refresh(token)
                with pytest.raises(TokenInvalidError):
                    auth.decode(token)
        assert seen == []

    async def test_each_door_takes_its_own_tokens(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """An access token does not refresh, and a refresh token does not authenticate."""
        result = await log_in(auth)
        events.clear()
        with pytest.raises(TokenInvalidError):
            await auth.authenticate(result.refresh_token)
        with pytest.raises(TokenInvalidError):
            await auth.refresh(result.access_token)
        assert events.names == []
        await assert_live(auth, result)


class TestSetPassword:
    @pytest.mark.parametrize("keep", ["session", "uuid", "str"])
    async def test_ends_the_other_sessions(
        self, auth: AuthService[User], ada: User, bob: User, events: Captured, keep: str
    ) -> None:
        """A new password ends all sessions but the kept one at once, and emits one event."""
        ended, kept = [await log_in(auth) for _ in range(2)], await log_in(auth)
        other = await auth.login("bob@example.com", PASSWORD)
        names: dict[str, Any] = {
            "session": kept.session,
            "uuid": kept.session.id,
            "str": str(kept.session.id),
        }
        await auth.set_password(ada, NEW_PASSWORD, keep=names[keep])

        for result in ended:
            await assert_over(auth, result)
        await assert_live(auth, kept)
        await assert_live(auth, other)
        with pytest.raises(AuthenticationError):
            await log_in(auth)
        assert await auth.login(EMAIL, NEW_PASSWORD)
        event = events.one(PasswordChanged)
        assert (event.user, event.sessions_ended) == (ada, 2)

    async def test_kept_session_of_another_user(
        self, auth: AuthService[User], ada: User, bob: User
    ) -> None:
        """Keeping the session of another user keeps none of one's own, and does not change it."""
        mine, other = await log_in(auth), await auth.login("bob@example.com", PASSWORD)
        before = await row(Session, other.session.id)
        await auth.set_password(ada, NEW_PASSWORD, keep=other.session)
        await assert_over(auth, mine)
        assert await row(Session, other.session.id) == before

    async def test_kept_session_that_is_over(self, auth: AuthService[User], ada: User) -> None:
        """Keeping a session that is over does not revive it."""
        result = await log_in(auth)
        await auth.logout(result.access_token)
        await auth.set_password(ada, NEW_PASSWORD, keep=result.session)
        await assert_over(auth, result)

    async def test_kept_session_of_an_older_password(
        self, auth: AuthService[User], ada: User
    ) -> None:
        """A session that a raised session_version ended is not revived by a new password."""
        result = await log_in(auth)
        await User.filter(pk=ada.pk).update(session_version=5)
        await auth.set_password(ada, NEW_PASSWORD, keep=result.session)
        await assert_over(auth, result)

    async def test_instance_is_up_to_date(self, auth: AuthService[User], ada: User) -> None:
        """The caller's instance equals what is stored, and can be saved and used again."""
        await auth.set_password(ada, NEW_PASSWORD)
        stored = await row(User, ada.pk)
        assert (ada.password, ada.session_version) == (
            stored["password"],
            stored["session_version"],
        )
        await ada.save()
        assert await auth.login(EMAIL, NEW_PASSWORD)

    async def test_stale_instance(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """A stale instance writes back no other column, and reopens no closed account."""
        await User.filter(pk=ada.pk).update(display_name="Countess", is_active=False)
        before = await row(User, ada.pk)
        await auth.set_password(ada, NEW_PASSWORD)
        after = await row(User, ada.pk)
        changed = {name for name in after if after[name] != before[name]}
        assert changed == {"password", "session_version", "updated_at"}
        assert after["updated_at"] == clock()

    async def test_policy(
        self, auth: AuthService[User], ada: User, events: Captured, hasher: PasswordHasher
    ) -> None:
        """A rejected password changes nothing, ends nothing, costs no hash and reports why."""
        result = await log_in(auth)
        before = await rows(User)
        events.clear()
        for refused, code in [
            ("short", "too_short"),
            (EMAIL, "context"),
            ("x" * (MAX_PASSWORD_LENGTH + 1), "too_long"),
        ]:
            with argon2_costs() as costs, pytest.raises(PasswordPolicyError) as refusal:
                await auth.set_password(ada, refused)
            assert [failure.code for failure in refusal.value.failures] == [code]
            assert refused not in str(refusal.value)
            assert costs == []
        assert await rows(User) == before
        assert events.names == []
        await assert_live(auth, result)

    async def test_own_policy(self, db: TortoiseContext, ada: User) -> None:
        """A service may have a policy of its own."""
        auth = AuthService(
            User, AuthConfig(secret=SECRET), policy=PasswordPolicy(context_words=["Tortoise"])
        )
        with pytest.raises(PasswordPolicyError):
            await auth.set_password(ada, "tortoise-tortoise-1")

    async def test_unsaved_user(
        self, db: TortoiseContext, auth: AuthService[User], events: Captured
    ) -> None:
        """An account that is not in the database is a programming error."""
        for user in (User(email=EMAIL), User(id=7, email=EMAIL)):
            with pytest.raises(ValueError, match="save it"):
                await auth.set_password(user, NEW_PASSWORD)
            assert user.password == ""
        assert events.names == []


class TestChangePassword:
    async def test_ends_the_other_sessions(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """The right current password sets the new one, and the kept session stays live."""
        ended, kept = await log_in(auth), await log_in(auth)
        events.clear()
        await auth.change_password(ada, PASSWORD, NEW_PASSWORD, keep=kept.session)
        assert events.names == ["password_changed"]
        await assert_over(auth, ended)
        await assert_live(auth, kept)
        assert await auth.login(EMAIL, NEW_PASSWORD)

    @pytest.mark.parametrize("current", ["wrong", "", None, 7, "x" * 2000, PASSWORD + "\0"])
    async def test_wrong_current_password(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        events: Captured,
        current: Any,
    ) -> None:
        """A wrong current password changes nothing, and costs one hash."""
        result = await log_in(auth)
        before = await rows(User)
        events.clear()
        with argon2_costs() as costs, pytest.raises(AuthenticationError):
            await auth.change_password(ada, current, NEW_PASSWORD)
        assert costs == [full_cost(hasher)]
        assert await rows(User) == before
        assert events.names == ["password_change_failed"]
        await assert_live(auth, result)

    async def test_wrong_current_password_comes_before_the_policy(
        self, auth: AuthService[User], ada: User
    ) -> None:
        """A caller without the current password learns nothing about the new one."""
        with pytest.raises(AuthenticationError):
            await auth.change_password(ada, "wrong", "short")

    async def test_policy(self, auth: AuthService[User], ada: User, events: Captured) -> None:
        """A rejected new password leaves everything as it is."""
        result = await log_in(auth)
        before = await rows(User)
        events.clear()
        with pytest.raises(PasswordPolicyError):
            await auth.change_password(ada, PASSWORD, "short")
        assert await rows(User) == before
        assert events.names == []
        await assert_live(auth, result)

    @pytest.mark.parametrize("change", ["closed", "deleted"])
    async def test_no_such_account(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        events: Captured,
        change: str,
    ) -> None:
        """A closed or deleted account is refused like a wrong password."""
        events.clear()
        if change == "closed":
            await User.filter(pk=ada.pk).update(is_active=False)
        else:
            await User.filter(pk=ada.pk).delete()
        with argon2_costs() as costs, pytest.raises(AuthenticationError):
            await auth.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert costs == [full_cost(hasher)]
        failed = events.one(PasswordChangeFailed)
        assert failed.reason == ("inactive" if change == "closed" else "not_found")
        assert failed.subject_id == str(ada.pk)

    async def test_checks_what_is_stored(self, auth: AuthService[User], ada: User) -> None:
        """The current password is the stored one, not that of a stale instance."""
        stale = await User.get(pk=ada.pk)
        await auth.set_password(ada, NEW_PASSWORD)
        with pytest.raises(AuthenticationError):
            await auth.change_password(stale, PASSWORD, "another donkey charger")
        await auth.change_password(stale, NEW_PASSWORD, "another donkey charger")
        assert await auth.login(EMAIL, "another donkey charger")

    @pytest.mark.parametrize("moment", ["verify", "hash"])
    async def test_changed_meanwhile(
        self,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
        moment: str,
    ) -> None:
        """A password that another caller set while this one was checked stays."""
        other = await User.get(pk=ada.pk)
        meanwhile(monkeypatch, hasher, moment, lambda: other.set_password("another donkey charger"))
        events.clear()
        before = ada.password
        with pytest.raises(AuthenticationError):
            await auth.change_password(ada, PASSWORD, NEW_PASSWORD)
        assert events.names == ["password_changed", "password_change_failed"]
        assert ada.password == before
        assert await auth.login(EMAIL, "another donkey charger")


class TestAccountOfAnotherModel:
    @pytest.mark.parametrize(
        "call",
        [
            lambda auth, user: auth.logout_all(user),
            lambda auth, user: auth.set_password(user, NEW_PASSWORD),
            lambda auth, user: auth.change_password(user, PASSWORD, NEW_PASSWORD),
            lambda auth, user: auth.sessions(user),
            lambda auth, user: auth.revoke_session(str(uuid4()), user=user),
            lambda auth, user: auth.deactivate(user),
            lambda auth, user: auth.activate(user),
        ],
        ids="everywhere set change sessions one deactivate activate".split(),
    )
    @pytest.mark.parametrize("user", ["other model", "key"])
    async def test_is_refused(
        self, auth: AuthService[User], ada: User, events: Captured, call: Any, user: str
    ) -> None:
        """An account of another model is not mistaken for one of this service with the same key."""
        result = await log_in(auth)
        events.clear()
        given = NamedUser(pk=ada.pk) if user == "other model" else ada.pk
        with pytest.raises(TypeError, match=r"^This AuthService serves User, not "):
            await call(auth, given)
        assert events.names == []
        await assert_live(auth, result)


class TestUnsavedAccount:
    async def test_may_do_nothing(self, db: TortoiseContext, auth: AuthService[User]) -> None:
        """An unsaved account is refused, not mistaken for the account whose key is the word None."""
        user = User(email=EMAIL)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: auth.logout_all(user),
            lambda: auth.set_password(user, NEW_PASSWORD),
            lambda: auth.change_password(user, PASSWORD, NEW_PASSWORD),
            lambda: auth.sessions(user),
            lambda: auth.revoke_session(str(uuid4()), user=user),
            lambda: auth.deactivate(user),
            lambda: auth.activate(user),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="not in the database; save it first"):
                await call()


class TestActor:
    """The actor: what an audit needs when an administrator acts for a user."""

    async def test_by_default(self, auth: AuthService[User], ada: User, events: Captured) -> None:
        """The actor is the user by default, and an administrator where an account is closed or opened."""
        assert await self.everything(auth, ada, events) == {
            "session_revoked": "user",
            "user_logout": "user",
            "password_changed": "user",
            "user_deactivated": "admin",
            "user_activated": "admin",
        }

    @pytest.mark.parametrize("actor", ["admin", "system"])
    async def test_named(
        self, auth: AuthService[User], ada: User, events: Captured, actor: Actor
    ) -> None:
        """The event carries the actor that the host names."""
        actors = await self.everything(auth, ada, events, actor=actor)
        assert len(actors) == 5
        assert set(actors.values()) == {actor}

    async def test_unknown_actor(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """An unknown actor is refused before anything is written."""
        result = await log_in(auth)
        events.clear()
        calls: list[Any] = [
            lambda actor: auth.logout_all(ada, actor=actor),
            lambda actor: auth.set_password(ada, NEW_PASSWORD, actor=actor),
            lambda actor: auth.revoke_session(result.session.id, actor=actor),
            lambda actor: auth.revoke_session(result.session.id, user=ada, actor=actor),
            lambda actor: auth.deactivate(ada, actor=actor),
            lambda actor: auth.activate(ada, actor=actor),
        ]
        for call in calls:
            for actor in ("Admin", "", None, ada):
                with pytest.raises(ValueError, match="is none of user, admin, system"):
                    await call(actor)
        assert events.names == []
        await assert_live(auth, result)

    async def everything(
        self, auth: AuthService[User], ada: User, events: Captured, **options: Any
    ) -> dict[str, str]:
        """Do everything that an administrator may do; return the actor of each event."""
        first, _ = await log_in(auth), await log_in(auth)
        events.clear()
        await auth.revoke_session(first.session.id, **options)
        await auth.logout_all(ada, **options)
        await auth.set_password(ada, NEW_PASSWORD, **options)
        await auth.deactivate(ada, **options)
        await auth.activate(ada, **options)
        return {event.name: event.actor for event in events}


class TestDeactivate:
    async def test_ends_everything(
        self, auth: AuthService[User], ada: User, bob: User, events: Captured
    ) -> None:
        """A closed account can do nothing, and opening it again revives no session."""
        results, other = (
            [await log_in(auth) for _ in range(2)],
            await auth.login("bob@example.com", PASSWORD),
        )
        assert await auth.deactivate(ada) == Revocation(2, str(ada.pk))
        assert not ada.is_active
        with pytest.raises(AuthenticationError):
            await log_in(auth)
        for result in results:
            await assert_over(auth, result)
        await auth.activate(ada)
        assert ada.is_active
        for result in results:
            await assert_over(auth, result)
        await assert_live(auth, other)
        await assert_live(auth, await log_in(auth))
        event = events.one(UserDeactivated)
        assert (event.user, event.sessions_ended) == (ada, 2)

    async def test_twice(self, auth: AuthService[User], ada: User, events: Captured) -> None:
        """Closing a closed account and opening an open one change nothing, and emit nothing."""
        events.clear()
        await auth.activate(ada)
        assert events.names == []
        await auth.deactivate(ada)
        before = await rows(User)
        assert await auth.deactivate(ada) == Revocation(0, str(ada.pk))
        assert await rows(User) == before
        await auth.activate(ada)
        before = await rows(User)
        await auth.activate(ada)
        assert await rows(User) == before
        assert events.names == ["user_deactivated", "user_activated"]

    async def test_stale_instance(self, auth: AuthService[User], ada: User) -> None:
        """Closing and opening write only their own columns, whatever the instance holds."""
        await User.filter(pk=ada.pk).update(display_name="Countess")
        before = await row(User, ada.pk)
        await auth.deactivate(ada)
        closed = await row(User, ada.pk)
        assert changed(before, closed) == {"is_active", "session_version", "updated_at"}
        assert ada.session_version == closed["session_version"]
        await auth.activate(ada)
        opened = await row(User, ada.pk)
        assert changed(closed, opened) <= {"is_active", "session_version", "updated_at"}
        assert ada.session_version == opened["session_version"]

    async def test_account_closed_by_a_saved_column(
        self, auth: AuthService[User], ada: User
    ) -> None:
        """Opening an account that the host closed by saving its column revives no session."""
        result = await log_in(auth)
        ada.is_active = False
        await ada.save(update_fields=["is_active"])
        await auth.activate(ada)
        await assert_over(auth, result)
        assert await log_in(auth)

    async def test_deleted_account(
        self, auth: AuthService[User], ada: User, events: Captured
    ) -> None:
        """A deleted account can be neither closed nor opened."""
        await User.filter(pk=ada.pk).delete()
        events.clear()
        assert await auth.deactivate(ada) == Revocation(0, str(ada.pk))
        await auth.activate(ada)
        assert events.names == []


class TestRollback:
    @pytest.mark.parametrize(
        "method", ["login", "refresh", "logout", "set_password", "deactivate", "create_user"]
    )
    async def test_of_the_callers_transaction(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, method: str
    ) -> None:
        """When the caller's transaction is rolled back, the old tokens work and the new ones do not."""
        old = await log_in(auth)
        stored = await rows(User)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "login": lambda: log_in(auth),
            "refresh": lambda: auth.refresh(old.refresh_token),
            "logout": lambda: auth.logout(old.access_token),
            "set_password": lambda: auth.set_password(ada, NEW_PASSWORD),
            "deactivate": lambda: auth.deactivate(ada),
            "service_create_user": lambda: auth.create_user(
                email="eve@example.com", password=PASSWORD
            ),
            "create_user": lambda: User.create_user(email="eve@example.com", password=PASSWORD),
        }
        with pytest.raises(RuntimeError, match="undo"):
            async with in_transaction(connection_of(db).connection_name):
                result = await calls[method]()
                assert await rows(User) != stored
                raise RuntimeError("undo")

        assert await rows(User) == stored
        if isinstance(result, AuthResult):
            with pytest.raises(TokenError):
                await auth.refresh(result.refresh_token)
        else:
            await assert_live(auth, old)


class TestTwoServices:
    @pytest.fixture
    async def pair(
        self, db: TortoiseContext, clock: FakeClock
    ) -> tuple[AuthService[User], AuthService[NamedUser]]:
        """Two models, one secret, and in each an account with the primary key 1."""
        ada = await User.create_user(email=EMAIL, password=PASSWORD)
        named = await NamedUser.create_user(email=EMAIL, username="ada", password=PASSWORD)
        assert ada.pk == named.pk
        config = AuthConfig(secret=SECRET)
        return AuthService(User, config, clock=clock), AuthService(NamedUser, config, clock=clock)

    async def test_tokens_are_refused_by_the_other(
        self, pair: tuple[AuthService[User], AuthService[NamedUser]], events: Captured
    ) -> None:
        """A token authenticates, refreshes and ends nothing of the other model."""
        users, named = pair
        one, two = await users.login(EMAIL, PASSWORD), await named.login("ada", PASSWORD)
        events.clear()
        services: list[tuple[AuthService[Any], AuthResult[Any]]] = [(users, two), (named, one)]
        for service, foreign in services:
            with pytest.raises(TokenInvalidError):
                await service.authenticate(foreign.access_token)
            with pytest.raises(TokenInvalidError):
                await service.refresh(foreign.refresh_token)
            for token in (foreign.access_token, foreign.refresh_token):
                assert await service.logout(token) == Revocation(0, None)
            assert await service.revoke_session(foreign.session.id) == Revocation(0, None)
        assert events.names == []
        await assert_live(users, one)
        await assert_live(named, two)

    async def test_lists_are_their_own(
        self, pair: tuple[AuthService[User], AuthService[NamedUser]]
    ) -> None:
        """Each service lists the sessions of its own model, not those of an equal key in another."""
        users, named = pair
        one, two = await users.login(EMAIL, PASSWORD), await named.login("ada", PASSWORD)
        assert [session.id for session in await users.sessions(one.user)] == [one.session.id]
        assert [session.id for session in await named.sessions(two.user)] == [two.session.id]

    @pytest.mark.parametrize("end", ["logout_all", "set_password", "keep", "model", "deactivate"])
    async def test_ends_touch_their_own_model(
        self, pair: tuple[AuthService[User], AuthService[NamedUser]], end: str
    ) -> None:
        """Ending the sessions of one model leaves those of the other live."""
        users, named = pair
        one, two = await users.login(EMAIL, PASSWORD), await named.login("ada", PASSWORD)
        before = await rows(NamedUser)
        if end == "logout_all":
            await users.logout_all(one.user)
        elif end == "set_password":
            await users.set_password(one.user, NEW_PASSWORD)
        elif end == "keep":
            await users.set_password(one.user, NEW_PASSWORD, keep=two.session)
        elif end == "model":
            await one.user.set_password(NEW_PASSWORD)
        else:
            await users.deactivate(one.user)
        left = [each for each in await rows(NamedUser) if each.get("id") != one.session.id]
        assert left == [each for each in before if each.get("id") != one.session.id]
        with pytest.raises(TokenError):
            await users.authenticate(one.access_token)
        await assert_live(named, two)

    async def test_key_that_fits_no_column_of_the_other(
        self, db: TortoiseContext, auth: AuthService[User], clock: FakeClock
    ) -> None:
        """A primary key that the other model cannot store is refused like any other."""
        strings = AuthService(StrUser, auth.config, clock=clock)
        await StrUser.create_user(email=EMAIL, password=PASSWORD, code="9" * 30)
        result = await strings.login(EMAIL, PASSWORD)
        with pytest.raises(TokenInvalidError):
            await auth.authenticate(result.access_token)
        assert await auth.logout(result.access_token) == Revocation(0, None)
        await assert_live(strings, result)


FAILURES = [
    pytest.param(OperationalError("canary"), id="orm"),
    pytest.param(ConnectionRefusedError("canary"), id="refused"),
    pytest.param(asyncpg.ConnectionDoesNotExistError("canary"), id="driver"),
    pytest.param(TimeoutError("canary"), id="timeout"),
]


class TestDatabaseFailure:
    @pytest.mark.parametrize("error", FAILURES)
    @pytest.mark.parametrize("fail_at", [1, 2, 5])
    async def test_of_any_kind(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        error: Exception,
        fail_at: int,
    ) -> None:
        """Whatever the ORM or the driver raises, the error is the same and hides its message."""
        with statements(db, fail_at=fail_at, error=error):
            with pytest.raises(ServiceUnavailableError) as failure:
                await log_in(auth)
        assert failure.value.code == "service_unavailable"
        assert "canary" not in str(failure.value)
        assert (failure.value.__cause__, failure.value.__context__) == (None, None)
        await assert_live(auth, await log_in(auth))

    @pytest.mark.parametrize(
        "method",
        [
            "login",
            "login_rehash",
            "login_unknown",
            "authenticate",
            "authenticated",
            "refresh",
            "refresh_reused",
            "logout_access",
            "logout_refresh",
            "logout_all",
            "set_password",
            "set_password_keep",
            "change_password",
            "sessions",
            "revoke_session",
            "deactivate",
            "activate",
            "purge_expired",
            "service_create_user",
            "create_user",
            "user_set_password",
            "user_check_password",
        ],
    )
    async def test_at_every_statement(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        bob: User,
        events: Captured,
        method: str,
    ) -> None:
        """Whichever statement fails, nothing changes, nothing is emitted, and no credential is blamed."""
        old = await log_in(auth)
        result = await auth.refresh(old.refresh_token)
        await User.filter(pk=bob.pk).update(is_active=False)
        if method in ("login_rehash", "user_check_password"):
            ada.password = pbkdf2_sha256.using(rounds=1).hash(PASSWORD)
            await ada.save(update_fields=["password"])
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "login": lambda: log_in(auth),
            "login_rehash": lambda: log_in(auth),
            "login_unknown": lambda: auth.login("nobody@example.com", PASSWORD),
            "authenticate": lambda: auth.authenticate(result.access_token),
            "authenticated": lambda: auth.authenticated(result.access_token),
            "refresh": lambda: auth.refresh(result.refresh_token),
            "refresh_reused": lambda: auth.refresh(old.refresh_token),
            "logout_access": lambda: auth.logout(result.access_token),
            "logout_refresh": lambda: auth.logout(result.refresh_token),
            "logout_all": lambda: auth.logout_all(ada),
            "set_password": lambda: auth.set_password(ada, NEW_PASSWORD),
            "set_password_keep": lambda: auth.set_password(ada, NEW_PASSWORD, keep=result.session),
            "change_password": lambda: auth.change_password(ada, PASSWORD, NEW_PASSWORD),
            "sessions": lambda: auth.sessions(ada),
            "revoke_session": lambda: auth.revoke_session(result.session.id),
            "deactivate": lambda: auth.deactivate(ada),
            "activate": lambda: auth.activate(bob),
            "purge_expired": auth.purge_expired,
            "create_user": lambda: User.create_user(email="eve@example.com", password=PASSWORD),
            "user_set_password": lambda: ada.set_password(NEW_PASSWORD),
            "user_check_password": lambda: ada.check_password(PASSWORD),
        }
        stored, objects = await rows(User), [columns(ada), columns(bob)]
        events.clear()
        for number in count(1):
            with statements(db, fail_at=number, error=OperationalError("canary")) as seen:
                raised = await raised_by(calls[method])
            if len(seen) < number:  # every statement has failed once
                break
            assert raised is ServiceUnavailableError
            assert await rows(User) == stored
            assert [columns(ada), columns(bob)] == objects
            # The password was wrong, whether or not that was counted.
            assert set(events.names) <= ({"user_login_failed"} if "unknown" in method else set())
        assert number > 1
        assert raised is {
            "login_unknown": AuthenticationError,
            "refresh_reused": TokenReusedError,
        }.get(method)


async def raised_by(call: Callable[[], Awaitable[object]]) -> type[Exception] | None:
    """Return the class of what *call* raises."""
    try:
        await call()
    except (TortoiseAuthError, BaseORMException) as error:
        return type(error)
    return None
