"""An uploaded file, scored row by row as `runtime.score` does, through the queue that all visitors share."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path

from runtime.api.batcher import Busy, Closed
from runtime.api.service import ServedModel
from runtime.chat import Rendered
from runtime.errors import ConversationError, KitError
from runtime.files import write_whole
from runtime.score_formats import CSV_HEADER, encode_csv, encode_jsonl, write_parquet
from runtime.score_input import ScoreInput
from runtime.score_window import score_window
from runtime.scored_row import Record

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")  # nothing that would have to be unzipped first
MOST_ROWS = 100_000  # whose records are held for the visitor
LOOK_AROUND = 0.2  # seconds between two looks at whether the job was cancelled
LONGEST_PAUSE = 2.0  # seconds before a full queue is asked again


class Cancelled(Exception):
    """Nobody waits for the scores any more."""


class BatchJob:
    """One upload.

    Attributes:
        records: of the rows scored so far, in their order.
        errors: how many of them say why their row has no score.
        total: about how many rows there are, where that is cheap to know.
        fault: why it ended early, empty if it did not.
        finished: whether every row has its record.
    """

    def __init__(self, model: ServedModel, path: Path, *, truncate: bool = False):
        """Open the file; its name says what it is and nothing else.

        Raises:
            ConversationError: it is not what its name says, or holds more than `MOST_ROWS`.
        """
        if path.suffix not in SUFFIXES:
            raise ConversationError(
                f"{path.name} is none of {', '.join(SUFFIXES)}; upload one of these, unzipped if it was zipped."
            )
        self.model = model
        self.records: list[Record] = []
        self.errors = 0
        self.fault = ""
        self.finished = False
        self._rows = ScoreInput.open(str(path))
        self.total = self._rows.count()
        _check_rows(self.total or 0)
        self._truncate = truncate
        self._cancelled = threading.Event()
        self._start = time.perf_counter()
        self._seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Since it began, or that it took."""
        return self._seconds if self._seconds is not None else time.perf_counter() - self._start

    @property
    def cancelled(self) -> bool:
        """Whether somebody called `cancel`."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Score nothing more; what waits in the queue leaves it. From any thread."""
        self._cancelled.set()

    def run(self) -> Iterator[None]:
        """Score, yielding after every window. Ends with `finished`, `cancelled` or a `fault`."""
        plan = self.model.scorer.plan
        # Short windows show progress and leave turns to others; where blocks are brought in for each, long ones pay.
        tokens = plan.token_budget if plan.placement == "resident" else plan.window_tokens
        windows = self._rows.windows(self.model.scorer.renderer, tokens=tokens, truncate=self._truncate, strict=False)
        try:
            for window in windows:
                _check_rows(len(self.records) + len(window))
                self.records += score_window(self._score, window, self.model.scorer.checkpoint)
                self.errors += sum(bool(row.error) for row in window)
                yield
                if self.cancelled:
                    return
            self.finished = True
        except Cancelled:
            pass
        except KitError as fault:
            self.fault = str(fault)
        finally:
            if not self.finished:
                self.cancel()
            self._seconds = self.seconds

    def write(self, directory: Path) -> list[str]:
        """The records so far as JSONL, CSV and Parquet; the paths."""
        lines = directory / "scores.jsonl"
        write_whole(lines, encode_jsonl(self.records))
        write_whole(directory / "scores.csv", CSV_HEADER + encode_csv(self.records))
        write_parquet(lines, directory / "scores.parquet")
        return [str(directory / f"scores{suffix}") for suffix in (".jsonl", ".csv", ".parquet")]

    def _score(self, rendered: Sequence[Rendered]) -> list[float]:
        while not self.cancelled:
            try:
                future = self.model.submit(rendered)
                break
            except Closed:
                raise
            except Busy as busy:
                self._cancelled.wait(min(busy.retry_after, LONGEST_PAUSE))
        else:
            raise Cancelled
        while True:
            try:
                return future.result(timeout=LOOK_AROUND)
            except StillWaiting:
                if self.cancelled:
                    future.cancel()
                    raise Cancelled from None


def _check_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ConversationError(
            f"The file holds more than {MOST_ROWS:,} rows, the most that are scored here; score it with "
            "python -m runtime.score."
        )


class Downloads:
    """A directory for a visitor's results, gone with it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="worldpm-scores-")
        self.path = Path(self._directory.name)

    def close(self) -> None:
        """Remove it."""
        self._directory.cleanup()
