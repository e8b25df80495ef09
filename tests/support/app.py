"""The models of the host in the tests: every kind of primary key, and a user name."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from tortoise import fields
from tortoise.models import Model

from tortoise_auth import AbstractUser
from tortoise_auth.database import connection_for
from tortoise_auth.fields import ExactCharField, UtcDatetimeField


class User(AbstractUser):
    """The common case: an integer primary key and a column of the host."""

    display_name = fields.CharField(max_length=100, default="")

    class Meta(AbstractUser.Meta):
        table = "app_user"
        abstract = False


class UuidUser(AbstractUser):
    id: UUID = fields.UUIDField(primary_key=True)

    class Meta(AbstractUser.Meta):
        table = "app_uuid_user"
        abstract = False


class StrUser(AbstractUser):
    code = fields.CharField(max_length=40, primary_key=True)

    class Meta(AbstractUser.Meta):
        table = "app_str_user"
        abstract = False


class NamedUser(AbstractUser):
    """Logs in by user name."""

    identifier_field = "username"
    username = ExactCharField(max_length=30, unique=True)

    class Meta(AbstractUser.Meta):
        table = "app_named_user"
        abstract = False


async def store(user: AbstractUser, **values: str) -> None:
    """Store what the fields would refuse, as other programs and imports do."""
    table = type(user)._meta.db_table
    for column, text in values.items():
        quoted = text.replace("'", "''")
        sql = f"UPDATE {table} SET {column} = '{quoted}' WHERE id = {user.pk}"
        await connection_for(type(user)).execute_query(sql)


class AuditRow(Model):
    """A row that an audit handler of the host writes."""

    id = fields.IntField(primary_key=True)
    event = fields.CharField(max_length=64)
    subject = fields.CharField(max_length=255, default="")
    at: UtcDatetimeField[datetime | None] = UtcDatetimeField(null=True)

    class Meta(Model.Meta):
        table = "app_audit_row"
