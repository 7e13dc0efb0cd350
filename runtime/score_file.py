"""An output file that grows by one window of rows at a time, and is finished whole however often it was stopped.

JSONL and CSV grow in their place. Parquet cannot: its rows gather as JSONL in `OUTPUT.partial.jsonl`, and become
the output at the end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from runtime.errors import MENDABLE, JobError, KitError, in_words
from runtime.files import open_locked, sync_directory
from runtime.score_formats import CSV_HEADER, ENCODERS, write_parquet
from runtime.scored_row import Record
from runtime.written import Written, progress_path


class ScoreFile:
    """One output, locked while this process writes to it.

    As a context it lets go of the lock at its end. What a user can mend then leaves it as a JobError that says
    how to go on, if this run has written any row. If no run has, no file stays behind.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], *, resume: bool):
        """Start a file, or go on with the one that is there.

        Args:
            path: ends in `.jsonl`, `.csv` or `.parquet`.
            recipe: what decides the scores, and so may not change on resuming.

        Raises:
            JobError: the file holds rows and `resume` was not said; or it is finished, in use, changed, begun
                with another recipe, or in no place that can be written to.
        """
        self.path = path
        gathers = path.suffix == ".parquet"
        self._rows_path = path.with_name(f"{path.name}.partial.jsonl") if gathers else path
        self._encode = ENCODERS[self._rows_path.suffix]
        self._sha256 = hashlib.sha256()
        self._file = open_locked(self._rows_path, "ab+", path)
        try:
            self.written = self._take_up(recipe, resume)
        except BaseException:
            self._leave_nothing()
            self._file.close()
            raise
        self._rows_before = self.written.rows

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        counted = Written.load(self.path)  # a signal may have come between a save and its return
        if error is not None and counted is not None and not counted.rows:
            progress_path(self.path).unlink(missing_ok=True)
            self._file.truncate(0)
            self._leave_nothing()
        self._file.close()
        mendable = isinstance(error, OSError) and error.errno in MENDABLE
        if isinstance(error, OSError) and mendable and error.filename is None:
            error.filename = str(self._rows_path)  # a full disk is not named by who finds it full
        if self.written.rows > self._rows_before and (mendable or isinstance(error, KitError)):
            fault = (in_words(error) if isinstance(error, OSError) else str(error)).rstrip(".")
            raise JobError(
                f"{fault}. The {self.written.rows:,} rows in {self._rows_path} are kept; the same command with "
                "--resume goes on after them."
            ) from error

    def write(self, records: Sequence[Record], tokens: int, input_digest: str) -> None:
        """Append a window of rows and make it count.

        Args:
            tokens: how many the rows have.
            input_digest: of the input up to and with the last of them.

        Raises:
            OSError: the disk is full or fails; the window does not count then.
        """
        counted = self.written.plus(records, tokens, input_digest)
        length = self._append(self._encode(records))
        os.fsync(self._file.fileno())
        counted = replace(counted, bytes=counted.bytes + length, sha256=self._sha256.hexdigest())
        counted.save(self.path)
        self.written = counted

    def finish(self) -> None:
        """Every row is written: make the output what it is to be, and forget the progress."""
        if self._rows_path != self.path:
            write_parquet(self._rows_path, self.path)
        progress_path(self.path).unlink()
        if self._rows_path != self.path:
            self._rows_path.unlink()
        sync_directory(self.path.parent)

    def _take_up(self, recipe: dict[str, Any], resume: bool) -> Written:
        written = Written.load(self.path)
        if written is None:
            self._refuse_foreign(resume)
        if written is None or not written.rows:  # where nothing counts there is nothing to go on with
            return self._start(recipe)
        if not resume:
            raise JobError(
                f"{self.path} was begun by a run that stopped after {written.rows:,} rows; add --resume to go on, or "
                "choose another --output."
            )
        written.refuse_changes(recipe, self.path)
        self._cut_off_after(written)
        torch.set_num_threads(written.threads)
        return written

    def _refuse_foreign(self, resume: bool) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if resume:
            raise JobError(
                f"{self.path} has no {progress_path(self.path).name} beside it, so it is finished, or not of this "
                "command's making; remove it to score again, or choose another --output."
            )
        raise JobError(f"{self.path} exists; remove it, or choose another --output.")

    def _start(self, recipe: dict[str, Any]) -> Written:
        written = Written(recipe, torch.get_num_threads())
        written.save(self.path)  # first, so that whatever is in the file is known to be ours
        self._file.truncate(0)
        header = CSV_HEADER if self._rows_path.suffix == ".csv" else b""
        return replace(written, bytes=self._append(header))

    def _cut_off_after(self, written: Written) -> None:
        """Cut what a kill tore; the rows before it must be as they were written."""
        self._file.seek(0)
        left = written.bytes
        while left and (piece := self._file.read(min(left, 1 << 20))):
            self._sha256.update(piece)
            left -= len(piece)
        if left or self._sha256.hexdigest() != written.sha256:
            raise JobError(
                f"{self._rows_path} has changed since its {written.rows:,} rows were written; restore it, or remove "
                f"it and {progress_path(self.path)} to start again."
            )
        self._file.truncate(written.bytes)

    def _append(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._sha256.update(data)
        return len(data)

    def _leave_nothing(self) -> None:
        """Remove the empty file of a run that came to nothing."""
        if not progress_path(self.path).exists() and self._rows_path.exists() and not self._rows_path.stat().st_size:
            self._rows_path.unlink()
