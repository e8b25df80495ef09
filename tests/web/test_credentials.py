"""Which token of a request counts."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.support.requests import SCOPES, Scope, request
from tortoise_auth.web import Cookies, Credentials, credentials

COOKIE = ("cookie", "__Host-session=from-cookie")


@pytest.mark.parametrize(
    ("authorization", "token"),
    [
        (["Bearer t"], "t"),
        (["bearer t"], "t"),
        (["BEARER   t"], "t"),
        (["Bearer a b"], "a b"),
        (["Bearer garbage"], "garbage"),
        (["Bearer"], None),
        (["Bearer "], None),
        (["Bearer\tt"], None),
        (["Bearert"], None),
        (["Basic dXNlcjpwYXNz"], None),
        (["Digest x, Bearer t"], None),
        ([""], None),
        ([], None),
        (["Bearer a", "Bearer b"], "a, Bearer b"),
        (["Basic a", "Bearer b"], None),
    ],
)
def test_table(authorization: list[str], token: str | None) -> None:
    """A bearer token counts alone; without one the cookie does, and another scheme changes nothing."""
    headers = [("authorization", line) for line in authorization]
    expected = None if token is None else Credentials(token, by_cookie=False)
    assert credentials(request(*headers)) == expected
    assert credentials(request(*headers, COOKIE)) == expected
    assert credentials(request(*headers, COOKIE), Cookies()) == (
        expected or Credentials("from-cookie", by_cookie=True)
    )


@pytest.mark.parametrize(
    "line", ["__Host-session-refresh=r", "__Host-session=a; __Host-session=b", "session=a"]
)
def test_no_other_cookie(line: str) -> None:
    """The refresh token does not authenticate, nor does a cookie that comes twice."""
    assert credentials(request(("cookie", line)), Cookies()) is None


def test_handshake() -> None:
    """A WebSocket handshake is read in the same way."""
    scope = request(COOKIE, kind="websocket")
    assert credentials(scope, Cookies()) == Credentials("from-cookie", by_cookie=True)


def test_shows_no_token() -> None:
    """The token is not in the ``repr``."""
    assert "from-cookie" not in repr(credentials(request(COOKIE), Cookies()))


@given(SCOPES)
def test_any_request(scope: Scope) -> None:
    """Whatever comes, a token is not empty, and is that of a cookie only if the cookie has it."""
    for cookies in (None, Cookies()):
        found = credentials(scope, cookies)
        assert found is None or found.token
        if found is not None and found.by_cookie:
            assert cookies is not None
            assert found.token == cookies.read(scope).access
