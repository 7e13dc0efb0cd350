"""Engines score windows of rows: the protocol, the local engine, and `score_window`, which all engines use.

A window is a group of consecutive rows that are scored in one call and then written.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Protocol

from rich.console import Console

from runtime.batch.row import InputRow, OutputRecord, make_output_record
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import block_prefix
from runtime.common.errors import KitError, NonFiniteError
from runtime.conversations.rendering import RenderedConversation, Renderer
from runtime.execution.placement_plan import PlacementPlan
from runtime.execution.placement_table import print_placement
from runtime.options import ModelOptions
from runtime.scorer import Scorer, ScoreResult

InputWindow = tuple[list[InputRow], str]
"""Rendered rows, and the digest of the input up to the last of them."""
ScoredWindow = tuple[list[OutputRecord], str]
"""The records of a window, and the same digest."""
ScoreFunction = Callable[[Sequence[RenderedConversation]], Sequence[ScoreResult]]
"""Returns one score per conversation, or why it has none."""

MIN_ROWS_TO_BLAME = 16  # if so many rows of a window, and all of them, have no finite score, the model is at fault


class Engine(Protocol):
    """Scores windows. Used as a context manager: `print_plan`, then `load`, then `score_windows`.

    Attributes:
        plan: placement of the model; with several actors, of the first one's.
        renderer: renders rows in this process.
    """

    plan: PlacementPlan
    renderer: Renderer

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...

    def print_plan(self, console: Console) -> None:
        """Print the placement of the model."""

    def load(self) -> None:
        """Load the model. CPU work uses `torch.get_num_threads()` threads, also in other processes."""

    def score_windows(self, windows: Iterable[InputWindow]) -> Generator[ScoredWindow, None, None]:
        """Yield the records of each window, in order.

        Raises:
            NonFiniteError: as `score_window`.
            KitError: raised by `windows`, after the records of the windows before it.
        """


class LocalEngine:
    """One `Scorer` in this process."""

    def __init__(self, checkpoint: Checkpoint, options: ModelOptions):
        self.plan = options.plan(checkpoint)
        self.renderer = checkpoint.renderer()
        self._checkpoint = checkpoint
        self._scorer: Scorer | None = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def print_plan(self, console: Console) -> None:
        print_placement(self.plan, self.renderer.rule, console)
        for note in self._checkpoint.notes:
            console.print(f"note: {note}", style="bold")

    def load(self) -> None:
        self._scorer = Scorer(self._checkpoint, self.plan)

    def score_windows(self, windows: Iterable[InputWindow]) -> Generator[ScoredWindow, None, None]:
        assert self._scorer is not None
        for rows, digest in windows:
            yield score_window(self._scorer.score_each, rows, self._checkpoint), digest


def score_window(score: ScoreFunction, window: Sequence[InputRow], checkpoint: Checkpoint) -> list[OutputRecord]:
    """Score rendered rows in one call of `score`, and make their records.

    Args:
        score: computes with the model of `checkpoint`.
        window: rows whose `error` is set get a record without scores, and so do rows with a conversation that has none.

    Raises:
        NonFiniteError: no row has a finite score and the model is at fault: the first failing block of `checkpoint` has
            a tensor that is not finite, or there are at least `MIN_ROWS_TO_BLAME` rows.
    """
    scored = [row for row in window if row.rendered]
    results = iter(score([each for row in scored for each in row.rendered]))
    scores: dict[int, list[float]] = {}
    errors: list[KitError] = []
    for row in scored:
        own = [next(results) for _ in row.rendered]
        failed = [result for result in own if isinstance(result, KitError)]
        if failed:
            row.mark_failed(failed[0])
            errors.append(failed[0])
        else:
            scores[id(row)] = [result for result in own if not isinstance(result, KitError)]
    if errors and not scores and all(isinstance(error, NonFiniteError) for error in errors):
        _check_model(checkpoint, window, errors)
    return [make_output_record(row, scores.get(id(row), [])) for row in window]


def _check_model(checkpoint: Checkpoint, window: Sequence[InputRow], errors: Sequence[KitError]) -> None:
    """Raise NonFiniteError if the model is at fault, given that no row of a window has a finite score."""
    blocks = {error.block for error in errors if isinstance(error, NonFiniteError)}
    first = None if None in blocks and len(blocks) == 1 else min(block for block in blocks if block is not None)
    if tensor := find_nonfinite_tensor(checkpoint, first):
        raise NonFiniteError(
            f"{checkpoint.directory}: {tensor} holds a NaN or an infinity; download or create the model again."
        )
    if len(errors) >= MIN_ROWS_TO_BLAME:
        reason = next(row.error for row in window if row.error)
        raise NonFiniteError(f"None of {len(errors)} rows has a finite score; the first: {reason}")


def find_nonfinite_tensor(checkpoint: Checkpoint, block: int | None) -> str | None:
    """Name of the first tensor with a NaN or an infinity.

    Args:
        block: index of the block to search, and for block 0 the embeddings too; None for the final norm.
    """
    outer_prefixes = ("model.norm.",) if block is None else ("model.embed_tokens.",) if block == 0 else ()
    prefixes = outer_prefixes if block is None else (*outer_prefixes, block_prefix(block))
    for name, stored in checkpoint.tensors.items():
        if name.startswith(prefixes) and stored.dtype.is_floating_point and not checkpoint.read(name).isfinite().all():
            return name
    return None
