"""Terminal output: the console of all commands, tables, a progress line, byte sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class CommandConsole(Console):
    """Standard error, where all commands print.

    Names of files and tensors, categories and messages of libraries come from outside. Their control characters are
    printed as escapes, so that they cannot move the cursor or rewrite what was printed; nothing in them is markup.
    """

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escape_control_characters(text), **options)


def escape_control_characters(text: str) -> str:
    """Replace what is not printable, except line ends and tabs, by Python's escapes."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def print_table(rows: Sequence[Sequence[str]], console: Console, title: str = "") -> None:
    """Print rows of cells; the first row is the header."""
    header, *others = rows
    table = Table(*header, title=title or None, title_justify="left", title_style="bold")
    for row in others:
        table.add_row(*row)
    console.print(table)


def progress_line(console: Console, label: str, *columns: ProgressColumn, quiet: bool = False) -> Progress:
    """Return a progress line: label, bar, `columns`, elapsed and remaining time.

    It is removed when the work is done, and not shown at all if `quiet` or if the console is not a terminal.
    """
    return Progress(
        TextColumn(label),
        BarColumn(bar_width=24),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
        speed_estimate_period=math.inf,  # a step can outlast any finite period, and the estimate needs two steps
    )


def parse_size(text: str) -> int:
    """Parse `20GiB`, `500MB` or `1073741824` to bytes; 0 if `text` is not a size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", text.strip(), re.ASCII)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def format_size(nbytes: float) -> str:
    """Format bytes in GiB, MiB or KiB with one decimal: `18.1 GiB`, `3.5 MiB`, `0.4 KiB`."""
    if nbytes >= GIB:
        return f"{nbytes / GIB:.1f} GiB"
    return f"{nbytes / MIB:.1f} MiB" if nbytes >= MIB else f"{nbytes / KIB:.1f} KiB"
