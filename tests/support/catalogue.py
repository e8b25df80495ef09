"""The events of the library, one example of each."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from tests.support.app import User
from tortoise_auth.events import (
    Event,
    catalog,
)
from tortoise_auth.events.catalog import declared_events

ADA = User(id=7, email="ada@example.com", password="$argon2id$v=19$secret")
CATALOGUE = [each for each in declared_events() if each.__module__ == catalog.__name__]
by_name = pytest.mark.parametrize("event", CATALOGUE, ids=lambda event: event.name)


def example_of(event: type[Event]) -> Event:
    """Return an event of a class with its required fields filled."""
    required: dict[str, Any] = {
        "user": ADA,
        "session_id": "s-1",
        "identifier": "ada@example.com",
        "reason": "bad_password",
        "generation": 3,
        "sessions_ended": 2,
        "retry_after": 1.5,
    }
    names = {each.name for each in fields(event)}
    return event(**{name: value for name, value in required.items() if name in names})


def as_json(event: Event) -> dict[str, Any]:
    """Return what another program reads: ``to_dict()`` through strict JSON."""
    read: dict[str, Any] = json.loads(json.dumps(event.to_dict(), allow_nan=False))
    return read
