"""One application for Starlette and one for Litestar, made of `tortoise_auth.web` alone, and one
for FastAPI.

The first two have the same routes. A server loads them: ``uvicorn tests.support.web_apps:starlette_app``.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any

import litestar
from fastapi import Depends, FastAPI
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from tortoise import Tortoise

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tortoise_auth import AuthConfig, AuthResult, AuthService
from tortoise_auth.context import RequestContext, request_context
from tortoise_auth.exceptions import NotAuthenticatedError, TortoiseAuthError
from tortoise_auth.integrations.fastapi import Guard, auth_router, install
from tortoise_auth.testing import cheap_hasher
from tortoise_auth.web import (
    Cookies,
    CrossOriginCheck,
    RequestContextMiddleware,
    answer_to,
    credentials,
)

auth = AuthService(User, AuthConfig(secret=SECRET, refresh_reuse_grace=timedelta(seconds=30)))
cookies = Cookies()
check = CrossOriginCheck()
Form = dict[str, str]


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[None]:
    """Open a database with Ada in it."""
    await Tortoise.init(
        db_url=os.environ["DATABASE_URL"],
        modules={"models": ["tests.support.app", "tortoise_auth.models"]},
        _enable_global_fallback=True,
    )
    await Tortoise.generate_schemas()
    User.password_hasher = cheap_hasher()
    await User.create_user(email=EMAIL, password=PASSWORD)
    yield
    await Tortoise.close_connections()


async def current_user(scope: Any) -> User:
    found = credentials(scope, cookies)
    if found is None:
        raise NotAuthenticatedError
    if found.by_cookie:
        check.verify(scope, cookies)
    return await auth.authenticate(found.token)


async def log_in(scope: Any, form: Form) -> AuthResult[User]:
    check.verify(scope, cookies)
    return await auth.login(form["identifier"], form["password"])


async def me(scope: Any) -> dict[str, str | None]:
    user, context = await current_user(scope), request_context.get(RequestContext())
    return {"email": user.email, "ip": context.ip, "request_id": context.request_id}


async def starlette_log_in(request: Request) -> Response:
    result = await log_in(request.scope, await request.json())
    response = JSONResponse({}, headers={"cache-control": "no-store"})
    for value in cookies.set(result):
        response.headers.append("set-cookie", value)
    return response


async def starlette_me(request: Request) -> Response:
    return JSONResponse(await me(request.scope))


async def starlette_socket(websocket: WebSocket) -> None:
    answer = await me(websocket.scope)
    await websocket.accept()
    await websocket.send_json(answer)
    await websocket.close()


async def starlette_refuse(connection: HTTPConnection, error: Exception) -> Response:
    answer = answer_to(error, cookies=cookies)
    if answer is None:
        raise error
    response = JSONResponse(dict(answer.body), answer.status)
    for name, value in answer.headers:
        response.headers.append(name, value)
    return response


starlette_app = Starlette(
    routes=[
        Route("/login", starlette_log_in, methods=["POST"]),
        Route("/me", starlette_me, methods=["GET", "POST"]),
        WebSocketRoute("/socket", starlette_socket),
    ],
    middleware=[Middleware(RequestContextMiddleware, trusted_hops=1)],
    exception_handlers={TortoiseAuthError: starlette_refuse},
    lifespan=lifespan,
)


class LitestarAnswer(litestar.Response[Any]):
    """An answer that may have a header twice: `litestar.Response` has a dict of them."""

    def __init__(self, body: object, status: int, lines: Iterable[tuple[str, str]]) -> None:
        super().__init__(body, status_code=status)
        self.lines = tuple(lines)

    def to_asgi_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return what Litestar sends, with all headers."""
        response: Any = super().to_asgi_response(*args, **kwargs)
        for name, value in self.lines:
            response.headers.add(name, value)
        return response


@litestar.post("/login")
async def litestar_log_in(request: litestar.Request[Any, Any, Any], data: Form) -> LitestarAnswer:
    result = await log_in(request.scope, data)
    set_cookies = [("set-cookie", value) for value in cookies.set(result)]
    return LitestarAnswer({}, 200, [("cache-control", "no-store"), *set_cookies])


@litestar.route("/me", http_method=["GET", "POST"], status_code=200)
async def litestar_me(request: litestar.Request[Any, Any, Any]) -> dict[str, str | None]:
    return await me(request.scope)


@litestar.websocket("/socket")
async def litestar_socket(socket: litestar.WebSocket[Any, Any, Any]) -> None:
    answer = await me(socket.scope)
    await socket.accept()
    await socket.send_json(answer)
    await socket.close()


def litestar_refuse(_: litestar.Request[Any, Any, Any], error: Exception) -> LitestarAnswer:
    answer = answer_to(error, cookies=cookies)
    if answer is None:
        raise error
    return LitestarAnswer(dict(answer.body), answer.status, answer.headers)


litestar_app = litestar.Litestar(
    [litestar_log_in, litestar_me, litestar_socket],
    middleware=[DefineMiddleware(RequestContextMiddleware, trusted_hops=1)],
    exception_handlers={TortoiseAuthError: litestar_refuse},
    lifespan=[lifespan],
)


guard = Guard(auth, cookies)
fastapi_app = FastAPI(lifespan=lifespan)
install(fastapi_app, trusted_hops=1)
fastapi_app.include_router(auth_router(guard), prefix="/auth")


@fastapi_app.websocket("/socket")
async def fastapi_socket(websocket: WebSocket, user: Annotated[User, Depends(guard.user)]) -> None:
    context = request_context.get(RequestContext())
    await websocket.accept()
    await websocket.send_json(
        {"email": user.email, "ip": context.ip, "request_id": context.request_id}
    )
    await websocket.close()
