"""Passwords are hashed off the event loop, on bounded threads.

``passlib`` here is `libpass`, the maintained continuation under the same import name. passlib
1.7.4 itself is from 2020 and cannot verify bcrypt hashes with bcrypt 5.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import os
import re
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
    causes,
)
from tortoise_auth.lazy import LazyModule
from tortoise_auth.legible import logger_of
from tortoise_auth.passwords.installation import require_libpass
from tortoise_auth.threads import Threads, usable_cpus

if TYPE_CHECKING:
    import argon2.low_level as argon2_low_level
    import passlib.context as passlib_context
    from passlib.context import CryptContext
else:
    argon2_low_level = LazyModule("argon2.low_level")
    passlib_context = LazyModule("passlib.context")

require_libpass()

logger = logger_of("tortoise_auth")

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
_COSTS: Mapping[str, re.Pattern[str]] = {
    "argon2": re.compile(
        r"\$argon2(?:id|i|d)\$(?:v=\d+\$)?m=(\d{1,10}),t=(\d{1,10}),p=(\d{1,8})\$", re.ASCII
    ),
    "pbkdf2": re.compile(r"\$?pbkdf2[-_]sha256\$(\d{1,10})\$", re.ASCII),
    "bcrypt": re.compile(r"\$2[abxy]?\$(\d\d)\$", re.ASCII),
}
"""How a hash states its cost."""
_BCRYPT_BYTES = 72
_LANES = 64  # of Argon2 in a stored hash: each is a thread
_UNUSABLE_PREFIX = "!"
_UNUSABLE = re.compile(r"!(?:[A-Za-z0-9_-]{32,})?", re.ASCII)
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


@dataclass(frozen=True, kw_only=True)
class CostCaps:
    """The most that a *stored* hash may cost to check, so that one row cannot stop every login.

    A hash above a cap, from an import or a writer of the table, is checked by no one: each password
    is wrong for it, at the usual cost. The cost of new hashes is capped by nothing but your settings.

    Attributes:
        argon2_memory: KiB (1 GiB).
        argon2_work: KiB times passes (8 passes over 1 GiB, or 128 over 64 MiB).
        bcrypt_rounds: Each round doubles the work (16, about five seconds).
        pbkdf2_iterations: 10 million, about five seconds.

    Raises:
        ConfigurationError: A cap is not a whole number of at least 1.
    """

    argon2_memory: int = 1 << 20
    argon2_work: int = 1 << 23
    bcrypt_rounds: int = 16
    pbkdf2_iterations: int = 10_000_000

    def __post_init__(self) -> None:
        if not all(type(cap) is int and cap >= 1 for cap in vars(self).values()):
            raise ConfigurationError("CostCaps: each cap must be a whole number of at least 1")


def unusable_hash() -> str:
    """Return a stored value that no password matches, different each time."""
    return _UNUSABLE_PREFIX + secrets.token_urlsafe(24)


def is_usable_hash(hashed: str | None) -> bool:
    """Return whether some password could match a stored value."""
    return bool(hashed) and not str(hashed).startswith(_UNUSABLE_PREFIX)


def is_hash(value: str) -> bool:
    """Return whether a value is a hash of a scheme known here, or is made to match no password.

    The second kind is that of `unusable_hash`, or Django's: a password may begin with "!", too.
    """
    return value.startswith(tuple(chain.from_iterable(_SCHEMES.values()))) or (
        _UNUSABLE.fullmatch(value) is not None
    )


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
        threads: Hashes computed at the same time (the number of usable cores: affinity and
            container quota count). More threads than cores gain nothing.
        caps: The most that a stored hash may cost to check, see `CostCaps`.

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
        caps: CostCaps | None = None,
    ) -> None:
        self.memory_cost = memory_cost
        self.time_cost = time_cost
        self.parallelism = parallelism
        self.threads = threads if threads is not None else usable_cpus()
        self.caps = caps if caps is not None else CostCaps()
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
        return await self._on_a_thread(lambda: self._verify(password, hashed))

    def knows(self, hashed: str) -> bool:
        """Return whether a stored value is a hash of a scheme that can be verified here."""
        return hashed.startswith(tuple(chain.from_iterable(self._schemes.values())))

    def affords(self, hashed: str) -> bool:
        """Return whether a stored hash costs no more to check than `caps` allow.

        A hash that does not state its cost in a form that is known here is not checked: whatever
        reads it may understand more than this.
        """
        scheme, costs = _stated_cost(hashed)
        if scheme == "argon2":
            memory, passes, lanes = costs
            most = max(self.caps.argon2_memory, self.memory_cost)
            work = max(self.caps.argon2_work, self.memory_cost * self.time_cost)
            return (
                memory <= most
                and memory * passes <= work
                and lanes <= max(_LANES, self.parallelism)
            )
        if scheme == "pbkdf2":
            return costs[0] <= self.caps.pbkdf2_iterations
        return scheme == "bcrypt" and costs[0] <= self.caps.bcrypt_rounds

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
            deprecated="auto",  # whatever is not Argon2id is replaced at a login
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
        if hashed is None or not is_usable_hash(hashed) or not self.affords(hashed):
            return self._waste_one_hash()
        try:
            # `needs_update` parses the hash, so a corrupt one fails here, before it costs a hash.
            outdated = self._crypt.needs_update(hashed)
            valid = self._matches(nfc(password), hashed)
            composed = unicodedata.is_normalized("NFC", password)
            if not valid and outdated and not composed:
                # Another program may have hashed what was typed as it came (NFD on macOS).
                valid = self._matches(password, hashed)
        # The hash is corrupt or unknown, or has an unsupported parameter.
        except (ValueError, TypeError, NotImplementedError) as error:
            if _is_exhaustion(error.__context__):
                raise
            return self._waste_one_hash()
        if not valid and outdated:
            # The check cost what that other hash costs, often less than a hash of today's settings.
            return self._waste_the_rest(hashed)
        return Verification(valid=valid, outdated=valid and outdated)

    def _matches(self, password: str, hashed: str) -> bool:
        # bcrypt 4 cuts a longer password off without a word; the rest of it would be free to choose.
        if hashed.startswith("$2") and len(password.encode()) > _BCRYPT_BYTES:
            return False
        return bool(self._crypt.verify(password, hashed))

    def _waste_one_hash(self) -> Verification:
        self._crypt.verify("", self._dummy_hash)
        return Verification(valid=False)

    def _waste_the_rest(self, hashed: str) -> Verification:
        """Compute what a failed hash of Argon2 cost less than one of today's; else a whole one.

        The work of Argon2 is its memory times its passes. What other schemes cost in this measure
        depends on the machine.
        """
        scheme, costs = _stated_cost(hashed)
        if scheme != "argon2":
            return self._waste_one_hash()
        missing = self.memory_cost * self.time_cost - costs[0] * costs[1]
        if missing > 0:
            memory = max(missing // self.time_cost, 8 * self.parallelism)
            argon2_low_level.hash_secret(
                secret=b"",
                salt=bytes(16),
                time_cost=self.time_cost,
                memory_cost=memory,
                parallelism=self.parallelism,
                hash_len=32,
                type=argon2_low_level.Type.ID,
            )
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
            # Without the text of the error: passlib quotes the stored hash there.
            kind = type(error).__name__
            failure = ServiceUnavailableError(f"This machine could not compute a hash ({kind})")
            kinds = " from ".join(type(each).__name__ for each in causes(error))
            logger.error(
                "%s: %s",
                *(failure, kinds),
                exc_info=(type(failure), failure, error.__traceback__),
            )
        raise failure


def _stated_cost(hashed: str) -> tuple[str, tuple[int, ...]]:
    """Return the scheme and the numbers of a stored hash; no numbers if it states none."""
    for scheme, pattern in _COSTS.items():
        if stated := pattern.match(hashed):
            return scheme, tuple(map(int, stated.groups()))
    return "", ()


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
