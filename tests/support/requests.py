"""Requests as an ASGI server hands them over, without a server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

PEER = "198.51.100.9"
"""The machine at the other end of the connection."""

Scope = dict[str, Any]


def request(
    *headers: tuple[str, str],
    method: str = "POST",
    kind: str = "http",
    client: object = (PEER, 50000),
) -> Scope:
    """Return the scope of a request."""
    return {
        "type": kind,
        "method": method,
        "path": "/",
        "client": client,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }


def forwarded(*lines: str, header: str = "x-forwarded-for", client: object = (PEER, 50)) -> Scope:
    """Return the scope of a request with so many lines of one header."""
    return request(*((header, line) for line in lines), client=client)


NAMES = (
    *("authorization", "cookie", "forwarded", "host", "origin", "sec-fetch-site"),
    *("user-agent", "x-forwarded-for", "x-request-id"),
)

_PARTS = (
    *('"', "\\", ",", ";", "=", ":", "[", "]", " ", "\t", "%", "\0", "\x85", "\xa0", "\xff", "."),
    *(
        "for",
        "Bearer",
        "__Host-session",
        "203.0.113.7",
        "2001:db8::1",
        "https://",
        "null",
        "unknown",
    ),
    *("app.example.com", "same-origin", "none", "443", "64:ff9b::1"),
)
VALUES = st.one_of(
    st.lists(st.sampled_from(_PARTS), max_size=12).map(
        lambda parts: "".join(parts).encode("latin-1")
    ),
    st.binary(max_size=80),
)
"""The value of a header: made of what parsers look for, or any bytes."""


def _scope(kind: str, method: str, client: object, headers: Iterable[tuple[str, bytes]]) -> Scope:
    lines = [(name.encode(), value) for name, value in headers]
    return {"type": kind, "method": method, "path": "/", "client": client, "headers": lines}


SCOPES = st.builds(
    _scope,
    st.sampled_from(["http", "websocket"]),
    st.sampled_from(["GET", "POST", "get", "PROPFIND"]),
    st.one_of(st.none(), st.tuples(st.text(max_size=40), st.integers(0, 65535))),
    st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=6),
)
"""Any connection."""
