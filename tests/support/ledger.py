"""A table of the host that can live in a database of its own."""

from __future__ import annotations

from tortoise import fields
from tortoise.models import Model


class Ledger(Model):
    """A row that the host writes beside those of the library."""

    id = fields.IntField(primary_key=True)
    text = fields.CharField(max_length=64)

    class Meta(Model.Meta):
        table = "host_ledger"
