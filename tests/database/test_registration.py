"""Registering our models: one way at a time, by name, and by no import."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from tortoise import Tortoise
from tortoise.context import TortoiseContext, tortoise_test_context
from tortoise.contrib.fastapi import RegisterTortoise
from tortoise.exceptions import ConfigurationError as TortoiseConfigurationError
from tortoise.models import Model

from tests.support.importing import Note
from tortoise_auth import ConfigurationError, app_config, models, registration
from tortoise_auth.models import AttemptCount, DeadLetter, OutboxEntry, Session

OURS = {"Session", "OutboxEntry", "DeadLetter", "AttemptCount"}
URL = "sqlite://:memory:"

HOST = {"models": ["tests.support.importing"], "default_connection": "default"}
ONE_STRING = {"models": ["tests.support.importing", "tortoise_auth.models"]}
OUR_FIRST = {"models": ["tortoise_auth.models", "tests.support.importing"]}


def settings(**apps: object) -> dict[str, Any]:
    """Return the settings of a host with these apps."""
    return {"connections": {"default": URL}, "apps": apps}


BOTH_WAYS = {
    "string-first": settings(models=ONE_STRING, tortoise_auth=app_config()),
    "ours-first-in-list": settings(models=OUR_FIRST, tortoise_auth=app_config()),
    "app-first": settings(tortoise_auth=app_config(), models=ONE_STRING),
}
STRING = settings(models=ONE_STRING)
APP = settings(models=HOST, tortoise_auth=app_config())
ONE_WAY = [
    (STRING, "models"),
    (settings(models=OUR_FIRST), "models"),
    (APP, "tortoise_auth"),
    (settings(accounts=app_config(), models=HOST), "accounts"),
]
ONE_WAY_IDS = ["string", "ours-first-in-list", "app", "app-first"]


async def by_context(config: dict[str, Any]) -> None:
    """Start Tortoise as a test does."""
    async with TortoiseContext() as context:
        await context.init(config=config)


async def by_tortoise(config: dict[str, Any]) -> None:
    """Start Tortoise as a script does."""
    try:
        await Tortoise.init(config=config)
    finally:
        await Tortoise.close_connections()


async def by_migrations(config: dict[str, Any]) -> None:
    """Start Tortoise as its own migrations do, which open no connection yet."""
    await Tortoise.init(config=config, init_connections=False)


async def by_fastapi(config: dict[str, Any]) -> None:
    """Start Tortoise as an application does."""
    async with RegisterTortoise(FastAPI(), config=config):
        pass


STARTS = [by_context, by_tortoise, by_migrations, by_fastapi]
Start = Callable[[dict[str, Any]], Awaitable[None]]


def app_of(context: TortoiseContext, model: type[Model]) -> list[str]:
    """Return the labels of the apps that have a model."""
    assert context.apps is not None
    return [label for label, app in context.apps.items() if model in app.values()]


class TestBothWays:
    @pytest.mark.parametrize("config", BOTH_WAYS.values(), ids=BOTH_WAYS)
    @pytest.mark.parametrize("start", STARTS)
    async def test_refused(self, start: Start, config: dict[str, Any]) -> None:
        """Both ways at once are refused when Tortoise starts, however it starts, and in either order."""
        with pytest.raises(ConfigurationError) as caught:
            # In a task, so that the context that Tortoise leaves open ends with it.
            await asyncio.create_task(_run(start, config))
        text = str(caught.value)
        assert "'models'" in text
        assert "'tortoise_auth'" in text
        assert "delete the entry that tortoise_auth.app_config() made" in text
        assert 'delete the string "tortoise_auth.models" from "models" of the other app' in text

    async def test_two_labels(self) -> None:
        """Two apps made by `app_config` are refused, too."""
        config = settings(models=HOST, one=app_config(), two=app_config())
        with pytest.raises(ConfigurationError, match="'one' and 'two'"):
            await by_context(config)

    async def test_one_after_the_other(self) -> None:
        """Apps that are registered one by one, without settings, are refused as well."""
        async with TortoiseContext():
            Tortoise.init_models(["tortoise_auth.models"], "models")
            with pytest.raises(ConfigurationError, match="'models' and 'tortoise_auth'"):
                Tortoise.init_models(["tortoise_auth.models"], "tortoise_auth")

    @pytest.mark.parametrize(("config", "label"), ONE_WAY, ids=ONE_WAY_IDS)
    async def test_mended(self, config: dict[str, Any], label: str) -> None:
        """After the error the same context starts with settings that register one way."""
        async with TortoiseContext() as context:
            for both in BOTH_WAYS.values():
                with pytest.raises(ConfigurationError):
                    await context.init(config=both)
            await context.init(config=config)
            assert app_of(context, Session) == [label]


class TestOneWay:
    @pytest.mark.parametrize(("config", "label"), ONE_WAY, ids=ONE_WAY_IDS)
    async def test_models(self, config: dict[str, Any], label: str) -> None:
        """Every model is in the app that names our module; a module that imports one does not get it."""
        async with TortoiseContext() as context:
            await context.init(config=config)
            await context.generate_schemas()
            for model in (Session, OutboxEntry, DeadLetter, AttemptCount):
                assert app_of(context, model) == [label]
                assert model._meta.app == label
                assert model._meta.full_name == f"{label}.{model.__name__}"
                assert await model.all().count() == 0
            assert app_of(context, Note) == ["models"]

    async def test_import_alone(self) -> None:
        """Without our module in the settings, an import registers nothing."""
        async with TortoiseContext() as context:
            await context.init(config=settings(models=HOST))
            assert app_of(context, Session) == []
            assert app_of(context, Note) == ["models"]

    async def test_import_after_another_start(self) -> None:
        """An earlier start with the one string does not let the import capture our models later."""
        await by_context(STRING)
        async with TortoiseContext() as context:
            await context.init(config=APP)
            assert app_of(context, Session) == ["tortoise_auth"]

    def test_all_models(self) -> None:
        """What Tortoise finds in our module is every model of ours that has a table."""
        concrete = {
            name
            for name, model in vars(models).items()
            if isinstance(model, type) and issubclass(model, Model) and not model._meta.abstract
        }
        assert {model.__name__ for model in models.__models__} == concrete - {"Model"} == OURS


class TestAgain:
    async def test_labels_in_turn(self) -> None:
        """Contexts of one process may use different labels, one after the other."""
        for config, label in (*ONE_WAY, *ONE_WAY):
            async with TortoiseContext() as context:
                await context.init(config=config)
                assert app_of(context, Session) == [label]

    async def test_context_in_a_context(self) -> None:
        """A context inside another one may use another label."""
        async with TortoiseContext() as outer:
            await outer.init(config=STRING)
            async with tortoise_test_context(["tortoise_auth.models"], app_label="inner") as inner:
                assert app_of(inner, Session) == ["inner"]
                assert Session._meta.app == "inner"
            assert Session._meta.app == "models"

    async def test_init_twice(self) -> None:
        """`Tortoise.init` may be called again, with the same way or with the other one."""

        async def twice() -> list[str | None]:
            labels = []
            for config in (STRING, STRING, APP, STRING):
                await Tortoise.init(config=config)
                labels.append(Session._meta.app)
            await Tortoise.close_connections()
            return labels

        labels = await asyncio.create_task(twice())
        assert labels == ["models", "models", "tortoise_auth", "models"]

    async def test_failed_start(self) -> None:
        """A start that failed for another reason can be tried again."""
        async with TortoiseContext() as context:
            broken = settings(models=ONE_STRING, other={"models": ["tests.support.nowhere"]})
            with pytest.raises(TortoiseConfigurationError, match="nowhere"):
                await context.init(config=broken)
            await context.init(config=STRING)
            assert app_of(context, Session) == ["models"]

    async def test_init_models(self) -> None:
        """`Tortoise.init_models`, which needs no database, may come before `init`."""
        async with TortoiseContext() as context:
            Tortoise.init_models(ONE_STRING["models"], "models")
            assert Session._meta.app == "models"
            await context.init(config=STRING)
            assert app_of(context, Session) == ["models"]

    def test_without_a_context(self) -> None:
        """Where Tortoise is not started, our models are in no app."""
        assert Session._meta.app == "<not registered>"


async def test_connection_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection of our tables is prepared at registration, before it is used."""
    prepared: list[str] = []
    monkeypatch.setattr(registration, "prepare", prepared.append)
    config = settings(models=HOST, tortoise_auth=app_config("main"))
    config["connections"]["main"] = URL
    async with TortoiseContext() as context:
        await context.init(config=config)
        assert set(prepared) == {"main"}
        assert Session._meta.default_connection == "main"


async def _run(start: Start, config: dict[str, Any]) -> None:
    await start(config)
