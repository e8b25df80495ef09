"""One life of an account, every refusal included, printed line by line; run as a program.

The lines are the same in every setting of Python and the system. It has no ``assert``: ``-O`` would
take it out.
"""

from __future__ import annotations

import asyncio
import json
import locale
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from tortoise.context import TortoiseContext

from tests.support.app import User
from tortoise_auth import AbstractUser, AuthConfig, AuthService, EventEmitter, SigningKey
from tortoise_auth.events import Event
from tortoise_auth.exceptions import PasswordPolicyError, TortoiseAuthError
from tortoise_auth.testing import FakeClock, cheap_hasher
from tortoise_auth.throttling import Backoff, DatabaseThrottle

SECRET = "0Kq3v-7Zb1x_Tn5Rw8Yd2Hf4Jm6Ls9Pc"
EMAIL, PASSWORD, NEW = (
    "TITI.ISIK@EXAMPLE.COM",
    "ISIK I\u011eDIR \u0131s\u0131k \u0131gdir",
    "wrong donkey charger nail",
)
CONFIG = {
    "connections": {"default": "sqlite://:memory:"},
    "apps": {"models": {"models": ["tests.support.app", "tortoise_auth.models"]}},
}


def report(what: str, *facts: object) -> None:
    """Print one line, the same on every output."""
    print(ascii(" | ".join(map(str, (what, *facts)))))


async def attempt(what: str, call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a call; print that it worked, or the whole text of its error."""
    try:
        result = await call()
    except (TortoiseAuthError, ValueError, TypeError) as error:
        failures = error.failures if isinstance(error, PasswordPolicyError) else ()
        report(what, type(error).__name__, error, *failures)
        return None
    report(what, "done")
    return result


def refused_settings() -> None:
    """Print which settings are refused before anything runs."""
    key = SigningKey(SECRET, kid="a")
    for name, make in (
        ("no secret", lambda: AuthConfig(secret="")),
        ("placeholder", lambda: AuthConfig(secret="CHANGE-IT" * 4)),
        ("short", lambda: AuthConfig(secret=SECRET[:31])),
        ("same kid", lambda: AuthConfig(secret=[key, SigningKey(SECRET[::-1], kid="a")])),
        ("lifetime", lambda: AuthConfig(secret=SECRET, leeway=timedelta(days=1))),
        ("cost", lambda: type(AbstractUser.password_hasher)(memory_cost=0)),
        ("limit", lambda: Backoff(free_attempts=0)),
        ("handler", lambda: EventEmitter(strict=True).on("user_login", lambda user, missing: None)),
    ):
        try:
            make()
        except (TortoiseAuthError, TypeError) as error:
            report(name, type(error).__name__, error)
        else:
            report(name, "accepted")


async def live(auth: AuthService[User], clock: FakeClock) -> None:
    """Do everything, with right and wrong values."""
    ada = await attempt("sign up", lambda: User.create_user(email=EMAIL, password=PASSWORD))
    first_version = ada.session_version  # a random number
    report("stored", ada.email, ada.pk, ada.is_active)
    form = {"is_active": True, "session_version": 7, "nonsense": 1, "more": 2}
    await attempt("form", lambda: User.create_user(email="b@example.com", password=NEW, **form))
    await attempt("unknown", lambda: User.create_user(email="b@x.io", password=NEW, b=1, a=2, c=3))
    await attempt("twice", lambda: User.create_user(email="titi.isik@example.com", password=NEW))
    for password in ("short", "PASSWORDPASSWORD", "Bernd.Becker@X.io", "x\0", "x" * 2000):
        await attempt(
            "weak",
            lambda: User.create_user(email="bernd.becker@x.io", password=password),  # noqa: B023
        )

    for identifier in (EMAIL, "t\u0131t\u0131.isik@example.com", "titi.i\u015fik@example.com"):
        await attempt("name", lambda: auth.login(identifier, PASSWORD))  # noqa: B023
    for password in (PASSWORD.lower(), PASSWORD.upper(), PASSWORD + " ", ""):
        await attempt("password", lambda: auth.login(EMAIL, password))  # noqa: B023
    await attempt("throttled", lambda: auth.login(EMAIL, PASSWORD))
    clock.advance(timedelta(days=2))

    first = await attempt("login", lambda: auth.login(EMAIL, PASSWORD, claims={"b": 1, "a": [2]}))
    claims = auth.decode(first.access_token)
    report("claims", claims.subject, claims.issued_at, claims.expires_at, dict(claims.extra))
    await attempt("reserved", lambda: auth.login(EMAIL, PASSWORD, claims={"sub": 1, "aud": 2}))
    second = await attempt("refresh", lambda: auth.refresh(first.refresh_token))
    report("expiry", second.access_expires_at, second.refresh_expires_at, second.session.generation)
    for token in (first.access_token[:-2], "", "a.b.c", first.refresh_token):
        await attempt("forged", lambda: auth.authenticate(token))  # noqa: B023
    await attempt("authenticate", lambda: auth.authenticate(second.access_token))
    await attempt("reuse", lambda: auth.refresh(first.refresh_token))
    await attempt("after reuse", lambda: auth.authenticate(second.access_token))

    third = await attempt("login", lambda: auth.login(EMAIL, PASSWORD))
    await attempt("wrong", lambda: auth.change_password(ada, "wrong", NEW))
    await attempt("change", lambda: auth.change_password(ada, PASSWORD, NEW, keep=third.session))
    report("kept", await auth.authenticate(third.access_token), ada.session_version - first_version)
    report("logout", (await auth.logout(third.refresh_token)).sessions)
    report("again", (await auth.logout(third.refresh_token)).sessions)
    await attempt("login", lambda: auth.login(EMAIL, NEW))
    report("everywhere", (await auth.logout_all(ada)).sessions)
    report("deactivate", (await auth.deactivate(ada)).sessions)
    await attempt("closed", lambda: auth.login(EMAIL, NEW))
    await attempt("activate", lambda: auth.activate(ada))
    clock.advance(timedelta(days=40))
    report("purged", await auth.purge_expired())
    report("relayed", await auth.relay().drain())


def service(clock: FakeClock, emitter: EventEmitter) -> AuthService[User]:
    """Set up as a host does, before a loop runs: libraries are imported here."""
    AbstractUser.password_hasher, AbstractUser.emitter = cheap_hasher(), emitter
    throttle = DatabaseThrottle(account=Backoff(free_attempts=4), clock=clock)
    return AuthService(User, AuthConfig(secret=SECRET), throttle=throttle, clock=clock)


async def main(auth: AuthService[User], clock: FakeClock) -> None:
    """Run the life, and print the events that are emitted."""
    emitter = auth.emitter

    @emitter.on("*", thread=False)
    def received(event: Event) -> None:
        fields = event.to_dict()
        volatile = ("id", "session_id", "occurred_at")
        facts = {name: value for name, value in fields.items() if name not in volatile}
        report("event", json.dumps(facts))

    @emitter.on("user_logout", "password_changed", delivery="durable", name="later")
    async def later(user: User, event: Event) -> None:
        report("later", event.name, user)

    async with TortoiseContext() as context:
        await context.init(config=CONFIG)
        await context.generate_schemas()
        await live(auth, clock)
        await emitter.aclose(10)


if __name__ == "__main__":
    with suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, "")
    print(
        f"{locale.setlocale(locale.LC_CTYPE)} {sys.flags.optimize} {sys.flags.hash_randomization}"
    )
    the_clock = FakeClock()
    refused_settings()
    asyncio.run(main(service(the_clock, EventEmitter()), the_clock))
