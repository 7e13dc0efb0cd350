"""The progress line of a quantization; shown only on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from runtime.common.process_memory import peak_memory
from runtime.common.terminal import format_size, progress_line


class BlockProgress:
    """A progress line: blocks, current linear, loss, memory, elapsed and remaining time."""

    def __init__(self, blocks: int, finished: int, console: Console):
        self._block = finished
        texts = map(TextColumn, ("{task.fields[linear]:<18}", "{task.fields[loss]}", "{task.fields[memory]}"))
        self._bar = progress_line(console, "quantizing", MofNCompleteColumn(), *texts)
        self._task = self._bar.add_task("", total=blocks, completed=finished, linear="", loss="", memory="")

    def __enter__(self) -> BlockProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def linear_started(self, linear: str, loss: float | None) -> None:
        """Show the current linear and `loss`, the relative loss of the previous one."""
        shown = "" if loss is None else f"loss {loss:.1e}"
        self._bar.update(self._task, linear=linear, loss=shown, memory=format_size(peak_memory()))

    def block_done(self) -> None:
        """Advance the bar by one block."""
        self._bar.advance(self._task)
