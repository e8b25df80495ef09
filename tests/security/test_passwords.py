"""R1 to R28: which passwords are accepted, and how they are stored, tested through a login."""

from __future__ import annotations

import ast
import unicodedata
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import argon2.low_level
import pytest
from argon2.exceptions import HashingError, VerificationError

import tortoise_auth
from tests.support.accounts import (
    EMAIL,
    NEW_PASSWORD,
    PASSWORD,
    assert_live,
    assert_over,
    log_in,
)
from tests.support.app import User
from tests.support.hashing import argon2_costs
from tests.support.rows import rows
from tortoise_auth import AuthenticationError, AuthService, EventEmitter, PasswordPolicyError
from tortoise_auth.events import PasswordChangeFailed
from tortoise_auth.exceptions import ServiceUnavailableError
from tortoise_auth.models import AttemptCount
from tortoise_auth.testing import FakeClock, capture

PACKAGE = Path(tortoise_auth.__file__).parent

Door: TypeAlias = Callable[[AuthService[User], User, str], Awaitable[object]]
"""Takes a new password."""

DOORS: list[Any] = [
    pytest.param(
        lambda auth, ada, new: User.create_user(email="eve@example.com", password=new),
        id="create_user",
    ),
    pytest.param(
        lambda auth, ada, new: auth.create_user(email="eve@example.com", password=new),
        id="service_create_user",
    ),
    pytest.param(lambda auth, ada, new: auth.set_password(ada, new), id="set_password"),
    pytest.param(
        lambda auth, ada, new: auth.change_password(ada, PASSWORD, new), id="change_password"
    ),
]

FOURTEEN, FIFTEEN = "qzwvbnmlkjhgfd", "qzwvbnmlkjhgfds"
"""Letters that no user chooses; the second is one longer."""


class TestPolicy:
    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize(
        ("password", "code"),
        [
            pytest.param(FOURTEEN, "too_short", id="R1-14-characters"),
            pytest.param("\U0001f422" * 14, "too_short", id="R2-14-emoji-of-56-bytes"),
            pytest.param("e\u0301" * 14, "too_short", id="R2-14-after-normalisation"),
            pytest.param(FIFTEEN * 69, "too_long", id="R3-1035-characters"),
            pytest.param("x" * 10_000_000, "too_long", id="A34-megabytes"),
            pytest.param("bestfriendsforever", "common", id="R7-common"),
            pytest.param("password" * 2, "common", id="R7-common-twice"),
        ],
    )
    async def test_refused_at_every_door(
        self, auth: AuthService[User], ada: User, door: Door, password: str, code: str
    ) -> None:
        """R1, R2, R3, R7, R8, A34: a bad password is refused unhashed, everywhere, with the reason."""
        before = await rows(User)
        with argon2_costs() as costs, pytest.raises(PasswordPolicyError) as refusal:
            await door(auth, ada, password)
        assert [(each.code, bool(each.message)) for each in refusal.value.failures] == [
            (code, True)
        ]
        assert len(costs) <= 1  # the current one, in `change_password`
        assert await rows(User) == before

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize(
        "password",
        [
            pytest.param(FIFTEEN, id="R1-15-characters"),
            pytest.param("\U0001f422" * 15, id="R2-15-emoji"),
            pytest.param((FIFTEEN * 5)[:64], id="R3-64-characters"),
            pytest.param((FIFTEEN * 69)[:1024], id="R3-1024-characters"),
            pytest.param("839201746582910", id="R4-digits"),
            pytest.param("   three   spaces   ", id="R4-spaces"),
            pytest.param("密码" * 8, id="R4-Chinese"),
            pytest.param("my password is long", id="R7-common-word-inside"),
        ],
    )
    async def test_accepted_at_every_door(
        self, auth: AuthService[User], ada: User, door: Door, password: str
    ) -> None:
        """R1, R2, R3, R4, R7: length is what counts, in any characters."""
        await door(auth, ada, password)
        email = EMAIL if not await User.exists(email="eve@example.com") else "eve@example.com"
        assert await auth.login(email, password)

    @pytest.mark.parametrize("door", DOORS[2:])
    async def test_own_address(self, auth: AuthService[User], ada: User, door: Door) -> None:
        """R7: the address of the account, in any case, is no password for it."""
        with pytest.raises(PasswordPolicyError) as refusal:
            await door(auth, ada, "Ada@Example.com")
        assert [failure.code for failure in refusal.value.failures] == ["context"]


class TestWhole:
    LONG = "qzwv" * 64

    @pytest.mark.parametrize(
        "typed",
        [
            pytest.param(LONG[:72] + "x" + LONG[73:], id="character-73"),
            pytest.param(LONG[:200] + "x" + LONG[201:], id="character-200"),
            pytest.param(LONG[:-1] + "x", id="last"),
            pytest.param(LONG[:-1], id="one-less"),
            pytest.param(LONG + "q", id="one-more"),
            pytest.param(LONG.title(), id="case"),
            pytest.param(LONG + " ", id="space-behind"),
            pytest.param(" " + LONG, id="space-before"),
            pytest.param(LONG + "\n", id="line-break"),
        ],
    )
    async def test_every_character_counts(
        self, auth: AuthService[User], ada: User, typed: str
    ) -> None:
        """R5: neither cut off, nor trimmed, nor folded."""
        await auth.set_password(ada, self.LONG)
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, typed)
        assert await auth.login(EMAIL, self.LONG)

    @pytest.mark.parametrize("password", ["é" * 15, "ḍ̇ệ" * 8, "가각" * 8])
    @pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
    async def test_canonical_spellings_are_one(
        self, auth: AuthService[User], ada: User, password: str, forms: tuple[Any, Any]
    ) -> None:
        """R6, A31: whichever spelling was set, its canonical equivalent logs in."""
        chosen, typed = (unicodedata.normalize(form, password) for form in forms)
        assert chosen != typed
        await auth.set_password(ada, chosen)
        assert await auth.login(EMAIL, typed)

    @pytest.mark.parametrize(
        ("chosen", "typed"),
        [("\ufb01ve horses in a row", "five horses in a row"), ("\uff41" * 15, "a" * 15)],
    )
    async def test_compatible_spellings_are_two(
        self, auth: AuthService[User], ada: User, chosen: str, typed: str
    ) -> None:
        """R6, A32: a ligature or a wide letter is not the plain one."""
        await auth.set_password(ada, chosen)
        with pytest.raises(AuthenticationError):
            await auth.login(EMAIL, typed)

    @pytest.mark.parametrize(
        "password",
        [
            pytest.param("\U0001f422" * 64, id="emoji"),
            pytest.param("\u202e" + "שגרה" * 4, id="right-to-left"),
            pytest.param("q" + "\u0323\u0307" * 12, id="combining"),
            pytest.param("\u200b\u200d\ufeff" * 6, id="zero-width"),
            pytest.param("\t\r\n\x1b\x7f" * 4, id="control"),
        ],
    )
    async def test_any_unicode(self, auth: AuthService[User], ada: User, password: str) -> None:
        """R27, A30: any text can be set and logs in, and one changed character does not."""
        await auth.set_password(ada, password)
        assert await auth.login(EMAIL, password)
        for wrong in (password[:-1] + "x", "x" + password[1:]):
            with pytest.raises(AuthenticationError):
                await auth.login(EMAIL, wrong)


class TestNoExpiry:
    async def test_age_is_no_reason(
        self, auth: AuthService[User], ada: User, clock: FakeClock
    ) -> None:
        """R9: a password opens the account however old it is."""
        clock.advance(timedelta(days=20 * 365))
        assert await auth.login(EMAIL, PASSWORD)

    async def test_after_a_compromise(self, auth: AuthService[User], ada: User) -> None:
        """R9, A175: a host can take a password away, with all sessions, until a new one is set."""
        result = await log_in(auth)
        ada.set_unusable_password()
        await ada.save(update_fields=["password"])
        await auth.logout_all(ada)
        await assert_over(auth, result)
        with pytest.raises(AuthenticationError):
            await log_in(auth)
        await auth.set_password(ada, NEW_PASSWORD)
        assert await auth.login(EMAIL, NEW_PASSWORD)


class TestChange:
    async def test_wrong_current_password_is_counted_and_emitted(
        self, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """R11, A110, R90: it is refused, counts one attempt, emits one event, and ends no session."""
        result = await log_in(auth)
        with capture(emitter) as events, pytest.raises(AuthenticationError):
            await auth.change_password(ada, "wrong", NEW_PASSWORD, keep=result.session)
        failed = events.one(PasswordChangeFailed)
        assert (failed.reason, failed.subject_id, failed.user) == ("bad_password", str(ada.pk), ada)
        assert events.names == ["password_change_failed"]
        assert sum(await AttemptCount.all().values_list("count", flat=True)) == 1  # type: ignore[arg-type]
        await assert_live(auth, result)
        assert await log_in(auth)

    async def test_same_password_again(self, auth: AuthService[User], ada: User) -> None:
        """A119: the current password may be set anew; it counts as a change, and sessions end."""
        result = await log_in(auth)
        await auth.set_password(ada, PASSWORD)
        await assert_over(auth, result)
        assert await log_in(auth)


EXHAUSTED: list[Any] = [
    pytest.param(VerificationError("Memory allocation error"), id="no-memory"),
    pytest.param(VerificationError("Threading failure"), id="no-thread"),
    pytest.param(MemoryError(), id="no-memory-in-python"),
    pytest.param(RuntimeError("can't start new thread"), id="no-thread-in-python"),
]


class TestExhaustion:
    @pytest.mark.parametrize("failure", EXHAUSTED)
    @pytest.mark.parametrize("identifier", [EMAIL, "nobody@example.com"])
    async def test_is_no_wrong_password(
        self,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        failure: Exception,
        identifier: str,
    ) -> None:
        """R94, R96, A144, A173: lack of memory is an error without the hash, and not a wrong password."""

        def fail(*args: object, **kwargs: object) -> bool:
            raise failure

        with monkeypatch.context() as patch, capture(emitter) as events:
            patch.setattr(argon2.low_level, "verify_secret", fail)
            with pytest.raises(ServiceUnavailableError) as refusal:
                await auth.login(identifier, PASSWORD)
        assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)
        assert "$argon2id$" not in str(refusal.value) + caplog.text
        (logged,) = [each for each in caplog.records if each.levelname == "ERROR"]
        assert logged.getMessage().startswith(f"{refusal.value}: ")
        assert type(failure).__name__ in logged.getMessage()
        assert "Traceback" in caplog.text
        assert events.names == []
        assert not any(await AttemptCount.all().values_list("count", flat=True))
        assert await log_in(auth)

    async def test_of_one_computation(
        self, auth: AuthService[User], ada: User, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A144: lack of memory for one computation is no wrong password either."""
        verify = argon2.low_level.verify_secret
        failures: Iterator[Exception] = iter([VerificationError("Memory allocation error")])

        def fail_once(*args: Any, **kwargs: Any) -> bool:
            for failure in failures:
                raise failure
            return verify(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(argon2.low_level, "verify_secret", fail_once)
            with pytest.raises(ServiceUnavailableError):
                await log_in(auth)

    @pytest.mark.parametrize("door", DOORS)
    async def test_sets_no_password(
        self,
        auth: AuthService[User],
        ada: User,
        monkeypatch: pytest.MonkeyPatch,
        door: Door,
    ) -> None:
        """A118, R94: a password that cannot be hashed is not set; the old one works."""
        result = await log_in(auth)
        before = await rows(User)

        def fail(*args: object, **kwargs: object) -> bytes:
            raise HashingError("Memory allocation error")

        with monkeypatch.context() as patch:
            patch.setattr(argon2.low_level, "hash_secret", fail)
            with pytest.raises(ServiceUnavailableError) as refusal:
                await door(auth, ada, NEW_PASSWORD)
        assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)
        assert await rows(User) == before
        await assert_live(auth, result)


SECRET_NAMES = {
    *("hash", "hashed", "stored", "refresh_hash", "previous_refresh_hash", "family_hash"),
    *("password", "raw_password", "secret", "token", "refresh_token", "access_token"),
    *("signature", "check", "digest", "mac"),
}


def comparisons() -> Iterator[str]:
    """Yield every ``==`` and ``!=`` of the package on a name like that of a secret."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(
                isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops
            ):
                operands = [node.left, *node.comparators]
                names = {getattr(each, "attr", getattr(each, "id", "")) for each in operands}
                if names & SECRET_NAMES:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


def test_secrets_are_compared_in_constant_time() -> None:
    """R28, A103: no secret is compared with ``==``; hashes and checksums by `compare_digest`."""
    assert list(comparisons()) == []
    users = [path.name for path in PACKAGE.rglob("*.py") if "compare_digest" in path.read_text()]
    assert sorted(users) == ["formats.py", "refresh_tokens.py", "store.py"]
