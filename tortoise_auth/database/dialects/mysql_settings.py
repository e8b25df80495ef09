"""What MariaDB and MySQL must be set to, or accounts would be confused and logins lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.models import Model

from tortoise_auth.exceptions import ConfigurationError

_FOUND_ROWS = 2
"""The flag by which an UPDATE counts the rows it matched; without it those it changed."""

_READ_COMMITTED = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"

_SETTINGS = (
    'connections={"default": {"engine": "tortoise.backends.mysql", "credentials": {..., '
    f'"client_flag": {_FOUND_ROWS}, "init_command": "{_READ_COMMITTED}"}}}}'
)

_VARIABLES = (
    "SHOW SESSION VARIABLES WHERE Variable_name IN "
    "('version', 'tx_isolation', 'transaction_isolation', 'innodb_rollback_on_timeout')"
)

_COLUMNS = (
    "SELECT column_name AS name, collation_name AS collation, column_type AS kind, "
    "is_nullable AS nullable, column_default AS standard "
    "FROM information_schema.columns WHERE table_schema = COALESCE(%s, DATABASE()) "
    "AND table_name = %s AND collation_name IS NOT NULL"
)

EXACT = (
    "CHARACTER SET utf8mb4 /*M! COLLATE utf8mb4_nopad_bin *//*!80017 COLLATE utf8mb4_0900_bin */"
)
"""Added to the type of a column that tells all texts apart. Each server reads the comment for it."""

_NO_PAD = "utf8mb4_nopad_bin"

_EXACT = ("nopad_bin", "0900_bin", "binary")
"""Collations with these endings tell all texts apart. Those in ``_bin`` alone ignore blanks at the end."""


class Requirements:
    """What is required of one client of Tortoise, and what of it has been verified.

    Attributes:
        timeout_ends_transaction: Whether a lock that was waited for in vain rolls back everything.
    """

    def __init__(self, client: BaseDBAsyncClient) -> None:
        self._client: Any = client
        self._expected: set[type[Model]] = set()
        self._verified: set[type[Model]] = set()
        self.timeout_ends_transaction = False

    @classmethod
    def of(cls, client: BaseDBAsyncClient) -> Requirements:
        """Return those of *client*."""
        requirements: Requirements | None = vars(client).get(_REQUIREMENTS)
        if requirements is None:
            requirements = cls(client)
            setattr(client, _REQUIREMENTS, requirements)
        return requirements

    def prepare(self) -> None:
        """Set what can be set, as long as no connection is open. Other flags of the host stay."""
        if self._client._pool is None:
            extra = self._client.extra
            extra["client_flag"] = int(extra.get("client_flag", 0)) | _FOUND_ROWS
            extra.setdefault("init_command", _READ_COMMITTED)

    def expect(self, model: type[Model]) -> bool:
        """Let the next `verify` check the columns of *model*; false if that was done."""
        if model in self._verified:
            return False
        self._expected.add(model)
        return True

    async def verify(self, connection: BaseDBAsyncClient) -> None:
        """Check what is expected, unless that is done.

        Raises:
            ConfigurationError: Something is not as it must be.
        """
        models = self._expected - self._verified
        if models:
            exact = await self._verify_settings(connection)
            wrong = [
                statement
                for model in models
                for statement in await _mending(connection, model, exact)
            ]
            if wrong:
                raise ConfigurationError(
                    "A column compares text by a collation that takes different texts for the "
                    "same, so that accounts could be confused ('straße' and 'strasse', 'a' and 'a '). "
                    f"Run: {' '.join(wrong)}"
                )
            self._verified |= models

    async def _verify_settings(self, connection: BaseDBAsyncClient) -> str:
        """Check version, row counts and isolation; return the collation that tells all texts apart."""
        rows = await connection.execute_query_dict(_VARIABLES)
        variables = {row["Variable_name"]: row["Value"] for row in rows}
        _refuse_old(variables["version"])
        flags = int(self._client._template.get("client_flag", 0))
        level = variables.get("transaction_isolation") or variables.get("tx_isolation")
        for right, what in (
            (flags & _FOUND_ROWS, "UPDATE must count the rows it matches (CLIENT.FOUND_ROWS)"),
            (level == "READ-COMMITTED", "the isolation level must be READ COMMITTED"),
        ):
            if not right:
                raise ConfigurationError(
                    f"MariaDB or MySQL is connected in a way in which logins would fail: {what}. "
                    "Connect after Tortoise.init has registered tortoise_auth.models, or set it: "
                    + _SETTINGS
                )
        self.timeout_ends_transaction = variables["innodb_rollback_on_timeout"] == "ON"
        return _NO_PAD if "MariaDB" in variables["version"] else "utf8mb4_0900_bin"


_REQUIREMENTS = "_tortoise_auth_requirements"


def _refuse_old(version: str) -> None:
    numbers = tuple(int(part) for part in version.partition("-")[0].split(".")[:3])
    oldest = (10, 6) if "MariaDB" in version else (8, 0, 17)
    if numbers < oldest:
        raise ConfigurationError(
            f"tortoise_auth works with MariaDB 10.6 or newer and MySQL 8.0.17 or newer; this is {version}"
        )


async def _mending(connection: BaseDBAsyncClient, model: type[Model], collation: str) -> list[str]:
    """Return the statements that give a model's columns a collation that tells all texts apart."""
    exact = set(_exact_columns(model))
    table = model._meta.db_table
    rows = await connection.execute_query_dict(_COLUMNS, [model._meta.schema or None, table])
    return [
        f"ALTER TABLE `{table}` MODIFY `{row['name']}` {row['kind']} CHARACTER SET utf8mb4 "
        f"COLLATE {collation}{'' if row['nullable'] == 'YES' else ' NOT NULL'}"
        f"{_default(row['standard'], collation)};"
        for row in rows
        if row["name"] in exact and not row["collation"].endswith(_EXACT)
    ]


def _default(text: str | None, collation: str) -> str:
    if text is None:
        return ""
    # MariaDB gives it as it is written in SQL, MySQL as it is.
    return f" DEFAULT {text}" if collation == _NO_PAD else f" DEFAULT '{text}'"


def _exact_columns(model: type[Model]) -> Iterable[str]:
    """Return the columns that people log in with, and those that are declared to be exact."""
    identifiers = {"email", getattr(model, "identifier_field", "")}
    identifiers |= set(getattr(model, "identifier_fields", ()))
    meta = model._meta
    return (
        column
        for name, column in meta.fields_db_projection.items()
        if name in identifiers or getattr(meta.fields_map[name], "exact", False)
    )
