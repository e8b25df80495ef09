"""The servers that some tests need, each a ``service`` mark: a test is skipped where none listens."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit

import pytest

POSTGRES_URL = os.environ.get(
    "TORTOISE_AUTH_TEST_POSTGRES", "postgres://postgres@127.0.0.1:5432/test"
)
PSYCOPG_URL = POSTGRES_URL.replace("postgres://", "psycopg://", 1)
MARIADB_URL = os.environ.get("TORTOISE_AUTH_TEST_MARIADB", "mysql://root@127.0.0.1:3306/test")
REDIS_URL = os.environ.get("TORTOISE_AUTH_TEST_REDIS", "redis://127.0.0.1:6379")
NATS_URL = os.environ.get("TORTOISE_AUTH_TEST_NATS", "nats://127.0.0.1:4222")
RABBIT_URL = os.environ.get("TORTOISE_AUTH_TEST_RABBIT", "amqp://guest:guest@127.0.0.1:5672/")

LEFT_OUT = "TORTOISE_AUTH_TEST_DB"
"""Set to ``sqlite`` it leaves every server out, even those that listen: ``make check DB=sqlite``."""

needs_postgres = pytest.mark.service("PostgreSQL", POSTGRES_URL)
needs_mariadb = pytest.mark.service("MariaDB", MARIADB_URL)
needs_redis = pytest.mark.service("Redis", REDIS_URL)
needs_nats = pytest.mark.service("NATS", NATS_URL)
needs_rabbit = pytest.mark.service("RabbitMQ", RABBIT_URL)


@functools.cache
def missing(name: str, url: str) -> str | None:
    """Return why a test that needs a service is skipped, or ``None`` where a server listens."""
    if only := os.environ.get(LEFT_OUT):
        if only != "sqlite":
            raise pytest.UsageError(f"{LEFT_OUT} is 'sqlite' or empty, not {only!r}")
        return f"{name} is left out, because {LEFT_OUT} is sqlite"
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 0)
    try:
        with socket.create_connection(address, timeout=1):
            return None
    except OSError:
        return f"no {name} listens at {address[0]}:{address[1]}"
