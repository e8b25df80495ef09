"""What the OpenAPI document says: security schemes, bodies, answers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal
from uuid import UUID

from fastapi.openapi.models import SecurityBase as SecurityModel
from fastapi.security.base import SecurityBase
from pydantic import BaseModel, ConfigDict, Field, SecretStr, StrictBool

Responses = dict[int | str, dict[str, object]]
"""What ``responses=`` of FastAPI's routers and routes takes."""

_MAX_IDENTIFIER = 1024
_MAX_PASSWORD = 4096
"""Characters of a body. The policy has its own limit, and answers with its own code."""


class Scheme(SecurityBase):
    """Shows how a request is authenticated, and reads nothing.

    FastAPI's own schemes take a `Request`, which a WebSocket is not.
    """

    def __init__(self, model: SecurityModel, name: str) -> None:
        self.model = model
        self.scheme_name = name

    async def __call__(self) -> None:
        """Do nothing: `tortoise_auth.web.credentials` reads the request."""


class Problem(BaseModel):
    """Why a request was refused."""

    code: str
    detail: str


class PolicyProblem(Problem):
    """Why a new password was refused, rule by rule."""

    failures: list[Problem] = []


class WrongField(BaseModel):
    """What is wrong with one value of a request. The value is not repeated."""

    loc: list[str | int]
    msg: str
    type: str


class InvalidRequest(BaseModel):
    """The request is not as documented."""

    code: Literal["invalid_request"]
    detail: list[WrongField]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoginForm(_Form):
    """An account and its password."""

    identifier: str = Field(max_length=_MAX_IDENTIFIER)
    password: SecretStr = Field(max_length=_MAX_PASSWORD)


class RefreshForm(_Form):
    """The newest refresh token."""

    refresh_token: SecretStr = Field(max_length=_MAX_PASSWORD)


class LogoutAllForm(_Form):
    """Whether this session goes on."""

    keep_current: StrictBool = True


class PasswordForm(_Form):
    """A new password, and proof of the current one."""

    current_password: SecretStr = Field(max_length=_MAX_PASSWORD)
    new_password: SecretStr = Field(max_length=_MAX_PASSWORD)


class Tokens(BaseModel):
    """The tokens of a session; lifetimes in seconds."""

    access_token: str
    refresh_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - no secret
    expires_in: int
    refresh_expires_in: int


class Refreshed(BaseModel):
    """The cookies were set anew; seconds until the next refresh."""

    expires_in: int


class SessionRead(BaseModel):
    """One place where the account is logged in."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID
    created_at: datetime
    last_used_at: datetime
    ip: str | None
    user_agent: str | None
    current: bool = False


class SessionsEnded(BaseModel):
    """How many sessions ended."""

    sessions_ended: int


_CHALLENGE = {"description": "How to authenticate (RFC 6750)", "schema": {"type": "string"}}
_SECONDS = {"description": "Seconds to wait", "schema": {"type": "string"}}


def problem(description: str, **headers: Mapping[str, object]) -> dict[str, object]:
    """Return the documentation of one answer."""
    return {
        "description": description,
        "model": Problem,
        "headers": {name.replace("_", "-"): value for name, value in headers.items()},
    }


def responses_of_guard(*, by_cookie: bool) -> Responses:
    """Return the answers of a route that needs a user."""
    responses: Responses = {
        400: {"description": "The body is not JSON"},
        401: problem("Not authenticated, or not any more", WWW_Authenticate=_CHALLENGE),
        503: problem("The database cannot be reached; try again", Retry_After=_SECONDS),
    }
    if by_cookie:
        responses[403] = problem("A page of another origin may have sent the request")
    return responses


def responses_of_router(*, by_cookie: bool) -> Responses:
    """Return the answers of our own routes."""
    return responses_of_guard(by_cookie=by_cookie) | {
        400: problem("The body is not JSON"),
        413: {"description": "The body is too large"},
        422: {"description": "A value is not accepted", "model": InvalidRequest | PolicyProblem},
        429: problem("Too many attempts", Retry_After=_SECONDS),
    }
