"""What a person sees while rows are scored; silent when nobody watches."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import TextColumn

from runtime.progress_line import progress_line
from runtime.written import Written

SHOWN_ERRORS = 5


class ScoreProgress:
    """A progress line: rows, errors, rows/s, tokens/s, elapsed and, where the input's length is known, remaining time.

    Attributes:
        rows: rows of this run.
        tokens: tokens of this run.
    """

    def __init__(self, console: Console, earlier: Written, total_rows: int | None, *, quiet: bool = False):
        """`earlier` was written by runs before this one."""
        self.rows = self.tokens = 0
        self._console = console
        self._earlier = earlier
        self._shown_errors = 0
        self._start = time.perf_counter()
        texts = map(TextColumn, ("{task.fields[rows]}", "{task.fields[rates]}"))
        self._bar = progress_line(console, "scoring", *texts, quiet=quiet)
        self._task = self._bar.add_task("", total=total_rows, completed=earlier.rows, rows="", rates="")

    def __enter__(self) -> ScoreProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since this run began to score."""
        return time.perf_counter() - self._start

    @property
    def rows_per_second(self) -> float:
        """Of this run."""
        return self.rows / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of this run; tokens as rendered, so that what responses share is counted for each."""
        return self.tokens / self.seconds

    def complain(self, error: str) -> None:
        """Show the first few rows' errors as they are met."""
        self._shown_errors += 1
        if self._shown_errors <= SHOWN_ERRORS:
            self._console.print(error)
        if self._shown_errors == SHOWN_ERRORS:
            self._console.print("(further rows with errors are counted, and say so in the output alone)")

    def update(self, written: Written) -> None:
        """A window is written."""
        self.rows = written.rows - self._earlier.rows
        self.tokens = written.tokens - self._earlier.tokens
        errors = f", {written.errors:,} with errors" if written.errors else ""
        self._bar.update(
            self._task,
            completed=written.rows,
            rows=f"{written.rows:,} rows{errors}",
            rates=f"{self.rows_per_second:,.1f} rows/s  {self.tokens_per_second:,.0f} tokens/s",
        )
