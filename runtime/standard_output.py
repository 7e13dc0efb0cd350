"""Scores as JSONL on standard output: for pipes, with nothing to resume."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from runtime.score_formats import encode_jsonl
from runtime.scored_row import Record
from runtime.written import Written


class StandardOutput:
    """Used as `ScoreFile` is."""

    def __init__(self) -> None:
        self.written = Written(recipe={}, threads=0)
        self._stream = sys.stdout.buffer  # as it is now: an engine may send what others print elsewhere

    def __enter__(self) -> StandardOutput:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, records: Sequence[Record], tokens: int, input_digest: str) -> None:
        """Print a window of rows, whole.

        Raises:
            BrokenPipeError: nobody reads any more.
            OSError: what it leads to is full or fails.
        """
        try:
            self._stream.write(encode_jsonl(records))
            self._stream.flush()
        except OSError as error:
            error.filename = "standard output"
            raise
        self.written = self.written.plus(records, tokens, input_digest)

    def finish(self) -> None:
        """Everything is out already."""
