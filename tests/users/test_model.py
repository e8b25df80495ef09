"""What the columns of an account accept, whoever writes them, and what opens it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, log_in
from tests.support.app import NamedUser, User, store
from tests.support.database import (
    DIALECTS,
    MODULES,
    connection_of,
    database,
    on_mariadb,
    root,
)
from tests.support.other_users import Admin, InternalUser, PlainEmailUser, PlainPasswordUser
from tortoise_auth import AuthConfig, AuthenticationError, AuthService
from tortoise_auth.events import EventEmitter
from tortoise_auth.exceptions import (
    ConfigurationError,
    InvalidIdentifierError,
    TokenRevokedError,
)
from tortoise_auth.passwords import unusable_hash
from tortoise_auth.testing import FakeClock

CONFIG = AuthConfig(secret=SECRET)
LEGACY = "pbkdf2_sha256$260000$abcdefgh$" + "A" * 43 + "="


@pytest.fixture(params=DIALECTS)
async def others(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """A database with the tables of the other user models, too."""
    modules = [*MODULES, "tests.support.other_users"]
    async with database(request.param, tmp_path, modules=modules) as context:
        yield context


async def update(user: User, value: str) -> None:
    await User.filter(pk=user.pk).update(password=value)


async def assign(user: User, value: str) -> None:
    user.password = value


async def create(_: User, value: str) -> None:
    await User.create(email="eve@example.com", password=value)


async def get_or_create(_: User, value: str) -> None:
    await User.get_or_create(email="eve@example.com", defaults={"password": value})


async def bulk_create(_: User, value: str) -> None:
    await User.bulk_create([User(email="eve@example.com", password=value)])


async def update_from_dict(user: User, value: str) -> None:
    await user.update_from_dict({"password": value}).save()


class TestPasswordColumn:
    """It holds hashes, and no password by mistake."""

    @pytest.mark.parametrize(
        "write", [update, assign, create, get_or_create, bulk_create, update_from_dict]
    )
    @pytest.mark.parametrize(
        "value", ["clear text", PASSWORD, "$ecret", "x" * 300, "!secret", "!a b"]
    )
    async def test_is_no_hash(
        self, ada: User, write: Callable[[User, str], Awaitable[None]], value: str
    ) -> None:
        """Whatever writes it, the error names what to use and not the value."""
        before = await User.all().values("email", "password")
        with pytest.raises(ValueError, match=r"User\.create_user.* set_password") as error:
            await write(ada, value)
        assert value not in str(error.value)
        assert await User.all().values("email", "password") == before

    @pytest.mark.parametrize("write", [update, assign, create, update_from_dict])
    async def test_is_a_hash(
        self, ada: User, write: Callable[[User, str], Awaitable[None]]
    ) -> None:
        """Hashes of every scheme, unusable ones and none at all are stored: for imports."""
        for hashed in (LEGACY, "$2b$12$" + "." * 53, unusable_hash(), "", ada.password):
            await User.filter(email="eve@example.com").delete()
            await write(ada, hashed)

    async def test_of_another_field_class(self, others: TortoiseContext, clock: FakeClock) -> None:
        """A host's own column refuses clear text as well, and holds what logs in."""
        with pytest.raises(ValueError, match=r"PlainPasswordUser\.create_user"):
            await PlainPasswordUser.create(email=EMAIL, password=PASSWORD)
        user = await PlainPasswordUser.create_user(email=EMAIL, password=PASSWORD)
        with pytest.raises(ValueError, match="set_password"):
            user.password = "clear text"
        auth = AuthService(PlainPasswordUser, CONFIG, clock=clock)
        assert (await auth.login(EMAIL, PASSWORD)).user == user

    async def test_stored_before(self, ada: User) -> None:
        """An account with something else in it can be read and saved, and matches no password."""
        await store(ada, password="clear text")
        stored = await User.get(pk=ada.pk)
        stored.display_name = "Ada L."
        await stored.save()
        assert not await stored.check_password("clear text")
        await stored.set_password(NEW_PASSWORD)
        assert await stored.check_password(NEW_PASSWORD)


class TestDatabaseDefaults:
    """What a migration or another program leaves out is filled by the database."""

    async def test_plain_insert(self, db: TortoiseContext) -> None:
        """A row that names the address alone is an active account without a password."""
        before = datetime.now(UTC)
        await connection_of(db).execute_script(
            f"INSERT INTO app_user (email, display_name) VALUES ('{EMAIL}', '')"
        )
        ada = await User.get(email=EMAIL)
        assert (ada.password, ada.is_active, ada.session_version) == ("", True, 0)
        assert (ada.last_login, ada.password_locked_at) == (None, None)
        for moment in (ada.created_at, ada.updated_at):
            if connection_of(db).capabilities.dialect == "sqlite":
                assert moment == datetime(1970, 1, 1, tzinfo=UTC)
            else:
                assert abs(moment - before) < timedelta(hours=1)

    @pytest.mark.parametrize("write", ["create", "save", "bulk_create", "construct"])
    async def test_the_model_fills_them_itself(self, db: TortoiseContext, write: str) -> None:
        """Whichever way the model writes a row, the values of Python are stored."""
        before = datetime.now(UTC)
        if write == "create":
            await User.create(email=EMAIL)
        elif write == "save":
            await User(email=EMAIL).save()
        elif write == "bulk_create":
            await User.bulk_create([User(email=EMAIL)])
        else:
            await User.construct(email=EMAIL).save()
        ada = await User.get(email=EMAIL)
        assert ada.session_version > 0
        for moment in (ada.created_at, ada.updated_at):
            assert before <= moment <= datetime.now(UTC)

    def test_before_it_is_saved(self) -> None:
        """An object that is not saved yet has no time of its creation."""
        ada = vars(User(email=EMAIL))
        assert (ada["created_at"], ada["updated_at"]) == (None, None)


class TestCheckPassword:
    async def test_forgotten_await(self, ada: User) -> None:
        """Its truth value is an error that says what to write, and lets no one in."""
        for password in (PASSWORD, "wrong"):
            with pytest.raises(TypeError, match=r"if await user\.check_password"):
                if ada.check_password(password):
                    pytest.fail("let in")
            with pytest.raises(TypeError):
                _ = not ada.check_password(password)

    async def test_awaited(self, ada: User) -> None:
        """It can be awaited alone and with others, and repeated."""
        assert await ada.check_password(PASSWORD) is True
        right, wrong = await asyncio.gather(ada.check_password(PASSWORD), ada.check_password("x"))
        assert (right, wrong) == (True, False)
        assert await asyncio.wait_for(ada.check_password(PASSWORD), 60)


class TestReusedKey:
    @pytest.mark.parametrize("how", ["create", "save", "bulk_create", "create_user"])
    async def test_opens_nothing(self, auth: AuthService[User], ada: User, how: str) -> None:
        """Tokens of a deleted account do not open the next one with its primary key."""
        old, key = await log_in(auth), ada.pk
        await ada.delete()
        values: dict[str, Any] = {"id": key, "email": "eve@example.com"}
        if how == "create":
            await User.create(**values)
        elif how == "save":
            await User(**values).save(force_create=True)
        elif how == "bulk_create":
            await User.bulk_create([User(**values)])
        else:
            await User.create_user(**values)
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(old.access_token)
        with pytest.raises(TokenRevokedError):
            await auth.refresh(old.refresh_token)
        assert await auth.sessions(await User.get(pk=key)) == []

    async def test_differs(self, db: TortoiseContext) -> None:
        """Each account begins at another number, with room to count on."""
        first = {User(email=EMAIL).session_version for _ in range(50)}
        assert len(first) > 45
        assert all(0 <= each < 1 << 30 for each in first)


class TestSubclassWithATable:
    """`Admin(User)` has keys of its own: admin 1 is not user 1."""

    async def test_is_another_account(self, others: TortoiseContext, clock: FakeClock) -> None:
        """A service of users does nothing to the user with the key of an admin."""
        user = await User.create_user(email=EMAIL, password=PASSWORD)
        admin = await Admin.create_user(email="root@example.com", password=PASSWORD)
        assert user.pk == admin.pk
        auth = AuthService(User, CONFIG, clock=clock)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: auth.deactivate(admin),
            lambda: auth.activate(admin),
            lambda: auth.unlock(admin),
            lambda: auth.logout_all(admin),
            lambda: auth.sessions(admin),
            lambda: auth.set_password(admin, NEW_PASSWORD),
            lambda: auth.change_password(admin, PASSWORD, NEW_PASSWORD),
        ]
        before = await User.all().values()
        for call in calls:
            with pytest.raises(TypeError, match="serves User, not Admin"):
                await call()
        assert await User.all().values() == before


async def mend_column(context: TortoiseContext) -> None:
    """Run the statement that MariaDB and MySQL need for an address in a plain column."""
    client: Any = root(context)
    if client.capabilities.dialect == "mysql":
        with pytest.raises(ConfigurationError, match="Run: ALTER TABLE") as refusal:
            await PlainEmailUser.create_user(email=EMAIL, password=PASSWORD)
        _, _, statement = str(refusal.value).partition("Run: ")
        await on_mariadb(statement, database=client.database)


class TestPlainEmailColumn:
    async def test_one_spelling(self, others: TortoiseContext, clock: FakeClock) -> None:
        """The address has one spelling at sign-up, at login and when saved, whatever its field class."""
        await mend_column(others)
        auth = AuthService(PlainEmailUser, CONFIG, clock=clock)
        user = await PlainEmailUser.create_user(email="Ada@Example.COM", password=PASSWORD)
        other = PlainEmailUser(email="Eve@Example.COM", password=user.password)
        await other.save()
        await PlainEmailUser.bulk_create(
            [PlainEmailUser(email=" Bob@Example.COM", password=user.password)]
        )
        for typed in ("Ada@Example.COM", "eve@EXAMPLE.com ", "bob@example.com"):
            assert await auth.login(typed, PASSWORD)
        stored = [user.email for user in await PlainEmailUser.all().order_by("email")]
        assert stored == ["ada@example.com", "bob@example.com", "eve@example.com"]


INTERNAL = ["ada@corp.local", "ada@localhost", "ada@app.test", "ada@home.arpa", "ada@intranet"]


class TestInternalDomains:
    @pytest.mark.parametrize("email", INTERNAL)
    async def test_refused(self, db: TortoiseContext, email: str) -> None:
        """By default they are no public addresses; the error says why and how to allow them."""
        with pytest.raises(InvalidIdentifierError, match="internal_domains") as error:
            await User.create_user(email=email, password=PASSWORD)
        assert "ada" not in str(error.value)

    @pytest.mark.parametrize("email", INTERNAL)
    async def test_stored(
        self, db: TortoiseContext, auth: AuthService[User], email: str, emitter: EventEmitter
    ) -> None:
        """An account that has one, from an import, can log in and be saved."""
        user = await User.create_user(email=EMAIL, password=PASSWORD)
        await store(user, email=email)
        result = await auth.login(email.upper(), PASSWORD)
        result.user.display_name = "Ada L."
        await result.user.save()
        assert (await User.get(email=email)).display_name == "Ada L."

    async def test_allowed(self, others: TortoiseContext, clock: FakeClock) -> None:
        """With the setting they are accepted and normalised, the domains below them, too."""
        auth = AuthService(InternalUser, CONFIG, clock=clock)
        for typed, stored in (
            ("Ada@Corp.Local", "ada@corp.local"),
            ("bob@mail.corp.local", "bob@mail.corp.local"),
            ("root@localhost", "root@localhost"),
            ("Eve@Example.com", "eve@example.com"),
        ):
            user = await InternalUser.create_user(email=typed, password=PASSWORD)
            assert user.email == stored
            assert await auth.login(typed.upper(), PASSWORD)
        for refused in ("x@other.local", "x@notcorp.local", "a b@corp.local", "@corp.local"):
            with pytest.raises(InvalidIdentifierError):
                await InternalUser.create_user(email=refused, password=PASSWORD)


class TestUserNames:
    """RFC 8265: no two accounts whose names look alike by what cannot be seen."""

    @pytest.mark.parametrize(
        "name",
        [
            "adm\u200bin",
            "\u202enimda",
            "admin\nroot",
            "\u200b",
            "admin\u00ad",
            "adm\x1bin",
            "admin\ufeff",
            "admin\u2066",
            "ad  min",
            "adm\u00a0\u00a0in",
            "a\u05d0b",
            "admin\U000e0041",
        ],
    )
    async def test_refused(self, db: TortoiseContext, name: str) -> None:
        """Control, format and invisible characters, and mixed directions, make no name."""
        with pytest.raises(InvalidIdentifierError, match="username") as error:
            await NamedUser.create_user(email=EMAIL, username=name, password=PASSWORD)
        assert name not in str(error.value)
        assert await NamedUser.all().count() == 0

    @pytest.mark.parametrize(
        ("typed", "stored"),
        [
            ("ada", "ada"),
            (" Ada Lovelace ", "Ada Lovelace"),
            ("Zoe\u0308", "Zo\u00eb"),
            ("\uff41da", "ada"),
            ("李雷", "李雷"),
            ("дима", "дима"),
            ("דוד", "דוד"),
            ("a.b-c_1+x", "a.b-c_1+x"),
        ],
    )
    async def test_accepted(
        self, db: TortoiseContext, clock: FakeClock, typed: str, stored: str
    ) -> None:
        """Names of every script are, in one spelling, with single spaces between their parts."""
        auth = AuthService(NamedUser, CONFIG, clock=clock)
        user = await NamedUser.create_user(email=EMAIL, username=typed, password=PASSWORD)
        assert user.username == stored
        assert (await auth.login(typed, PASSWORD)).user == user

    async def test_stored(self, db: TortoiseContext, clock: FakeClock) -> None:
        """An account whose name would be refused today can log in and be saved."""
        auth = AuthService(NamedUser, CONFIG, clock=clock)
        user = await NamedUser.create_user(email=EMAIL, username="ada", password=PASSWORD)
        await NamedUser.filter(pk=user.pk).update(username="ada \U0001f422")
        result = await auth.login("ada \U0001f422", PASSWORD)
        await result.user.save()
        with pytest.raises(AuthenticationError):
            await auth.login("ada", PASSWORD)
