"""Fields: moments that expire when they should, and addresses that have one spelling."""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tortoise import fields
from tortoise.context import TortoiseContext
from tortoise.exceptions import IntegrityError, ValidationError
from tortoise.expressions import Q
from tortoise.models import Model
from tortoise.timezone import _reset_timezone_cache

from tests.support.app import User
from tests.support.database import DATABASES, MODULES, database
from tortoise_auth.database import connection_for
from tortoise_auth.exceptions import InvalidIdentifierError
from tortoise_auth.fields import (
    MAX_EMAIL_LENGTH,
    EmailField,
    UtcDatetimeField,
    normalize_email,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ZONES = ["UTC", "Asia/Tokyo", "America/New_York"]


class Moment(Model):
    """One column of each kind of moment."""

    id = fields.IntField(primary_key=True)
    at: UtcDatetimeField[datetime | None] = UtcDatetimeField(null=True)
    created: UtcDatetimeField[datetime] = UtcDatetimeField(auto_now_add=True)
    changed: UtcDatetimeField[datetime] = UtcDatetimeField(auto_now=True)

    class Meta(Model.Meta):
        table = "fields_moment"


class Contact(Model):
    """An address that may be missing."""

    id = fields.IntField(primary_key=True)
    email = EmailField(null=True, max_length=100)

    class Meta(Model.Meta):
        table = "fields_contact"


@pytest.fixture(params=DATABASES)
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Every database, with the tables of this module."""
    async with database(request.param, tmp_path, modules=[*MODULES, __name__]) as context:
        yield context


@pytest.fixture
def _settings_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo the settings of Tortoise and these tests for the whole process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("USE_TZ", "TIMEZONE", "TZ"):
            patch.setenv(name, os.environ.get(name, ""))
        yield
    time.tzset()
    _reset_timezone_cache()


class TestMomentsUnderAnySettings:
    @pytest.mark.usefixtures("_settings_restored")
    @pytest.mark.parametrize("kind", DATABASES)
    @pytest.mark.parametrize("use_tz", [True, False], ids=["use_tz", "naive"])
    @pytest.mark.parametrize("zone", ZONES)
    @pytest.mark.parametrize("process_zone", ["UTC", "America/New_York"])
    async def test_expiry(
        self, tmp_path: Path, kind: str, use_tz: bool, zone: str, process_zone: str
    ) -> None:
        """SQL and Python select the valid row and not the expired one, in every setting."""
        os.environ["TZ"] = process_zone
        time.tzset()
        modules = [*MODULES, __name__]
        async with database(kind, tmp_path, modules=modules, use_tz=use_tz, timezone=zone):
            expired = await Moment.create(at=NOON - timedelta(minutes=1))
            valid = await Moment.create(at=NOON + timedelta(minutes=1))
            for now in (NOON, *(NOON.astimezone(ZoneInfo(name)) for name in ZONES)):
                assert await Moment.filter(at__gt=now) == [valid]
                assert await Moment.filter(at__lte=now) == [expired]
                rows = await Moment.all()
                assert [row for row in rows if row.at and row.at > now] == [valid]
            for row in await Moment.all():
                assert row.at is not None
                assert (row.at - NOON).total_seconds() in {-60.0, 60.0}
                assert {row.at.tzinfo, row.created.tzinfo, row.changed.tzinfo} == {UTC}
                assert abs(datetime.now(UTC) - row.created) < timedelta(minutes=1)
            assert await Moment.filter(created__gt=datetime.now(UTC)).count() == 0
            assert (
                await Moment.filter(created__gt=datetime.now(UTC) - timedelta(minutes=1)).count()
                == 2
            )


@pytest.mark.usefixtures("db")
class TestMoments:
    @pytest.mark.parametrize("zone", [*ZONES, "Asia/Kathmandu"])
    async def test_round_trip(self, zone: str) -> None:
        """A moment of any zone is read back in UTC, to the microsecond."""
        for moment in (NOON, NOON.replace(microsecond=1), NOON.replace(microsecond=999_999)):
            row = await Moment.create(at=moment.astimezone(ZoneInfo(zone)))
            for at in (row.at, (await Moment.get(id=row.id)).at):
                assert at == moment
                assert at is not None
                assert at.tzinfo is UTC

    async def test_fixed_offset(self) -> None:
        """An offset is as good as a zone."""
        row = await Moment.create(at=datetime(2026, 1, 1, 23, tzinfo=timezone(timedelta(hours=11))))
        assert (await Moment.get(id=row.id)).at == NOON

    async def test_order(self) -> None:
        """Moments sort by time, also where one has a fraction of a second and another has none."""
        moments = [
            NOON + timedelta(microseconds=offset)
            for offset in (0, 1, -1, 1_000_000, 999_999, 10, 500_000, -500_000, -1_000_000, 100)
        ]
        for moment in moments:
            await Moment.create(at=moment)
        assert await Moment.all().order_by("at").values_list("at", flat=True) == sorted(moments)
        for moment in moments:
            earlier = await Moment.filter(at__lt=moment).count()
            assert earlier == sum(other < moment for other in moments)
            assert await Moment.filter(at=moment).count() == 1

    async def test_none(self) -> None:
        """A missing moment is None, where the column allows it."""
        row = await Moment.create(at=None)
        assert (await Moment.get(id=row.id)).at is None
        assert await Moment.filter(at__isnull=True).count() == 1
        row.created = None  # type: ignore[assignment]
        await row.save()
        assert row.created is not None

    @pytest.mark.parametrize("naive", [datetime(2026, 1, 1, 12), date(2026, 1, 1)])  # noqa: DTZ001
    async def test_naive(self, naive: Any) -> None:
        """A moment without a zone is refused everywhere: when made, saved, updated, looked up.

        The drivers of MariaDB read such moments, so there a constructor takes them for UTC.
        """
        if not (
            isinstance(naive, datetime) and connection_for(Moment).connection_name == "mariadb"
        ):
            with pytest.raises((ValidationError, TypeError)):
                await Moment.create(at=naive)
        row = await Moment.create(at=NOON)
        row.at = naive
        with pytest.raises(ValidationError, match="at: give an aware datetime"):
            await row.save()
        with pytest.raises(ValidationError, match="aware"):
            await Moment.filter(id=row.id).update(at=naive)
        for lookup in ("at", "at__gt", "at__lte", "at__not"):
            with pytest.raises(ValidationError, match="aware"):
                await Moment.filter(**{lookup: naive}).count()
        with pytest.raises(ValidationError, match="aware"):
            await Moment.filter(at__in=[NOON, naive]).count()
        assert (await Moment.get(id=row.id)).at == NOON

    @pytest.mark.usefixtures("_settings_restored")
    async def test_text_without_an_offset(self, db: TortoiseContext) -> None:
        """The current time of SQLite is read as UTC, whatever the zone of the process."""
        os.environ["TZ"] = "America/New_York"
        time.tzset()
        connection = next(iter(db.connections.all()))
        await connection.execute_script(
            "INSERT INTO fields_moment (at, created, changed) "
            "VALUES (CURRENT_TIMESTAMP, CURRENT_TIMESTAMP, CURRENT_TIMESTAMP)"
        )
        row = await Moment.get()
        assert row.at is not None
        assert row.at.tzinfo is UTC
        assert abs(datetime.now(UTC) - row.at) < timedelta(minutes=1)

    async def test_auto_now_add(self) -> None:
        """The time of creation is set once, and a given one is kept."""
        before = datetime.now(UTC)
        row = await Moment.create()
        assert before <= row.created <= datetime.now(UTC)
        first = row.created
        await row.save()
        assert row.created == first == (await Moment.get(id=row.id)).created
        given_ = await Moment.create(created=NOON)
        assert given_.created == NOON == (await Moment.get(id=given_.id)).created

    async def test_auto_now(self) -> None:
        """The time of change is that of the last save, on the instance as in the database."""
        row = await Moment.create(changed=NOON)
        assert row.changed > NOON
        for _ in range(2):
            row.changed = NOON
            await row.save()
            assert row.changed > NOON
            assert row.changed == (await Moment.get(id=row.id)).changed
        await Moment.filter(id=row.id).update(at=NOON)
        assert row.changed == (await Moment.get(id=row.id)).changed

    async def test_many_at_once(self) -> None:
        """Rows that are made together get their times as well."""
        await Moment.bulk_create([Moment(at=NOON) for _ in range(3)])
        assert await Moment.filter(at=NOON, created__gt=NOON, changed__gt=NOON).count() == 3


SPELLINGS = [
    "ada@example.com",
    "Ada@Example.COM",
    " ada@example.com\n",
    "ADA@EXAMPLE.COM",
    "ada@\uff45xample.com",
]

GARBAGE = [
    "",
    " ",
    "ada",
    "@",
    "ada@",
    "@example.com",
    "ada@example",
    "ada@@example.com",
    "ada@exa mple.com",
    "ada@example.com\0",
    "\0",
    "a\0da@example.com",
    "ada@example.com\ud800",
    "\udfff",
    "a" * 255,
    "a" * 250 + "@example.com",
    "a" * 100_000,
    "x' OR '1'='1",
    "\u202eada@example.com",
    "ada@example.com, bob@example.com",
    "Ada <ada@example.com>",
]


class TestNormalizeEmail:
    @pytest.mark.parametrize("spelling", SPELLINGS)
    def test_spellings(self, spelling: str) -> None:
        """Case, white space and width of letters make no other address."""
        assert normalize_email(spelling) == "ada@example.com"

    @pytest.mark.parametrize(
        ("typed", "stored"),
        [
            ("Zoe\u0308@Example.com", "zo\u00eb@example.com"),
            ("H\u0331x@example.com", "\u1e96x@example.com"),
            ("ada@XN--BCHER-KVA.example", "ada@bücher.example"),
            ("ada@BÜCHER.example", "ada@bücher.example"),
            ("straße@example.com", "straße@example.com"),
            ("ada@straße.de", "ada@straße.de"),
            ("ΣΊΣΥΦΟΣ@example.com", "σίσυφος@example.com"),
            ("ada+tag@example.com", "ada+tag@example.com"),
            ("a.d.a@example.com", "a.d.a@example.com"),
        ],
    )
    def test_one_spelling(self, typed: str, stored: str) -> None:
        """Letters are composed and small, the domain is in letters; nothing else changes."""
        assert normalize_email(typed) == stored

    @pytest.mark.parametrize("garbage", GARBAGE)
    def test_garbage(self, garbage: str) -> None:
        """Text that is no address is refused, and the error does not repeat it."""
        with pytest.raises(InvalidIdentifierError) as refused:
            normalize_email(garbage)
        assert str(refused.value).startswith("That is not a")
        assert not garbage.strip() or garbage not in str(refused.value)
        assert refused.value.__cause__ is None

    def test_too_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Text that is much too long is refused before it is parsed."""

        def looked_at(*args: object, **kwargs: object) -> None:
            raise AssertionError("it was parsed")

        monkeypatch.setattr("email_validator.validate_email", looked_at)
        with pytest.raises(InvalidIdentifierError):
            normalize_email("a" * 600 + "@example.com")

    @pytest.mark.parametrize("value", [None, 1, True, b"ada@example.com", ["ada@example.com"]])
    def test_no_text(self, value: Any) -> None:
        """A value that is no text is refused in the same way."""
        with pytest.raises(InvalidIdentifierError):
            normalize_email(value)

    @given(
        local=st.text(st.characters(categories=["L", "M", "Nd"]), min_size=1, max_size=30),
        domain=st.sampled_from(["Example.com", "BÜCHER.example", "İi.example", "straße.de"]),
    )
    @settings(max_examples=500, deadline=None)
    def test_stable(self, local: str, domain: str) -> None:
        """A normalised address is stable and composed, and fits its column."""
        try:
            once = normalize_email(f"{local}@{domain}")
        except InvalidIdentifierError:
            return
        assert normalize_email(once) == once
        assert unicodedata.is_normalized("NFC", once)
        assert len(once) <= MAX_EMAIL_LENGTH

    @given(st.text() | st.emails())
    @settings(max_examples=500, deadline=None)
    def test_anything(self, text: str) -> None:
        """Any text is an address or an `InvalidIdentifierError`."""
        try:
            assert normalize_email(text).count("@") == 1
        except InvalidIdentifierError as error:
            assert str(error).startswith(("That is not an e-mail", "That is not a public e-mail"))


async def stored() -> list[str]:
    """Return the value of the column as the database stores it."""
    connection = connection_for(User)
    rows = await connection.execute_query_dict("SELECT email FROM app_user ORDER BY email")
    return [row["email"] for row in rows]


@pytest.mark.usefixtures("db")
class TestEmailField:
    async def test_written(self) -> None:
        """Whatever was typed, one spelling is stored, and the instance has it too."""
        for spelling in SPELLINGS:
            user = await User.create(email=spelling)
            assert user.email == "ada@example.com"
            assert await stored() == ["ada@example.com"]
            await user.delete()

    async def test_saved_and_updated(self) -> None:
        """Every way to write normalises: save, update, many at once."""
        user = await User.create(email="ada@example.com")
        user.email = " Grace@EXAMPLE.com"
        await user.save(update_fields=["email"])
        assert user.email == "grace@example.com"
        await User.filter(pk=user.pk).update(email="ALAN@Example.com")
        await user.refresh_from_db()
        assert user.email == "alan@example.com"
        await User.bulk_create([User(email="KURT@example.com"), User(email="Emmy@Example.com")])
        assert await stored() == ["alan@example.com", "emmy@example.com", "kurt@example.com"]

    async def test_looked_up(self) -> None:
        """Every spelling matches the stored one, in every kind of query."""
        user = await User.create(email="ada@example.com")
        other = await User.create(email="bob@example.com")
        for spelling in SPELLINGS:
            assert await User.get(email=spelling) == user
            assert await User.filter(email__in=[spelling, "x@example.com"]).get() == user
            assert await User.filter(Q(email=spelling)).get() == user
            assert await User.filter(email__not=spelling).get() == other
            assert await User.exclude(email=spelling).get() == other
            assert (await User.get_or_create(email=spelling))[1] is False

    async def test_unique(self) -> None:
        """No spelling of an address that is taken can be stored."""
        await User.create(email="ada@example.com")
        for spelling in SPELLINGS:
            with pytest.raises(IntegrityError):
                await User.create(email=spelling)

    async def test_garbage_matches_nothing(self) -> None:
        """A look-up of text that is no address matches nothing, and is no error on any database."""
        await User.create(email="ada@example.com")
        for garbage in (*GARBAGE, 1, True, b"ada@example.com"):
            assert await User.get_or_none(email=garbage) is None
            assert await User.filter(email__in=[garbage]).count() == 0
            assert await User.filter(email__not=garbage).count() == 1
            assert not await User.exists(email=garbage)

    async def test_garbage_is_not_written(self) -> None:
        """Text that is no address is refused when written, and not repeated."""
        row = User.filter(pk=(await User.create(email="ada@example.com")).pk)
        for garbage in (*GARBAGE, 1, True, b"ada@example.com"):
            writes: list[Any] = [User.create(email=garbage)]
            if not str(garbage).endswith("@example"):  # a host may know such a domain
                writes.append(row.update(email=garbage))
            for write in writes:
                with pytest.raises(ValidationError) as refused:
                    await write
                assert str(refused.value).startswith("email: That is not a")
        assert await stored() == ["ada@example.com"]

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("straße@example.com", "strasse@example.com"),
            ("ada@straße.de", "ada@strasse.de"),
            ("mike@example.com", "m\u0131ke@example.com"),
            ("mike@example.com", "m\u0130ke@example.com"),
            ("ada@example.com", "\u0430da@example.com"),
            ("paul@example.com", "pau1@example.com"),
            ("office@example.com", "o\ufb03ce@example.com"),
            ("ada@example.com", "ada+tag@example.com"),
            ("ada@example.com", "a.da@example.com"),
            ("ada@example.com", "ad_@example.com"),
            ("ada@example.com", "%@example.com"),
        ],
    )
    async def test_look_alikes(self, one: str, other: str) -> None:
        """Addresses that only look alike are two accounts, and neither finds the other."""
        first, second = await User.create(email=one), await User.create(email=other)
        assert first.email != second.email
        assert await User.get(email=one) == first
        assert await User.get(email=other) == second

    async def test_part_of_an_address(self) -> None:
        """A part of an address can be compared with and searched for."""
        await User.bulk_create([User(email=f"{name}@example.com") for name in "acz"])
        assert await User.filter(email__gt="b").count() == 2
        assert await User.filter(email__startswith="a").count() == 1

    async def test_no_address(self) -> None:
        """A missing address is None, where the column allows it."""
        contact = await Contact.create(email=None)
        assert (await Contact.get(id=contact.id)).email is None
        assert await Contact.filter(email__isnull=True).count() == 1

    async def test_shorter_column(self) -> None:
        """An address that is too long for the column is refused when written, and matches nothing."""
        address = f"{'a' * 60}@{'b' * 40}.example.com"
        assert normalize_email(address) == address
        with pytest.raises(ValidationError):
            await Contact.create(email=address)
        assert await Contact.get_or_none(email=address) is None

    async def test_beginning_of_an_address(self) -> None:
        """An address that begins like a stored one, and is longer than the column, is another."""
        stored_ = await Contact.create(email=f"{'a' * 60}@{'b' * 28}.example.co")
        assert len(stored_.email) == 100
        assert await Contact.get_or_none(email=stored_.email + "m") is None
