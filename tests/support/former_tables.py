"""Tables of a thousand users as other programs make and fill them, with the passwords behind the hashes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from uuid import NAMESPACE_DNS, uuid5

import argon2

from tests.support.accounts import PASSWORD
from tests.support.projects import EmptyDatabase

ROWS = 1000
Value: TypeAlias = str | bool | int | None

MD5 = hashlib.md5(PASSWORD.encode()).hexdigest()
UNUSABLE = "!BnCQINElGCSRgOdRJjC37VH4YJDjrtwaOAEQTTXl"

# Each of the password "correct horse battery staple", at the usual cost of the program.
DJANGO = (
    # Django 5.2.19, the hashers of its PASSWORD_HASHERS and those that it has besides
    "pbkdf2_sha256$1000000$5ofylpyvjZD6BaGQltekx7$7HVSdgZSRmzFwRBYlF1Qx8RUHKgEVZ6SBubxQcZ76s0=",
    "pbkdf2_sha1$1000000$8H6na4hXl82ZhyjWRWnjXM$WUNDDZrWZMGJf/TrOI/e+LcHvyk=",
    "argon2$argon2id$v=19$m=102400,t=2,p=8$TVNQRGlRQkhQcnVOT3BUWkhuUDJsUQ$+jki9mWnNRrfVtGYK5wZGJtUnNIibkILcHmZ4mv0Q3s",
    "bcrypt_sha256$$2b$12$omAMM7ko7jTHqNt/cd4qQuZj0PbFWn9OYPiURhfKmC2awJPuO4PQ2",
    "bcrypt$$2b$12$vCDCdIx2QXYctkSjfQEcIO11OBYO4gBovRu.4fa2Spc473DHtnd5q",
    "scrypt$16384$IbzSXoaNZRuB6NEhT9d9kT$8$5$LHQLf1EYvgrBJ7Js2vyMUBOUA3akgU5TPY3UYMxsiR4CtjkTCVw3QTbIigBJ2iSI6M/x10gHnLYxC66azbd6NA==",
)
FASTAPI_USERS = (
    # FastAPI Users 15.0.5 with pwdlib 0.3.0: today's, and that of earlier versions
    "$argon2id$v=19$m=65536,t=3,p=4$iIBsWx2XLkhfIu8lCIQ71w$JwYFTFOzGjzT9RLnsuLtNuRzk3PqxDMScs+oXYJOfvk",
    "$2b$12$M6bT83EcMesqkAhRfaeGlugpEwhuWaRG3UhJsq/1zfIaU2HlOqfNa",
)
PASSLIB_AND_WERKZEUG = (
    # Werkzeug 3.1.9
    "scrypt:32768:8:1$zMOGv4f7RgyNXxu0$5c0a1251fc1955c1ddf6fec0383082028722627ecbdb1b9229ac427e37dcea1138af10f0fd0f185868dd12450d2028ddf3e56179ae18ebf7af6f5024c0cf389c",
    "pbkdf2:sha256:1000000$FPM6aqG8VWT7Hhk7$d8c62caf7a1ffc712a6c601c7f6f23f0dd321d19a965316932a5739a5108101d",
    # libpass 1.9.4
    "$pbkdf2-sha256$29000$XisFIKQ05pwTIkSIcc5Zyw$724kP7xZvCEwrIdPcCzn9x0ZnsXbGt5GoOmIyGO4uoo",
    "$2b$12$16DFoJSEkOolCO2T03fpbexGW6VZUyO.JCumOKuoSQjyRWhESPitm",
    "$argon2id$v=19$m=65536,t=3,p=4$XWuN0TqH0HoPoXTO+b/3vg$t1pXWmrYH8g5F3YdwGYWmEWZMZsDX7ESryhQaqGSZls",
    "$scrypt$ln=16,r=8,p=1$lBKCUIrR+n+vldJ67917zw$1ACN6i6fKr2yM+G+07tmg/Q5y1V5axeLn4P3QyY7qzs",
    "$bcrypt-sha256$v=2,t=2b,r=12$xsM6KVpLAEldBkNybE930u$pdiJcY26Kpk14h6Us80RJoe/9Gn/e0C",
)


@dataclass(frozen=True)
class Account:
    """A row of a former table.

    Attributes:
        key: Its primary key, as text.
        typed: What its owner types to log in.
        password: Its password; ``None`` if no password logs in.
        values: The columns.
    """

    key: str
    typed: str
    password: str | None
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Former:
    """A table of another program.

    Attributes:
        table: Its name.
        definitions: The statements that made it, by the kind of the database.
        accounts: Its rows.
    """

    table: str
    definitions: Mapping[str, Sequence[str]]
    accounts: Sequence[Account]

    def create(self, database: EmptyDatabase) -> None:
        """Make the table, as its program did."""
        for statement in self.definitions[database.kind]:
            database.execute(statement)

    def fill(self, database: EmptyDatabase) -> None:
        """Insert the rows."""
        mark = "`" if database.kind == "mariadb" else '"'
        columns = ", ".join(f"{mark}{name}{mark}" for name in self.accounts[0].values)
        for start in range(0, len(self.accounts), 250):
            rows = ", ".join(
                f"({', '.join(map(_literal, each.values.values()))})"
                for each in self.accounts[start : start + 250]
            )
            database.execute(f"INSERT INTO {mark}{self.table}{mark} ({columns}) VALUES {rows}")


def _literal(value: Value) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "NULL" if value is None else str(value)


def _stored(
    real: Sequence[str], cheap: Callable[[str, str], str], unsupported: str
) -> Iterator[tuple[str, str | None]]:
    """Yield the hash of each row with its password: each real one, some without, and cheap ones."""
    for each in real:
        yield each, PASSWORD
    yield unsupported, None
    for number in range(len(real) + 1, ROWS):
        password = f"password of {number}"
        yield cheap(password, f"salt{number}"), password


def _addresses() -> Iterator[str]:
    """Yield the address of each row: most are fine, some are typed in another way, a few are worse."""
    for number in range(ROWS):
        address = f"user{number}@example.com"
        special = {
            500: "first.user@example.com",
            501: " First.User@example.com",  # would become that of 500
            502: "nobody at example",
        }
        if number in special:
            yield special[number]
        elif number % 10 == 3:
            yield address.title()
        elif number % 100 == 7:
            yield f"  {address} "
        else:
            yield address


def _pbkdf2_of_django(password: str, salt: str) -> str:
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), 1)
    return f"pbkdf2_sha256$1${salt}${base64.b64encode(digest).decode()}"


def _argon2(password: str, salt: str) -> str:
    hasher = argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    return hasher.hash(password, salt=salt.ljust(16).encode())


def _pbkdf2_of_passlib_or_werkzeug(password: str, salt: str) -> str:
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), 1)
    if int(salt[4:]) % 2:
        return f"pbkdf2:sha256:1${salt}${digest.hex()}"
    parts = (base64.b64encode(each).decode().rstrip("=") for each in (salt.encode(), digest))
    return "$pbkdf2-sha256$1$" + "$".join(parts).replace("+", ".")


def _accounts_of_django(kind: str) -> Iterator[Account]:
    # SQLite and MariaDB hold UTC without saying so.
    moment = "2024-05-06 07:08:09.123456" + "+00:00" * (kind == "postgres")
    names = {600: "fiona", 601: "\ufb01ona", 602: "x" * 3 + " ", 603: "\uff41lan"}
    stored = _stored(DJANGO, _pbkdf2_of_django, f"md5$salt${MD5}")
    for number, (address, (hashed, password)) in enumerate(zip(_addresses(), stored, strict=True)):
        username = names.get(number, f"user{number}")
        if number % 100 == 50:
            hashed, password = UNUSABLE, None
        if number % 100 == 51:
            address = ""
        yield Account(
            str(number + 1),
            username,
            None if number == 601 else password,  # 600 has the name of both
            {
                "id": number + 1,
                "password": hashed,
                "last_login": moment if number % 2 else None,
                "is_superuser": False,
                "username": username,
                "first_name": "",
                "last_name": "",
                "email": address,
                "is_staff": False,
                "is_active": True,
                "date_joined": moment,
            },
        )


def django(kind: str) -> Former:
    """Return ``auth_user`` of Django 5.2."""
    columns = (
        '"password" varchar(128) NOT NULL, "last_login" {time} NULL, "is_superuser" {bool} NOT NULL, '
        '"username" varchar(150) NOT NULL UNIQUE, "first_name" varchar(150) NOT NULL, '
        '"last_name" varchar(150) NOT NULL, "email" varchar(254) NOT NULL, '
        '"is_staff" {bool} NOT NULL, "is_active" {bool} NOT NULL, "date_joined" {time} NOT NULL)'
    )
    keys = {
        "sqlite": "integer NOT NULL PRIMARY KEY AUTOINCREMENT",
        "postgres": "integer NOT NULL PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY",
        "mariadb": "integer AUTO_INCREMENT NOT NULL PRIMARY KEY",
    }
    types = {
        "sqlite": {"time": "datetime", "bool": "bool"},
        "postgres": {"time": "timestamp with time zone", "bool": "boolean"},
        "mariadb": {"time": "datetime(6)", "bool": "bool"},
    }
    definitions = {
        each: [f'CREATE TABLE "auth_user" ("id" {keys[each]}, {columns.format(**types[each])}']
        for each in keys
    }
    definitions["mariadb"] = [each.replace('"', "`") for each in definitions["mariadb"]]
    return Former("auth_user", definitions, list(_accounts_of_django(kind)))


def _accounts_by_address(
    stored: Iterator[tuple[str, str | None]],
    key: Callable[[int], str | int],
    values: Callable[[str], dict[str, Value]],
) -> Iterator[Account]:
    for number, (address, (hashed, password)) in enumerate(zip(_addresses(), stored, strict=True)):
        yield Account(
            str(key(number)),
            address,
            None if number in (501, 502) else password,  # 500 has the address of 501, too
            {"id": key(number), "email": address, **values(hashed)},
        )


def fastapi_users(kind: str) -> Former:
    """Return ``user`` as SQLAlchemy makes it of ``SQLAlchemyBaseUserTableUUID``, FastAPI Users 15."""
    definition = (
        'CREATE TABLE "user" (id {} NOT NULL, email VARCHAR(320) NOT NULL, '
        "hashed_password VARCHAR(1024) NOT NULL, is_active BOOLEAN NOT NULL, "
        "is_superuser BOOLEAN NOT NULL, is_verified BOOLEAN NOT NULL, PRIMARY KEY (id))"
    )
    index = 'CREATE UNIQUE INDEX ix_user_email ON "user" (email)'
    types = {"sqlite": "CHAR(36)", "postgres": "UUID", "mariadb": "CHAR(36)"}
    definitions = {each: [definition.format(types[each]), index] for each in types}
    definitions["mariadb"] = [each.replace('"', "`") for each in definitions["mariadb"]]
    accounts = _accounts_by_address(
        _stored(FASTAPI_USERS, _argon2, MD5),
        lambda number: str(uuid5(NAMESPACE_DNS, f"user{number}.example.com")),
        lambda hashed: {
            "hashed_password": hashed,
            "is_active": True,
            "is_superuser": False,
            "is_verified": True,
        },
    )
    return Former("user", definitions, list(accounts))


def passlib_or_werkzeug(kind: str) -> Former:
    """Return a table that the host's own migrations make."""
    accounts = _accounts_by_address(
        _stored(PASSLIB_AND_WERKZEUG, _pbkdf2_of_passlib_or_werkzeug, MD5),
        lambda number: number + 1,
        lambda hashed: {"password_hash": hashed, "nickname": "x"},
    )
    return Former("user", {}, list(accounts))
