"""The page about formats: its snippets run and ship records, and its table is correct."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import User
from tests.support.keys import pem
from tests.support.snippets import run, snippets
from tests.support.standards import CANARY, LIBRARY, as_sent, sample, violations
from tortoise_auth import AbstractUser, AuthConfig, AuthenticationError, AuthService, RequestContext
from tortoise_auth.clock import utc_now
from tortoise_auth.events import Event, LoginThrottled, UserLoginFailed
from tortoise_auth.events import emitter as library_emitter
from tortoise_auth.events.formats import cloudevent, ecs, ocsf, set_claims
from tortoise_auth.exceptions import TokenReusedError
from tortoise_auth.testing import FakeClock, isolated

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
CONTEXT = RequestContext(ip="203.0.113.7", user_agent="Firefox", request_id="r-1")


class Sink:
    """The receiver of what the page sends."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.posts: list[tuple[str, str, dict[str, str]]] = []
        self.down = False

    async def send(self, record: dict[str, Any]) -> None:
        """Receive a record."""
        self.records.append(as_sent(record))

    async def post(self, path: str, *, content: str, headers: dict[str, str]) -> httpx2.Response:
        """Receive a token, unless the receiver is down."""
        if not self.down:
            self.posts.append((path, content, headers))
        request = httpx2.Request("POST", f"https://shop.example.com{path}")
        return httpx2.Response(503 if self.down else 202, request=request)


@pytest.fixture
async def page(
    sqlite: TortoiseContext, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, Any]]:
    """The names of the page, after every snippet."""
    monkeypatch.setattr(AbstractUser, "emitter", library_emitter)
    monkeypatch.setenv("SET_PRIVATE_KEY", pem("RS256").decode())
    with isolated(library_emitter):
        namespace: dict[str, Any] = {name: Sink() for name in ("siem", "elastic", "receiver")}
        namespace["os"] = os
        sources = list(snippets(PAGE))
        assert len(sources) == 5
        for source in sources:
            await run(source, namespace, str(PAGE))
        yield namespace


async def live(auth: AuthService[User]) -> list[str]:
    """Make every call for an account; return the names of the events, in order."""
    user = await User.create_user(email="ada@example.com", password=PASSWORD)
    for typed, password in ((CANARY, PASSWORD), ("ada@example.com", "wrong")):
        with pytest.raises(AuthenticationError):
            await auth.login(typed, password, context=CONTEXT)
    first = await auth.login("ada@example.com", PASSWORD, context=CONTEXT)
    second = await auth.refresh(first.refresh_token, context=CONTEXT)
    with pytest.raises(TokenReusedError):
        await auth.refresh(first.refresh_token, context=CONTEXT)
    third = await auth.login("ada@example.com", PASSWORD)
    await auth.logout(third.access_token)
    fourth = await auth.login("ada@example.com", PASSWORD)
    await auth.revoke_session(fourth.session.id)
    await auth.set_password(user, "a wholly different phrase")
    await auth.login("ada@example.com", "a wholly different phrase")
    await auth.logout_all(user)
    await auth.deactivate(user)
    await auth.activate(user)
    assert second.session.id == first.session.id
    return (
        "user_registered user_login_failed user_login_failed user_login session_refreshed "
        "refresh_token_reused user_login user_logout user_login session_revoked password_changed "
        "user_login user_logout user_deactivated user_activated"
    ).split()


class TestSnippets:
    async def test_everything_is_shipped(self, page: dict[str, Any]) -> None:
        """Every event is delivered durably in all three formats, by the rules of each standard."""
        auth = AuthService(User, AuthConfig(secret=SECRET))
        names = await live(auth)
        assert not page["siem"].records
        await auth.relay().drain()
        records, documents = page["siem"].records, page["elastic"].records
        assert sorted(each["metadata"]["event_code"] for each in records) == sorted(names)
        assert sorted(each["event"]["action"] for each in documents) == sorted(names)
        for record in records:
            assert violations(record, "ocsf-1.8.json", str(record["class_uid"])) == []
        for document in documents:
            assert violations(document, "ecs-9.4.json", "document") == []

    async def test_tokens(self, page: dict[str, Any]) -> None:
        """The receiver gets a token for each event that has one, by RFC 8935, and can verify it."""
        auth = AuthService(User, AuthConfig(secret=SECRET))
        names = await live(auth)
        await auth.relay().drain()
        with_token = [name for name in names if _has_token(name)]
        posts = page["receiver"].posts
        assert len(posts) == len(with_token) == 11
        for path, body, headers in posts:
            assert path == "/events"
            assert headers["Content-Type"] == "application/secevent+jwt"
            claims = jwt.decode(
                body,
                pem("RS256", public=True),
                algorithms=["RS256"],
                issuer="https://id.example.com/",
                audience="https://shop.example.com/",
            )
            assert violations(claims, "set-rfc8417.json", "claims") == []

    async def test_refused_token_is_sent_again(self, page: dict[str, Any]) -> None:
        """A receiver that is down loses nothing."""
        clock = FakeClock(utc_now())  # sign-ups use the clock of the system
        auth = AuthService(User, AuthConfig(secret=SECRET), clock=clock)
        await User.create_user(email="ada@example.com", password=PASSWORD)
        await auth.login("ada@example.com", PASSWORD)
        page["receiver"].down = True
        await auth.relay().drain()
        assert page["receiver"].posts == []
        page["receiver"].down = False
        clock.advance(timedelta(hours=1))
        await auth.relay().drain()
        assert len(page["receiver"].posts) == 1

    async def test_no_secret(self, page: dict[str, Any]) -> None:
        """A password that was typed as an identifier leaves in no record, nor does any e-mail address but
        one that was typed."""
        auth = AuthService(User, AuthConfig(secret=SECRET))
        await live(auth)
        await auth.relay().drain()
        everything = repr([page[name].__dict__ for name in ("siem", "elastic", "receiver")])
        assert CANARY not in everything
        assert PASSWORD not in everything
        assert everything.count("ada@example.com") == 3  # OCSF; ECS, and once more as related


class TestTable:
    @pytest.mark.parametrize("kind", LIBRARY, ids=lambda kind: kind.name)
    def test_row(self, kind: type[Event]) -> None:
        """The table has a row for every event, which agrees with the functions."""
        assert _row(f"`{kind.name}`", sample(kind)) in _lines()

    def test_password_change(self) -> None:
        """A throttled password change has a row of its own."""
        event = replace(sample(LoginThrottled), attempted="password_change")
        assert _row("`login_throttled` of a password change", event) in _lines()


class TestWhatWasTyped:
    """The statements of the page on identifiers and addresses."""

    def test_of_an_account(self) -> None:
        """The identifier of an account is in OCSF and ECS, even as an address, and in each CloudEvent."""
        known = UserLoginFailed(identifier="ada@example.com", reason="bad_password", user_id="7")
        unknown = UserLoginFailed(identifier="hunter2", reason="not_found")
        for convert in (ocsf, ecs):
            assert "ada@example.com" in repr(convert(known))
            assert "hunter2" not in repr(convert(unknown))
        assert cloudevent(unknown, "https://a.example")["data"]["identifier"] == "hunter2"

    def test_control_characters(self) -> None:
        """Control characters are replaced in OCSF and ECS, and not in the data of a CloudEvent."""
        failed = UserLoginFailed(identifier="a\x1b[2J", reason="bad_password", user_id="7")
        for convert in (ocsf, ecs):
            assert "a\ufffd[2J" in repr(convert(failed))
            assert repr("\x1b")[1:-1] not in repr(convert(failed))
        assert cloudevent(failed, "https://a.example")["data"]["identifier"] == "a\x1b[2J"


def _row(title: str, event: Event) -> str:
    record, document = ocsf(event), ecs(event)["event"]
    claims = set_claims(event, issuer="https://id.example.com/", audience="shop")
    row = " | ".join(
        (
            f"| {title}",
            f"{record['type_uid']} {record['activity_name']}",
            record["status"],
            record["severity"],
            f"{', '.join(document['category'])} / {', '.join(document['type'])}"
            f" / {document['outcome']}",
            _short(claims),
        )
    )
    return re.sub(r" +", " ", f"{row} |")


def _lines() -> list[str]:
    return [re.sub(r" +", " ", line) for line in PAGE.read_text().splitlines()]


def _has_token(name: str) -> bool:
    (kind,) = (each for each in LIBRARY if each.name == name)
    return set_claims(sample(kind), issuer="a", audience="b") is not None


def _short(claims: dict[str, Any] | None) -> str:
    if claims is None:
        return ""
    (uri,) = claims["events"]
    *_, profile, _, name = uri.split("/")
    return f"{profile.upper()} {name}"
