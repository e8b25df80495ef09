"""The application around the routes: answers to errors, request contexts, start and stop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import cast

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ExceptionHandler
from starlette.websockets import WebSocket, WebSocketState

from tortoise_auth.events.relay import Relay
from tortoise_auth.exceptions import EventError, TortoiseAuthError
from tortoise_auth.service import AuthService
from tortoise_auth.users import UserT
from tortoise_auth.web import RequestContextMiddleware, answer_to

_DRAIN_TIMEOUT = 10.0
"""Seconds for deliveries in the background when the application stops."""

_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


def install(
    app: FastAPI,
    *,
    trusted_hops: int = 0,
    address_header: str = "x-forwarded-for",
    trust_request_id: bool = False,
) -> None:
    """Answer the errors of this library, and let events know where a request came from.

    Args:
        app: Your application.
        trusted_hops, address_header, trust_request_id: See `RequestContextMiddleware`.

    Raises:
        ConfigurationError: A setting cannot be meant.
    """
    # Starlette makes the middleware at the first request, and a mistake would wait until then.
    RequestContextMiddleware(
        app,
        trusted_hops=trusted_hops,
        address_header=address_header,
        trust_request_id=trust_request_id,
    )
    app.add_middleware(
        RequestContextMiddleware,
        trusted_hops=trusted_hops,
        address_header=address_header,
        trust_request_id=trust_request_id,
    )
    # It takes requests and WebSockets alike, for which Starlette has two types.
    app.add_exception_handler(TortoiseAuthError, cast("ExceptionHandler", answer_error))


async def answer_error(connection: HTTPConnection, error: Exception) -> Response | None:
    """Answer an error by the table of `answer_to`; what is not in it stays an error."""
    if isinstance(error, EventError) and isinstance(error.original, HTTPException):
        veto = error.original
        response: Response = JSONResponse({"detail": veto.detail}, veto.status_code, veto.headers)
    else:
        cookies = getattr(connection.state, "tortoise_auth_cookies", None)
        answer = answer_to(error, cookies=cookies)
        if answer is None:
            raise error
        response = JSONResponse(dict(answer.body), answer.status)
        for name, value in answer.headers:
            response.headers.append(name, value)
    if isinstance(connection, WebSocket) and not _can_be_answered(connection):
        await connection.close(_POLICY_VIOLATION)
        return None
    return response


def _can_be_answered(websocket: WebSocket) -> bool:
    """Return whether a handshake can still be answered by HTTP, and the server knows how."""
    return (
        websocket.application_state is WebSocketState.CONNECTING
        and "websocket.http.response" in websocket.scope.get("extensions", {})
    )


def lifespan(
    auth: AuthService[UserT],
    *,
    database: AbstractAsyncContextManager[object],
    relay: Relay[UserT] | bool = False,
) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """Return the lifespan of an application: the database, background deliveries, and a relay.

    They end in the opposite order, so that what is under way still finds the database. With a
    lifespan of your own write ``async with database, auth.emitter, auth.relay(): yield``.

    Example::

        FastAPI(lifespan=lifespan(auth, database=RegisterTortoise(...), relay=True))

    Args:
        auth: Your service.
        database: What opens and closes the connections.
        relay: Delivers durable events in this process; ``auth.relay(...)`` for other settings.
    """

    @asynccontextmanager
    async def run(_: object) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(database)
            await auth.emitter.__aenter__()
            # It logs what it lost.
            stack.push_async_callback(auth.emitter.aclose, _DRAIN_TIMEOUT)
            if relay:
                await stack.enter_async_context(auth.relay() if relay is True else relay)
            yield

    return run
