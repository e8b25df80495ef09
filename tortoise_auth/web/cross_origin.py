"""Whether the page behind a request may use its cookies: Fetch Metadata, then Origin."""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable

from tortoise_auth.exceptions import ConfigurationError, CrossOriginError
from tortoise_auth.legible import legible, quoted
from tortoise_auth.web.asgi import Scope, lines
from tortoise_auth.web.cookies import Cookies

_logger = logging.getLogger("tortoise_auth")

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_HOST = r"(?P<host>[a-z0-9_.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
_HOST_AND_PORT = re.compile(_HOST)
_WEB_ORIGIN = re.compile(rf"(?P<scheme>https?)://{_HOST}")
_ANY_ORIGIN = re.compile(rf"(?P<scheme>[a-z][a-z0-9+.-]*)://{_HOST}")
_DEFAULT_PORTS = {"https": 443, "http": 80}
_MAX_SHOWN = 200


class CrossOriginCheck:
    """Refuses requests that a page of another origin sends with the cookies of this one.

    Ask it for every request that is authenticated by a cookie, for every POST that sets or clears
    cookies, and for every WebSocket handshake, which is a GET. ``SameSite`` alone does not do:
    browsers send strict cookies along from siblings and from other ports of the same host.

    The first that applies decides, for methods other than GET, HEAD and OPTIONS:

    1. ``Host``, ``Origin`` or ``Sec-Fetch-Site`` comes twice: refused.
    2. ``Origin`` is one of *trusted_origins*: allowed.
    3. ``Sec-Fetch-Site`` is ``same-origin`` or ``none``: allowed; any other: refused.
    4. ``Origin`` has host and port of ``Host``, and is ``https``, or loopback, or the cookies are
       not secure: allowed; any other: refused.
    5. A cookie of ours came along: refused. Else allowed: a program that logs in sends no header.

    Args:
        trusted_origins: Other origins whose pages may act for the visitor, as browsers write them:
            ``https://admin.example.com``.

    Raises:
        ConfigurationError: An entry is no origin, so that no request would ever match it.
    """

    def __init__(self, trusted_origins: Iterable[str] = ()) -> None:
        if isinstance(trusted_origins, str | bytes):
            raise ConfigurationError(
                'trusted_origins= takes a list of origins: ["https://admin.example.com"]'
            )
        self._trusted = frozenset(_checked(origin) for origin in trusted_origins)

    def verify(self, scope: Scope, cookies: Cookies) -> None:
        """Allow a request, or refuse it before anything is read or changed.

        Raises:
            CrossOriginError: A page of another origin may have sent it. It is logged as a warning.
        """
        if scope["type"] != "websocket" and scope.get("method") in _SAFE_METHODS:
            return
        host, origin, site = (lines(scope, name) for name in ("host", "origin", "sec-fetch-site"))
        if not self._allows(scope, cookies, host, origin, site):
            _logger.warning(
                "A cross-origin request was refused: Sec-Fetch-Site %s, Origin %s, Host %s",
                *(legible(", ".join(each), _MAX_SHOWN) or "-" for each in (site, origin, host)),
            )
            raise CrossOriginError

    def _allows(
        self, scope: Scope, cookies: Cookies, host: list[str], origin: list[str], site: list[str]
    ) -> bool:
        if max(len(host), len(origin), len(site)) > 1:
            return False
        if origin and origin[0] in self._trusted:
            return True
        if site:
            return site[0] in ("same-origin", "none")
        if origin:
            return bool(host) and _is_own(origin[0], host[0], cookies)
        return not cookies.sent(scope)


def _is_own(origin: str, host: str, cookies: Cookies) -> bool:
    """Return whether *origin* is where the request went.

    Its scheme is judged by our own cookies: what the server believes of its scheme is wrong behind
    most proxies.
    """
    page, target = _WEB_ORIGIN.fullmatch(origin), _HOST_AND_PORT.fullmatch(host.lower())
    if page is None or target is None or page["host"] != target["host"]:
        return False
    default = _DEFAULT_PORTS[page["scheme"]]
    if int(page["port"] or default) != int(target["port"] or default):
        return False
    return page["scheme"] == "https" or not cookies.secure or _is_loopback(page["host"])


def _is_loopback(host: str) -> bool:
    """Return whether a host is this machine, as browsers see it, which trust it without TLS."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _checked(origin: str) -> str:
    """Return *origin* if a browser can send it.

    Raises:
        ConfigurationError: It cannot.
    """
    match = _ANY_ORIGIN.fullmatch(origin) if isinstance(origin, str) else None
    if match is None:
        raise ConfigurationError(
            f"trusted_origins: {quoted(origin)} is no origin. Write scheme and host, perhaps a "
            "port, in lower case and nothing else: https://admin.example.com"
        )
    if match["port"] is not None and int(match["port"]) == _DEFAULT_PORTS.get(match["scheme"]):
        raise ConfigurationError(
            f"trusted_origins: browsers leave out the port of {quoted(origin)}, so do the same"
        )
    return origin
