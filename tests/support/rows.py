"""Rows as they are in the database, and objects as they are in memory."""

from __future__ import annotations

from tortoise.models import Model

from tortoise_auth.models import Session


async def rows(*models: type[Model]) -> list[dict[str, object]]:
    """Return every row of *models* and of the sessions, as they are in the database."""
    every: tuple[type[Model], ...] = (*models, Session)
    return [
        each for model in every for each in await model.all().order_by(model._meta.pk_attr).values()
    ]


async def row(model: type[Model], pk: object) -> dict[str, object]:
    """Return one row as it is in the database."""
    (each,) = await model.filter(pk=pk).values()
    return each


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    """Return the names of the columns that differ."""
    return {name for name in after if after[name] != before[name]}


def columns(instance: Model) -> dict[str, object]:
    """Return what an object in memory holds of its row."""
    return {name: getattr(instance, name) for name in instance._meta.fields_db_projection}
