"""Migrations of the library's tables, for ``tortoise migrate``; `app_config` names this package."""

from tortoise import migrations


class OwnMigration(migrations.Migration):
    """A migration that depends on those before it under whatever label the host gave our app.

    Dependencies name the label, and only the host's settings know it: they are written for the
    label ``tortoise_auth``, and read for the one in use.
    """

    def __init__(self, name: str, app_label: str) -> None:
        super().__init__(name, app_label)
        self.dependencies = [(app_label, earlier) for _, earlier in self.dependencies]
