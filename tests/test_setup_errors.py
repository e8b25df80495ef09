"""Errors of an incomplete set-up: each says how to complete it."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest
from tortoise import fields
from tortoise.backends.sqlite.client import SqliteClient
from tortoise.connection import get_connections
from tortoise.context import TortoiseContext
from tortoise.models import Model

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, log_in
from tests.support.app import NamedUser, User
from tests.support.database import connection_of
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthResult,
    AuthService,
    ConfigurationError,
    PasswordPolicy,
)
from tortoise_auth.clock import utc_now
from tortoise_auth.database import connection_for, dialect_of
from tortoise_auth.database.dialects import choice
from tortoise_auth.throttling import Attempt, DatabaseThrottle, Reservation

CONFIG = AuthConfig(secret=SECRET)


class Template(AbstractUser):
    """A user model that was never made concrete."""

    class Meta(AbstractUser.Meta):
        abstract = True


class Nameless(AbstractUser):
    """Names a column that it does not have."""

    identifier_field = "username"

    class Meta(AbstractUser.Meta):
        table = "app_nameless"
        abstract = False


class Incomplete:
    """A throttle that cannot give an attempt back."""

    async def reserve(self, attempt: Attempt) -> Reservation:
        """Grant every attempt."""
        return Reservation(attempt=attempt)

    async def failed(self, reservation: Reservation) -> None:
        """Count nothing."""

    succeeded = failed


class Ambiguous(AbstractUser):
    """Names a column that two accounts may share."""

    identifier_field = "username"
    username = fields.CharField(max_length=50)

    class Meta(AbstractUser.Meta):
        table = "app_ambiguous"
        abstract = False


class RelatedKey(AbstractUser):
    """Its key is a relation, as of a profile."""

    person: fields.OneToOneRelation[User] = fields.OneToOneField("models.User", primary_key=True)

    class Meta(AbstractUser.Meta):
        table = "app_related_key"
        abstract = False


class LongKey(AbstractUser):
    """Its key does not fit into a session."""

    code = fields.CharField(max_length=256, primary_key=True)

    class Meta(AbstractUser.Meta):
        table = "app_long_key"
        abstract = False


class LongTable(AbstractUser):
    """The name of its table does not fit into a session."""

    class Meta(AbstractUser.Meta):
        table = "t" * 129
        abstract = False


class TestConstruction:
    """Mistakes that are reported before the first request."""

    @pytest.mark.parametrize("model", [AbstractUser, Template])
    def test_abstract_model(self, model: type[AbstractUser]) -> None:
        """An abstract model has no table; the text says how to make it concrete."""
        with pytest.raises(ConfigurationError, match=r"abstract.*Subclass it.*abstract = False"):
            AuthService(model, CONFIG)

    @pytest.mark.parametrize("model", [None, "User", Model, object, dict, User()])
    def test_no_user_model(self, model: Any) -> None:
        """A value that is no subclass of AbstractUser is refused by name."""
        with pytest.raises(
            ConfigurationError, match="a class of yours that subclasses AbstractUser"
        ):
            AuthService(model, CONFIG)

    @pytest.mark.parametrize("model", [Nameless, Ambiguous])
    def test_identifier(self, model: type[AbstractUser]) -> None:
        """The column to log in with must exist and be unique; the text names it."""
        with pytest.raises(
            ConfigurationError, match=r"identifier_field is 'username'.*unique=True"
        ):
            AuthService(model, CONFIG)

    def test_relation_as_key(self) -> None:
        """A relation as primary key is refused when the service is made, not at the first login."""
        with pytest.raises(ConfigurationError, match="primary key of RelatedKey is a relation"):
            AuthService(RelatedKey, CONFIG)

    @pytest.mark.parametrize(
        ("model", "what"),
        [
            (LongKey, "primary key of LongKey may have at most 255"),
            (LongTable, "table of LongTable has more than 128"),
        ],
    )
    def test_what_a_session_cannot_hold(self, model: type[AbstractUser], what: str) -> None:
        """A key or table name that no session can hold is refused when the service is made."""
        with pytest.raises(ConfigurationError, match=what):
            AuthService(model, CONFIG)

    def test_identifier_without_a_service(self) -> None:
        """The model reports an invalid identifier without a service, too."""
        with pytest.raises(
            ConfigurationError, match=r"identifier_field is 'username'.*unique=True"
        ):
            Nameless.normalize_identifier("ada")

    @pytest.mark.parametrize("config", [None, SECRET, {"secret": SECRET}])
    def test_no_config(self, config: Any) -> None:
        """A secret alone is no configuration; the text shows one, without the secret."""
        with pytest.raises(ConfigurationError, match=r"AuthConfig\(secret=") as refusal:
            AuthService(User, config)
        assert SECRET not in str(refusal.value)

    def test_before_tortoise(self) -> None:
        """A service can be made at import, before any database exists."""
        run(
            """
            auth = AuthService(User, CONFIG)
            print(auth.user_model.__name__)
            """,
            expected="User",
        )


METHODS: dict[str, Callable[[AuthService[User], AuthResult[User]], Awaitable[object]]] = {
    "login": lambda auth, result: auth.login(EMAIL, PASSWORD),
    "service_create_user": lambda auth, result: auth.create_user(
        email="eve@example.com", password=PASSWORD
    ),
    "login_bad_identifier": lambda auth, result: auth.login("", PASSWORD),
    "authenticate": lambda auth, result: auth.authenticate(result.access_token),
    "authenticated": lambda auth, result: auth.authenticated(result.access_token),
    "refresh": lambda auth, result: auth.refresh(result.refresh_token),
    "logout": lambda auth, result: auth.logout(result.access_token),
    "logout_refresh": lambda auth, result: auth.logout(result.refresh_token),
    "logout_all": lambda auth, result: auth.logout_all(result.user),
    "set_password": lambda auth, result: auth.set_password(result.user, NEW_PASSWORD),
    "change_password": lambda auth, result: auth.change_password(
        result.user, PASSWORD, NEW_PASSWORD
    ),
    "sessions": lambda auth, result: auth.sessions(result.user),
    "revoke_session": lambda auth, result: auth.revoke_session(result.session.id),
    "deactivate": lambda auth, result: auth.deactivate(result.user),
    "activate": lambda auth, result: auth.activate(result.user),
    "purge_expired": lambda auth, result: auth.purge_expired(),
    "user_set_password": lambda auth, result: result.user.set_password(NEW_PASSWORD),
    "create_user": lambda auth, result: User.create_user(
        email="eve@example.com", password=PASSWORD
    ),
}


class TestNoContext:
    @pytest.mark.parametrize("method", METHODS)
    async def test_names_the_way_out(
        self, sqlite: TortoiseContext, auth: AuthService[User], method: str
    ) -> None:
        """If the start-up code ran in another context, the error of every method explains it."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        result = await log_in(auth)

        async def call() -> None:
            await METHODS[method](auth, result)

        elsewhere = asyncio.get_running_loop().create_task(call(), context=contextvars.Context())
        with pytest.raises(ConfigurationError, match=r"Tortoise\.init.*_enable_global_fallback"):
            await elsewhere


class TestParts:
    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"throttle": "redis"}, "throttle= takes DatabaseThrottle"),
            ({"throttle": True}, "throttle= takes DatabaseThrottle"),
            ({"throttle": False}, "throttle= takes DatabaseThrottle"),
            ({"throttle": DatabaseThrottle}, "throttle= takes DatabaseThrottle"),
            ({"throttle": Incomplete()}, "throttle= takes DatabaseThrottle"),
            ({"clock": datetime.now}, "aware datetime"),
            ({"clock": utc_now()}, "aware datetime"),
            ({"emitter": "x"}, "emitter= takes an instance of EventEmitter"),
            ({"passwords": "argon2"}, "passwords= takes an instance of PasswordHasher"),
            ({"policy": 8}, "policy= takes an instance of PasswordPolicy"),
            ({"policy": PasswordPolicy}, "policy= takes an instance of PasswordPolicy"),
        ],
    )
    def test_of_another_type(self, part: Any, message: str) -> None:
        """A part of the wrong type is refused when the service is made, not at the first login."""
        with pytest.raises(ConfigurationError, match=message):
            AuthService(User, AuthConfig(secret=SECRET), **part)


class TestMissingTables:
    @pytest.mark.parametrize(
        "method",
        sorted(
            METHODS.keys()
            - {"activate", "create_user", "service_create_user", "login_bad_identifier"}
        ),
    )
    async def test_of_the_library(
        self, db: TortoiseContext, auth: AuthService[User], method: str
    ) -> None:
        """Without the table of sessions each method that needs it asks for the migrations."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        result = await log_in(auth)
        await connection_of(db).execute_script("DROP TABLE tortoise_auth_session")
        with pytest.raises(ConfigurationError, match=r"migrations.*generate_schemas"):
            await METHODS[method](auth, result)

    async def test_of_the_host(self, db: TortoiseContext, auth: AuthService[User]) -> None:
        """Without the host's own table, sign-up and login ask for the migrations."""
        await connection_of(db).execute_script("DROP TABLE app_user")
        with pytest.raises(ConfigurationError, match=r"migrations.*generate_schemas"):
            await log_in(auth)
        with pytest.raises(ConfigurationError, match=r"migrations.*generate_schemas"):
            await User.create_user(email=EMAIL, password=PASSWORD)

    async def test_column(self, db: TortoiseContext, auth: AuthService[User]) -> None:
        """The error names a table that lacks the last migration, too."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        result = await log_in(auth)
        await connection_of(db).execute_script("ALTER TABLE app_user DROP COLUMN display_name")
        # A plain SELECT is no evidence: SQLite takes an unknown name in quotes for a string.
        for method in ("authenticate", "create_user"):
            with pytest.raises(ConfigurationError, match="table or column"):
                await METHODS[method](auth, result)


PROLOGUE = f"""
import asyncio
from tortoise import Tortoise, fields
from tortoise_auth import AbstractUser, AuthConfig, AuthService
from tortoise_auth.exceptions import TortoiseAuthError
from tortoise_auth.testing import cheap_hasher

CONFIG = AuthConfig(secret={SECRET!r})

class User(AbstractUser):
    password_hasher = cheap_hasher()

async def attempt(awaitable):
    try:
        print(await awaitable)
    except TortoiseAuthError as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""


def run(script: str, *, expected: str) -> list[str]:
    """Run *script* in a process of its own, because models are registered once in each.

    Returns:
        The lines that it printed, every one of which contains *expected*.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROLOGUE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    for line in lines:
        assert expected in line
    return lines


@pytest.mark.slow
class TestRegistration:
    """Models that `Tortoise.init` does not know. Each test runs in a fresh process."""

    def test_models_of_the_library(self) -> None:
        """Without tortoise_auth.models each method names that string and where it goes."""
        lines = run(
            """
            async def main():
                await Tortoise.init(db_url="sqlite://:memory:", modules={"models": ["__main__"]})
                await Tortoise.generate_schemas()
                try:
                    user = await User.create_user(email="ada@example.com", password="x" * 20 + "y")
                    auth = AuthService(User, CONFIG)
                    await attempt(auth.login("ada@example.com", "x" * 20 + "y"))
                    await attempt(auth.login("nobody@example.com", "x"))
                    await attempt(auth.logout_all(user))
                    await attempt(auth.deactivate(user))
                    await attempt(auth.set_password(user, "x" * 20 + "z"))
                    await attempt(user.set_password("x" * 20 + "z"))
                    await attempt(auth.sessions(user))
                    await attempt(auth.purge_expired())
                finally:
                    await Tortoise.close_connections()

            asyncio.run(main())
            """,
            expected='"tortoise_auth.models"',
        )
        assert len(lines) == 8
        assert all(
            line.startswith("ConfigurationError: Session is not registered") for line in lines
        )
        assert all("tortoise_auth.app_config()" in line for line in lines)

    def test_user_model(self) -> None:
        """Without the host's module each method names the model and its module."""
        lines = run(
            """
            async def main():
                await Tortoise.init(
                    db_url="sqlite://:memory:", modules={"models": ["tortoise_auth.models"]}
                )
                await Tortoise.generate_schemas()
                try:
                    auth = AuthService(User, CONFIG)
                    await attempt(auth.login("ada@example.com", "x"))
                    await attempt(User.create_user(email="ada@example.com", password="x" * 20 + "y"))
                    await attempt(User(id=1).set_password("x"))
                finally:
                    await Tortoise.close_connections()

            asyncio.run(main())
            """,
            expected="ConfigurationError: User is not registered with Tortoise. Name its module",
        )
        assert len(lines) == 3
        assert all('"__main__"' in line for line in lines)

    def test_two_connections(self) -> None:
        """Users here and sessions there cannot be written together; the text names both."""
        lines = run(
            """
            async def main():
                await Tortoise.init(
                    config={
                        "connections": {
                            "here": "sqlite://:memory:", "there": "sqlite://:memory:"
                        },
                        "apps": {
                            "models": {"models": ["__main__"], "default_connection": "here"},
                            "auth": {
                                "models": ["tortoise_auth.models"], "default_connection": "there"
                            },
                        },
                    }
                )
                await Tortoise.generate_schemas()
                try:
                    auth = AuthService(User, CONFIG)
                    user = await User.create_user(email="ada@example.com", password="x" * 20 + "y")
                    await attempt(auth.login("ada@example.com", "x" * 20 + "y"))
                    await attempt(auth.sessions(user))
                    await attempt(auth.deactivate(user))
                    await attempt(user.set_password("x" * 20 + "z"))
                finally:
                    await Tortoise.close_connections()

            asyncio.run(main())
            """,
            expected="ConfigurationError: User lives on the connection 'here', "
            "tortoise_auth.models on 'there'",
        )
        assert len(lines) == 4
        assert all("register them on the same connection" in line for line in lines)

    def test_app_of_its_own(self) -> None:
        """The other way that the text names, an app made by app_config(), works."""
        run(
            """
            import tortoise_auth

            async def main():
                await Tortoise.init(
                    config={
                        "connections": {"default": "sqlite://:memory:"},
                        "apps": {
                            "models": {"models": ["__main__"], "default_connection": "default"},
                            "tortoise_auth": tortoise_auth.app_config(),
                        },
                    }
                )
                await Tortoise.generate_schemas()
                try:
                    auth = AuthService(User, CONFIG)
                    await User.create_user(email="ada@example.com", password="x" * 20 + "y")
                    result = await auth.login("ada@example.com", "x" * 20 + "y")
                    await attempt(auth.authenticate(result.access_token))
                finally:
                    await Tortoise.close_connections()

            asyncio.run(main())
            """,
            expected="<User: 1>",
        )


def test_service_of_a_user_name_model() -> None:
    """A unique column of the host's own is accepted."""
    assert AuthService(NamedUser, CONFIG).user_model is NamedUser


class ForeignClient(SqliteClient):
    """A client of the host, derived from one of Tortoise's."""


class TestDatabases:
    async def test_unknown(self, sqlite: TortoiseContext, monkeypatch: pytest.MonkeyPatch) -> None:
        """A database that no statement is written for is refused, and those that work are named."""
        unknown = type("MSSQLClient", (), {"__module__": "tortoise.backends.mssql.client"})
        monkeypatch.setattr(get_connections().get("memory"), "_tortoise_auth_dialect", None)
        monkeypatch.setattr(choice, "_DIALECTS", {})
        for refused in (lambda: dialect_of(unknown()), lambda: connection_for(User)):
            with pytest.raises(ConfigurationError) as error:
                refused()
            for name in ("sqlite://", "asyncpg://", "psycopg://", "MariaDB 10.6", "MySQL 8"):
                assert name in str(error.value)

    def test_of_the_host(self) -> None:
        """A client derived from one of Tortoise's has the dialect of that."""
        assert dialect_of(ForeignClient("x", connection_name="x")).language == "sqlite"
