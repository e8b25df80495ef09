"""``tortoise-auth relay`` and ``events``: deliver outbox rows, list the subscriptions."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Annotated

import typer
from tortoise.config import TortoiseConfig

from tortoise_auth.cli.database import ConfigPath, ServicePath, open_database
from tortoise_auth.cli.loading import (
    FAILED,
    CommandError,
    Lifespan,
    Service,
    durable_subscriptions,
    load_lifespan,
    load_service,
    load_settings,
)
from tortoise_auth.cli.output import add_row, new_table, show
from tortoise_auth.events.relay import Relay, RelaySettings
from tortoise_auth.legible import describe
from tortoise_auth.models import OutboxEntry
from tortoise_auth.users import AbstractUser

logger = logging.getLogger("tortoise_auth.relay")


_TIME_TO_CLOSE = 2.0
"""Seconds, after those that handlers get, until a relay that was asked to stop has ended."""


_LONGEST = 86_400.0


_DEFAULTS = RelaySettings()


def relay(
    service: ServicePath,
    config: ConfigPath = None,
    lifespan: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            show_default=False,
            help="What your handlers need open, for example a broker: a function without "
            "arguments, made by @asynccontextmanager.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows claimed at once.")
    ] = _DEFAULTS.batch_size,
    concurrency: Annotated[
        int,
        typer.Option(min=1, help="Rows delivered at the same time, one of each handler and user."),
    ] = _DEFAULTS.concurrency,
    max_attempts: Annotated[
        int, typer.Option(min=1, help="Failures after which a row is a dead letter.")
    ] = _DEFAULTS.max_attempts,
    lease: Annotated[
        float,
        typer.Option(min=0, max=_LONGEST, help="Seconds for which a claimed row is left alone."),
    ] = _DEFAULTS.lease.total_seconds(),
    max_backoff: Annotated[
        float, typer.Option(min=0, max=_LONGEST, help="Seconds between attempts, at most.")
    ] = _DEFAULTS.max_backoff.total_seconds(),
    poll_interval: Annotated[
        float, typer.Option(min=0, max=_LONGEST, help="Seconds between looks without being woken.")
    ] = _DEFAULTS.poll_interval.total_seconds(),
    stop_timeout: Annotated[
        float,
        typer.Option(
            min=0, max=_LONGEST, help="Seconds that running handlers get when the relay stops."
        ),
    ] = _DEFAULTS.stop_timeout.total_seconds(),
) -> None:
    """Deliver outbox rows to durable handlers until SIGTERM or SIGINT; then exit with 0.

    Any number may run at once. A handler that is still running when the time to stop is over
    leaves its row to its lease: the row is delivered again.
    """
    auth = load_service(service)
    settings = load_settings(config)
    opening = load_lifespan(lifespan) if lifespan is not None else None
    # After the host's modules are loaded: it does nothing where those have set up logging.
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        carrier = auth.relay(
            batch_size=batch_size,
            concurrency=concurrency,
            max_attempts=max_attempts,
            lease=timedelta(seconds=lease),
            max_backoff=timedelta(seconds=max_backoff),
            poll_interval=timedelta(seconds=poll_interval),
            stop_timeout=timedelta(seconds=stop_timeout),
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    asyncio.run(_carry(carrier, auth, settings, opening, service))


def events(service: ServicePath) -> None:
    """List the subscriptions of each event, in order, with their delivery."""
    table = new_table("Event", "Turn", "Handler", "Delivery", "Priority", "Options")
    for each in load_service(service).emitter.describe():
        options = {
            f"name={each.name}": each.name != each.handler,
            "once": each.once,
            f"timeout={each.timeout} s": each.timeout is not None,
            "on a thread": each.threaded,
        }
        add_row(
            table,
            *(each.event, each.position, each.handler, each.delivery, each.priority),
            ", ".join(text for text, given in options.items() if given),
        )
    show(table, if_empty="There are no subscriptions.")


async def _carry(
    carrier: Relay[AbstractUser],
    auth: Service,
    settings: dict[str, object] | TortoiseConfig,
    lifespan: Lifespan | None,
    service: str,
) -> None:
    stopping = _stop_on_signals(carrier.settings.stop_timeout.total_seconds() + _TIME_TO_CLOSE)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(open_database(settings, OutboxEntry, auth.user_model))
        if lifespan is not None:
            await _open(lifespan, stack)
        await stack.enter_async_context(auth.emitter)
        # Last, so that it is the first to end: the database, the lifespan and the emitter outlive
        # it.
        await stack.enter_async_context(carrier)
        durable = sorted(durable_subscriptions(auth))
        if durable:
            logger.info("Relay %s delivers to %s", carrier.name, ", ".join(durable))
        else:
            logger.warning(
                "Relay %s has nothing to deliver to: importing %s registers no durable handler",
                *(carrier.name, service),
            )
        ended = asyncio.create_task(carrier.join())
        asked = asyncio.create_task(stopping.wait())
        await asyncio.wait([ended, asked], return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not asked.done():
            raise CommandError("The relay has ended by itself; its log says why", FAILED)
        ended.cancel()
        logger.info("Relay %s stops", carrier.name)


async def _open(lifespan: Lifespan, stack: AsyncExitStack) -> None:
    try:
        await stack.enter_async_context(lifespan())
    except Exception as error:
        raise CommandError(
            f"The lifespan could not begin: {type(error).__name__}: {describe(error)}", FAILED
        ) from error


def _stop_on_signals(seconds: float) -> asyncio.Event:
    """Return what the first SIGTERM or SIGINT sets; *seconds* after it the process ends.

    Whatever hangs: a handler on a thread cannot be cancelled, one that is may refuse, and a
    database may not answer to a goodbye; so a thread of its own keeps the deadline. A second
    signal ends the process at once.
    """
    loop, stopping, signalled = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal(*_: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        signalled.set()

    def keep_the_deadline() -> None:
        signalled.wait()
        loop.call_soon_threadsafe(stopping.set)
        time.sleep(seconds)
        logger.warning("Ended with handlers still running; their rows will be delivered again")
        # `sys.exit` would end this thread alone.
        os._exit(0)

    threading.Thread(target=keep_the_deadline, name="relay deadline", daemon=True).start()
    for each in signals:
        signal.signal(each, on_signal)
    return stopping
