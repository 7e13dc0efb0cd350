"""The one line that long work shows on a terminal; silent when nobody watches."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_line(console: Console, what: str, *columns: ProgressColumn, quiet: bool = False) -> Progress:
    """`what`, a bar, `columns`, elapsed and remaining time; it is gone when the work is done."""
    return Progress(
        TextColumn(what),
        BarColumn(bar_width=24),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
        speed_estimate_period=math.inf,  # a block may take longer than any period, and two are needed for a pace
    )
