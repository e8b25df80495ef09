"""The page on delivery: its claims name existing tests, and its snippets and commands work."""

from __future__ import annotations

import ast
import asyncio
import functools
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tortoise.context import TortoiseContext

from tests.support.accounts import PASSWORD, SECRET
from tests.support.app import AuditRow, User
from tests.support.snippets import run, snippets
from tortoise_auth import AuthConfig, AuthService, EventEmitter

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "delivery.md"
COMMAND = Path(sys.executable).with_name("tortoise-auth")


class CustomerSystem:
    """A system that receives the logins of a host, and accepts each key once."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.noted = asyncio.Event()

    async def note(self, text: str, *, idempotency_key: str) -> None:
        """Store a note, unless its key is known."""
        self.notes.setdefault(idempotency_key, text)
        self.noted.set()


@pytest.fixture
async def namespace(
    sqlite: TortoiseContext, emitter: EventEmitter
) -> AsyncIterator[dict[str, Any]]:
    """The names that the snippets of the page use."""
    yield {
        "AuditRow": AuditRow,
        "User": User,
        "auth": AuthService(User, AuthConfig(secret=SECRET)),
        "crm": CustomerSystem(),
        "emitter": emitter,
        "on": emitter.on,
        "user": await User.create_user(email="ada@example.com", password=PASSWORD),
        "password": PASSWORD,
    }
    await emitter.aclose()


class TestProofs:
    def test_exist(self) -> None:
        """Every test that the page names exists: file, class and function."""
        named = set(re.findall(r"`([\w/]+\.py)::(\w+(?:::\w+)?)`", PAGE.read_text()))
        assert len(named) > 20
        missing = {
            f"{path}::{test}" for path, test in named if test not in _tests(ROOT / "tests" / path)
        }
        assert not missing

    def test_every_line_has_one(self) -> None:
        """Every row of the table of failures names a test."""
        section = PAGE.read_text().split("## What happens when")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        assert len(lines) > 20
        without = [
            line for line in lines[1:] if not re.search(r"\.py::(\w+::)?test_\w+` \|$", line)
        ]
        assert not without


@pytest.mark.slow
class TestSnippets:
    async def test_run(
        self,
        namespace: dict[str, Any],
        capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Every snippet runs, in order, and the durable handlers on the page are called."""
        sources = list(snippets(PAGE))
        assert len(sources) >= 4
        for source in sources:
            await run(source, namespace, PAGE.name)
        await namespace["auth"].login("ada@example.com", "a wholly different phrase")
        async with asyncio.timeout(30), namespace["lifespan"](None):
            await namespace["crm"].noted.wait()
        assert list(namespace["crm"].notes.values()) == ["ada@example.com was here"]
        assert not caplog.records

    def test_commands(self) -> None:
        """Every command on the page exists, with the options of the page."""
        commands = re.findall(r"^(?:\$ |ExecStart=\S*/)tortoise-auth (.*)$", PAGE.read_text(), re.M)
        assert len(commands) > 5
        for command in commands:
            words = re.sub(r"\s+#.*", "", command).split()
            text = _help(*words[:2] if words[0] == "outbox" else words[:1])
            for option in (word for word in words if word.startswith("--")):
                assert option in text, command


class TestSize:
    def test_is_short(self) -> None:
        """The page has fewer than 250 lines."""
        assert len(PAGE.read_text().splitlines()) < 250


@functools.cache
def _help(*path: str) -> str:
    finished = subprocess.run(
        [COMMAND, *path, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    return finished.stdout


def _tests(path: Path) -> set[str]:
    """Return the tests in a file, as ``Class::test`` or ``test``."""
    if not path.exists():
        return set()
    names: set[str] = set()
    for each in ast.parse(path.read_text()).body:
        if isinstance(each, ast.ClassDef):
            names |= {f"{each.name}::{name}" for name in _functions(each.body)}
        names |= _functions([each])
    return {name for name in names if name.rpartition("::")[2].startswith("test_")}


def _functions(body: list[ast.stmt]) -> set[str]:
    return {each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
