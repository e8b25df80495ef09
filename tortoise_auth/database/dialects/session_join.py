"""The statement that reads a session together with its user."""

from __future__ import annotations

from typing import NamedTuple

from tortoise.models import Model

from tortoise_auth.database.dialects.dialect import Dialect


class SessionJoin(NamedTuple):
    """The statement, and the names that its columns have in a row.

    Attributes:
        statement: Takes ``pk`` of the user, ``id``, ``user_id`` and ``user_table`` of the session.
        session: The alias of each column of the session.
        user: The alias of each column of the user.
    """

    statement: str
    session: dict[str, str]
    user: dict[str, str]


def session_join(dialect: Dialect, session: type[Model], user: type[Model]) -> SessionJoin:
    """Return the statement for a dialect and the models of a host."""
    quoted = dialect.quoted
    of_session = {column: f"s_{column}" for column in session._meta.fields_db_projection.values()}
    of_user = {column: f"u_{column}" for column in user._meta.fields_db_projection.values()}
    selected = [
        f"{table}.{quoted(column)} AS {quoted(alias)}"
        for table, columns in (("s", of_session), ("u", of_user))
        for column, alias in columns.items()
    ]
    # The user by its parsed key, and no cast of `s.user_id`: so PostgreSQL uses the index, and
    # casts no row of another model, whose key may be no number.
    statement = (
        f"SELECT {', '.join(selected)} "
        f"FROM {_table(session, dialect)} s JOIN {_table(user, dialect)} u "
        f"ON u.{quoted(user._meta.db_pk_column)} = {{pk}} "
        "WHERE s.id = {id} AND s.user_id = {user_id} AND s.user_table = {user_table}"
    )
    return SessionJoin(statement, of_session, of_user)


def _table(model: type[Model], dialect: Dialect) -> str:
    schema, table = model._meta.schema, dialect.quoted(model._meta.db_table)
    return f"{dialect.quoted(schema)}.{table}" if schema else table
