"""What Argon2 computes, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import argon2.low_level
import pytest
from argon2.exceptions import VerifyMismatchError

from tortoise_auth.passwords import PasswordHasher

Cost = tuple[int, int, int]
"""Memory in KiB, passes, lanes."""


@contextmanager
def argon2_costs() -> Iterator[list[Cost]]:
    """Record the cost of everything that Argon2 computes."""
    seen: list[Cost] = []
    hash_secret, verify_secret = argon2.low_level.hash_secret, argon2.low_level.verify_secret

    def hash_and_note(**kwargs: Any) -> bytes:
        seen.append((kwargs["memory_cost"], kwargs["time_cost"], kwargs["parallelism"]))
        return hash_secret(**kwargs)

    def verify_and_note(encoded: bytes, secret: bytes, kind: argon2.low_level.Type) -> bool:
        try:
            valid = verify_secret(encoded, secret, kind)
        except VerifyMismatchError:
            seen.append(_cost_of(encoded))
            raise
        seen.append(_cost_of(encoded))  # a malformed hash raised, and nothing was computed
        return valid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argon2.low_level, "hash_secret", hash_and_note)
        patch.setattr(argon2.low_level, "verify_secret", verify_and_note)
        yield seen


def _cost_of(encoded: bytes) -> Cost:
    parameters = argon2.extract_parameters(encoded.decode())
    return parameters.memory_cost, parameters.time_cost, parameters.parallelism


def full_cost(hasher: PasswordHasher) -> Cost:
    """Return the cost of one hash with the current settings."""
    return hasher.memory_cost, hasher.time_cost, hasher.parallelism
