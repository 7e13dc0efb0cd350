"""What a person sees while blocks are quantized; silent when nobody watches."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from runtime.memory import peak_memory
from runtime.progress_line import progress_line
from runtime.sizes import show_size


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

    def watch(self, linear: str, loss: float | None) -> None:
        """A linear is begun; `loss` is the relative loss of the one before it."""
        shown = "" if loss is None else f"loss {loss:.1e}"
        self._bar.update(self._task, linear=linear, loss=shown, memory=show_size(peak_memory()))

    def block_done(self) -> None:
        """A block is on disk."""
        self._bar.advance(self._task)
