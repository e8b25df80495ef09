"""Load what the host has, its `AuthService` and its settings, by the names that were typed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TypeAlias

from tortoise.cli.utils import tortoise_orm_config
from tortoise.config import TortoiseConfig

from tortoise_auth.legible import describe
from tortoise_auth.service import AuthService
from tortoise_auth.users import AbstractUser

Service: TypeAlias = AuthService[AbstractUser]
Lifespan: TypeAlias = Callable[[], AbstractAsyncContextManager[object]]

FAILED = 1
WRONG = 2


class CommandError(Exception):
    """A command cannot run; the message says why, and what to type instead."""

    def __init__(self, message: str, exit_code: int = WRONG) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def load_service(path: str) -> Service:
    """Return the `AuthService` that *path* names."""
    loaded = _load(path, AuthService, "an AuthService, as in myapp.main:auth")
    assert isinstance(loaded, AuthService)  # noqa: S101 - for the type checker; `_load` has looked
    return loaded


def durable_subscriptions(auth: Service) -> set[str]:
    """Return the names of the durable subscriptions of a service."""
    return {each.name for each in auth.emitter.describe() if each.delivery == "durable"}


def load_lifespan(path: str) -> Lifespan:
    """Return the function that opens what the handlers of the host need."""
    loaded = _load(path, FunctionType, "a function made by @asynccontextmanager")
    assert isinstance(loaded, FunctionType)  # noqa: S101 - as above
    wrapped = inspect.unwrap(loaded)
    if loaded is wrapped or not inspect.isasyncgenfunction(wrapped):
        raise CommandError(f"{path!r} is not made by @asynccontextmanager")
    needed = [
        each.name
        for each in inspect.signature(loaded).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        raise CommandError(f"{path!r} must need no arguments, and it needs: {', '.join(needed)}")
    return loaded


def load_settings(path: str | None) -> dict[str, object] | TortoiseConfig:
    """Return the Tortoise settings that *path* names, or the environment, or ``pyproject.toml``."""
    try:
        path = path or tortoise_orm_config()
    except ValueError as error:
        raise CommandError(f"pyproject.toml cannot be read: {error}") from None
    if not path:
        raise CommandError(
            "Which database? Say --config myapp.settings.TORTOISE_ORM, set TORTOISE_ORM to that, "
            'or write it into pyproject.toml: [tool.tortoise] tortoise_orm = "..."'
        )
    if ":" not in path:  # Tortoise's own way to write it
        path = ":".join(path.rsplit(".", 1))
    settings = _load(
        path, (dict, TortoiseConfig), "Tortoise settings, as in myapp.settings:TORTOISE_ORM"
    )
    assert isinstance(settings, dict | TortoiseConfig)  # noqa: S101 - as above
    return settings


def _load(path: str, kind: type | tuple[type, ...], wanted: str) -> object:
    """Return what ``module:name`` names, which may be ``module:holder.name``."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise CommandError(f"{path!r} does not name {wanted}")
    module = _import(module_name)
    loaded: object = module
    for part in name.split("."):
        if not hasattr(loaded, part):
            raise CommandError(
                f"{module_name!r} has no {name!r}; wanted is {wanted}{_there_is(module, kind)}"
            )
        loaded = getattr(loaded, part)
    if not isinstance(loaded, kind):
        raise CommandError(
            f"{path!r} is of type {type(loaded).__name__}; wanted is {wanted}"
            f"{_there_is(module, kind)}"
        )
    return loaded


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module itself or a package around it is missing, and not one that it imports.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise CommandError(
                f"There is no module {error.name!r}, neither in {Path.cwd()} nor installed"
            ) from None
        raise CommandError(f"The module {name!r} cannot be imported: {error}") from error
    except Exception as error:
        raise CommandError(
            f"The module {name!r} cannot be imported: {type(error).__name__}: {describe(error)}"
        ) from error


def _there_is(module: ModuleType, kind: type | tuple[type, ...]) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, kind) and not name.startswith("_")
    ]
    return f". There is {', '.join(f'{module.__name__}:{each}' for each in names)}" if names else ""
