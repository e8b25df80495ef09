"""Events over a broker, carried by FastStream: Redis Streams, NATS JetStream, RabbitMQ, Kafka.

Where the events are made, `publish_events` makes a broker one more durable subscriber: what is
committed reaches the broker at least once, in order per user, however long the broker was down.
Where they are needed, `feed` or `event_from` turn messages back into events.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol
from uuid import UUID, uuid5

from tortoise_auth.events.event import Event
from tortoise_auth.events.event_emitter import EventEmitter
from tortoise_auth.events.formats import (
    CloudEventError,
    cloudevent,
    event_from_cloudevent,
    event_name,
    uri_reference,
)
from tortoise_auth.exceptions import ConfigurationError

try:
    from faststream import StreamMessage
except ModuleNotFoundError as error:
    if error.name != "faststream":
        raise
    raise ImportError(
        "tortoise_auth.integrations.faststream needs FastStream: "
        "pip install 'faststream[redis]', or its extra for another broker"
    ) from error

__all__ = ["CloudEventError", "event_from", "feed", "publish_events"]

CONTENT_TYPE = "application/cloudevents+json"

_BROKERS = frozenset({"redis", "nats", "rabbit", "kafka", "confluent"})


class Publisher(Protocol):
    """What ``broker.publisher(...)`` of a FastStream broker returns."""

    @property
    def publish(self) -> Callable[..., Awaitable[object]]:
        """Send one message to where the publisher was made for."""


def publish_events(
    emitter: EventEmitter,
    publisher: Publisher,
    *events: str | type[Event],
    source: str,
    name: str = "broker",
    timeout: float = 30,
) -> None:
    """Publish events through a broker of FastStream, as CloudEvents 1.0 in structured JSON.

    It is a durable subscription. Call it in every program that makes events, so that they are
    recorded, and start the broker in every one that runs a relay, so that they are delivered.

    Example::

        broker = RedisBroker("redis://localhost:6379")
        publish_events(
            emitter,
            broker.publisher(stream="auth-events"),
            "user_login",
            PasswordChanged,
            source="https://shop.example.com/auth",
        )

    Args:
        emitter: Whose events.
        publisher: The destination, made by the broker: a Redis stream, a subject of a JetStream
            stream, a RabbitMQ exchange or queue, a Kafka topic.
        *events: Which: names, patterns, classes, or ``"*"``. An event that several of them match is
            published once.
        source: The ``source`` of the CloudEvents, a URI reference: which of your systems it is.
        name: Identifies the subscription, over restarts too.
        timeout: Seconds that the broker may take to confirm a message.

    Raises:
        ConfigurationError: The broker could lose messages sent there, or is not one of these.
        ValueError: *source* is not a URI reference.
        SubscriptionError: There are no events, or *name* is taken.
    """
    broker = _broker_of(publisher)
    uri_reference(source)

    async def publish(event: Event) -> None:
        envelope = cloudevent(event, source)
        body = json.dumps(envelope, allow_nan=False).encode()
        answer = await publisher.publish(body, **_options(broker, envelope, name))
        if broker == "rabbit":
            _check_confirmation(publisher, answer)

    for_events: tuple[Any, ...] = events  # names and classes side by side
    emitter.on(*for_events, delivery="durable", name=name, timeout=timeout)(publish)


def event_from(message: StreamMessage[Any] | bytes | str | Mapping[str, Any]) -> Event:
    """Return the event that a message carries, of its own class. Its ``user`` is ``None``.

    Example::

        @broker.subscriber(stream=StreamSub("auth-events", group="audit", consumer="audit-1"))
        async def audit(body: bytes):
            event = event_from(body)
            if isinstance(event, UserLogin): ...

    Args:
        message: A FastStream message, its body, or the JSON object in it.

    Raises:
        CloudEventError: A `ValueError`: the message holds no event that is declared here.
    """
    return event_from_cloudevent(_envelope(message))


def feed(emitter: EventEmitter) -> Callable[[object], Awaitable[None]]:
    """Return a subscriber function for FastStream that emits each event it receives on *emitter*.

    Events without a subscription, and CloudEvents of other types, are passed over. When a handler fails,
    or a message is malformed, the function raises, and FastStream does what the ``ack_policy`` says.

    Example::

        emitter = EventEmitter(propagate_errors=True)
        broker.subscriber("auth-audit", ack_policy=AckPolicy.NACK_ON_ERROR)(feed(emitter))

        @emitter.on("user_login")
        async def audit(event: UserLogin): ...

    Raises:
        ConfigurationError: *emitter* only logs failures, so that messages whose handlers failed
            would be acknowledged.
    """
    if emitter.errors == "log":
        raise ConfigurationError(
            "An emitter that is fed by a broker must raise what its handlers raise, or failed "
            "messages are acknowledged: EventEmitter(propagate_errors=True)"
        )

    # The parameter is as wide as can be, so that FastStream passes on whatever the broker sent.
    async def receive(message: object) -> None:
        envelope = _envelope(message)
        name = event_name(envelope)
        if name is not None and emitter.subscriptions(name):
            await emitter.emit(event_from_cloudevent(envelope))

    return receive


def _broker_of(publisher: Publisher) -> str:
    """Return which broker *publisher* sends to, if messages cannot be lost there unnoticed."""
    match type(publisher).__module__.split("."):
        case ["faststream", broker, "publisher", *_] if broker in _BROKERS:
            pass
        case _:
            raise ConfigurationError(
                f"Events are published through broker.publisher(...) of FastStream's broker for "
                f"Redis, NATS, RabbitMQ or Kafka, not through a {type(publisher).__qualname__}"
            )
    if broker == "redis" and getattr(publisher, "stream", None) is None:
        raise ConfigurationError(
            "Redis keeps messages only in a stream: broker.publisher(stream=...)"
        )
    if broker == "nats" and getattr(publisher, "stream", None) is None:
        raise ConfigurationError(
            "NATS confirms messages only through JetStream: broker.publisher(subject, stream=...)"
        )
    return broker


def _options(broker: str, envelope: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the options of this broker's ``publish``.

    Brokers drop duplicates by the id of the message. It is made of that of the event and of the name
    of the subscription, because the messages of two subscriptions may meet in one stream.
    """
    message_id = str(uuid5(UUID(envelope["id"]), name))
    headers = {"content-type": CONTENT_TYPE}
    match broker:
        case "rabbit":
            options: dict[str, Any] = {
                "content_type": CONTENT_TYPE,
                "message_id": message_id,
                # Else RabbitMQ loses it when it restarts, or drops it if no queue is bound, and
                # confirms it all the same.
                "persist": True,
                "mandatory": True,
            }
        case "nats":
            # JetStream drops a second message of this id for `duplicate_window`, two minutes by
            # default.
            options = {"headers": headers | {"Nats-Msg-Id": message_id}}
        case "redis":
            options = {"headers": headers}
        case _:
            subject = envelope.get("subject")
            # One key, one partition: the events of a user stay in order.
            options = {"headers": headers, "key": subject.encode() if subject else None}
    return options | {"correlation_id": envelope["id"]}


def _check_confirmation(publisher: Publisher, answer: object) -> None:
    """Raise unless RabbitMQ took responsibility for the message."""
    if getattr(answer, "name", None) == "Basic.Ack" or getattr(publisher, "is_test", False):
        return
    if answer is None:
        raise RuntimeError("RabbitMQ confirmed nothing: publisher_confirms must stay on")
    raise RuntimeError("RabbitMQ returned the message: no queue is bound where it was published")


def _envelope(message: object) -> Any:  # noqa: ANN401 - JSON, checked where it is read
    body = message.body if isinstance(message, StreamMessage) else message
    if not isinstance(body, bytes | str):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CloudEventError("The message is not JSON") from error
