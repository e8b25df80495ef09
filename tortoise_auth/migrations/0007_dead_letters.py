"""Dead letters in a table of their own, and indexes from which a claim reads no other row."""

from tortoise import fields
from tortoise.indexes import Index
from tortoise.migrations import operations as ops

from tortoise_auth.fields import ExactCharField, UtcDatetimeField
from tortoise_auth.migrations import OwnMigration

_KEPT = (
    "id, event_id, event_name, subscription, user_table, subject_id, payload, created_at, attempts, "
    "last_error, dead_at"
)


class Migration(OwnMigration):
    """Create ``tortoise_auth_dead_letter``, and move there what is dead in ``tortoise_auth_outbox``."""

    dependencies = [("tortoise_auth", "0006_session_network")]  # noqa: RUF012 - as Tortoise declares it

    operations = [  # noqa: RUF012 - Tortoise declares it as an attribute of instances
        ops.CreateModel(
            name="DeadLetter",
            fields=[
                ("event_id", fields.UUIDField()),
                ("event_name", ExactCharField(max_length=255)),
                ("subscription", ExactCharField(max_length=255)),
                ("user_table", ExactCharField(max_length=128, default="")),
                ("subject_id", ExactCharField(max_length=255, null=True)),
                ("payload", fields.JSONField()),
                ("created_at", UtcDatetimeField()),
                ("attempts", fields.IntField(default=0)),
                ("last_error", fields.TextField(null=True)),
                ("id", fields.BigIntField(primary_key=True)),
                ("dead_at", UtcDatetimeField()),
            ],
            options={
                "table": "tortoise_auth_dead_letter",
                "indexes": [Index(fields=["dead_at", "id"], name="tortoise_auth_dead_letter_at")],
                "table_description": (
                    "A row of the outbox that is not delivered again until it is retried."
                ),
            },
        ),
        ops.RunSQL(
            f"INSERT INTO tortoise_auth_dead_letter ({_KEPT}) "
            f"SELECT {_KEPT} FROM tortoise_auth_outbox WHERE dead_at IS NOT NULL",
            f"INSERT INTO tortoise_auth_outbox ({_KEPT}) SELECT {_KEPT} FROM tortoise_auth_dead_letter",
        ),
        ops.RemoveIndex(model_name="OutboxEntry", fields=["subscription", "subject_id", "id"]),
        ops.AlterField(model_name="OutboxEntry", name="due_at", field=UtcDatetimeField(null=True)),
        ops.AlterField(model_name="OutboxEntry", name="event_id", field=fields.UUIDField()),
        ops.RemoveField(model_name="OutboxEntry", name="dead_at"),
        # Not before SQLite has made the table anew: its next id exceeds all that it has ever held.
        ops.RunSQL(
            "DELETE FROM tortoise_auth_outbox WHERE id IN (SELECT id FROM tortoise_auth_dead_letter)",
            ops.RunSQL.noop,
        ),
        ops.AddIndex(
            model_name="OutboxEntry",
            index=Index(
                fields=["subscription", "user_table", "due_at", "id"],
                name="tortoise_auth_outbox_due",
            ),
        ),
        ops.AddIndex(
            model_name="OutboxEntry",
            index=Index(
                fields=["subscription", "user_table", "subject_id", "id"],
                name="tortoise_auth_outbox_line",
            ),
        ),
    ]
