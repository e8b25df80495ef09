"""Keys for signing, made once in a run."""

from __future__ import annotations

import functools
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tortoise_auth import SigningKey
from tortoise_auth.keys import Algorithm


@functools.cache
def pem(algorithm: Algorithm, public: bool = False) -> bytes:
    """Return the key of an algorithm that all tests share."""
    private: Any
    if algorithm == "RS256":
        private = rsa.generate_private_key(65537, 2048)
    elif algorithm == "ES256":
        private = ec.generate_private_key(ec.SECP256R1())
    else:
        private = ed25519.Ed25519PrivateKey.generate()
    if public:
        loaded = SigningKey(pem(algorithm), algorithm=algorithm).verifying
        text: bytes = loaded.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return text
    made: bytes = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return made
