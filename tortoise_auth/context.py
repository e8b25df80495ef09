"""The circumstances of a request, which every event carries."""

from __future__ import annotations

import ipaddress
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """The circumstances of one request. Lengths are bounded, since clients choose most values.

    Example:
        ``await auth.login(email, password, context=RequestContext(ip=request.client.host))``

    Attributes:
        ip: The client's address, or ``None`` if there is none, as in a test or behind a socket.
            An IPv4 address that is written as IPv6 (mapped, compatible, or of NAT64) becomes IPv4.
            Warning: take it from the connection or from a proxy you run; any client may send an
            ``X-Forwarded-For`` header.
        user_agent: The client's own description of itself.
        request_id: Correlates events with the application's logs.
        actor_id: ``str(user.pk)`` of the user who is signed in: which administrator it was, where
            ``event.actor`` is ``"admin"``.
        known_device: Whether the account has used this device before, as the application knows it
            from a cookie of its own; ``None`` if it does not know. It decides nothing.

    Raises:
        ValueError: ``ip`` is no address: each spelling would be a source of its own to the throttle.
        TypeError: It is no text, or ``known_device`` no bool.
    """

    ip: str | None = None
    user_agent: str | None = None
    request_id: str | None = None
    actor_id: str | None = None
    known_device: bool | None = None

    def __post_init__(self) -> None:
        if self.ip is not None:
            object.__setattr__(self, "ip", normalize_ip(self.ip))
        for name, limit in (("user_agent", 255), ("request_id", 128), ("actor_id", 255)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, sanitize_text(str(value), limit))
        if not isinstance(self.known_device, bool | None):
            raise TypeError(
                "RequestContext(known_device=...) takes True, False or None, not "
                f"{type(self.known_device).__name__}"
            )


def normalize_ip(ip: object) -> str:
    """Return the one spelling of an address.

    Raises:
        ValueError: It is none; the message says what to pass.
        TypeError: It is no text.
    """
    if isinstance(ip, ipaddress.IPv4Address | ipaddress.IPv6Address):
        ip = str(ip)
    if not isinstance(ip, str):
        raise TypeError(
            f"RequestContext(ip=...) takes an address as text, not {type(ip).__name__}: "
            "request.client.host, not request.client"
        )
    try:
        address = ipaddress.ip_address(ip.strip())
    except ValueError:
        raise ValueError(
            "RequestContext(ip=...) takes one address, without a port and without other addresses "
            'behind it: "203.0.113.7", "2001:db8::7", or None if there is none. The TestClient of '
            'Starlette calls itself "testclient" unless told: TestClient(app, client=("127.0.0.1", 5))'
        ) from None
    if isinstance(address, ipaddress.IPv6Address):
        low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        compatible = int(address) >> 32 == 0 and int(address) > 1  # not :: and ::1
        if address.ipv4_mapped is not None or address in _NAT64 or compatible:
            return str(low)
        return str(ipaddress.IPv6Address(int(address)))  # without a zone, which is ours
    return str(address)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Where RFC 6052 puts the addresses of IPv4 clients."""

request_context: ContextVar[RequestContext] = ContextVar("tortoise_auth_request_context")
"""Set this once per request, in a middleware, and no call needs ``context=``."""


def current_context(explicit: RequestContext | None = None) -> RequestContext:
    """Return *explicit*, or the value of the context variable, or an empty context.

    Raises:
        TypeError: It is not a `RequestContext`.
    """
    context = explicit if explicit is not None else request_context.get(RequestContext())
    if not isinstance(context, RequestContext):
        raise TypeError(f"context= takes a RequestContext(ip=...), not {type(context).__name__}")
    return context


def sanitize_text(text: str, limit: int) -> str:
    """Return at most *limit* characters of *text*, NUL and lone surrogates replaced by U+FFFD.

    PostgreSQL stores neither of the two, and drivers raise different errors for them.
    """
    return "".join(
        "\ufffd" if character == "\0" or "\ud800" <= character <= "\udfff" else character
        for character in text[:limit]
    )
