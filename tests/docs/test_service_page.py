"""The page about the service: its snippets run, and its tables are those of the code."""

from __future__ import annotations

import json
import os
import re
from typing import Any, get_args

import pytest
from tortoise import fields
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tests.support.snippets import ROOT, run, snippets, table
from tests.support.standards import LIBRARY, sample
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthService,
    EventEmitter,
    RequestContext,
    exceptions,
)
from tortoise_auth.context import request_context
from tortoise_auth.events import UserLoginFailed
from tortoise_auth.events.classification import FailureReason
from tortoise_auth.events.event import Actor
from tortoise_auth.testing import capture

PAGE = ROOT / "docs" / "service.md"
HOSTILE = "\U0001f600" * 100_000


async def test_snippets_run(sqlite: TortoiseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every snippet runs, in order."""
    monkeypatch.setenv("AUTH_SECRET", SECRET)
    namespace: dict[str, Any] = {
        "AbstractUser": AbstractUser,
        "AuthConfig": AuthConfig,
        "AuthService": AuthService,
        "User": User,
        "auth": AuthService(User, AuthConfig(secret=SECRET)),
        "fields": fields,
        "os": os,
        "password": PASSWORD,
        "user": await User.create_user(email=EMAIL, password=PASSWORD),
    }
    outside = request_context.get(RequestContext())
    sources = list(snippets(PAGE))
    assert len(sources) > 4
    for source in sources:
        await run(source, namespace, "docs/service.md")
    assert len(namespace["rotated"].keys) == 2
    request_context.set(outside)


def test_every_error_has_a_status() -> None:
    """The table of errors has each class of the tree, with its code."""
    stated = {
        re.findall(r"`(\w+)`", row[0])[0]: row[1].strip("`") for row in table(PAGE, "Answer errors")
    }
    assert stated == {
        name: kind.code
        for name, kind in vars(exceptions).items()
        if isinstance(kind, type) and issubclass(kind, exceptions.TortoiseAuthError)
    }


def test_sizes_hold() -> None:
    """No event of the library holds more than the table says, whatever it is made of."""
    limits = {
        name: [int(each.replace(" ", "")) for each in re.findall(r"\d[\d ]*", row[1])][-1]
        for row in table(PAGE, "The columns of an audit table")
        for name in re.findall(r"`([\w.()]+)`", row[0])
    }
    context = RequestContext(
        ip="2001:cdb8:ffff:ffff:ffff:ffff:ffff:ffff",
        user_agent=HOSTILE,
        request_id=HOSTILE,
        actor_id=HOSTILE,
        known_device=False,
    )
    assert len(context.ip or "") == limits["event.context.ip"]
    assert len(context.user_agent or "") == limits["event.context.user_agent"]
    assert len(context.request_id or "") == limits["event.context.request_id"]
    assert len(context.actor_id or "") == limits["event.context.actor_id"]
    assert max(map(len, get_args(Actor))) == limits["event.actor"]
    assert max(map(len, get_args(FailureReason))) == limits["reason"]
    assert max(len(each.name) for each in LIBRARY) == limits["event.name"]
    for kind in LIBRARY:
        event = sample(
            kind,
            context=context,
            subject_id="\U0001f600" * limits["event.subject_id"],
            identifier="\U0001f600" * limits["identifier"],
        )
        assert len(str(event.id)) == limits["event.id"]
        assert len(json.dumps(event.to_dict())) < limits["to_dict()"]


async def test_the_longest_identifier(
    sqlite: TortoiseContext, auth: AuthService[User], emitter: EventEmitter
) -> None:
    """What is typed at a login is cut to what the table says before any handler gets it."""
    with capture(emitter) as events:
        with pytest.raises(exceptions.AuthenticationError):
            await auth.login(HOSTILE, PASSWORD)
    assert len(events.one(UserLoginFailed).identifier) == 320
