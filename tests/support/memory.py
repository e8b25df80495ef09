"""The measure of the tests of growth."""

from __future__ import annotations

import gc
import sys


def blocks() -> int:
    """Return how many blocks of memory are in use."""
    gc.collect()
    return sys.getallocatedblocks()
