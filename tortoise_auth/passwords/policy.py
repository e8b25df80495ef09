"""Which new passwords are accepted."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from zxcvbn.frequency_lists import FREQUENCY_LISTS

from tortoise_auth.exceptions import ConfigurationError, PasswordPolicyError, PolicyFailure
from tortoise_auth.passwords.hashing import MAX_PASSWORD_LENGTH, input_failures, nfc

_LONG = files("tortoise_auth.passwords").joinpath("common_passwords.txt").read_text("utf-8")

COMMON_PASSWORDS: frozenset[str] = frozenset(
    word for word in (*FREQUENCY_LISTS["passwords"], *_LONG.split("\n")) if len(word) >= 4
)
"""What people choose most: zxcvbn's list, and 3500 of 15 characters or more.

ASVS 6.2.4 asks for 3000 that the length policy lets pass, and zxcvbn's list has 31. The others are
the most frequent in two published breaches, and rows of keys, digits and letters.
"""


@dataclass(frozen=True, kw_only=True)
class PasswordPolicy:
    """Which new passwords are accepted. Asked when a password is set, never at login.

    There are no composition rules, by design (NIST SP 800-63B-4, 3.1.1.2: "SHALL NOT").

    Attributes:
        min_length: Code points, 15 by default.
            Warning: 8 is the least that is allowed, and only right where a second factor is
            required (NIST SP 800-63B-4, 3.1.1.2).
        max_length: Code points, at least 64, at most 1024.
        context_words: Words a guesser tries here first: the name of the service, of the company.
            A password that consists of nothing else is refused; words of fewer than four
            letters count only as the whole password.
        blocklist: Passwords refused as too common, in lower case.

    Raises:
        ConfigurationError: A length is outside its bounds, or words are not a collection of strings.
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

    def failures(self, password: str, *, about: Sequence[str] = ()) -> list[PolicyFailure]:
        """Return every rule that *password* breaks, for a form that shows them while typing."""
        broken = input_failures(password)
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
    """Tell whether *password* is only *words*, in any case and order, with digits and signs between."""
    known = {nfc(word).lower() for word in words if word}
    known |= {word.partition("@")[0] for word in known}
    if password.lower() in known:
        return True
    units = {unit for word in known if len(unit := _letters(word)) >= 4}
    text = _letters(password.lower())
    reached = {0}  # a set of positions, not a regular expression: those can be made to explode
    for position in range(len(text)):
        if position in reached:
            reached |= {position + len(unit) for unit in units if text.startswith(unit, position)}
    return bool(text) and len(text) in reached


def _letters(text: str) -> str:
    return "".join(character for character in text if character.isalpha())
