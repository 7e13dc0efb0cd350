"""The rows to score: read one at a time, never all in memory, and remembered by one digest."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from runtime.chat import Renderer
from runtime.errors import ConversationError, JobError
from runtime.rows import count_rows, read_lines, read_rows
from runtime.scorable import Scorable

STANDARD_INPUT = "-"
WINDOW_ROWS = 1024  # rows that cannot be scored have no tokens, and a file may be nothing but such rows


class ScoreInput:
    """An iterator over the rows of a file or of standard input.

    Attributes:
        rows: how many were read so far.
    """

    def __init__(self, placed_rows: Iterable[tuple[str, Any]], path: Path | None = None):
        """`placed_rows` are (place, row), or (place, fault), as `runtime.rows` yields them from `path`."""
        self._placed_rows = iter(placed_rows)
        self._path = path
        self._digest = hashlib.sha256()
        self.rows = 0

    @classmethod
    def open(cls, source: str) -> ScoreInput:
        """Read a file, or JSONL from standard input under the name ``-``.

        Raises:
            ConversationError: the file is not there, or is not what its name says.
        """
        if source == STANDARD_INPUT:
            return cls(read_lines(sys.stdin.buffer, "stdin", keep_faults=True))
        path = Path(source)
        rows = read_rows(path, keep_faults=True)
        first = next(rows, None)  # what is wrong with the file as a whole shows before a model is loaded
        return cls(rows if first is None else chain([first], rows), path)

    @property
    def digest(self) -> str:
        """sha256 of all rows read so far, places included."""
        return self._digest.hexdigest()

    def count(self) -> int | None:
        """About how many rows there are in all, if that is cheap to know."""
        return None if self._path is None else count_rows(self._path)

    def __iter__(self) -> Iterator[Scorable]:
        return self

    def __next__(self) -> Scorable:
        where, row = next(self._placed_rows)
        scorable = Scorable.read(row, where)
        self._digest.update(scorable.canonical())
        self.rows += 1
        return scorable

    def skip(self, rows: int, digest: str) -> None:
        """Pass over rows that an earlier run has scored.

        Raises:
            JobError: they are not the rows with that digest.
        """
        for _ in range(rows):
            if next(self, None) is None:
                raise JobError(
                    f"the input ends after {self.rows:,} rows, but {rows:,} were scored before; resume with the "
                    "same input, or start afresh in another --output."
                )
        if self.digest != digest:
            raise JobError(
                f"the first {rows:,} rows of the input are not those that were scored before; resume with the "
                "same input, or start afresh in another --output."
            )

    def windows(self, renderer: Renderer, *, tokens: int, truncate: bool, strict: bool) -> Iterator[list[Scorable]]:
        """Rendered rows, as many at a time as have `tokens` tokens together.

        A window ends with the row that fills it. So nothing is read ahead of what is yielded, and where a
        window begins alone decides where it ends, which makes a resumed run go through the same ones.

        Raises:
            ConversationError: a row cannot be scored, and `strict` was asked for.
        """
        window: list[Scorable] = []
        filled = 0
        for row in self:
            row.render(renderer, truncate=truncate)
            if strict and row.error:
                raise ConversationError(row.error)
            window.append(row)
            filled += row.tokens
            if filled >= tokens or len(window) == WINDOW_ROWS:
                yield window
                window, filled = [], 0
        if window:
            yield window
