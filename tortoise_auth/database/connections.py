"""Which connection to use, and whether it is a transaction of the caller."""

from __future__ import annotations

import contextvars

from tortoise.backends.base.client import BaseDBAsyncClient, TransactionalDBClient
from tortoise.connection import get_connections
from tortoise.context import get_current_context
from tortoise.exceptions import ConfigurationError as TortoiseConfigurationError
from tortoise.models import Model

from tortoise_auth.exceptions import ConfigurationError


def connection_for(model: type[Model]) -> BaseDBAsyncClient:
    """Return the connection on which to read and write *model* now.

    Inside a transaction of the caller it is that transaction. In a task that was started inside a
    transaction which is over by now, it is the database itself and not the dead transaction.

    Raises:
        ConfigurationError: No database is set up, or the model is not registered.
    """
    if get_current_context() is None:
        raise ConfigurationError(
            "Tortoise ORM is not initialised here. Call `await Tortoise.init(...)` first; under a "
            "web server use tortoise.contrib.fastapi.RegisterTortoise, or pass "
            "`_enable_global_fallback=True`, because requests run in another context than the "
            "start-up code."
        )
    try:
        connection: BaseDBAsyncClient = model._choose_db(True)
    except TortoiseConfigurationError:
        raise ConfigurationError(_how_to_register(model)) from None
    while isinstance(connection, TransactionalDBClient) and connection._finalized:
        connection = connection._parent
    return connection


def _how_to_register(model: type[Model]) -> str:
    module = model.__module__
    return (
        f"{model.__name__} is not registered with Tortoise. Name its module in Tortoise.init: "
        f'modules={{"models": ["{module}", ...]}}. The tables of tortoise_auth are registered by '
        'the string "tortoise_auth.models" beside your own models, or as an app of their own: '
        'apps={..., "tortoise_auth": tortoise_auth.app_config()}.'
    )


def context_outside_transactions() -> contextvars.Context:
    """Return a copy of the current context in which no transaction of Tortoise is open.

    For work that outlives the transaction in which it was begun: request ids and the like are
    kept, the connection that will be dead by then is not.
    """
    context = contextvars.copy_context()
    if get_current_context() is None:
        return context
    connections = get_connections()
    for alias, connection in connections._get_storage().items():
        root = root_of(connection)
        if root is not connection:
            context.run(connections.set, alias, root)
    return context


def root_of(connection: BaseDBAsyncClient) -> BaseDBAsyncClient:
    """Return the database itself behind *connection*, be it a transaction or not."""
    while isinstance(connection, TransactionalDBClient):
        connection = connection._parent
    return connection


def is_transaction(connection: BaseDBAsyncClient) -> bool:
    """Tell whether *connection* is an open transaction."""
    return isinstance(connection, TransactionalDBClient) and not connection._finalized


def in_caller_transaction() -> bool:
    """Tell whether a transaction of Tortoise is open in this context."""
    if get_current_context() is None:
        return False
    return any(
        is_transaction(connection) for connection in get_connections()._get_storage().values()
    )


def current_connection(model: type[Model]) -> BaseDBAsyncClient | None:
    """Return the connection of *model*, or ``None`` where there is no database or it is not registered."""
    if get_current_context() is None or model._meta.default_connection is None:
        return None
    return connection_for(model)
