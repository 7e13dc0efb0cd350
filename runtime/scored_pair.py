"""A preference pair with the scores that several runs gave it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from runtime.errors import NonFiniteError
from runtime.figures import Array

Scores = tuple[float, float]
"""Scores of (chosen, rejected)."""

Run = Literal["reference", "quantized", "noise_floor", "unrepaired"]
RUNS: tuple[Run, ...] = ("reference", "quantized", "noise_floor", "unrepaired")


class ScoredPair(BaseModel):
    """Scores without texts: what a report keeps of every pair."""

    model_config = ConfigDict(frozen=True)

    id: str
    category: str = "uncategorised"
    reference: Scores
    quantized: Scores
    noise_floor: Scores | None = None  # the unquantized model, all in plain bf16
    unrepaired: Scores | None = None  # the quantized model before its repair

    @property
    def reference_margin(self) -> float:
        return self.reference[0] - self.reference[1]

    @property
    def quantized_margin(self) -> float:
        return self.quantized[0] - self.quantized[1]

    @property
    def agrees(self) -> bool:
        """Both runs prefer the same response, or both tie."""
        return _sign(self.reference_margin) == _sign(self.quantized_margin)

    @property
    def flipped(self) -> bool:
        """The runs prefer opposite responses; a tie on one side alone is a disagreement but no flip."""
        return _sign(self.reference_margin) * _sign(self.quantized_margin) < 0


class PairScores(ScoredPair):
    """Scores with texts; `chosen` and `rejected` are the messages that continue `prompt`."""

    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]

    def without_texts(self) -> ScoredPair:
        return ScoredPair(**self.model_dump(include=set(ScoredPair.model_fields)))


def check_finite(pairs: Sequence[ScoredPair]) -> None:
    """Refuse scores that are not numbers.

    Raises:
        NonFiniteError: naming the first such pair, the run and its scores.
    """
    for pair in pairs:
        for run in RUNS:
            scores = getattr(pair, run)
            if scores is not None and not all(map(math.isfinite, scores)):
                raise NonFiniteError(
                    f"Pair {pair.id} ({pair.category}): the {run} scores are {scores[0]} and {scores[1]}; "
                    "parity needs finite ones. Score that pair alone to see in which block it goes wrong."
                )


def scores_of(pairs: Sequence[ScoredPair], run: Run) -> Array | None:
    """Scores [pairs, 2] of one run, or None if it was not made. A run covers all pairs or none."""
    scores = [getattr(pair, run) for pair in pairs]
    if all(each is None for each in scores):
        return None
    assert None not in scores, f"{run} scores are given for some pairs only"
    return np.array(scores, dtype=np.float64).reshape(-1, 2)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
