"""What this package takes of ASGI: its types, as the frameworks have them, and header lines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias, cast

Scope: TypeAlias = Mapping[str, object]
"""A connection: ``request.scope`` of Starlette, FastAPI and Litestar."""

Receive: TypeAlias = Callable[[], Awaitable[Mapping[str, object]]]

# Each framework has its own types of the messages, and what takes them accepts no other.
Send: TypeAlias = Callable[..., Awaitable[None]]
ASGIApp: TypeAlias = Callable[..., Awaitable[None]]


def raw_headers(scope: Scope) -> Iterable[tuple[bytes, bytes]]:
    """Return the headers of a connection, or of a message that has headers."""
    return cast("Iterable[tuple[bytes, bytes]]", scope.get("headers") or ())


def raw_lines(scope: Scope, name: str) -> list[bytes]:
    """Return the value of each line of one header, in order, without the blanks around it.

    Args:
        scope: The connection.
        name: The header, in lower case.
    """
    wanted = name.encode("latin-1")
    return [value.strip(b" \t") for key, value in raw_headers(scope) if key.lower() == wanted]


def lines(scope: Scope, name: str) -> list[str]:
    """Return the same as text. Every byte is one character, as HTTP has it."""
    return [line.decode("latin-1") for line in raw_lines(scope, name)]
