"""A table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_table(rows: Sequence[Sequence[str]], console: Console, title: str = "") -> None:
    """Print rows of cells, the first of them being the header."""
    header, *others = rows
    table = Table(*header, title=title or None, title_justify="left", title_style="bold")
    for row in others:
        table.add_row(*row)
    console.print(table)
