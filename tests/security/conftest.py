"""Fixtures for promises: a database of each dialect, because `tests.flows` goes through every driver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tortoise.context import TortoiseContext

from tests.support.database import DIALECTS, database


@pytest.fixture(params=DIALECTS)
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """A database of each dialect."""
    async with database(request.param, tmp_path) as context:
        yield context
