"""The gate: no module but ``flows/signin.py`` opens a session, for a proof of any kind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from tortoise.context import TortoiseContext

import tortoise_auth
from tests.support.accounts import PASSWORD
from tests.support.app import User
from tortoise_auth import AuthService
from tortoise_auth.context import RequestContext
from tortoise_auth.events.unit_of_work import UnitOfWork
from tortoise_auth.flows.core import Core
from tortoise_auth.flows.signin import Proof, sign_in
from tortoise_auth.models import Session
from tortoise_auth.testing import FakeClock

PACKAGE = Path(tortoise_auth.__file__).parent


def openings(source: str) -> Iterator[str]:
    """Return the calls of a module that could open a session: ``.open``, or a new ``Session``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith("sessions.open") or called in (
                "Session",
                *(f"Session.{way}" for way in ("create", "bulk_create", "get_or_create")),
                "Session.update_or_create",
            ):
                yield called


async def use_nothing_up(unit: UnitOfWork) -> bool:
    """Spend a reusable proof."""
    return True


def proof(user: User, clock: FakeClock, **changes: object) -> Proof[User]:
    """Return a proof by two methods, given an hour ago."""
    values = {
        "user": user,
        "method": "link",
        "amr": ("otp", "pwd"),
        "proven_at": clock() - timedelta(hours=1),
        "spend": use_nothing_up,
        **changes,
    }
    return Proof(**values)  # type: ignore[arg-type]


@pytest.fixture
def core(auth: AuthService[User]) -> Core[User]:
    """The parts of a service."""
    return auth._core


@pytest.fixture
async def user(sqlite: TortoiseContext) -> User:
    """A saved account."""
    return await User.create_user(email="ada@example.com", password=PASSWORD)


def test_only_the_gate_opens_sessions() -> None:
    """Only the gate calls ``sessions.open``, and only the store makes a row."""
    calls_of = {
        str(path.relative_to(PACKAGE)): list(openings(path.read_text()))
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: calls for name, calls in calls_of.items() if calls} == {
        "flows/signin.py": ["core.sessions.open"],
        "sessions/store.py": ["Session.create"],
    }


@pytest.mark.parametrize("source", ["self._sessions.open(user)", "await Session.create(id=1)"])
def test_the_search_finds_openings(source: str) -> None:
    """The check above detects each way to open a session."""
    assert list(openings(f"async def f():\n    {source}"))


class TestProof:
    async def test_session_keeps_the_proof(
        self, core: Core[User], user: User, clock: FakeClock, emitted: list[str]
    ) -> None:
        """The session and each access token carry the methods and the time of the proof."""
        result = await sign_in(core, proof(user, clock), RequestContext(), None)
        assert result is not None
        stored = await Session.get(id=result.session.id)
        assert stored.authentication_methods == "otp pwd"
        assert stored.authenticated_at == clock() - timedelta(hours=1)
        claims = core.tokens.read(result.access_token)
        assert claims.methods == ("otp", "pwd")
        assert claims.authenticated_at == clock() - timedelta(hours=1)
        assert emitted == ["user_login"]

    async def test_password(self, auth: AuthService[User], user: User, clock: FakeClock) -> None:
        """A password login has the method ``pwd`` (RFC 8176), and a refresh keeps it."""
        opened = await auth.login("ada@example.com", PASSWORD)
        at = clock()
        clock.advance(timedelta(minutes=5))
        result = await auth.refresh(opened.refresh_token)
        claims = auth.decode(result.access_token)
        assert (claims.methods, claims.authenticated_at) == (("pwd",), at)

    async def test_spent_proof(
        self, core: Core[User], user: User, clock: FakeClock, emitted: list[str]
    ) -> None:
        """A proof that is spent opens no session, and nothing is emitted."""

        async def is_spent(unit: UnitOfWork) -> bool:
            return False

        result = await sign_in(core, proof(user, clock, spend=is_spent), RequestContext(), None)
        assert result is None
        assert await Session.all().count() == 0
        assert (await User.get(pk=user.pk)).last_login is None
        assert emitted == []
