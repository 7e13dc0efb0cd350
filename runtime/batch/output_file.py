"""Write records: to a file that grows window by window and can be resumed, or to standard output.

JSONL and CSV grow in place. Parquet cannot be appended to: its records are collected as JSONL in
`OUTPUT.partial.jsonl` and converted at the end.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from runtime.batch.formats import CSV_HEADER, ENCODERS, encode_csv, encode_jsonl, is_scores_file, write_parquet
from runtime.batch.output_state import OutputState, progress_path
from runtime.batch.row import OutputRecord
from runtime.common.errors import USER_FIXABLE_ERRNOS, JobError, KitError, describe_os_error
from runtime.common.files import naming, open_locked, sync_directory


def is_finished(path: Path, source: str | Path) -> bool:
    """Whether `path` is the complete output of an earlier run, and newer than its input if that is a file."""
    if not path.is_file() or not path.stat().st_size or progress_path(path).exists() or not is_scores_file(path):
        return False
    changed = Path(source).is_file() and Path(source).stat().st_mtime > path.stat().st_mtime
    return not changed


def remove_converted_rows(path: Path) -> None:
    """Remove the rows that a finished Parquet file was made of, if its run was killed before it did so."""
    rows = _rows_path(path)
    if rows != path and rows.is_file() and is_scores_file(rows):
        rows.unlink(missing_ok=True)


def _rows_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.jsonl") if path.suffix == ".parquet" else path


class OutputWriter(Protocol):
    """Destination of records. Used as a context manager: `write` for each window, then `finish`.

    Attributes:
        state: what is written so far.
    """

    state: OutputState

    def __enter__(self) -> OutputWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, records: Sequence[OutputRecord], input_digest: str, formats: Mapping[str, str]) -> None:
        """Append a window.

        Args:
            input_digest: digest of the input up to the last of these rows.
            formats: the formats of the rows read so far, each with the location of its first row.

        Raises:
            OSError: the write failed; the window is not counted in `state`.
        """

    def finish(self) -> None:
        """Complete the output after the last window."""


class OutputFile:
    """An `OutputWriter` to a file, locked against other processes and resumable.

    If the context ends with an error that the user can fix, a JobError says how to resume, provided that this run wrote
    any rows. If neither this run nor an earlier one wrote rows, no file is left.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], *, resume: bool, escape_formulas: bool = False):
        """Start or resume an output.

        Args:
            path: ends in `.jsonl`, `.csv` or `.parquet`.
            recipe: the options that determine the scores; a resumed run must have the same.
            escape_formulas: as in `encode_csv`, for CSV.

        Raises:
            JobError: `path` has rows but `resume` is False; or it is finished, in use, modified, not writable, or was
                started with another recipe.
        """
        self.path = path
        self._rows_path = _rows_path(path)
        self._encode = (
            partial(encode_csv, escape_formulas=True) if escape_formulas else ENCODERS[self._rows_path.suffix]
        )
        self._sha256 = hashlib.sha256()
        self._file = open_locked(self._rows_path, "ab+", path)
        try:
            self.state = self._start_or_resume(recipe, resume)
        except BaseException:
            self._remove_if_empty()
            self.close()
            raise
        self._rows_before = self.state.rows

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            saved = OutputState.load(self.path)  # not `self.state`: a signal may have come just after a save
            if error is not None and saved is not None and not saved.rows:
                self._truncate(0)  # first: rows without a record could not be told from another program's file
                progress_path(self.path).unlink(missing_ok=True)
                self._remove_if_empty()
        finally:
            self.close()
        fixable = isinstance(error, OSError) and error.errno in USER_FIXABLE_ERRNOS
        if self.state.rows > self._rows_before and (fixable or isinstance(error, KitError)):
            reason = (describe_os_error(error) if isinstance(error, OSError) else str(error)).rstrip(".")
            raise JobError(
                f"{reason}. The {self.state.rows:,} rows in {self._rows_path} are kept; the same command with --resume "
                "continues after them."
            ) from error

    def close(self) -> None:
        """Close and unlock the file. The rows written so far can be resumed."""
        self._file.close()

    def write(self, records: Sequence[OutputRecord], input_digest: str, formats: Mapping[str, str]) -> None:
        latest = self.state.with_records(records, input_digest, formats)
        length = self._append(self._encode(records))
        with naming(self._rows_path):
            os.fsync(self._file.fileno())
        latest = replace(latest, bytes=latest.bytes + length, sha256=self._sha256.hexdigest())
        latest.save(self.path)
        self.state = latest

    def finish(self) -> None:
        """Convert the rows to Parquet if that is the format, and remove the resume record."""
        if self._rows_path != self.path:
            write_parquet(self._rows_path, self.path)
        progress_path(self.path).unlink()
        if self._rows_path != self.path:
            self._rows_path.unlink(missing_ok=True)
        sync_directory(self.path.parent)

    def _start_or_resume(self, recipe: dict[str, Any], resume: bool) -> OutputState:
        state = OutputState.load(self.path)
        if state is None:
            self._reject_existing_file(resume)
        if state is None or not state.rows:
            return self._start(recipe)
        if not resume:
            raise JobError(
                f"{self.path} was started by a run that stopped after {state.rows:,} rows; add --resume to continue, "
                "or choose another --output."
            )
        state.check_recipe(recipe, self.path)
        self._verify_and_truncate(state)
        torch.set_num_threads(state.threads)
        return state

    def _reject_existing_file(self, resume: bool) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if resume:
            raise JobError(
                f"{self.path} has no {progress_path(self.path).name} next to it: it was not written by this command, "
                "or its input has changed since; remove it, or choose another --output."
            )
        raise JobError(f"{self.path} exists; remove it, or choose another --output.")

    def _start(self, recipe: dict[str, Any]) -> OutputState:
        state = OutputState(recipe, torch.get_num_threads())
        state.save(self.path)  # before any byte of output, so that a restart knows the file is its own
        self._truncate(0)
        header = CSV_HEADER if self._rows_path.suffix == ".csv" else b""
        return replace(state, bytes=self._append(header))

    def _verify_and_truncate(self, state: OutputState) -> None:
        """Check the counted bytes against their digest, and cut off what a killed run wrote after them."""
        self._file.seek(0)
        left = state.bytes
        while left and (piece := self._file.read(min(left, 1 << 20))):
            self._sha256.update(piece)
            left -= len(piece)
        if left or self._sha256.hexdigest() != state.sha256:
            raise JobError(
                f"{self._rows_path} has changed since its {state.rows:,} rows were written; restore it, or remove it "
                f"and {progress_path(self.path)} to start again."
            )
        self._truncate(state.bytes)

    def _truncate(self, size: int) -> None:
        with naming(self._rows_path):
            os.ftruncate(self._file.fileno(), size)  # unlike truncate() it is repeated after a signal

    def _append(self, data: bytes) -> int:
        rest = memoryview(data)
        with naming(self._rows_path):
            while rest:
                rest = rest[self._file.write(rest) :]
        self._sha256.update(data)
        return len(data)

    def _remove_if_empty(self) -> None:
        """Remove the file if it is empty and has no resume record."""
        if not progress_path(self.path).exists() and self._rows_path.exists() and not self._rows_path.stat().st_size:
            self._rows_path.unlink()


class StandardOutput:
    """An `OutputWriter` of JSONL to standard output; it cannot be resumed."""

    def __init__(self) -> None:
        self.state = OutputState(recipe={}, threads=0)
        self._stream = sys.stdout.buffer  # now, because the Ray engine redirects `sys.stdout` later

    def __enter__(self) -> StandardOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, records: Sequence[OutputRecord], input_digest: str, formats: Mapping[str, str]) -> None:
        try:
            self._stream.write(encode_jsonl(records))
            self._stream.flush()
        except OSError as error:
            error.filename = "standard output"
            raise
        self.state = self.state.with_records(records, input_digest, formats)

    def finish(self) -> None:
        pass
