"""The parts under a real server, in applications of two frameworks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from httpx2 import Client, Response
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.support.accounts import EMAIL, PASSWORD
from tests.support.web_servers import LIMIT, serving

THROUGH_A_PROXY = {"X-Forwarded-For": "1.2.3.4, 203.0.113.7"}
"""What our proxy sends for a client that forges the first element."""


def receive(port: int, cookie: str, **headers: str) -> Any:
    """Open a WebSocket with a cookie, and return its first message."""
    with connect(
        f"ws://127.0.0.1:{port}/socket",
        additional_headers={"Cookie": cookie, **headers, **THROUGH_A_PROXY},
        open_timeout=LIMIT,
    ) as opened:
        message = json.loads(opened.recv(LIMIT))
        assert opened.response is not None
        assert message["request_id"] == opened.response.headers["X-Request-ID"]
        return message


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "unauthenticated"), [("starlette", 401), ("litestar", 403)])
def test_under_uvicorn(framework: str, unauthenticated: int, tmp_path: Path) -> None:
    """Cookies, origins, addresses and errors are the same in both, over HTTP and WebSocket."""
    app = f"tests.support.web_apps:{framework}_app"
    with (
        serving(app, tmp_path) as port,
        Client(
            base_url=f"http://127.0.0.1:{port}", headers=THROUGH_A_PROXY, timeout=LIMIT
        ) as client,
    ):
        # Wrong, then by a page of another site, then right.
        form = {"identifier": EMAIL, "password": PASSWORD}
        wrong = client.post("/login", json=form | {"password": "wrong"})
        assert (wrong.status_code, wrong.json()["code"]) == (401, "invalid_credentials")
        assert (wrong.headers["www-authenticate"], wrong.headers["cache-control"]) == (
            "Bearer",
            "no-store",
        )
        foreign = client.post("/login", json=form, headers={"Sec-Fetch-Site": "cross-site"})
        assert (foreign.status_code, foreign.json()["code"]) == (403, "cross_origin")
        assert "set-cookie" not in foreign.headers
        login = client.post("/login", json=form)
        assert login.status_code == 200
        access, refresh = login.headers.get_list("set-cookie")
        assert re.fullmatch(
            r"__Host-session=[\w.-]+; Max-Age=\d+; Path=/; Secure; HttpOnly; SameSite=Lax", access
        )
        assert refresh.startswith("__Host-session-refresh=tart_")
        cookie, client.cookies = access.split(";")[0], {}

        # A request with the cookie, and without.
        answer = client.get("/me", headers={"Cookie": cookie})
        assert answer.json() == {
            "email": EMAIL,
            "ip": "203.0.113.7",
            "request_id": answer.headers["x-request-id"],
        }
        assert client.get("/me").json()["code"] == "not_authenticated"
        bearer = {"Authorization": f"Bearer {cookie.partition('=')[2]}"}
        assert client.post("/me", headers=bearer).json()["email"] == EMAIL

        # What changes something needs an origin, and so does a handshake.
        own = {"Cookie": cookie, "Origin": f"http://127.0.0.1:{port}"}
        assert client.post("/me", headers=own).json()["email"] == EMAIL
        assert client.post("/me", headers={"Cookie": cookie}).status_code == 403
        other_port = own | {"Origin": f"http://127.0.0.1:{port + 1}"}
        assert client.post("/me", headers=other_port).json()["code"] == "cross_origin"
        message = receive(port, cookie, Origin=own["Origin"])
        assert (message["email"], message["ip"]) == (EMAIL, "203.0.113.7")
        for headers in ({}, {"Origin": other_port["Origin"]}):
            with pytest.raises(InvalidStatus) as refused:
                receive(port, cookie, **headers)
            assert refused.value.response.status_code == 403
        with pytest.raises(InvalidStatus) as refused:
            receive(port, "other=1", Origin=own["Origin"])
        assert refused.value.response.status_code == unauthenticated

        # A cookie that is none any more is deleted.
        dead = client.get("/me", headers={"Cookie": "__Host-session=a.b.c"})
        assert (dead.status_code, dead.json()["code"]) == (401, "token_invalid")
        assert dead.headers["www-authenticate"] == 'Bearer error="invalid_token"'
        assert [value.split(";")[0] for value in dead.headers.get_list("set-cookie")] == [
            "__Host-session=",
            "__Host-session-refresh=",
        ]


@pytest.mark.slow
def test_fastapi_under_uvicorn(tmp_path: Path) -> None:
    """A browser's session from login to logout, with a WebSocket, and a bearer token beside it."""
    with (
        serving("tests.support.web_apps:fastapi_app", tmp_path) as port,
        Client(
            base_url=f"http://127.0.0.1:{port}/auth", headers=THROUGH_A_PROXY, timeout=LIMIT
        ) as client,
    ):
        own = {"Origin": f"http://127.0.0.1:{port}"}

        def post(path: str, cookie: str, json: object = None) -> Response:
            answer = client.post(path, json=json, headers={**own, "Cookie": cookie})
            client.cookies.clear()  # which the client would not send without TLS
            return answer

        def jar(answer: Response) -> str:
            return "; ".join(each.split(";")[0] for each in answer.headers.get_list("set-cookie"))

        login = post("/login", "", {"identifier": EMAIL, "password": PASSWORD})
        assert login.json()["user"]["email"] == EMAIL
        cookie = jar(login)
        message = receive(port, cookie, **own)
        assert (message["email"], message["ip"]) == (EMAIL, "203.0.113.7")
        for headers, status in (
            ({"Origin": "http://127.0.0.1:1"}, 403),
            ({"Cookie": "__Host-session=x", **own}, 401),
        ):
            with pytest.raises(InvalidStatus) as refused:
                receive(port, headers.pop("Cookie", cookie), **headers)
            assert refused.value.response.status_code == status

        tabs = [post("/refresh", cookie) for _ in range(3)]
        assert [each.status_code for each in tabs] == [200, 200, 200]
        cookie = jar(tabs[0])
        sessions = client.get("/sessions", headers={"Cookie": cookie}).json()
        assert [(each["ip"], each["current"]) for each in sessions] == [("203.0.113.7", True)]
        bearer = {"Authorization": f"Bearer {cookie.split(';')[0].partition('=')[2]}"}
        assert client.get("/me", headers=bearer).json()["email"] == EMAIL
        assert post("/logout", cookie).status_code == 204
        assert client.get("/me", headers=bearer).json()["code"] == "token_revoked"
