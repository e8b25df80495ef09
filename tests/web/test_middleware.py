"""The middleware: what a request sets, what it leaves, and what it adds to the answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given

from tests.support.requests import PEER, SCOPES, Scope, request
from tortoise_auth import RequestContext
from tortoise_auth.context import request_context
from tortoise_auth.exceptions import ConfigurationError
from tortoise_auth.web import RequestContextMiddleware

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Message = dict[str, Any]
EMPTY = RequestContext()


async def no_message(*_: object) -> Message:
    raise AssertionError("nothing is read")


async def dropped(_: Message) -> None:
    """Take what is sent."""


class Answering:
    """An application that notes its context and answers with *messages*."""

    def __init__(self, *messages: Message) -> None:
        self.messages = messages
        self.contexts: list[RequestContext] = []

    async def __call__(
        self, scope: Scope, receive: object, send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Serve one connection."""
        self.contexts.append(request_context.get(EMPTY))
        for message in self.messages:
            await send(message)


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/x")]}
BODY = {"type": "http.response.body", "body": b""}


async def call(scope: Scope, app: Answering | None = None, **settings: Any) -> list[Message]:
    """Send one request, and return what comes back."""
    back: list[Message] = []

    async def send(message: Message) -> None:
        back.append(message)

    await RequestContextMiddleware(app or Answering(START, BODY), **settings)(
        scope, no_message, send
    )
    return back


def ids(message: Message) -> list[bytes]:
    return [value for name, value in message["headers"] if name.lower() == b"x-request-id"]


async def context_of(scope: Scope, **settings: Any) -> RequestContext:
    app = Answering()
    await call(scope, app, **settings)
    (context,) = app.contexts
    return context


class TestContext:
    async def test_is_that_of_the_request(self) -> None:
        """Address, agent and id are known below the middleware."""
        context = await context_of(
            request(("x-forwarded-for", "1.2.3.4, 203.0.113.7"), ("user-agent", "Firefox")),
            trusted_hops=1,
        )
        assert (context.ip, context.user_agent) == ("203.0.113.7", "Firefox")
        assert UUID.fullmatch(context.request_id or "")

    async def test_named_header(self) -> None:
        """The header that was named is read."""
        scope = request(("forwarded", "for=203.0.113.7"), ("x-forwarded-for", "1.2.3.4"))
        settings = {"trusted_hops": 1, "address_header": "forwarded"}
        assert (await context_of(scope, **settings)).ip == "203.0.113.7"
        assert (await context_of(scope)).ip == PEER

    @pytest.mark.parametrize("kind", ["http", "websocket"])
    async def test_is_reset(self, kind: str) -> None:
        """After a request the value is what it was before, although it ran in the same task."""
        outside = RequestContext(request_id="outside")
        token = request_context.set(outside)
        try:
            assert await context_of(request(kind=kind)) != outside
            assert request_context.get() is outside
        finally:
            request_context.reset(token)
        assert request_context.get(EMPTY) is EMPTY

    async def test_is_reset_after_a_failure(self) -> None:
        """An application that fails or is cancelled leaves nothing behind."""
        for failure in (ValueError(), asyncio.CancelledError()):

            async def fails(*_: object, failure: BaseException = failure) -> None:
                raise failure

            with pytest.raises(type(failure)):
                await RequestContextMiddleware(fails)(request(), no_message, dropped)
            assert request_context.get(EMPTY) is EMPTY

    async def test_is_seen_by_tasks(self) -> None:
        """A task that the application starts has the context of its request for good."""
        tasks: list[asyncio.Task[RequestContext]] = []

        async def later() -> RequestContext:
            await asyncio.sleep(0)
            return request_context.get(EMPTY)

        async def starts(*_: object) -> None:
            tasks.append(asyncio.create_task(later()))

        await RequestContextMiddleware(starts)(request(), no_message, dropped)
        assert (await tasks[0]).ip == PEER

    async def test_lifespan(self) -> None:
        """A lifespan is no request."""
        app = Answering({"type": "lifespan.startup.complete"})
        assert await call({"type": "lifespan"}, app) == [{"type": "lifespan.startup.complete"}]
        assert app.contexts == [EMPTY]

    @given(SCOPES)
    def test_any_request(self, scope: Scope) -> None:
        """Whatever comes, it is served, with one id."""
        (start, _) = asyncio.run(call(scope, trusted_hops=1, trust_request_id=True))
        assert len(ids(start)) == 1


class TestRequestId:
    @pytest.mark.parametrize(
        "message",
        [
            START,
            {"type": "http.response.start", "status": 204},
            {"type": "websocket.accept"},
            {"type": "websocket.http.response.start", "status": 403, "headers": []},
        ],
        ids=["start", "start without headers", "accept", "denial"],
    )
    async def test_is_in_the_answer(self, message: Message) -> None:
        """The id of the context is a header of the answer, whatever kind it is."""
        before = {**message}
        app = Answering(message)
        (start,) = await call(request(), app)
        assert ids(start) == [(app.contexts[0].request_id or "").encode()]
        assert message == before

    async def test_other_messages(self) -> None:
        """No other message is touched."""
        _, body = await call(request())
        assert body is BODY

    async def test_of_the_application(self) -> None:
        """A header that the application has set stays alone."""
        start = {**START, "headers": [(b"X-Request-ID", b"own")]}
        (sent,) = await call(request(), Answering(start))
        assert ids(sent) == [b"own"]

    @pytest.mark.parametrize(
        ("given", "taken"),
        [
            (["abc"], True),
            (["A.b_c-1:2"], True),
            (["x" * 128], True),
            (["x" * 129], False),
            ([""], False),
            (["a b"], False),
            (["a\n"], False),
            (["a\r\nSet-Cookie: x=y"], False),
            (["é"], False),
            (["a", "a"], False),
            ([], False),
        ],
    )
    async def test_from_outside(self, given: list[str], taken: bool) -> None:
        """An id of the request is taken only where that is wanted, and only a harmless one."""
        scope = request(*(("x-request-id", value) for value in given))
        trusted = await context_of(scope, trust_request_id=True)
        assert (trusted.request_id in given) is taken
        assert taken or UUID.fullmatch(trusted.request_id or "")
        assert UUID.fullmatch((await context_of(scope)).request_id or "")

    async def test_differs(self) -> None:
        """Each request has its own."""
        assert len({(await context_of(request())).request_id for _ in range(50)}) == 50


@pytest.mark.parametrize(
    "settings",
    [
        *({"trusted_hops": hops} for hops in (-1, 101, True, 1.0, "1", None)),
        *({"address_header": name} for name in ("", "X-Forwarded-For", "a b", "a:", "ä", None, 7)),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    """A setting that cannot be meant is refused when the application is made."""
    with pytest.raises(ConfigurationError, match=r"^(trusted_hops|address_header)="):
        RequestContextMiddleware(Answering(), **settings)
