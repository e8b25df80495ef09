"""Every table the library owns. Register them by the one string ``"tortoise_auth.models"``."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from tortoise import fields
from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.exceptions import ValidationError
from tortoise.indexes import Index
from tortoise.models import Model

from tortoise_auth.fields import ExactCharField, UtcDatetimeField
from tortoise_auth.registration import OwnModels


class Session(Model):
    """One login: a chain of refresh tokens, at most one of which is unspent.

    There is no foreign key to the user: the host may use any primary key, and its migrations stay
    independent of ours. A session whose user is gone authenticates no one.

    Attributes:
        id: The public id; may be shown and logged. It opens nothing.
        user_table: The table of the user model, so that two models may share this table.
        user_id: ``str(user.pk)``.
        session_version: ``user.session_version`` when the session was opened, or last carried over by
            a password change that kept it. A session with another version than its user is over.
        family_hash: SHA-256 of the part that all refresh tokens of the session share.
        refresh_hash: SHA-256 of the unspent refresh token.
        previous_refresh_hash: SHA-256 of the one spent last.
        generation: How often the session has been refreshed.
        created_at, last_used_at: When it was opened and refreshed last.
        authenticated_at: When its owner proved who they are; ``None`` in rows that are older than
            this column.
        authentication_methods: How, as RFC 8176 names it, separated by spaces: ``pwd``, ``pwd otp``.
        refresh_expires_at: When the unspent refresh token expires (idle lifetime).
        expires_at: When the session ends whatever happens (absolute lifetime).
        revoked_at: When it was ended before that.
        ip, user_agent: Where it was opened or refreshed last.
        network_hash: A keyed hash of the network of that address, by which attempts on the account
            from there are recognised.
    """

    id = fields.UUIDField(primary_key=True)
    user_table = ExactCharField(max_length=128)
    user_id = ExactCharField(max_length=255)
    session_version = fields.IntField()
    family_hash = ExactCharField(max_length=64, unique=True)
    refresh_hash = ExactCharField(max_length=64)
    previous_refresh_hash = ExactCharField(max_length=64, null=True)
    generation = fields.IntField(default=0)
    created_at: UtcDatetimeField[datetime] = UtcDatetimeField()
    last_used_at: UtcDatetimeField[datetime] = UtcDatetimeField()
    authenticated_at: UtcDatetimeField[datetime | None] = UtcDatetimeField(null=True)
    # `db_default` for the rows that are there when the migration adds the column.
    authentication_methods = ExactCharField(max_length=128, default="", db_default="")
    refresh_expires_at: UtcDatetimeField[datetime] = UtcDatetimeField()
    expires_at: UtcDatetimeField[datetime] = UtcDatetimeField(db_index=True)  # for the purge
    revoked_at: UtcDatetimeField[datetime | None] = UtcDatetimeField(null=True)
    ip = ExactCharField(max_length=64, null=True)
    user_agent = ExactCharField(max_length=255, null=True)
    network_hash = ExactCharField(max_length=64, null=True)

    class Meta(Model.Meta):
        table = "tortoise_auth_session"
        table_description = "One login: a chain of refresh tokens, at most one of which is unspent."
        # Serves the sessions of a user, and whether a network is known: without it ten attempts on
        # an account with 20 000 sessions took 2.4 s of CPU, with it 12 ms.
        indexes = (("user_id", "user_table", "network_hash"),)

    @classmethod
    async def end_all(
        cls,
        *,
        user_table: str,
        user_id: str,
        at: datetime,
        keep: UUID | None = None,
        using_db: BaseDBAsyncClient,
    ) -> int:
        """End every live session of an account but *keep*; return how many.

        Those that have lain idle for too long are over and not counted, but revoked all the same:
        a refresh that began in time may just be about to prolong one.
        """
        rest = cls.filter(
            user_table=user_table,
            user_id=user_id,
            id__not=keep or UUID(int=0),
            revoked_at__isnull=True,
            expires_at__gt=at,
        ).using_db(using_db)
        # In this order: what a login or a refresh commits meanwhile is alive, and is counted.
        await rest.filter(refresh_expires_at__lte=at).update(revoked_at=at)
        return await rest.update(revoked_at=at)


class OutboxRow(Model):
    """The columns that a waiting row and a dead letter share.

    Attributes:
        event_id: ``event.id``, the same in every delivery of it.
        event_name: What happened.
        subscription: The name of the subscription.
        user_table: The table of the event's user, so that two user models may share this one;
            empty for events without a user.
        subject_id: ``str(user.pk)``.
        payload: ``event.to_dict()``.
        created_at: When it was written.
        attempts: How often a relay has claimed it.
        last_error: Why the last attempt failed.
    """

    event_id = fields.UUIDField()
    event_name = ExactCharField(max_length=255)
    subscription = ExactCharField(max_length=255)
    user_table = ExactCharField(max_length=128, default="")
    subject_id = ExactCharField(max_length=255, null=True)
    payload: fields.JSONField[dict[str, Any]] = fields.JSONField()
    created_at: UtcDatetimeField[datetime] = UtcDatetimeField()
    attempts = fields.IntField(default=0)
    last_error = fields.TextField(null=True)

    class Meta(Model.Meta):
        abstract = True


class OutboxEntry(OutboxRow):
    """One event on its way to one durable subscription.

    Written in the transaction of the change, deleted when the handler has succeeded. The rows of one
    subscription, user table and subject are a line: they are delivered one after the other. A row
    without a subject is a line of its own.

    Attributes:
        id: Rises in the order of writing.
        due_at: When it may be claimed: now, after a back-off, or when the lease of the relay that
            claimed it ends. ``None``: it is behind another row of its line.
        claimed_by: The batch of a relay that claimed it last.
    """

    id = fields.BigIntField(primary_key=True)
    due_at: UtcDatetimeField[datetime | None] = UtcDatetimeField(null=True)
    claimed_by = ExactCharField(max_length=128, null=True)

    class Meta(Model.Meta):
        table = "tortoise_auth_outbox"
        table_description = "One event on its way to one durable subscription."
        indexes = (
            Index(
                fields=("subscription", "user_table", "due_at", "id"),
                name="tortoise_auth_outbox_due",
            ),
            Index(
                fields=("subscription", "user_table", "subject_id", "id"),
                name="tortoise_auth_outbox_line",
            ),
        )


class DeadLetter(OutboxRow):
    """A row of the outbox that is not delivered again until it is retried.

    Attributes:
        id: That of the row; it takes it along when it is retried.
        dead_at: When the attempts were used up.
    """

    id = fields.BigIntField(primary_key=True)
    dead_at: UtcDatetimeField[datetime] = UtcDatetimeField()

    class Meta(Model.Meta):
        table = "tortoise_auth_dead_letter"
        table_description = "A row of the outbox that is not delivered again until it is retried."
        indexes = (Index(fields=("dead_at", "id"), name="tortoise_auth_dead_letter_at"),)


class AttemptCount(Model):
    """How often passwords were tried for one account, or from one source.

    Times are numbers, because the statement that counts an attempt also computes the delay, in an
    SQL that every database has.

    Attributes:
        key: What is counted; no identifier can be read from it.
        count: Attempts since the last success or reset; the next delay follows from it.
        failures: Failures in a row, with those attempts that are still being checked.
        in_flight: Attempts that are being checked.
        counted_at: When the last attempt was counted, in microseconds since 1970.
        previous_at: When the one before it was counted; for an attempt that is given back.
        reserved_at: When an attempt last began, whether it counted against the budget or not.
    """

    key = ExactCharField(max_length=191, primary_key=True)
    count = fields.IntField(default=0)
    failures = fields.IntField(default=0)
    in_flight = fields.IntField(default=0)
    counted_at = fields.BigIntField()
    previous_at = fields.BigIntField()
    reserved_at = fields.BigIntField(db_index=True)  # for the purge

    class Meta(Model.Meta):
        table = "tortoise_auth_attempts"
        table_description = "How often passwords were tried for one account, or from one source."


__models__ = OwnModels(Session, OutboxEntry, DeadLetter, AttemptCount)


def user_table(model: type[Model]) -> str:
    """Return the name that distinguishes the users of *model* from those of another model."""
    meta = model._meta
    return f"{meta.schema}.{meta.db_table}" if meta.schema else meta.db_table


def primary_key(model: type[Model], text: str) -> object | None:
    """Return the primary key that *text* is the ``str()`` of, or ``None`` if it is none.

    Strict, because databases are not: ``" 1 "`` and ``True`` find the row 1, and a number that is
    too large for the column is an error.
    """
    field = model._meta.pk
    try:
        value = field.to_python_value(text)
        field.validate(value)
    except (ValueError, TypeError, OverflowError, ValidationError):
        return None
    if isinstance(value, int):
        least, most = (field.constraints.get(bound, value) for bound in ("ge", "le"))
        if not least <= value <= most:
            return None
    return value if str(value) == text else None


def app_config(connection: str = "default") -> dict[str, object]:
    """Return an app entry for our tables, with the migrations we ship.

    Example::

        TORTOISE_ORM = {
            "connections": {...},
            "apps": {
                "models": {"models": ["myapp.models"], "migrations": "myapp.migrations"},
                "tortoise_auth": tortoise_auth.app_config(),
            },
        }

    Args:
        connection: The connection on which your user model lives.
    """
    return {
        "models": ["tortoise_auth.models"],
        "default_connection": connection,
        "migrations": "tortoise_auth.migrations",
    }
