"""Adopt a table of users that has rows: what must change before they log in here, and what cannot."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from pypika_tortoise.terms import Field
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.exceptions import IntegrityError
from tortoise.queryset import QuerySet

from tortoise_auth.database import BATCH_SIZE, batches, dialect_of, root_of, transaction
from tortoise_auth.exceptions import ConfigurationError, InvalidIdentifierError
from tortoise_auth.fields import normalize_email
from tortoise_auth.legible import listed, named
from tortoise_auth.models import Session, user_table
from tortoise_auth.passwords import PasswordHasher, is_hash, is_usable_hash, scheme_of
from tortoise_auth.users.changes import replace_values, shared_connection
from tortoise_auth.users.model import AbstractUser

Row: TypeAlias = Mapping[str, object]
"""A row as the driver returns it, by the names of the columns."""

MAX_KEYS = 1000
"""Primary keys that are kept for one finding; what is beyond is counted."""

_ROWS_READ_AT_ONCE = 500  # SQLite before 3.32 takes 999 values in a statement
_UNSET_VERSION = 0
"""What the database writes into ``session_version`` of the rows that were there before the column."""


@dataclass(slots=True)
class Accounts:
    """Accounts that share a finding.

    Attributes:
        count: How many there are.
        keys: The primary keys of the first `MAX_KEYS`, as text.
    """

    count: int = 0
    keys: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        """Count an account."""
        self.count += 1
        if len(self.keys) < MAX_KEYS:
            self.keys.append(key)


@dataclass(frozen=True, slots=True)
class StoredScheme:
    """A kind of stored hashes.

    Attributes:
        name: What people call the format; ``None`` if it is not known.
        obstacle: Why no password matches such a hash here; ``None`` if one can.
    """

    name: str | None
    obstacle: str | None


@dataclass(slots=True, kw_only=True)
class AdoptionReport:
    """What was found in the table, and what was changed or would be.

    No address is in it: accounts are named by their primary keys.

    Attributes:
        applied: Whether changes were written; otherwise they are only counted.
        rows_read: Progress: rows read so far. Each row is read twice.
        rows_total: How many rows will have been read in the end.
        accounts: Accounts that were looked at.
        normalized: By column, how many values get the spelling under which they are looked up:
            identifiers, and on SQLite times.
        unreadable: By column, accounts whose identifier cannot be one. They are left alone.
        colliding: By column that has to be unique, groups of accounts that would get one and the
            same spelling. They are left alone.
        hashes: By scheme, the accounts with a stored hash of it.
        without_password: Accounts whose stored value is made to match no password, or empty.
        hashes_copied: How many hashes are copied from the other column.
        versions_set: How many get a random ``session_version``.
        versions_in_use: How many keep the one that the database wrote, because sessions rely on it.
        changed_meanwhile: Accounts that something else changed between reading and writing, and
            that were left alone therefore.
    """

    applied: bool
    rows_read: int = 0
    rows_total: int = 0
    accounts: int = 0
    normalized: Counter[str] = field(default_factory=Counter)
    unreadable: defaultdict[str, Accounts] = field(default_factory=lambda: defaultdict(Accounts))
    colliding: dict[str, list[Accounts]] = field(default_factory=dict)
    hashes: defaultdict[StoredScheme, Accounts] = field(
        default_factory=lambda: defaultdict(Accounts)
    )
    without_password: int = 0
    hashes_copied: int = 0
    versions_set: int = 0
    versions_in_use: int = 0
    changed_meanwhile: Accounts = field(default_factory=Accounts)

    @property
    def changes(self) -> int:
        """How many columns were changed, or would be."""
        return self.normalized.total() + self.hashes_copied + self.versions_set

    @property
    def is_settled(self) -> bool:
        """Whether no account needs a decision, or a second run."""
        refused = any(each.obstacle for each in self.hashes)
        return not (refused or self.unreadable or self.colliding or self.changed_meanwhile.count)


class Adoption:
    """Makes the accounts of a table that was filled by another program fit for logins here.

    The columns of `AbstractUser` must be there. Nothing is merged and no account is deleted. Each
    account is changed by one UPDATE that matches only what was read, and a hundred of them are one
    short transaction: so the application may run meanwhile, and the work may be stopped at any
    moment and done again.

    Memory: eight bytes for each row and unique column of identifiers, and 500 rows.

    Args:
        user_model: The host's user model.
        hasher: What will check the passwords.
        hash_column: A column with hashes in the same table. They are copied to ``password`` where
            that is empty.
        apply: Whether to write; by default changes are only counted.

    Raises:
        ConfigurationError: Users and sessions are on different connections, or *hash_column* is
            that of ``password`` itself.
    """

    def __init__(
        self,
        user_model: type[AbstractUser],
        hasher: PasswordHasher,
        *,
        hash_column: str | None = None,
        apply: bool = False,
    ) -> None:
        columns = user_model._meta.fields_db_projection
        self.report = AdoptionReport(applied=apply)
        self._model = user_model
        self._hasher = hasher
        self._apply = apply
        self._key = user_model._meta.db_pk_column
        self._password, self._version, self._last_login = (
            columns[name] for name in ("password", "session_version", "last_login")
        )
        if hash_column == self._password:
            raise ConfigurationError(
                f"{user_model.__name__}.password is the column {named(hash_column)} already: its "
                "hashes stay where they are"
            )
        self._hash_column = hash_column
        names = user_model.identifiers()
        self._spelling: dict[str, Callable[[object], str | None]] = {
            columns[name]: _spelling(user_model, name) for name in names if name in columns
        }
        self._required = columns[user_model.identifier_field]
        fields_map = user_model._meta.fields_map
        unique = [columns[name] for name in names if name in columns and fields_map[name].unique]
        self._ambiguous: dict[str, dict[int, Accounts]] = {
            column: {} for column in {self._required, *unique}
        }

    async def run(self) -> AsyncGenerator[AdoptionReport, None]:
        """Do the work, and yield the `report` after each part of it, for a progress bar.

        Raises:
            ConfigurationError: A column is missing, or the database is not as it must be.
        """
        connection = root_of(shared_connection(self._model))
        await dialect_of(connection).verify(connection)
        await self._require_columns(connection)
        self.report.rows_total = 2 * await QuerySet(self._model).using_db(connection).count()
        spellings = {column: _Spellings() for column in self._ambiguous}
        async for rows in self._pages(connection, paced=False):
            for column, seen in spellings.items():
                seen.add_all(map(self._spelling[column], (row[column] for row in rows)))
            yield self.report
        for column, seen in spellings.items():
            self._ambiguous[column] = {digest: Accounts() for digest in seen.repeated()}
        async for rows in self._pages(connection, paced=self._apply):
            held = await self._accounts_with_sessions(connection, rows)
            changes = [self._change_of(row, held) for row in rows]
            if self._apply:
                await self._write(connection, [each for each in changes if each.new])
            for change in changes:
                self._note(change)
            yield self.report
        self.report.colliding = {
            column: list(groups.values()) for column, groups in self._ambiguous.items() if groups
        }
        yield self.report

    async def _require_columns(self, connection: BaseDBAsyncClient) -> None:
        # By their names in a row: SQLite takes a quoted name that is no column for a text.
        query = connection.query_class.from_(self._model._meta.basetable).select("*").limit(1)
        for row in await connection.execute_query_dict(*query.get_parameterized_sql()):
            if missing := [each for each in self._columns if each not in row]:
                raise ConfigurationError(
                    f"The table {named(user_table(self._model))} has no column {listed(missing)}. "
                    f"It has: {listed(row)}. Make a migration for {self._model.__name__} and run "
                    "it, or name another column."
                )

    @property
    def _columns(self) -> list[str]:
        names = [self._key, *self._spelling, self._password, self._version, self._last_login]
        more = [self._hash_column] if self._hash_column is not None else []
        return list(dict.fromkeys([*names, *more]))

    async def _pages(
        self, connection: BaseDBAsyncClient, *, paced: bool
    ) -> AsyncIterator[Sequence[Row]]:
        """Yield all rows in the order of their keys, in short batches with pauses if *paced*."""
        pauses, size = batches(), BATCH_SIZE if paced else _ROWS_READ_AT_ONCE
        key = Field(self._key)
        query = connection.query_class.from_(self._model._meta.basetable).select(*self._columns)
        page = query.orderby(key).limit(size)
        while True:
            if paced:
                await anext(pauses)
            rows = await connection.execute_query_dict(*page.get_parameterized_sql())
            if rows:
                self.report.rows_read += len(rows)
                yield rows
            if len(rows) < size:
                return
            page = query.where(key > rows[-1][self._key]).orderby(key).limit(size)

    async def _accounts_with_sessions(
        self, connection: BaseDBAsyncClient, rows: Iterable[Row]
    ) -> set[object]:
        """Return the keys of accounts, of those with the version of the database, with sessions."""
        keys = [self._key_of(row) for row in rows if row[self._version] == _UNSET_VERSION]
        if not keys:
            return set()
        sessions = Session.filter(user_table=user_table(self._model), user_id__in=keys)
        return set(await sessions.using_db(connection).distinct().values_list("user_id", flat=True))

    def _change_of(self, row: Row, held: set[object]) -> _Change:
        key = self._key_of(row)
        spellings = {**self._new_spellings(row, key), **self._new_moment(row)}
        change = _Change(row, key, spellings, self._hash_to_copy(row))
        columns = list(change.new)
        if change.copied and self._hash_column is not None:
            columns.append(self._hash_column)
        if row[self._version] == _UNSET_VERSION:
            change.version_in_use = key in held
            if not change.version_in_use:
                change.version = {self._version: 1 + secrets.randbelow((1 << 30) - 1)}
                # A login that comes between must not lose its session: it writes `last_login`.
                columns += [self._version, self._last_login]
        change.read = {column: row[column] for column in columns}
        return change

    async def _write(self, connection: BaseDBAsyncClient, changes: Sequence[_Change]) -> None:
        """Write changes in one transaction, and note those whose row is another one by now."""
        try:
            async with transaction(connection) as together:
                for change in changes:
                    change.is_late = not await self._replace(together, change)
        except IntegrityError:
            # Another account took a spelling a moment ago, and the transaction is lost: one by one.
            for change in changes:
                try:
                    change.is_late = not await self._replace(connection, change)
                except IntegrityError:
                    change.is_late = True

    async def _replace(self, connection: BaseDBAsyncClient, change: _Change) -> bool:
        key = change.row[self._key]
        return await replace_values(self._model, key, connection, read=change.read, new=change.new)

    def _note(self, change: _Change) -> None:
        report = self.report
        report.accounts += 1
        report.versions_in_use += change.version_in_use
        self._note_hash(change.row, change.key)
        if change.is_late:
            report.changed_meanwhile.add(change.key)
            return
        report.normalized.update(change.spellings.keys())
        report.hashes_copied += bool(change.copied)
        report.versions_set += bool(change.version)

    def _new_spellings(self, row: Row, key: str) -> dict[str, str]:
        """Return the identifiers to change, by column, and note those that cannot be."""
        new: dict[str, str] = {}
        for column, spell in self._spelling.items():
            held = row[column]
            if not held and column != self._required:
                continue  # an account that logs in by name may have no address
            spelling = spell(held)
            if spelling is None:
                self.report.unreadable[column].add(key)
            elif group := self._ambiguous.get(column, {}).get(_digest(spelling)):
                group.add(key)
            elif spelling != held:
                new[column] = spelling
        return new

    def _new_moment(self, row: Row) -> dict[str, str]:
        """Return ``last_login`` as SQLite has to hold it, which compares times as texts.

        Django leaves the offset out there. A password whose account is found by another spelling
        of the time would never be locked.
        """
        held = row[self._last_login]
        if not isinstance(held, str):
            return {}
        spelling = str(self._model._meta.fields_map["last_login"].to_python_value(held))
        return {} if spelling == held else {self._last_login: spelling}

    def _hash_to_copy(self, row: Row) -> dict[str, str]:
        """Return the hash of the other column for ``password``; what is no hash is not copied."""
        if self._hash_column is None or row[self._password]:
            return {}
        hashed = row[self._hash_column]
        if not isinstance(hashed, str) or not is_usable_hash(hashed):
            return {}
        known = is_hash(hashed) or self._hasher.knows(hashed)
        return {self._password: hashed} if known else {}

    def _note_hash(self, row: Row, key: str) -> None:
        stored = row[self._password]
        if not stored and self._hash_column is not None:
            stored = row[self._hash_column]
        if not isinstance(stored, str) or not is_usable_hash(stored):
            self.report.without_password += 1
            return
        scheme = StoredScheme(scheme_of(stored), self._hasher.obstacle(stored))
        self.report.hashes[scheme].add(key)

    def _key_of(self, row: Row) -> str:
        """Return the primary key as sessions hold it."""
        return str(self._model._meta.pk.to_python_value(row[self._key]))


@dataclass(slots=True)
class _Change:
    """What is to be done to one account.

    Attributes:
        row: What was read.
        key: The primary key, as text.
        spellings, copied, version: New values, by column.
        version_in_use: It has sessions that rely on the version of the database.
        read: What the row must still hold when it is written to.
        is_late: It was not written to, because it held something else.
    """

    row: Row
    key: str
    spellings: Mapping[str, str]
    copied: Mapping[str, str]
    version: Mapping[str, int] = field(default_factory=dict)
    version_in_use: bool = False
    read: Row = field(default_factory=dict)
    is_late: bool = False

    @property
    def new(self) -> Row:
        """Every new value, by column."""
        return {**self.spellings, **self.copied, **self.version}


class _Spellings:
    """Finds what was added more than once, in eight bytes for each, and no address.

    Two of ten million spellings share a digest by chance once in 400 000 tables; both accounts
    would be reported, and left alone.
    """

    def __init__(self) -> None:
        # By the last byte, so that `repeated` counts a 256th of the table at a time.
        self._parts = [array("Q") for _ in range(256)]

    def add_all(self, spellings: Iterable[str | None]) -> None:
        """Add spellings; ``None`` is none."""
        for spelling in spellings:
            if spelling is not None:
                digest = _digest(spelling)
                self._parts[digest & 0xFF].append(digest)

    def repeated(self) -> set[int]:
        """Return the digests that were added more than once."""
        return {
            digest for part in self._parts for digest, times in Counter(part).items() if times > 1
        }


def _digest(spelling: str) -> int:
    digest = hashlib.blake2b(spelling.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _spelling(user_model: type[AbstractUser], name: str) -> Callable[[object], str | None]:
    """Return what finds the spelling under which a column is looked up."""
    if name == user_model.identifier_field:
        return user_model.comparable_identifier
    if name in user_model.identifier_fields:
        return partial(user_model.comparable_in, name)
    return partial(_comparable_email, getattr(user_model._meta.fields_map[name], "max_length", 255))


def _comparable_email(limit: int, value: object) -> str | None:
    try:
        normal = normalize_email(value, internal_domains=None)  # type: ignore[arg-type]
    except InvalidIdentifierError:
        return None
    return normal if len(normal) <= limit else None
