"""Scores of one window of rows: what every engine calls, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from runtime.architecture import block_prefix
from runtime.chat import Rendered
from runtime.checkpoint import Checkpoint
from runtime.errors import ConversationError, NonFiniteError
from runtime.scorable import Scorable
from runtime.scored_row import Record, scored_record

Score = Callable[[Sequence[Rendered]], Sequence[float]]
"""One score a conversation, from this thread's scorer or through a queue."""


def score_window(score: Score, window: Sequence[Scorable], checkpoint: Checkpoint) -> list[Record]:
    """Records of rendered rows, scored in one call of `score`, which computes with `checkpoint`.

    Where a row cannot be scored, halves are, and halves of those, until it is alone: where blocks are streamed every
    call reads the whole model.

    Raises:
        NonFiniteError: not one row has a finite score, so that it is the model's fault rather than a row's. Its message
            names the tensor, if the checkpoint holds one that is not finite where it first showed.
    """
    faults: list[NonFiniteError] = []
    found = _scores(score, [row for row in window if row.rendered], faults)
    if faults and not found:
        _blame(checkpoint, window, faults[0])
    scores = iter(found)
    return [scored_record(row, [next(scores) for _ in row.rendered]) for row in window]


def _scores(score: Score, rows: Sequence[Scorable], faults: list[NonFiniteError]) -> list[float]:
    """Of the rows that have finite ones, and that a GPU has the memory for; the others fail."""
    if not rows:
        return []
    try:
        return list(score([each for row in rows for each in row.rendered]))
    except NonFiniteError as fault:
        if len(rows) == 1:
            rows[0].fail(fault)
            faults.append(fault)
            return []
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            longest = max(len(each.token_ids) for each in rows[0].rendered)
            rows[0].fail(
                ConversationError(
                    f"{longest:,} tokens in a conversation take more memory than the GPU has left; leave more of it "
                    "free with --memory or --stream."
                )
            )
            return []
    # Not above, where the fault still holds what it was computed from.
    half = len(rows) // 2
    return _scores(score, rows[:half], faults) + _scores(score, rows[half:], faults)


def _blame(checkpoint: Checkpoint, window: Sequence[Scorable], fault: NonFiniteError) -> NoReturn:
    """Not one row has a finite score."""
    tensor = find_damage(checkpoint, fault.block)
    first = next(row.error for row in window if row.error)
    raise NonFiniteError(
        f"{checkpoint.directory}: {tensor} holds a NaN or an infinity; fetch or write the model again."
        if tensor
        else first
    )


def find_damage(checkpoint: Checkpoint, block: int | None) -> str | None:
    """The first tensor of a block, or of what is around the blocks, with a NaN or an infinity in it."""
    around = ("model.norm.",) if block is None else ("model.embed_tokens.",) if block == 0 else ()
    prefixes = around if block is None else (*around, block_prefix(block))
    for name, stored in checkpoint.tensors.items():
        if name.startswith(prefixes) and stored.dtype.is_floating_point and not checkpoint.read(name).isfinite().all():
            return name
    return None
