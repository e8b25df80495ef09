"""Whatever is passed to a public parameter, only errors of ours are raised, after bounded work."""

from __future__ import annotations

import base64
import ipaddress
import json
import unicodedata
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, assert_live, log_in
from tests.support.app import NamedUser, User
from tests.support.database import DATABASES, database
from tests.support.hashing import Cost, argon2_costs, full_cost
from tests.support.statements import statements
from tortoise_auth import (
    AuthConfig,
    AuthenticationError,
    AuthResult,
    AuthService,
    PasswordHasher,
    PasswordPolicy,
    PasswordPolicyError,
    RequestContext,
    Revocation,
    SigningKey,
)
from tortoise_auth.exceptions import (
    ConfigurationError,
    IdentifierTakenError,
    InvalidIdentifierError,
    TokenError,
)
from tortoise_auth.fields import normalize_email
from tortoise_auth.models import Session
from tortoise_auth.passwords import MAX_PASSWORD_LENGTH
from tortoise_auth.sessions.access_tokens import MAX_TOKEN_LENGTH, AccessTokens
from tortoise_auth.testing import FakeClock

pytestmark = pytest.mark.slow

MEGABYTE = 1_000_000
DAY = timedelta(days=1)

TEXT = st.text(st.characters(), max_size=80)
"""Any characters, including lone surrogates and NUL."""
HUGE = st.sampled_from("x .=\0\ud800é\u0345😀ﷺ").map(lambda unit: unit * MEGABYTE + "!")
NO_TEXT: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**4000),
    st.floats(),
    st.binary(max_size=80),
    st.lists(TEXT, max_size=3),
    st.dictionaries(TEXT, TEXT, max_size=3),
    st.builds(object),
)
ANYTHING: st.SearchStrategy[Any] = TEXT | HUGE | NO_TEXT

_PART = st.builds(
    "{}{}".format,
    st.sampled_from(["", "xn--", "xn--a-"]),
    st.text('aZ0-_.@ éİıßﬁ\u0430\u200b\0\ud800"\\(),:;<>[]😀', max_size=12),
)
ADDRESS = st.one_of(
    st.emails(),
    st.builds("{}@{}.com".format, _PART, _PART),
    st.builds("{}@{}".format, _PART, _PART),
    st.sampled_from([EMAIL, EMAIL.upper(), f" {EMAIL}\t", f"{EMAIL}\0", f"\ufeff{EMAIL}"]),
)

in_the_same_database = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(params=DATABASES)
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Each driver: it has rules of its own for what it takes as text."""
    async with database(request.param, tmp_path) as context:
        yield context


@dataclass
class Work:
    """The cost of a call.

    Attributes:
        hashes: The cost of each password that was hashed or checked.
        sql: Every statement.
    """

    hashes: list[Cost] = field(default_factory=list)
    sql: list[str] = field(default_factory=list)


@contextmanager
def measured(db: TortoiseContext) -> Iterator[Work]:
    """Measure the cost of the block."""
    with argon2_costs() as hashes, statements(db) as sql:
        yield Work(hashes, sql)


async def outcome(call: Coroutine[Any, Any, object], *refusals: type[Exception]) -> object:
    """Return what *call* returns, or the expected error that it raises."""
    try:
        return await call
    except refusals as error:
        assert type(error) in refusals
        return error


def is_text(value: object, most: int) -> bool:
    """Return whether *value* is text of at most *most* characters."""
    return isinstance(value, str) and len(value) <= most


class TestLogin:
    @given(identifier=ADDRESS | ANYTHING, password=st.just(PASSWORD) | ANYTHING)
    @example(identifier=f" {EMAIL.upper()}\t", password=PASSWORD)
    @settings(in_the_same_database, max_examples=150)
    async def test_credentials(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        clock: FakeClock,
        hasher: PasswordHasher,
        identifier: Any,
        password: Any,
    ) -> None:
        """Credentials other than Ada's are refused for one hash; an invalid address is only counted."""
        clock.advance(DAY)
        with measured(db) as work:
            result = await outcome(auth.login(identifier, password), AuthenticationError)
        assert work.hashes == [full_cost(hasher)]
        try:
            known = normalize_email(identifier) == EMAIL
        except InvalidIdentifierError:
            known = False
            assert all("tortoise_auth_attempts" in statement for statement in work.sql)
        assert len(work.sql) < 12
        assert isinstance(result, AuthResult) is (known and password == PASSWORD)

    @given(identifier=ANYTHING)
    @settings(in_the_same_database, max_examples=75)
    async def test_user_name(
        self, db: TortoiseContext, clock: FakeClock, hasher: PasswordHasher, identifier: Any
    ) -> None:
        """A name of any form is refused as unknown, for one hash."""
        auth = AuthService(NamedUser, AuthConfig(secret=SECRET), clock=clock)
        clock.advance(DAY)
        with measured(db) as work, pytest.raises(AuthenticationError):
            await auth.login(identifier, PASSWORD)
        assert work.hashes == [full_cost(hasher)]
        if not is_text(identifier, 120):
            assert all("tortoise_auth_attempts" in statement for statement in work.sql)

    @given(ip=ANYTHING)
    def test_address(self, ip: Any) -> None:
        """Whatever is given for an address is one in its usual spelling, or an error of two kinds."""
        try:
            context = RequestContext(ip=ip)
        except (TypeError, ValueError) as error:
            assert str(error).startswith("RequestContext(ip=...) takes ")
        else:
            assert context.ip is None or str(ipaddress.ip_address(context.ip)) == context.ip

    @given(
        ip=st.none() | st.ip_addresses() | st.ip_addresses().map(str),
        user_agent=ANYTHING,
        request_id=ANYTHING,
    )
    @settings(in_the_same_database, max_examples=100)
    async def test_circumstances(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        clock: FakeClock,
        ip: Any,
        user_agent: Any,
        request_id: Any,
    ) -> None:
        """Any request context is stored in bounded columns, and never refuses a login."""
        clock.advance(DAY)
        context = RequestContext(ip=ip, user_agent=user_agent, request_id=request_id)
        result = await auth.login(EMAIL, PASSWORD, context=context)
        stored = await Session.get(id=result.session.id)
        assert (stored.ip, stored.user_agent) == (context.ip, context.user_agent)
        for value, limit in (
            (context.ip, 64),
            (context.user_agent, 255),
            (context.request_id, 128),
        ):
            assert value is None or is_text(value, limit)

    @given(
        claims=st.dictionaries(TEXT | st.sampled_from(["sub", "exp"]) | HUGE, ANYTHING, max_size=3)
        | st.dictionaries(st.integers() | st.none() | st.binary(), TEXT, min_size=1, max_size=2)
        | ANYTHING.filter(bool)
    )
    @example(claims={"role": "\ud800", "scopes": ["a", 1.5, None, {"x": True}]})
    @settings(in_the_same_database, max_examples=150)
    async def test_claims(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, claims: Any
    ) -> None:
        """Claims are in the token that is issued, or refused before anything happens."""
        with measured(db) as work:
            result = await outcome(auth.login(EMAIL, PASSWORD, claims=claims), ValueError)
        if isinstance(result, ValueError):
            assert (work.hashes, work.sql) == ([], [])
            return
        assert isinstance(result, AuthResult)
        assert len(result.access_token) <= MAX_TOKEN_LENGTH
        said = json.loads(json.dumps(claims))
        assert auth.decode(result.access_token).extra == said
        refreshed = await auth.refresh(result.refresh_token, claims=claims)
        assert auth.decode(refreshed.access_token).extra == said


class TestPasswords:
    @given(password=ANYTHING | st.text(min_size=15, max_size=30))
    @example(password=NEW_PASSWORD)
    @settings(in_the_same_database, max_examples=100)
    @pytest.mark.parametrize("door", ["service", "model"])
    async def test_new(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        hasher: PasswordHasher,
        door: str,
        password: Any,
    ) -> None:
        """A new password is hashed once and set, or rejected unhashed without a statement."""
        call = auth.set_password(ada, password) if door == "service" else ada.set_password(password)
        with measured(db) as work:
            result = await outcome(call, PasswordPolicyError)
        if result is None:
            assert work.hashes == [full_cost(hasher)]
            assert await ada.check_password(password)
        else:
            assert (work.hashes, work.sql) == ([], [])
            assert isinstance(result, PasswordPolicyError)
            assert result.failures

    @given(password=ANYTHING)
    @settings(in_the_same_database, max_examples=100)
    async def test_checked(
        self, db: TortoiseContext, ada: User, hasher: PasswordHasher, password: Any
    ) -> None:
        """Any value other than the password is wrong, for one hash and no statement."""
        with measured(db) as work:
            assert await ada.check_password(password) is False
        assert (work.hashes, work.sql) == ([full_cost(hasher)], [])

    @given(current=st.just(PASSWORD) | ANYTHING, new=st.just(NEW_PASSWORD) | ANYTHING)
    @example(current=PASSWORD, new=NEW_PASSWORD)
    @settings(in_the_same_database, max_examples=100)
    async def test_changed(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        clock: FakeClock,
        hasher: PasswordHasher,
        current: Any,
        new: Any,
    ) -> None:
        """A change costs one check of the current password, and one hash of an accepted new one."""
        clock.advance(DAY)
        before = ada.password
        with measured(db) as work:
            result = await outcome(
                auth.change_password(ada, current, new), AuthenticationError, PasswordPolicyError
            )
        assert isinstance(result, AuthenticationError) is (current != PASSWORD)
        assert work.hashes == [full_cost(hasher)] * (2 if result is None else 1)
        if result is None:
            assert await ada.check_password(new)
            await ada.set_password(PASSWORD)
        else:
            assert ada.password == before

    @given(password=TEXT | HUGE, words=st.lists(TEXT | HUGE | st.just(PASSWORD), max_size=3))
    @settings(max_examples=75)
    def test_policy(self, password: str, words: list[str]) -> None:
        """Whatever the forbidden words are, a password is accepted or rejected with a reason."""
        for proposed in (password, *words, PASSWORD + password):
            try:
                PasswordPolicy(context_words=words).check(proposed, about=words)
            except PasswordPolicyError as refused:
                assert refused.failures
            else:
                normal = unicodedata.normalize("NFC", proposed)
                assert 15 <= len(normal) <= MAX_PASSWORD_LENGTH
                assert proposed not in words


class TestSignUp:
    @given(email=ADDRESS | ANYTHING, password=st.just(PASSWORD) | ANYTHING, name=TEXT | HUGE)
    @example(email=f" {EMAIL.upper()}\t", password=PASSWORD, name="Ada \U0001f422")
    @settings(in_the_same_database, max_examples=150)
    async def test_form(
        self,
        db: TortoiseContext,
        hasher: PasswordHasher,
        email: Any,
        password: Any,
        name: str,
    ) -> None:
        """A form creates the account that it describes or is refused, for one hash either way."""
        with measured(db) as work:
            result = await outcome(
                User.create_user(email=email, password=password, display_name=name),
                InvalidIdentifierError,
                IdentifierTakenError,
                PasswordPolicyError,
                ValueError,
            )
        assert work.hashes in ([], [full_cost(hasher)])
        if isinstance(result, User):
            stored = await User.get(email=email)
            assert (stored.pk, stored.email) == (result.pk, normalize_email(email))
            assert stored.display_name == name
            assert stored.has_usable_password() is (password is not None)
        elif not isinstance(result, IdentifierTakenError) and not is_text(email, 508):
            assert (work.hashes, work.sql) == ([], [])

    @given(name=ANYTHING)
    @settings(in_the_same_database, max_examples=100)
    async def test_user_name(self, db: TortoiseContext, name: Any) -> None:
        """A user name has one spelling that fits its column, or is refused."""
        email = f"{uuid.uuid4().hex}@example.com"
        result = await outcome(
            NamedUser.create_user(username=name, email=email),
            InvalidIdentifierError,
            IdentifierTakenError,
        )
        if isinstance(result, NamedUser):
            assert 0 < len(result.username) <= 30
            assert await NamedUser.get(username=NamedUser.normalize_identifier(name)) == result

    @given(column=TEXT | st.sampled_from(["id", "pk", "display_name", "session_version"]))
    @settings(in_the_same_database, max_examples=50)
    async def test_column(self, db: TortoiseContext, column: str) -> None:
        """A column that does not exist, or controls access, is refused."""
        values: dict[str, Any] = {"email": f"{uuid.uuid4().hex}@example.com", column: "x"}
        result = await outcome(User.create_user(password=PASSWORD, **values), ValueError)
        assert isinstance(result, User) is (column == "display_name")


class TestSessionIds:
    @given(
        session_id=ANYTHING | st.uuids().map(str).map(str.upper) | st.uuids().map("{{{}}}".format)
    )
    @settings(in_the_same_database, max_examples=100)
    async def test_garbage(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, session_id: Any
    ) -> None:
        """A value that is no id ends nothing and costs no statement."""
        with measured(db) as work:
            assert await auth.revoke_session(session_id) == Revocation(0, None)
        assert work.sql == []

    @given(keep=ANYTHING.filter(lambda value: value is not None))
    @settings(in_the_same_database, max_examples=100)
    async def test_to_keep(
        self, db: TortoiseContext, auth: AuthService[User], ada: User, keep: Any
    ) -> None:
        """A value that is no session cannot be kept, and no session ends by mistake."""
        ends: list[Callable[[], Coroutine[Any, Any, object]]] = [
            lambda: auth.logout_all(ada, keep=keep),
            lambda: auth.set_password(ada, NEW_PASSWORD, keep=keep),
            lambda: auth.change_password(ada, PASSWORD, NEW_PASSWORD, keep=keep),
        ]
        for end in ends:
            with pytest.raises(ValueError, match="keep= takes a session or its id"):
                await end()
        assert await ada.check_password(PASSWORD)


class TestConfiguration:
    """A mistake in the configuration is reported at once, not by a login."""

    @given(
        secret=ANYTHING | st.text(min_size=32) | st.binary(min_size=32),
        name=st.sampled_from(["issuer", "audience"]),
        value=ANYTHING,
    )
    @example(secret="x" * 1023 + SECRET * 20_000, name="issuer", value="é" * 127)
    @settings(max_examples=300)
    def test_settings(self, secret: Any, name: str, value: Any) -> None:
        """Settings are refused, or make tokens that are accepted."""
        clock = FakeClock()
        for chosen in ({"secret": secret}, {"secret": SECRET, name: value}):
            try:
                tokens = AccessTokens(AuthConfig(**chosen), clock)
            except ConfigurationError:
                continue
            token, _ = tokens.issue(
                subject="😀" * 255,
                session_id=str(uuid.uuid4()),
                session_ends=clock() + DAY,
                extra={},
            )
            assert tokens.read(token).subject == "😀" * 255

    @given(
        name=st.sampled_from(
            [
                "access_token_lifetime",
                "refresh_token_lifetime",
                "session_lifetime",
                "leeway",
                "refresh_reuse_grace",
            ]
        ),
        value=ANYTHING,
    )
    @settings(max_examples=100)
    def test_durations(self, name: str, value: Any) -> None:
        """A value that is no duration is refused."""
        with pytest.raises(ConfigurationError):
            AuthConfig(secret=SECRET, **{name: value})

    @given(kid=ANYTHING, algorithm=ANYTHING)
    @settings(max_examples=150)
    def test_keys(self, kid: Any, algorithm: Any) -> None:
        """A key id is valid or refused, and an algorithm of a random name is refused."""
        try:
            key = SigningKey(SECRET, kid=kid)
        except ConfigurationError:
            assert kid
        else:
            assert is_text(key.kid, 64)
        with pytest.raises(ConfigurationError):
            SigningKey(SECRET, algorithm=algorithm)
        with pytest.raises(ConfigurationError):
            SigningKey(kid, algorithm="RS256")

    @given(name=st.sampled_from(["min_length", "max_length"]), value=ANYTHING)
    @settings(max_examples=150)
    def test_lengths(self, name: str, value: Any) -> None:
        """A length is a whole number within its bounds, or refused."""
        lengths: dict[str, Any] = {name: value}
        try:
            policy = PasswordPolicy(**lengths)
        except ConfigurationError:
            return
        assert 8 <= policy.min_length <= policy.max_length <= MAX_PASSWORD_LENGTH

    @given(name=st.sampled_from(["context_words", "blocklist"]), value=ANYTHING | st.lists(NO_TEXT))
    @settings(max_examples=150)
    def test_words(self, name: str, value: Any) -> None:
        """Words are a collection, with which passwords can be checked, or refused."""
        words: dict[str, Any] = {name: value}
        try:
            policy = PasswordPolicy(**words)
        except ConfigurationError:
            return
        assert not isinstance(value, str)
        assert policy.failures(PASSWORD) == []


# ---- tokens ---------------------------------------------------------------------------------

CASES = 10_000
"""How many damaged tokens are presented at every door."""

Mutation: TypeAlias = Callable[[str, str], str]
"""Makes a damaged token from a genuine one, perhaps with parts of another."""

PLACE = st.floats(0, 1, exclude_max=True)
PIECE = st.text("ABab01-_", max_size=3) | st.sampled_from(
    [
        "=",
        "==",
        ".",
        "..",
        " ",
        "\n",
        "\0",
        "\ud800",
        "\ufeff",
        "\u200b",
        "é",
        "\uff21",
        "%3D",
        "+",
        "/",
    ]
)
HEADER: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "zip"]),
    st.sampled_from(
        ["none", "None", "HS256", "HS512", "RS256", "JWT", "", None, False, ["exp"], {}]
    ),
    max_size=3,
)


def parts_of(token: str) -> tuple[str, list[str]]:
    """Return the prefix of a token, and its encoded parts."""
    prefix = "tart_" if token.startswith("tart_") else ""
    return prefix, token.removeprefix(prefix).split(".")


def decoded(part: str) -> bytearray:
    """Return the bytes that a part stands for."""
    return bytearray(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def encoded(raw: bytes | bytearray) -> str:
    """Return the part that stands for some bytes."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def spliced(place: float, width: int, piece: str) -> Mutation:
    """Insert a piece, or replace some characters by it."""

    def mutate(token: str, other: str) -> str:
        at = int(place * (len(token) + 1))
        return token[:at] + piece + token[at + width :]

    return mutate


def bit_flipped(part: int, place: float, bit: int) -> Mutation:
    """Flip one bit."""

    def mutate(token: str, other: str) -> str:
        prefix, parts = parts_of(token)
        raw = decoded(parts[part % len(parts)])
        raw[int(place * len(raw))] ^= 1 << bit
        parts[part % len(parts)] = encoded(raw)
        return prefix + ".".join(parts)

    return mutate


def crossed(place: float) -> Mutation:
    """Join the beginning of one token to the end of the other."""

    def mutate(token: str, other: str) -> str:
        return token[: int(place * len(token))] + other[int(place * len(other)) :]

    return mutate


def rearranged(first: int, second: int, third: int) -> Mutation:
    """Take parts of both tokens in another order."""

    def mutate(token: str, other: str) -> str:
        parts = [*parts_of(token)[1], *parts_of(other)[1]]
        chosen = [parts[number % len(parts)] for number in (first, second, third)]
        return parts_of(token)[0] + ".".join(chosen)

    return mutate


def reheaded(header: dict[str, object], unsigned: bool) -> Mutation:
    """Replace the header, and perhaps remove the signature."""

    def mutate(token: str, other: str) -> str:
        prefix, parts = parts_of(token)
        known = json.loads(decoded(parts[0])) if len(parts) == 3 else {}
        parts[0] = encoded(json.dumps({**known, **header}, indent=1).encode())
        return prefix + ".".join([*parts[:2], "" if unsigned else parts[-1]])

    return mutate


REWRITTEN: list[Mutation] = [
    lambda token, other: token.upper(),
    lambda token, other: token.swapcase(),
    lambda token, other: token[::-1],
    lambda token, other: token * 2,
    lambda token, other: token + other,
    lambda token, other: f"{token}.{other}",
    lambda token, other: f"{token} {other}",
    lambda token, other: f"Bearer {token}",
    lambda token, other: json.dumps(token),
    lambda token, other: token.replace(".", "%2E").replace("tart_", "tart%5F"),
    lambda token, other: encoded(token.encode()),
    lambda token, other: token.translate({ord("a"): "\u0430", ord("t"): "\uff54"}),
    lambda token, other: parts_of(token)[0] + parts_of(other)[1][-1] + "=",
    lambda token, other: token + "." * 9000,
]

MUTATION: st.SearchStrategy[Mutation] = st.one_of(
    st.builds(spliced, PLACE, st.integers(0, 3), PIECE),
    st.builds(spliced, PLACE, st.just(MEGABYTE), st.just("")),  # cut off
    st.builds(bit_flipped, st.integers(0, 2), PLACE, st.integers(0, 7)),
    st.builds(crossed, PLACE),
    st.builds(rearranged, *[st.integers(0, 5)] * 3),
    st.builds(reheaded, HEADER, st.booleans()),
    st.sampled_from(REWRITTEN),
)


def at_once(call: Coroutine[Any, Any, object]) -> object:
    """Return what *call* returns without awaiting anything, such as a database."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    call.close()
    raise AssertionError("it waited for something")


def assert_refused_everywhere(auth: AuthService[User], token: Any) -> None:
    """Check that every door refuses the token, and a logout ends nothing."""
    doors: list[Callable[[], object]] = [
        lambda: auth.decode(token),
        lambda: at_once(auth.authenticate(token)),
        lambda: at_once(auth.refresh(token)),
    ]
    for door in doors:
        with pytest.raises(TokenError):
            door()
    try:
        assert at_once(auth.logout(token)) == Revocation(0, None)
    except (TypeError, ValueError) as error:  # what is no token at all
        assert str(error).startswith("logout() takes ")


class TestTokens:
    @given(token=ANYTHING)
    @settings(in_the_same_database, max_examples=200)
    def test_garbage(self, auth: AuthService[User], token: Any) -> None:
        """A value that never was a token is refused without a statement."""
        assert_refused_everywhere(auth, token)

    async def test_mutations(
        self, sqlite: TortoiseContext, auth: AuthService[User], clock: FakeClock
    ) -> None:
        """Ten thousand damaged tokens open nothing, end nothing, and cost no statement."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        sessions = [await log_in(auth), await log_in(auth)]
        genuine = [session.access_token for session in sessions]
        genuine += [session.refresh_token for session in sessions]
        damaged = 0

        @given(mutation=MUTATION)
        @settings(max_examples=CASES * 6 // 5 // len(genuine))
        def present(mutation: Mutation) -> None:
            nonlocal damaged
            for number, token in enumerate(genuine):
                mutated = mutation(token, genuine[number - 1])
                if mutated not in genuine:
                    damaged += 1
                    assert_refused_everywhere(auth, mutated)

        present()
        assert damaged >= CASES
        assert await Session.filter(revoked_at__isnull=False).count() == 0
        for session in sessions:
            await assert_live(auth, session)
