"""MariaDB and MySQL: what they must be set to, and what a deadlock leaves behind."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncmy
import pytest
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.context import TortoiseContext
from tortoise.exceptions import IntegrityError, OperationalError, TransactionManagementError
from tortoise.transactions import in_transaction

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import AuditRow, NamedUser, User
from tests.support.concurrency import finished
from tests.support.database import MODULES, connection_of, database, on_mariadb, place
from tests.support.other_users import PlainNamedUser
from tests.support.services import needs_mariadb
from tortoise_auth import (
    AuthConfig,
    AuthenticationError,
    AuthService,
    ConfigurationError,
    EventEmitter,
)
from tortoise_auth.database import (
    connection_for,
    context_outside_transactions,
    is_unique_violation,
    on_commit,
    transaction,
)
from tortoise_auth.database.dialects.mysql_settings import Requirements, _refuse_old
from tortoise_auth.events import UserLogin
from tortoise_auth.exceptions import IdentifierTakenError
from tortoise_auth.models import Session
from tortoise_auth.testing import FakeClock

pytestmark = needs_mariadb

READ_COMMITTED = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"


@pytest.fixture
async def maria(tmp_path: Path) -> AsyncIterator[BaseDBAsyncClient]:
    """MariaDB, prepared as Tortoise starts."""
    async with database("mariadb", tmp_path) as context:
        yield connection_of(context)


@pytest.fixture
def own(clock: FakeClock) -> AuthService[User]:
    return AuthService(User, AuthConfig(secret=SECRET), clock=clock)


async def deadlock(first: Callable[[], Awaitable[object]], client: BaseDBAsyncClient) -> None:
    """Let *first*, in a transaction that holds row 1 and waits for row 2, be the victim of a deadlock."""
    holds_two, second_waits = asyncio.Event(), asyncio.Event()

    async def other() -> None:
        async with in_transaction(client.connection_name) as connection:
            # The server rolls back the one that has written less.
            for number in range(20):
                await AuditRow.create(event=f"weight {number}", using_db=connection)
            await AuditRow.filter(id=2).using_db(connection).update(subject="other")
            holds_two.set()
            await second_waits.wait()
            await AuditRow.filter(id=1).using_db(connection).update(subject="other")

    async def victim() -> None:
        await holds_two.wait()
        await first()

    running = asyncio.create_task(other())
    victims = asyncio.create_task(victim())
    await holds_two.wait()
    async with asyncio.timeout(20):
        while not victims.done() and not await _waits(client):  # noqa: ASYNC110 - it sets no event
            await asyncio.sleep(0.15)  # the table stays as it is while it is read more often
    second_waits.set()
    await finished(running)
    await finished(victims)


async def _waits(client: BaseDBAsyncClient) -> bool:
    own: Any = client
    rows = await on_mariadb(
        "SELECT COUNT(*) FROM information_schema.innodb_trx JOIN information_schema.processlist "
        "ON id = trx_mysql_thread_id WHERE trx_state = 'LOCK WAIT' AND db = DATABASE()",
        database=own.database,
    )
    return bool(rows[0][0])


class TestDeadlock:
    @pytest.mark.parametrize("nested", [False, True])
    async def test_caught_in_a_transaction_of_the_host(
        self, maria: BaseDBAsyncClient, nested: bool
    ) -> None:
        """The server rolls back everything: whoever goes on writes nothing, and cannot commit."""
        for number in (1, 2):
            await AuditRow.create(id=number, event="row")
        errors: list[str] = []
        followed: list[str] = []

        async def victim() -> None:
            with pytest.raises(OperationalError, match="A deadlock has rolled back"):
                async with in_transaction("mariadb") as connection:
                    await on_commit(connection, lambda: followed.append("x"))
                    await AuditRow.filter(id=1).using_db(connection).update(subject="victim")
                    with suppress(OperationalError):
                        if nested:
                            async with in_transaction("mariadb") as inner:
                                await AuditRow.filter(id=2).using_db(inner).update(subject="v")
                        else:
                            await AuditRow.filter(id=2).using_db(connection).update(subject="v")
                    try:
                        await AuditRow.create(event="after", using_db=connection)
                    except TransactionManagementError as error:
                        errors.append(str(error))

        await deadlock(victim, maria)
        assert errors == ["A deadlock has rolled back this transaction"]
        assert followed == []
        assert {row.subject for row in await AuditRow.filter(id__in=[1, 2])} == {"other"}
        assert not await AuditRow.filter(event="after").exists()

    async def test_caught_around_a_unit_of_ours(self, maria: BaseDBAsyncClient) -> None:
        """A login in a transaction that a deadlock has ended is an error, and emits nothing."""
        user = await User.create_user(email="ada@example.com", password=PASSWORD)
        emitter = EventEmitter()
        emitted: list[UserLogin[User]] = []
        emitter.on(UserLogin)(emitted.append)
        auth = AuthService(User, AuthConfig(secret=SECRET), emitter=emitter)
        for number in (1, 2):
            await AuditRow.create(id=number, event="row")

        async def victim() -> None:
            with suppress(OperationalError):
                async with in_transaction("mariadb"):
                    await AuditRow.filter(id=1).update(subject="victim")
                    with suppress(OperationalError):
                        await AuditRow.filter(id=2).update(subject="victim")
                    with pytest.raises(Exception, match=r"deadlock|database failed"):
                        await auth.login("ada@example.com", PASSWORD)

        await deadlock(victim, maria)
        assert emitted == []
        assert not await Session.all().exists()
        await user.refresh_from_db()
        assert user.last_login is None

    async def test_wait_in_vain(self, maria: BaseDBAsyncClient) -> None:
        """A lock that is not had in time fails its statement alone, unless the server is set otherwise."""
        await AuditRow.create(id=1, event="row")
        for ends_all in (False, True):
            Requirements.of(maria).timeout_ends_transaction = ends_all
            async with in_transaction("mariadb") as holder:
                await AuditRow.filter(id=1).using_db(holder).update(subject="held")
                await asyncio.get_running_loop().create_task(
                    self._wait_in_vain(ends_all), context=context_outside_transactions()
                )

    async def _wait_in_vain(self, ends_all: bool) -> None:
        async with in_transaction("mariadb") as connection:
            await connection.execute_script("SET SESSION innodb_lock_wait_timeout = 1")
            with pytest.raises(OperationalError, match="1205"):
                await AuditRow.filter(id=1).using_db(connection).update(subject="vain")
            try:
                await AuditRow.filter(id=1).using_db(connection).first()
                assert not ends_all
            except TransactionManagementError:
                assert ends_all
            await connection.rollback()


async def start(context: TortoiseContext, credentials: dict[str, Any]) -> None:
    connections = {
        "mariadb": {"engine": "tortoise.backends.mysql", "credentials": credentials},
    }
    apps = {"models": {"models": MODULES, "default_connection": "mariadb"}}
    await context.init(config={"connections": connections, "apps": apps})


@pytest.fixture
async def credentials(tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    """What Tortoise needs to connect to an empty database."""
    async with place("mariadb", tmp_path) as url:
        user, host, port, name = re.findall(r"//(.+?)@(.+?):(\d+)/(\w+)", url)[0]
        yield {"user": user, "password": "", "host": host, "port": int(port), "database": name}


class TestSettings:
    async def test_set_for_the_host(self, credentials: dict[str, Any]) -> None:
        """Row counts and isolation are set before the first connection; other flags stay."""
        async with TortoiseContext() as context:
            await start(context, {**credentials, "client_flag": "128"})
            await context.generate_schemas()
            client: Any = connection_of(context)
            assert client._template["client_flag"] == 128 | 2
            await AuditRow.create(id=1, event="same")
            assert await AuditRow.filter(id=1).update(event="same") == 1
            rows = await client.execute_query_dict("SELECT @@tx_isolation AS level")
            assert rows == [{"level": "READ-COMMITTED"}]

    async def test_connected_too_early(
        self, credentials: dict[str, Any], own: AuthService[User]
    ) -> None:
        """A client that was connected before anything was set is refused, with the setting."""
        async with TortoiseContext() as context:
            await start(context, credentials)
            client: Any = connection_of(context)
            client.extra.pop("client_flag")
            await context.generate_schemas()
            with pytest.raises(ConfigurationError, match='"client_flag": 2, "init_command"'):
                await own.login("ada@example.com", PASSWORD)

    async def test_isolation_of_the_host(
        self, credentials: dict[str, Any], own: AuthService[User]
    ) -> None:
        """A command of the host at the beginning of a connection stays, and must set the isolation, too."""
        for command, fits in (("SET NAMES utf8mb4", False), (READ_COMMITTED, True)):
            async with TortoiseContext() as context:
                await start(context, {**credentials, "init_command": command})
                if not fits:  # the first of the two
                    await context.generate_schemas()
                with pytest.raises(
                    AuthenticationError if fits else ConfigurationError,
                    match="Invalid credentials" if fits else "must be READ COMMITTED",
                ):
                    await own.login("ada@example.com", PASSWORD)

    async def test_in_a_transaction_of_the_host(
        self, credentials: dict[str, Any], own: AuthService[User]
    ) -> None:
        """The first use may be in a transaction, and is refused there as well."""
        async with TortoiseContext() as context:
            await start(context, {**credentials, "init_command": "SET NAMES utf8mb4"})
            await context.generate_schemas()
            with pytest.raises(ConfigurationError, match="must be READ COMMITTED"):
                async with in_transaction("mariadb"):
                    await own.login("ada@example.com", PASSWORD)

    @pytest.mark.parametrize(
        ("version", "fits"),
        [
            ("10.5.29-MariaDB-1:10.5.29+maria~ubu2004", False),
            ("10.6.0-MariaDB", True),
            ("11.8.3-MariaDB-ubu2404", True),
            ("5.7.44", False),
            ("8.0.16", False),
            ("8.0.17", True),
            ("8.4.6-log", True),
            ("9.4.0", True),
        ],
    )
    def test_versions(self, version: str, fits: bool) -> None:
        """A server that is too old is refused, and the message names both."""
        if fits:
            _refuse_old(version)
        else:
            with pytest.raises(ConfigurationError, match=r"MariaDB 10\.6 .* MySQL 8\.0\.17"):
                _refuse_old(version)


class TestCollation:
    async def test_our_tables_and_identifiers(self, maria: BaseDBAsyncClient) -> None:
        """Every text of ours, and the columns of the user that are compared, tell all texts apart."""
        rows = await maria.execute_query_dict(
            "SELECT table_name AS t, column_name AS c, collation_name AS n "
            "FROM information_schema.columns WHERE table_schema = DATABASE() "
            "AND data_type = 'varchar'"
        )
        ours = [row for row in rows if row["t"].startswith("tortoise_auth_")]
        theirs = [row for row in rows if row["c"] in ("email", "password", "username")]
        assert len(ours) == 19 and len(theirs) > 5
        assert {row["n"] for row in ours + theirs} == {"utf8mb4_nopad_bin"}

    async def test_accounts_are_never_confused(self, maria: BaseDBAsyncClient) -> None:
        """Addresses and names that differ by an accent, a case or a blank are different accounts."""
        for name in ("mike", "m\u0131ke", "míke", "mike2"):
            await User.create_user(email=f"{name}@example.com", password=PASSWORD)
        assert await User.all().count() == 4
        for name in ("a", "A", "á", "ä"):
            await NamedUser.create_user(
                username=name, email=f"{ord(name)}@example.com", password=PASSWORD
            )
        assert (await NamedUser.get(username="A")).username == "A"
        assert not await NamedUser.filter(username="Ä").exists()
        await maria.execute_query("UPDATE app_named_user SET username = 'a ' WHERE username = 'A'")
        assert await NamedUser.filter(username="a").count() == 1

    async def test_column_of_the_host(self, tmp_path: Path) -> None:
        """A column that confuses texts is refused; the statements in the message mend it."""
        modules = [*MODULES, "tests.support.other_users"]
        async with database("mariadb", tmp_path, modules=modules) as context:
            auth = AuthService(PlainNamedUser, AuthConfig(secret=SECRET))
            with pytest.raises(ConfigurationError) as refused:
                await auth.login("mike", PASSWORD)
            with pytest.raises(ConfigurationError):  # each time
                await PlainNamedUser.create_user(
                    username="mike", email="mike@example.com", password=PASSWORD
                )
            statements = re.findall(r"ALTER TABLE .+?;", str(refused.value))
            assert statements == [
                "ALTER TABLE `app_plain_named_user` MODIFY `username` varchar(30) "
                "CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL;"
            ]
            for statement in statements:
                await connection_of(context).execute_script(statement)
            await PlainNamedUser.create_user(
                username="mike", email="mike@example.com", password=PASSWORD
            )
            assert (await auth.login("mike", PASSWORD)).user.username == "mike"


class TestErrors:
    async def test_unique_keys(self, maria: BaseDBAsyncClient) -> None:
        """The error names a key, and its columns are looked up; the value may contain anything."""
        await User.create_user(email="ada@example.com", password=PASSWORD)
        with pytest.raises(IdentifierTakenError):
            await User.create_user(email="ada@example.com", password=PASSWORD)
        await maria.execute_script(
            "CREATE UNIQUE INDEX by_name ON app_user (display_name, is_active)"
        )
        strange = "x' for key 'email'"
        await User.create_user(email="b@example.com", password=PASSWORD, display_name=strange)
        with pytest.raises(ValueError, match="display_name, is_active have values"):
            await User.create_user(email="c@example.com", password=PASSWORD, display_name=strange)

    async def test_sorted(self, maria: BaseDBAsyncClient) -> None:
        """A missing table is a mistake in the set-up; a foreign key is no unique key."""
        assert not is_unique_violation(IntegrityError(asyncmy.errors.IntegrityError(1452, "x")))
        await maria.execute_script("DROP TABLE tortoise_auth_attempts")
        auth = AuthService(User, AuthConfig(secret=SECRET))
        with pytest.raises(ConfigurationError, match="Run your migrations"):
            await auth.login("ada@example.com", PASSWORD)


class TestTimes:
    async def test_read_as_utc(self, maria: BaseDBAsyncClient) -> None:
        """Times come back aware, to the microsecond, whatever offset they were given in."""
        moment = datetime(2026, 3, 29, 2, 30, 0, 123456, tzinfo=UTC)
        await AuditRow.create(id=1, event="x", at=moment.astimezone())
        row = await AuditRow.get(id=1)
        assert (row.at, row.at and row.at.tzinfo) == (moment, UTC)
        assert await AuditRow.filter(at__gt=moment - timedelta(microseconds=1)).count() == 1
        assert await AuditRow.filter(at__gt=moment).count() == 0

    async def test_same_moment_twice(
        self, maria: BaseDBAsyncClient, own: AuthService[User]
    ) -> None:
        """Two logins in one microsecond succeed: an UPDATE counts rows that it leaves as they are."""
        await User.create_user(email="ada@example.com", password=PASSWORD)
        first, second = [await own.login("ada@example.com", PASSWORD) for _ in range(2)]
        assert first.user.last_login == second.user.last_login


async def test_nothing_is_kept_of_a_lost_connection(maria: BaseDBAsyncClient) -> None:
    """After the end of its connection a transaction refuses everything, and the pool recovers."""
    with pytest.raises(OperationalError):
        async with transaction(connection_for(AuditRow)) as connection:
            await AuditRow.create(event="lost", using_db=connection)
            (row,) = await connection.execute_query_dict("SELECT CONNECTION_ID() AS id")
            await on_mariadb(f"KILL CONNECTION {row['id']}")
            with suppress(Exception):
                await AuditRow.create(event="lost, too", using_db=connection)
    assert not await AuditRow.all().exists()
