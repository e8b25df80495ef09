"""Counters of password attempts."""

from tortoise import fields
from tortoise.migrations import operations as ops

from tortoise_auth.fields import ExactCharField, UtcDatetimeField
from tortoise_auth.migrations import OwnMigration


class Migration(OwnMigration):
    """Create ``tortoise_auth_attempts``."""

    dependencies = [("tortoise_auth", "0002_outbox")]  # noqa: RUF012 - as Tortoise declares it

    operations = [  # noqa: RUF012 - Tortoise declares it as an attribute of instances
        ops.CreateModel(
            name="AttemptCount",
            fields=[
                ("key", ExactCharField(max_length=191, primary_key=True)),
                ("count", fields.IntField(default=0)),
                ("failures", fields.IntField(default=0)),
                ("last_at", UtcDatetimeField(db_index=True)),
            ],
            options={
                "table": "tortoise_auth_attempts",
                "table_description": (
                    "How often passwords were tried for one account, or from one source."
                ),
            },
        ),
    ]
