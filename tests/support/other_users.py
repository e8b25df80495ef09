"""User models of hosts that do as the documentation does not."""

from __future__ import annotations

from tortoise import fields

from tests.support.app import User
from tortoise_auth import AbstractUser
from tortoise_auth.fields import EmailField, ExactCharField, PasswordField, UtcDatetimeField


class Admin(User):
    """A subclass with a table of its own, whose keys are other accounts."""

    class Meta(AbstractUser.Meta):
        table = "app_admin"
        abstract = False


class PlainEmailUser(AbstractUser):
    """The column of the address is of a plain field class."""

    email = fields.CharField(max_length=320, unique=True)

    class Meta(AbstractUser.Meta):
        table = "app_plain_email_user"
        abstract = False


class PlainPasswordUser(AbstractUser):
    """The column of the hash is of a plain field class."""

    password = fields.CharField(max_length=128, default="")

    class Meta(AbstractUser.Meta):
        table = "app_plain_password_user"
        abstract = False


class InternalUser(AbstractUser):
    """Addresses of a network of its own are accepted, too."""

    internal_domains = ("corp.local", "localhost")

    class Meta(AbstractUser.Meta):
        table = "app_internal_user"
        abstract = False


class PlainNamedUser(AbstractUser):
    """The column of the user name is of a plain field class."""

    identifier_field = "username"
    username = fields.CharField(max_length=30, unique=True)

    class Meta(AbstractUser.Meta):
        table = "app_plain_named_user"
        abstract = False


class EitherUser(AbstractUser):
    """People log in by user name or by address."""

    identifier_fields = ("username", "email")
    username = ExactCharField(max_length=30, unique=True)

    class Meta(AbstractUser.Meta):
        table = "app_either_user"
        abstract = False


class LateNameUser(AbstractUser):
    """People sign up by address, and may choose a user name later."""

    identifier_fields = ("email", "username")
    username = ExactCharField(max_length=30, unique=True, null=True)

    class Meta(AbstractUser.Meta):
        table = "app_late_name_user"
        abstract = False


class TimelessUser(AbstractUser):
    """The table has no times of creation and change."""

    created_at = None  # type: ignore[assignment]
    updated_at = None  # type: ignore[assignment]

    class Meta(AbstractUser.Meta):
        table = "app_timeless_user"
        abstract = False


class FormerUser(AbstractUser):
    """The table has the hashes of another program in a column of their own."""

    hashed_password = fields.CharField(max_length=1024, null=True)

    class Meta(AbstractUser.Meta):
        table = "app_former_user"
        abstract = False


class MappedUser(AbstractUser):
    """Our columns have the names of another program."""

    id = fields.IntField(primary_key=True, source_field="user_no")
    email = EmailField(unique=True, source_field="mail")
    password = PasswordField(max_length=1024, source_field="hashed_password")
    is_active = fields.BooleanField(default=True, source_field="enabled")
    last_login = UtcDatetimeField(null=True, source_field="seen_at")
    session_version = fields.IntField(default=1, source_field="version")

    class Meta(AbstractUser.Meta):
        table = "app_mapped_user"
        abstract = False


class SharedEmailUser(AbstractUser):
    """People log in by name, and may share an address or have none, as in Django."""

    identifier_field = "username"
    username = ExactCharField(max_length=150, unique=True)
    email = ExactCharField(max_length=254, default="")

    class Meta(AbstractUser.Meta):
        table = "app_shared_email_user"
        abstract = False
