"""Passwords are hashed off the event loop, on bounded threads.

``passlib`` here is `libpass`, the maintained continuation under the same import name. passlib
1.7.4 itself is from 2020 and cannot verify bcrypt hashes with bcrypt 5.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
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
from tortoise_auth.passwords.formats import (
    LIBPASS_SCHEMES,
    CostCaps,
    StoredHash,
    format_of,
    is_usable_hash,
    parse,
)
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
_BCRYPT_BYTES = 72
_NOT_INSTALLED: Mapping[str, str] = {
    "bcrypt": "bcrypt is not installed here: add the extra bcrypt",
    "scrypt": "This Python is built without scrypt: its OpenSSL has none",
}
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

    New hashes are Argon2id. Hashes that other programs have written (`docs/service.md` has the
    table; those of bcrypt need the extra ``bcrypt``) are only verified, and reported as outdated so
    that a login replaces them. bcrypt reads 72 bytes: a longer password is wrong for a bcrypt hash,
    whatever its beginning.
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
        """Return whether a stored value is a hash of a format that can be verified here."""
        its_format = format_of(hashed)
        return (
            its_format is not None
            and its_format.refused is None
            and its_format.algorithm not in self._missing
        )

    def affords(self, hashed: str) -> bool:
        """Return whether a stored hash costs no more to check than `caps` allow.

        A hash that does not state its cost in a form that is known here is not checked: whatever
        reads it may understand more than this.
        """
        stored = parse(hashed)
        return stored is not None and self._cap_below(stored) is None

    def obstacle(self, hashed: str) -> str | None:
        """Return why every password is wrong for a stored value; ``None`` if one may be right.

        Nothing is computed, so all rows of a table can be asked about. `scheme_of` names the format.

        Returns:
            A sentence without a full stop, which does not quote the value.
        """
        if not is_usable_hash(hashed):
            return "It is made to match no password"
        its_format = format_of(hashed)
        if its_format is None:
            return "It is no hash, or of no format that is known here"
        if its_format.refused is not None:
            return its_format.refused
        if its_format.algorithm in self._missing:
            return _NOT_INSTALLED[its_format.algorithm]
        stored = parse(hashed)
        if stored is None:
            return "It does not follow its format: perhaps it was cut off"
        cap = self._cap_below(stored)
        if cap is not None:
            return f"It costs more to check than CostCaps({cap}={self._most[cap]}) allows"
        return None

    def close(self) -> None:
        """Stop the threads once they are idle. The next call starts new ones."""
        self._pool.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(memory_cost={self.memory_cost}, time_cost={self.time_cost}, "
            f"parallelism={self.parallelism}, threads={self.threads})"
        )

    @cached_property
    def _missing(self) -> frozenset[str]:
        """The algorithms that cannot be computed here."""
        has = {
            "bcrypt": bool(importlib.util.find_spec("bcrypt")),
            "scrypt": hasattr(hashlib, "scrypt"),
        }
        return frozenset(name for name in has if not has[name])

    @property
    def _most(self) -> Mapping[str, int]:
        """The caps, or what a hash of today's settings costs where that is more."""
        caps = vars(self.caps)
        today = {
            "argon2_memory": self.memory_cost,
            "argon2_work": self.memory_cost * self.time_cost,
            "argon2_lanes": self.parallelism,
        }
        return {name: max(caps[name], today.get(name, 0)) for name in caps}

    def _cap_below(self, stored: StoredHash) -> str | None:
        """Return the first cap that a stored hash is above."""
        most = self._most
        return next((name for name, cost in stored.costs.items() if cost > most[name]), None)

    @cached_property
    def _crypt(self) -> CryptContext:
        # Two threads may build a context each; the contexts are equal, and either is kept.
        return passlib_context.CryptContext(
            schemes=[
                scheme
                for algorithm, schemes in LIBPASS_SCHEMES.items()
                if algorithm not in self._missing
                for scheme in schemes
            ],
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
        stored = parse(hashed) if hashed and self.obstacle(hashed) is None else None
        if stored is None:
            return self._waste_one_hash()
        try:
            # This parses the hash, so a corrupt one fails here, before it costs a hash.
            outdated = self._is_outdated(stored)
            valid = self._matches(nfc(password), stored)
            composed = unicodedata.is_normalized("NFC", password)
            if not valid and outdated and not composed:
                # Another program may have hashed what was typed as it came (NFD on macOS).
                valid = self._matches(password, stored)
        # The hash is corrupt, or has an unsupported parameter.
        except (ValueError, TypeError, NotImplementedError) as error:
            if _is_exhaustion(error.__context__):
                raise
            return self._waste_one_hash()
        if not valid and outdated:
            # The check cost what that other hash costs, often less than a hash of today's settings.
            return self._waste_the_rest(stored)
        return Verification(valid=valid, outdated=valid and outdated)

    def _is_outdated(self, stored: StoredHash) -> bool:
        if stored.format.algorithm == "scrypt":
            return True
        notation = stored.notation
        return bool(self._crypt.needs_update(notation)) or notation != stored.match.string

    def _matches(self, password: str, stored: StoredHash) -> bool:
        if stored.format.algorithm == "scrypt":
            return stored.matches_scrypt(password)
        notation = stored.notation
        # bcrypt 4 cuts a longer password off without a word; the rest of it would be free to choose.
        if notation.startswith("$2") and len(password.encode()) > _BCRYPT_BYTES:
            return False
        return bool(self._crypt.verify(password, notation))

    def _waste_one_hash(self) -> Verification:
        self._crypt.verify("", self._dummy_hash)
        return Verification(valid=False)

    def _waste_the_rest(self, stored: StoredHash) -> Verification:
        """Compute what a failed hash of Argon2 cost less than one of today's; else a whole one.

        The work of Argon2 is its memory times its passes. What other algorithms cost in this
        measure depends on the machine.
        """
        if stored.format.algorithm != "argon2":
            return self._waste_one_hash()
        missing = self.memory_cost * self.time_cost - stored.costs["argon2_work"]
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
