"""The current user of a request or WebSocket, as a dependency."""

# Without `from __future__ import annotations`: FastAPI could not resolve the annotations of the
# closures below, which name local variables.

import warnings
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Annotated, Generic

from fastapi import Depends
from fastapi.openapi.models import APIKey, APIKeyIn, HTTPBearer
from starlette.requests import HTTPConnection

from tortoise_auth.clock import utc_now
from tortoise_auth.context import request_context
from tortoise_auth.exceptions import (
    ConfigurationError,
    NotAuthenticatedError,
    ReauthenticationRequiredError,
    TokenError,
)
from tortoise_auth.integrations.fastapi.documents import Responses, Scheme, responses_of_guard
from tortoise_auth.service import Authenticated, AuthService
from tortoise_auth.users import UserT
from tortoise_auth.web import Cookies, CrossOriginCheck, credentials


class Guard(Generic[UserT]):
    """Dependencies that authenticate a request or a WebSocket, by bearer token or cookie.

    Give them to FastAPI in three lines of your own, which is where your type meets them::

        guard = Guard(auth)
        CurrentUser = Annotated[User, Depends(guard.user)]
        OptionalUser = Annotated[User | None, Depends(guard.optional_user)]
        FreshUser = Annotated[User, Depends(guard.fresh_user(timedelta(minutes=5)))]

    All of them together cost one SQL query a request. In tests override them:
    ``app.dependency_overrides[guard.user] = lambda: user``. `install` answers their errors.

    Args:
        auth: Your service.
        cookies: Lets browsers authenticate by cookies, too. A request with a bearer token is
            authenticated by that alone.
        trusted_origins: Other origins whose pages may act for the visitor; see `CrossOriginCheck`.
        name: Begins the names of the security schemes. Give it to the guard of a second user model.

    Attributes:
        user: The user; 401 without.
        optional_user: The user, or ``None`` without a token, or if the cookie is of no use any more. A
            bearer token that is refused is 401.
        session: The user with session and claims, as an `Authenticated`.
        responses: Documents the answers: ``APIRouter(responses=guard.responses)``.
        documented: A dependency that shows the security schemes and does nothing.

    Raises:
        ConfigurationError: An argument is of another type, or an origin is none.
    """

    user: Callable[..., Awaitable[UserT]]
    optional_user: Callable[..., Awaitable[UserT | None]]
    session: Callable[..., Awaitable[Authenticated[UserT]]]
    documented: Callable[..., Awaitable[None]]

    def __init__(
        self,
        auth: AuthService[UserT],
        cookies: Cookies | None = None,
        *,
        trusted_origins: Iterable[str] = (),
        name: str = "",
    ) -> None:
        if not isinstance(auth, AuthService) or not isinstance(cookies, Cookies | None):
            raise ConfigurationError("Guard takes an AuthService, and perhaps Cookies()")
        if cookies is not None and not auth.config.refresh_reuse_grace:
            warnings.warn(
                "The tabs of a browser share their cookies, and without a grace period the second "
                "one to refresh ends the session: AuthConfig(refresh_reuse_grace=timedelta(seconds=30))",
                stacklevel=2,
            )
        self.auth = auth
        self.cookies = cookies
        self.name = name
        self.check = CrossOriginCheck(trusted_origins)
        self.responses: Responses = responses_of_guard(by_cookie=cookies is not None)
        self.documented = self._documented()
        self._make_dependencies()
        self._fresh: dict[timedelta, Callable[..., Awaitable[UserT]]] = {}

    def fresh_user(self, within: timedelta) -> Callable[..., Awaitable[UserT]]:
        """Return a dependency: the user, if their session was opened *within* this time; else 401.

        For what a session that was left open must not do. Logging in again makes a fresh one. The
        same time returns the same dependency.
        """
        if within not in self._fresh:
            self._fresh[within] = self._make_fresh_user(within)
        return self._fresh[within]

    def _make_dependencies(self) -> None:
        auth, cookies, check = self.auth, self.cookies, self.check

        async def outcome(
            connection: HTTPConnection, _: Annotated[None, Depends(self.documented)]
        ) -> Authenticated[UserT] | TokenError:
            """Authenticate once for all dependencies: FastAPI keeps the result for the request."""
            found = credentials(connection.scope, cookies)
            if found is None:
                return NotAuthenticatedError()
            if found.by_cookie and cookies is not None:
                connection.state.tortoise_auth_cookies = cookies  # for `answer_error`
                check.verify(connection.scope, cookies)
            try:
                return _noted(await auth.authenticated(found.token))
            except TokenError as error:
                if found.by_cookie:  # an old cookie must not keep its owner from the login page
                    return error
                raise

        async def session(
            found: Annotated[Authenticated[UserT] | TokenError, Depends(outcome)],
        ) -> Authenticated[UserT]:
            if isinstance(found, TokenError):
                raise found
            return found

        async def user(found: Annotated[Authenticated[UserT], Depends(session)]) -> UserT:
            return found.user

        async def optional_user(
            found: Annotated[Authenticated[UserT] | TokenError, Depends(outcome)],
        ) -> UserT | None:
            return None if isinstance(found, TokenError) else found.user

        self.session, self.user, self.optional_user = session, user, optional_user

    def _make_fresh_user(self, within: timedelta) -> Callable[..., Awaitable[UserT]]:
        async def fresh_user(
            found: Annotated[Authenticated[UserT], Depends(self.session)],
        ) -> UserT:
            proved = found.session.authenticated_at or found.session.created_at
            if utc_now() - proved > within:
                raise ReauthenticationRequiredError(within.total_seconds())
            return found.user

        return fresh_user

    def _documented(self) -> Callable[..., Awaitable[None]]:
        """Return a dependency that shows the schemes of this guard as alternatives."""
        bearer = Scheme(
            HTTPBearer(bearerFormat="JWT", description="The `access_token` of a login"),
            f"{self.name}AccessToken",
        )
        if self.cookies is None:
            return bearer
        cookie = Scheme(
            APIKey.model_validate(
                {
                    "in": APIKeyIn.cookie,
                    "name": self.cookies.access_name,
                    "description": "Set by a login; nothing to fill in here",
                }
            ),
            f"{self.name}SessionCookie",
        )

        async def either(
            _bearer: Annotated[None, Depends(bearer)], _cookie: Annotated[None, Depends(cookie)]
        ) -> None:
            """Show both."""

        return either


def _noted(found: Authenticated[UserT]) -> Authenticated[UserT]:
    """Let the events of this request say who is signed in.

    Only below the middleware that `install` adds, since it takes the value back.
    """
    context = request_context.get(None)
    if context is not None:
        request_context.set(replace(context, actor_id=str(found.user.pk)))
    return found
