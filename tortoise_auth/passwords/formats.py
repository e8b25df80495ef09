"""The formats of stored hashes: how each begins, what a check costs, and how it is read.

libpass computes Argon2, bcrypt and PBKDF2; hashes that other programs write in a notation of their
own are rewritten into the one that it reads. scrypt is computed by `hashlib`: libpass reads only
digests of 32 bytes, and where OpenSSL has no scrypt it computes it in Python, for minutes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tortoise_auth.exceptions import ConfigurationError

Algorithm = Literal["argon2", "bcrypt", "pbkdf2", "scrypt"]

_MOST_SCRYPT_MEMORY = (1 << 21) - 1  # KiB: `hashlib.scrypt` takes at most 2^31 - 1 bytes
_UNUSABLE_PREFIX = "!"
_UNUSABLE = re.compile(r"!(?:[A-Za-z0-9_-]{32,})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CostCaps:
    """The most that a *stored* hash may cost to check, so that one row cannot stop every login.

    A hash above a cap, from an import or a writer of the table, is checked by no one: each password
    is wrong for it, at the usual cost. The cost of new hashes is capped by nothing but your settings.

    Attributes:
        argon2_memory: KiB (1 GiB).
        argon2_work: KiB times passes (8 passes over 1 GiB, or 128 over 64 MiB).
        argon2_lanes: Each lane is a thread (64).
        bcrypt_rounds: Each round doubles the work (16, about five seconds).
        pbkdf2_iterations: 10 million, about five seconds.
        scrypt_memory: KiB (1 GiB), less than 2 GiB.
        scrypt_work: N times r times p (2^23: one pass over 1 GiB, five to eight seconds).

    Raises:
        ConfigurationError: A cap is not a whole number of at least 1, or more than Python computes.
    """

    argon2_memory: int = 1 << 20
    argon2_work: int = 1 << 23
    argon2_lanes: int = 64
    bcrypt_rounds: int = 16
    pbkdf2_iterations: int = 10_000_000
    scrypt_memory: int = 1 << 20
    scrypt_work: int = 1 << 23

    def __post_init__(self) -> None:
        if not all(type(cap) is int and cap >= 1 for cap in vars(self).values()):
            raise ConfigurationError("CostCaps: each cap must be a whole number of at least 1")
        if self.scrypt_memory > _MOST_SCRYPT_MEMORY:
            raise ConfigurationError(
                f"CostCaps: scrypt_memory must be at most {_MOST_SCRYPT_MEMORY} KiB, the most that "
                "hashlib.scrypt uses"
            )


def _as_it_is(match: re.Match[str]) -> str:
    return match.string


def _without_prefix(match: re.Match[str]) -> str:
    return match["libpass"]


def _as_pbkdf2_of_libpass(match: re.Match[str]) -> str:
    """Rewrite a hash of PBKDF2 whose salt is text, and may be any."""
    ident = {"sha1": "pbkdf2", "sha256": "pbkdf2-sha256", "sha512": "pbkdf2-sha512"}[match["hash"]]
    salt, digest = (
        base64.b64encode(part).decode().rstrip("=").replace("+", ".")
        for part in _salt_and_digest(match)
    )
    return f"${ident}${match['iterations']}${salt}${digest}"


@dataclass(frozen=True, slots=True)
class Format:
    """A format of stored hashes.

    Attributes:
        name: What people call it.
        begins: How its hashes begin; no two formats share a beginning.
        grammar: A whole hash. The groups are its costs, by the names of `StoredHash.costs`, and
            ``salt`` (text) or ``salt64``, ``digest64`` or ``digest16`` where they are read here.
        algorithm: What computes it.
        notation: Rewrites a hash into the notation of libpass.
        refused: Why it is never checked, if it is not.
    """

    name: str
    begins: tuple[str, ...]
    grammar: re.Pattern[str]
    algorithm: Algorithm
    notation: Callable[[re.Match[str]], str] = _as_it_is
    refused: str | None = None


def _grammar(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)


_ARGON2 = (
    r"\$argon2(?:id|i|d)\$(?:v=\d{1,10}\$)?m=(?P<memory>\d{1,10}),t=(?P<passes>\d{1,10}),"
    r"p=(?P<lanes>\d{1,8})\$[A-Za-z0-9+/]+\$[A-Za-z0-9+/]+"
)
_BCRYPT = r"\$2[aby]?\$(?P<rounds>\d\d)\$[./A-Za-z0-9]{53}"
_ITERATIONS, _SALT = r"(?P<iterations>\d{1,10})", r"(?P<salt>[^$]{1,1024})"
_R_AND_P = r"(?P<r>\d{1,10})%s(?P<p>\d{1,10})"


def _pbkdf2_of_passlib(name: str, ident: str) -> Format:
    grammar = _grammar(rf"\${ident}\${_ITERATIONS}\$[./A-Za-z0-9]*\$[./A-Za-z0-9]+")
    return Format(f"passlib PBKDF2-{name}", (f"${ident}$",), grammar, "pbkdf2")


def _pbkdf2_of_django(name: str, digest: str) -> Format:
    lower = name.lower()
    grammar = _grammar(rf"pbkdf2_(?P<hash>{lower})\${_ITERATIONS}\${_SALT}\$(?P<digest64>{digest})")
    begins = (f"pbkdf2_{lower}$",)
    return Format(f"Django PBKDF2-{name}", begins, grammar, "pbkdf2", _as_pbkdf2_of_libpass)


def _pbkdf2_of_werkzeug(name: str, size: int) -> Format:
    lower = name.lower()
    digest = rf"(?P<digest16>[0-9a-f]{{{size}}})"
    grammar = _grammar(rf"pbkdf2:(?P<hash>{lower}):{_ITERATIONS}\${_SALT}\${digest}")
    begins = (f"pbkdf2:{lower}:",)
    return Format(f"Werkzeug PBKDF2-{name}", begins, grammar, "pbkdf2", _as_pbkdf2_of_libpass)


FORMATS: Sequence[Format] = (
    Format("Argon2", ("$argon2id$", "$argon2i$", "$argon2d$"), _grammar(_ARGON2), "argon2"),
    Format("bcrypt", ("$2b$", "$2a$", "$2y$", "$2$"), _grammar(_BCRYPT), "bcrypt"),
    Format(
        "bcrypt $2x$",
        ("$2x$", "bcrypt$$2x$", "bcrypt_sha256$$2x$"),
        _grammar(_BCRYPT),
        "bcrypt",
        refused="It is of a bcrypt that computed wrongly (crypt_blowfish before 1.1)",
    ),
    Format(
        "passlib bcrypt-SHA256",
        ("$bcrypt-sha256$",),
        _grammar(
            r"\$bcrypt-sha256\$(?:v=2,t=2b,r=|2[ab],)(?P<rounds>\d{1,2})"
            r"\$[./A-Za-z0-9]{22}\$[./A-Za-z0-9]{31}"
        ),
        "bcrypt",
    ),
    _pbkdf2_of_passlib("SHA1", "pbkdf2"),
    _pbkdf2_of_passlib("SHA256", "pbkdf2-sha256"),
    _pbkdf2_of_passlib("SHA512", "pbkdf2-sha512"),
    Format(
        "passlib scrypt",
        ("$scrypt$",),
        _grammar(
            rf"\$scrypt\$ln=(?P<ln>\d{{1,2}}),r={_R_AND_P % ',p='}"
            r"\$(?P<salt64>[A-Za-z0-9+/]*)\$(?P<digest64>[A-Za-z0-9+/]{43})"
        ),
        "scrypt",
    ),
    _pbkdf2_of_django("SHA256", "[A-Za-z0-9+/]{43}="),
    _pbkdf2_of_django("SHA1", "[A-Za-z0-9+/]{27}="),
    Format(
        "Django Argon2",
        ("argon2$argon2id$", "argon2$argon2i$"),
        _grammar(f"argon2(?P<libpass>{_ARGON2})"),
        "argon2",
        _without_prefix,
    ),
    Format(
        "Django bcrypt-SHA256",
        ("bcrypt_sha256$$2b$", "bcrypt_sha256$$2a$"),
        _grammar(rf"bcrypt_sha256\${_BCRYPT}"),
        "bcrypt",
    ),
    Format(
        "Django bcrypt",
        ("bcrypt$$2b$", "bcrypt$$2a$", "bcrypt$$2y$"),
        _grammar(rf"bcrypt\$(?P<libpass>{_BCRYPT})"),
        "bcrypt",
        _without_prefix,
    ),
    Format(
        "Django scrypt",
        ("scrypt$",),
        _grammar(
            rf"scrypt\$(?P<n>\d{{1,10}})\${_SALT}\${_R_AND_P % '[$]'}"
            r"\$(?P<digest64>[A-Za-z0-9+/]{86}==)"
        ),
        "scrypt",
    ),
    Format(
        "Werkzeug scrypt",
        ("scrypt:",),
        _grammar(
            rf"scrypt:(?P<n>\d{{1,10}}):{_R_AND_P % ':'}\${_SALT}\$(?P<digest16>[0-9a-f]{{128}})"
        ),
        "scrypt",
    ),
    _pbkdf2_of_werkzeug("SHA1", 40),
    _pbkdf2_of_werkzeug("SHA256", 64),
    _pbkdf2_of_werkzeug("SHA512", 128),
)
"""Every format that is known here."""

LIBPASS_SCHEMES: Mapping[str, Sequence[str]] = {
    "argon2": ("argon2",),
    "pbkdf2": ("pbkdf2_sha256", "pbkdf2_sha1", "pbkdf2_sha512"),
    "bcrypt": ("bcrypt", "bcrypt_sha256", "django_bcrypt_sha256"),
}
"""The schemes by which libpass checks the hashes of an algorithm."""


@dataclass(frozen=True, slots=True)
class StoredHash:
    """A stored hash that follows its format.

    Attributes:
        format: Its format.
        match: Its parts.
    """

    format: Format
    match: re.Match[str]

    @property
    def notation(self) -> str:
        """The hash as libpass reads it."""
        return self.format.notation(self.match)

    @property
    def costs(self) -> Mapping[str, int]:
        """What a check costs, by the names of `CostCaps`."""
        algorithm = self.format.algorithm
        if algorithm == "scrypt":
            n, r, p = self._scrypt_numbers()
            return {"scrypt_memory": r * (n + p + 2) // 8, "scrypt_work": n * r * p}
        if algorithm != "argon2":
            cap = {"bcrypt": "bcrypt_rounds", "pbkdf2": "pbkdf2_iterations"}[algorithm]
            return {cap: int(self.match[cap.partition("_")[2]])}
        memory, passes, lanes = (int(self.match[each]) for each in ("memory", "passes", "lanes"))
        return {
            "argon2_memory": memory,
            "argon2_work": memory * passes,
            "argon2_lanes": lanes,
        }

    def matches_scrypt(self, password: str) -> bool:
        """Return whether a password is that of a hash of scrypt.

        Raises:
            MemoryError: There was no memory for it.
        """
        n, r, p = self._scrypt_numbers()
        salt, digest = _salt_and_digest(self.match)
        # What OpenSSL counts; by default it allows 32 MiB, which is less than Werkzeug's hashes take.
        memory = 128 * r * (n + p + 2)
        try:
            computed = hashlib.scrypt(
                password.encode(), salt=salt, n=n, r=r, p=p, maxmem=memory, dklen=len(digest)
            )
        except ValueError as error:
            # The numbers are those of scrypt, so this is how OpenSSL reports that it got no memory.
            raise MemoryError("scrypt got no memory") from error
        return hmac.compare_digest(computed, digest)

    @property
    def is_computable(self) -> bool:
        """Its numbers are such that scrypt is defined for them (RFC 7914, section 2)."""
        if self.format.algorithm != "scrypt":
            return True
        n, r, p = self._scrypt_numbers()
        return n > 1 and n & (n - 1) == 0 and n.bit_length() <= 16 * r and 0 < r * p < 1 << 30

    def _scrypt_numbers(self) -> tuple[int, int, int]:
        parts = self.match.groupdict()
        n = 1 << int(parts["ln"]) if "ln" in parts else int(parts["n"])
        return n, int(parts["r"]), int(parts["p"])


def _salt_and_digest(match: re.Match[str]) -> tuple[bytes, bytes]:
    parts = match.groupdict()
    salt = parts["salt"].encode() if "salt" in parts else _of_base64(parts["salt64"])
    if "digest16" in parts:
        return salt, bytes.fromhex(parts["digest16"])
    return salt, _of_base64(parts["digest64"])


def _of_base64(text: str) -> bytes:
    """Decode with or without padding, which libpass leaves out."""
    return base64.b64decode(text + "=" * (-len(text) % 4))


def format_of(stored: str) -> Format | None:
    """Return the format of a stored hash by its beginning; `None` if it has no format known here."""
    return next((each for each in FORMATS if stored.startswith(each.begins)), None)


def parse(stored: str) -> StoredHash | None:
    """Return a stored hash in its parts; `None` if it does not follow a format known here."""
    its_format = format_of(stored)
    match = its_format.grammar.fullmatch(stored) if its_format else None
    if its_format is None or match is None:
        return None
    parsed = StoredHash(its_format, match)
    return parsed if parsed.is_computable else None


def scheme_of(stored: str) -> str | None:
    """Return what people call the format of a stored hash, such as ``"Django PBKDF2-SHA256"``.

    Whether a password can be checked against it is another question, see `PasswordHasher.obstacle`.

    Returns:
        One of the names in ``docs/service.md``; ``None`` if it has no format that is known here.
    """
    its_format = format_of(stored)
    return its_format.name if its_format else None


def unusable_hash() -> str:
    """Return a stored value that no password matches, different each time."""
    return _UNUSABLE_PREFIX + secrets.token_urlsafe(24)


def is_usable_hash(hashed: str | None) -> bool:
    """Return whether some password could match a stored value."""
    return bool(hashed) and not str(hashed).startswith(_UNUSABLE_PREFIX)


def is_hash(value: str) -> bool:
    """Return whether a value is a hash of a format known here, or is made to match no password.

    The second kind is that of `unusable_hash`, or Django's: a password may begin with "!", too.
    """
    return format_of(value) is not None or _UNUSABLE.fullmatch(value) is not None
