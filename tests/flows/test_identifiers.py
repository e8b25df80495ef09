"""``identifier_fields``: people log in by user name or by address, and are one account to everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tortoise import fields
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET
from tests.support.app import NamedUser, store
from tests.support.database import DATABASES, MODULES, database
from tests.support.other_users import EitherUser, LateNameUser
from tests.support.statements import statements
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthenticationError,
    AuthService,
    PasswordPolicyError,
)
from tortoise_auth.events import AccountLocked, LoginThrottled, UserLoginFailed
from tortoise_auth.exceptions import (
    ConfigurationError,
    IdentifierTakenError,
    InvalidIdentifierError,
    ThrottledError,
)
from tortoise_auth.models import AttemptCount
from tortoise_auth.testing import Captured, FakeClock
from tortoise_auth.throttling import Backoff, DatabaseThrottle

CONFIG = AuthConfig(secret=SECRET)
OWN_PASSWORD = "another donkey charger"


@pytest.fixture(params=DATABASES)
async def others(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """A database with the tables of the other user models, too."""
    modules = [*MODULES, "tests.support.other_users"]
    async with database(request.param, tmp_path, modules=modules) as context:
        yield context


@pytest.fixture
def either(clock: FakeClock) -> AuthService[EitherUser]:
    """A service to which user name and address are the same."""
    return AuthService(EitherUser, CONFIG, clock=clock)


@pytest.fixture
async def ada(others: TortoiseContext, either: AuthService[EitherUser]) -> EitherUser:
    return await either.create_user(username="Ada", email=EMAIL, password=PASSWORD)


async def refused(auth: AuthService[Any], identifier: str, password: str = "wrong") -> None:
    """Try a password that is refused."""
    with pytest.raises(AuthenticationError):
        await auth.login(identifier, password)


class TestLogin:
    @pytest.mark.parametrize("typed", ["Ada", " \uff21da\t", EMAIL, "  ADA@Example.COM\n"])
    async def test_by_either(
        self, ada: EitherUser, either: AuthService[EitherUser], typed: str
    ) -> None:
        """The name and the address open the same account, in each spelling of either column."""
        assert (await either.login(typed, PASSWORD)).user == ada

    @pytest.mark.parametrize("typed", ["ada", "ADA", "ada@example.org", "Ada@", "@", "", "\0"])
    async def test_by_neither(
        self, ada: EitherUser, either: AuthService[EitherUser], typed: str
    ) -> None:
        """The case of a name counts, as it does where the name is the only identifier."""
        await refused(either, typed, PASSWORD)

    @pytest.mark.parametrize(("known", "unknown"), [("Ada", "Eve"), (EMAIL, "eve@example.com")])
    async def test_same_statements(
        self,
        others: TortoiseContext,
        ada: EitherUser,
        either: AuthService[EitherUser],
        known: str,
        unknown: str,
    ) -> None:
        """An account that exists costs the statements of one that does not, and the look-up is one."""
        await refused(either, known)  # the first statements of a connection also check its settings
        await AttemptCount.all().delete()
        with statements(others) as of_known:
            await refused(either, known)
        with statements(others) as of_unknown:
            await refused(either, unknown)
        assert of_known == of_unknown
        assert len({each for each in of_known if "app_either_user" in each}) == 1


class TestLookalike:
    @pytest.mark.parametrize("name", ["eve@example.com", "@ve", "eve\uff20example.com", "e@"])
    async def test_is_refused_at_creation(
        self, others: TortoiseContext, either: AuthService[EitherUser], name: str
    ) -> None:
        """A name that looks like an address is no name where people log in by either."""
        for create in (either.create_user, EitherUser.create_user):
            with pytest.raises(InvalidIdentifierError, match="username: it looks like an e-mail"):
                await create(username=name, email="mallory@example.com", password=PASSWORD)
        assert not await EitherUser.exists()

    async def test_is_a_name_elsewhere(self, others: TortoiseContext) -> None:
        """Where the name alone is the identifier, it may be an address."""
        user = await NamedUser.create_user(username="ada@example.com", email="a@example.org")
        assert user.username == "ada@example.com"

    async def test_of_before_takes_no_login(
        self, ada: EitherUser, either: AuthService[EitherUser]
    ) -> None:
        """Whose address it is gets in by it, and not the account of a former program with that name."""
        mallory = await either.create_user(
            username="mallory", email="mallory@example.com", password=OWN_PASSWORD
        )
        await store(mallory, username=EMAIL)
        assert (await either.login(EMAIL, PASSWORD)).user == ada
        await refused(either, EMAIL, OWN_PASSWORD)
        assert (await either.login("mallory@example.com", OWN_PASSWORD)).user == mallory

    async def test_of_before_logs_in(
        self, ada: EitherUser, either: AuthService[EitherUser]
    ) -> None:
        """An account of a former program whose name is no other account's address keeps its name."""
        await store(ada, username="ada@home")
        assert (await either.login("ada@home", PASSWORD)).user == ada


class TestOneAccount:
    async def test_one_counter(self, ada: EitherUser, clock: FakeClock, events: Captured) -> None:
        """Failures by name and by address add up, whichever is typed, and a login resets them all."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=4), clock=clock)
        auth = AuthService(EitherUser, CONFIG, throttle=throttle, clock=clock)
        for typed in ("Ada", EMAIL, "\uff21da"):
            await refused(auth, typed)
        assert [each.failures for each in await AttemptCount.all()] == [3]
        await auth.login(EMAIL, PASSWORD)
        for typed in ("Ada", EMAIL, "Ada", EMAIL):
            await refused(auth, typed)
        for typed in ("Ada", EMAIL):
            with pytest.raises(ThrottledError):
                await auth.login(typed, PASSWORD)
        assert len(events.of(LoginThrottled)) == 2
        assert {event.user_id for event in events.of(UserLoginFailed)} == {str(ada.pk)}

    @pytest.mark.parametrize("typed", ["Ada", EMAIL])
    async def test_one_lock(
        self,
        ada: EitherUser,
        either: AuthService[EitherUser],
        events: Captured,
        typed: str,
    ) -> None:
        """A failure too many by either locks the account for both."""
        await refused(either, typed)
        await AttemptCount.all().update(failures=99, count=0)
        await refused(either, typed)
        assert events.one(AccountLocked).subject_id == str(ada.pk)
        for each in ("Ada", EMAIL):
            await AttemptCount.all().delete()
            await refused(either, each, PASSWORD)
        await either.unlock(ada)
        assert (await either.login(typed, PASSWORD)).user == ada

    @pytest.mark.parametrize("values", [{"email": "eve@example.com"}, {"username": "Eve"}])
    async def test_taken(
        self, ada: EitherUser, either: AuthService[EitherUser], values: dict[str, str]
    ) -> None:
        """A name or an address of another account is taken, and the error does not say which."""
        values = {"username": "Ada", "email": EMAIL, **values}
        with pytest.raises(IdentifierTakenError):
            await either.create_user(password=PASSWORD, **values)  # type: ignore[arg-type]

    async def test_password_of_neither(
        self, others: TortoiseContext, either: AuthService[EitherUser]
    ) -> None:
        """Neither the name nor the address of the account is a password for it."""
        name, email = "long-name-of-ada", "ada.lovelace@example.com"
        for password in (name, email):
            with pytest.raises(PasswordPolicyError, match="your own name or address"):
                await either.create_user(username=name, email=email, password=password)


class TestLateName:
    async def test_is_chosen_later(self, others: TortoiseContext, clock: FakeClock) -> None:
        """An account without a name logs in by its address, and by its name once it has one."""
        auth = AuthService(LateNameUser, CONFIG, clock=clock)
        user = await auth.create_user(email=EMAIL, password=PASSWORD)
        assert user.username is None
        assert (await auth.login(EMAIL, PASSWORD)).user == user
        user.username = "Ada"
        await user.save(update_fields=["username"])
        assert (await auth.login("Ada", PASSWORD)).user == user

    async def test_first_identifier_is_required(self, others: TortoiseContext) -> None:
        """An account has at least the first of its identifiers."""
        with pytest.raises(InvalidIdentifierError):
            await LateNameUser.create_user(username="Ada", password=PASSWORD)

    async def test_missing_name_locks_no_other(
        self, others: TortoiseContext, either: AuthService[EitherUser]
    ) -> None:
        """A lock finds its account by what it has, and none that lacks the same."""
        auth = AuthService(LateNameUser, CONFIG)
        ada = await auth.create_user(email=EMAIL)
        bob = await auth.create_user(email="bob@example.com")
        await LateNameUser.all().update(password="")
        await refused(auth, EMAIL)
        await AttemptCount.all().update(failures=99, count=0)
        await refused(auth, EMAIL)
        locked = await LateNameUser.filter(password_locked_at__not_isnull=True)
        assert locked == [ada]
        assert bob not in locked

    async def test_throttled_change(
        self, others: TortoiseContext, clock: FakeClock, events: Captured
    ) -> None:
        """An account without a name is named by its address where a change is throttled."""
        throttle = DatabaseThrottle(account=Backoff(free_attempts=1), clock=clock)
        auth = AuthService(LateNameUser, CONFIG, throttle=throttle, clock=clock)
        user = await auth.create_user(email=EMAIL, password=PASSWORD)
        with pytest.raises(AuthenticationError):
            await auth.change_password(user, "wrong", NEW_PASSWORD)
        with pytest.raises(ThrottledError):
            await auth.change_password(user, "wrong", NEW_PASSWORD)
        assert events.one(LoginThrottled).identifier == EMAIL


class TestDeclared:
    def test_first_is_the_identifier(self) -> None:
        """``identifier_field`` follows ``identifier_fields``, and the other way round."""
        assert EitherUser.identifier_field == "username"
        assert LateNameUser.identifier_field == "email"
        assert NamedUser.identifier_fields == ("username",)
        assert AbstractUser.identifier_fields == ("email",)

    def test_nearest_class_decides(self) -> None:
        """A subclass, or a mixin before the model, replaces what the model says."""

        class ByName:
            identifier_field = "username"

        class Mixed(ByName, EitherUser):
            class Meta(AbstractUser.Meta):
                abstract = True

        class ByAddress(EitherUser):
            identifier_field = "email"

            class Meta(AbstractUser.Meta):
                abstract = True

        assert [*Mixed.identifier_fields] == ["username"]
        assert [*ByAddress.identifier_fields] == ["email"]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ("username", "as a tuple"),
            ((), "as a tuple"),
            (7, "as a tuple"),
            (("username", "username"), "each once"),
            (("username", "nickname"), "identifier_fields has 'nickname'; the model needs such"),
            (("username", "display_name"), "identifier_fields has 'display_name'.*unique=True"),
            (("id", "email"), "identifier_fields has 'id'; the model needs such"),
        ],
    )
    def test_refused_by_the_service(self, names: Any, message: str) -> None:
        """Each column must exist, be text and be unique; the text names the one that is not."""

        class Wrong(AbstractUser):
            identifier_fields = names
            username = fields.CharField(max_length=30, unique=True)
            display_name = fields.CharField(max_length=30, default="")

            class Meta(AbstractUser.Meta):
                table = "app_wrong_identifiers"
                abstract = False

        with pytest.raises(ConfigurationError, match=message):
            AuthService(Wrong, CONFIG)

    def test_both_disagree(self) -> None:
        """A class that names both must put the one first among the others."""

        class Wrong(AbstractUser):
            identifier_field = "email"
            identifier_fields = ("username", "email")
            username = fields.CharField(max_length=30, unique=True)

            class Meta(AbstractUser.Meta):
                table = "app_wrong_identifiers"
                abstract = False

        with pytest.raises(ConfigurationError, match="Name one of the two"):
            AuthService(Wrong, CONFIG)
