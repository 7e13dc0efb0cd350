"""The progress bar of scoring. It is shown on terminals only."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import TextColumn

from runtime.batch.output_state import OutputState
from runtime.common.terminal import progress_line

SHOWN_ERRORS = 5


class ScoringProgressBar:
    """Shows rows, errors, rows/s, tokens/s, elapsed time and, if the number of rows is known, remaining time.

    Attributes:
        rows: rows of this run.
        tokens: tokens of this run.
    """

    def __init__(self, console: Console, previous: OutputState, total_rows: int | None, *, quiet: bool = False):
        """`previous` is what earlier runs wrote; `quiet` hides the bar."""
        self.rows = self.tokens = 0
        self._console = console
        self._previous = previous
        self._num_errors = 0
        self._start = time.perf_counter()
        texts = map(TextColumn, ("{task.fields[rows]}", "{task.fields[rates]}"))
        self._bar = progress_line(console, "scoring", *texts, quiet=quiet)
        self._task = self._bar.add_task("", total=total_rows, completed=previous.rows, rows="", rates="")

    def __enter__(self) -> ScoringProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Time since this run started to score."""
        return time.perf_counter() - self._start

    @property
    def rows_per_second(self) -> float:
        """Rate of this run."""
        return self.rows / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Rate of this run in rendered tokens; shared prefixes count once per conversation."""
        return self.tokens / self.seconds

    def print_note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text)

    def print_error(self, error: str) -> None:
        """Print the error of a row, for the first `SHOWN_ERRORS` rows."""
        self._num_errors += 1
        if self._num_errors <= SHOWN_ERRORS:
            self._console.print(error)
        if self._num_errors == SHOWN_ERRORS:
            self._console.print("(further errors are counted but appear in the output only)")

    def update(self, state: OutputState) -> None:
        """Show what is written now."""
        self.rows = state.rows - self._previous.rows
        self.tokens = state.tokens - self._previous.tokens
        errors = f", {state.errors:,} with errors" if state.errors else ""
        self._bar.update(
            self._task,
            completed=state.rows,
            rows=f"{state.rows:,} rows{errors}",
            rates=f"{self.rows_per_second:,.1f} rows/s  {self.tokens_per_second:,.0f} tokens/s",
        )
