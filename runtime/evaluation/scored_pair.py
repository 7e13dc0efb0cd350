"""A preference pair and its scores from up to four runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from runtime.common.errors import NonFiniteError
from runtime.evaluation.metrics import Array

Scores = tuple[float, float]
"""Scores of (chosen, rejected)."""

ScoreSource = Literal["reference", "quantized", "noise_floor", "unrepaired"]
SCORE_SOURCES: tuple[ScoreSource, ...] = ("reference", "quantized", "noise_floor", "unrepaired")


class ScoredPair(BaseModel):
    """The scores of one pair, without its texts.

    Attributes:
        reference: from the unquantized model.
        quantized: from the model under test.
        noise_floor: from the unquantized model with all arithmetic in bf16, residual stream included.
        unrepaired: from the quantized model with the original score head, before the head was recalibrated.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    category: str = "uncategorised"
    reference: Scores
    quantized: Scores
    noise_floor: Scores | None = None
    unrepaired: Scores | None = None

    @property
    def reference_margin(self) -> float:
        """Reference score of the chosen response minus that of the rejected one."""
        return self.reference[0] - self.reference[1]

    @property
    def quantized_margin(self) -> float:
        """Quantized score of the chosen response minus that of the rejected one."""
        return self.quantized[0] - self.quantized[1]

    @property
    def agrees(self) -> bool:
        """Whether both models prefer the same response, or both tie."""
        return _sign(self.reference_margin) == _sign(self.quantized_margin)

    @property
    def flipped(self) -> bool:
        """Whether the models prefer opposite responses. A tie in one model is a disagreement, not a flip."""
        return _sign(self.reference_margin) * _sign(self.quantized_margin) < 0


class ScoredPairWithTexts(ScoredPair):
    """Scores and texts of one pair; `chosen` and `rejected` are the messages that follow `prompt`."""

    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]

    @field_validator("prompt", "chosen", "rejected")
    @classmethod
    def _are_messages(cls, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        if not all({"role", "content"} <= turn.keys() for turn in turns):
            raise ValueError("messages with role and content were expected")
        return turns

    def without_texts(self) -> ScoredPair:
        """The scores alone."""
        return ScoredPair(**self.model_dump(include=set(ScoredPair.model_fields)))


def check_finite_scores(pairs: Sequence[ScoredPair]) -> None:
    """Check that no score is NaN or infinite.

    Raises:
        NonFiniteError: for the first such pair; the message gives the pair, the run and its scores.
    """
    for pair in pairs:
        for source in SCORE_SOURCES:
            scores = getattr(pair, source)
            if scores is not None and not all(map(math.isfinite, scores)):
                raise NonFiniteError(
                    f"Pair {pair.id} ({pair.category}): the {source} scores are {scores[0]} and {scores[1]}; they must "
                    "be finite. Score that pair alone; the error then names the block that overflows."
                )


def pair_score_array(pairs: Sequence[ScoredPair], source: ScoreSource) -> Array | None:
    """Scores [pairs, 2] of one run, or None if that run was not made. A run covers all pairs or none."""
    scores = [getattr(pair, source) for pair in pairs]
    if all(each is None for each in scores):
        return None
    assert None not in scores, f"{source} scores are given for some pairs only"
    return np.array(scores, dtype=np.float64).reshape(-1, 2)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
