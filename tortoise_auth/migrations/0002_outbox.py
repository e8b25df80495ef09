"""The outbox: events on their way to durable subscriptions."""

from tortoise import fields
from tortoise.indexes import Index
from tortoise.migrations import operations as ops

from tortoise_auth.fields import ExactCharField, UtcDatetimeField
from tortoise_auth.migrations import OwnMigration


class Migration(OwnMigration):
    """Create ``tortoise_auth_outbox``."""

    dependencies = [("tortoise_auth", "0001_initial")]  # noqa: RUF012 - as Tortoise declares it

    operations = [  # noqa: RUF012 - Tortoise declares it as an attribute of instances
        ops.CreateModel(
            name="OutboxEntry",
            fields=[
                ("id", fields.BigIntField(primary_key=True, generated=True)),
                ("event_id", fields.UUIDField(db_index=True)),
                ("event_name", ExactCharField(max_length=255)),
                ("subscription", ExactCharField(max_length=255)),
                ("user_table", ExactCharField(max_length=128, default="")),
                ("subject_id", ExactCharField(max_length=255, null=True)),
                ("payload", fields.JSONField()),
                ("created_at", UtcDatetimeField()),
                ("due_at", UtcDatetimeField(null=True, db_index=True)),
                ("attempts", fields.IntField(default=0)),
                ("claimed_by", ExactCharField(max_length=128, null=True)),
                ("dead_at", UtcDatetimeField(null=True)),
                ("last_error", fields.TextField(null=True)),
            ],
            options={
                "table": "tortoise_auth_outbox",
                "indexes": [Index(fields=["subscription", "subject_id", "id"])],
                "table_description": "One event on its way to one durable subscription.",
            },
        ),
    ]
