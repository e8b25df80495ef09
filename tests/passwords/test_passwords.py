"""Passwords: what a hash costs, where it is computed, and which passwords are accepted."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import argon2.low_level
import bcrypt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.accounts import PASSWORD
from tortoise_auth.exceptions import ConfigurationError, PasswordPolicyError
from tortoise_auth.passwords import (
    COMMON_PASSWORDS,
    MAX_PASSWORD_LENGTH,
    OWASP_ARGON2_FLOOR,
    PasswordHasher,
    PasswordPolicy,
    Verification,
    is_usable_hash,
    unusable_hash,
)
from tortoise_auth.passwords.formats import parse
from tortoise_auth.testing import cheap_hasher

WRONG = Verification(valid=False)
TODAY = "$argon2id$v=19$m=32,t=2,p=2$"
"""The beginning of the hashes of `TodaysHasher`."""

UNFIT: dict[str, Any] = {
    "None": None,
    "int": 1234567890123456,
    "bytes": PASSWORD.encode(),
    "list": [PASSWORD],
    "bool": True,
    "too long": "x" * (MAX_PASSWORD_LENGTH + 1),
    "NUL": "correct horse\0battery staple",
    "surrogate": "correct horse \ud800 battery staple",
}
"""Input that cannot be hashed, with the code of the rule that it breaks."""

UNFIT_CODES = {
    "too long": "too_long",
    "NUL": "nul_character",
    "surrogate": "not_unicode",
}


class TodaysHasher(PasswordHasher):
    """A cheap hasher, with settings that no other hash of these tests has."""

    cost_floor: ClassVar[tuple[()]] = ()

    def __init__(self, *, threads: int = 2) -> None:
        super().__init__(memory_cost=32, time_cost=2, parallelism=2, threads=threads)


class OtherHasher(PasswordHasher):
    """A hasher of any cost."""

    cost_floor: ClassVar[tuple[()]] = ()


def bcrypt_hash(password: bytes, prefix: bytes = b"2b") -> str:
    return bcrypt.hashpw(password, bcrypt.gensalt(4, prefix)).decode()


def pbkdf2_hash(password: str, rounds: int = 10) -> str:
    salt = b"sixteen byte salt"
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, rounds)
    parts = (
        base64.b64encode(part).decode().rstrip("=").replace("+", ".") for part in (salt, digest)
    )
    return f"$pbkdf2-sha256${rounds}${'$'.join(parts)}"


def django_hash(password: str, rounds: int = 10) -> str:
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), b"NaClNaClNaCl", rounds)
    return f"pbkdf2_sha256${rounds}$NaClNaClNaCl${base64.b64encode(digest).decode()}"


LEGACY: dict[str, Callable[[str], str]] = {
    "bcrypt": lambda password: bcrypt_hash(password.encode()),
    "bcrypt 2a": lambda password: bcrypt_hash(password.encode(), b"2a"),
    "pbkdf2_sha256": pbkdf2_hash,
    "django_pbkdf2_sha256": django_hash,
}


@pytest.fixture
def today() -> TodaysHasher:
    return TodaysHasher()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings of every Argon2 computation, in order, hashing and verifying alike."""
    settings: list[str] = []
    verify, hash_ = argon2.low_level.verify_secret, argon2.low_level.hash_secret

    def counting_verify(hashed: bytes, secret: bytes, kind: argon2.low_level.Type) -> bool:
        settings.append(hashed.decode().rpartition("$")[0].rpartition("$")[0] + "$")
        return verify(hashed, secret, kind)

    def counting_hash(*args: Any, **kwargs: Any) -> bytes:
        hashed = hash_(*args, **kwargs)
        settings.append(hashed.decode().rpartition("$")[0].rpartition("$")[0] + "$")
        return hashed

    monkeypatch.setattr(argon2.low_level, "verify_secret", counting_verify)
    monkeypatch.setattr(argon2.low_level, "hash_secret", counting_hash)
    return settings


class Workers:
    """Replaces the computation of Argon2: records its thread, and can be blocked.

    Attributes:
        idents: The thread of each computation, in order of beginning.
        peak: How many computations ran at the same time at most.
    """

    def __init__(self) -> None:
        self.idents: list[int] = []
        self.niceness: set[int] = set()
        self.running = self.peak = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()
        self._begun = threading.Semaphore(0)

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        """Compute nothing, and match."""
        with self._lock:
            self.idents.append(threading.get_ident())
            if sys.platform == "linux":
                tid = threading.get_native_id()
                self.niceness.add(os.getpriority(os.PRIO_PROCESS, tid))
            self.running += 1
            self.peak = max(self.peak, self.running)
        self._begun.release()
        assert self.go_on.wait(30)
        with self._lock:
            self.running -= 1
        return True

    async def begun(self, number: int = 1) -> None:
        """Wait until *number* further computations have begun."""
        for _ in range(number):
            assert await asyncio.to_thread(self._begun.acquire, timeout=30)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    stand_in = Workers()
    monkeypatch.setattr(argon2.low_level, "verify_secret", stand_in)
    yield stand_in
    stand_in.go_on.set()


@contextmanager
def new_threads() -> Iterator[set[threading.Thread]]:
    """Collect the hashing threads that are started in the block, and still run at its end."""
    before, started = set(threading.enumerate()), set[threading.Thread]()
    yield started
    started |= {
        thread
        for thread in set(threading.enumerate()) - before
        if thread.name.startswith("tortoise_auth_hash")
    }


class TestHash:
    async def test_default_cost(self) -> None:
        """A hash of the default settings is Argon2id with 64 MiB, 3 passes and 4 lanes."""
        hasher = PasswordHasher()
        hashed = await hasher.hash(PASSWORD)
        assert hashed.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
        assert await hasher.verify(PASSWORD, hashed) == Verification(valid=True)
        hasher.close()

    async def test_salted(self, hasher: PasswordHasher) -> None:
        """The same password twice gives two hashes, with 16 bytes of salt and 32 of digest."""
        hashes = {await hasher.hash(PASSWORD) for _ in range(20)}
        assert len(hashes) == 20
        assert all([len(part) for part in each.split("$")[-2:]] == [22, 43] for each in hashes)

    @pytest.mark.parametrize("what", UNFIT)
    async def test_unfit_input_is_refused(
        self, hasher: PasswordHasher, computed: list[str], what: str
    ) -> None:
        """Input that cannot be hashed is refused with the code of its rule, before any computation."""
        with pytest.raises(PasswordPolicyError) as refused:
            await hasher.hash(UNFIT[what])
        expected = [UNFIT_CODES.get(what, "not_a_string")]
        assert [failure.code for failure in refused.value.failures] == expected
        assert not computed

    @pytest.mark.parametrize("character", ["x", "\U0001f422", "\ufb2c", " "])
    async def test_longest_input(self, hasher: PasswordHasher, character: str) -> None:
        """1024 code points are hashed whole, whatever their size: the last one matters.

        U+FB2C grows to three code points when it is normalised.
        """
        longest = character * MAX_PASSWORD_LENGTH
        hashed = await hasher.hash(longest)
        assert (await hasher.verify(longest, hashed)).valid
        assert await hasher.verify(longest[:-1] + "y", hashed) == WRONG

    @pytest.mark.parametrize("password", ["", " ", "\n", "a", "пароль", "密码", "🐢", "\u202eabc"])
    async def test_any_text(self, hasher: PasswordHasher, password: str) -> None:
        """Any text is hashed as it is: neither trimmed nor folded."""
        hashed = await hasher.hash(password)
        assert (await hasher.verify(password, hashed)).valid
        for other in (password + " ", " " + password, password + "a", password.upper() + "A"):
            assert await hasher.verify(other, hashed) == WRONG

    @pytest.mark.parametrize(
        ("one", "other"),
        [("é", "e\u0301"), ("Å", "\u212b"), ("각", "\u1100\u1161\u11a8"), ("ṩ", "s\u0307\u0323")],
    )
    async def test_canonically_equal(self, hasher: PasswordHasher, one: str, other: str) -> None:
        """Two spellings with one NFC form are one password, whichever was set first."""
        one, other = PASSWORD + one, PASSWORD + other
        assert one != other
        assert unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
        for first, second in ((one, other), (other, one)):
            assert (await hasher.verify(second, await hasher.hash(first))).valid

    @pytest.mark.parametrize(
        ("one", "other"), [("ﬁ", "fi"), ("\uff21", "A"), ("²", "2"), ("①", "1"), ("…", "...")]
    )
    async def test_only_compatible(self, hasher: PasswordHasher, one: str, other: str) -> None:
        """Two spellings with only one NFKC form are two passwords."""
        one, other = PASSWORD + one, PASSWORD + other
        assert unicodedata.normalize("NFKC", one) == unicodedata.normalize("NFKC", other)
        for first, second in ((one, other), (other, one)):
            assert await hasher.verify(second, await hasher.hash(first)) == WRONG


class TestSettings:
    @pytest.mark.parametrize(("memory", "passes"), OWASP_ARGON2_FLOOR)
    def test_floor(self, memory: int, passes: int) -> None:
        """Each pair that OWASP names is accepted, and refused with a KiB or a pass less."""
        PasswordHasher(memory_cost=memory, time_cost=passes, parallelism=1)
        with pytest.raises(ConfigurationError, match=f"m={memory} t={passes}"):
            PasswordHasher(memory_cost=memory - 1, time_cost=passes, parallelism=1)
        with pytest.raises(ConfigurationError):
            PasswordHasher(memory_cost=memory, time_cost=passes - 1, parallelism=1)

    def test_floor_is_that_of_owasp(self) -> None:
        """The five pairs are those of the OWASP Password Storage Cheat Sheet."""
        assert set(OWASP_ARGON2_FLOOR) == {
            (46 * 1024, 1),
            (19 * 1024, 2),
            (12 * 1024, 3),
            (9 * 1024, 4),
            (7 * 1024, 5),
        }

    @pytest.mark.parametrize(
        "numbers",
        [
            {"memory_cost": 1024},
            {"memory_cost": 7167, "time_cost": 100},
            {"memory_cost": 0},
            {"time_cost": 0},
            {"time_cost": -1},
            {"parallelism": 0},
            {"threads": 0},
            {"threads": -2},
            {"memory_cost": 7168, "time_cost": 5, "parallelism": 897},
        ],
    )
    def test_nonsense(self, numbers: dict[str, Any]) -> None:
        """Costs below the floor, below one, or that Argon2 cannot use are refused when made."""
        with pytest.raises(ConfigurationError, match="PasswordHasher"):
            PasswordHasher(**numbers)

    @pytest.mark.parametrize("value", [65536.0, "65536", None, [65536]])
    @pytest.mark.parametrize("name", ["memory_cost", "time_cost", "parallelism", "threads"])
    def test_no_number(self, name: str, value: Any) -> None:
        """A setting that is no whole number is refused when it is given, and named."""
        if (name, value) == ("threads", None):
            return  # which asks for the default
        with pytest.raises(TypeError, match=f"PasswordHasher: {name} must be a whole number"):
            PasswordHasher(**{name: value})

    def test_threads_by_default(self) -> None:
        """By default there are as many threads as cores."""
        assert PasswordHasher().threads == os.cpu_count()
        assert PasswordHasher(threads=7).threads == 7

    def test_repr(self, today: TodaysHasher) -> None:
        """The representation shows the settings and nothing else."""
        assert repr(today) == (
            "TodaysHasher(memory_cost=32, time_cost=2, parallelism=2, threads=2)"
        )
        assert str(today) == repr(today)


class TestVerify:
    @pytest.mark.parametrize("scheme", LEGACY)
    async def test_legacy_hashes(self, hasher: PasswordHasher, scheme: str) -> None:
        """Hashes of other schemes are verified, and reported as outdated when they are right."""
        hashed = LEGACY[scheme](PASSWORD)
        right = Verification(valid=True, outdated=True)
        assert await hasher.verify(PASSWORD, hashed) == right
        assert await hasher.verify(PASSWORD + "x", hashed) == WRONG

    @pytest.mark.parametrize("scheme", LEGACY)
    async def test_replaced_by_argon2(self, hasher: PasswordHasher, scheme: str) -> None:
        """The replacement of an outdated hash is Argon2id, and is not outdated."""
        assert (await hasher.verify(PASSWORD, LEGACY[scheme](PASSWORD))).outdated
        replacement = await hasher.hash(PASSWORD)
        assert replacement.startswith("$argon2id$")
        assert await hasher.verify(PASSWORD, replacement) == Verification(valid=True)

    def test_pbkdf2_rounds(self, hasher: PasswordHasher) -> None:
        """If PBKDF2 were ever used for hashing, it would be with 600 000 rounds."""
        assert hasher._crypt.handler("pbkdf2_sha256").default_rounds == 600_000
        assert hasher._crypt.default_scheme() == "argon2"

    @pytest.mark.parametrize(
        "numbers",
        [
            {"memory_cost": 24, "time_cost": 2, "parallelism": 2},
            {"memory_cost": 32, "time_cost": 1, "parallelism": 2},
            {"memory_cost": 32, "time_cost": 2, "parallelism": 1},
            {"memory_cost": 64, "time_cost": 2, "parallelism": 2},
            {"memory_cost": 32, "time_cost": 3, "parallelism": 2},
        ],
    )
    async def test_other_costs(self, today: TodaysHasher, numbers: dict[str, Any]) -> None:
        """A right hash with any other memory, passes or lanes than today's is outdated."""
        hashed = await OtherHasher(**numbers).hash(PASSWORD)
        assert await today.verify(PASSWORD, hashed) == Verification(valid=True, outdated=True)
        assert await today.verify(PASSWORD + "x", hashed) == WRONG

    async def test_argon2i(self, today: TodaysHasher) -> None:
        """Argon2i of the same cost is outdated: it resists graphics cards less."""
        hashed = argon2.low_level.hash_secret(
            PASSWORD.encode(), b"salt" * 4, 2, 32, 2, 32, argon2.low_level.Type.I
        )
        verification = await today.verify(PASSWORD, hashed.decode())
        assert verification == Verification(valid=True, outdated=True)

    @pytest.mark.parametrize("known", [*LEGACY, "argon2"])
    async def test_knows(self, hasher: PasswordHasher, known: str) -> None:
        """A hash is known by its beginning, the same as to passlib, which is not loaded for it."""
        hashed = await hasher.hash(PASSWORD) if known == "argon2" else LEGACY[known](PASSWORD)
        assert hasher.knows(hashed)
        stored = parse(hashed)
        assert stored is not None
        assert hasher._crypt.identify(stored.notation) is not None

    @pytest.mark.parametrize("unknown", ["", "!", PASSWORD, "$argon2$", "$9$abc$def", "$2", "$1$"])
    def test_does_not_know(self, hasher: PasswordHasher, unknown: str) -> None:
        """A hash of no supported scheme is not known."""
        assert not hasher.knows(unknown)
        assert hasher._crypt.identify(unknown) is None

    @pytest.mark.parametrize("size", [72, 73, 1024, 4096])
    async def test_bcrypt_knows_72_bytes(self, hasher: PasswordHasher, size: int) -> None:
        """A password of more than 72 bytes is refused for a bcrypt hash, though its prefix matches."""
        hashed = bcrypt_hash(b"a" * 72)
        expected = Verification(valid=True, outdated=True) if size == 72 else WRONG
        assert await hasher.verify("a" * size, hashed) == expected
        assert await hasher.verify("\U0001f422" * 19, hashed) == WRONG  # 76 bytes

    async def test_nothing_matches_the_dummy(self, today: TodaysHasher) -> None:
        """The hash for unknown accounts exists from the start, and no password matches it."""
        dummy = today._dummy_hash
        assert dummy.startswith(TODAY)
        for guess in ("", "x", PASSWORD, dummy, dummy.rpartition("$")[2]):
            assert await today.verify(guess, dummy) == WRONG
            assert await today.verify(guess, None) == WRONG
        assert TodaysHasher()._dummy_hash != dummy

    def test_unusable_hashes(self) -> None:
        """An unusable hash is different each time, and an empty one is unusable."""
        assert len({unusable_hash() for _ in range(100)}) == 100
        assert not is_usable_hash(unusable_hash())
        assert not is_usable_hash("")
        assert not is_usable_hash(None)
        assert is_usable_hash(TODAY)


CORRUPT = {
    "plain text": PASSWORD,
    "unknown scheme": "$9$abc$def",
    "only a prefix": "$argon2id$",
    "no digest": "$argon2id$v=19$m=32,t=2,p=2$c2l4dGVlbiBieXRlcyE",
    "cut off": TODAY + "c2l4dGVlbiBieXRlcyE$QUJD",
    "bad base64": TODAY + "c2l4dGVlbiBieXRlcyE$" + "*" * 43,
    "not ASCII": TODAY + "c2l4dGVlbiBieXRlcyE$" + "é" * 43,
    "surrogate": TODAY + "\ud800",
    "NUL": TODAY + "c2l4dGVlbiBieXRlcyE$\0" + "a" * 42,
    "space after": TODAY + "c2l4dGVlbiBieXRlcyE$" + "A" * 43 + " ",
    "future version": "$argon2id$v=99$m=32,t=2,p=2$c2l4dGVlbiBieXRlcyE$" + "A" * 43,
    "unknown variant": "$argon2x$v=19$m=32,t=2,p=2$c2l4dGVlbiBieXRlcyE$" + "A" * 43,
    "keyid": "$argon2id$v=19$m=32,t=2,p=2,keyid=aGk$c2l4dGVlbiBieXRlcyE$" + "A" * 43,
    "data": "$argon2id$v=19$m=32,t=2,p=2,data=aGk$c2l4dGVlbiBieXRlcyE$" + "A" * 43,
    "absurd memory": f"$argon2id$v=19$m={10**30},t=2,p=2$c2l4dGVlbiBieXRlcyE$" + "A" * 43,
    "no lanes": "$argon2id$v=19$m=32,t=2,p=0$c2l4dGVlbiBieXRlcyE$" + "A" * 43,
    "short salt": "$argon2id$v=19$m=32,t=2,p=2$YWI$" + "A" * 43,
    "bcrypt prefix": "$2b$",
    "bcrypt cost": "$2b$99$" + "." * 53,
    "bcrypt cut off": bcrypt_hash(b"x")[:-5],
    "pbkdf2 rounds": "$pbkdf2-sha256$0$c2FsdA$" + "A" * 43,
    "pbkdf2 digest": "$pbkdf2-sha256$10$c2FsdA$x",
    "django rounds": "pbkdf2_sha256$-1$salt$" + "A" * 43 + "=",
    "django parts": "pbkdf2_sha256$$$",
    "very long": "$argon2id$" + "x" * 100_000,
}


class TestCostOfFailure:
    """A failure costs one computation with the current settings, whatever the reason."""

    @pytest.mark.parametrize(
        "hashed", [None, "", "!", "!abc", pytest.param(unusable_hash(), id="unusable")]
    )
    async def test_no_hash(
        self, today: TodaysHasher, computed: list[str], hashed: str | None
    ) -> None:
        """No account and no usable password cost what a wrong password does."""
        for password in (PASSWORD, ""):
            assert await today.verify(password, hashed) == WRONG
        assert computed == [TODAY, TODAY]

    async def test_wrong_password(self, today: TodaysHasher, computed: list[str]) -> None:
        """A wrong password costs the check of the stored hash and nothing more."""
        hashed = await today.hash(PASSWORD)
        computed.clear()
        for password in (PASSWORD[:-1], PASSWORD.upper(), PASSWORD + " ", ""):
            assert await today.verify(password, hashed) == WRONG
        assert computed == [TODAY] * 4

    async def test_right_password(self, today: TodaysHasher, computed: list[str]) -> None:
        """The right password costs the same."""
        hashed = await today.hash(PASSWORD)
        computed.clear()
        assert await today.verify(PASSWORD, hashed) == Verification(valid=True)
        assert computed == [TODAY]

    @pytest.mark.parametrize("what", CORRUPT)
    async def test_corrupt_hash(
        self, today: TodaysHasher, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """A stored value that is no hash is a wrong password, and costs one computation."""
        finished: list[bytes] = []
        verify = argon2.low_level.verify_secret

        def finishing(hashed: bytes, secret: bytes, kind: argon2.low_level.Type) -> bool:
            try:
                return verify(hashed, secret, kind)
            except argon2.exceptions.VerifyMismatchError:
                finished.append(hashed)  # computed, in contrast to a hash that cannot be read
                raise

        monkeypatch.setattr(argon2.low_level, "verify_secret", finishing)
        assert await today.verify(PASSWORD, CORRUPT[what]) == WRONG
        assert [hashed.startswith(TODAY.encode()) for hashed in finished] == [True]

    @pytest.mark.parametrize("scheme", LEGACY)
    async def test_legacy_hash(self, today: TodaysHasher, computed: list[str], scheme: str) -> None:
        """A wrong password for a hash of another scheme costs one current computation in addition."""
        assert await today.verify("wrong", LEGACY[scheme](PASSWORD)) == WRONG
        assert computed == [TODAY]

    async def test_hash_of_yesterday(self, today: TodaysHasher, computed: list[str]) -> None:
        """A wrong password for a cheaper Argon2 hash costs one of today's in all."""
        hashed = await cheap_hasher().hash(PASSWORD)
        computed.clear()
        assert await today.verify("wrong", hashed) == WRONG
        assert computed == ["$argon2id$v=19$m=8,t=1,p=1$", "$argon2id$v=19$m=28,t=2,p=2$"]

    async def test_over_72_bytes_for_bcrypt(self, today: TodaysHasher, computed: list[str]) -> None:
        """A password that bcrypt refuses costs one hash, too."""
        assert await today.verify("a" * 73, bcrypt_hash(b"a" * 72)) == WRONG
        assert computed == [TODAY]

    async def test_bcrypt_that_is_not_installed(
        self, monkeypatch: pytest.MonkeyPatch, computed: list[str]
    ) -> None:
        """Without bcrypt its hashes match nothing, at the usual cost, and all others still match."""
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "bcrypt" else find(name)
        )
        without = TodaysHasher()
        assert await without.verify(PASSWORD, LEGACY["bcrypt"](PASSWORD)) == WRONG
        assert not without.knows(LEGACY["bcrypt"](PASSWORD))
        assert computed == [TODAY]
        assert (await without.verify(PASSWORD, LEGACY["pbkdf2_sha256"](PASSWORD))).valid

    @pytest.mark.parametrize("what", UNFIT)
    async def test_unfit_input(self, today: TodaysHasher, computed: list[str], what: str) -> None:
        """Input that cannot be hashed is a wrong password, with and without an account."""
        stored = [await today.hash(PASSWORD), LEGACY["bcrypt"](PASSWORD), "", None, "corrupt"]
        computed.clear()
        for hashed in stored:
            assert await today.verify(UNFIT[what], hashed) == WRONG
        assert computed == [TODAY] * len(stored)

    @given(password=st.text() | st.binary() | st.none(), hashed=st.text() | st.none())
    @example(password="x", hashed="pbkdf2_sha256$1$")
    @settings(max_examples=150, deadline=None)
    def test_anything(self, password: Any, hashed: str | None) -> None:
        """Any text as password and any text as hash is a mismatch, and raises nothing."""
        assert asyncio.run(FUZZED.verify(password, hashed)) == WRONG

    @pytest.mark.filterwarnings("ignore::passlib.exc.PasslibHashWarning")  # odd padding of bcrypt
    @pytest.mark.parametrize(
        "scheme", ["argon2", "bcrypt", "pbkdf2_sha256", "django_pbkdf2_sha256"]
    )
    @given(data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_damaged_hash(self, scheme: str, data: st.DataObject) -> None:
        """A hash with any character changed, put in or left out raises nothing."""
        hashed = DAMAGEABLE[scheme]
        at = data.draw(st.integers(0, len(hashed) - 1))
        replaced = data.draw(st.integers(0, 1))
        # No digits: a hash may ask for a cost of years, which no check refuses and no test awaits.
        put_in = data.draw(st.text(st.characters(exclude_categories=["Nd"]), max_size=2))
        damaged = hashed[:at] + put_in + hashed[at + replaced :]
        if damaged != hashed:
            verification = asyncio.run(FUZZED.verify("wrong", damaged))
            assert verification == WRONG


FUZZED = cheap_hasher()
DAMAGEABLE = {
    "argon2": argon2.low_level.hash_secret(
        PASSWORD.encode(), b"salt" * 4, 1, 8, 1, 32, argon2.low_level.Type.ID
    ).decode(),
    **{scheme: make(PASSWORD) for scheme, make in LEGACY.items()},
}


class TestThreads:
    async def test_bounded(self, workers: Workers) -> None:
        """However many callers wait, only as many hashes are computed at a time as there are threads."""
        hasher = cheap_hasher(threads=3)
        workers.go_on.clear()
        with new_threads() as threads:
            waiting = [asyncio.create_task(hasher.verify(PASSWORD, None)) for _ in range(20)]
            await workers.begun(3)
        assert workers.running == 3
        assert len(threads) == 3
        workers.go_on.set()
        await asyncio.gather(*waiting)
        assert workers.peak == 3
        assert len(workers.idents) == 20
        assert set(workers.idents) == {thread.ident for thread in threads}
        hasher.close()

    async def test_off_the_event_loop(self, workers: Workers) -> None:
        """Nothing is computed on the thread of the event loop, which stays free meanwhile."""
        hasher = cheap_hasher(threads=1)
        workers.go_on.clear()
        for password in (PASSWORD, None, b"x", "x" * 2000):
            task = asyncio.create_task(hasher.verify(password, None))  # type: ignore[arg-type]
            await workers.begun()  # which only a free event loop can find out
            assert not task.done()
            workers.go_on.set()
            await task
            workers.go_on.clear()
        assert len(workers.idents) == 4
        assert threading.get_ident() not in workers.idents
        hasher.close()

    async def test_hash_off_the_event_loop(
        self, workers: Workers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hashing a new password happens on the same threads."""
        real = argon2.low_level.hash_secret

        def hash_secret(*args: Any, **kwargs: Any) -> bytes:
            workers()
            return real(*args, **kwargs)

        monkeypatch.setattr(argon2.low_level, "hash_secret", hash_secret)
        hasher = cheap_hasher(threads=1)
        await hasher.hash(PASSWORD)
        await hasher.verify(PASSWORD, None)
        assert len(set(workers.idents)) == 1
        assert threading.get_ident() not in workers.idents
        hasher.close()

    async def test_cancelled_in_the_queue(self, workers: Workers) -> None:
        """No hash is computed for a caller that is cancelled while it waits, and others go on."""
        hasher = cheap_hasher(threads=1)
        workers.go_on.clear()
        first, second, third = (
            asyncio.create_task(hasher.verify(PASSWORD, None)) for _ in range(3)
        )
        await workers.begun()
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        workers.go_on.set()
        assert [await first, await third] == [WRONG, WRONG]
        assert len(workers.idents) == 2
        hasher.close()

    async def test_cancelled_while_computing(self, workers: Workers) -> None:
        """A caller that is cancelled during the computation does not wait for it; the thread goes on."""
        hasher = cheap_hasher(threads=1)
        workers.go_on.clear()
        task = asyncio.create_task(hasher.verify(PASSWORD, None))
        await workers.begun()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert workers.running == 1
        workers.go_on.set()
        assert await hasher.verify(PASSWORD, None) == WRONG
        assert len(set(workers.idents)) == 1
        hasher.close()

    async def test_close(self, workers: Workers) -> None:
        """`close()` ends the threads, may be called at any time, and the next call has new ones."""
        hasher = cheap_hasher(threads=2)
        hasher.close()
        with new_threads() as first:
            assert await hasher.verify(PASSWORD, None) == WRONG
        hasher.close()
        hasher.close()
        for thread in first:
            thread.join(30)
        with new_threads() as second:
            assert await hasher.verify(PASSWORD, None) == WRONG
        assert [len(first), len(second)] == [1, 1]
        assert not any(thread.is_alive() for thread in first)
        hasher.close()

    async def test_close_while_computing(self, workers: Workers) -> None:
        """A hash that was requested before `close()` is still computed."""
        hasher = cheap_hasher(threads=1)
        workers.go_on.clear()
        tasks = [asyncio.create_task(hasher.verify(PASSWORD, None)) for _ in range(2)]
        await workers.begun()
        hasher.close()
        workers.go_on.set()
        assert await asyncio.gather(*tasks) == [WRONG, WRONG]

    @pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
    async def test_niceness(self, workers: Workers) -> None:
        """On Linux a hashing thread has a niceness of 10 more, and the main thread is unchanged."""
        before = os.getpriority(os.PRIO_PROCESS, 0)
        hasher = cheap_hasher(threads=2)
        await asyncio.gather(*(hasher.verify(PASSWORD, None) for _ in range(4)))
        assert workers.niceness == {min(before + 10, 19)}
        assert os.getpriority(os.PRIO_PROCESS, 0) == before
        hasher.close()

    async def test_no_niceness_elsewhere(
        self, workers: Workers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the priority belongs to the whole process it is not changed."""
        lowered: list[int] = []
        monkeypatch.setattr(os, "nice", lowered.append)
        monkeypatch.setattr(sys, "platform", "darwin")
        hasher = cheap_hasher()
        await hasher.verify(PASSWORD, None)
        hasher.close()
        assert lowered == []

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
    def test_fork(self) -> None:
        """After a fork, parent and child both verify, each on threads of its own."""
        script = (
            "import asyncio, os, signal\n"
            "from tortoise_auth.testing import cheap_hasher\n"
            "hasher = cheap_hasher()\n"
            "hashed = asyncio.run(hasher.hash('correct horse'))\n"
            "child = os.fork()\n"
            "signal.alarm(60)\n"  # hanging is failing
            "right = asyncio.run(hasher.verify('correct horse', hashed))\n"
            "wrong = asyncio.run(hasher.verify('wrong', hashed))\n"
            "answer = 0 if (right.valid, wrong.valid) == (True, False) else 7\n"
            "if not child:\n"
            "    os._exit(answer)\n"
            "_, status = os.waitpid(child, 0)\n"
            "print('parent', answer, 'child', os.waitstatus_to_exitcode(status))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
        )
        assert done.stdout == "parent 0 child 0\n", done.stderr


def codes(policy: PasswordPolicy, password: Any, about: Sequence[str] = ()) -> list[str]:
    """Return the codes of the rules that *password* breaks."""
    return [failure.code for failure in policy.failures(password, about=about)]


class TestPolicyLength:
    @pytest.mark.parametrize("unit", ["q", "é", "e\u0301", "\U0001f422", "密", "\ufb2c"])
    def test_code_points(self, unit: str) -> None:
        """Fifteen characters are enough and fourteen are not, however many bytes they take."""
        per_character = len(unicodedata.normalize("NFC", unit))
        policy = PasswordPolicy(min_length=15 * per_character)
        assert codes(policy, unit * 15) == []
        assert codes(policy, unit * 14) == ["too_short"]

    def test_default(self) -> None:
        """The default is 15, of any kind of character, at most 1024."""
        policy = PasswordPolicy()
        assert (policy.min_length, policy.max_length) == (15, 1024)
        assert codes(policy, "") == ["too_short"]

    def test_decomposed(self) -> None:
        """The length counts after normalisation."""
        assert codes(PasswordPolicy(), "e\u0301" * 14) == ["too_short"]
        assert codes(PasswordPolicy(), "e\u0301" * 15) == []

    def test_least_allowed_minimum(self) -> None:
        """A minimum of 8 can be chosen, and no lower one."""
        assert codes(PasswordPolicy(min_length=8), "zx8 kw2q") == []
        assert codes(PasswordPolicy(min_length=8), "zx8 kw2") == ["too_short"]
        for length in (7, 1, 0, -1):
            with pytest.raises(ConfigurationError, match="at least 8"):
                PasswordPolicy(min_length=length)

    @pytest.mark.parametrize(
        "lengths",
        [
            {"max_length": 63},
            {"max_length": 0},
            {"max_length": 1025},
            {"max_length": 64, "min_length": 65},
        ],
    )
    def test_bounds_of_the_maximum(self, lengths: dict[str, int]) -> None:
        """A maximum below 64, below the minimum or above 1024 is refused when it is set."""
        with pytest.raises(ConfigurationError, match="max_length"):
            PasswordPolicy(**lengths)  # type: ignore[arg-type]

    @pytest.mark.parametrize("most", [64, 128, 1024])
    def test_maximum(self, most: int) -> None:
        """As many characters as the maximum are accepted, one more is refused."""
        policy = PasswordPolicy(max_length=most)
        assert codes(policy, "q7 " * 400) == ["too_long"]
        assert codes(policy, ("q7 " * 400)[:most]) == []
        assert codes(policy, ("q7 " * 400)[: most + 1]) == ["too_long"]


class TestPolicyWords:
    @pytest.mark.parametrize(
        "password",
        [
            "839201746582910",
            "wjxqpzkvmwhtrcd",
            "WJXQPZKVMWHTRCD",
            "正确的马电池订书钉正确的马电池钉",
            "               ",
            "!!!???...,,,;;;",
            "é" * 15,
            "🐢" * 15,
        ],
    )
    def test_no_composition_rules(self, password: str) -> None:
        """Digits alone, letters alone, any script, spaces, one character: length is what counts."""
        assert codes(PasswordPolicy(), password) == []

    @pytest.mark.parametrize(
        "password",
        [
            "qwertyuiop12345",
            "1qaz2wsx3edc4rfv",
            "1QAZ2wsx3EDC4rfv",
            "123456789012345",
            "abcdefghijklmnop",
            "aaaaaaaaaaaaaaa",
            "bestfriendsforever",
        ],
    )
    def test_common(self, password: str) -> None:
        """The most common passwords are rejected in any case."""
        assert password.lower() in COMMON_PASSWORDS
        assert codes(PasswordPolicy(), password) == ["common"]

    def test_enough_are_known(self) -> None:
        """ASVS 6.2.4: at least 3000 that are long enough for the policy, and all as it compares them."""
        long_enough = {
            word for word in COMMON_PASSWORDS if len(word) >= PasswordPolicy().min_length
        }
        assert len(long_enough) >= 3000
        assert all(codes(PasswordPolicy(), word) == ["common"] for word in long_enough)
        assert "" not in COMMON_PASSWORDS

    def test_common_passwords_are_a_set(self) -> None:
        """The list that is read on first use behaves like a set, and its `repr` shows no word."""
        words = frozenset(COMMON_PASSWORDS)
        assert len(COMMON_PASSWORDS) == len(words) > 33_000
        assert words == set(COMMON_PASSWORDS)
        assert (words - {"dragon"} < COMMON_PASSWORDS <= words) and "dragon" in COMMON_PASSWORDS
        assert hash(words) == hash(COMMON_PASSWORDS)
        assert COMMON_PASSWORDS | {"tortoise sanctuary"} == words | {"tortoise sanctuary"}
        assert isinstance(COMMON_PASSWORDS & words, frozenset)
        assert repr(COMMON_PASSWORDS) == "COMMON_PASSWORDS"

    def test_common_passwords_are_not_copied(self) -> None:
        """A copy of a policy, here or in another process, reads no list of its own."""
        policy = PasswordPolicy(min_length=20)
        for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
            assert copied == policy
            assert copied.blocklist is COMMON_PASSWORDS
        assert len(pickle.dumps(policy)) < 1000

    @pytest.mark.parametrize("blocklist", [COMMON_PASSWORDS, {"dragon"}])
    async def test_awaited(self, blocklist: Collection[str]) -> None:
        """`acheck` refuses what `check` refuses, whether the lists have been read or not."""
        policy = PasswordPolicy(blocklist=blocklist)
        for _ in range(2):
            with pytest.raises(PasswordPolicyError) as refused:
                await policy.acheck("dragon", about=["dragon@example.com"])
            codes = [failure.code for failure in refused.value.failures]
            assert codes == ["too_short", "common", "context"]
            await policy.acheck(PASSWORD)

    def test_repr_lists_none(self) -> None:
        """A policy in a traceback or a log is one line."""
        assert len(repr(PasswordPolicy(blocklist={"tortoise sanctuary"}))) < 100

    def test_whole_and_not_part(self) -> None:
        """A common password within a longer one is accepted."""
        policy = PasswordPolicy(blocklist={"tortoise sanctuary"})
        assert codes(policy, "tortoise sanctuary") == ["common"]
        assert codes(policy, "Tortoise Sanctuary") == ["common"]
        assert codes(policy, "tortoise sanctuary 7") == []
        assert codes(policy, "the tortoise sanctuary") == []
        assert codes(PasswordPolicy(), "password is what this is not") == []

    @pytest.mark.parametrize("password", ["passwordpassword", "dragonDRAGONdragon", "qwerty" * 20])
    def test_repeated(self, password: str) -> None:
        """A common password that is repeated is rejected."""
        assert codes(PasswordPolicy(), password) == ["common"]

    def test_repeated_in_part(self) -> None:
        """Only whole repetitions count."""
        assert codes(PasswordPolicy(), "passwordpasswordpass") == []

    @pytest.mark.parametrize(
        "password",
        [
            "ada.lovelace@example.com",
            "Ada.Lovelace@Example.COM",
            "ada.lovelace1843",
            "1843-ada-lovelace",
            "lovelaceadalovelaceada.lovelace",
            "Tortoise2026Tortoise!",
            "tortoise adalovelace",
            "Café-Zürich-12345",
            "Cafe\u0301 Zu\u0308rich 12345",
        ],
    )
    def test_context(self, password: str) -> None:
        """Names of the service and the user alone make no password, whatever separates them."""
        policy = PasswordPolicy(context_words=("Tortoise", "Cafe\u0301 Zürich", "Lovelace"))
        assert codes(policy, password, ["ada.lovelace@example.com"]) == ["context"]

    @pytest.mark.parametrize(
        "password",
        [
            "my tortoise ate ada lovelace",
            "tortoise and hare",
            "xada.lovelace@example.com",
            "adalovelac adalovelac",
        ],
    )
    def test_context_in_part(self, password: str) -> None:
        """A passphrase may contain such names among other words."""
        policy = PasswordPolicy(context_words=("Tortoise",))
        assert codes(policy, password, ["ada.lovelace@example.com"]) == []

    def test_short_context_words(self) -> None:
        """Words of up to three letters count only as the whole password, not as its parts."""
        policy = PasswordPolicy(context_words=("ACM", "8302-4719-5561-0937", ""))
        assert codes(policy, "acm8302acm4719acm", ["al@example.com"]) == []
        assert codes(policy, "8302-4719-5561-0937x") == []
        assert codes(policy, "8302-4719-5561-0937") == ["context"]
        assert codes(PasswordPolicy(context_words=("ACME",)), "acme8302acme4719") == ["context"]

    @pytest.mark.parametrize("last", ["b", "a", "é"])
    def test_words_that_overlap(self, last: str) -> None:
        """Many ways to take a password apart are not tried one by one."""
        words = ["a" * size for size in range(4, 24)]
        compared = 0

        def count(frame: object, event: str, function: object) -> None:
            nonlocal compared
            compared += event == "c_call" and getattr(function, "__name__", "") == "startswith"

        sys.setprofile(count)
        try:
            broken = codes(PasswordPolicy(context_words=words), "a" * 1023 + last)
        finally:
            sys.setprofile(None)
        assert broken == (["context"] if last == "a" else [])
        assert 0 < compared <= 1024 * len(words)


class TestPolicyFailures:
    @pytest.mark.parametrize("what", UNFIT)
    def test_unfit(self, what: str) -> None:
        """Input that cannot be hashed is rejected for that reason alone."""
        assert codes(PasswordPolicy(), UNFIT[what]) == [UNFIT_CODES.get(what, "not_a_string")]

    def test_all_at_once(self) -> None:
        """Every broken rule is reported, in a fixed order, each with a sentence."""
        with pytest.raises(PasswordPolicyError) as refused:
            PasswordPolicy().check("dragon", about=["dragon@example.com"])
        failures = refused.value.failures
        assert [failure.code for failure in failures] == ["too_short", "common", "context"]
        assert str(refused.value) == " ".join(failure.message for failure in failures)
        assert all(failure.message.startswith("The password ") for failure in failures)

    def test_the_password_is_not_repeated(self) -> None:
        """No message contains the password or the words about its owner."""
        with pytest.raises(PasswordPolicyError) as refused:
            PasswordPolicy().check("rumpelstilz", about=["rumpelstilz@example.com"])
        assert "rumpelstilz" not in str(refused.value) + repr(refused.value)

    def test_accepted(self) -> None:
        """A password that breaks no rule is accepted without a failure."""
        PasswordPolicy().check(PASSWORD, about=["ada@example.com"])

    def test_at_login_nothing_is_asked(self) -> None:
        """The hasher applies no policy: an old short password still matches."""

        async def log_in() -> Verification:
            hasher = cheap_hasher()
            return await hasher.verify("abc", await hasher.hash("abc"))

        assert asyncio.run(log_in()) == Verification(valid=True)
