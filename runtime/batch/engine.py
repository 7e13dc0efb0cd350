"""Engines score windows of rows: the protocol, the local engine, and `score_window`, which all engines use.

A window is a group of consecutive rows that are scored in one call and then written.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import NoReturn, Protocol

import torch
from rich.console import Console

from runtime.batch.row import InputRow, OutputRecord, make_output_record
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import block_prefix
from runtime.common.errors import ConversationError, NonFiniteError
from runtime.conversations.rendering import RenderedConversation, Renderer
from runtime.execution.placement_plan import PlacementPlan
from runtime.execution.placement_table import print_placement
from runtime.options import ModelOptions
from runtime.scorer import Scorer

InputWindow = tuple[list[InputRow], str]
"""Rendered rows, and the digest of the input up to the last of them."""
ScoredWindow = tuple[list[OutputRecord], str]
"""The records of a window, and the same digest."""
ScoreFunction = Callable[[Sequence[RenderedConversation]], Sequence[float]]
"""Returns one score per conversation."""


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
        print_placement(self.plan, console)

    def load(self) -> None:
        self._scorer = Scorer(self._checkpoint, self.plan)

    def score_windows(self, windows: Iterable[InputWindow]) -> Generator[ScoredWindow, None, None]:
        assert self._scorer is not None
        for rows, digest in windows:
            yield score_window(self._scorer.scores, rows, self._checkpoint), digest


def score_window(score: ScoreFunction, window: Sequence[InputRow], checkpoint: Checkpoint) -> list[OutputRecord]:
    """Score rendered rows in one call of `score`, and make their records.

    If a row fails, the window is bisected until the row is alone, because each call may stream the whole model.

    Args:
        score: computes with the model of `checkpoint`.
        window: rows whose `error` is set get a record without scores.

    Raises:
        NonFiniteError: no row has a finite score, so the model is at fault. The message names the non-finite tensor if
            the first failing block of `checkpoint` has one.
    """
    errors: list[NonFiniteError] = []
    found = _score_rows(score, [row for row in window if row.rendered], errors)
    if errors and not found:
        _raise_nonfinite(checkpoint, window, errors[0])
    scores = iter(found)
    return [make_output_record(row, [next(scores) for _ in row.rendered]) for row in window]


def _score_rows(score: ScoreFunction, rows: Sequence[InputRow], errors: list[NonFiniteError]) -> list[float]:
    """Scores of the rows that can be scored; the others are marked as failed, and non-finite ones added to `errors`."""
    if not rows:
        return []
    try:
        return list(score([each for row in rows for each in row.rendered]))
    except NonFiniteError as error:
        if len(rows) == 1:
            rows[0].mark_failed(error)
            errors.append(error)
            return []
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            longest = max(len(each.token_ids) for each in rows[0].rendered)
            rows[0].mark_failed(
                ConversationError(
                    f"a conversation of {longest:,} tokens needs more memory than the GPU has free; free some with "
                    "--memory or --stream."
                )
            )
            return []
    # Outside the except blocks, where the exception would keep the failed call's tensors alive.
    half = len(rows) // 2
    return _score_rows(score, rows[:half], errors) + _score_rows(score, rows[half:], errors)


def _raise_nonfinite(checkpoint: Checkpoint, window: Sequence[InputRow], error: NonFiniteError) -> NoReturn:
    tensor = find_nonfinite_tensor(checkpoint, error.block)
    first = next(row.error for row in window if row.error)
    raise NonFiniteError(
        f"{checkpoint.directory}: {tensor} holds a NaN or an infinity; download or create the model again."
        if tensor
        else first
    )


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
