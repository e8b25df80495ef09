"""What is stored does not decide how much work a check is."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import secrets
import time
import unicodedata
from typing import Any, Literal

import argon2.low_level
import bcrypt
import pytest
from passlib.hash import django_pbkdf2_sha256, pbkdf2_sha256
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tests.support.database import connection_of
from tests.support.hashing import argon2_costs, full_cost
from tortoise_auth import AuthConfig, AuthenticationError, AuthService, PasswordHasher
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.passwords import CostCaps, Verification
from tortoise_auth.testing import FakeClock, cheap_hasher

WRONG = Verification(valid=False)
TAIL = "$c29tZXNhbHRzb21lc2FsdA$" + "A" * 43
DEAR = {
    "bcrypt rounds": "$2b$31$" + "." * 53,
    "argon2 passes": "$argon2id$v=19$m=65536,t=4000000,p=1" + TAIL,
    "argon2 memory": "$argon2id$v=19$m=4194304000,t=1,p=1" + TAIL,
    "argon2 lanes": "$argon2id$v=19$m=1048576,t=1,p=16384" + TAIL,
    "argon2 without version": "$argon2i$m=65536,t=4000000,p=1" + TAIL,
    "argon2 with data": "$argon2id$v=19$m=65536,t=4000000,p=1,data=YWJj" + TAIL,
    "argon2 of 11 digits": "$argon2id$v=19$m=65536,t=40000000000,p=1" + TAIL,
    "argon2 in other digits": "$argon2id$v=19$m=65536,t=\u0664000000,p=1" + TAIL,
    "argon2 in another order": "$argon2id$v=19$t=4000000,m=65536,p=1" + TAIL,
    "pbkdf2 of 14 digits": "$pbkdf2-sha256$10000000000000" + TAIL,
    "pbkdf2": "$pbkdf2-sha256$1000000000" + TAIL,
    "pbkdf2 of Django": "pbkdf2_sha256$1000000000$abcdefgh$" + "A" * 43 + "=",
    "pbkdf2 of Django, SHA-1": "pbkdf2_sha1$1000000000$abcdefgh$" + "A" * 27 + "=",
    "pbkdf2 of Werkzeug": "pbkdf2:sha512:1000000000$abcdefgh$" + "0" * 128,
    "pbkdf2 of passlib": "$pbkdf2-sha512$1000000000$c29tZXNhbHQ$" + "A" * 86,
    "argon2 of Django": "argon2$argon2id$v=19$m=65536,t=4000000,p=1" + TAIL,
    "bcrypt of Django": "bcrypt$$2b$31$" + "." * 53,
    "bcrypt-SHA256 of Django": "bcrypt_sha256$$2b$31$" + "." * 53,
    "bcrypt-SHA256 of passlib": f"$bcrypt-sha256$v=2,t=2b,r=31${'.' * 22}${'.' * 31}",
    "bcrypt-SHA256 of old passlib": f"$bcrypt-sha256$2a,31${'.' * 22}${'.' * 31}",
    "scrypt memory": "scrypt:16777216:8:1$abcdefgh$" + "0" * 128,
    "scrypt memory by block": "scrypt:2:67108864:1$abcdefgh$" + "0" * 128,
    "scrypt memory by lanes": "scrypt:2:1:16777216$abcdefgh$" + "0" * 128,
    "scrypt work": "scrypt:16384:8:1000$abcdefgh$" + "0" * 128,
    "scrypt of 11 digits": "scrypt:34359738368:8:1$abcdefgh$" + "0" * 128,
    "scrypt of Django": "scrypt$16384$abcdefgh$8$100000$" + "A" * 86 + "==",
    "scrypt of passlib": "$scrypt$ln=31,r=8,p=1$c29tZXNhbHQ$" + "A" * 43,
    "scrypt of passlib, greatest": "$scrypt$ln=99,r=9999999999,p=9999999999$c2FsdA$" + "A" * 43,
}
LIMIT = 5
"""Seconds after which a check that should cost nothing is a failure."""


class TestCaps:
    @pytest.mark.parametrize("hashed", DEAR.values(), ids=DEAR.keys())
    async def test_above(self, hashed: str) -> None:
        """A hash above a cap is rejected at the cost of one of today's, computed only once."""
        hasher = cheap_hasher()
        with argon2_costs() as costs:
            async with asyncio.timeout(LIMIT):
                assert await hasher.verify(PASSWORD, hashed) == WRONG
        assert costs == [full_cost(hasher)]
        assert hasher.knows(hashed)
        assert not hasher.affords(hashed)

    @pytest.mark.parametrize(
        ("hashed", "caps"),
        [
            ("$2b$05$" + "." * 53, CostCaps(bcrypt_rounds=4)),
            ("$argon2id$v=19$m=64,t=2,p=1" + TAIL, CostCaps(argon2_memory=63)),
            ("$argon2id$v=19$m=64,t=2,p=1" + TAIL, CostCaps(argon2_work=127)),
            ("$argon2id$v=19$m=64,t=2,p=2" + TAIL, CostCaps(argon2_lanes=1)),
            ("$pbkdf2-sha256$1000" + TAIL, CostCaps(pbkdf2_iterations=999)),
            ("scrypt:64:8:2$salt$" + "0" * 128, CostCaps(scrypt_memory=67)),
            ("scrypt:64:8:2$salt$" + "0" * 128, CostCaps(scrypt_work=1023)),
        ],
        ids=["bcrypt", "memory", "work", "lanes", "pbkdf2", "scrypt memory", "scrypt work"],
    )
    def test_settable(self, hashed: str, caps: CostCaps) -> None:
        """Each cap can be lowered; at the cap a hash is checked."""
        hasher = type(cheap_hasher())(memory_cost=8, time_cost=1, parallelism=1, caps=caps)
        assert not hasher.affords(hashed)
        assert cheap_hasher().affords(hashed)
        at = CostCaps(
            bcrypt_rounds=5,
            argon2_memory=64,
            argon2_work=128,
            argon2_lanes=2,
            pbkdf2_iterations=1000,
            scrypt_memory=68,
            scrypt_work=1024,
        )
        assert type(hasher)(memory_cost=8, time_cost=1, parallelism=1, caps=at).affords(hashed)

    def test_own_settings(self) -> None:
        """Hashes of the hasher's own settings are checked, whatever the caps are."""
        caps = CostCaps(argon2_memory=1, argon2_work=1)
        hasher = PasswordHasher(caps=caps)
        assert hasher.affords("$argon2id$v=19$m=65536,t=3,p=4" + TAIL)
        assert not hasher.affords("$argon2id$v=19$m=65537,t=3,p=4" + TAIL)

    @pytest.mark.parametrize("cap", [0, -1, 1.5, None, "16", True])
    def test_nonsense(self, cap: Any) -> None:
        """A cap that is no whole number of at least 1 is rejected when made."""
        with pytest.raises(ConfigurationError, match="CostCaps"):
            CostCaps(bcrypt_rounds=cap)

    def test_most_memory_of_scrypt(self) -> None:
        """A cap above what Python computes is rejected when made, not found out at a login."""
        assert CostCaps(scrypt_memory=(1 << 21) - 1)
        with pytest.raises(ConfigurationError, match="scrypt_memory"):
            CostCaps(scrypt_memory=1 << 21)

    async def test_login(
        self,
        db: TortoiseContext,
        clock: FakeClock,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The login is a wrong password like any other, and a warning names the account alone."""
        user = await User.create_user(email=EMAIL, password=PASSWORD)
        auth = AuthService(User, AuthConfig(secret=SECRET), throttle=None, clock=clock)
        for hashed in DEAR.values():
            sql = f"UPDATE app_user SET password = '{hashed}'"
            await connection_of(db).execute_query(sql)
            caplog.clear()
            with caplog.at_level(logging.WARNING), pytest.raises(AuthenticationError):
                async with asyncio.timeout(LIMIT):
                    await auth.login(EMAIL, PASSWORD)
            (record,) = caplog.records
            assert record.levelname == "WARNING"
            assert record.getMessage().startswith(f"{user!r} has a password hash that no password")
            assert str(user.password_hasher.obstacle(hashed)) in record.getMessage()
            assert hashed not in record.getMessage()


class TestBcrypt:
    @pytest.mark.parametrize("version", ["4", "5"])
    async def test_more_than_72_bytes(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        """A longer password is wrong, even if the library cuts it off, as bcrypt 4 does."""
        hashpw = bcrypt.hashpw
        if version == "4":
            monkeypatch.setattr(bcrypt, "hashpw", lambda given, salt: hashpw(given[:72], salt))
        hasher, text = cheap_hasher(), "ä" * 36
        hashed = bcrypt.hashpw(text.encode(), bcrypt.gensalt(4)).decode()
        assert (await hasher.verify(text, hashed)).valid
        assert await hasher.verify(text + "x", hashed) == WRONG
        assert await hasher.verify("x" + text, hashed) == WRONG


class TestCheaperArgon2:
    @pytest.mark.parametrize("passes", [1, 2, 3])
    @pytest.mark.parametrize("memory", [4096, 9216, 19456])
    async def test_work(self, memory: int, passes: int) -> None:
        """A failed hash of a lower cost is topped up to the work of one of today's."""
        today = PasswordHasher(memory_cost=19456, time_cost=3, parallelism=1)
        hashed = argon2.low_level.hash_secret(
            b"other",
            secrets.token_bytes(16),
            time_cost=passes,
            memory_cost=memory,
            parallelism=1,
            hash_len=32,
            type=argon2.low_level.Type.ID,
        ).decode()
        with argon2_costs() as costs:
            assert await today.verify(PASSWORD, hashed) == WRONG
        work = sum(kib * times for kib, times, _ in costs)
        assert 0.99 <= work / (19456 * 3) <= 1.01

    @pytest.mark.skipif(
        "TORTOISE_AUTH_TIMING" not in os.environ, reason="a clock is no basis for a test"
    )
    async def test_time(self) -> None:
        """The CPU time of a failure is within 0.9 and 1.15 of that of an unknown account."""
        today = PasswordHasher(memory_cost=65536, time_cost=3, parallelism=1, threads=1)
        for memory, passes in ((19456, 2), (46000, 1), (65536, 2)):
            old = PasswordHasher(
                memory_cost=max(memory, 47104 if passes == 1 else memory),
                time_cost=passes,
                parallelism=1,
            )
            hashed = await old.hash("other")

            async def cpu(stored: str | None) -> float:
                began = time.process_time()
                for _ in range(20):
                    await today.verify(PASSWORD, stored)
                return time.process_time() - began

            ratio = await cpu(hashed) / await cpu(None)
            print(f"m={memory} t={passes}: {ratio:.2f}")
            assert 0.9 <= ratio <= 1.15


class TestDecomposed:
    """Passwords that another program hashed as they came, without normalisation."""

    TYPED = unicodedata.normalize("NFD", "Zoë's blå häst vid ån")

    @pytest.mark.parametrize("scheme", ["bcrypt", "pbkdf2", "Django", "Argon2 of other cost"])
    async def test_right(self, scheme: str) -> None:
        """Both spellings are tried on a hash of another scheme or cost."""
        raw = self.TYPED.encode()
        hashed = {
            "bcrypt": lambda: bcrypt.hashpw(raw, bcrypt.gensalt(4)).decode(),
            "pbkdf2": lambda: str(pbkdf2_sha256.using(rounds=10).hash(self.TYPED)),
            "Django": lambda: str(django_pbkdf2_sha256.using(rounds=10).hash(self.TYPED)),
            "Argon2 of other cost": lambda: argon2.low_level.hash_secret(
                raw,
                bytes(16),
                time_cost=2,
                memory_cost=16,
                parallelism=1,
                hash_len=32,
                type=argon2.low_level.Type.ID,
            ).decode(),
        }[scheme]()
        hasher = cheap_hasher()
        assert await hasher.verify(self.TYPED, hashed) == Verification(valid=True, outdated=True)
        assert await hasher.verify(self.TYPED + "x", hashed) == WRONG
        # The composed spelling is another text to that program.
        assert await hasher.verify(unicodedata.normalize("NFC", self.TYPED), hashed) == WRONG

    async def test_our_own(self) -> None:
        """A hash of ours is of the composed spelling, and either one is right."""
        hasher = cheap_hasher()
        hashed = await hasher.hash(self.TYPED)
        forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
        for form in forms:
            typed = unicodedata.normalize(form, self.TYPED)
            assert await hasher.verify(typed, hashed) == Verification(valid=True)

    async def test_costs_no_more_for_today(self) -> None:
        """A hash of today's cost is checked once, whatever the spelling."""
        hasher = cheap_hasher()
        salt = base64.b64encode(secrets.token_bytes(16)).rstrip(b"=").decode()
        with argon2_costs() as costs:
            await hasher.verify(self.TYPED, f"$argon2id$v=19$m=8,t=1,p=1${salt}$" + "A" * 43)
        assert len(costs) == 1
