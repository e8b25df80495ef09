"""FastAPI: dependencies, routes, both transports, answers, the document, the lifespan."""

# Without `from __future__ import annotations`: dependencies of these routes are local variables.

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from fastapi.testclient import TestClient
from httpx2 import ASGITransport, AsyncClient, Response
from pydantic import BaseModel, ConfigDict
from starlette.testclient import WebSocketDenialResponse
from tortoise.context import TortoiseContext
from tortoise.contrib.fastapi import RegisterTortoise
from tortoise.exceptions import DBConnectionError

from tests.support.accounts import EMAIL, NEW_PASSWORD, PASSWORD, SECRET
from tests.support.app import NamedUser, User
from tests.support.statements import statements
from tortoise_auth import AuthConfig, AuthResult, AuthService, EventEmitter, RequestContext
from tortoise_auth.clock import utc_now
from tortoise_auth.context import request_context
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.integrations.fastapi import Guard, QuietRoute, auth_router, install, lifespan
from tortoise_auth.models import Session
from tortoise_auth.testing import Captured, FakeClock
from tortoise_auth.web import Cookies

HOST = "app.example.com"
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
SIBLING = {"Sec-Fetch-Site": "same-site", "Origin": "https://blog.example.com"}
FORM = {"identifier": EMAIL, "password": PASSWORD}


def service(**settings: Any) -> AuthService[User]:
    grace = timedelta(seconds=30)
    return AuthService(User, AuthConfig(secret=SECRET, refresh_reuse_grace=grace, **settings))


class Site:
    """An application with the routes of one guard, and a client of it."""

    def __init__(
        self,
        cookies: Cookies | None = None,
        *,
        auth: AuthService[User] | None = None,
        **options: Any,
    ) -> None:
        self.auth = auth or service()
        self.guard = Guard(self.auth, cookies)
        self.app = FastAPI()
        install(self.app, trusted_hops=1)
        self.app.include_router(auth_router(self.guard, **options), prefix="/auth")
        self.client = AsyncClient(
            transport=ASGITransport(self.app, client=("198.51.100.9", 5)),
            base_url=f"https://{HOST}",
        )

    async def post(self, path: str, json: Any = None, **headers: str) -> Response:
        """Send JSON to a route of ours."""
        return await self.client.post(f"/auth{path}", json=json, headers=headers)

    async def get(self, path: str, **headers: str) -> Response:
        """Ask a route of ours."""
        return await self.client.get(f"/auth{path}", headers=headers)

    async def log_in(self) -> dict[str, str]:
        """Log in as Ada, and return the header of her token."""
        tokens = (await self.post("/login", FORM)).json()
        return {"Authorization": f"Bearer {tokens['access_token']}"}


@pytest.fixture
async def account(sqlite: TortoiseContext) -> User:
    return await User.create_user(email=EMAIL, password=PASSWORD)


@pytest.fixture
async def site(account: User) -> AsyncIterator[Site]:
    """Bearer tokens alone."""
    made = Site()
    async with made.client:
        yield made


@pytest.fixture
async def browser(account: User) -> AsyncIterator[Site]:
    """Cookies, and the headers of the site's own page."""
    made = Site(Cookies())
    made.client.headers.update(OWN_PAGE)
    async with made.client:
        yield made


def code(response: Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


class TestBearer:
    async def test_session(self, site: Site) -> None:
        """Log in, use the token, refresh, log out."""
        login = await site.post("/login", FORM)
        assert login.status_code == 200
        assert login.headers["cache-control"] == "no-store"
        assert "set-cookie" not in login.headers
        tokens = login.json()
        assert {type(value) for value in tokens.values()} == {str, int}
        assert (tokens["token_type"], tokens["expires_in"] in (899, 900)) == ("Bearer", True)
        bearer = {"Authorization": f"Bearer {tokens['access_token']}"}
        assert (await site.get("/me", **bearer)).json() == {"id": "1", "email": EMAIL}
        refreshed = await site.post("/refresh", {"refresh_token": tokens["refresh_token"]})
        assert refreshed.json().keys() == tokens.keys()
        assert (await site.post("/logout", **bearer)).status_code == 204
        assert code(await site.get("/me", **bearer)) == (401, "token_revoked")

    async def test_refused(self, site: Site) -> None:
        """Each refusal has its code and its challenge, and is not cached."""
        wrong = await site.post("/login", FORM | {"password": "wrong"})
        assert code(wrong) == (401, "invalid_credentials")
        for headers, expected in (
            ({}, "not_authenticated"),
            ({"Authorization": "Bearer x"}, "token_invalid"),
            ({"Authorization": "Basic x"}, "not_authenticated"),
        ):
            answer = await site.get("/me", **headers)
            assert code(answer) == (401, expected)
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.headers["cache-control"] == "no-store"
        reused = await site.post("/refresh", {"refresh_token": "tart_x"})
        assert code(reused) == (401, "token_invalid")

    async def test_cookies_do_not_count(self, site: Site) -> None:
        """A guard without cookies reads none."""
        token = (await site.log_in())["Authorization"].partition(" ")[2]
        assert code(await site.get("/me", Cookie=f"__Host-session={token}")) == (
            401,
            "not_authenticated",
        )

    @pytest.mark.parametrize(
        "token", ["", "Bearer x", "Bearer  Bearer x", "Bearer a.b.c", f"Bearer {'0' * 32}"]
    )
    async def test_logout_of_nothing(self, site: Site, token: str) -> None:
        """A logout ends what there is, and is never an error."""
        assert (await site.post("/logout", Authorization=token)).status_code == 204

    async def test_throttled(self, site: Site) -> None:
        """After some wrong passwords the answer says how many seconds to wait."""
        answers = [await site.post("/login", FORM | {"password": str(i)}) for i in range(12)]
        assert code(answers[0]) == (401, "invalid_credentials")
        assert code(answers[-1]) == (429, "throttled")
        assert int(answers[-1].headers["retry-after"]) >= 1

    async def test_where_it_came_from(self, site: Site, events: Captured) -> None:
        """Sessions know the address that the proxy reports."""
        forwarded = {"X-Forwarded-For": "1.2.3.4, 203.0.113.7", "User-Agent": "Firefox"}
        login = await site.client.post("/auth/login", json=FORM, headers=forwarded)
        event = events[0]
        assert event.context == RequestContext(
            ip="203.0.113.7", user_agent="Firefox", request_id=login.headers["x-request-id"]
        )
        assert request_context.get(None) is None

    async def test_who_it_was(self, site: Site, events: Captured) -> None:
        """Events below a guard say who is signed in, and the next request knows nothing of it."""
        bearer = await site.log_in()
        await site.post("/logout-all", {"keep_current": False}, **bearer)
        await site.log_in()
        assert [event.context.actor_id for event in events] == [None, "1", None]
        assert request_context.get(None) is None


class TestAccount:
    async def test_password(self, site: Site) -> None:
        """A new password ends the other sessions, and this one goes on."""
        mine, other = await site.log_in(), await site.log_in()
        form = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
        weak = await site.post("/password", form | {"new_password": "short"}, **mine)
        assert code(weak) == (422, "password_refused")
        assert weak.json()["failures"][0]["code"] == "too_short"
        assert (await site.post("/password", form, **mine)).status_code == 204
        assert (await site.get("/me", **mine)).status_code == 200
        assert code(await site.get("/me", **other)) == (401, "token_revoked")

    async def test_sessions(self, site: Site) -> None:
        """The list marks the current session, and one of the others can be ended."""
        mine, other = await site.log_in(), await site.log_in()
        listed = (await site.get("/sessions", **mine)).json()
        assert sorted(each["current"] for each in listed) == [False, True]
        (theirs,) = (each["id"] for each in listed if not each["current"])
        answer = await site.client.delete(f"/auth/sessions/{theirs}", headers=mine)
        assert answer.status_code == 204
        assert code(await site.get("/me", **other)) == (401, "token_revoked")

    async def test_sessions_of_others(self, site: Site) -> None:
        """What is not a session of the account has one answer, to the byte."""
        eve = await User.create_user(email="eve@example.com", password=PASSWORD)
        hers = await site.auth.login(eve.email, PASSWORD)
        mine = await site.log_in()
        answers = [
            await site.client.delete(f"/auth/sessions/{each}", headers=mine)
            for each in (hers.session.id, "not-a-uuid", "x" * 5000)
        ]
        assert {each.status_code for each in answers} == {404}
        assert len({each.content for each in answers}) == 1
        await site.auth.authenticate(hers.access_token)

    @pytest.mark.parametrize(
        ("form", "ended", "live"),
        [(None, 1, True), ({}, 1, True), ({"keep_current": False}, 2, False)],
    )
    async def test_logout_all(self, site: Site, form: Any, ended: int, live: bool) -> None:
        """The current session goes on unless it is to end, too."""
        await site.log_in()
        mine = await site.log_in()
        assert (await site.post("/logout-all", form, **mine)).json() == {"sessions_ended": ended}
        assert ((await site.get("/me", **mine)).status_code == 200) is live

    @pytest.mark.parametrize("value", [0, "no", None, []])
    async def test_logout_all_takes_a_boolean(self, site: Site, value: object) -> None:
        """What is only like a boolean is refused: it would decide which sessions end."""
        mine = await site.log_in()
        answer = await site.post("/logout-all", {"keep_current": value}, **mine)
        assert code(answer) == (422, "invalid_request")

    async def test_read_user(self, account: User) -> None:
        """The host's model decides what is shown."""

        class UserRead(BaseModel):
            model_config = ConfigDict(from_attributes=True)
            id: int
            display_name: str

        site = Site(read_user=UserRead)
        async with site.client:
            answer = await site.get("/me", **await site.log_in())
        assert answer.json() == {"id": account.pk, "display_name": ""}


class TestCookies:
    async def test_session(self, browser: Site) -> None:
        """No answer holds a token; the jar carries the session, through a refresh, to its end."""
        login = await browser.post("/login", FORM)
        assert login.json() == {
            "expires_in": login.json()["expires_in"],
            "user": {"id": "1", "email": EMAIL},
        }
        access, refresh = login.headers.get_list("set-cookie")
        assert "; HttpOnly; SameSite=Lax" in access
        assert "; HttpOnly; SameSite=Strict" in refresh
        assert login.headers["cache-control"] == "no-store"
        assert (await browser.get("/me")).json()["email"] == EMAIL
        refreshed = await browser.post("/refresh")
        assert refreshed.json().keys() == {"expires_in"}
        assert len(refreshed.headers.get_list("set-cookie")) == 2
        assert (await browser.get("/me")).status_code == 200
        assert (await browser.post("/logout")).status_code == 204
        assert not browser.client.cookies
        assert code(await browser.get("/me")) == (401, "not_authenticated")
        assert await Session.filter(revoked_at__isnull=True).count() == 0

    @pytest.mark.parametrize("path", ["/login", "/refresh", "/logout", "/logout-all", "/password"])
    async def test_other_origins(self, browser: Site, path: str) -> None:
        """A page of a sibling can neither act for the visitor nor log them into its own account."""
        await browser.post("/login", FORM)
        for jar in (dict(browser.client.cookies), {}):
            if not jar and path in ("/logout-all", "/password"):
                continue  # without a cookie nothing is authenticated by one
            browser.client.cookies = jar
            body = FORM if path == "/login" else {"current_password": "a", "new_password": "b"}
            answer = await browser.post(path, body, **SIBLING)
            assert code(answer) == (403, "cross_origin")
            assert "set-cookie" not in answer.headers
        assert await Session.filter(revoked_at__isnull=True).count() == 1

    async def test_programs(self, browser: Site) -> None:
        """A program that sends neither header can log in, and not act by the cookie."""
        del browser.client.headers["Sec-Fetch-Site"]
        assert (await browser.post("/login", FORM)).status_code == 200
        assert (await browser.get("/me")).status_code == 200
        assert code(await browser.post("/logout-all")) == (403, "cross_origin")

    async def test_bearer_counts_alone(self, browser: Site) -> None:
        """With a bad bearer token a good cookie is not used, and not cleared."""
        await browser.post("/login", FORM)
        answer = await browser.get("/me", Authorization="Bearer x")
        assert code(answer) == (401, "token_invalid")
        assert "set-cookie" not in answer.headers
        assert (await browser.get("/me")).status_code == 200

    async def test_dead_session(self, browser: Site) -> None:
        """The cookies of a session that ended are cleared."""
        await browser.post("/login", FORM)
        await Session.all().update(revoked_at=utc_now())
        answer = await browser.get("/me")
        assert code(answer) == (401, "token_revoked")
        assert len(answer.headers.get_list("set-cookie")) == 2
        assert not browser.client.cookies

    async def test_dead_refresh(self, browser: Site) -> None:
        """A refresh that is refused clears them, too; one without a cookie does not."""
        assert code(await browser.post("/refresh")) == (401, "not_authenticated")
        await browser.post("/login", FORM)
        await Session.all().update(revoked_at=utc_now())
        answer = await browser.post("/refresh")
        assert code(answer) == (401, "token_revoked")
        assert not browser.client.cookies

    async def test_expired_access(self, account: User) -> None:
        """An access token that has only expired leaves the cookies, and a refresh mends it."""
        clock = FakeClock(utc_now())
        config = AuthConfig(secret=SECRET, refresh_reuse_grace=timedelta(seconds=30))
        site = Site(Cookies(), auth=AuthService(User, config, clock=clock))
        async with site.client:
            login = await site.post("/login", FORM)
            jar = "; ".join(each.split(";")[0] for each in login.headers.get_list("set-cookie"))
            site.client.cookies.clear()
            clock.advance(timedelta(minutes=20))
            answer = await site.get("/me", Cookie=jar)
            assert code(answer) == (401, "token_expired")
            assert "set-cookie" not in answer.headers
            assert (await site.post("/refresh", Cookie=jar, **OWN_PAGE)).status_code == 200

    async def test_logout_ends_all_that_came(self, browser: Site) -> None:
        """The session of a bearer token and that of the cookies end together."""
        other = await browser.auth.login(EMAIL, PASSWORD)
        await browser.post("/login", FORM)
        answer = await browser.post("/logout", Authorization=f"Bearer {other.access_token}")
        assert answer.status_code == 204
        assert not browser.client.cookies
        assert await Session.filter(revoked_at__isnull=True).count() == 0

    async def test_logout_without_a_session(self, browser: Site) -> None:
        """A logout without anything clears the cookies."""
        answer = await browser.post("/logout")
        assert answer.status_code == 204
        assert ["Max-Age=0" in each for each in answer.headers.get_list("set-cookie")] == [True] * 2

    async def test_login_ends_the_session_before(self, browser: Site) -> None:
        """No session is left over that no jar holds, and a wrong password ends none."""
        await browser.post("/login", FORM)
        assert (await browser.post("/login", FORM | {"password": "?"})).status_code == 401
        assert await Session.filter(revoked_at__isnull=True).count() == 1
        await browser.post("/login", FORM)
        assert await Session.filter(revoked_at__isnull=True).count() == 1
        assert (await browser.get("/me")).status_code == 200

    async def test_tabs(self, browser: Site) -> None:
        """Three tabs that refresh with one cookie all go on."""
        await browser.post("/login", FORM)
        jar = "; ".join(f"{name}={value}" for name, value in browser.client.cookies.items())
        browser.client.cookies.clear()
        for _ in range(3):
            refreshed = await browser.post("/refresh", Cookie=jar)
            assert refreshed.status_code == 200
            assert (await browser.get("/me")).status_code == 200
            browser.client.cookies.clear()

    async def test_too_large(self, browser: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token that browsers would drop is an error, and leaves no session behind."""
        login = browser.auth.login

        async def with_claims(identifier: str, password: str) -> AuthResult[User]:
            return await login(identifier, password, claims={"roles": "x" * 4000})

        monkeypatch.setattr(browser.auth, "login", with_claims)
        with pytest.raises(ConfigurationError, match="put less into claims="):
            await browser.post("/login", FORM)
        assert await Session.all().count() == 1
        assert await Session.filter(revoked_at__isnull=True).count() == 0

    def test_warns(self) -> None:
        """Without a grace period tabs would log each other out, so construction warns."""
        auth = AuthService(User, AuthConfig(secret=SECRET))
        with pytest.warns(UserWarning, match="refresh_reuse_grace"):
            Guard(auth, Cookies())
        Guard(auth)


class TestDependencies:
    async def test_one_query(self, sqlite: TortoiseContext, browser: Site) -> None:
        """All dependencies of a guard together cost one statement."""
        guard = browser.guard

        @browser.app.get("/all")
        async def every(
            user: Annotated[User, Depends(guard.user)],
            optional: Annotated[User | None, Depends(guard.optional_user)],
            fresh: Annotated[User, Depends(guard.fresh_user(timedelta(minutes=5)))],
            session: Annotated[Any, Depends(guard.session)],
        ) -> bool:
            return user is optional is fresh is session.user

        await browser.post("/login", FORM)
        with statements(sqlite) as seen:
            assert (await browser.client.get("/all")).json() is True
        assert len(seen) == 1

    async def test_optional(self, browser: Site) -> None:
        """Without a token, or with a dead cookie, there is no user; a bad bearer token is refused."""

        @browser.app.get("/maybe")
        async def maybe(
            user: Annotated[User | None, Depends(browser.guard.optional_user)],
        ) -> str | None:
            return user.email if user else None

        assert (await browser.client.get("/maybe")).json() is None
        await browser.post("/login", FORM)
        assert (await browser.client.get("/maybe")).json() == EMAIL
        bad = await browser.client.get("/maybe", headers={"Authorization": "Bearer x"})
        assert code(bad) == (401, "token_invalid")
        await Session.all().update(revoked_at=utc_now())
        assert (await browser.client.get("/maybe")).json() is None

    async def test_fresh(self, site: Site) -> None:
        """A session that was opened too long ago is not fresh, and a new login is."""
        guard = site.guard
        fresh = guard.fresh_user(timedelta(minutes=5))
        assert guard.fresh_user(timedelta(minutes=5)) is fresh
        site.app.get("/fresh", dependencies=[Depends(fresh)])(lambda: True)
        bearer = await site.log_in()
        assert (await site.client.get("/fresh", headers=bearer)).status_code == 200
        await Session.all().update(authenticated_at=utc_now() - timedelta(minutes=6))
        answer = await site.client.get("/fresh", headers=bearer)
        assert code(answer) == (401, "reauthentication_required")
        assert 'max_age="300"' in answer.headers["www-authenticate"]
        bearer = await site.log_in()
        assert (await site.client.get("/fresh", headers=bearer)).status_code == 200

    async def test_overrides(self, site: Site) -> None:
        """A host's test replaces the user by its own."""
        site.app.dependency_overrides[site.guard.user] = lambda: User(id=7, email="eve@example.com")
        assert (await site.get("/me")).json() == {"id": "7", "email": "eve@example.com"}

    async def test_two_models(self, account: User) -> None:
        """Two guards in one application have their own routes and schemes, and mix no users."""
        site = Site(Cookies())
        players = AuthService(
            NamedUser, AuthConfig(secret=SECRET, refresh_reuse_grace=timedelta(seconds=5))
        )
        admin = Guard(players, Cookies("admin"), name="Admin")
        site.app.include_router(auth_router(admin, name="admin"), prefix="/admin")
        document = site.app.openapi()
        operations = [
            operation["operationId"]
            for path in document["paths"].values()
            for operation in path.values()
        ]
        assert len(operations) == len(set(operations)) == 16
        assert document["components"]["securitySchemes"].keys() == {
            *("AccessToken", "SessionCookie", "AdminAccessToken", "AdminSessionCookie")
        }
        tokens = await site.auth.login(EMAIL, PASSWORD)
        bearer = {"Authorization": f"Bearer {tokens.access_token}"}
        async with site.client as client:
            assert (await client.get("/auth/me", headers=bearer)).status_code == 200
            assert code(await client.get("/admin/me", headers=bearer)) == (401, "token_invalid")


HOSTILE = "hunter2 and more"


class TestNothingTypedIsRepeated:
    @pytest.mark.parametrize(
        "body",
        [
            {"json": {"identifier": EMAIL, "password": {"a": HOSTILE}}},
            {"json": {"identifier": EMAIL, "password": [HOSTILE]}},
            {"json": {"identifier": [HOSTILE], "password": "x"}},
            {"json": {"identifier": EMAIL, "password": HOSTILE * 1000}},
            {"json": {**FORM, "more": HOSTILE}},
            {"json": {**FORM, HOSTILE: "more"}},
            {"json": HOSTILE},
            {"data": {"password": HOSTILE}},
            {
                "content": f'{{"password": "{HOSTILE}"',
                "headers": {"Content-Type": "application/json"},
            },
            {"content": f'{{"password": "{HOSTILE}"}}', "headers": {"Content-Type": "text/plain"}},
            {
                "content": b"\xff" + HOSTILE.encode(),
                "headers": {"Content-Type": "application/json"},
            },
        ],
    )
    async def test_login(self, site: Site, body: dict[str, Any]) -> None:
        """A body that is refused is not in the answer."""
        answer = await site.client.post("/auth/login", **body)
        assert answer.status_code in (400, 422)
        assert answer.json()["code"] == "invalid_request"
        assert answer.json()["detail"]
        assert HOSTILE not in answer.text

    async def test_too_much(self, site: Site) -> None:
        """A body that no form of ours can have is refused."""
        answer = await site.post("/login", FORM | {"password": HOSTILE * 2000})
        assert answer.status_code in (413, 422)  # FastAPI has no limit of its own before 0.165
        assert HOSTILE not in answer.text

    async def test_routes_of_the_host(self, site: Site) -> None:
        """What the host's own routes answer stays as it is, unless they are to be quiet as well."""
        site.app.get("/number")(number)
        quiet = APIRouter(route_class=QuietRoute)
        quiet.get("/quiet")(number)
        site.app.include_router(quiet, prefix="/own")
        answer = await site.client.get("/number", params={"value": HOSTILE})
        assert answer.json()["detail"][0]["input"] == HOSTILE
        answer = await site.client.get("/own/quiet", params={"value": HOSTILE})
        assert code(answer) == (422, "invalid_request")
        assert HOSTILE not in answer.text


def number(value: int) -> int:
    return value


class TestErrors:
    async def test_outage(self, sqlite: TortoiseContext, browser: Site) -> None:
        """Without a database the answer is 503, never 401, and the cookies stay."""
        await browser.post("/login", FORM)
        with statements(sqlite, fail_at=1, error=DBConnectionError("gone")):
            answer = await browser.get("/me")
        assert code(answer) == (503, "service_unavailable")
        assert answer.headers["retry-after"] == "5"
        assert "set-cookie" not in answer.headers

    async def test_veto(self, site: Site, emitter: EventEmitter) -> None:
        """A handler in the transaction refuses by an HTTP error, or by any other without its text."""
        errors: list[Exception] = [HTTPException(451, "Not from here"), ValueError("internal")]

        @emitter.on("user_login", delivery="transaction")
        async def refuse() -> None:
            raise errors.pop(0)

        answer = await site.post("/login", FORM)
        assert (answer.status_code, answer.json()) == (451, {"detail": "Not from here"})
        answer = await site.post("/login", FORM)
        assert code(answer) == (503, "refused")
        assert "internal" not in answer.text
        assert await Session.all().count() == 0

    async def test_mistake_of_the_program(self, site: Site) -> None:
        """A configuration error stays an error, so it is a 500 and is logged."""

        @site.app.get("/broken")
        async def broken() -> None:
            raise ConfigurationError("a text for the makers")

        with pytest.raises(ConfigurationError):
            await site.client.get("/broken")


class TestSettings:
    def test_read_user(self) -> None:
        """A model that shows a secret, or cannot read an account, is refused at construction."""

        class Leaky(BaseModel):
            model_config = ConfigDict(from_attributes=True)
            password: str

        class Unreadable(BaseModel):
            email: str

        guard = Guard(service())
        with pytest.raises(ConfigurationError, match="would show password"):
            auth_router(guard, read_user=Leaky)
        with pytest.raises(ConfigurationError, match="from_attributes=True"):
            auth_router(guard, read_user=Unreadable)

    def test_install(self) -> None:
        """A number of hops that cannot be meant is refused at once."""
        with pytest.raises(ConfigurationError, match="trusted_hops"):
            install(FastAPI(), trusted_hops=-1)

    @pytest.mark.parametrize("given", [(User,), (service(), "session")])
    def test_guard(self, given: Any) -> None:
        """What is no service, or no cookies, is refused."""
        with pytest.raises(ConfigurationError, match=r"^Guard takes"):
            Guard(*given)


class TestDocument:
    def test_alternatives(self) -> None:
        """A route that needs a user takes either credential, and a logout takes none, too."""
        document = Site(Cookies()).app.openapi()
        paths = document["paths"]
        either: list[dict[str, list[str]]] = [{"AccessToken": []}, {"SessionCookie": []}]
        assert paths["/auth/me"]["get"]["security"] == either
        assert {} in paths["/auth/logout"]["post"]["security"]
        assert "security" not in paths["/auth/login"]["post"]
        schemes = document["components"]["securitySchemes"]
        assert schemes["SessionCookie"]["name"] == "__Host-session"
        assert schemes["AccessToken"]["scheme"] == "bearer"

    def test_without_cookies(self) -> None:
        """A guard without cookies declares none, and no 403."""
        document = Site().app.openapi()
        assert document["components"]["securitySchemes"].keys() == {"AccessToken"}
        assert "403" not in document["paths"]["/auth/me"]["get"]["responses"]

    def test_answers(self) -> None:
        """Each route documents its refusals, and a host's router takes them over."""
        site = Site(Cookies())
        router = APIRouter(responses=site.guard.responses)
        router.get("/own", dependencies=[Depends(site.guard.user)])(lambda: True)
        site.app.include_router(router)
        paths = site.app.openapi()["paths"]
        for path, operations in paths.items():
            for operation in operations.values():
                assert {"400", "401", "403", "503"} <= operation["responses"].keys(), path
        assert "WWW-Authenticate" in paths["/own"]["get"]["responses"]["401"]["headers"]


class TestServed:
    """With a lifespan and a WebSocket, in the loop of Starlette's test client."""

    @pytest.fixture
    def app(self, tmp_path: Path) -> FastAPI:
        """An application whose database opens with it."""
        auth = service()
        guard = Guard(auth, Cookies())
        database = RegisterTortoise(
            db_url=f"sqlite://{tmp_path / 'app.sqlite3'}",
            modules={"models": ["tests.support.app", "tortoise_auth.models"]},
            generate_schemas=True,
        )
        app = FastAPI(lifespan=lifespan(auth, database=database, relay=True))
        install(app)
        app.include_router(auth_router(guard), prefix="/auth")

        @app.post("/sign-up")
        async def sign_up() -> None:
            await User.create_user(email=EMAIL, password=PASSWORD)

        @app.websocket("/socket")
        async def socket(websocket: WebSocket, user: Annotated[User, Depends(guard.user)]) -> None:
            await websocket.accept()
            await websocket.send_text(user.email)
            await websocket.receive_text()
            await auth.authenticate("x")

        return app

    def test_lifespan_and_websocket(self, app: FastAPI, emitter: EventEmitter) -> None:
        """The database is open, a WebSocket knows its user, and what is in flight is finished."""
        delivered: list[str] = []

        @emitter.on("user_login", delivery="background")
        async def note(user: User) -> None:
            delivered.append((await User.get(pk=user.pk)).email)

        with TestClient(app, base_url=f"https://{HOST}", client=("203.0.113.7", 5)) as client:
            assert client.post("/sign-up").status_code == 200
            assert client.post("/auth/login", json=FORM).status_code == 200
            with pytest.raises(WebSocketDenialResponse) as refused:
                client.websocket_connect("wss://app.example.com/socket").__enter__()
            assert code(refused.value) == (403, "cross_origin")
            own = {"Origin": f"https://{HOST}"}
            with client.websocket_connect(f"wss://{HOST}/socket", headers=own) as socket:
                assert socket.receive_text() == EMAIL
                socket.send_text("go on")
                assert socket.receive() == {"type": "websocket.close", "code": 1008, "reason": ""}
            client.cookies.clear()
            with pytest.raises(WebSocketDenialResponse) as refused:
                client.websocket_connect(f"wss://{HOST}/socket", headers=own).__enter__()
            assert code(refused.value) == (401, "not_authenticated")
        assert delivered == [EMAIL]

    async def test_order(self, emitter: EventEmitter) -> None:
        """What is in flight is finished before the database closes, also without a relay."""
        order: list[str] = []

        @emitter.on("note", delivery="background")
        async def note() -> None:
            await asyncio.sleep(0)
            order.append("delivered")

        @asynccontextmanager
        async def database() -> AsyncIterator[None]:
            order.append("open")
            yield
            order.append("closed")

        async with lifespan(service(), database=database())(FastAPI()):
            await emitter.emit("note")
        assert order == ["open", "delivered", "closed"]

    def test_failed_start(self, caplog: pytest.LogCaptureFixture) -> None:
        """If the database cannot be opened, the application does not start, and nothing stays open."""
        broken = RegisterTortoise(
            db_url="sqlite://:memory:", modules={"models": ["no.such.module"]}
        )
        app = FastAPI(lifespan=lifespan(service(), database=broken))
        with caplog.at_level(logging.CRITICAL), pytest.raises(Exception, match=r"no\.such\.module"):
            TestClient(app).__enter__()
