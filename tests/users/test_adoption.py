"""Adopting a table of users that has rows: what is changed, what is reported, what is left alone."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tortoise.context import TortoiseContext
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, assert_live
from tests.support.app import NamedUser, StrUser, User, UuidUser
from tests.support.concurrency import finished
from tests.support.database import DIALECTS, MODULES, connection_of, database, look
from tests.support.other_users import EitherUser, FormerUser, MappedUser, SharedEmailUser
from tests.support.statements import statements
from tortoise_auth import AbstractUser, AuthConfig, AuthService
from tortoise_auth.clock import utc_now
from tortoise_auth.database import context_outside_transactions
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.exceptions import (
    AuthenticationError,
    ConfigurationError,
    IdentifierTakenError,
    TokenRevokedError,
)
from tortoise_auth.models import Session
from tortoise_auth.passwords import CostCaps, PasswordHasher, unusable_hash
from tortoise_auth.users import adoption
from tortoise_auth.users.adoption import Accounts, Adoption, AdoptionReport, StoredScheme
from tortoise_auth.users.changes import lock_password, replace_values

DJANGO = "pbkdf2_sha256$1$salt$" + "A" * 43 + "="
MD5 = "5f4dcc3b5aa765d61d8327deb882cf99"


@pytest.fixture(params=DIALECTS)
async def others(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """A database with the tables of the other user models, too."""
    modules = [*MODULES, "tests.support.other_users"]
    async with database(request.param, tmp_path, modules=modules) as context:
        yield context


async def row(model: type[AbstractUser], **values: object) -> Any:
    """Insert an account as another program would: no field refuses or normalises a value."""
    number = await model.all().count()
    spare: dict[str, Any] = {"email": f"spare{number}@example.com", "password": ""}
    if model.identifier_field != "email":
        spare[model.identifier_field] = f"spare{number}"
    user = await model.create(**spare, session_version=0)
    if values:
        read: dict[str, object] = {}
        connection = model._meta.db
        await replace_values(model, raw(user), connection, read=read, new=values)
    return user


def raw(user: AbstractUser) -> object:
    """Return the primary key as the driver takes it."""
    return user._meta.pk.to_db_value(user.pk, user)


async def held(model: type[AbstractUser]) -> list[dict[str, Any]]:
    """Return every row, as it is stored."""
    return await model.all().order_by(model._meta.pk_attr).values()


async def adopt(
    model: type[AbstractUser], hasher: PasswordHasher | None = None, **options: Any
) -> AdoptionReport:
    """Run an adoption to its end."""
    work = Adoption(model, hasher or model.password_hasher, **options)
    async for _ in work.run():
        pass
    return work.report


class TestDryRun:
    async def test_changes_nothing(self, others: TortoiseContext) -> None:
        """It counts what it would change, and sends no statement that writes."""
        await row(FormerUser, email=" Ada@Example.COM ", hashed_password=DJANGO)
        before = await held(FormerUser)
        with statements(others) as seen:
            report = await adopt(FormerUser, hash_column="hashed_password")
        assert all(each.startswith(("SELECT", "SHOW")) for each in seen)
        assert await held(FormerUser) == before
        assert (report.applied, report.accounts, report.changes) == (False, 1, 3)

    async def test_counts_what_is_done(self, others: TortoiseContext) -> None:
        """Its numbers are those of the run that writes."""
        await row(FormerUser, email="ADA@example.com", hashed_password=DJANGO)
        await row(FormerUser, email="nonsense", password=MD5)
        await row(FormerUser, email="Bob@example.com")
        await row(FormerUser, email="bob@example.com")
        planned = await adopt(FormerUser, hash_column="hashed_password")
        done = await adopt(FormerUser, hash_column="hashed_password", apply=True)
        done.applied = False
        assert planned == done


class TestIdentifiers:
    @pytest.mark.parametrize(
        "address", ["Ada@Example.com", " ada@example.com\t", "ADA@EXAMPLE.COM"]
    )
    async def test_log_in(self, db: TortoiseContext, address: str) -> None:
        """An address in another spelling is not found at login, and is afterwards."""
        user = await User.create_user(email="spare@example.com", password=PASSWORD)
        await replace_values(User, user.pk, User._meta.db, read={}, new={"email": address})
        auth = AuthService(User, AuthConfig(secret=SECRET))
        report = await adopt(User, apply=True)
        assert report.normalized == {"email": 1}
        assert (await auth.login(EMAIL, PASSWORD)).user == user

    async def test_names(self, db: TortoiseContext) -> None:
        """A user name gets the spelling of a login, and an address of theirs its own."""
        user = await row(NamedUser, username=" \uff21da ", email="Ada@Example.com")
        report = await adopt(NamedUser, apply=True)
        await user.refresh_from_db()
        assert (user.username, user.email) == ("Ada", EMAIL)
        assert report.normalized == {"username": 1, "email": 1}

    async def test_collisions(self, db: TortoiseContext) -> None:
        """Accounts that would become one keep their spelling, all of them, and are named by key."""
        first, second, third = [
            await row(User, email=each) for each in ("Ada@x.org", "ada@x.org", " ada@x.org")
        ]
        other = await row(User, email="Bob@x.org")
        before = await held(User)
        report = await adopt(User, apply=True)
        (group,) = report.colliding["email"]
        assert group == Accounts(3, [str(each.pk) for each in (first, second, third)])
        assert not report.is_settled
        assert [each["email"] for each in await held(User)][:3] == [
            each["email"] for each in before[:3]
        ]
        await other.refresh_from_db()
        assert other.email == "bob@x.org"

    async def test_shared_addresses(self, others: TortoiseContext) -> None:
        """Addresses that need not be unique are normalised, and empty ones are left empty."""
        for address in ("Ada@x.org", "ada@x.org", "", ""):
            await row(SharedEmailUser, email=address)
        report = await adopt(SharedEmailUser, apply=True)
        assert report.is_settled
        assert [each["email"] for each in await held(SharedEmailUser)] == [
            *("ada@x.org", "ada@x.org", "", "")
        ]

    async def test_either_identifier(self, others: TortoiseContext) -> None:
        """Where people log in by name or address, both columns get their spelling."""
        user = await row(EitherUser, username="\uff21da", email="Ada@Example.com")
        report = await adopt(EitherUser, apply=True)
        assert report.normalized == {"username": 1, "email": 1}
        auth = AuthService(EitherUser, AuthConfig(secret=SECRET))
        await auth.set_password(await EitherUser.get(pk=user.pk), PASSWORD)
        for typed in ("Ada", EMAIL):
            assert (await auth.login(typed, PASSWORD)).user == user

    @pytest.mark.parametrize("address", ["", "nonsense", "a b@x.org"])
    async def test_unreadable(self, db: TortoiseContext, address: str) -> None:
        """What is no address is named by key and left alone; the rest of the row is not."""
        user = await row(User, email=address)
        report = await adopt(User, apply=True)
        assert report.unreadable == {"email": Accounts(1, [str(user.pk)])}
        assert not report.is_settled
        await user.refresh_from_db()
        assert user.email == address
        assert user.session_version

    async def test_unreadable_address_of_a_name(self, others: TortoiseContext) -> None:
        """An account that logs in by name is listed, too, if its address is none."""
        user = await row(SharedEmailUser, email="none", username=" ada")
        report = await adopt(SharedEmailUser, apply=True)
        assert report.unreadable == {"email": Accounts(1, [str(user.pk)])}
        await user.refresh_from_db()
        assert (user.username, user.email) == ("ada", "none")

    async def test_no_address_is_shown(self, db: TortoiseContext) -> None:
        """The report holds no address and no hash."""
        for address in ("Zoe@x.org", "zoe@x.org", "nonsense"):
            await row(User, email=address, password=MD5)
        text = repr(await adopt(User)).lower()
        assert "zoe" not in text
        assert "nonsense" not in text
        assert MD5 not in text


class TestHashes:
    async def test_schemes(self, others: TortoiseContext) -> None:
        """Each scheme is counted, with the reason if its passwords do not log in here."""
        hasher = PasswordHasher(caps=CostCaps(pbkdf2_iterations=10))
        dear = DJANGO.replace("$1$", "$11$", 1)
        stored = [DJANGO, DJANGO, dear, MD5, DJANGO[:-1], "", "!", unusable_hash(), "!" + "x" * 40]
        users = [await row(FormerUser, password=each) for each in stored]
        report = await adopt(FormerUser, hasher)
        found = {
            (scheme.name, scheme.obstacle and scheme.obstacle.split()[1]): accounts.keys
            for scheme, accounts in report.hashes.items()
        }
        keys = [str(user.pk) for user in users]
        assert found == {
            ("Django PBKDF2-SHA256", None): keys[:2],
            ("Django PBKDF2-SHA256", "costs"): [keys[2]],
            (None, "is"): [keys[3]],
            ("Django PBKDF2-SHA256", "does"): [keys[4]],
        }
        assert report.without_password == 4
        assert not report.is_settled

    async def test_copied(self, others: TortoiseContext) -> None:
        """A hash in another column is copied where ours is empty, and logs in."""
        hasher = FormerUser.password_hasher
        user = await row(FormerUser, email=EMAIL, hashed_password=await hasher.hash(PASSWORD))
        report = await adopt(FormerUser, hash_column="hashed_password", apply=True)
        assert report.hashes_copied == 1
        auth = AuthService(FormerUser, AuthConfig(secret=SECRET))
        assert (await auth.login(EMAIL, PASSWORD)).user == user

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (DJANGO, DJANGO.replace("salt", "tlas")),
            ("!", DJANGO),
            ("", "a clear text password"),
            ("", MD5),
            ("", "!"),
            ("", ""),
            ("", None),
        ],
    )
    async def test_not_copied(self, others: TortoiseContext, ours: str, theirs: str | None) -> None:
        """A hash of ours is never replaced, and nothing that is no hash is copied."""
        user = await row(FormerUser, password=ours, hashed_password=theirs)
        report = await adopt(FormerUser, hash_column="hashed_password", apply=True)
        await user.refresh_from_db()
        assert user.password == ours
        assert report.hashes_copied == 0

    async def test_column_that_is_not_there(self, others: TortoiseContext) -> None:
        """A name that is no column is refused, also where the database takes it for a text."""
        await row(FormerUser)
        with pytest.raises(ConfigurationError, match=r"no column password_hash\. It has: .*email"):
            await adopt(FormerUser, hash_column="password_hash", apply=True)

    async def test_column_that_is_ours(self, others: TortoiseContext) -> None:
        """The column of `password` itself is refused."""
        with pytest.raises(ConfigurationError, match="is the column password already"):
            await adopt(FormerUser, hash_column="password")


class TestMappedColumns:
    """Columns with the names of another program, which the model maps by ``source_field``."""

    async def test_adopted(self, others: TortoiseContext) -> None:
        """The columns are found by their names in the database, and are reported by them."""
        user = await row(MappedUser, mail="Ada@Example.com", hashed_password=DJANGO)
        report = await adopt(MappedUser, apply=True)
        assert report.normalized == {"mail": 1}
        assert report.versions_set == 1
        assert report.hashes[StoredScheme("Django PBKDF2-SHA256", None)].count == 1
        user = await MappedUser.get(pk=user.pk)
        assert (user.email, user.password) == (EMAIL, DJANGO)

    async def test_service(self, others: TortoiseContext) -> None:
        """Every method of the service works on them."""
        auth = AuthService(MappedUser, AuthConfig(secret=SECRET))
        user = await MappedUser.create_user(email=EMAIL, password=PASSWORD)
        with pytest.raises(IdentifierTakenError):
            await MappedUser.create_user(email="ADA@example.com", password=PASSWORD)
        result = await auth.login(EMAIL, PASSWORD)
        assert (await auth.authenticate(result.access_token)).pk == user.pk
        result = await auth.refresh(result.refresh_token)
        user = await auth.authenticate(result.access_token)
        await auth.change_password(user, PASSWORD, NEW_PASSWORD, keep=result.session)
        assert len(await auth.sessions(user)) == 1
        assert await (await MappedUser.get(pk=user.pk)).check_password(NEW_PASSWORD)
        async with UnitOfWork(connection_of(others), MappedUser.emitter) as unit:
            assert await lock_password(MappedUser, EMAIL, user, unit, at=utc_now())
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, NEW_PASSWORD)
        await auth.unlock(user)
        await auth.deactivate(user)
        with pytest.raises(TokenRevokedError):
            await auth.authenticate(result.access_token)
        await auth.activate(user)
        assert (await auth.login(EMAIL, NEW_PASSWORD)).user.pk == user.pk


class TestSessionVersion:
    async def test_random(self, db: TortoiseContext) -> None:
        """What the database wrote is replaced by a random number; others stay."""
        await row(User)
        await row(User)
        third = await User.create_user(email=EMAIL, password=PASSWORD)
        report = await adopt(User, apply=True)
        versions = [each["session_version"] for each in await held(User)]
        assert len({0, *versions}) == 4
        assert max(versions) < 1 << 30
        assert versions[2] == third.session_version
        assert report.versions_set == 2

    @pytest.mark.parametrize("model", [User, UuidUser, StrUser])
    async def test_of_a_session(self, db: TortoiseContext, model: type[AbstractUser]) -> None:
        """An account with a session keeps its number, so that the session goes on."""
        values = {"code": "ada"} if model is StrUser else {}
        await model.create_user(email=EMAIL, password=PASSWORD, **values)
        await model.all().update(session_version=0)
        auth = AuthService(model, AuthConfig(secret=SECRET))
        result = await auth.login(EMAIL, PASSWORD)
        report = await adopt(model, apply=True)
        assert (report.versions_in_use, report.versions_set) == (1, 0)
        await assert_live(auth, result)


async def log_in(user: User) -> None:
    """Log in, which opens a session."""
    await AuthService(User, AuthConfig(secret=SECRET)).login(EMAIL, PASSWORD)


async def take_the_address(user: User) -> None:
    """Sign up with the address that the account would get."""
    await User.create_user(email="new@example.com", password=PASSWORD)


async def change_the_address(user: User) -> None:
    """Store another address."""
    await User.filter(pk=user.pk).update(email="other@example.com")


async def change_the_password(user: User) -> None:
    """Store another password, which raises ``session_version``."""
    await user.set_password(NEW_PASSWORD)


async def delete(user: User) -> None:
    """Delete the account."""
    await user.delete()


async def another_waits_for(context: TortoiseContext, pid: int) -> None:
    """Wait until a connection waits for a lock of another one."""
    waiting = f"SELECT count(*) FROM pg_stat_activity WHERE {pid} = ANY(pg_blocking_pids(pid))"
    while await look(context, waiting) == [(0,)]:  # noqa: ASYNC110 - the server sets no event
        await asyncio.sleep(0.005)


class TestLastLogin:
    async def test_without_an_offset(self, db: TortoiseContext) -> None:
        """A time as Django stores it is the same moment afterwards, and the password can be locked."""
        user = await User.create_user(email=EMAIL, password=PASSWORD)
        moment = datetime(2024, 5, 6, 7, 8, 9, 123456, UTC)
        is_text = connection_of(db).capabilities.dialect == "sqlite"
        stored = "2024-05-06 07:08:09.123456" if is_text else moment
        await replace_values(User, user.pk, User._meta.db, read={}, new={"last_login": stored})
        report = await adopt(User, apply=True)
        assert report.normalized == ({"last_login": 1} if is_text else {})
        await user.refresh_from_db()
        assert user.last_login == moment
        async with UnitOfWork(connection_of(db), User.emitter) as unit:
            assert await lock_password(User, EMAIL, user, unit, at=moment)
        assert (await adopt(User)).changes == 0


class TestMeanwhile:
    """The application runs: a row that it changes between reading and writing is left alone."""

    @pytest.mark.parametrize(
        ("address", "change"),
        [
            (EMAIL, log_in),
            (EMAIL, change_the_password),
            ("New@example.com", take_the_address),
            ("New@example.com", change_the_address),
            ("New@example.com", delete),
        ],
        ids=lambda each: getattr(each, "__name__", ""),
    )
    async def test_changed(
        self,
        db: TortoiseContext,
        monkeypatch: pytest.MonkeyPatch,
        address: str,
        change: Callable[[User], Awaitable[None]],
    ) -> None:
        """Nothing of the change is overwritten, and the account is reported."""
        user = await User.create_user(email=EMAIL, password=PASSWORD)
        new = {"email": address, "session_version": 0}
        await replace_values(User, user.pk, User._meta.db, read={}, new=new)
        other = await row(User, email="EVE@example.com")
        after: list[list[dict[str, Any]]] = []
        write = Adoption._write

        async def late(self: Adoption, *args: Any) -> None:
            await change(user)
            after.append(await held(User))
            await write(self, *args)

        monkeypatch.setattr(Adoption, "_write", late)
        report = await adopt(User, apply=True)
        now = {each["id"]: each for each in await held(User)}
        eve = now.pop(other.pk)
        assert [now] == [
            {each["id"]: each for each in rows if each["id"] != eve["id"]} for rows in after
        ]
        assert report.changed_meanwhile == Accounts(1, [str(user.pk)])
        assert not report.is_settled
        assert eve["email"] == "eve@example.com"
        assert (report.normalized, report.versions_set) == ({"email": 1}, 1)

    async def test_login_under_way(self, postgres: TortoiseContext) -> None:
        """A login that has not committed yet is waited for, and keeps its session."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        await User.all().update(session_version=0)
        auth = AuthService(User, AuthConfig(secret=SECRET))
        context = context_outside_transactions()
        async with in_transaction() as connection:
            result = await auth.login(EMAIL, PASSWORD)
            ((pid,),) = [
                row.values()
                for row in await connection.execute_query_dict("SELECT pg_backend_pid()")
            ]
            adopting = asyncio.create_task(adopt(User, apply=True), context=context)
            await finished(another_waits_for(postgres, pid))
        report = await finished(adopting)
        assert report.changed_meanwhile.count == 1
        await assert_live(auth, result)

    async def test_stopped(self, db: TortoiseContext, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stopped in between it has done a part, and done again the rest; then nothing is left."""
        monkeypatch.setattr(adoption, "BATCH_SIZE", 2)
        for number in range(5):
            await row(User, email=f"USER{number}@example.com")
        work = Adoption(User, User.password_hasher, apply=True)
        async for report in work.run():
            if report.accounts:
                break
        assert (await adopt(User, apply=True)).normalized == {"email": 3}
        assert (await adopt(User, apply=True)).changes == 0
        assert await User.filter(email__startswith="user").count() == 5


class TestPages:
    @pytest.mark.parametrize("model", [User, UuidUser, StrUser])
    @pytest.mark.parametrize("number", [0, 1, 2, 4, 5])
    async def test_every_row_once(
        self,
        db: TortoiseContext,
        monkeypatch: pytest.MonkeyPatch,
        model: type[AbstractUser],
        number: int,
    ) -> None:
        """Every row is adopted once, whatever its key, and where a batch ends; progress ends at all."""
        monkeypatch.setattr(adoption, "BATCH_SIZE", 2)
        monkeypatch.setattr(adoption, "_ROWS_READ_AT_ONCE", 2)
        for each in range(number):
            values: dict[str, Any] = {"code": f"code{each}"} if model is StrUser else {}
            await model.create(email=f"u{each}@example.com", **values)
            await model.filter(session_version__not=0).update(session_version=0)
        work = Adoption(model, model.password_hasher, apply=True)
        progress = [(each.rows_read, each.rows_total) async for each in work.run()]
        assert progress[-1] == (2 * number, 2 * number)
        assert work.report.accounts == work.report.versions_set == number
        assert (await adopt(model)).changes == 0

    async def test_missing_columns(self, sqlite: TortoiseContext) -> None:
        """Before the migration has run it says which column is missing."""
        await row(User)
        await connection_of(sqlite).execute_script(
            "ALTER TABLE app_user DROP COLUMN session_version"
        )
        with pytest.raises(
            ConfigurationError, match=r"no column session_version.*Make a migration"
        ):
            await adopt(User)


class TestBounds:
    def test_keys(self) -> None:
        """A finding keeps a thousand keys and counts the rest."""
        accounts = Accounts()
        for number in range(adoption.MAX_KEYS + 7):
            accounts.add(str(number))
        assert (accounts.count, len(accounts.keys)) == (1007, 1000)

    def test_spellings(self) -> None:
        """What is seen twice is found in less than ten bytes for each spelling."""
        spellings = adoption._Spellings()
        tracemalloc.start()
        spellings.add_all(f"user{number}@example.com" for number in range(100_000))
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size < 1_000_000
        assert spellings.repeated() == set()
        spellings.add_all(["user7@example.com", None, None])
        assert len(spellings.repeated()) == 1


def test_scheme_is_a_value() -> None:
    """Two hashes of one kind are counted together."""
    assert StoredScheme("bcrypt", None) == StoredScheme("bcrypt", None)


async def test_sessions_elsewhere(db: TortoiseContext) -> None:
    """A session of another model's account with the same key holds nothing up."""
    await NamedUser.create_user(username="ada", email=EMAIL, password=PASSWORD)
    await AuthService(NamedUser, AuthConfig(secret=SECRET)).login("ada", PASSWORD)
    await row(User)
    assert await Session.all().count() == 1
    assert (await adopt(User, apply=True)).versions_set == 1
