"""Passwords: how they are hashed, and which ones are accepted."""

from tortoise_auth.passwords.formats import (
    CostCaps,
    is_hash,
    is_usable_hash,
    scheme_of,
    unusable_hash,
)
from tortoise_auth.passwords.hashing import (
    MAX_PASSWORD_LENGTH,
    OWASP_ARGON2_FLOOR,
    PasswordHasher,
    Verification,
    input_failures,
)
from tortoise_auth.passwords.policy import COMMON_PASSWORDS, PasswordPolicy

__all__ = [
    "COMMON_PASSWORDS",
    "MAX_PASSWORD_LENGTH",
    "OWASP_ARGON2_FLOOR",
    "CostCaps",
    "PasswordHasher",
    "PasswordPolicy",
    "Verification",
    "input_failures",
    "is_hash",
    "is_usable_hash",
    "scheme_of",
    "unusable_hash",
]
