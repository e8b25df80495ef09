"""Models of a host that imports one of ours, as a host does that lists the sessions of a user."""

from __future__ import annotations

from tortoise import fields
from tortoise.models import Model

from tortoise_auth.models import Session

Imported = Session


class Note(Model):
    """A model of the host beside the import."""

    id = fields.IntField(primary_key=True)
