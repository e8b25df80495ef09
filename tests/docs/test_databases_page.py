"""The page about databases: its program runs on each, its snippets run, replicas hide nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.accounts import SECRET
from tests.support.database import place
from tests.support.services import needs_mariadb, needs_postgres
from tests.support.snippets import ROOT, run, snippets

PAGE = ROOT / "docs" / "databases.md"
PROGRAM = ROOT / "examples" / "any_database.py"

WITHOUT_ASYNCMY = "import sys; sys.modules['asyncmy'] = None; "
"""Tortoise takes asyncmy where it is installed, and aiomysql else."""


async def test_snippets_run() -> None:
    """Every snippet of the page runs, in order."""
    namespace: dict[str, Any] = {}
    sources = list(snippets(PAGE))
    assert len(sources) == 3
    for source in sources:
        await run(source, namespace, "docs/databases.md")
    assert namespace["Member"]._meta.fields_map["username"].exact


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "driver"),
    [
        ("file", "aiosqlite"),
        pytest.param("postgres", "asyncpg", marks=needs_postgres),
        pytest.param("psycopg", "psycopg", marks=needs_postgres),
        pytest.param("mariadb", "asyncmy", marks=needs_mariadb),
        pytest.param("mariadb", "aiomysql", marks=needs_mariadb),
    ],
)
async def test_program_on(kind: str, driver: str, tmp_path: Path) -> None:
    """A newcomer's twenty lines run unchanged on five drivers, and each uses its own."""
    before = WITHOUT_ASYNCMY if driver == "aiomysql" else "import sys; "
    used = f"assert {driver!r} in sys.modules"
    async with place(kind, tmp_path) as url:
        # `__main__` must be the module whose models Tortoise registers.
        code = f"{before}"
        code += f"exec(compile(open({str(PROGRAM)!r}).read(), {str(PROGRAM)!r}, 'exec')); {used}"
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": url, "AUTH_SECRET": SECRET},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "authenticated as ada@example.com",
        "delivered to ada@example.com",
        "rows delivered: 1",
        "sessions ended: 1",
    ]
    assert done.stdout in PAGE.read_text()
