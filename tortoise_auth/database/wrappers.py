"""Tortoise's wrappers of a connection: the database itself, a transaction, a savepoint."""

from __future__ import annotations

import contextvars
import copy
from typing import Any

from tortoise.backends.base.client import BaseDBAsyncClient, TransactionalDBClient
from tortoise.connection import get_connections
from tortoise.context import get_current_context
from tortoise.exceptions import TransactionManagementError

ENDS = "_tortoise_auth_ends"
"""Attribute of a transaction that is being committed or rolled back: nothing may begin in it."""


def context_outside_transactions(*, still_open: bool = False) -> contextvars.Context:
    """Return a copy of the current context in which no transaction of Tortoise is open.

    With *still_open* those remain that have not ended. For work that outlives the transaction in which it was begun: request ids and the like are
    kept, the connection that will be dead by then is not.
    """
    context = contextvars.copy_context()
    if get_current_context() is None:
        return context
    connections = get_connections()
    # The storage as it is: the public `all()` makes a connection for each alias that has none.
    for alias, connection in connections._get_storage().items():
        root = root_of(connection)
        if root is not connection and not (still_open and is_transaction(connection)):
            context.run(connections.set, alias, root)
    return context


def root_of(connection: BaseDBAsyncClient) -> BaseDBAsyncClient:
    """Return the database itself behind *connection*, be it a transaction or not."""
    while isinstance(connection, TransactionalDBClient):
        connection = connection._parent
    return connection


def is_transaction(connection: BaseDBAsyncClient) -> bool:
    """Return whether *connection* is an open transaction or savepoint, which does not end just now."""
    return (
        isinstance(connection, TransactionalDBClient)
        and not connection._finalized
        and not getattr(outermost(connection), ENDS, False)
    )


def outermost(transaction: TransactionalDBClient) -> TransactionalDBClient:
    """Return the transaction around a savepoint, or *transaction* itself."""
    while isinstance(transaction._parent, TransactionalDBClient):
        transaction = transaction._parent
    return transaction


def in_caller_transaction() -> bool:
    """Return whether a transaction of Tortoise is open in this context."""
    return bool(open_transactions())


def open_transactions() -> list[TransactionalDBClient]:
    """Return the transactions of Tortoise that are open in this context, one for each database."""
    if get_current_context() is None:
        return []
    return [
        connection
        for connection in get_connections()._get_storage().values()
        if isinstance(connection, TransactionalDBClient) and is_transaction(connection)
    ]


class _Ended:
    """In place of a driver's connection: what is asked of it is refused."""

    def __getattr__(self, name: str) -> object:
        raise TransactionManagementError("The transaction goes on without this code: it is late")


def leave_transactions() -> None:
    """Let no statement of this context reach a transaction that is open in it.

    For a task that is not waited for any more and may refuse to be cancelled. A statement on SQLite
    would be part of whatever transaction is open by then.
    """
    for connection in open_transactions():
        ended: Any = copy.copy(connection)
        # Methods that were replaced on the transaction would still lead to it.
        for name in {each for each in vars(ended) if callable(getattr(type(ended), each, None))}:
            delattr(ended, name)
        ended._connection, ended._finalized = _Ended(), True
        get_connections().set(connection.connection_name, ended)
