"""Events over real brokers: published from the outbox, shared by consumers, kept while one is down."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias
from urllib.parse import urlsplit
from uuid import UUID, uuid4, uuid5

import aio_pika
import nats
import pytest
from faststream import AckPolicy, Context, StreamMessage
from faststream.nats import ConsumerConfig, JStream, NatsBroker, PullSub, TestNatsBroker
from faststream.rabbit import (
    Channel,
    ExchangeType,
    QueueType,
    RabbitBroker,
    RabbitExchange,
    RabbitQueue,
    TestRabbitBroker,
)
from faststream.redis import RedisBroker, StreamSub, TestRedisBroker
from redis.asyncio import Redis
from tortoise.context import TortoiseContext
from typing_extensions import override

from tests.support.accounts import EMAIL, PASSWORD, SECRET
from tests.support.app import User
from tests.support.services import (
    NATS_URL,
    RABBIT_URL,
    REDIS_URL,
    needs_nats,
    needs_rabbit,
    needs_redis,
)
from tests.support.snippets import run
from tortoise_auth import (
    AbstractUser,
    AuthConfig,
    AuthService,
    ConfigurationError,
    EventEmitter,
)
from tortoise_auth.events import (
    Event,
    EventError,
    SubscriptionError,
    SubscriptionWarning,
    UserLogin,
    UserLoginFailed,
    UserLogout,
)
from tortoise_auth.events import emitter as library_emitter
from tortoise_auth.events.event_emitter import deliverer_of
from tortoise_auth.events.formats import cloudevent
from tortoise_auth.integrations.faststream import (
    CONTENT_TYPE,
    CloudEventError,
    event_from,
    feed,
    publish_events,
)
from tortoise_auth.models import OutboxEntry
from tortoise_auth.testing import FakeClock, capture, isolated

ROOT = Path(__file__).parent.parent.parent
SOURCE = "https://shop.example.com/auth"
BOB = "bob@example.com"
LOGGER = logging.getLogger("tests.brokers")

Receiver: TypeAlias = Callable[[Event], Awaitable[None]]


# ---- the brokers ---------------------------------------------------------------------------------


class Place:
    """A destination of a test's own on one kind of server.

    Attributes:
        url: The server.
        name: Of the stream or exchange.
    """

    url: ClassVar[str]

    def __init__(self) -> None:
        self.name = f"test_{uuid4().hex}"

    def broker(self, url: str | None = None) -> Any:
        """Return a broker that reconnects fast."""
        raise NotImplementedError

    def publisher(self, broker: Any) -> Any:
        """Return what sends to this place."""
        raise NotImplementedError

    def subscribe(
        self,
        broker: Any,
        receive: Callable[..., Awaitable[None]],
        *,
        group: str,
        consumer: str = "one",
        redeliver: bool = False,
        ack_policy: AckPolicy = AckPolicy.NACK_ON_ERROR,
    ) -> None:
        """Let a consumer of a group receive one message at a time.

        Args:
            redeliver: It also receives, soon, what another one of the group did not acknowledge.
        """
        raise NotImplementedError

    async def left(self, group: str) -> int:
        """Return how many messages a group without consumers has not acknowledged."""
        raise NotImplementedError

    async def remove(self) -> None:
        """Remove what the test has made on the server."""
        raise NotImplementedError


class RedisPlace(Place):
    url = REDIS_URL

    @override
    def broker(self, url: str | None = None) -> RedisBroker:
        return RedisBroker(url or self.url, logger=LOGGER, graceful_timeout=1)

    @override
    def publisher(self, broker: RedisBroker) -> Any:
        return broker.publisher(stream=self.name)

    @override
    def subscribe(
        self,
        broker: RedisBroker,
        receive: Callable[..., Awaitable[None]],
        *,
        group: str,
        consumer: str = "one",
        redeliver: bool = False,
        ack_policy: AckPolicy = AckPolicy.NACK_ON_ERROR,
    ) -> None:
        idle: list[int | None] = [None, 100] if redeliver else [None]
        for min_idle_time in idle:
            stream = StreamSub(
                self.name,
                group=group,
                consumer=consumer,
                max_records=1,
                polling_interval=20,
                min_idle_time=min_idle_time,
            )
            broker.subscriber(stream=stream, ack_policy=ack_policy)(receive)

    @override
    async def left(self, group: str) -> int:
        async with Redis.from_url(self.url) as redis:
            groups = await redis.xinfo_groups(self.name)
            (state,) = [each for each in groups if each["name"] == group.encode()]
            return int(state["pending"]) + int(state["lag"])

    @override
    async def remove(self) -> None:
        async with Redis.from_url(self.url) as redis:
            await redis.delete(self.name)


class NatsPlace(Place):
    url = NATS_URL

    @override
    def broker(self, url: str | None = None) -> NatsBroker:
        return NatsBroker(
            url or self.url,
            logger=LOGGER,
            graceful_timeout=1,
            reconnect_time_wait=0,
            max_reconnect_attempts=-1,
        )

    @override
    def publisher(self, broker: NatsBroker) -> Any:
        return broker.publisher(f"{self.name}.events", stream=JStream(self.name), timeout=5)

    @override
    def subscribe(
        self,
        broker: NatsBroker,
        receive: Callable[..., Awaitable[None]],
        *,
        group: str,
        consumer: str = "one",
        redeliver: bool = False,
        ack_policy: AckPolicy = AckPolicy.NACK_ON_ERROR,
    ) -> None:
        broker.subscriber(
            f"{self.name}.events",
            stream=JStream(self.name),
            durable=group,
            pull_sub=PullSub(timeout=0.2),
            config=ConsumerConfig(ack_wait=0.5) if redeliver else None,
            ack_policy=ack_policy,
        )(receive)

    @override
    async def left(self, group: str) -> int:
        async with await nats.connect(self.url) as client:
            info = await client.jetstream().consumer_info(self.name, group)
            return int(info.num_pending or 0) + int(info.num_ack_pending or 0)

    async def stored(self) -> int:
        """Return how many messages the stream holds."""
        async with await nats.connect(self.url) as client:
            info = await client.jetstream().stream_info(self.name)
            return info.state.messages

    @override
    async def remove(self) -> None:
        async with await nats.connect(self.url) as client:
            jetstream = client.jetstream()
            if self.name in [each.config.name for each in await jetstream.streams_info()]:
                await jetstream.delete_stream(self.name)


class RabbitPlace(Place):
    url = RABBIT_URL

    def __init__(self) -> None:
        super().__init__()
        self.exchange = RabbitExchange(self.name, type=ExchangeType.FANOUT, durable=True)
        self.queues: set[str] = set()

    def queue(self, group: str) -> RabbitQueue:
        """Return the queue of a group."""
        self.queues.add(f"{self.name}.{group}")
        return RabbitQueue(f"{self.name}.{group}", durable=True)

    @override
    def broker(self, url: str | None = None) -> RabbitBroker:
        return RabbitBroker(
            url or self.url, logger=LOGGER, graceful_timeout=1, reconnect_interval=0.02
        )

    @override
    def publisher(self, broker: RabbitBroker) -> Any:
        return broker.publisher(exchange=self.exchange)

    @override
    def subscribe(
        self,
        broker: RabbitBroker,
        receive: Callable[..., Awaitable[None]],
        *,
        group: str,
        consumer: str = "one",
        redeliver: bool = False,
        ack_policy: AckPolicy = AckPolicy.NACK_ON_ERROR,
    ) -> None:
        broker.subscriber(
            self.queue(group),
            self.exchange,
            channel=Channel(prefetch_count=1),
            ack_policy=ack_policy,
        )(receive)

    @override
    async def left(self, group: str) -> int:
        async with await aio_pika.connect(self.url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(f"{self.name}.{group}", passive=True)
            return queue.declaration_result.message_count or 0

    @override
    async def remove(self) -> None:
        async with await aio_pika.connect(self.url) as connection:
            channel = await connection.channel()
            for queue in self.queues:
                await channel.queue_delete(queue)
            await channel.exchange_delete(self.name)


PLACES = [
    pytest.param(RedisPlace, id="redis", marks=needs_redis),
    pytest.param(NatsPlace, id="nats", marks=needs_nats),
    pytest.param(RabbitPlace, id="rabbit", marks=needs_rabbit),
]


@pytest.fixture(params=PLACES)
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """A place on every server there is, one test for each."""
    made: Place = request.param()
    yield made
    await made.remove()


class Proxy:
    """Forwards TCP connections to a server until it is cut; then nothing listens there.

    Args:
        url: The server.
    """

    def __init__(self, url: str) -> None:
        self._server_url = urlsplit(url)
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """The same server through this proxy."""
        parts = self._server_url
        return parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{self._port}").geturl()

    async def __aenter__(self) -> Proxy:
        await self.restore()
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.cut()

    async def restore(self) -> None:
        """Listen, at the same port as before."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Stop listening, and break every connection."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self._server_url.hostname, self._server_url.port
        behind, ahead = await asyncio.open_connection(host, port)
        self._writers |= {writer, ahead}
        try:
            await asyncio.gather(_pump(reader, ahead), _pump(behind, writer))
        finally:
            self._writers -= {writer, ahead}


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        return
    finally:
        writer.transport.abort()


# ---- the services --------------------------------------------------------------------------------


class Inbox:
    """What a consumer received, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    @property
    def ids(self) -> list[UUID]:
        """Their ids."""
        return [event.id for event in self.events]

    async def take(self, event: Event) -> None:
        """Receive one: the handler."""
        self.events.append(event)
        self._more.set()

    async def until(self, count: int) -> None:
        """Wait for so many events, with and without repetitions."""
        async with asyncio.timeout(20):
            while len(set(self.ids)) < count:
                self._more.clear()
                await self._more.wait()


@asynccontextmanager
async def running(broker: Any) -> AsyncIterator[Any]:
    async with broker:
        await broker.start()
        yield broker


@asynccontextmanager
async def consuming(
    place: Place,
    handler: Receiver,
    *,
    url: str | None = None,
    group: str = "audit",
    consumer: str = "one",
    redeliver: bool = False,
) -> AsyncIterator[None]:
    """Another service: an emitter of its own, fed from the broker."""
    emitter = EventEmitter(propagate_errors=True)
    emitter.on("*", handler)
    broker = place.broker(url)
    place.subscribe(broker, feed(emitter), group=group, consumer=consumer, redeliver=redeliver)
    async with running(broker):
        yield


@asynccontextmanager
async def publishing(
    place: Place, emitter: EventEmitter, *, url: str | None = None, patience: float = 10
) -> AsyncIterator[None]:
    """This service: its logins are published."""
    broker = place.broker(url)
    publish_events(emitter, place.publisher(broker), UserLogin, source=SOURCE, timeout=patience)
    async with running(broker):
        yield


@pytest.fixture
async def ada(sqlite: TortoiseContext) -> User:
    return await User.create_user(email=EMAIL, password=PASSWORD)


@pytest.fixture
async def bob(sqlite: TortoiseContext) -> User:
    return await User.create_user(email=BOB, password=PASSWORD)


async def logins(auth: AuthService[User], *emails: str) -> list[Event]:
    """Log in, and return the events of it."""
    with capture(auth.emitter) as events:
        for email in emails:
            await auth.login(email, PASSWORD)
    return list(events)


def by_user(events: Iterable[Event]) -> dict[str | None, list[UUID]]:
    """Return the ids of the events of each user in order, repetitions left out."""
    published: dict[str | None, list[UUID]] = {}
    for event in events:
        ids = published.setdefault(event.subject_id, [])
        if event.id not in ids:
            ids.append(event.id)
    return published


# ---- the tests -----------------------------------------------------------------------------------


class TestRoundTrip:
    async def test_typed_event(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A login here is a typed event in another service: equal to it, without the live user."""
        inbox = Inbox()
        async with consuming(place, inbox.take), publishing(place, emitter):
            emitted = await logins(auth, EMAIL)
            assert await auth.relay().drain() == 1
            await inbox.until(1)
        assert inbox.events == emitted
        (event,) = inbox.events
        assert isinstance(event, UserLogin)
        assert event.subject_id == str(ada.pk)
        assert event.user is None
        assert await OutboxEntry.all().count() == 0

    async def test_running_relay(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """With a relay in the application the event is on its way when the login has returned."""
        inbox = Inbox()
        relay = auth.relay(poll_interval=timedelta(hours=1))
        async with consuming(place, inbox.take), publishing(place, emitter), relay:
            emitted = await logins(auth, EMAIL)
            await inbox.until(1)
        assert inbox.events == emitted

    async def test_message(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """The message is a CloudEvent in structured mode, as any consumer may read it."""
        received: asyncio.Future[StreamMessage[Any]] = asyncio.get_running_loop().create_future()

        async def look(message: Annotated[StreamMessage[Any], Context()]) -> None:
            received.set_result(message)

        consumer = place.broker()
        place.subscribe(consumer, look, group="audit")
        async with running(consumer), publishing(place, emitter):
            (emitted,) = await logins(auth, EMAIL)
            await auth.relay().drain()
            message = await asyncio.wait_for(received, 20)

        assert message.content_type == CONTENT_TYPE == "application/cloudevents+json"
        assert message.correlation_id == str(emitted.id)
        assert json.loads(message.body) == cloudevent(emitted, SOURCE)
        assert event_from(message) == event_from(message.body) == emitted
        if isinstance(place, NatsPlace):
            assert message.headers["Nats-Msg-Id"] == str(uuid5(emitted.id, "broker"))
        if isinstance(place, RabbitPlace):
            assert message.message_id == str(uuid5(emitted.id, "broker"))
            assert message.raw_message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT

    async def test_chosen_events(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Only the chosen events are published, named by text or by class, each one time."""
        inbox, broker = Inbox(), place.broker()
        publish_events(
            emitter, place.publisher(broker), "user_login", UserLogin, UserLogout, source=SOURCE
        )
        async with consuming(place, inbox.take), running(broker):
            result = await auth.login(EMAIL, PASSWORD)
            await auth.set_password(ada, PASSWORD + "!", keep=result.session)
            await auth.logout(result.access_token)
            assert await auth.relay().drain() == 2
            await inbox.until(2)
        assert [event.name for event in inbox.events] == ["user_login", "user_logout"]


class TestGroups:
    async def test_share(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Two consumers of one group share the events, and neither gets one of the other's."""
        inboxes, busy = (Inbox(), Inbox()), asyncio.Barrier(2)

        def slow(inbox: Inbox) -> Receiver:
            async def handler(event: Event) -> None:
                await inbox.take(event)
                if len(inbox.events) == 1:  # neither goes on before the other has got one
                    async with asyncio.timeout(20):
                        await busy.wait()
                await both.take(event)

            return handler

        both = Inbox()
        async with (
            consuming(place, slow(inboxes[0]), consumer="one"),
            consuming(place, slow(inboxes[1]), consumer="two"),
            publishing(place, emitter),
        ):
            emitted = await logins(auth, *[EMAIL] * 10)
            await auth.relay().drain()
            await both.until(10)
        assert sorted(both.ids) == sorted(event.id for event in emitted)
        assert all(inbox.events for inbox in inboxes)
        assert await place.left("audit") == 0

    async def test_each_group(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Every group gets every event."""
        audit, mail = Inbox(), Inbox()
        async with (
            consuming(place, audit.take, group="audit"),
            consuming(place, mail.take, group="mail"),
            publishing(place, emitter),
        ):
            emitted = await logins(auth, EMAIL, EMAIL)
            await auth.relay().drain()
            await audit.until(2)
            await mail.until(2)
        assert audit.events == mail.events == emitted


class TestAcknowledgement:
    async def test_after_failure(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """An event is delivered again until its handler succeeds."""
        attempts: list[UUID] = []
        inbox = Inbox()

        async def flaky(event: Event) -> None:
            attempts.append(event.id)
            if len(attempts) == 1:
                raise OSError("the disk is full")
            await inbox.take(event)

        async with consuming(place, flaky, redeliver=True), publishing(place, emitter):
            (emitted,) = await logins(auth, EMAIL)
            await auth.relay().drain()
            await inbox.until(1)
        assert attempts == [emitted.id, emitted.id]
        assert inbox.events == [emitted]
        assert await place.left("audit") == 0

    async def test_of_a_consumer_that_dies(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A message is acknowledged after its handler returns: until then another consumer gets it."""
        entered = asyncio.Event()
        inbox = Inbox()

        async def hang(event: Event) -> None:
            entered.set()
            await asyncio.Event().wait()

        async with (
            Proxy(place.url) as proxy,
            publishing(place, emitter),
            consuming(place, hang, url=proxy.url, consumer="one", redeliver=True),
        ):
            emitted = await logins(auth, EMAIL)
            await auth.relay().drain()
            await asyncio.wait_for(entered.wait(), 20)
            await proxy.cut()
            async with consuming(place, inbox.take, consumer="two", redeliver=True):
                await inbox.until(1)
            await proxy.restore()
        assert inbox.events == emitted

    async def test_of_a_malformed_message(
        self, place: Place, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A message that is no event is refused, and the next one is received."""
        inbox, far = Inbox(), EventEmitter(propagate_errors=True)
        far.on("*", inbox.take)
        receive, refused = feed(far), list[Exception]()

        async def receive_and_note(body: object) -> None:
            try:
                await receive(body)
            except Exception as error:
                refused.append(error)
                raise

        consumer, broker = place.broker(), place.broker()
        place.subscribe(
            consumer, receive_and_note, group="audit", ack_policy=AckPolicy.REJECT_ON_ERROR
        )
        publisher = place.publisher(broker)
        publish_events(emitter, publisher, "user_login", source=SOURCE)
        async with running(consumer), running(broker):
            await publisher.publish(b"\xff not JSON")
            await publisher.publish(b'{"specversion": "1.0"}')
            emitted = await logins(auth, EMAIL)
            await auth.relay().drain()
            await inbox.until(1)
        assert [type(error) for error in refused] == [CloudEventError, CloudEventError]
        assert inbox.events == emitted


class TestOrder:
    async def test_per_user(
        self, place: Place, auth: AuthService[User], ada: User, bob: User, emitter: EventEmitter
    ) -> None:
        """Two concurrent relays publish the events of each user in order."""
        inbox = Inbox()
        async with consuming(place, inbox.take), publishing(place, emitter):
            emitted = await logins(auth, *[EMAIL, BOB, BOB, EMAIL] * 10)
            relays = [auth.relay(batch_size=7, concurrency=5) for _ in range(2)]
            await asyncio.gather(*(relay.drain() for relay in relays))
            await auth.relay().drain()
            await inbox.until(40)
        assert by_user(inbox.events) == by_user(emitted)
        assert len(inbox.events) == 40


class TestBrokerDown:
    async def test_nothing_is_lost(
        self,
        place: Place,
        auth: AuthService[User],
        ada: User,
        bob: User,
        emitter: EventEmitter,
        clock: FakeClock,
    ) -> None:
        """While the broker is down users log in and rows wait; afterwards all are delivered in order."""
        inbox = Inbox()
        relay = auth.relay(max_attempts=1000)
        async with (
            consuming(place, inbox.take),
            Proxy(place.url) as proxy,
            publishing(place, emitter, url=proxy.url, patience=1),
        ):
            emitted = await logins(auth, EMAIL, BOB)
            assert await relay.drain() == 2
            await proxy.cut()

            for attempt in range(1, 4):
                emitted += await logins(auth, EMAIL, BOB)
                assert await relay.drain() == 0
                heads = await OutboxEntry.filter(attempts__gt=0).order_by("id")
                assert [row.attempts for row in heads] == [attempt, attempt]
                assert all(row.last_error for row in heads)
                clock.advance(timedelta(hours=2))
            assert await OutboxEntry.all().count() == 6
            await inbox.until(2)

            await proxy.restore()
            async with asyncio.timeout(30):
                while await OutboxEntry.all().exists():
                    clock.advance(timedelta(hours=2))
                    await relay.drain()
            await inbox.until(8)
        assert by_user(inbox.events) == by_user(emitted)

    async def test_not_started(
        self,
        place: Place,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        clock: FakeClock,
    ) -> None:
        """A relay without a connected broker fails and keeps the row for one that has it."""
        inbox, broker = Inbox(), place.broker()
        publish_events(emitter, place.publisher(broker), "user_login", source=SOURCE)
        async with consuming(place, inbox.take):
            emitted = await logins(auth, EMAIL)
            assert await auth.relay().drain() == 0
            assert (await OutboxEntry.get()).attempts == 1
            clock.advance(timedelta(hours=2))
            async with running(broker):
                assert await auth.relay().drain() == 1
                await inbox.until(1)
        assert inbox.events == emitted


@needs_nats
class TestJetStream:
    @pytest.fixture
    async def place(self) -> AsyncIterator[NatsPlace]:
        """A place on this server."""
        made = NatsPlace()
        yield made
        await made.remove()

    async def test_duplicates(self, place: NatsPlace, emitter: EventEmitter) -> None:
        """A delivery that is repeated leaves one message in the stream."""
        event = UserLogin(user=None, subject_id="7", session_id="s-1")  # type: ignore[type-var]
        async with publishing(place, emitter):
            (subscription,) = emitter.subscriptions("user_login", "durable")
            for _ in range(3):
                await deliverer_of(emitter).call(event, subscription)
        assert await place.stored() == 1

    async def test_two_subscriptions_in_one_stream(
        self, place: NatsPlace, emitter: EventEmitter
    ) -> None:
        """An event that two subscriptions publish to one stream is there twice."""
        broker = place.broker()
        stream = JStream(place.name)
        for name in ("audit", "größe\r\n" * 30):
            publisher = broker.publisher(f"{place.name}.{len(name)}", stream=stream)
            publish_events(emitter, publisher, "user_login", source=SOURCE, name=name)
        event = UserLogin(user=None, subject_id="7", session_id="s-1")  # type: ignore[type-var]
        async with running(broker):
            for subscription in emitter.subscriptions("user_login", "durable"):
                await deliverer_of(emitter).call(event, subscription)
        assert await place.stored() == 2

    async def test_no_stream(
        self, place: NatsPlace, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Where no stream keeps the subject, the row waits."""
        broker = place.broker()
        publisher = broker.publisher(place.name, stream=JStream(place.name, declare=False))
        publish_events(emitter, publisher, "user_login", source=SOURCE)
        async with running(broker):
            await auth.login(EMAIL, PASSWORD)
            assert await auth.relay().drain() == 0
        assert "NoStreamResponseError" in ((await OutboxEntry.get()).last_error or "")

    async def test_one_at_a_time(
        self, place: NatsPlace, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """With one message in flight the order outlasts failures, and max_deliver ends the attempts."""
        attempts: list[UUID] = []

        async def fail_first(event: Event) -> None:
            attempts.append(event.id)
            if event.id == attempts[0]:
                raise OSError("the disk is full")
            await inbox.take(event)

        inbox, far, consumer = Inbox(), EventEmitter(propagate_errors=True), place.broker()
        far.on("*", fail_first)
        consumer.subscriber(
            f"{place.name}.events",
            stream=JStream(place.name),
            durable="audit",
            pull_sub=PullSub(),
            config=ConsumerConfig(max_ack_pending=1, max_deliver=3),
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )(feed(far))
        async with running(consumer), publishing(place, emitter):
            first, second, third = await logins(auth, EMAIL, EMAIL, EMAIL)
            await auth.relay().drain()
            await inbox.until(2)
        assert attempts == [first.id] * 3 + [second.id, third.id]


@needs_rabbit
class TestRabbit:
    @pytest.fixture
    async def place(self) -> AsyncIterator[RabbitPlace]:
        """A place on this server."""
        made = RabbitPlace()
        yield made
        await made.remove()

    async def test_no_queue(
        self,
        place: RabbitPlace,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
        clock: FakeClock,
    ) -> None:
        """While no queue is bound to the exchange the row waits, and the first one gets the event."""
        inbox = Inbox()
        async with publishing(place, emitter):
            emitted = await logins(auth, EMAIL)
            assert await auth.relay().drain() == 0
            assert "no queue is bound" in ((await OutboxEntry.get()).last_error or "")
            clock.advance(timedelta(hours=2))
            async with consuming(place, inbox.take):
                assert await auth.relay().drain() == 1
                await inbox.until(1)
        assert inbox.events == emitted

    async def test_no_confirmation(
        self, place: RabbitPlace, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """Without publisher confirms it is unknown whether the broker has the event, so the row waits."""
        broker = RabbitBroker(
            place.url, logger=LOGGER, default_channel=Channel(publisher_confirms=False)
        )
        publish_events(emitter, place.publisher(broker), "user_login", source=SOURCE)
        async with running(broker):
            await auth.login(EMAIL, PASSWORD)
            assert await auth.relay().drain() == 0
        assert "publisher_confirms" in ((await OutboxEntry.get()).last_error or "")

    async def test_one_at_a_time(
        self, place: RabbitPlace, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """With one message in flight the order outlasts failures; the limit ends in a dead letter."""
        attempts: list[UUID] = []
        inbox, dead = Inbox(), Inbox()

        async def fail_first(event: Event) -> None:
            attempts.append(event.id)
            if event.id == attempts[0]:
                raise OSError("the disk is full")
            await inbox.take(event)

        far, morgue = EventEmitter(errors="raise"), EventEmitter(errors="raise")
        far.on("*", fail_first)
        morgue.on("*", dead.take)
        consumer = place.broker()
        consumer.subscriber(place.queue("dead"))(feed(morgue))
        consumer.subscriber(
            RabbitQueue(
                place.queue("audit").name,
                queue_type=QueueType.QUORUM,
                durable=True,
                arguments={
                    "x-delivery-limit": 2,
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": place.queue("dead").name,
                },
            ),
            place.exchange,
            channel=Channel(prefetch_count=1),
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )(feed(far))
        async with running(consumer), publishing(place, emitter):
            first, second, third = await logins(auth, EMAIL, EMAIL, EMAIL)
            await auth.relay().drain()
            await inbox.until(2)
            await dead.until(1)
        assert attempts == [first.id] * 3 + [second.id, third.id]
        assert dead.events == [first]

    async def test_queue_alone(
        self, place: RabbitPlace, auth: AuthService[User], ada: User, emitter: EventEmitter
    ) -> None:
        """A queue of the default exchange is a destination, too; the name may be long."""
        inbox, far = Inbox(), EventEmitter(propagate_errors=True)
        far.on("*", inbox.take)
        broker = place.broker()
        publish_events(
            emitter,
            broker.publisher(place.queue("direct")),
            "user_login",
            source=SOURCE,
            name="ö" * 255,
        )
        broker.subscriber(place.queue("direct"))(feed(far))
        async with running(broker):
            emitted = await logins(auth, EMAIL)
            assert await auth.relay().drain() == 1
            await inbox.until(1)
        assert inbox.events == emitted


class TestWithoutServers:
    @pytest.mark.parametrize(
        ("made", "fake"),
        [
            (RedisPlace, TestRedisBroker),
            (NatsPlace, TestNatsBroker),
            (RabbitPlace, TestRabbitBroker),
        ],
        ids=["redis", "nats", "rabbit"],
    )
    async def test_fake_broker(
        self,
        made: type[Place],
        fake: Any,
        auth: AuthService[User],
        ada: User,
        emitter: EventEmitter,
    ) -> None:
        """A host can test both ends in memory, with the fake brokers of FastStream."""
        place, inbox, far = made(), Inbox(), EventEmitter(propagate_errors=True)
        far.on("*", inbox.take)
        broker = place.broker()
        publish_events(emitter, place.publisher(broker), "user_login", source=SOURCE)
        place.subscribe(broker, feed(far), group="audit")
        async with fake(broker):
            emitted = await logins(auth, EMAIL)
            assert await auth.relay().drain() == 1
        assert inbox.events == emitted

    @pytest.mark.parametrize("subject", ["7", None])
    @pytest.mark.parametrize("broker", ["kafka", "confluent"])
    async def test_kafka(self, broker: str, subject: str | None, emitter: EventEmitter) -> None:
        """A topic gets the CloudEvent under the key of its user, so that a partition keeps order."""
        sent: list[tuple[bytes, dict[str, object]]] = []

        class Topic:
            __module__ = f"faststream.{broker}.publisher.usecase"

            async def publish(
                self,
                message: bytes,
                *,
                key: bytes | None,
                headers: dict[str, str],
                correlation_id: str,
            ) -> object:
                sent.append((message, {"key": key, **headers, "correlation_id": correlation_id}))
                return object()

        publish_events(emitter, Topic(), "user_login_failed", source=SOURCE)
        event = UserLoginFailed(identifier="x", reason="bad_password", subject_id=subject)
        (subscription,) = emitter.subscriptions("user_login_failed", "durable")
        await deliverer_of(emitter).call(event, subscription)
        ((message, options),) = sent
        assert event_from(message) == event
        assert options == {
            "key": subject and subject.encode(),
            "content-type": CONTENT_TYPE,
            "correlation_id": str(event.id),
        }

    async def test_timeout(self, emitter: EventEmitter) -> None:
        """A broker that neither takes nor refuses a message has failed when the time is up."""

        class Silent:
            __module__ = "faststream.kafka.publisher.usecase"

            async def publish(self, message: bytes, **options: object) -> None:
                await asyncio.Event().wait()

        publish_events(emitter, Silent(), "*", source=SOURCE, timeout=0.01)
        (subscription,) = emitter.subscriptions("*", "durable")
        with pytest.raises(EventError, match="TimeoutError"):
            async with asyncio.timeout(20):
                await deliverer_of(emitter).call(
                    UserLoginFailed(identifier="x", reason="not_found"), subscription
                )


class TestRegistration:
    @pytest.fixture
    def publisher(self) -> Any:
        """A destination; no server is asked."""
        return RedisBroker().publisher(stream="auth-events")

    @pytest.mark.parametrize(
        ("publisher", "advice"),
        [
            (RedisBroker().publisher("channel"), r"publisher\(stream="),
            (RedisBroker().publisher(list="list"), r"publisher\(stream="),
            (NatsBroker().publisher("subject"), r"publisher\(subject, stream="),
            (RedisBroker(), "not through a RedisBroker"),
            (Inbox(), "not through a Inbox"),
            (None, "not through a NoneType"),
        ],
        ids=["channel", "list", "core-nats", "broker", "other", "none"],
    )
    def test_unsafe_destination(self, publisher: Any, advice: str, emitter: EventEmitter) -> None:
        """A destination that loses messages, or is none, is refused with what to use instead."""
        with pytest.raises(ConfigurationError, match=advice):
            publish_events(emitter, publisher, "user_login", source=SOURCE)
        assert emitter.events() == []

    @pytest.mark.parametrize("source", ["", "two words"])
    def test_bad_source(self, source: str, publisher: Any, emitter: EventEmitter) -> None:
        """A source that is no URI reference is refused at once, not at the first login."""
        with pytest.raises(ValueError, match="URI reference"):
            publish_events(emitter, publisher, "user_login", source=source)
        assert emitter.events() == []

    def test_no_events(self, publisher: Any, emitter: EventEmitter) -> None:
        """The events must be named."""
        with pytest.raises(SubscriptionError, match="which event"):
            publish_events(emitter, publisher, source=SOURCE)

    def test_name_is_taken(self, publisher: Any, emitter: EventEmitter) -> None:
        """A second destination needs a name of its own, because rows are stored under it."""
        publish_events(emitter, publisher, "user_login", source=SOURCE)
        with pytest.raises(SubscriptionError, match="'broker' is taken"):
            publish_events(emitter, publisher, "user_logout", source=SOURCE)
        publish_events(emitter, publisher, "user_login", source=SOURCE, name="second")
        names = [each.name for each in emitter.subscriptions("user_login", "durable")]
        assert names == ["broker", "second"]

    def test_everything(self, publisher: Any, emitter: EventEmitter) -> None:
        """An event that several of the names and classes match is published once."""
        publish_events(emitter, publisher, "*", "user_login", UserLogout, source=SOURCE)
        for name in ("user_login", "user_logout", "password_changed", "made up"):
            assert len(emitter.subscriptions(name, "durable")) == 1

    def test_misspelt_event(self, publisher: Any) -> None:
        """On a strict emitter a name that is nearly a declared one gives a warning."""
        strict = EventEmitter(strict=True)
        with pytest.warns(SubscriptionWarning, match="'user_login'"):
            publish_events(strict, publisher, "user_logn", source=SOURCE)


class TestFeed:
    @pytest.fixture
    def far(self) -> EventEmitter:
        """The emitter of another service."""
        return EventEmitter(propagate_errors=True)

    def message(self, event: Event | None = None) -> dict[str, Any]:
        """Return a message as a decoder might leave it."""
        return cloudevent(event or UserLoginFailed(identifier="x", reason="not_found"), SOURCE)

    def test_swallowing_emitter(self) -> None:
        """An emitter that only logs failures is refused: failed messages would be acknowledged."""
        with pytest.raises(ConfigurationError, match="propagate_errors=True"):
            feed(EventEmitter())

    @pytest.mark.parametrize("options", [{"propagate_errors": True}, {"errors": "group"}])
    async def test_failure(self, options: dict[str, Any]) -> None:
        """What a handler raises reaches FastStream, whichever way the emitter raises."""
        far = EventEmitter(**options)

        @far.on("user_login_failed")
        async def broken() -> None:
            raise OSError("the disk is full")

        with pytest.raises((EventError, ExceptionGroup)) as caught:
            await feed(far)(self.message())
        assert "the disk is full" in repr(caught.value)

    @pytest.mark.parametrize("form", [dict, json.dumps, lambda each: json.dumps(each).encode()])
    async def test_forms(self, far: EventEmitter, form: Callable[[Any], Any]) -> None:
        """A body may be bytes, text, or what a decoder made of them."""
        inbox = Inbox()
        far.on("*", inbox.take)
        event = UserLoginFailed(identifier="x", reason="not_found")
        await feed(far)(form(self.message(event)))
        assert inbox.events == [event]
        assert event_from(form(self.message(event))) == event

    async def test_by_name(self, far: EventEmitter) -> None:
        """Handlers by name receive the event's arguments, as in the service it came from."""
        received: list[tuple[str, str]] = []

        @far.on("user_login_failed")
        async def note(identifier: str, reason: str) -> None:
            received.append((identifier, reason))

        await feed(far)(self.message())
        assert received == [("x", "not_found")]

    async def test_without_a_handler(self, far: EventEmitter) -> None:
        """An event without a handler is ignored, also one that is not declared here."""
        inbox = Inbox()
        far.on("user_logout", inbox.take)
        unknown = self.message()
        unknown["type"] = unknown["type"].replace("user_login_failed", "invoice_paid")
        unknown["data"]["name"] = "invoice_paid"
        for message in (self.message(), unknown):
            await feed(far)(message)
        assert inbox.events == []

    async def test_undeclared(self, far: EventEmitter) -> None:
        """An event that has a handler and cannot be rebuilt is an error."""
        inbox = Inbox()
        far.on("nobody_declares_this", inbox.take)
        unknown = self.message()
        unknown["type"] = unknown["type"].replace("user_login_failed", "nobody_declares_this")
        unknown["data"]["name"] = "nobody_declares_this"
        with pytest.raises(CloudEventError, match="nobody_declares_this"):
            await feed(far)(unknown)

    async def test_of_others(self, far: EventEmitter) -> None:
        """A CloudEvent of another source in the same stream is ignored."""
        inbox = Inbox()
        far.on("*", inbox.take)
        await feed(far)(self.message() | {"type": "com.example.order.paid.v1", "data": {}})
        assert inbox.events == []

    @pytest.mark.parametrize(
        "body",
        [b"", b"\xff\xfe", b"null", b"[" * 100_000, "{}", [], None, 7, {"specversion": "0.3"}],
    )
    async def test_malformed(self, far: EventEmitter, body: Any) -> None:
        """What is no CloudEvent is refused with our own error, wherever it is read."""
        with pytest.raises(CloudEventError):
            await feed(far)(body)
        with pytest.raises(CloudEventError):
            event_from(body)


class TestExtra:
    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        """Run a program where FastStream is not installed."""
        hidden = "import sys; sys.modules['faststream'] = None\n"
        return subprocess.run(
            [sys.executable, "-c", hidden + program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def test_library(self) -> None:
        """The library needs no FastStream."""
        finished = self.run("import tortoise_auth, tortoise_auth.integrations; print('fine')")
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "fine\n", "")

    def test_integration(self) -> None:
        """Importing the integration without FastStream raises an error that says what to install."""
        finished = self.run("import tortoise_auth.integrations.faststream")
        assert finished.returncode == 1
        last = finished.stderr.splitlines()[-1]
        assert last.startswith("ImportError: ")
        assert "pip install 'faststream[redis]'" in last


PAGE = ROOT / "docs" / "brokers.md"


class TestPage:
    """docs/brokers.md."""

    @pytest.fixture
    async def namespace(
        self, sqlite: TortoiseContext, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[dict[str, Any]]:
        """What a reader of the page has: an account, a service, and something to write to."""
        recorded = asyncio.Queue[tuple[Any, ...]]()

        async def record(*facts: Any) -> None:
            recorded.put_nowait(facts)

        monkeypatch.setattr(AbstractUser, "emitter", library_emitter)
        user = await User.create_user(email=EMAIL, password=PASSWORD)
        with isolated(library_emitter):
            auth = AuthService(User, AuthConfig(secret=SECRET))
            yield {
                "auth": auth,
                "password": PASSWORD,
                "record": record,
                "recorded": recorded,
                "user": user,
            }

    def snippets(self, place: Place, *sections: str) -> list[str]:
        """Return the snippets of some sections, for a place of the test's own."""
        snippets = []
        for section in PAGE.read_text().split("\n## ")[1:]:
            if section.partition("\n")[0] in sections:
                snippets += re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        own_name = [each.replace("auth-events", place.name) for each in snippets]
        return [re.sub(r'"(redis|nats|amqp)://[^"]+"', repr(place.url), each) for each in own_name]

    @needs_redis
    async def test_redis(self, namespace: dict[str, Any], tmp_path: Path) -> None:
        """What the page does with Redis works, from the login to the other service."""
        place, recorded, file = RedisPlace(), namespace["recorded"], tmp_path / "snippet.py"
        try:
            for snippet in self.snippets(
                place, "Publish", "Consume", "Test without a server", "Redis Streams"
            ):
                file.write_text(snippet)  # FastStream reads the source of its callers
                await run(snippet, namespace, str(file))
            user = str(namespace["user"].pk)
            at_once = [recorded.get_nowait() for _ in range(recorded.qsize())]
            assert [fact for facts in at_once for fact in facts].count(user) == 1
            assert len(at_once) == 2

            async with namespace["worker"], namespace["lifespan"](None):
                await namespace["worker"].start()
                await namespace["auth"].login(EMAIL, PASSWORD)
                async with asyncio.timeout(20):
                    received = [await recorded.get(), await recorded.get()]
            audited, archived = sorted(received, key=lambda facts: facts[0] == "user_login")
            assert audited[1] == user
            assert archived[2]["id"] == str(audited[0])
        finally:
            await place.remove()

    @needs_redis
    async def test_relay_of_its_own(self, namespace: dict[str, Any]) -> None:
        """The relay beside the application publishes what the application has recorded."""
        place, inbox = RedisPlace(), Inbox()
        try:
            for snippet in self.snippets(place, "Publish"):
                await run(snippet, namespace, PAGE.name)
            async with consuming(place, inbox.take):
                auth = namespace["auth"]
                async with namespace["broker_started"](), auth.relay():
                    await auth.login(EMAIL, PASSWORD)
                    await inbox.until(1)
        finally:
            await place.remove()
        assert [event.name for event in inbox.events] == ["user_login"]

    @pytest.mark.parametrize(
        ("made", "section"),
        [
            pytest.param(NatsPlace, "NATS JetStream", marks=needs_nats),
            pytest.param(RabbitPlace, "RabbitMQ", marks=needs_rabbit),
        ],
        ids=["nats", "rabbit"],
    )
    async def test_section(
        self, made: type[Place], section: str, namespace: dict[str, Any]
    ) -> None:
        """What the page says of a broker works there, from the login to the other service."""
        place = made()
        if isinstance(place, RabbitPlace):
            place.queue("audit")
        (snippet,) = self.snippets(place, section)
        try:
            await run(snippet, namespace, PAGE.name)
            async with namespace["worker"], namespace["broker"]:
                await namespace["worker"].start()
                await namespace["broker"].start()
                await namespace["auth"].login(EMAIL, PASSWORD)
                assert await namespace["auth"].relay().drain() == 1
                async with asyncio.timeout(20):
                    assert await namespace["recorded"].get() == (str(namespace["user"].pk),)
        finally:
            await place.remove()

    def test_every_snippet_is_run(self) -> None:
        """No snippet stands outside of the sections above."""
        sections = {
            section.partition("\n")[0]
            for section in PAGE.read_text().split("\n## ")
            if "```python" in section
        }
        assert sections == {
            "Publish",
            "Consume",
            "Test without a server",
            "Redis Streams",
            "NATS JetStream",
            "RabbitMQ",
        }

    def test_message(self) -> None:
        """The message on the page is a valid one."""
        (text,) = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        message = json.loads(text)
        event = event_from(message)
        assert isinstance(event, UserLogin)
        assert cloudevent(event, message["source"]) == message

    def test_table(self) -> None:
        """Every test that the page names exists."""
        here = Path(__file__).read_text()
        rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
        named = re.findall(r"`(?:(Test\w+)(?:::)?)?(test_\w+)?` \|$", "\n".join(rows), re.MULTILINE)
        assert len(named) == 9
        for subject, test in named:
            assert not subject or f"class {subject}:" in here
            assert not test or f"def {test}(" in here


class TestExample:
    """examples/broker.py."""

    def run(self, redis_url: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run it, with warnings as errors."""
        return subprocess.run(
            [sys.executable, "-W", "error", ROOT / "examples" / "broker.py"],
            cwd=folder,
            env={**os.environ, "REDIS_URL": redis_url, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    @needs_redis
    async def test_runs(self, tmp_path: Path) -> None:
        """The other service receives the login and the logout, and nothing is left behind."""
        finished = await asyncio.to_thread(self.run, REDIS_URL, tmp_path)
        assert (finished.returncode, finished.stderr) == (0, "")
        lines = [line.split() for line in finished.stdout.splitlines()]
        received = [line[2] for line in lines if line[:2] == ["audit", "received"]]
        assert received == ["UserLogin", "UserLogout"]
        (stream,) = re.findall(r"stream (auth-events-\w+)$", finished.stdout, re.MULTILINE)
        assert "1 event waits in the outbox" in finished.stdout
        assert "0 events wait in the outbox" in finished.stdout
        assert await asyncio.to_thread(os.listdir, tmp_path) == []
        async with Redis.from_url(REDIS_URL) as redis:
            assert await redis.exists(stream) == 0

    def test_no_redis(self, tmp_path: Path) -> None:
        """Without a Redis it says so in one line and fails."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"redis://127.0.0.1:{unused.getsockname()[1]}"
            finished = self.run(url, tmp_path)
        assert (finished.returncode, finished.stdout) == (2, "")
        assert finished.stderr == f"No Redis answers at {url}: start one, or set REDIS_URL\n"
