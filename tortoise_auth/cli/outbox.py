"""``tortoise-auth outbox``: look into the outbox, and mend it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated

import typer

from tortoise_auth.cli.database import AsJson, ConfigPath, with_database
from tortoise_auth.cli.loading import FAILED, CommandError, durable_subscriptions, load_service
from tortoise_auth.cli.output import add_row, new_table, show
from tortoise_auth.clock import utc_now
from tortoise_auth.events import outbox
from tortoise_auth.models import DeadLetter, OutboxEntry, OutboxRow

_LARGEST_ID = 2**63 - 1  # of a BIGINT; drivers raise for more


commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@commands.command()
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
    counts = with_database(config, lambda connection: outbox.status(connection, utc_now()))
    unknown = (
        sorted(counts.subscriptions.keys() - durable_subscriptions(auth))
        if auth is not None
        else None
    )
    numbers: dict[str, object] = {
        "waiting": counts.waiting,
        "due": counts.due,
        "dead": counts.dead,
        "oldest_waiting_seconds": round(counts.oldest_waiting, 3),
    }
    if as_json:
        by_name = {"subscriptions": counts.subscriptions, "unknown_subscriptions": unknown}
        print(json.dumps(numbers | by_name))
        return
    for name, number in numbers.items():
        print(f"{name:<22}  {number}")
    table = new_table("Subscription", "Waiting", "")
    for name, rows in sorted(counts.subscriptions.items()):
        add_row(table, name, rows, "no handler here" if name in (unknown or ()) else "")
    if counts.subscriptions:
        print()
        show(table)


@commands.command("list")
def list_rows(
    config: ConfigPath = None,
    dead: Annotated[
        bool, typer.Option("--dead", help="Dead letters instead of rows that wait.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Rows at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show rows, oldest first: those that wait, or the dead letters, with the last error."""
    rows: Sequence[OutboxRow] = (
        with_database(config, lambda connection: outbox.entries(connection, dead=True, limit=limit))
        if dead
        else with_database(config, lambda connection: outbox.entries(connection, limit=limit))
    )
    now = utc_now()
    if as_json:
        print(json.dumps([_as_json(row, now) for row in rows], indent=1))
        return
    table = new_table(
        *("Id", "Event", "Subscription", "Subject", "Attempts", "Age", "State", "Last error")
    )
    for row in rows:
        add_row(
            table,
            *(row.pk, row.event_name, row.subscription, row.subject_id or "", row.attempts),
            *(_duration(now - row.created_at), _state(row, now), row.last_error or ""),
        )
    show(table, if_empty="No dead letters." if dead else "Nothing waits.")


@commands.command()
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
    renewed = with_database(
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


@commands.command()
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
    deleted = with_database(config, lambda connection: outbox.purge(connection, before=before))
    print(f"Rows deleted: {deleted}")


def _duration(time: timedelta) -> str:
    seconds = max(0.0, time.total_seconds())
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _state(row: OutboxRow, now: datetime) -> str:
    if not isinstance(row, OutboxEntry):
        return "dead"
    if row.due_at is None:
        return "behind another"
    return "due" if row.due_at <= now else f"in {_duration(row.due_at - now)}"


def _as_json(row: OutboxRow, now: datetime) -> dict[str, object]:
    due_at = row.due_at if isinstance(row, OutboxEntry) else None
    dead_at = row.dead_at if isinstance(row, DeadLetter) else None
    return {
        "id": row.pk,
        "event": row.event_name,
        "event_id": str(row.event_id),
        "subscription": row.subscription,
        "subject_id": row.subject_id,
        "attempts": row.attempts,
        "age_seconds": round((now - row.created_at).total_seconds(), 3),
        "due_at": due_at and due_at.isoformat(),
        "dead_at": dead_at and dead_at.isoformat(),
        "last_error": row.last_error,
    }
