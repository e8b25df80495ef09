"""The middleware that lets sessions, events and the throttle know where a request came from."""

from __future__ import annotations

import re
import uuid

from tortoise_auth.context import RequestContext, request_context
from tortoise_auth.web.addresses import check_hops, client_address
from tortoise_auth.web.asgi import ASGIApp, Receive, Scope, Send, lines, raw_headers

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STARTS = {"http.response.start", "websocket.accept", "websocket.http.response.start"}
"""The messages that carry the headers of an answer."""


class RequestContextMiddleware:
    """Sets `request_context` for each request and WebSocket, and resets it afterwards.

    No call of the service needs ``context=`` below it. The answer has the header ``X-Request-ID``,
    unless the application has set one itself.

    Example::

        app.add_middleware(RequestContextMiddleware, trusted_hops=1)               # Starlette, FastAPI
        Litestar(middleware=[DefineMiddleware(RequestContextMiddleware, trusted_hops=1)])

    Args:
        app: The application.
        trusted_hops: How many of your own proxies are in front; see `client_address`.
        address_header: The header to which they append.
        trust_request_id: Whether to take ``X-Request-ID`` from the request, if it has 1 to 128
            letters, digits or ``._:-``. Warning: only behind a proxy that sets it; else any client
            chooses what is in your logs.

    Raises:
        ConfigurationError: A setting cannot be meant.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        trusted_hops: int = 0,
        address_header: str = "x-forwarded-for",
        trust_request_id: bool = False,
    ) -> None:
        check_hops(trusted_hops, address_header)
        self._app = app
        self._trusted_hops = trusted_hops
        self._address_header = address_header
        self._trust_request_id = trust_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        context = self._context(scope)
        line = (b"x-request-id", (context.request_id or "").encode("latin-1"))

        async def send_with_id(message: Scope) -> None:
            if message["type"] in _STARTS:
                headers = list(raw_headers(message))
                if all(name.lower() != b"x-request-id" for name, _ in headers):
                    message = {**message, "headers": [*headers, line]}
            await send(message)

        # A test may run the application in its own task, where a value that stays would be that of
        # the next line of the test.
        token = request_context.set(context)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            request_context.reset(token)

    def _context(self, scope: Scope) -> RequestContext:
        agents = lines(scope, "user-agent")
        return RequestContext(
            ip=client_address(scope, trusted_hops=self._trusted_hops, header=self._address_header),
            user_agent=agents[0] if agents else None,
            request_id=self._request_id(scope),
        )

    def _request_id(self, scope: Scope) -> str:
        given = lines(scope, "x-request-id") if self._trust_request_id else []
        if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
            return given[0]
        return str(uuid.uuid4())
