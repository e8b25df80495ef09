"""Cookies: what is set, what deletes it, and what is read."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from http.cookies import SimpleCookie

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.app import User
from tests.support.requests import SCOPES, Scope, request
from tortoise_auth import AuthResult
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.models import Session
from tortoise_auth.web import Cookies

NOW = datetime(2026, 11, 28, 12, 0, 0, 500_000, tzinfo=UTC)
PLAIN = Cookies(secure=False, development=True)


def result(access: str = "a.b.c", refresh: str = "tart_r") -> AuthResult[User]:
    """Return a session whose tokens live for a quarter of an hour and for a week."""
    return AuthResult(
        user=User(),
        session=Session(),
        access_token=access,
        refresh_token=refresh,
        access_expires_at=NOW + timedelta(minutes=15),
        refresh_expires_at=NOW + timedelta(days=7),
    )


class TestSet:
    def test_attributes(self) -> None:
        """Both cookies have their prefix, all its attributes, and the lives of their tokens."""
        assert Cookies().set(result(), now=NOW) == (
            "__Host-session=a.b.c; Max-Age=900; Path=/; Secure; HttpOnly; SameSite=Lax",
            "__Host-session-refresh=tart_r; Max-Age=604800; Path=/; Secure; HttpOnly; SameSite=Strict",
        )

    def test_development(self) -> None:
        """On plain HTTP there is neither prefix nor ``Secure``, and all else is the same."""
        assert PLAIN.set(result(), now=NOW) == (
            "session=a.b.c; Max-Age=900; Path=/; HttpOnly; SameSite=Lax",
            "session-refresh=tart_r; Max-Age=604800; Path=/; HttpOnly; SameSite=Strict",
        )

    def test_never_outlives_its_token(self) -> None:
        """Parts of a second are cut, and a token that has expired deletes its cookie."""
        access, _ = Cookies().set(result(), now=NOW + timedelta(minutes=14, seconds=59.5))
        assert "; Max-Age=0;" in access
        access, _ = Cookies().set(result(), now=NOW + timedelta(days=1))
        assert "; Max-Age=0;" in access

    def test_by_the_clock(self) -> None:
        """Without a time the cookies live from now."""
        alive = dataclasses.replace(
            result(), access_expires_at=datetime.now(UTC) + timedelta(seconds=100)
        )
        cookie = SimpleCookie(Cookies().set(alive)[0])["__Host-session"]
        assert 90 <= int(cookie["max-age"]) <= 100

    def test_largest(self) -> None:
        """What a browser would drop is refused, to the byte, and is not quoted."""
        fits = 4096 - len("__Host-session")
        assert fits == 4082
        Cookies().set(result("a" * fits), now=NOW)
        with pytest.raises(ConfigurationError, match="has 4097 bytes") as error:
            Cookies().set(result("a" * (fits + 1)), now=NOW)
        assert "aaa" not in str(error.value)
        fits = 4096 - len("session-refresh")
        PLAIN.set(result(refresh="r" * fits), now=NOW)
        with pytest.raises(ConfigurationError, match="session-refresh has 4097 bytes"):
            PLAIN.set(result(refresh="r" * (fits + 1)), now=NOW)


@pytest.mark.parametrize("cookies", [Cookies(), PLAIN, Cookies("admin")], ids=str)
def test_clear(cookies: Cookies) -> None:
    """A deletion differs from the cookie that is set in its value and its age alone."""
    for cleared, was in zip(cookies.clear(), cookies.set(result(), now=NOW), strict=True):
        name, attributes = was.split("=", 1)
        _, _, rest = attributes.split("; ", 2)
        assert cleared == f"{name}=; Max-Age=0; {rest}"


class TestRead:
    @pytest.mark.parametrize(
        ("lines", "access", "refresh"),
        [
            (["__Host-session=a; __Host-session-refresh=r"], "a", "r"),
            (["__Host-session=a", "__Host-session-refresh=r"], "a", "r"),
            (["theme=dark;__Host-session=a;  x=y"], "a", None),
            (["__Host-session-refresh=r"], None, "r"),
            ([], None, None),
            (["session=a; session-refresh=r"], None, None),
            (["__host-session=a; __HOST-SESSION-refresh=r"], None, None),
            (["__Host-session=a; __Host-session=b"], None, None),
            (["__Host-session=a; __Host-session=a; __Host-session-refresh=r"], None, "r"),
            (["__Host-session=a", "__Host-session=b"], None, None),
            (["__Host-session=; __Host-session=b"], None, None),
            (["__Host-session="], None, None),
            (["__Host-session"], None, None),
            (["__Host-session=a=b"], "a=b", None),
            (['__Host-session="a"'], '"a"', None),
            (["x=1, __Host-session=a"], None, None),
            (["\xa0__Host-session=a"], None, None),
            (["\x85__Host-session=a"], None, None),
            (["\x0b__Host-session=a"], None, None),
            (["\x1c__Host-session=a"], None, None),
            (["$Version=1; __Host-session=a"], "a", None),
        ],
    )
    def test_table(self, lines: list[str], access: str | None, refresh: str | None) -> None:
        """One cookie of exactly our name is read, and none that comes twice."""
        tokens = Cookies().read(request(*(("cookie", line) for line in lines)))
        assert (tokens.access, tokens.refresh) == (access, refresh)

    def test_what_was_set(self) -> None:
        """What a browser sends back is what was set."""
        sent = "; ".join(value.split(";")[0] for value in PLAIN.set(result(), now=NOW))
        tokens = PLAIN.read(request(("cookie", sent)))
        assert (tokens.access, tokens.refresh) == ("a.b.c", "tart_r")

    def test_shows_no_token(self) -> None:
        """The tokens are not in the ``repr``."""
        tokens = Cookies().read(request(("cookie", "__Host-session=secret")))
        assert "secret" not in repr(tokens)

    @given(SCOPES)
    def test_any_request(self, scope: Scope) -> None:
        """Whatever comes, a token that is read is one that came along."""
        tokens = Cookies().read(scope)
        values = [value for name, value in scope["headers"] if name == b"cookie"]
        for token in (tokens.access, tokens.refresh):
            assert token is None or any(token.encode("latin-1") in value for value in values)
            assert token is None or Cookies().sent(scope)


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("__Host-session=a", True),
        ("__Host-session-refresh=r", True),
        ("__Host-session=a; __Host-session=b", True),
        ("__Host-session=", True),
        ("session=a; __Host-session2=b", False),
    ],
)
def test_sent(line: str, sent: bool) -> None:
    """A cookie that comes twice is not read, but it came along."""
    assert Cookies().sent(request(("cookie", line))) is sent
    assert not Cookies().sent(request())


class TestSettings:
    @pytest.mark.parametrize(
        "name", ["", "a b", "a;b", "a=b", "ä", "x" * 65, "__Host-x", "__secure-x", "a\n", None, 7]
    )
    def test_names(self, name: object) -> None:
        """A name that is none, or has its prefix already, is refused."""
        with pytest.raises(ConfigurationError, match=r"^Cookies\("):
            Cookies(name)  # type: ignore[arg-type]

    def test_insecure(self) -> None:
        """Plain HTTP must be asked for by two words."""
        with pytest.raises(ConfigurationError, match="development=True"):
            Cookies(secure=False)
        assert Cookies(development=True).access_name == "__Host-session"

    @given(st.from_regex(r"[A-Za-z0-9.-][A-Za-z0-9_.-]{0,63}", fullmatch=True))
    def test_any_name(self, name: str) -> None:
        """Two cookies of one name never share a name, and what is set can be read."""
        cookies = Cookies(name)
        sent = "; ".join(value.split(";")[0] for value in cookies.set(result(), now=NOW))
        tokens = cookies.read(request(("cookie", sent)))
        assert (tokens.access, tokens.refresh) == ("a.b.c", "tart_r")
