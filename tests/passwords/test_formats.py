"""Hashes that other programs have written: which ones log in, and what they cost."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import re
import threading
import unicodedata
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tortoise.context import TortoiseContext

from tests.support.accounts import EMAIL, PASSWORD
from tests.support.app import User
from tests.support.database import connection_of
from tests.support.foreign_hashes import (
    BROKEN,
    CHEAP,
    LONG,
    LONG_CUT_OFF,
    OF_LONG,
    TYPED,
    USUAL,
    Foreign,
)
from tests.support.hashing import argon2_costs, full_cost
from tests.support.snippets import ROOT, table
from tortoise_auth import AuthService, PasswordHasher
from tortoise_auth.exceptions import ServiceUnavailableError
from tortoise_auth.passwords import Verification, is_hash, scheme_of, unusable_hash
from tortoise_auth.passwords.formats import FORMATS, parse
from tortoise_auth.testing import cheap_hasher

WRONG = Verification(valid=False)
OUTDATED = Verification(valid=True, outdated=True)
BY_SCHEME = {each.scheme: each for each in reversed(CHEAP)}
"""One hash of each format."""
SCRYPT = [each.hashed for each in CHEAP if "scrypt" in each.scheme and "bcrypt" not in each.scheme]
BCRYPT = [each.hashed for each in CHEAP if "bcrypt" in each.scheme]
UNFIT = ["correct horse\0battery", "correct horse \ud800 battery", "x" * 1025]

foreign = pytest.mark.parametrize(
    "foreign", CHEAP, ids=[each.hashed[:20] + " by " + each.program for each in CHEAP]
)
one_of_each = pytest.mark.parametrize("foreign", BY_SCHEME.values(), ids=BY_SCHEME)


class DearerHasher(PasswordHasher):
    """A hasher whose own hashes cost more than any of `CHEAP`."""

    cost_floor: ClassVar[tuple[()]] = ()

    def __init__(self) -> None:
        super().__init__(memory_cost=256, time_cost=2, parallelism=1)


class TestTable:
    """The table of ``docs/service.md``."""

    ROWS = table(ROOT / "docs" / "service.md", "Take over password hashes")

    def test_rows(self) -> None:
        """It has a row for each format, with every beginning of it."""
        stated = {name: tuple(re.findall(r"`([^`]+)`", begins)) for name, begins, *_ in self.ROWS}
        assert stated == {each.name.replace("$2x$", "`$2x$`"): each.begins for each in FORMATS}

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
    async def test_each_beginning(self, hasher: PasswordHasher, row: list[str]) -> None:
        """Of each beginning there is a hash that another program has written, and it is checked."""
        name, begins, _, checked = row
        if name == "bcrypt `$2x$`":
            assert checked == "no"  # see `TestBroken`
            return
        assert checked == ("with the extra `bcrypt`" if "bcrypt" in name else "yes")
        for beginning in re.findall(r"`([^`]+)`", begins):
            written = [each for each in CHEAP if each.hashed.startswith(beginning)]
            assert {each.scheme for each in written} == {name}
            assert all([await hasher.verify(TYPED, each.hashed) == OUTDATED for each in written])

    def test_no_beginning_twice(self) -> None:
        """No hash has two formats."""
        begins = [beginning for each in FORMATS for beginning in each.begins]
        for beginning in begins:
            assert [each for each in begins if each.startswith(beginning)] == [beginning]


class TestForeign:
    @foreign
    async def test_right(self, hasher: PasswordHasher, foreign: Foreign) -> None:
        """The right password is right in each spelling, and the hash is to be replaced."""
        assert await hasher.verify(TYPED, foreign.hashed) == OUTDATED
        decomposed = unicodedata.normalize("NFD", TYPED)
        assert decomposed != TYPED
        assert await hasher.verify(decomposed, foreign.hashed) == OUTDATED

    @foreign
    async def test_wrong(self, hasher: PasswordHasher, foreign: Foreign) -> None:
        """Any other password is wrong."""
        for guess in (TYPED + "x", TYPED[:-1], TYPED.upper(), "", foreign.hashed):
            assert await hasher.verify(guess, foreign.hashed) == WRONG

    @foreign
    def test_known(self, hasher: PasswordHasher, foreign: Foreign) -> None:
        """It has its name, no obstacle, and a place in the column."""
        assert scheme_of(foreign.hashed) == foreign.scheme
        assert hasher.obstacle(foreign.hashed) is None
        assert hasher.knows(foreign.hashed)
        assert hasher.affords(foreign.hashed)
        assert is_hash(foreign.hashed)

    @pytest.mark.parametrize("foreign", USUAL, ids=lambda each: each.scheme)
    def test_usual_costs(self, foreign: Foreign) -> None:
        """The costs that its program chooses are below the caps."""
        assert scheme_of(foreign.hashed) == foreign.scheme
        assert PasswordHasher().obstacle(foreign.hashed) is None

    def test_our_own_cost_in_the_notation_of_django(self) -> None:
        """A hash of today's cost that stands behind a prefix is outdated nevertheless."""
        hashed = BY_SCHEME["Django Argon2"].hashed

        class Same(DearerHasher):
            def __init__(self) -> None:
                PasswordHasher.__init__(self, memory_cost=64, time_cost=1, parallelism=2)

        assert asyncio.run(Same().verify(TYPED, hashed)) == OUTDATED
        assert asyncio.run(Same().verify(TYPED, hashed.removeprefix("argon2"))) == Verification(
            valid=True
        )

    @one_of_each
    async def test_login(
        self,
        sqlite: TortoiseContext,
        auth: AuthService[User],
        hasher: PasswordHasher,
        foreign: Foreign,
    ) -> None:
        """A login with the old password replaces the hash by one of today's."""
        await User.create_user(email=EMAIL, password=PASSWORD)
        sql = f"UPDATE app_user SET password = '{foreign.hashed}'"
        await connection_of(sqlite).execute_query(sql)
        await auth.login(EMAIL, TYPED)
        user = await User.get(email=EMAIL)
        assert user.password.startswith("$argon2id$")
        assert await hasher.verify(TYPED, user.password) == Verification(valid=True)


class TestLong:
    @pytest.mark.parametrize("hashed", OF_LONG)
    async def test_hashed_first(self, hasher: PasswordHasher, hashed: str) -> None:
        """Where SHA-256 comes before bcrypt, a password of any length counts whole."""
        assert await hasher.verify(LONG, hashed) == OUTDATED
        assert await hasher.verify(LONG[:-1] + "y", hashed) == WRONG
        assert await hasher.verify(LONG[:72], hashed) == WRONG

    async def test_cut_off(self, hasher: PasswordHasher) -> None:
        """What the other program cut off is wrong as a whole, and right at 72 bytes."""
        assert await hasher.verify(LONG, LONG_CUT_OFF) == WRONG
        assert await hasher.verify(LONG[:72], LONG_CUT_OFF) == OUTDATED


class TestCost:
    @one_of_each
    async def test_wrong_password(self, foreign: Foreign) -> None:
        """A wrong password costs the foreign hash, and of today's what that hash was cheaper."""
        hasher = DearerHasher()
        with argon2_costs() as costs:
            assert await hasher.verify("wrong", foreign.hashed) == WRONG
        if "Argon2" in foreign.scheme:
            assert sum(memory * passes for memory, passes, _ in costs) == 256 * 2
            assert len(costs) == 2
        else:
            assert costs == [full_cost(hasher)]

    @one_of_each
    @pytest.mark.parametrize("password", UNFIT, ids=["NUL", "surrogate", "too long"])
    async def test_unfit(self, hasher: PasswordHasher, foreign: Foreign, password: str) -> None:
        """Input that cannot be hashed is wrong, at the cost of one of today's."""
        with argon2_costs() as costs:
            assert await hasher.verify(password, foreign.hashed) == WRONG
        assert costs == [full_cost(hasher)]

    @one_of_each
    async def test_malformed(self, hasher: PasswordHasher, foreign: Foreign) -> None:
        """A hash that does not follow its format is wrong, at the cost of one of today's."""
        hashed = foreign.hashed
        head, _, digest = hashed.rpartition("$")
        for damaged in (head, head + "$", head + "$$" + digest, hashed + "\n", hashed + "é"):
            obstacle = hasher.obstacle(damaged)
            assert obstacle == "It does not follow its format: perhaps it was cut off"
            with argon2_costs() as costs:
                assert await hasher.verify(TYPED, damaged) == WRONG
            assert costs == [full_cost(hasher)]

    @pytest.mark.filterwarnings("ignore::passlib.exc.PasslibHashWarning")  # odd padding of bcrypt
    @one_of_each
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_damaged(self, foreign: Foreign, data: st.DataObject) -> None:
        """A hash with any character changed, put in or left out raises nothing."""
        hashed = foreign.hashed
        at = data.draw(st.integers(0, len(hashed) - 1))
        replaced = data.draw(st.integers(0, 1))
        # No digits: a cost below the caps may take seconds, which no test awaits.
        put_in = data.draw(st.text(st.characters(exclude_categories=["Nd"]), max_size=2))
        damaged = hashed[:at] + put_in + hashed[at + replaced :]
        assert asyncio.run(FUZZED.verify("wrong", damaged)) == WRONG
        obstacle = FUZZED.obstacle(damaged)
        assert obstacle is None or damaged not in obstacle

    async def test_off_the_event_loop(
        self, hasher: PasswordHasher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """scrypt is computed on the hashing threads."""
        scrypt, threads = hashlib.scrypt, set[str]()

        def noting(*args: Any, **kwargs: Any) -> bytes:
            threads.add(threading.current_thread().name)
            return scrypt(*args, **kwargs)

        monkeypatch.setattr(hashlib, "scrypt", noting)
        for hashed in SCRYPT:
            assert await hasher.verify(TYPED, hashed) == OUTDATED
        assert threads
        assert all(name.startswith("tortoise_auth_hash") for name in threads)

    @pytest.mark.parametrize("hashed", SCRYPT)
    async def test_no_memory(
        self, hasher: PasswordHasher, monkeypatch: pytest.MonkeyPatch, hashed: str
    ) -> None:
        """Where scrypt gets no memory the password is not wrong: the service is unavailable."""

        def exhausted(*args: Any, **kwargs: Any) -> bytes:
            # Measured below RLIMIT_AS, with Python 3.11 and OpenSSL 3.
            raise ValueError("[digital envelope routines] malloc failure")

        monkeypatch.setattr(hashlib, "scrypt", exhausted)
        with pytest.raises(ServiceUnavailableError, match="MemoryError"):
            await hasher.verify(TYPED, hashed)


class TestScryptNumbers:
    @pytest.mark.parametrize(
        "numbers",
        [
            {"n": 0},
            {"n": 1},
            {"n": 17},
            {"n": 24},
            {"n": 65536, "r": 1},
            {"r": 0},
            {"p": 0},
            {"r": 1 << 15, "p": 1 << 15},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("notation", ["scrypt:{n}:{r}:{p}$salt$", "scrypt${n}$salt${r}${p}$"])
    async def test_undefined(
        self, hasher: PasswordHasher, notation: str, numbers: dict[str, int]
    ) -> None:
        """Numbers for which scrypt is not defined make no hash, and are not computed with."""
        digest = "0" * 128 if ":" in notation else "A" * 86 + "=="
        hashed = notation.format(**{"n": 16, "r": 8, "p": 1} | numbers) + digest
        assert parse(hashed) is None
        assert await hasher.verify(TYPED, hashed) == WRONG
        assert parse(notation.format(n=16, r=8, p=1) + digest) is not None

    @pytest.mark.parametrize("ln", [0, 64, 99])
    async def test_logarithm(self, hasher: PasswordHasher, ln: int) -> None:
        """The logarithm of passlib has the same bounds, or those of the caps."""
        hashed = BY_SCHEME["passlib scrypt"].hashed.replace("ln=4", f"ln={ln}")
        assert hasher.obstacle(hashed) is not None
        assert await hasher.verify(TYPED, hashed) == WRONG

    def test_memory(self) -> None:
        """What a hash needs is the memory that OpenSSL counts, in KiB."""
        stored = parse(BY_SCHEME["Werkzeug scrypt"].hashed)
        assert stored is not None
        assert stored.costs == {"scrypt_memory": 8 * (16 + 2 + 2) // 8, "scrypt_work": 16 * 8 * 2}


class TestBroken:
    @pytest.mark.parametrize("prefix", ["", "bcrypt$", "bcrypt_sha256$"])
    async def test_refused(self, hasher: PasswordHasher, prefix: str) -> None:
        """A hash of `$2x$` is known and matches nothing, at the usual cost."""
        hashed = prefix + BROKEN
        assert scheme_of(hashed) == "bcrypt $2x$"
        assert is_hash(hashed)
        assert not hasher.knows(hashed)
        assert "crypt_blowfish" in str(hasher.obstacle(hashed))
        with argon2_costs() as costs:
            assert await hasher.verify(TYPED, hashed) == WRONG
        assert costs == [full_cost(hasher)]


class TestObstacle:
    @pytest.mark.parametrize("value", ["!", "", "!abc", pytest.param(unusable_hash(), id="new")])
    def test_no_password(self, hasher: PasswordHasher, value: str) -> None:
        """What is made to match no password says so."""
        assert hasher.obstacle(value) == "It is made to match no password"
        assert scheme_of(value) is None

    @pytest.mark.parametrize(
        "value", [PASSWORD, "$1$abc$def", "md5$salt$0", "sha256$salt$0", "b'$2b$04$'", " $2b$04$"]
    )
    def test_unknown(self, hasher: PasswordHasher, value: str) -> None:
        """What has no format that is known here is not named, nor accepted by the column."""
        assert scheme_of(value) is None
        assert hasher.obstacle(value) == "It is no hash, or of no format that is known here"
        assert not is_hash(value)

    @pytest.mark.parametrize("hashed", BCRYPT)
    async def test_without_bcrypt(self, monkeypatch: pytest.MonkeyPatch, hashed: str) -> None:
        """Without the extra each format that uses bcrypt is named, and matches nothing."""
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "bcrypt" else find(name)
        )
        without = cheap_hasher()
        assert without.obstacle(hashed) == "bcrypt is not installed here: add the extra bcrypt"
        assert scheme_of(hashed) is not None
        assert not without.knows(hashed)
        assert await without.verify(TYPED, hashed) == WRONG
        without.close()

    @pytest.mark.parametrize("hashed", SCRYPT)
    async def test_without_scrypt(self, monkeypatch: pytest.MonkeyPatch, hashed: str) -> None:
        """Without scrypt in OpenSSL its formats are named, and match nothing."""
        monkeypatch.delattr(hashlib, "scrypt")
        without = cheap_hasher()
        assert "OpenSSL" in str(without.obstacle(hashed))
        assert await without.verify(TYPED, hashed) == WRONG
        without.close()

    @one_of_each
    def test_cost(self, foreign: Foreign) -> None:
        """A cost above a cap is an obstacle that names the cap, and not the hash."""
        hasher = cheap_hasher()
        stored = parse(foreign.hashed)
        assert stored is not None
        assert all(hasattr(hasher.caps, cap) for cap in stored.costs)
        for cap, cost in stored.costs.items():
            if cost < 9:
                continue  # what a hash of today costs is no obstacle
            for most, is_obstacle in ((cost, False), (cost - 1, True)):
                hasher.caps = replace(hasher.caps, **{cap: most})
                obstacle = f"It costs more to check than CostCaps({cap}={most}) allows"
                assert hasher.obstacle(foreign.hashed) == (obstacle if is_obstacle else None)
            hasher.caps = type(hasher.caps)()


FUZZED = cheap_hasher()
