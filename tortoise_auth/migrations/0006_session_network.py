"""The network that a session was opened from, hashed, for one look-up by an index."""

from tortoise.indexes import Index
from tortoise.migrations import operations as ops

from tortoise_auth.fields import ExactCharField
from tortoise_auth.migrations import OwnMigration


class Migration(OwnMigration):
    """Add a column to ``tortoise_auth_session``, and to the index of its account."""

    dependencies = [("tortoise_auth", "0005_attempts_in_flight")]  # noqa: RUF012 - as Tortoise declares it

    operations = [  # noqa: RUF012 - Tortoise declares it as an attribute of instances
        ops.AddField(
            model_name="Session",
            name="network_hash",
            field=ExactCharField(max_length=64, null=True),
        ),
        ops.RemoveIndex(model_name="Session", fields=["user_id", "user_table"]),
        ops.AddIndex(
            model_name="Session", index=Index(fields=["user_id", "user_table", "network_hash"])
        ),
    ]
