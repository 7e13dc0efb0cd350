"""Read the rows to score one at a time, keep a digest of them, and group them into windows."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from runtime.batch.row import InputRow
from runtime.common.errors import ConversationError, JobError
from runtime.conversations.rendering import Renderer
from runtime.conversations.row_files import count_rows, read_jsonl_file, read_rows
from runtime.conversations.row_sources import list_row_files
from runtime.conversations.rows.context import RowOptions

STANDARD_INPUT = "-"
WINDOW_ROWS = 1024  # most rows of a window; rows that cannot be scored have no tokens and would never fill one


class ScoreInput:
    """Iterator over the rows of a file or of standard input.

    Attributes:
        rows: number of rows read so far.
        formats: the formats read so far, each with the location of its first row.
    """

    def __init__(
        self,
        located_rows: Iterable[tuple[str, Any]],
        files: Sequence[Path] = (),
        options: RowOptions | None = None,
    ):
        """Wrap rows that are in memory or being read.

        Args:
            located_rows: (location, row or ConversationError), as `runtime.conversations.row_files.read_rows` yields.
            files: the files they come from, for `count`.
            options: how rows are read.
        """
        self._options = options
        self.formats: dict[str, str] = {}
        self._formats_of_file: set[str] = set()
        self._notes: list[str] = []
        self._notes_taken = 0
        self._located_rows = iter(located_rows)
        self._files = files
        self._digest = hashlib.sha256()
        self.rows = 0

    @classmethod
    def open(cls, source: str, options: RowOptions | None = None) -> ScoreInput:
        """Open a file, a directory of files, a pattern of file names, or standard input as JSONL if `source` is ``-``.

        Raises:
            ConversationError: a file does not exist or is not in the format of its suffix, or there is none.
        """
        if source == STANDARD_INPUT:
            return cls(read_jsonl_file(sys.stdin.buffer, "stdin", keep_errors=True), options=options)
        files = list_row_files(source)
        rows = cls((), files, options)
        located_rows = chain.from_iterable(map(rows._read_file, files))
        first = next(located_rows, None)  # so that an unreadable file fails here, before a model is loaded
        rows._located_rows = located_rows if first is None else chain([first], located_rows)
        return rows

    @property
    def digest(self) -> str:
        """sha256 of all rows read so far, including their locations."""
        return self._digest.hexdigest()

    def count(self) -> int | None:
        """Approximate total number of rows; None if counting would require parsing the file."""
        counts = [count_rows(file) for file in self._files]
        return None if not counts or None in counts else sum(filter(None, counts))

    def __iter__(self) -> Iterator[InputRow]:
        return self

    def __next__(self) -> InputRow:
        where, row = next(self._located_rows)
        input_row = InputRow.read(row, where, self._options)
        if input_row.format:
            self.formats.setdefault(input_row.format, input_row.where)
            if input_row.format not in self._formats_of_file:
                self._formats_of_file.add(input_row.format)
                self._notes.append(f"{input_row.where}: the format is {input_row.format}")
        self._digest.update(input_row.canonical())
        self.rows += 1
        return input_row

    def take_notes(self) -> list[str]:
        """Notes on the formats that were recognised since the last call: one for each file and format."""
        notes = self._notes[self._notes_taken :]  # the Ray engine reads rows in another thread
        self._notes_taken += len(notes)
        return notes

    def skip(self, rows: int, digest: str) -> None:
        """Skip rows that an earlier run scored.

        Raises:
            JobError: the rows do not have this digest.
        """
        for _ in range(rows):
            if next(self, None) is None:
                raise JobError(
                    f"the input ends after {self.rows:,} rows, but {rows:,} were scored before; resume with the "
                    "same input, or start again with another --output."
                )
        if self.digest != digest:
            raise JobError(
                f"the first {rows:,} rows of the input differ from the rows that were scored before; resume with the "
                "same input, or start again with another --output."
            )

    def windows(self, renderer: Renderer, *, tokens: int, truncate: bool, strict: bool) -> Iterator[list[InputRow]]:
        """Yield windows of rendered rows. A window ends at `tokens` tokens or `WINDOW_ROWS` rows, or with the input.

        A window ends with the row that fills it, so no row is read ahead, and the windows of a resumed run are those of
        an uninterrupted one.

        Args:
            truncate: drop the oldest turns of conversations that are too long.
            strict: raise the error of a row instead of keeping it in `InputRow.error`.

        Raises:
            ConversationError: a row cannot be scored, and `strict` is set.
        """
        window: list[InputRow] = []
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

    def _read_file(self, file: Path) -> Iterator[tuple[str, Any]]:
        self._formats_of_file = set()
        yield from read_rows(file, keep_errors=True)
