"""The connection on which a model is read and written."""

from __future__ import annotations

from tortoise.backends.base.client import BaseDBAsyncClient, TransactionalDBClient
from tortoise.connection import get_connections
from tortoise.context import get_current_context
from tortoise.exceptions import ConfigurationError as TortoiseConfigurationError
from tortoise.models import Model

from tortoise_auth.database.commits import watch
from tortoise_auth.database.dialects import dialect_of
from tortoise_auth.database.wrappers import is_transaction, root_of
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
        # As for a write: a router of the host may send reads to a replica, even in a transaction,
        # and a replica does not show yet what was revoked a moment ago.
        connection: BaseDBAsyncClient = model._choose_db(True)
    except TortoiseConfigurationError:
        raise ConfigurationError(_how_to_register(model)) from None
    while isinstance(connection, TransactionalDBClient) and not is_transaction(connection):
        connection = connection._parent
    watch(connection)
    root = root_of(connection)
    dialect_of(root).check(root, model)
    return connection


def prepare(alias: str) -> None:
    """Prepare a connection that will have our tables, before it opens.

    Every transaction on it is watched from its beginning, also those that begin before the first
    call of this package.
    """
    client = get_connections()._get_storage().get(alias)
    if client is not None:  # there is none while migrations are made
        dialect_of(client).prepare(client)
        watch(client)


def _how_to_register(model: type[Model]) -> str:
    module = model.__module__
    return (
        f"{model.__name__} is not registered with Tortoise. Name its module in Tortoise.init: "
        f'modules={{"models": ["{module}", ...]}}. The tables of tortoise_auth are registered by '
        'the string "tortoise_auth.models" beside your own models, or as an app of their own: '
        'apps={..., "tortoise_auth": tortoise_auth.app_config()}.'
    )


def current_connection(model: type[Model]) -> BaseDBAsyncClient | None:
    """Return the connection of *model*, or ``None`` where there is no database or it is not registered."""
    if get_current_context() is None or model._meta.default_connection is None:
        return None
    return connection_for(model)
