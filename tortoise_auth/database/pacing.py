"""Long work in short batches, so that requests find the database free in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

BATCH_SIZE = 100
"""Rows. On SQLite every request waits for a batch, which takes a few milliseconds."""

_PAUSE = 4
"""How many times as long as a batch the pause after it is."""


async def batches() -> AsyncGenerator[None, None]:
    """Yield once for each batch, after a pause in proportion to the batch before.

    Example::

        async for _ in batches():
            if not await delete_some():
                break
    """
    now = asyncio.get_running_loop().time
    while True:
        began = now()
        yield
        await asyncio.sleep(_PAUSE * (now() - began))
