"""Counters know which attempts are being checked, and compute their delays in SQL."""

from tortoise import fields
from tortoise.migrations import operations as ops

from tortoise_auth.fields import ExactCharField
from tortoise_auth.migrations import OwnMigration


class Migration(OwnMigration):
    """Create ``tortoise_auth_attempts`` anew: counters live for a day, and begin at zero."""

    dependencies = [("tortoise_auth", "0004_authentication")]  # noqa: RUF012 - as Tortoise declares it

    operations = [  # noqa: RUF012 - Tortoise declares it as an attribute of instances
        ops.DeleteModel(name="AttemptCount"),
        ops.CreateModel(
            name="AttemptCount",
            fields=[
                ("key", ExactCharField(max_length=191, primary_key=True)),
                ("count", fields.IntField(default=0)),
                ("failures", fields.IntField(default=0)),
                ("in_flight", fields.IntField(default=0)),
                ("counted_at", fields.BigIntField()),
                ("previous_at", fields.BigIntField()),
                ("reserved_at", fields.BigIntField(db_index=True)),
            ],
            options={
                "table": "tortoise_auth_attempts",
                "table_description": (
                    "How often passwords were tried for one account, or from one source."
                ),
            },
        ),
    ]
