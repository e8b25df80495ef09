"""The circumstances of a request, which every event carries."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """The circumstances of one request. Lengths are bounded, since clients choose most values.

    Example:
        ``await auth.login(email, password, context=RequestContext(ip=request.client.host))``

    Attributes:
        ip: The client's address. Warning: take it from the connection or from a proxy you run;
            any client may send an ``X-Forwarded-For`` header.
        user_agent: The client's own description of itself.
        request_id: Correlates events with the application's logs.
    """

    ip: str | None = None
    user_agent: str | None = None
    request_id: str | None = None

    def __post_init__(self) -> None:
        for name, limit in (("ip", 64), ("user_agent", 255), ("request_id", 128)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, sanitize_text(str(value), limit))


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
