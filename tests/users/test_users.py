"""The user model without a service: sign-up, passwords, what it emits and what it hides."""

from __future__ import annotations

import math
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from passlib.hash import bcrypt, django_pbkdf2_sha256, pbkdf2_sha256
from tortoise import fields
from tortoise.context import TortoiseContext
from tortoise.exceptions import IntegrityError
from tortoise.models import Model
from tortoise.transactions import in_transaction

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET, assert_over, log_in
from tests.support.app import AuditRow, NamedUser, StrUser, User, UuidUser
from tests.support.concurrency import meanwhile
from tests.support.database import DIALECTS, connection_of, database
from tests.support.hashing import argon2_costs, full_cost
from tests.support.rows import changed, columns, row, rows
from tests.support.statements import statements
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthenticationError,
    AuthService,
    PasswordHasher,
    PasswordPolicy,
    PasswordPolicyError,
    RequestContext,
    request_context,
)
from tortoise_auth.database import is_unique_violation, violated_columns
from tortoise_auth.events import PasswordChanged, UserRegistered
from tortoise_auth.exceptions import IdentifierTakenError, InvalidIdentifierError
from tortoise_auth.fields import EmailField
from tortoise_auth.models import primary_key, user_table
from tortoise_auth.passwords import MAX_PASSWORD_LENGTH
from tortoise_auth.testing import Captured

MODELS: list[Any] = [
    pytest.param(User, {}, id="int"),
    pytest.param(UuidUser, {}, id="uuid"),
    pytest.param(StrUser, {"code": "ada"}, id="str"),
    pytest.param(NamedUser, {"username": "ada"}, id="username"),
]


@pytest.fixture
async def ada(db: TortoiseContext) -> User:
    return await User.create_user(email=EMAIL, password=PASSWORD, display_name="Ada")


def test_tables_of_one_name_are_distinct() -> None:
    """Two models may share the name of a table in two schemas without sharing an account."""

    class InOne(AbstractUser):
        class Meta(AbstractUser.Meta):
            table = "user"
            schema = "one"
            abstract = False

    class InTwo(AbstractUser):
        class Meta(AbstractUser.Meta):
            table = "user"
            schema = "two"
            abstract = False

    assert (user_table(InOne), user_table(InTwo), user_table(User)) == (
        "one.user",
        "two.user",
        "app_user",
    )


class TestCreateUser:
    @pytest.mark.parametrize(("model", "values"), MODELS)
    async def test_saves_hashes_and_emits(
        self,
        db: TortoiseContext,
        events: Captured,
        model: type[AbstractUser],
        values: dict[str, str],
    ) -> None:
        """Whatever the primary key, the account is stored, its password hashed, and its event emitted once."""
        user = await model.create_user(email=EMAIL, password=PASSWORD, **values)
        stored = await row(model, user.pk)
        assert str(stored["password"]).startswith("$argon2id$")
        assert stored["email"] == EMAIL
        assert stored["is_active"] is True
        assert stored["last_login"] is None
        assert user.password == stored["password"]
        assert await user.check_password(PASSWORD)
        event = events.one(UserRegistered)
        assert (event.user, event.subject_id) == (user, str(user.pk))
        assert events.names == ["user_registered"]

    @pytest.mark.parametrize(
        ("typed", "stored"),
        [
            ("  Ada@Example.COM\n", "ada@example.com"),
            ("Rene\u0301e@B\u00fccher.example", "ren\u00e9e@b\u00fccher.example"),
            ("a@xn--bcher-kva.example", "a@b\u00fccher.example"),
        ],
    )
    async def test_email_is_normalised(self, db: TortoiseContext, typed: str, stored: str) -> None:
        """The object and the row hold the same spelling."""
        user = await User.create_user(email=typed, password=PASSWORD)
        assert user.email == stored
        assert (await row(User, user.pk))["email"] == stored

    async def test_user_name_is_normalised(self, db: TortoiseContext) -> None:
        """A user name is stored in its compatible form, without white space, its case kept."""
        user = await NamedUser.create_user(
            email="Ada@Example.com", username=" \uff21da\t", password=PASSWORD
        )
        stored = await row(NamedUser, user.pk)
        assert (stored["username"], stored["email"]) == ("Ada", EMAIL)

    @pytest.mark.parametrize(
        "email",
        [
            "",
            " ",
            "ada",
            "ada@",
            "@example.com",
            "ada@example",
            "ada@exam ple.com",
            "a\0@b.example",
        ],
    )
    async def test_bad_email(self, db: TortoiseContext, events: Captured, email: str) -> None:
        """Text that is no address is refused before a hash is computed."""
        with argon2_costs() as costs, pytest.raises(InvalidIdentifierError) as refusal:
            await User.create_user(email=email, password=PASSWORD)
        assert refusal.value.code == "invalid_identifier"
        assert costs == []
        assert await User.all().count() == 0
        assert events.names == []

    @pytest.mark.parametrize(
        "email", [None, 7, True, b"a@b.example", ["a@b.example"], "\ud800@b.example", "a" * 10**7]
    )
    async def test_hostile_email(self, db: TortoiseContext, email: Any) -> None:
        """Other types, broken text and megabytes are refused, too, and not repeated."""
        with pytest.raises(InvalidIdentifierError) as refusal:
            await User.create_user(email=email, password=PASSWORD)
        assert str(refusal.value) == "That is not an e-mail address"

    @pytest.mark.parametrize("username", ["", " ", "x" * 31, "a\0", "\ud800", None, 7, b"ada"])
    async def test_bad_user_name(self, db: TortoiseContext, username: Any) -> None:
        """A user name is text that fits its column."""
        with pytest.raises(InvalidIdentifierError):
            await NamedUser.create_user(email=EMAIL, username=username, password=PASSWORD)

    async def test_missing_identifier(self, db: TortoiseContext) -> None:
        """A sign-up without an identifier is refused."""
        with pytest.raises(InvalidIdentifierError):
            await User.create_user(password=PASSWORD)
        with pytest.raises(InvalidIdentifierError):
            await NamedUser.create_user(email=EMAIL, password=PASSWORD)

    async def test_missing_column(self, db: TortoiseContext) -> None:
        """A column without a default is required, even if it is not the identifier."""
        with pytest.raises(ValueError, match=r"^NamedUser: email .*needs one"):
            await NamedUser.create_user(username="ada", password=PASSWORD)

    @pytest.mark.parametrize("typed", [EMAIL, " ADA@example.COM ", "ada@EXAMPLE.com"])
    async def test_taken(
        self, db: TortoiseContext, ada: User, events: Captured, typed: str
    ) -> None:
        """A second account is refused in any spelling; neither text nor cause names the first."""
        events.clear()
        with pytest.raises(IdentifierTakenError) as refusal:
            await User.create_user(email=typed, password=PASSWORD)
        assert refusal.value.code == "identifier_taken"
        assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)
        assert EMAIL not in "".join(traceback.format_exception(refusal.value)).lower()
        assert await User.all().count() == 1
        assert events.names == []

    async def test_taken_in_a_transaction_of_the_caller(
        self, db: TortoiseContext, ada: User
    ) -> None:
        """The caller's own transaction can go on after the refusal."""
        async with in_transaction(connection_of(db).connection_name):
            with pytest.raises(IdentifierTakenError):
                await User.create_user(email=EMAIL, password=PASSWORD)
            bob = await User.create_user(email="bob@example.com", password=PASSWORD)
        assert await User.filter(pk=bob.pk).exists()

    async def test_refused_by_the_database(self, db: TortoiseContext) -> None:
        """A value that violates a constraint is a ValueError that does not repeat it."""
        connection = connection_of(db)
        await connection.execute_script(
            "ALTER TABLE app_user ADD CHECK (display_name <> 'canary')"
            if connection.capabilities.dialect != "sqlite"
            else "CREATE TRIGGER app_rule BEFORE INSERT ON app_user WHEN NEW.display_name = 'canary' "
            "BEGIN SELECT RAISE(ABORT, 'canary is refused'); END"
        )
        with pytest.raises(ValueError, match=r"^User: the database refuses a value") as refusal:
            await User.create_user(email=EMAIL, password=PASSWORD, display_name="canary")
        assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)
        assert "canary" not in str(refusal.value)
        assert await User.all().count() == 0

    @pytest.mark.parametrize(
        "smuggled",
        ["is_active", "session_version", "last_login", "created_at", "updated_at"],
    )
    async def test_mass_assignment(self, db: TortoiseContext, smuggled: str) -> None:
        """A form cannot set columns that control access."""
        with pytest.raises(ValueError, match=smuggled):
            await User.create_user(email=EMAIL, password=PASSWORD, **{smuggled: None})
        assert await User.all().count() == 0

    async def test_password_is_never_stored_as_given(self, db: TortoiseContext) -> None:
        """A hash that is given as a password is hashed, too."""
        given = "$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ$YQ"
        user = await User.create_user(email=EMAIL, password=given)
        assert user.password != given
        assert await user.check_password(given)

    async def test_unknown_column(self, db: TortoiseContext) -> None:
        """The error of an unknown column names it, and lists those that exist."""
        with pytest.raises(ValueError, match=r"no field display_nam .*: display_name"):
            await User.create_user(email=EMAIL, password=PASSWORD, display_nam="Ada")

    @pytest.mark.parametrize("value", ["x" * 101, "nul\0", "\ud800", None])
    async def test_value_that_does_not_fit(
        self, db: TortoiseContext, events: Captured, value: Any
    ) -> None:
        """Text that the column cannot hold is a ValueError on every database."""
        with pytest.raises(ValueError, match="display_name"):
            await User.create_user(email=EMAIL, password=PASSWORD, display_name=value)
        assert await User.all().count() == 0
        assert events.names == []

    @pytest.mark.parametrize(
        ("password", "code"),
        [
            ("short", "too_short"),
            ("passwordpassword", "common"),
            ("Ada@Example.com", "context"),
            ("x" * (MAX_PASSWORD_LENGTH + 1), "too_long"),
            (PASSWORD + "\0", "nul_character"),
            (7, "not_a_string"),
        ],
    )
    async def test_policy(
        self, db: TortoiseContext, events: Captured, password: Any, code: str
    ) -> None:
        """The policy is applied, with the address of the new account as context."""
        with argon2_costs() as costs, pytest.raises(PasswordPolicyError) as refusal:
            await User.create_user(email=EMAIL, password=password)
        assert [failure.code for failure in refusal.value.failures] == [code]
        assert costs == []
        assert await User.all().count() == 0
        assert events.names == []

    async def test_own_policy(self, db: TortoiseContext, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host sets the policy on its model."""
        monkeypatch.setattr(User, "password_policy", PasswordPolicy(min_length=40))
        with pytest.raises(PasswordPolicyError):
            await User.create_user(email=EMAIL, password=PASSWORD)

    async def test_without_password(self, db: TortoiseContext, auth: AuthService[User]) -> None:
        """An account without a password can be created, and no password logs in to it."""
        user = await User.create_user(email=EMAIL)
        stored = str((await row(User, user.pk))["password"])
        assert not user.has_usable_password()
        for password in ("", stored, "None"):
            assert not await user.check_password(password)
            with pytest.raises(AuthenticationError):
                await auth.login(EMAIL, password)

    async def test_context(self, db: TortoiseContext, events: Captured) -> None:
        """The event carries the context of its request."""
        context = RequestContext(ip="203.0.113.7")
        token = request_context.set(context)
        try:
            await User.create_user(email=EMAIL, password=PASSWORD)
        finally:
            request_context.reset(token)
        assert events.one(UserRegistered).context == context


class Club(Model):
    """A model that accounts refer to."""

    name = fields.CharField(max_length=20, default="")

    class Meta(Model.Meta):
        table = "app_club"


class Member(AbstractUser):
    """A user with unique columns of its own, and relations of every kind."""

    phone = fields.CharField(max_length=20, unique=True, null=True, source_field="Phone_no")
    badge = fields.CharField(max_length=20, null=True)
    alias = fields.CharField(max_length=20, null=True)
    settings: fields.JSONField[Any] = fields.JSONField(null=True)
    club: fields.ForeignKeyNullableRelation[Club] = fields.ForeignKeyField(
        "models.Club", related_name="members", null=True
    )
    mentor: fields.OneToOneNullableRelation[Member] = fields.OneToOneField(
        "models.Member", related_name="pupil", null=True
    )
    friends: fields.ManyToManyRelation[Member] = fields.ManyToManyField(
        "models.Member", related_name="befriended"
    )

    class Meta(AbstractUser.Meta):
        table = "app_member"
        abstract = False
        unique_together = (("badge", "club"),)


@pytest.fixture(params=DIALECTS)
async def members(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Every database, with the models of this module."""
    modules = [__name__, "tortoise_auth.models"]
    async with database(request.param, tmp_path, modules=modules) as context:
        yield context


class TestOwnColumns:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["phone"], "Member: phone has a value that another account has"),
            (["badge", "club"], "Member: badge, club_id have values that another account has"),
            (["mentor"], "Member: mentor_id has a value that another account has"),
        ],
        ids=["column", "two columns", "one-to-one"],
    )
    async def test_unique(self, members: TortoiseContext, names: list[str], message: str) -> None:
        """The error of a duplicate unique value names its column, not its value."""
        mentor = await Member.create_user(email="mentor@example.com")
        everything: dict[str, Any] = {
            "phone": "canary-1",
            "badge": "canary-2",
            "club": await Club.create(),
            "mentor": mentor,
        }
        values = {name: everything[name] for name in names}
        await Member.create_user(email=EMAIL, **values)
        with pytest.raises(ValueError, match=f"^{message}$") as refusal:
            await Member.create_user(email="bob@example.com", **values)
        assert type(refusal.value) is ValueError
        assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)
        assert await Member.all().count() == 2

    async def test_identifier_goes_first(self, members: TortoiseContext) -> None:
        """A second sign-up is an IdentifierTakenError, even if other columns, or the key, are taken, too."""
        ada = await Member.create_user(email=EMAIL, badge="7")
        with pytest.raises(IdentifierTakenError):
            await Member.create_user(email=EMAIL, badge="7")
        with pytest.raises(IdentifierTakenError):
            await Member.create_user(email="bob@example.com", id=ada.pk)

    async def test_unique_by_an_expression(self, members: TortoiseContext) -> None:
        """Only PostgreSQL reports the column of such an index; else the identifier counts as taken."""
        dialect = connection_of(members).capabilities.dialect
        await connection_of(members).execute_script(
            "ALTER TABLE app_member ADD app_member_alias VARCHAR(20) AS (lower(alias)) UNIQUE"
            if dialect == "mysql"  # MariaDB has no index on an expression
            else "CREATE UNIQUE INDEX app_member_alias ON app_member (lower(alias))"
        )
        await Member.create_user(email=EMAIL, alias="canary")
        reported = dialect == "postgres"
        with pytest.raises(ValueError if reported else IdentifierTakenError) as refusal:
            await Member.create_user(email="bob@example.com", alias="CANARY")
        assert ("Member: alias" in str(refusal.value)) == reported
        assert "canary" not in str(refusal.value).lower()

    @pytest.mark.parametrize("relation", ["friends", "befriended", "pupil", "members", "pk"])
    async def test_what_is_no_column(self, members: TortoiseContext, relation: str) -> None:
        """Relations without a column in this table cannot be set; those with one are listed."""
        values: dict[str, Any] = {relation: [1]}
        with pytest.raises(ValueError, match=f"^Member has no field {relation} that") as refusal:
            await Member.create_user(email=EMAIL, **values)
        _, _, listed = str(refusal.value).partition("It has: ")
        assert (
            listed
            == "alias, badge, club, club_id, email, id, mentor, mentor_id, password, phone, settings."
        )

    @pytest.mark.parametrize("name", ["club", "mentor"])
    async def test_relation(self, members: TortoiseContext, name: str) -> None:
        """A relation accepts a saved object of its model, or None."""
        for misfit in (1, "1", [1], Club(), Member(), AuditRow(id=1)):
            values: dict[str, Any] = {name: misfit}
            with pytest.raises(ValueError, match=f"^Member: {name} cannot hold such a value$"):
                await Member.create_user(email=EMAIL, **values)
        assert await Member.all().count() == 0
        assert await Member.create_user(email=EMAIL, **{name: None})

    @pytest.mark.parametrize(
        "value",
        [
            {"a": "\0"},
            {"\0": 1},
            [["\ud83d"]],
            '{"a": "\\u0000"}',
            [math.nan],
            math.inf,
            10**5000,
            {"a": {1, 2}},
            "{broken",
        ],
        ids=range(9),
    )
    async def test_json_that_no_column_holds(self, members: TortoiseContext, value: Any) -> None:
        """A value that JSON or some database cannot hold is refused by its column, on each of them."""
        with pytest.raises(ValueError, match=r"^Member: settings cannot hold such a value$"):
            await Member.create_user(email=EMAIL, settings=value)
        assert await Member.all().count() == 0

    @pytest.mark.parametrize("value", [None, 1.5, {"a": [None, True, "é😀\\u0000"]}, "[1, 2]"])
    async def test_json(self, members: TortoiseContext, value: Any) -> None:
        """Any other JSON is stored as it is."""
        user = await Member.create_user(email=EMAIL, settings=value)
        stored = (await Member.get(pk=user.pk)).settings
        assert stored == ([1, 2] if value == "[1, 2]" else value)

    @pytest.mark.parametrize("value", ["canary" * 9, b"canary" * 8])
    async def test_refused_value_is_not_quoted(self, members: TortoiseContext, value: Any) -> None:
        """A refusal names the column of the host, and not its value, which may be secret."""
        with pytest.raises(ValueError, match=r"^Member: phone cannot hold such a value") as refusal:
            await Member.create_user(email=EMAIL, phone=value)
        assert "canary" not in str(refusal.value)
        assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)


class Diagnosis:
    """The part of a psycopg error that names the constraint."""

    message_detail = 'Ключ "(tenant, lower(email::text))=(7, a@b.c (x)=y)" уже существует.'


class TestViolatedColumns:
    @pytest.mark.parametrize(
        ("text", "details", "columns"),
        [
            ("UNIQUE constraint failed: app_user.email", {}, {"email"}),
            ("UNIQUE constraint failed: s.a, s.b", {}, {"a", "b"}),
            ("UNIQUE constraint failed: index 'app_member_alias'", {}, set()),
            ("", {"sqlstate": "23505", "detail": "Key (phone)=(x) already exists."}, {"phone"}),
            ("", {"sqlstate": "23505", "detail": 'Key ("Phone_no")=(a)=(b)'}, {"Phone_no"}),
            ("", {"sqlstate": "23505", "detail": None}, set()),
            (
                "",
                {"sqlstate": "23505", "diag": Diagnosis()},
                {"tenant", "lower", "email", "text"},
            ),
        ],
        ids=range(7),
    )
    async def test_of_every_driver(
        self, sqlite: TortoiseContext, text: str, details: dict[str, Any], columns: set[str]
    ) -> None:
        """The columns are read from the errors of SQLite, asyncpg and psycopg, in any language."""
        cause = Exception(text)
        for name, value in details.items():
            setattr(cause, name, value)
        assert is_unique_violation(IntegrityError(cause))
        named = await violated_columns(IntegrityError(cause), User, connection_of(sqlite))
        assert named == columns


class ShortUser(AbstractUser):
    """A user whose column holds only short addresses."""

    email = EmailField(max_length=20, unique=True)

    class Meta(AbstractUser.Meta):
        table = "app_short_user"
        abstract = False


class TestNormalizeIdentifier:
    def test_is_idempotent(self) -> None:
        """A normalised identifier is its own normal form."""
        for model, typed in [
            (User, " REN\u00c9E@B\u00fccher.example"),
            (User, "\u0130stanbul@example.com"),
            (NamedUser, " \ufb01\u00b4x "),
        ]:
            once = model.normalize_identifier(typed)
            assert model.normalize_identifier(once) == once

    def test_fits_the_column(self) -> None:
        """An identifier that is longer than its column is refused."""
        assert ShortUser.normalize_identifier("a" * 8 + "@example.com") == "aaaaaaaa@example.com"
        with pytest.raises(InvalidIdentifierError):
            ShortUser.normalize_identifier("a" * 9 + "@example.com")
        assert NamedUser.normalize_identifier("x" * 30) == "x" * 30
        with pytest.raises(InvalidIdentifierError):
            NamedUser.normalize_identifier("\ufdfa" * 30)  # one character that NFKC makes 18 of


class TestSetPassword:
    @pytest.mark.parametrize(("model", "values"), MODELS)
    async def test_ends_every_session(
        self,
        db: TortoiseContext,
        events: Captured,
        model: type[AbstractUser],
        values: dict[str, str],
    ) -> None:
        """Without a service the hash is stored, all sessions end, and one event is emitted."""
        auth = AuthService(model, AuthConfig(secret=SECRET))
        user = await model.create_user(email=EMAIL, password=PASSWORD, **values)
        identifier = getattr(user, model.identifier_field)
        results = [await auth.login(identifier, PASSWORD) for _ in range(2)]
        events.clear()
        await user.set_password(NEW_PASSWORD)

        for result in results:
            await assert_over(auth, result)
        assert events.names == ["password_changed"]
        event = events.one(PasswordChanged)
        assert (event.user, event.sessions_ended) == (user, 2)
        with pytest.raises(AuthenticationError):
            await auth.login(identifier, PASSWORD)
        assert await auth.login(identifier, NEW_PASSWORD)

    async def test_writes_only_its_columns(self, db: TortoiseContext, ada: User) -> None:
        """A stale object overwrites nothing, and reopens no closed account."""
        await User.filter(pk=ada.pk).update(display_name="Countess", is_active=False)
        before = await row(User, ada.pk)
        await ada.set_password(NEW_PASSWORD)
        after = await row(User, ada.pk)
        assert changed(before, after) == {"password", "session_version", "updated_at"}
        assert (ada.password, ada.session_version) == (
            after["password"],
            after["session_version"],
        )

    async def test_versions_never_repeat(self, db: TortoiseContext, ada: User) -> None:
        """Two objects of one account do not set the same version twice."""
        stale = await User.get(pk=ada.pk)
        await ada.set_password(NEW_PASSWORD)
        await stale.set_password(PASSWORD)
        assert stale.session_version == ada.session_version + 1

    async def test_asks_no_policy_but_needs_a_password(
        self, db: TortoiseContext, ada: User, events: Captured
    ) -> None:
        """An administrator's script may set a short password, not one that cannot be hashed."""
        await ada.set_password("short")
        assert await ada.check_password("short")
        before = await row(User, ada.pk)
        events.clear()
        impossible: list[Any] = ["x" * (MAX_PASSWORD_LENGTH + 1), "\0", "\ud800", None, b"x"]
        for password in impossible:
            with pytest.raises(PasswordPolicyError):
                await ada.set_password(password)
        assert await row(User, ada.pk) == before
        assert events.names == []

    async def test_unsaved_user(self, db: TortoiseContext, events: Captured) -> None:
        """An account that is not in the database cannot have a password."""
        users: list[AbstractUser] = [
            User(email=EMAIL),
            User(id=7, email=EMAIL),
            UuidUser(email=EMAIL),
            StrUser(email=EMAIL, code="ada"),
        ]
        for user in users:
            with pytest.raises(ValueError, match="save it"):
                await user.set_password(PASSWORD)
            assert user.password == ""
        assert events.names == []


class TestCheckPassword:
    @pytest.mark.parametrize(
        "password", [PASSWORD.upper(), PASSWORD + " ", "", "x" * 2000, "\0", "\ud800", None, 7]
    )
    async def test_wrong(
        self, db: TortoiseContext, ada: User, hasher: PasswordHasher, password: Any
    ) -> None:
        """Any other text is wrong, costs one hash, and changes nothing."""
        before = await rows(User)
        with argon2_costs() as costs, statements(db) as seen:
            assert await ada.check_password(password) is False
        assert costs == [full_cost(hasher)]
        assert seen == []
        assert await rows(User) == before

    async def test_right(self, db: TortoiseContext, ada: User, hasher: PasswordHasher) -> None:
        """The right password costs one hash, too, and no statement."""
        with argon2_costs() as costs, statements(db) as seen:
            assert await ada.check_password(PASSWORD) is True
        assert costs == [full_cost(hasher)]
        assert seen == []

    @pytest.mark.parametrize("scheme", [bcrypt, pbkdf2_sha256, django_pbkdf2_sha256])
    async def test_replaces_an_outdated_hash(
        self,
        db: TortoiseContext,
        auth: AuthService[User],
        ada: User,
        events: Captured,
        scheme: Any,
    ) -> None:
        """The right password replaces an outdated hash, in the row and in memory, and ends no session."""
        rounds = 4 if scheme is bcrypt else 10
        ada.password = scheme.using(rounds=rounds).hash(PASSWORD)
        await ada.save()
        result = await log_in_quietly(auth, ada)
        before = await row(User, ada.pk)
        events.clear()
        assert not await ada.check_password("wrong")
        assert await row(User, ada.pk) == before
        assert await ada.check_password(PASSWORD)

        after = await row(User, ada.pk)
        assert changed(before, after) == {"password"}
        assert ada.password == after["password"]
        assert ada.password.startswith("$argon2id$")
        assert events.names == ["password_rehashed"]
        assert await auth.authenticate(result) == ada

    @pytest.mark.parametrize("object_", ["another", "the same"])
    async def test_never_replaces_a_newer_password(
        self,
        db: TortoiseContext,
        ada: User,
        hasher: PasswordHasher,
        monkeypatch: pytest.MonkeyPatch,
        events: Captured,
        object_: str,
    ) -> None:
        """A password that any object sets while the old one is rehashed stays."""
        outdated = pbkdf2_sha256.using(rounds=10).hash(PASSWORD)
        ada.password = outdated
        await ada.save()
        other = await User.get(pk=ada.pk) if object_ == "another" else ada
        events.clear()
        meanwhile(monkeypatch, hasher, "hash", lambda: other.set_password(NEW_PASSWORD))
        await ada.check_password(PASSWORD)

        assert (await row(User, ada.pk))["password"] == other.password != outdated
        assert ada.password == (outdated if object_ == "another" else other.password)
        assert events.names == ["password_changed"]


async def log_in_quietly(auth: AuthService[User], user: User) -> str:
    """Open a session without touching the stored hash; return its access token."""
    stored = user.password
    await User.filter(pk=user.pk).update(password=await user.password_hasher.hash(PASSWORD))
    result = await log_in(auth)
    await User.filter(pk=user.pk).update(password=stored)
    return result.access_token


class TestUnusablePassword:
    async def test_until_a_new_one_is_set(
        self, db: TortoiseContext, auth: AuthService[User], ada: User
    ) -> None:
        """No password is accepted, sessions stay live, and a new password works."""
        result = await log_in(auth)
        ada.set_unusable_password()
        assert not ada.has_usable_password()
        await ada.save()
        for password in (PASSWORD, ada.password, "", "!"):
            assert not await ada.check_password(password)
            with pytest.raises(AuthenticationError):
                await auth.login(EMAIL, password)
        assert await auth.authenticate(result.access_token) == ada
        await ada.set_password(NEW_PASSWORD)
        assert ada.has_usable_password()
        assert await auth.login(EMAIL, NEW_PASSWORD)

    def test_is_never_the_same_twice(self) -> None:
        """Two accounts without a password do not share a stored value."""
        first, second = User(), User()
        first.set_unusable_password()
        second.set_unusable_password()
        assert first.password != second.password

    def test_an_empty_hash_is_unusable(self) -> None:
        """A new object has no usable password."""
        assert not User().has_usable_password()


class TestDescription:
    @pytest.mark.parametrize(("model", "values"), MODELS)
    async def test_shows_class_and_key_only(
        self, sqlite: TortoiseContext, model: type[AbstractUser], values: dict[str, str]
    ) -> None:
        """The text of an account is its class and its primary key."""
        user = await model.create_user(email=EMAIL, password=PASSWORD, **values)
        expected = f"<{model.__name__}: {user.pk}>"
        assert (repr(user), str(user), f"{user}") == (expected,) * 3

    def test_unsaved(self) -> None:
        """An object without a key can be printed."""
        assert repr(User(email=EMAIL)) == "<User: None>"

    def test_is_authenticated(self) -> None:
        """An account is always authenticated, never anonymous."""
        user = User()
        assert (user.is_authenticated, user.is_anonymous) == (True, False)

    @pytest.mark.parametrize(
        ("key", "shown"),
        [
            ("it's Zo\u00eb", "it's Zo\u00eb"),
            ("a\nERROR b", r"a\nERROR b"),
            ("\x1b[2J", r"\x1b[2J"),
            ("\u202eda", r"\u202eda"),
            ("\ud800", r"\ud800"),
            ("x" * 10**6, "x" * 64),
            ("\n" * 40, r"\n" * 32),
        ],
        ids=range(7),
    )
    def test_key_that_forges_a_log(self, key: str, shown: str) -> None:
        """A key cannot begin a line, command a terminal, or fill the log."""
        assert repr(StrUser(code=key)) == f"<StrUser: {shown}>"


class TestPrimaryKey:
    @pytest.mark.parametrize(
        ("model", "text", "key"),
        [
            (User, "1", 1),
            (User, "-1", -1),
            (User, str(2**31 - 1), 2**31 - 1),
            (StrUser, " 1 ", " 1 "),
            (
                UuidUser,
                "12345678-1234-5678-1234-567812345678",
                UUID("12345678-1234-5678-1234-567812345678"),
            ),
        ],
    )
    def test_reads_what_str_wrote(self, model: type[AbstractUser], text: str, key: object) -> None:
        """The text of a key is parsed back."""
        assert primary_key(model, text) == key

    @pytest.mark.parametrize(
        ("model", "text"),
        [(User, text) for text in ("", " 1 ", "01", "+1", "1.0", "True", "\uff11", "1_0", "x")]
        + [(User, str(2**31)), (User, "-" + str(2**31 + 1)), (User, "9" * 5000)]
        + [(UuidUser, "12345678123456781234567812345678"), (UuidUser, "{0}"), (UuidUser, "1")]
        + [(StrUser, "x" * 41)],
        ids=range(16),
    )
    def test_refuses_every_other_spelling(self, model: type[AbstractUser], text: str) -> None:
        """Another spelling of a key, which a database might accept, is refused before it is sent."""
        assert primary_key(model, text) is None


def test_columns_of_a_new_account() -> None:
    """The contract of the model: its fields and their initial values."""
    names = {"email", "password", "is_active", "last_login", "session_version"}
    names |= {"created_at", "updated_at", "password_locked_at", "id", "display_name"}
    assert set(columns(User())) == names
