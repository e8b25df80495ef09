"""What the commands print: tables, and text that a terminal may show."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def new_table(*columns: str) -> Table:
    """Return an empty table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """Add a row, its cells made printable."""
    table.add_row(*(printable(str(cell)) for cell in cells))


def show(table: Table, if_empty: str = "") -> None:
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


def printable(text: str) -> str:
    """Escape whatever a terminal would obey and not show."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
