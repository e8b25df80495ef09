"""The rule for requests that a browser authenticates by itself."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.requests import SCOPES, VALUES, Scope, request
from tortoise_auth.exceptions import ConfigurationError, CrossOriginError
from tortoise_auth.web import Cookies, CrossOriginCheck

HOST = "app.example.com"
OWN = f"https://{HOST}"
SIBLING = "https://blog.example.com"
COOKIE = ("cookie", "__Host-session=a; session=a")
PLAIN = Cookies(secure=False, development=True)
ALLOWED, REFUSED = True, False


def allows(scope: Scope, *trusted: str, cookies: Cookies | None = None) -> bool:
    """Ask the rule."""
    try:
        CrossOriginCheck(trusted).verify(scope, cookies or Cookies())
    except CrossOriginError:
        return False
    return True


def post(
    *,
    origin: str | None = None,
    site: str | None = None,
    host: str | None = HOST,
    cookie: bool = True,
    method: str = "POST",
    kind: str = "http",
) -> Scope:
    """Return a request with the headers that the rule reads."""
    headers = [("host", host), ("origin", origin), ("sec-fetch-site", site)]
    given = [(name, value) for name, value in headers if value is not None]
    return request(*given, *([COOKIE] if cookie else []), method=method, kind=kind)


class TestRule:
    @pytest.mark.parametrize(
        ("site", "origin", "outcome"),
        [
            ("same-origin", OWN, ALLOWED),
            ("same-origin", "null", ALLOWED),
            ("same-origin", None, ALLOWED),
            ("none", None, ALLOWED),
            ("same-site", SIBLING, REFUSED),
            ("cross-site", OWN, REFUSED),
            ("cross-site", None, REFUSED),
            ("SAME-ORIGIN", OWN, REFUSED),
            ("same-origin, none", OWN, REFUSED),
            ("other", OWN, REFUSED),
            ("", OWN, REFUSED),
        ],
    )
    def test_fetch_metadata(self, site: str, origin: str | None, outcome: bool) -> None:
        """Where the browser says how it came, that decides, word for word."""
        assert allows(post(site=site, origin=origin)) is outcome

    @pytest.mark.parametrize(
        ("origin", "host", "outcome"),
        [
            (OWN, HOST, ALLOWED),
            (OWN, f"{HOST}:443", ALLOWED),
            (OWN, "App.Example.Com", ALLOWED),
            (f"{OWN}:8443", f"{HOST}:8443", ALLOWED),
            (f"{OWN}:8443", HOST, REFUSED),
            (OWN, f"{HOST}:8443", REFUSED),
            (OWN, f"{HOST}:80", REFUSED),
            (f"{OWN}.evil.test", HOST, REFUSED),
            (f"{OWN}@evil.test", HOST, REFUSED),
            (f"https://evil.test@{HOST}", HOST, REFUSED),
            (f"https://evil.test/{HOST}", HOST, REFUSED),
            (f"{OWN}/", HOST, REFUSED),
            (f"{OWN}?", HOST, REFUSED),
            (f"{OWN}#", HOST, REFUSED),
            (f"{OWN}:", HOST, REFUSED),
            (f"{OWN}, {OWN}", HOST, REFUSED),
            (f"wss://{HOST}", HOST, REFUSED),
            ("null", HOST, REFUSED),
            ("null", "null", REFUSED),
            ("", HOST, REFUSED),
            ("*", HOST, REFUSED),
            (OWN.upper(), HOST, REFUSED),
            (SIBLING, HOST, REFUSED),
            (OWN, None, REFUSED),
            (OWN, "", REFUSED),
            (f"http://{HOST}", HOST, REFUSED),
            (f"http://{HOST}", f"{HOST}:80", REFUSED),
            ("http://localhost:8000", "localhost:8000", ALLOWED),
            ("http://app.localhost", "app.localhost:80", ALLOWED),
            ("http://127.0.0.1:8000", "127.0.0.1:8000", ALLOWED),
            ("http://[::1]:8000", "[::1]:8000", ALLOWED),
            ("http://localhost:3000", "localhost:8000", REFUSED),
            ("http://notlocalhost", "notlocalhost", REFUSED),
            ("http://128.0.0.1", "128.0.0.1", REFUSED),
            ("http://[2001:db8::1]:8000", "[2001:db8::1]:8000", REFUSED),
        ],
    )
    def test_origin(self, origin: str, host: str | None, outcome: bool) -> None:
        """Without Fetch Metadata the origin must be that of ``Host``, and secure."""
        assert allows(post(origin=origin, host=host)) is outcome

    @pytest.mark.parametrize(
        ("origin", "host", "outcome"),
        [
            ("http://[2001:db8::1]:8000", "[2001:db8::1]:8000", ALLOWED),
            (f"http://{HOST}", HOST, ALLOWED),
            (f"http://{HOST}", f"{HOST}:80", ALLOWED),
            (f"http://{HOST}", f"{HOST}:443", REFUSED),
            ("http://blog.example.com", HOST, REFUSED),
        ],
    )
    def test_plain_http(self, origin: str, host: str, outcome: bool) -> None:
        """Cookies that are not secure are for plain HTTP, and there the host decides."""
        assert allows(post(origin=origin, host=host), cookies=PLAIN) is outcome

    @pytest.mark.parametrize(
        ("name", "value"), [("origin", OWN), ("host", HOST), ("sec-fetch-site", "same-origin")]
    )
    def test_twice(self, name: str, value: str) -> None:
        """A header that comes twice is refused, though both lines say the same."""
        scope = post(origin=OWN, site="same-origin")
        assert allows(scope)
        scope["headers"].append((name.encode(), value.encode()))
        assert not allows(scope)
        assert not allows(scope, OWN)

    def test_nothing(self) -> None:
        """A program that logs in sends neither header nor cookie; a cookie needs one of them."""
        assert not allows(post())
        assert allows(post(cookie=False))
        refresh_alone = request(("host", HOST), ("cookie", "__Host-session-refresh=r"))
        assert not allows(refresh_alone)
        twice = request(("host", HOST), ("cookie", "__Host-session=a; __Host-session=b"))
        assert not allows(twice)

    @pytest.mark.parametrize(
        ("method", "outcome"),
        [
            ("DELETE", REFUSED),
            ("PATCH", REFUSED),
            ("PUT", REFUSED),
            ("PROPFIND", REFUSED),
            ("get", REFUSED),
            ("TRACE", REFUSED),
            ("", REFUSED),
            ("GET", ALLOWED),
            ("HEAD", ALLOWED),
            ("OPTIONS", ALLOWED),
        ],
    )
    def test_methods(self, method: str, outcome: bool) -> None:
        """Three methods change nothing; every other word is one that may."""
        assert allows(post(site="cross-site", method=method)) is outcome

    @pytest.mark.parametrize(
        ("site", "origin", "outcome"),
        [
            ("same-site", SIBLING, ALLOWED),
            (None, SIBLING, ALLOWED),
            ("same-site", SIBLING.upper(), REFUSED),
            ("same-site", f"{SIBLING}:443", REFUSED),
            ("same-site", f"{SIBLING}/", REFUSED),
            ("same-site", OWN, REFUSED),
            ("same-site", None, REFUSED),
            ("same-origin", OWN, ALLOWED),
        ],
    )
    def test_trusted(self, site: str | None, origin: str | None, outcome: bool) -> None:
        """A trusted origin may act, byte for byte; it replaces no other part of the rule."""
        assert allows(post(site=site, origin=origin), SIBLING) is outcome

    @pytest.mark.parametrize(
        ("origin", "site", "cookie", "outcome"),
        [
            (OWN, None, True, ALLOWED),
            (None, None, True, REFUSED),
            (None, None, False, ALLOWED),
            (SIBLING, None, True, REFUSED),
            ("null", None, True, REFUSED),
            (OWN, "same-origin", True, ALLOWED),
            (SIBLING, "same-site", True, REFUSED),
        ],
    )
    def test_handshake(
        self, origin: str | None, site: str | None, cookie: bool, outcome: bool
    ) -> None:
        """A WebSocket handshake is a GET, and is asked as if it changed something."""
        scope = post(origin=origin, site=site, cookie=cookie, method="GET", kind="websocket")
        assert allows(scope) is outcome
        scope.pop("method")  # as ASGI has it
        assert allows(scope) is outcome


class TestChromium:
    """What Chromium 156 sent to ``http://app.site.localhost``, measured in a browser."""

    APP, OTHER_PORT = "http://app.site.localhost", "http://app.site.localhost:8080"

    @pytest.mark.parametrize(
        ("site", "origin", "outcome"),
        [
            pytest.param("same-origin", APP, ALLOWED, id="form"),
            pytest.param("same-origin", "null", ALLOWED, id="form with no-referrer"),
            pytest.param(
                "same-site", "http://blog.site.localhost", REFUSED, id="form of a sibling"
            ),
            pytest.param("same-site", OTHER_PORT, REFUSED, id="form of another port"),
            pytest.param("cross-site", "http://evil.test", REFUSED, id="form of another site"),
            pytest.param("cross-site", "null", REFUSED, id="sandboxed frame"),
        ],
    )
    def test_post(self, site: str, origin: str, outcome: bool) -> None:
        """The own page may post, and no other page."""
        assert allows(post(site=site, origin=origin, host="app.site.localhost")) is outcome

    @pytest.mark.parametrize(
        ("origin", "outcome"),
        [(APP, ALLOWED), ("http://blog.site.localhost", REFUSED), (OTHER_PORT, REFUSED)],
    )
    def test_handshake(self, origin: str, outcome: bool) -> None:
        """Handshakes carry the origin alone, and a sibling's carry every cookie."""
        scope = post(origin=origin, host="app.site.localhost", kind="websocket")
        assert allows(scope) is outcome

    @pytest.mark.parametrize(("site", "outcome"), [("cross-site", ALLOWED), ("none", ALLOWED)])
    def test_link(self, site: str, outcome: bool) -> None:
        """A link from another site and an address that is typed open a page."""
        assert allows(post(site=site, method="GET")) is outcome


class TestRefusal:
    def test_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """One warning has the headers, on one line, cut, and no cookie."""
        hostile = "https://evil.test\x1b[2J\n" + "x" * 10_000
        with caplog.at_level(logging.WARNING, "tortoise_auth"):
            assert not allows(post(site="cross-site\r\nfake", origin=hostile))
        (record,) = caplog.records
        message = record.getMessage()
        assert "Sec-Fetch-Site cross-site\\r\\nfake, Origin https://evil.test\\x1b[2J" in message
        assert message.isprintable()
        assert len(message) < 500
        assert "__Host" not in message

    def test_says_what_to_do(self) -> None:
        """The error tells the author of a test client which header to send."""
        with pytest.raises(CrossOriginError, match="Sec-Fetch-Site: same-origin"):
            CrossOriginCheck().verify(post(), Cookies())


class TestTrustedOrigins:
    @pytest.mark.parametrize(
        "origin",
        [
            *("https://a.example/", "a.example", "null", "*", "", "https://", "https://*.example"),
            *(
                "https://A.example",
                "HTTPS://a.example",
                "https://u@a.example",
                "https://a.example?",
            ),
            *("https://a.example:", "https://a.example:x", "https://a.example:443", "http://a:80"),
            *("https://bücher.example", " https://a.example", "https://a.example\n", "//a.example"),
            *("https://a.example:٨٠", None, 7, b"https://a.example"),
        ],
    )
    def test_refused(self, origin: object) -> None:
        """What no browser sends as an origin is refused when the check is made."""
        with pytest.raises(ConfigurationError, match=r"^trusted_origins"):
            CrossOriginCheck([origin])  # type: ignore[list-item]

    def test_one_text(self) -> None:
        """A text alone is refused, not read letter by letter."""
        with pytest.raises(ConfigurationError, match="takes a list"):
            CrossOriginCheck("https://a.example")

    @pytest.mark.parametrize(
        "origin",
        [
            *("https://a.example", "http://localhost:3000", "https://[2001:db8::1]:8443"),
            *("https://xn--bcher-kva.example", "capacitor://localhost", "http://a:443"),
        ],
    )
    def test_accepted(self, origin: str) -> None:
        """Origins as browsers and web views write them are accepted, and match."""
        assert allows(post(origin=origin, site="cross-site"), origin)


@given(SCOPES)
def test_any_request(scope: Scope) -> None:
    """Whatever comes, it is allowed or refused; more trust never refuses what was allowed."""
    if allows(scope):
        assert allows(scope, SIBLING)


@given(VALUES.filter(lambda value: value.strip(b" \t") not in (b"same-origin", b"none")))
def test_any_word_of_fetch_metadata(word: bytes) -> None:
    """Of all values two are allowed."""
    scope = post(origin=OWN)
    scope["headers"].append((b"sec-fetch-site", word))
    assert not allows(scope)


@given(
    st.integers(0, len(OWN)),
    st.integers(0, 1),
    st.text(st.characters(max_codepoint=255), max_size=3),
)
def test_nearly_the_own_origin(at: int, removed: int, added: str) -> None:
    """Of all origins that are nearly ours, none but ours is allowed."""
    near = OWN[:at] + added + OWN[at + removed :]
    same = near.strip(" \t") == OWN  # HTTP has blanks around a value mean nothing
    assert allows(post(origin=near)) is same
