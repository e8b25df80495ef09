"""Which new passwords are accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, TypeVar

from tortoise_auth.exceptions import ConfigurationError, PasswordPolicyError, PolicyFailure
from tortoise_auth.lazy import LazyModule
from tortoise_auth.passwords.hashing import MAX_PASSWORD_LENGTH, input_failures, nfc

if TYPE_CHECKING:
    import zxcvbn.frequency_lists as zxcvbn_lists
else:
    zxcvbn_lists = LazyModule("zxcvbn.frequency_lists")

ItemT = TypeVar("ItemT")


class _CommonPasswords(Set[str]):
    """A set of words that is read from its lists on first use, which takes about 50 ms."""

    def __contains__(self, word: object) -> bool:
        return word in self._words

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def __hash__(self) -> int:
        return hash(self._words)

    def __repr__(self) -> str:
        return "COMMON_PASSWORDS"

    def __reduce__(self) -> str:
        return "COMMON_PASSWORDS"  # a copy, or what is unpickled, is this very object

    @classmethod
    def _from_iterable(cls, it: Iterable[ItemT]) -> Set[ItemT]:
        return frozenset(it)  # what ``|`` and its like return

    @cached_property
    def _words(self) -> frozenset[str]:
        long = files("tortoise_auth.passwords").joinpath("common_passwords.txt").read_text("utf-8")
        listed = (*zxcvbn_lists.FREQUENCY_LISTS["passwords"], *long.split("\n"))
        return frozenset(word for word in listed if len(word) >= 4)

    async def load(self) -> None:
        """Read the lists, on another thread than that of the event loop."""
        if "_words" not in vars(self):
            await asyncio.to_thread(len, self)


COMMON_PASSWORDS = _CommonPasswords()
"""The most frequent passwords: zxcvbn's list, and 3500 of 15 characters or more.

ASVS 6.2.4 asks for 3000 that pass the length rule; zxcvbn's list has 31 of them. The others are the
most frequent ones in two published breaches, and rows of keys, digits and letters.
"""


@dataclass(frozen=True, kw_only=True)
class PasswordPolicy:
    """Decides which new passwords are accepted. It applies when a password is set, never at login.

    There are no composition rules, by design (NIST SP 800-63B-4, 3.1.1.2: "SHALL NOT").

    Attributes:
        min_length: Code points, 15 by default.
            Warning: 8 is the minimum, and only right where a second factor is required
            (NIST SP 800-63B-4, 3.1.1.2).
        max_length: Code points, at least 64, at most 1024.
        context_words: Words that attackers try first: the names of the service and the company.
            A password made of nothing else is refused. A word of fewer than four letters is
            compared only with the whole password.
        blocklist: Common passwords, in lower case, which are refused.

    Raises:
        ConfigurationError: A length is out of bounds, or words are not a collection of strings.
    """

    min_length: int = 15
    max_length: int = MAX_PASSWORD_LENGTH
    context_words: Sequence[str] = ()
    blocklist: Collection[str] = field(default=COMMON_PASSWORDS, repr=False)

    def __post_init__(self) -> None:
        self._check_types()
        if self.min_length < 8:
            raise ConfigurationError(
                f"PasswordPolicy: min_length={self.min_length} is too short. Use 15 (the default), "
                "or at least 8 where a second factor is required."
            )
        if not max(64, self.min_length) <= self.max_length <= MAX_PASSWORD_LENGTH:
            raise ConfigurationError(
                f"PasswordPolicy: max_length={self.max_length} must be between "
                f"{max(64, self.min_length)} and {MAX_PASSWORD_LENGTH}."
            )

    def check(self, password: str, *, about: Sequence[str] = ()) -> None:
        """Refuse *password* if it breaks a rule.

        Args:
            password: The proposed password.
            about: Words about its owner: e-mail address, user name.

        Raises:
            PasswordPolicyError: With every broken rule: ``not_a_string``, ``too_long``,
                ``nul_character``, ``not_unicode``, ``too_short``, ``common``, ``context``.
        """
        failures = self.failures(password, about=about)
        if failures:
            raise PasswordPolicyError(failures)

    async def acheck(self, password: str, *, about: Sequence[str] = ()) -> None:
        """Call `check`, after loading the common passwords without holding up the event loop."""
        if self.blocklist is COMMON_PASSWORDS:
            await COMMON_PASSWORDS.load()
        self.check(password, about=about)

    def failures(self, password: str, *, about: Sequence[str] = ()) -> list[PolicyFailure]:
        """Return every rule that *password* breaks, for a form that shows them as people type."""
        broken = input_failures(password)
        # Nothing else is done with what is too long: its length is the choice of the sender.
        if broken:
            return broken
        password = nfc(password)
        if len(password) < self.min_length:
            broken.append(
                PolicyFailure(
                    "too_short", f"The password must have at least {self.min_length} characters."
                )
            )
        if len(password) > self.max_length:
            broken.append(
                PolicyFailure(
                    "too_long", f"The password must have at most {self.max_length} characters."
                )
            )
        if self._is_common(password.lower()):
            broken.append(PolicyFailure("common", "The password is one that many people use."))
        if _consists_of(password, [*self.context_words, *about]):
            broken.append(
                PolicyFailure(
                    "context",
                    "The password must not consist of your own name or address or that of this service.",
                )
            )
        return broken

    def _check_types(self) -> None:
        if {type(self.min_length), type(self.max_length)} != {int}:
            raise ConfigurationError("PasswordPolicy: a length is a whole number")
        for name in ("context_words", "blocklist"):
            words = getattr(self, name)
            if not isinstance(words, Collection) or isinstance(words, str | bytes):
                raise ConfigurationError(f"PasswordPolicy: {name} must be a list or set of strings")
        if not all(isinstance(word, str) for word in self.context_words):
            raise ConfigurationError("PasswordPolicy: context_words must be strings")

    def _is_common(self, password: str) -> bool:
        return password in self.blocklist or _repeated_unit(password) in self.blocklist


def _repeated_unit(text: str) -> str:
    """Return the shortest string whose repetition is *text* (``"abcabc"`` → ``"abc"``)."""
    return text[: (text + text).find(text, 1)] if text else text


def _consists_of(password: str, words: Sequence[str]) -> bool:
    """Return whether *password* is made of *words* alone.

    Case and order do not matter, and neither does anything between them that is not a letter.
    """
    known = {nfc(word).lower() for word in words if word}
    known |= {word.partition("@")[0] for word in known}
    if password.lower() in known:
        return True
    units = {unit for word in known if len(unit := _letters(word)) >= 4}
    text = _letters(password.lower())
    # A regular expression of alternatives backtracks exponentially on words such as "aaaa" and
    # "aaaaa". A set of reachable positions takes len(text) * len(units) steps at most.
    reached = {0}
    for position in range(len(text)):
        if position in reached:
            reached |= {position + len(unit) for unit in units if text.startswith(unit, position)}
    return bool(text) and len(text) in reached


def _letters(text: str) -> str:
    return "".join(character for character in text if character.isalpha())
