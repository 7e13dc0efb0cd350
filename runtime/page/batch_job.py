"""Score an uploaded file row by row, as `runtime.score` does, through the queue that all visitors share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from runtime.api.batcher import ServerBusyError
from runtime.api.service import ServedModel
from runtime.batch.engine import score_window
from runtime.batch.formats import CSV_HEADER, encode_csv, encode_jsonl, write_parquet
from runtime.batch.reader import ScoreInput
from runtime.batch.row import OutputRecord
from runtime.common.errors import ConversationError, KitError
from runtime.common.files import write_file_atomically
from runtime.conversations.rendering import RenderedConversation
from runtime.scorer import ScoreResult

UPLOAD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # no compressed files
MAX_ROWS = 100_000  # bounds the memory for the records, which are held until the visitor leaves
CANCEL_POLL_SECONDS = 0.2
MAX_RETRY_WAIT_SECONDS = 2.0  # before a request that found the queue full is sent again


class JobCancelled(Exception):
    """The job was cancelled while it waited for scores."""


class BatchJob:
    """The scoring of one uploaded file.

    Attributes:
        records: of the rows scored so far, in file order.
        errors: number of records that have an error instead of a score.
        total: approximate number of rows; None if unknown.
        failure: why the job ended early; empty if it did not.
        finished: whether every row has its record.
    """

    def __init__(self, model: ServedModel, path: Path, *, truncate: bool = False):
        """Open the file in the format that its suffix names.

        Raises:
            ConversationError: the file is not in that format, or has more than `MAX_ROWS` rows.
        """
        if path.suffix not in UPLOAD_SUFFIXES:
            raise ConversationError(
                f"{path.name} is not one of {', '.join(UPLOAD_SUFFIXES)}; upload one of these, uncompressed."
            )
        self.model = model
        self.records: list[OutputRecord] = []
        self.errors = 0
        self.failure = ""
        self.finished = False
        self._rows = ScoreInput.open(str(path))
        self.total = self._rows.count()
        _check_row_count(self.total or 0)
        self._truncate = truncate
        self._cancelled = threading.Event()
        self._start = time.perf_counter()
        self._seconds: float | None = None

    @property
    def seconds(self) -> float:
        """The time since the start, or the total time once `run` has ended."""
        return self._seconds if self._seconds is not None else time.perf_counter() - self._start

    @property
    def formats(self) -> dict[str, str]:
        """The formats of the rows read so far, each with the location of its first row."""
        return self._rows.formats

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop scoring and withdraw queued requests. Thread-safe."""
        self._cancelled.set()

    def run(self) -> Iterator[None]:
        """Score the file, yielding after every window. Sets `finished` or `failure`, unless it was cancelled."""
        plan = self.model.scorer.plan
        # Short windows update the progress often and let other visitors in between. When blocks are streamed, every
        # window loads all of them, so windows are long.
        tokens = plan.token_budget if plan.placement == "resident" else plan.window_tokens
        windows = self._rows.windows(self.model.scorer.renderer, tokens=tokens, truncate=self._truncate, strict=False)
        try:
            for window in windows:
                _check_row_count(len(self.records) + len(window))
                self.records += score_window(self._score, window, self.model.scorer.checkpoint)
                self.errors += sum(bool(row.error) for row in window)
                yield
                if self.cancelled:
                    return
            self.finished = True
        except JobCancelled:
            pass
        except KitError as error:
            self.failure = str(error)
        finally:
            if not self.finished:
                self.cancel()
            self._seconds = self.seconds

    def write(self, directory: Path) -> list[str]:
        """Write the records so far as JSONL, CSV and Parquet; return the three paths."""
        lines = directory / "scores.jsonl"
        write_file_atomically(lines, encode_jsonl(self.records))
        write_file_atomically(directory / "scores.csv", CSV_HEADER + encode_csv(self.records))
        write_parquet(lines, directory / "scores.parquet")
        return [str(directory / f"scores{suffix}") for suffix in (".jsonl", ".csv", ".parquet")]

    def _score(self, rendered: Sequence[RenderedConversation]) -> list[ScoreResult]:
        future = self._submit(rendered)
        while True:
            try:
                return future.result(timeout=CANCEL_POLL_SECONDS)
            except FutureTimeoutError:
                if self.cancelled:
                    future.cancel()
                    raise JobCancelled from None

    def _submit(self, rendered: Sequence[RenderedConversation]) -> Future[list[ScoreResult]]:
        """Submit to the queue, retrying while it is full."""
        while not self.cancelled:
            try:
                return self.model.submit_each(rendered)
            except ServerBusyError as busy:
                self._cancelled.wait(min(busy.retry_after, MAX_RETRY_WAIT_SECONDS))
        raise JobCancelled


def _check_row_count(rows: int) -> None:
    if rows > MAX_ROWS:
        raise ConversationError(
            f"The file has more than {MAX_ROWS:,} rows, the limit of this page; score it with python -m runtime.score."
        )
