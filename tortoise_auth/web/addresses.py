"""The address of the client, behind as many proxies as the host runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, islice
from typing import cast

from tortoise_auth.context import normalize_ip
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.legible import quoted
from tortoise_auth.web.asgi import Scope, lines

_logger = logging.getLogger("tortoise_auth")

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the word of RFC 9110, 5.6.2
_HEADER_NAME = re.compile(_TOKEN)
_FORWARDED_PAIR = re.compile(
    rf'[ \t]*(?P<name>{_TOKEN})=(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^",; \t]*))[ \t]*(?:;|$)'
)
_NODE = re.compile(
    r"(?P<quote>\"?)"
    r"(?:\[(?P<bracketed>[0-9A-Fa-f:.]{2,45})\](?::[0-9]{1,5})?"
    r"|(?P<v4>[0-9.]{7,15})(?::[0-9]{1,5})?"
    r"|(?P<v6>[0-9A-Fa-f:.]{2,45}))"
    r"(?P=quote)"
)


def client_address(
    scope: Scope, *, trusted_hops: int = 0, header: str = "x-forwarded-for"
) -> str | None:
    """Return the address of the client: an address in its one spelling, or ``None``.

    Without proxies, and with a server that reads their headers itself, that is the address that the
    server reports. Behind *n* proxies it is the *n*-th element from the right of all lines of one
    header together: each proxy appends the address that it sees, and only what stands further
    left could be written by the client. What is no address there is replaced by the peer, the
    machine at the other end of the connection; it never becomes a source of its own.

    Warning: a header cannot show that the proxy was passed by. Let the server listen on loopback or
    a socket, or keep ``trusted_hops=0`` and let the server's own list of proxies decide.

    Example:
        ``client_address(request.scope, trusted_hops=1)``

    Args:
        scope: The connection.
        trusted_hops: How many of your own proxies are in front.
        header: The header to which each of them appends: ``x-forwarded-for``, ``forwarded``
            (RFC 7239), or one that your proxy alone sets. No other header is read.
    """
    peer = _peer(scope)
    if trusted_hops == 0:
        return peer
    given = lines(scope, header)
    split = _forwarded_from_the_right if header == "forwarded" else _from_the_right
    elements = chain.from_iterable(map(split, reversed(given)))
    element = next(islice(elements, trusted_hops - 1, None), None)
    if element is None:
        _warn_of_too_few(trusted_hops, header)
        return peer
    return _address(element) or peer


def check_hops(trusted_hops: int, header: str) -> None:
    """Check the two settings of `client_address`.

    Raises:
        ConfigurationError: The number or the name cannot be one.
    """
    if type(trusted_hops) is not int or not 0 <= trusted_hops <= 100:
        raise ConfigurationError(
            f"trusted_hops={quoted(trusted_hops)} must be a number from 0 to 100: how many proxies "
            "of yours are in front of the application"
        )
    if (
        not isinstance(header, str)
        or not _HEADER_NAME.fullmatch(header)
        or header != header.lower()
    ):
        raise ConfigurationError(
            f"address_header={quoted(header)} must be the name of one header in lower case, for "
            'example "x-forwarded-for"'
        )


def _peer(scope: Scope) -> str | None:
    """Return what the server reports; not every server and test client reports an address."""
    client = cast("Sequence[object] | None", scope.get("client"))
    try:
        return normalize_ip(client[0]) if client else None
    except (ValueError, TypeError):
        return None


def _from_the_right(line: str) -> Iterator[str]:
    return reversed(line.split(","))


def _forwarded_from_the_right(line: str) -> Iterator[str]:
    """Yield the node of each element of a ``Forwarded`` line; an empty text where there is none.

    Read from the right, because an open quotation mark of the client's would hide the elements
    behind it, which are those of the proxies.
    """
    inside, end = False, len(line)
    for at in range(len(line) - 1, -1, -1):
        if line[at] == '"' and not _is_escaped(line, at):
            inside = not inside
        elif line[at] == "," and not inside:
            yield _node(line[at + 1 : end])
            end = at
    yield _node(line[:end])


def _is_escaped(line: str, at: int) -> bool:
    """Return whether an odd number of backslashes stands before a place."""
    before = at
    while before and line[before - 1] == "\\":
        before -= 1
    return (at - before) % 2 == 1


def _node(element: str) -> str:
    """Return the value of ``for=`` of one element, if the element is well-formed and has one."""
    found: list[str] = []
    at = 0
    while at < len(element):
        pair = _FORWARDED_PAIR.match(element, at)
        if pair is None:
            return ""
        at = pair.end()
        if pair["name"].lower() == "for":
            found.append(pair["plain"] if pair["quoted"] is None else pair["quoted"])
    return found[0] if len(found) == 1 else ""


def _address(element: str) -> str | None:
    """Return the address in an element, without a port; ``None`` with a zone or anything else."""
    node = _NODE.fullmatch(element.strip(" \t"))
    if node is None:
        return None
    try:
        return normalize_ip(node["bracketed"] or node["v6"] or node["v4"])
    except ValueError:
        return None


@cache
def _warn_of_too_few(trusted_hops: int, header: str) -> None:
    """Warn once: the number is a setting, and a request alone does not show whether it is right."""
    _logger.warning(
        "A request had fewer than %d elements in %s, so it did not come through all the proxies "
        "that trusted_hops= promises. Such requests have the address of their peer.",
        trusted_hops,
        header,
    )
