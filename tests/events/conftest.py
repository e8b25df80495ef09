"""Fixtures for events: databases in which a second connection sees what is committed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tortoise.context import TortoiseContext

from tests.support.database import SHARED_DATABASES, database


@pytest.fixture(params=SHARED_DATABASES)
async def db(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TortoiseContext]:
    """Each database that a second connection can open."""
    async with database(request.param, tmp_path) as context:
        yield context
