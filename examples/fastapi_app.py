"""A FastAPI application: sign up, log in, stay logged in, change the password, log out.

Needs fastapi, uvicorn, and to see it work httpx2. From the root of the repository:

See it work: ``python examples/fastapi_app.py`` calls it and prints the answers.
Serve it:    ``AUTH_SECRET=... uvicorn examples.fastapi_app:app``
"""

import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from tortoise import fields
from tortoise.contrib.fastapi import RegisterTortoise
from tortoise.models import Model

from tortoise_auth import AbstractUser, AuthConfig, AuthResult, AuthService, exceptions
from tortoise_auth.context import RequestContext, request_context
from tortoise_auth.events import Event, UserLoginFailed, emitter, on

if "AUTH_SECRET" not in os.environ:
    if __name__ != "__main__":
        raise SystemExit("Set AUTH_SECRET, for example to what `openssl rand -base64 48` prints.")
    print("AUTH_SECRET is not set. For this demonstration a random one will do.")
    os.environ["AUTH_SECRET"] = os.urandom(48).hex()


class User(AbstractUser):
    """Your own model, with whatever columns you need."""

    display_name = fields.CharField(max_length=100, default="")


class AuditEntry(Model):
    """One line of the audit trail: actor, event, time, address."""

    event = fields.CharField(max_length=64)
    user_id = fields.CharField(max_length=255, null=True)
    ip = fields.CharField(max_length=64, null=True)
    reason = fields.CharField(max_length=32, null=True)
    at = fields.DatetimeField(auto_now_add=True)


auth = AuthService(User, AuthConfig(secret=os.environ["AUTH_SECRET"]))
outgoing_mail: list[tuple[str, str]] = []  # your mail service goes here


@on(Event)
async def audit(event: Event) -> None:
    """Write everything down; but not what was typed as e-mail, which may be a password."""
    reason = event.reason if isinstance(event, UserLoginFailed) else None
    await AuditEntry.create(
        event=event.name, user_id=event.subject_id, ip=event.context.ip, reason=reason
    )


@on("sign_up_answered", delivery="background")  # an event of this application; mail is slow
async def answer_sign_up(email: str, text: str) -> None:
    outgoing_mail.append((email, text))


@on("password_changed", delivery="background")
async def warn(user: User) -> None:
    outgoing_mail.append((user.email, "Your password was changed. Was that you?"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    database = RegisterTortoise(
        app,
        db_url=os.environ.get("DATABASE_URL", "sqlite://fastapi_app.sqlite3"),
        modules={"models": [__name__, "tortoise_auth.models"]},
        generate_schemas=True,  # in production run `tortoise migrate` instead
    )
    async with database, emitter:  # leaving the emitter sends the mail that is still waiting
        yield


async def remember_request(request: Request) -> None:
    """Let sessions and events know where a request came from."""
    ip = request.client.host if request.client else None
    request_context.set(RequestContext(ip=ip, user_agent=request.headers.get("user-agent")))


app = FastAPI(lifespan=lifespan, dependencies=[Depends(remember_request)])

STATUS: dict[type[exceptions.TortoiseAuthError], int] = {
    exceptions.ThrottledError: 429,  # before AuthenticationError, of which it is one
    exceptions.AuthenticationError: 401,
    exceptions.TokenError: 401,
    exceptions.InvalidIdentifierError: 422,
    exceptions.PasswordPolicyError: 422,
    exceptions.ServiceUnavailableError: 503,
}


@app.exception_handler(exceptions.TortoiseAuthError)
async def refuse(request: Request, error: exceptions.TortoiseAuthError) -> JSONResponse:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), None)
    if status is None:
        raise error  # a mistake of ours, not of the visitor
    answer: dict[str, object] = {"code": error.code, "detail": str(error)}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(error, exceptions.ThrottledError):
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, exceptions.PasswordPolicyError):
        answer["failures"] = [failure.code for failure in error.failures]
    return JSONResponse(answer, status, headers)


@app.exception_handler(RequestValidationError)
async def refuse_form(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong and do not repeat it, as FastAPI would: it may be a password."""
    wrong = [f"{each['loc'][-1]}: {each['msg']}" for each in error.errors()]
    return JSONResponse({"code": "invalid_request", "detail": "; ".join(wrong)}, 422)


Bearer = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


async def current_user(bearer: Bearer) -> User:
    return await auth.authenticate(bearer.credentials)


CurrentUser = Annotated[User, Depends(current_user)]
Field = Annotated[str, Body(embed=True)]  # of the JSON object in the request
ShortField = Annotated[str, Body(embed=True, max_length=100)]  # as long as the column


def tokens(result: AuthResult[User]) -> JSONResponse:
    answer = {"access_token": result.access_token, "refresh_token": result.refresh_token}
    return JSONResponse(answer | {"token_type": "bearer"}, headers={"Cache-Control": "no-store"})


@app.post("/sign-up", status_code=202)
async def sign_up(email: Field, password: Field, display_name: ShortField = "") -> str:
    """Answer the same whether or not there is an account; the owner learns it by mail."""
    text = f"Welcome, {display_name}!"
    try:
        await auth.create_user(email=email, password=password, display_name=display_name)
    except exceptions.IdentifierTakenError:
        text = "You have an account already. Forgot your password?"
    except exceptions.TortoiseAuthError:
        raise  # see `refuse`
    except ValueError as error:  # a column cannot hold what was typed; which one, not what
        raise HTTPException(422, str(error)) from None
    await emitter.emit("sign_up_answered", email=email, text=text)
    return "We have sent you an e-mail."


@app.post("/log-in")
async def log_in(email: Field, password: Field) -> JSONResponse:
    return tokens(await auth.login(email, password))


@app.post("/refresh")
async def refresh(refresh_token: Field) -> JSONResponse:
    return tokens(await auth.refresh(refresh_token))


@app.get("/me")
async def me(user: CurrentUser) -> dict[str, str]:
    return {"email": user.email, "display_name": user.display_name}


@app.get("/sessions")
async def sessions(user: CurrentUser) -> list[dict[str, str | None]]:
    return [{"id": str(each.id), "ip": each.ip} for each in await auth.sessions(user)]


@app.post("/password")
async def change_password(bearer: Bearer, user: CurrentUser, current: Field, new: Field) -> str:
    await auth.change_password(user, current, new, keep=auth.decode(bearer.credentials).session_id)
    return "Your password was changed."


@app.post("/log-out")
async def log_out(bearer: Bearer) -> int:
    return (await auth.logout(bearer.credentials)).sessions


@app.post("/log-out-everywhere")
async def log_out_everywhere(user: CurrentUser) -> int:
    return (await auth.logout_all(user)).sessions


def show(answer: Any) -> Any:  # noqa: ANN401 - JSON
    path = answer.request.url.path
    print(f"{answer.request.method:<5}{path:<10}{answer.status_code}  {answer.text[:64]}")
    return answer.json()


if __name__ == "__main__":
    from fastapi.testclient import TestClient

    os.environ["DATABASE_URL"] = "sqlite://:memory:"
    ada = {"email": "ada@example.com", "password": "correct horse battery staple"}
    with TestClient(app, client=("127.0.0.1", 50000)) as client:
        show(client.post("/sign-up", json=ada | {"display_name": "Ada"}))
        show(client.post("/sign-up", json=ada))
        show(client.post("/log-in", json=ada | {"password": "wrong donkey"}))
        first = show(client.post("/log-in", json=ada))
        client.headers["Authorization"] = f"Bearer {first['access_token']}"
        show(client.get("/me"))
        show(client.get("/sessions"))
        change = {"current": ada["password"], "new": "wrong donkey charger nail"}
        show(client.post("/password", json=change))
        show(client.post("/refresh", json={"refresh_token": first["refresh_token"]}))
        show(client.post("/refresh", json={"refresh_token": first["refresh_token"]}))  # a thief?
        show(client.get("/me"))
    print("Mail:", *outgoing_mail, sep="\n  ")
