"""Which dialect a connection speaks."""

from __future__ import annotations

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.connection import get_connections
from tortoise.context import get_current_context

from tortoise_auth.database.dialects.dialect import Dialect
from tortoise_auth.database.dialects.mysql import MySql
from tortoise_auth.database.dialects.postgres import Asyncpg, Psycopg
from tortoise_auth.database.dialects.sqlite import Sqlite
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.legible import named

_DIALECTS: dict[str, Dialect] = {
    "tortoise.backends.sqlite": Sqlite(),
    "tortoise.backends.asyncpg": Asyncpg(),
    "tortoise.backends.psycopg": Psycopg(),
    "tortoise.backends.mysql": MySql(),
}


def dialect_of(connection: BaseDBAsyncClient) -> Dialect:
    """Return the dialect of a connection or transaction, by the backend of Tortoise it comes from.

    Raises:
        ConfigurationError: It is none that this package works with.
    """
    dialect: Dialect | None = getattr(connection, _DIALECT, None)
    if dialect is None:
        dialect = _chosen(type(connection))
        setattr(connection, _DIALECT, dialect)
    return dialect


_DIALECT = "_tortoise_auth_dialect"


def _chosen(kind: type) -> Dialect:
    # A host may have a client of its own, derived from one of Tortoise's.
    for each in kind.__mro__:
        dialect = _DIALECTS.get(each.__module__.removesuffix(".client"))
        if dialect is not None:
            return dialect
    raise ConfigurationError(
        f"tortoise_auth does not work with the database of {named(kind.__module__)}. It works with "
        "SQLite (sqlite://), PostgreSQL (asyncpg:// or psycopg://), and MariaDB 10.6 or MySQL 8 "
        "or newer (mysql://, by asyncmy or aiomysql)."
    )


def reads_naive_times() -> bool:
    """Return whether a driver in use here reads times without an offset; they are in UTC."""
    if get_current_context() is None:
        return False
    clients = get_connections()._get_storage().values()
    return any(client.capabilities.dialect == MySql.language for client in clients)
