"""The host's database, opened as a web application would open it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, TypeVar

import typer
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.config import TortoiseConfig
from tortoise.context import TortoiseContext

from tortoise_auth.cli.loading import FAILED, CommandError, load_settings
from tortoise_auth.database import connection_for, root_of
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.legible import describe
from tortoise_auth.models import OutboxEntry
from tortoise_auth.users import AbstractUser

ResultT = TypeVar("ResultT")


ServicePath = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="Your AuthService, for example myapp.main:auth.",
        show_default=False,
    ),
]


ConfigPath = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="MODULE:NAME",
        show_default=False,
        help="Your Tortoise settings, for example myapp.settings:TORTOISE_ORM. Without it "
        "$TORTOISE_ORM says where they are, or [tool.tortoise] in pyproject.toml.",
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def with_database(
    config: str | None,
    work: Callable[[BaseDBAsyncClient], Awaitable[ResultT]],
    *models: type[AbstractUser],
) -> ResultT:
    """Open the database that the settings name, and return what *work* does with it.

    Args:
        config: Where the settings are, as it was typed.
        work: Called with the connection of our own tables.
        *models: Models of the host that must be registered, too.

    Raises:
        CommandError: The settings are wrong, or the database failed.
    """
    settings = load_settings(config)

    async def run() -> ResultT:
        async with open_database(settings, OutboxEntry, *models):
            return await work(root_of(connection_for(OutboxEntry)))

    try:
        return asyncio.run(run())
    except CommandError:
        raise
    except ConfigurationError as error:
        raise CommandError(str(error)) from None
    except Exception as error:  # noqa: BLE001 - whatever the driver raises: the operator reads it
        raise CommandError(
            f"The database failed: {type(error).__name__}: {describe(error)}", FAILED
        ) from None


@asynccontextmanager
async def open_database(
    settings: dict[str, object] | TortoiseConfig, *models: type[OutboxEntry | AbstractUser]
) -> AsyncIterator[None]:
    """Set Tortoise up as a web application would, and check that it knows *models*."""
    with TortoiseContext() as context:
        try:
            await context.init(config=settings, _enable_global_fallback=True)
            for model in models:
                connection_for(model)
        except ConfigurationError as error:
            raise CommandError(str(error)) from None
        except Exception as error:  # noqa: BLE001 - modules of the host are imported here
            raise CommandError(
                f"Tortoise refuses its settings: {type(error).__name__}: {describe(error)}"
            ) from None
        try:
            yield
        finally:
            # aiosqlite (0.22) has a thread that is no daemon: a program that leaves it open never
            # ends.
            await context.close_connections()
