"""``tortoise-auth adopt``: make the accounts of a table that another program filled log in here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tortoise.backends.base.client import BaseDBAsyncClient

from tortoise_auth.cli.database import AsJson, ConfigPath, ServicePath, with_database
from tortoise_auth.cli.loading import FAILED, CommandError, load_service
from tortoise_auth.cli.output import add_row, new_table, printable, show
from tortoise_auth.users.adoption import Accounts, Adoption, AdoptionReport, StoredScheme

_MAX_KEYS_SHOWN = 20


def adopt(
    service: ServicePath,
    config: ConfigPath = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Do it. Without it nothing is changed.")
    ] = False,
    hash_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="A column of the same table with the hashes of passwords, such as "
            "hashed_password. They are copied to `password` where that is empty.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let the accounts of a table that was filled by another program log in here.

    Says which hashes log in, normalises addresses and user names, and gives each account a
    `session_version`. Merges nothing. The application may run meanwhile, and the command may be
    stopped and run again. Exits with 1 if an account needs a decision of yours.
    """
    auth = load_service(service)

    async def work(_: BaseDBAsyncClient) -> AdoptionReport:
        adoption = Adoption(auth.user_model, auth.passwords, hash_column=hash_column, apply=apply)
        with _progress() as advance:
            async for report in adoption.run():
                advance(report.rows_read, report.rows_total)
        return adoption.report

    report = with_database(config, work, auth.user_model)
    if as_json:
        print(json.dumps(_as_json(report)))
    else:
        _show(report)
    if not report.is_settled:
        raise CommandError("Some accounts need a decision of yours: they are listed above", FAILED)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], object]]:
    """Show a bar on the standard error at a terminal, and nothing elsewhere."""
    console = Console(stderr=True)
    shown = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown
    ) as progress:
        task = progress.add_task("Rows", total=None)
        yield lambda read, total: progress.update(task, completed=read, total=max(read, total))


def _show(report: AdoptionReport) -> None:
    print(f"Accounts: {report.accounts}")
    print()
    table = new_table("Password", "Accounts", "Logs in here")
    for scheme, accounts in sorted(report.hashes.items(), key=_most_first):
        logs_in = "yes" if scheme.obstacle is None else "no"
        add_row(table, scheme.name or "unknown", accounts.count, logs_in)
    if report.without_password:
        add_row(table, "none", report.without_password, "no")
    if table.row_count:
        show(table)
        print()
    done = new_table("Accounts", "Changed" if report.applied else "To be changed")
    for column, number in sorted(report.normalized.items()):
        add_row(done, number, f"{column}: the spelling under which it is looked up")
    if report.hashes_copied:
        add_row(done, report.hashes_copied, "password: copied from the other column")
    if report.versions_set:
        add_row(done, report.versions_set, "session_version: a random number")
    show(done, if_empty="Nothing is to be changed.")
    _show_decisions(report)
    if report.changes and not report.applied:
        print()
        print("Nothing was changed. To do it, add --apply.")


def _most_first(found: tuple[StoredScheme, Accounts]) -> tuple[int, bool, str]:
    scheme, accounts = found
    return -accounts.count, scheme.name is None, scheme.name or ""


def _show_decisions(report: AdoptionReport) -> None:
    findings = [
        *((f"{column}: these would become one", group) for column, group in _groups(report)),
        *((f"{column}: cannot be one", each) for column, each in sorted(report.unreadable.items())),
        *(
            (f"password, {scheme.name or 'unknown'}: {scheme.obstacle}", accounts)
            for scheme, accounts in report.hashes.items()
            if scheme.obstacle is not None
        ),
        ("Changed meanwhile, run the command again", report.changed_meanwhile),
    ]
    lines = [f"{what}: {_keys(accounts)}" for what, accounts in findings if accounts.count]
    if lines:
        print()
        print("Left alone, by primary key:")
    for line in lines:
        print(f"  {printable(line)}")


def _groups(report: AdoptionReport) -> Iterator[tuple[str, Accounts]]:
    for column, groups in sorted(report.colliding.items()):
        for group in groups:
            yield column, group


def _keys(accounts: Accounts) -> str:
    more = accounts.count - len(accounts.keys[:_MAX_KEYS_SHOWN])
    keys = ", ".join(accounts.keys[:_MAX_KEYS_SHOWN])
    return f"{keys}, and {more} more" if more else keys


def _as_json(report: AdoptionReport) -> dict[str, object]:
    return {
        "applied": report.applied,
        "accounts": report.accounts,
        "passwords": [
            {
                "scheme": scheme.name,
                "obstacle": scheme.obstacle,
                "count": accounts.count,
                "keys": accounts.keys if scheme.obstacle is not None else [],
            }
            for scheme, accounts in report.hashes.items()
        ],
        "without_password": report.without_password,
        "normalized": report.normalized,
        "hashes_copied": report.hashes_copied,
        "session_versions_set": report.versions_set,
        "session_versions_in_use": report.versions_in_use,
        "unreadable": {
            column: _counted(accounts) for column, accounts in report.unreadable.items()
        },
        "colliding": {
            column: [_counted(group) for group in groups]
            for column, groups in report.colliding.items()
        },
        "changed_meanwhile": _counted(report.changed_meanwhile),
    }


def _counted(accounts: Accounts) -> dict[str, object]:
    return {"count": accounts.count, "keys": accounts.keys}
