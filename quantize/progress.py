"""What a person sees while blocks are quantized; silent when nobody watches."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class BlockProgress:
    """A progress line: blocks, current linear, loss, memory, elapsed and remaining time."""

    def __init__(self, blocks: int, finished: int, console: Console):
        self._block = finished
        self._bar = Progress(
            TextColumn("quantizing"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[linear]:<18}"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[memory]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=blocks, completed=finished, linear="", loss="", memory="")

    def __enter__(self) -> BlockProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def watch(self, linear: str, loss: float | None) -> None:
        """A linear is begun; `loss` is the relative loss of the one before it."""
        shown = "" if loss is None else f"loss {loss:.1e}"
        self._bar.update(self._task, linear=linear, loss=shown, memory=f"{peak_memory() / 2**30:.1f} GiB")

    def block_done(self) -> None:
        """A block is on disk."""
        self._bar.advance(self._task)


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # where getrusage counts the parent's pages from before exec too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
