"""Routes: log in, refresh, log out, the account, its password, its sessions."""

# Without `from __future__ import annotations`; see `guard`.

from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Annotated, Any, Generic

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, create_model
from starlette.exceptions import HTTPException

from tortoise_auth.clock import utc_now
from tortoise_auth.exceptions import ConfigurationError, NotAuthenticatedError
from tortoise_auth.integrations.fastapi.documents import (
    LoginForm,
    LogoutAllForm,
    PasswordForm,
    Problem,
    Refreshed,
    RefreshForm,
    SessionRead,
    SessionsEnded,
    Tokens,
    responses_of_router,
)
from tortoise_auth.integrations.fastapi.guard import Guard
from tortoise_auth.service import Authenticated, AuthResult
from tortoise_auth.users import UserT
from tortoise_auth.web import credentials

_MAX_BODY = 16_384
_SECRET_FIELDS = {"password", "session_version"}
_NO_STORE = {"Cache-Control": "no-store"}
_OPTIONAL: dict[str, Any] = {"security": [{}]}
"""OpenAPI's word for "without credentials, too"; FastAPI adds it to the schemes."""


def auth_router(
    guard: Guard[UserT], *, read_user: type[BaseModel] | None = None, name: str = "auth"
) -> APIRouter:
    """Return the routes of one user model.

    ``POST /login``, ``/refresh``, ``/logout``, ``/logout-all`` and ``/password``, ``GET /me`` and
    ``/sessions``, ``DELETE /sessions/{id}``. A guard with cookies makes routes that set cookies, and
    whose answers hold no token. Nothing that was typed is repeated in an answer.

    Example:
        ``app.include_router(auth_router(guard, read_user=UserRead), prefix="/auth")``

    Args:
        guard: What authenticates.
        read_user: What ``/me`` shows, a model with ``from_attributes=True``; by default the id and
            the identifier.
        name: The tag, and the beginning of each operation id. Give the router of a second user
            model another one.

    Raises:
        ConfigurationError: *read_user* shows a secret, or cannot read an account.
    """
    return _Routes(guard, _read_model(guard, read_user), name).router


class QuietRoute(APIRoute):
    """Says what is wrong with a request without repeating it: it may be a password.

    Routes of yours that take secrets can have it, too: ``APIRouter(route_class=QuietRoute)``.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of this route."""
        handler = super().get_route_handler()

        async def quiet(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                wrong = [_without_values(each) for each in error.errors()]
                return JSONResponse(
                    {"code": "invalid_request", "detail": wrong}, 422, headers=_NO_STORE
                )
            except HTTPException as error:
                if error.status_code != 400:  # FastAPI's own, for a body that it cannot read
                    raise
                body = {"code": "invalid_request", "detail": str(error.detail)}
                return JSONResponse(body, error.status_code, headers=_NO_STORE)

        return quiet


def _without_values(error: Mapping[str, Any]) -> dict[str, object]:
    """Return one error of pydantic with nothing that was typed."""
    # An unknown field is named by what was typed in its place.
    loc = error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
    return {"loc": loc, "msg": error["msg"], "type": error["type"]}


class _Routes(Generic[UserT]):
    """Makes the routes of one router."""

    def __init__(self, guard: Guard[UserT], read_user: type[BaseModel], name: str) -> None:
        self._guard = guard
        self._auth = guard.auth
        self._cookies = guard.cookies
        self._read_user = read_user
        self._name = name
        self._bearer = guard.cookies is None
        self.router = APIRouter(
            route_class=QuietRoute,
            tags=[name],
            responses=responses_of_router(by_cookie=not self._bearer),
        )
        self.router.max_body_size = _MAX_BODY  # FastAPI before 0.165 ignores it
        self._add_login()
        (self._add_refresh_by_body if self._bearer else self._add_refresh_by_cookie)()
        self._add_logout()
        self._add_account()
        self._add_sessions()

    def _id(self, operation: str) -> str:
        return f"{self._name}_{operation}"

    def _deliver(self, result: AuthResult[UserT], response: Response) -> dict[str, object]:
        """Hand over the tokens of a session: in cookies, or in the body."""
        now = utc_now()
        expires_in = max(0, int((result.access_expires_at - now).total_seconds()))
        response.headers.update(_NO_STORE)
        if self._cookies is None:
            return {
                "access_token": result.access_token,
                "refresh_token": result.refresh_token,
                "expires_in": expires_in,
                "refresh_expires_in": int((result.refresh_expires_at - now).total_seconds()),
            }
        for value in self._cookies.set(result, now=now):
            response.headers.append("Set-Cookie", value)
        return {"expires_in": expires_in, "user": self._shown(result.user)}

    def _shown(self, user: UserT) -> BaseModel:
        if self._read_user.model_config.get("from_attributes"):
            return self._read_user.model_validate(user)
        identifier = user.identifier_field
        return self._read_user(**{"id": str(user.pk), identifier: getattr(user, identifier)})

    async def _end(self, token: str | None) -> None:
        """End the session of a token, if it is one."""
        if token is not None:
            # The id of a session or a whole header, which `logout` refuses, ends nothing either.
            with suppress(TypeError, ValueError):
                await self._auth.logout(token)

    def _verify_origin(self, request: Request) -> None:
        if self._cookies is not None:
            self._guard.check.verify(request.scope, self._cookies)

    def _add_login(self) -> None:
        logged_in = create_model(
            f"{self._name.title()}LoggedIn", expires_in=(int, ...), user=(self._read_user, ...)
        )

        @self.router.post(
            "/login",
            operation_id=self._id("login"),
            response_model=Tokens if self._bearer else logged_in,
        )
        async def login(form: LoginForm, request: Request, response: Response) -> object:
            """Open a session."""
            self._verify_origin(request)
            result = await self._auth.login(form.identifier, form.password.get_secret_value())
            try:
                answer = self._deliver(result, response)
            except ConfigurationError:  # no session whose tokens the browser would drop
                await self._end(result.refresh_token)
                raise
            if self._cookies is not None:
                before = self._cookies.read(request.scope)
                await self._end(before.refresh or before.access)
            return answer

    def _add_refresh_by_body(self) -> None:
        @self.router.post("/refresh", operation_id=self._id("refresh"), response_model=Tokens)
        async def refresh(form: RefreshForm, response: Response) -> object:
            """Exchange a refresh token, once."""
            return self._deliver(
                await self._auth.refresh(form.refresh_token.get_secret_value()), response
            )

    def _add_refresh_by_cookie(self) -> None:
        cookies = self._cookies
        assert cookies is not None  # noqa: S101

        @self.router.post("/refresh", operation_id=self._id("refresh"), response_model=Refreshed)
        async def refresh(request: Request, response: Response) -> object:
            """Set the cookies anew."""
            self._verify_origin(request)
            token = cookies.read(request.scope).refresh
            if token is None:
                raise NotAuthenticatedError
            request.state.tortoise_auth_cookies = cookies  # cleared if the token is refused
            return self._deliver(await self._auth.refresh(token), response)

    def _add_logout(self) -> None:
        documented = Depends(self._guard.documented)

        @self.router.post(
            "/logout",
            operation_id=self._id("logout"),
            status_code=204,
            dependencies=[documented],
            openapi_extra=_OPTIONAL,
        )
        async def logout(request: Request) -> Response:
            """End this session. Without one there is nothing to do (RFC 7009, 2.2)."""
            self._verify_origin(request)
            response = Response(status_code=204, headers=_NO_STORE)
            found = credentials(request.scope)
            await self._end(found.token if found is not None else None)
            if self._cookies is not None:
                sent = self._cookies.read(request.scope)
                await self._end(sent.refresh)
                await self._end(sent.access)
            for value in self._cookies.clear() if self._cookies is not None else ():
                response.headers.append("Set-Cookie", value)
            return response

        @self.router.post(
            "/logout-all", operation_id=self._id("logout_all"), response_model=SessionsEnded
        )
        async def logout_all(
            found: Annotated[Authenticated[UserT], Depends(self._guard.session)],
            form: LogoutAllForm | None = None,
        ) -> object:
            """End the other sessions of the account, or all."""
            keep = found.session if form is None or form.keep_current else None
            ended = await self._auth.logout_all(found.user, keep=keep)
            return SessionsEnded(sessions_ended=ended.sessions)

    def _add_account(self) -> None:
        @self.router.get("/me", operation_id=self._id("me"), response_model=self._read_user)
        async def me(user: Annotated[UserT, Depends(self._guard.user)]) -> object:
            """Show the account."""
            return self._shown(user)

        @self.router.post("/password", operation_id=self._id("password"), status_code=204)
        async def password(
            form: PasswordForm,
            found: Annotated[Authenticated[UserT], Depends(self._guard.session)],
        ) -> None:
            """Change the password. The other sessions end, this one goes on."""
            await self._auth.change_password(
                found.user,
                form.current_password.get_secret_value(),
                form.new_password.get_secret_value(),
                keep=found.session,
            )

    def _add_sessions(self) -> None:
        @self.router.get(
            "/sessions", operation_id=self._id("sessions"), response_model=list[SessionRead]
        )
        async def sessions(
            found: Annotated[Authenticated[UserT], Depends(self._guard.session)],
        ) -> object:
            """List where the account is logged in, the session used last first."""
            shown = [
                SessionRead.model_validate(each) for each in await self._auth.sessions(found.user)
            ]
            for each in shown:
                each.current = each.id == found.session.id
            return shown

        @self.router.delete(
            "/sessions/{session_id}",
            operation_id=self._id("end_session"),
            status_code=204,
            responses={404: {"description": "The account has no such session", "model": Problem}},
        )
        async def end_session(
            session_id: str, user: Annotated[UserT, Depends(self._guard.user)]
        ) -> Response:
            """End one session of the account."""
            ended = await self._auth.revoke_session(session_id, user=user)
            if not ended.sessions:
                # One answer for those of others, those that have ended, and what is no id.
                return JSONResponse(
                    {"code": "not_found", "detail": "The account has no such session"}, 404
                )
            return Response(status_code=204)


def _read_model(guard: Guard[UserT], read_user: type[BaseModel] | None) -> type[BaseModel]:
    """Return what ``/me`` shows.

    Raises:
        ConfigurationError: It shows a secret, or cannot read an account.
    """
    model = guard.auth.user_model
    if read_user is None:
        fields: dict[str, Any] = {"id": (str, ...), model.identifier_field: (str, ...)}
        return create_model(f"{model.__name__}Read", **fields)
    if shown := _SECRET_FIELDS & set(read_user.model_fields):
        raise ConfigurationError(
            f"auth_router(read_user={read_user.__name__}) would show {', '.join(sorted(shown))} of "
            "an account: leave it out"
        )
    if not read_user.model_config.get("from_attributes"):
        raise ConfigurationError(
            f"auth_router(read_user={read_user.__name__}) reads an account by its attributes: give "
            "it model_config = ConfigDict(from_attributes=True)"
        )
    return read_user
