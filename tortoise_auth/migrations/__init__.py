"""Migrations of the library's tables, for ``tortoise migrate``; `app_config` names this package."""

from tortoise import migrations
from tortoise.context import get_current_context

from tortoise_auth import models
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.legible import listed


class OwnMigration(migrations.Migration):
    """A migration that depends on those before it under whatever label the host gave our app.

    Dependencies name the label, and only the host's settings know it: they are written for the
    label ``tortoise_auth``, and read for the one in use.

    Raises:
        ConfigurationError: The app has models of the host, too. ``makemigrations`` would write their
            migrations beside ours, into the installed package.
    """

    def __init__(self, name: str, app_label: str) -> None:
        _refuse_models_of_the_host(app_label)
        super().__init__(name, app_label)
        self.dependencies = [(app_label, earlier) for _, earlier in self.dependencies]


def _refuse_models_of_the_host(app_label: str) -> None:
    context = get_current_context()
    apps = context.apps if context else None
    if apps is None or app_label not in apps:
        return
    names = sorted(
        f"{model.__module__}.{name}"
        for name, model in apps[app_label].items()
        if model.__module__ != models.__name__
    )
    if names:
        raise ConfigurationError(
            f"The app {app_label!r} has the migrations of tortoise_auth, and other models than those "
            f"of tortoise_auth: {listed(names)}. Nothing was written. Give the app migrations of its "
            'own, "migrations": "<your package>.migrations", or move "tortoise_auth.models" to an app '
            'of its own: "tortoise_auth": tortoise_auth.app_config().'
        )
