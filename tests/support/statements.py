"""The statements that reach a database, to be counted and to fail."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from tortoise.context import TortoiseContext

from tests.support.database import connection_of, root, transaction_class

_sending: ContextVar[bool] = ContextVar("sending", default=False)


@contextmanager
def statements(
    context: TortoiseContext, *, fail_at: int | None = None, error: Exception | None = None
) -> Iterator[list[str]]:
    """Record every statement sent to the database, ``BEGIN`` and ``COMMIT`` included.

    Args:
        context: The database.
        fail_at: Raise *error* instead of sending this one, counted from 1.
        error: What to raise.
    """
    seen: list[str] = []

    def watch(patch: pytest.MonkeyPatch, owner: type, method: str, text: str | None) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        async def watched(self: object, *args: Any, **kwargs: Any) -> Any:
            if _sending.get():  # some clients send by another one of these methods
                return await original(self, *args, **kwargs)
            seen.append(text or args[0])
            if len(seen) == fail_at and error is not None:
                raise error
            sending = _sending.set(True)
            try:
                return await original(self, *args, **kwargs)
            finally:
                _sending.reset(sending)

        patch.setattr(owner, method, watched)

    client = type(connection_of(context))
    transaction = transaction_class(connection_of(context))
    with pytest.MonkeyPatch.context() as patch:
        for method in ("execute_insert", "execute_many", "execute_query", "execute_query_dict"):
            watch(patch, client, method, None)
        watch(patch, transaction, "begin", "BEGIN")
        watch(patch, transaction, "commit", "COMMIT")
        yield seen


@contextmanager
def every_statement(context: TortoiseContext) -> Iterator[list[str]]:
    """Record every statement, including those that write many rows at once in a transaction."""
    wrapper = transaction_class(root(context))
    execute_many = wrapper.execute_many

    async def noted(self: object, query: str, values: list[Any]) -> None:
        seen.append(query)
        await execute_many(self, query, values)

    with statements(context) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper, "execute_many", noted)
        yield seen
