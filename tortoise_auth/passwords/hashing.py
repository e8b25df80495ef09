"""Passwords are hashed off the event loop, on bounded threads.

``passlib`` here is `libpass`, the maintained continuation under the same import name. passlib
1.7.4 itself is from 2020 and cannot verify bcrypt hashes with bcrypt 5.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import os
import secrets
import sys
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, TypeVar

from tortoise_auth.exceptions import (
    ConfigurationError,
    PasswordPolicyError,
    PolicyFailure,
    ServiceUnavailableError,
)
from tortoise_auth.lazy import LazyModule
from tortoise_auth.threads import Threads

if TYPE_CHECKING:
    import argon2.low_level as argon2_low_level
    import passlib.context as passlib_context
    from passlib.context import CryptContext
else:
    argon2_low_level = LazyModule("argon2.low_level")
    passlib_context = LazyModule("passlib.context")

ResultT = TypeVar("ResultT")

MAX_PASSWORD_LENGTH = 1024
"""Code points. Longer input is refused before any work is done (CVE-2013-1443)."""

OWASP_ARGON2_FLOOR: Sequence[tuple[int, int]] = (
    (47104, 1),
    (19456, 2),
    (12288, 3),
    (9216, 4),
    (7168, 5),
)
"""Least (memory in KiB, passes) of Argon2id by the OWASP Password Storage Cheat Sheet."""

_NO_MEMORY, _NO_THREAD = -22, -33  # error codes of the reference implementation, argon2.h
_SCHEMES: Mapping[str, tuple[str, ...]] = {
    "argon2": ("$argon2id$", "$argon2i$", "$argon2d$"),
    "pbkdf2_sha256": ("$pbkdf2-sha256$",),
    "django_pbkdf2_sha256": ("pbkdf2_sha256$",),
    "bcrypt": ("$2$", "$2a$", "$2b$", "$2x$", "$2y$"),
}
"""The schemes that can be checked, by passlib's names, and how their hashes begin."""
_UNUSABLE_PREFIX = "!"
_this_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of checking a password against a stored hash.

    Attributes:
        valid: The password is right.
        outdated: It is right, and the stored hash should be replaced by one of today's settings.
    """

    valid: bool
    outdated: bool = False


def unusable_hash() -> str:
    """Return a stored value that no password matches, different each time."""
    return _UNUSABLE_PREFIX + secrets.token_urlsafe(24)


def is_usable_hash(hashed: str | None) -> bool:
    """Return whether some password could match a stored value."""
    return bool(hashed) and not str(hashed).startswith(_UNUSABLE_PREFIX)


def input_failures(password: object) -> list[PolicyFailure]:
    """Return the reasons why *password* cannot be hashed at all; an empty list if it can.

    These rules hold at login, too, where every failure looks the same to the caller. The policy
    applies only when a password is chosen.
    """
    if not isinstance(password, str):
        return [PolicyFailure("not_a_string", "The password must be text.")]
    if len(password) > MAX_PASSWORD_LENGTH:
        return [
            PolicyFailure(
                "too_long", f"The password must have at most {MAX_PASSWORD_LENGTH} characters."
            )
        ]
    if "\0" in password:
        return [PolicyFailure("nul_character", "The password must not contain a NUL character.")]
    if any("\ud800" <= character <= "\udfff" for character in password):
        return [PolicyFailure("not_unicode", "The password must be valid Unicode text.")]
    return []


def nfc(password: str) -> str:
    """Return the spelling of *password* that is hashed and checked."""
    return unicodedata.normalize("NFC", password)


class PasswordHasher:
    """Hashes and verifies passwords on a dedicated, bounded thread pool.

    New hashes are Argon2id. Hashes of bcrypt (extra ``bcrypt``), PBKDF2-SHA256 and Django's
    ``pbkdf2_sha256`` are only verified, and reported as outdated so that a login replaces them.
    bcrypt reads 72 bytes: a longer password is wrong for a bcrypt hash, whatever its beginning.
    Passwords are NFC-normalised first (NIST SP 800-63B-4, 3.1.1.2), never trimmed or case-folded.

    Memory is bounded by ``threads`` times ``memory_cost``, however many logins wait. The event loop
    never computes a hash. Hashing threads lower their own priority where the system allows it,
    which keeps the loop responsive at the same throughput.

    Example:
        ``PasswordHasher(memory_cost=19456, time_cost=2, parallelism=1)`` is the OWASP profile for
        small machines.

    Args:
        memory_cost: Memory of one hash in KiB (65536, which is 64 MiB).
        time_cost: Passes over that memory (3).
        parallelism: Lanes, each of which is a thread of Argon2 while it runs (4).
        threads: Hashes computed at the same time (the number of cores). More threads than cores
            gain nothing.

    Raises:
        ConfigurationError: The cost is below the OWASP floor, or a number is out of range.
        TypeError: A setting is not a whole number.
    """

    cost_floor: ClassVar[Sequence[tuple[int, int]]] = OWASP_ARGON2_FLOOR

    def __init__(
        self,
        *,
        memory_cost: int = 65536,
        time_cost: int = 3,
        parallelism: int = 4,
        threads: int | None = None,
    ) -> None:
        self.memory_cost = memory_cost
        self.time_cost = time_cost
        self.parallelism = parallelism
        self.threads = threads if threads is not None else (os.cpu_count() or 1)
        self._check_settings()
        self._dummy_hash = self._well_formed_hash_of_nothing()
        self._pool = Threads(self.threads, "tortoise_auth_hash")

    async def hash(self, password: str) -> str:
        """Return the hash to store for *password*.

        Raises:
            PasswordPolicyError: The input cannot be hashed at all. The policy is not applied.
            ServiceUnavailableError: There was no memory or no thread for it.
        """
        failures = input_failures(password)
        if failures:
            raise PasswordPolicyError(failures)
        return await self._on_a_thread(lambda: self._crypt.hash(nfc(password)))

    async def verify(self, password: str, hashed: str | None) -> Verification:
        """Check *password* against a stored hash.

        Every failure costs one full hash of today's settings: no hash, an unusable or corrupt
        one, input that cannot be hashed, a wrong password. So the time does not reveal which
        accounts exist (OWASP ASVS 6.3.8).

        Args:
            password: The password to check. A value of another type is a failure, not an error.
            hashed: The stored hash; ``None`` if there is no such account.

        Returns:
            ``valid``, and ``outdated`` if the password is right and its hash has another scheme
            or cost than today's.

        Raises:
            ServiceUnavailableError: There was no memory or no thread for it. The password may
                be right.
        """
        if input_failures(password):
            return await self._on_a_thread(self._waste_one_hash)
        return await self._on_a_thread(lambda: self._verify(nfc(password), hashed))

    def knows(self, hashed: str) -> bool:
        """Return whether a stored value is a hash of a scheme that can be verified here."""
        return hashed.startswith(tuple(chain.from_iterable(self._schemes.values())))

    def close(self) -> None:
        """Stop the threads once they are idle. The next call starts new ones."""
        self._pool.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(memory_cost={self.memory_cost}, time_cost={self.time_cost}, "
            f"parallelism={self.parallelism}, threads={self.threads})"
        )

    @cached_property
    def _schemes(self) -> Mapping[str, tuple[str, ...]]:
        without = set() if importlib.util.find_spec("bcrypt") else {"bcrypt"}
        return {name: _SCHEMES[name] for name in _SCHEMES if name not in without}

    @cached_property
    def _crypt(self) -> CryptContext:
        # Two threads may build a context each; the contexts are equal, and either is kept.
        return passlib_context.CryptContext(
            schemes=list(self._schemes),
            default="argon2",
            deprecated="auto",
            argon2__type="ID",
            argon2__memory_cost=self.memory_cost,
            argon2__time_cost=self.time_cost,
            argon2__parallelism=self.parallelism,
            pbkdf2_sha256__default_rounds=600_000,
        )

    def _check_settings(self) -> None:
        for name in ("memory_cost", "time_cost", "parallelism", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(
                    f"PasswordHasher: {name} must be a whole number, not {type(value).__name__}"
                )
        if min(self.memory_cost, self.time_cost, self.parallelism, self.threads) < 1:
            raise ConfigurationError(
                "PasswordHasher: every cost and the number of threads must be at least 1"
            )
        if self.memory_cost < 8 * self.parallelism:
            raise ConfigurationError(
                f"PasswordHasher: memory_cost={self.memory_cost} is too little for "
                f"parallelism={self.parallelism}; Argon2 needs 8 KiB for each lane (RFC 9106, 3.1)"
            )
        if self.cost_floor and not any(
            self.memory_cost >= memory and self.time_cost >= passes
            for memory, passes in self.cost_floor
        ):
            floor = ", ".join(f"m={memory} t={passes}" for memory, passes in self.cost_floor)
            raise ConfigurationError(
                f"PasswordHasher: m={self.memory_cost} KiB with t={self.time_cost} is below what "
                f"OWASP asks of Argon2id. Use at least one of: {floor}. In tests, use "
                "tortoise_auth.testing.cheap_hasher()."
            )

    def _well_formed_hash_of_nothing(self) -> str:
        """Return a hash that no password matches and that costs as much to check as a real one.

        Its salt and digest are random instead of computed, so that construction costs no hash.
        """
        salt, digest = (
            base64.b64encode(secrets.token_bytes(size)).rstrip(b"=").decode() for size in (16, 32)
        )
        return (
            f"$argon2id$v=19$m={self.memory_cost},t={self.time_cost},p={self.parallelism}"
            f"${salt}${digest}"
        )

    def _verify(self, password: str, hashed: str | None) -> Verification:
        if hashed is None or not is_usable_hash(hashed):
            return self._waste_one_hash()
        try:
            # `needs_update` parses the hash, so a corrupt one fails here, before it costs a hash.
            outdated = self._crypt.needs_update(hashed)
            valid = self._crypt.verify(password, hashed)
        # The hash is corrupt or unknown, has an unsupported parameter, or the password has more
        # than 72 bytes for bcrypt.
        except (ValueError, TypeError, NotImplementedError) as error:
            if _is_exhaustion(error.__context__):
                raise
            return self._waste_one_hash()
        if not valid and outdated:
            # The check cost what that other hash costs, often less than a hash of today's settings.
            return self._waste_one_hash()
        return Verification(valid=valid, outdated=valid and outdated)

    def _waste_one_hash(self) -> Verification:
        self._crypt.verify("", self._dummy_hash)
        return Verification(valid=False)

    async def _on_a_thread(self, work: Callable[[], ResultT]) -> ResultT:
        def job() -> ResultT:
            # The first job imports passlib, before the priority falls: a thread of low priority
            # that holds the GIL for an import keeps the event loop waiting (270 instead of 50 ms
            # on a busy machine).
            _ = self._crypt
            _lower_priority()
            return work()

        try:
            return await asyncio.wrap_future(self._pool.submit(job))
        except (ValueError, MemoryError, RuntimeError) as error:
            kind = type(error).__name__  # passlib quotes the stored hash in its errors
        raise ServiceUnavailableError(f"This machine could not compute a hash ({kind})")


def _is_exhaustion(error: BaseException | None) -> bool:
    """Return whether Argon2 had no memory or no thread; its errors carry a text, not a code."""
    return str(error) in map(argon2_low_level.error_to_str, (_NO_MEMORY, _NO_THREAD))


def _lower_priority() -> None:
    """Lower the priority of this thread, once, so that the event loop runs first."""
    # Elsewhere than on Linux `nice` changes the whole process.
    if sys.platform == "linux" and not hasattr(_this_thread, "is_lowered"):
        _this_thread.is_lowered = True
        with suppress(OSError):
            os.nice(10)
