"""The table of sessions."""

from tortoise import fields
from tortoise.indexes import Index
from tortoise.migrations import operations as ops

from tortoise_auth.fields import ExactCharField, UtcDatetimeField
from tortoise_auth.migrations import OwnMigration


class Migration(OwnMigration):
    """Create ``tortoise_auth_session``."""

    initial = True

    operations = [  # noqa: RUF012 - Tortoise declares it as an attribute of instances
        ops.CreateModel(
            name="Session",
            fields=[
                ("id", fields.UUIDField(primary_key=True)),
                ("user_table", ExactCharField(max_length=128)),
                ("user_id", ExactCharField(max_length=255)),
                ("session_version", fields.IntField()),
                ("family_hash", ExactCharField(max_length=64, unique=True)),
                ("refresh_hash", ExactCharField(max_length=64)),
                ("previous_refresh_hash", ExactCharField(max_length=64, null=True)),
                ("generation", fields.IntField(default=0)),
                ("created_at", UtcDatetimeField()),
                ("last_used_at", UtcDatetimeField()),
                ("refresh_expires_at", UtcDatetimeField()),
                ("expires_at", UtcDatetimeField(db_index=True)),
                ("revoked_at", UtcDatetimeField(null=True)),
                ("ip", ExactCharField(max_length=64, null=True)),
                ("user_agent", ExactCharField(max_length=255, null=True)),
            ],
            options={
                "table": "tortoise_auth_session",
                "indexes": [Index(fields=["user_id", "user_table"])],
                "table_description": (
                    "One login: a chain of refresh tokens, at most one of which is unspent."
                ),
            },
        ),
    ]
