"""The page about the web: its snippets are an application, its tables are those of the code."""

from __future__ import annotations

import re
from typing import Any

import pytest
from httpx2 import ASGITransport, AsyncClient, Response
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tests.support.requests import PEER, forwarded
from tests.support.snippets import ROOT, run, snippets, table
from tortoise_auth import AuthConfig, AuthService, exceptions
from tortoise_auth.exceptions import (
    EventError,
    EventErrorGroup,
    PasswordPolicyError,
    ThrottledError,
)
from tortoise_auth.web import Cookies, answer_to, client_address

PAGE = ROOT / "docs" / "web.md"
VETO = EventError("user_login", "handler", ValueError())


async def call(app: Starlette, method: str, path: str, **request: Any) -> Response:
    """Send a request in this task, which has the database."""
    transport = ASGITransport(app, client=(PEER, 50000))
    async with AsyncClient(transport=transport, base_url="https://app.example.com") as client:
        return await client.request(method, path, **request)


async def test_snippets_run(sqlite: TortoiseContext) -> None:
    """The snippets are an application that logs in, authenticates and refuses."""
    app = Starlette()
    auth = AuthService(User, AuthConfig(secret=SECRET))
    namespace: dict[str, Any] = {"app": app, "auth": auth, "User": User}
    sources = list(snippets(PAGE))
    assert len(sources) == 6
    for source in sources:
        await run(source, namespace, "docs/web.md")

    async def me(request: Request) -> JSONResponse:
        user = await namespace["current_user"](request.scope)
        return JSONResponse({"email": user.email})

    app.routes.extend(
        [
            Route("/log-in", namespace["log_in"], methods=["POST"]),
            Route("/me", me, methods=["GET", "POST"]),
        ]
    )
    await User.create_user(email=EMAIL, password=PASSWORD)
    form = {"email": EMAIL, "password": PASSWORD}

    assert (await call(app, "POST", "/log-in", json=form | {"password": "?"})).status_code == 401
    foreign = await call(app, "POST", "/log-in", json=form, headers={"Origin": "https://evil.test"})
    assert foreign.json()["code"] == "cross_origin"
    login = await call(app, "POST", "/log-in", json=form)
    cookie = "; ".join(each.split(";")[0] for each in login.headers.get_list("set-cookie"))
    assert (await call(app, "GET", "/me")).json()["code"] == "not_authenticated"
    assert (await call(app, "GET", "/me", headers={"Cookie": cookie})).json() == {"email": EMAIL}
    assert (await call(app, "POST", "/me", headers={"Cookie": cookie})).status_code == 403
    from_admin = {"Cookie": cookie, "Origin": "https://admin.example.com"}
    assert (await call(app, "POST", "/me", headers=from_admin)).status_code == 200
    dead = await call(app, "GET", "/me", headers={"Cookie": "__Host-session=x"})
    assert len(dead.headers.get_list("set-cookie")) == 2
    bearer = await call(app, "GET", "/me", headers={"Cookie": cookie, "Authorization": "Bearer x"})
    assert (bearer.status_code, bearer.headers.get_list("set-cookie")) == (401, [])
    assert bearer.headers["X-Request-ID"]

    api = namespace["api"]
    tokens = (
        await call(api, "POST", "/auth/login", json={"identifier": EMAIL, "password": PASSWORD})
    ).json()
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert (await call(api, "GET", "/hello", headers=headers)).json() == EMAIL
    ours = {
        f"{method.upper()} {path}"
        for path, operations in api.openapi()["paths"].items()
        for method in operations
    }
    stated = {row[0].strip("`") for row in table(PAGE, "FastAPI")}
    assert stated == ours - {"GET /hello"}


def test_addresses() -> None:
    """Each row of the table of hops is what the code says."""
    rows = table(PAGE, "Where a request comes from")
    assert len(rows) == 5
    for value, *addresses in rows:
        scope = forwarded(*re.findall("`(.+)`", value))
        assert [client_address(scope, trusted_hops=hops) for hops in range(3)] == addresses


def test_cookies() -> None:
    """The table of cookies has the names and attributes of the code."""
    stated = {row[0].strip("`"): row[1].strip("`") for row in table(PAGE, "Log in a browser")}
    assert stated == {
        cleared.split("=")[0]: cleared.split("; ", 2)[2] for cleared in Cookies().clear()
    }


@pytest.mark.parametrize("row", table(PAGE, "Answer errors"), ids=lambda row: row[0].strip("`"))
def test_answers(row: list[str]) -> None:
    """Each row of the table of errors is the answer of the code."""
    name, status, code, header = (cell.strip("`") for cell in row)
    made: dict[str, exceptions.TortoiseAuthError] = {
        "EventError": VETO,
        "EventErrorGroup": EventErrorGroup("user_login", [VETO]),
        "PasswordPolicyError": PasswordPolicyError([]),
        "ReauthenticationRequiredError": exceptions.ReauthenticationRequiredError(300),
        "ThrottledError": ThrottledError(30),
    }
    answer = answer_to(made.get(name) or getattr(exceptions, name)())
    assert answer is not None
    assert (str(answer.status), answer.body["code"]) == (status, code)
    headers = [f"{name}: {value}".lower() for name, value in answer.headers]
    assert headers == ["cache-control: no-store", *([header.lower()] if header else [])]


def test_table_of_answers_is_complete() -> None:
    """The table names every error that has an answer."""
    named = {row[0].strip("`") for row in table(PAGE, "Answer errors")}
    unnamed = {
        kind.__name__
        for kind in vars(exceptions).values()
        if isinstance(kind, type) and issubclass(kind, exceptions.TortoiseAuthError)
    } - named
    assert unnamed == {
        *("TortoiseAuthError", "ConfigurationError", "IdentifierTakenError", "SubscriptionError")
    }
