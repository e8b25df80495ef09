"""The command ``tortoise-auth``: run a relay, look after the outbox, see who listens to what.

It finds the host's `AuthService` as uvicorn finds an app (``myapp.main:auth``, also in the current
folder), and the database where Tortoise's own command does: ``--config``, ``$TORTOISE_ORM``, then
``[tool.tortoise]`` in ``pyproject.toml``.

Exit codes: 0, done (also a relay that was told to stop); 1, it could not be done: the database
failed, a row is not there; 2, what was typed is wrong, or something that it names.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, TypeVar

from tortoise.backends.base.client import BaseDBAsyncClient
from tortoise.config import TortoiseConfig
from tortoise.context import TortoiseContext

from tortoise_auth.clock import utc_now
from tortoise_auth.database import connection_for, root_of
from tortoise_auth.events import outbox
from tortoise_auth.events.relay import Relay, RelaySettings
from tortoise_auth.exceptions import ConfigurationError, describe
from tortoise_auth.locating import (
    FAILED,
    CommandError,
    Lifespan,
    Service,
    load_lifespan,
    load_service,
    load_settings,
)
from tortoise_auth.models import OutboxEntry
from tortoise_auth.users import AbstractUser

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    if package not in ("typer", "rich"):
        raise
    raise SystemExit(
        f'The command tortoise-auth needs {package}: pip install "tortoise-auth[cli]"'
    ) from None

logger = logging.getLogger("tortoise_auth.relay")

ResultT = TypeVar("ResultT")
_TIME_TO_CLOSE = 2.0
"""Seconds, after those that handlers get, until a relay that was told to stop has ended."""

_LONGEST = 86_400.0
_LARGEST_ID = 2**63 - 1
_DEFAULTS = RelaySettings()

app = typer.Typer(
    help="Look after the events of tortoise_auth.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
outbox_commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(outbox_commands, name="outbox", help="Look into the outbox, and mend it.")

ServicePath = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:NAME",
        help="Your AuthService, for example myapp.main:auth.",
        show_default=False,
    ),
]
ConfigPath = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="MODULE:NAME",
        show_default=False,
        help="Your Tortoise settings, for example myapp.settings:TORTOISE_ORM. Without it "
        "$TORTOISE_ORM says where they are, or [tool.tortoise] in pyproject.toml.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> None:
    """Run the command line, and end the process."""
    sys.path.insert(0, str(Path.cwd()))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="tortoise-auth")
    except CommandError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"tortoise-auth: {_printable(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


# ---- commands ------------------------------------------------------------------------------------


@app.command()
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
            min=0, max=_LONGEST, help="Seconds that running handlers get when told to stop."
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


@app.command()
def events(service: ServicePath) -> None:
    """Show who hears which event, in which order, by which delivery."""
    table = _table("Event", "Turn", "Handler", "Delivery", "Priority", "Options")
    for each in load_service(service).emitter.describe():
        options = {
            f"name={each.name}": each.name != each.handler,
            "once": each.once,
            f"timeout={each.timeout} s": each.timeout is not None,
            "on a thread": each.threaded,
        }
        _add(
            table,
            *(each.event, each.position, each.handler, each.delivery, each.priority),
            ", ".join(text for text, given in options.items() if given),
        )
    _show(table, if_empty="Nobody listens to anything.")


@outbox_commands.command()
def status(
    service: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:NAME",
            show_default=False,
            help="Your AuthService: says for which subscriptions it has no handler.",
        ),
    ] = None,
    config: ConfigPath = None,
    as_json: AsJson = False,
) -> None:
    """Count what waits, what is due, what is dead, and say how old the oldest waiting row is."""
    auth = load_service(service) if service is not None else None
    found = _with_database(config, lambda connection: outbox.status(connection, utc_now()))
    unknown = sorted(found.subscriptions.keys() - _durable(auth)) if auth is not None else None
    numbers: dict[str, object] = {
        "waiting": found.waiting,
        "due": found.due,
        "dead": found.dead,
        "oldest_waiting_seconds": round(found.oldest_waiting, 3),
    }
    if as_json:
        by_name = {"subscriptions": found.subscriptions, "unknown_subscriptions": unknown}
        print(json.dumps(numbers | by_name))
        return
    for name, number in numbers.items():
        print(f"{name:<22}  {number}")
    table = _table("Subscription", "Waiting", "")
    for name, rows in sorted(found.subscriptions.items()):
        _add(table, name, rows, "no handler here" if name in (unknown or ()) else "")
    if found.subscriptions:
        print()
        _show(table)


@outbox_commands.command("list")
def list_rows(
    config: ConfigPath = None,
    dead: Annotated[
        bool, typer.Option("--dead", help="Dead letters instead of rows that wait.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show rows, oldest first: those that wait, or the dead letters, with the last error."""
    rows = _with_database(
        config, lambda connection: outbox.entries(connection, dead=dead, limit=limit)
    )
    now = utc_now()
    if as_json:
        print(json.dumps([_as_json(row, now) for row in rows], indent=1))
        return
    table = _table(
        *("Id", "Event", "Subscription", "Subject", "Attempts", "Age", "State", "Last error")
    )
    for row in rows:
        _add(
            table,
            *(row.id, row.event_name, row.subscription, row.subject_id or "", row.attempts),
            *(_duration(now - row.created_at), _state(row, now), row.last_error or ""),
        )
    _show(table, if_empty="No dead letters." if dead else "Nothing waits.")


@outbox_commands.command()
def retry(
    ids: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="ID",
            min=1,
            max=_LARGEST_ID,
            show_default=False,
            help="Rows, as `outbox list` shows them.",
        ),
    ] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="Every dead letter.")] = False,
    config: ConfigPath = None,
) -> None:
    """Let dead letters, or rows that back off, be delivered now, with all attempts before them."""
    if bool(ids) == all_dead:
        raise CommandError("Say which rows: either their ids or --all-dead")
    wanted = sorted(set(ids or ()))
    renewed = _with_database(
        config,
        lambda connection: (
            outbox.retry_dead(connection, utc_now())
            if all_dead
            else outbox.retry(connection, wanted, utc_now())
        ),
    )
    print(f"Rows that start again: {renewed}")
    if renewed < len(wanted):
        raise CommandError(f"{len(wanted) - renewed} of the ids are not in the outbox", FAILED)


@outbox_commands.command()
def purge(
    older_than: Annotated[
        int, typer.Option(min=0, max=36_500, metavar="DAYS", help="Days since they died.")
    ],
    config: ConfigPath = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete old dead letters for good. Asks first if a person sits at the terminal."""
    if sys.stdin.isatty() and not yes:
        typer.confirm(f"Delete the dead letters of more than {older_than} days ago?", abort=True)
    before = utc_now() - timedelta(days=older_than)
    deleted = _with_database(config, lambda connection: outbox.purge(connection, before=before))
    print(f"Rows deleted: {deleted}")


# ---- the relay as a process ----------------------------------------------------------------------


async def _carry(
    carrier: Relay[AbstractUser],
    auth: Service,
    settings: dict[str, object] | TortoiseConfig,
    lifespan: Lifespan | None,
    service: str,
) -> None:
    stopping = _stop_on_signals(carrier.settings.stop_timeout.total_seconds() + _TIME_TO_CLOSE)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_database(settings, OutboxEntry, auth.user_model))
        if lifespan is not None:
            await _open(lifespan, stack)
        await stack.enter_async_context(auth.emitter)
        await stack.enter_async_context(carrier)
        durable = sorted(_durable(auth))
        if durable:
            logger.info("Relay %s delivers to %s", carrier.name, ", ".join(durable))
        else:
            logger.warning(
                "Relay %s has nothing to deliver to: importing %s registers no durable handler",
                *(carrier.name, service),
            )
        await stopping.wait()
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
    loop, stopping, told = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def tell(*_: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        told.set()

    def keep_the_deadline() -> None:
        told.wait()
        loop.call_soon_threadsafe(stopping.set)
        time.sleep(seconds)
        logger.warning("Ended with handlers still running; their rows will be delivered again")
        os._exit(0)

    threading.Thread(target=keep_the_deadline, name="relay deadline", daemon=True).start()
    for each in signals:
        signal.signal(each, tell)
    return stopping


def _durable(auth: Service) -> set[str]:
    return {each.name for each in auth.emitter.describe() if each.delivery == "durable"}


# ---- the database --------------------------------------------------------------------------------


def _with_database(
    config: str | None, work: Callable[[BaseDBAsyncClient], Awaitable[ResultT]]
) -> ResultT:
    settings = load_settings(config)

    async def run() -> ResultT:
        async with _database(settings, OutboxEntry):
            return await work(root_of(connection_for(OutboxEntry)))

    try:
        return asyncio.run(run())
    except CommandError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the driver raises: the operator is told
        raise CommandError(
            f"The database failed: {type(error).__name__}: {describe(error)}", FAILED
        ) from None


@asynccontextmanager
async def _database(
    settings: dict[str, object] | TortoiseConfig, *models: type[OutboxEntry | AbstractUser]
) -> AsyncIterator[None]:
    """Set Tortoise up as a web application would, and check that it knows *models*."""
    with TortoiseContext() as context:
        try:
            await context.init(config=settings, _enable_global_fallback=True)
            for model in models:
                connection_for(model)
        except ConfigurationError as error:
            raise CommandError(str(error)) from None
        except Exception as error:  # noqa: BLE001 - modules of the host are imported here
            raise CommandError(
                f"Tortoise refuses its settings: {type(error).__name__}: {describe(error)}"
            ) from None
        try:
            yield
        finally:
            await context.close_connections()


# ---- output --------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: object) -> None:
    table.add_row(*(_printable(str(cell)) for cell in cells))


def _show(table: Table, if_empty: str = "") -> None:
    """Print *table*, in a pipe with one line for each row."""
    if not table.row_count:
        print(if_empty)
        return
    width = None if sys.stdout.isatty() else 100_000
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        print(line.rstrip())


def _printable(text: str) -> str:
    """Escape whatever a terminal would obey and not show."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _duration(time: timedelta) -> str:
    seconds = max(0.0, time.total_seconds())
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _state(row: OutboxEntry, now: datetime) -> str:
    if row.due_at is None:
        return "dead"
    return "due" if row.due_at <= now else f"in {_duration(row.due_at - now)}"


def _as_json(row: OutboxEntry, now: datetime) -> dict[str, object]:
    return {
        "id": row.id,
        "event": row.event_name,
        "event_id": str(row.event_id),
        "subscription": row.subscription,
        "subject_id": row.subject_id,
        "attempts": row.attempts,
        "age_seconds": round((now - row.created_at).total_seconds(), 3),
        "due_at": row.due_at and row.due_at.isoformat(),
        "dead_at": row.dead_at and row.dead_at.isoformat(),
        "last_error": row.last_error,
    }


if __name__ == "__main__":
    main()
