"""When and by which methods the owner of a session was authenticated."""

from tortoise.migrations import operations as ops

from tortoise_auth.fields import ExactCharField, UtcDatetimeField
from tortoise_auth.migrations import OwnMigration


class Migration(OwnMigration):
    """Add two columns to ``tortoise_auth_session``."""

    dependencies = [("tortoise_auth", "0003_attempts")]  # noqa: RUF012 - as Tortoise declares it

    operations = [  # noqa: RUF012 - Tortoise declares it as an attribute of instances
        ops.AddField(
            model_name="Session",
            name="authenticated_at",
            field=UtcDatetimeField(null=True),
        ),
        ops.AddField(
            model_name="Session",
            name="authentication_methods",
            field=ExactCharField(max_length=128, default="", db_default=""),
        ),
    ]
