"""Final scores of all rows after the last block, with the recalibrated score head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.sampling import Sample
from quantize.job.recipe import Recipe
from quantize.report.head_recalibration import HeadRecalibration, RecalibrationData, recalibrate_head
from quantize.sweep.hidden_states import SweepStates
from runtime.common.errors import NonFiniteError
from runtime.evaluation.scored_pair import ScoredPairWithTexts
from runtime.modeling.score_head import ScoreHead


@dataclass(frozen=True)
class FinalScores:
    """Scores fp32 of all rows, calibration rows first, and the recalibration of the head.

    Attributes:
        reference: scores of the unquantized model.
        quantized: scores of the packed model with the stored head.
        before_recalibration: scores of the packed model with the original head; None if the head was not changed.
        noise_floor: scores of the unquantized model in plain bf16, parity rows only.
        recalibration: None if recalibration was disabled.
    """

    reference: torch.Tensor
    quantized: torch.Tensor
    before_recalibration: torch.Tensor | None
    noise_floor: torch.Tensor
    recalibration: HeadRecalibration | None


def compute_final_scores(states: SweepStates, head: ScoreHead, sample: Sample, recipe: Recipe) -> FinalScores:
    """Score all rows and, if the recipe enables it, recalibrate the head on the calibration rows.

    Raises:
        NonFiniteError: a score is not finite.
    """
    reference_features, quantized_features, floor_features = states.features(head)
    reference, quantized = head.score(reference_features), head.score(quantized_features)
    _check_finite_scores(reference, "reference")
    _check_finite_scores(quantized, "quantized")
    floor = head.score(floor_features)
    if not recipe.repair:
        return FinalScores(reference, quantized, None, floor, None)
    rows = slice(0, states.calibration_rows)
    data = RecalibrationData(quantized_features[rows], reference[rows], prompt_groups(sample))
    recalibration = recalibrate_head(head, data)
    recalibrated = recalibration.head.score(quantized_features)
    before = quantized if recalibration.changed else None
    return FinalScores(reference, recalibrated, before, floor, recalibration)


def parity_pairs(final_scores: FinalScores, sample: Sample) -> list[ScoredPairWithTexts]:
    """Return the parity pairs with their scores from every model."""
    first = len(sample.calibration)
    before = final_scores.before_recalibration
    pairs = []
    for number, (pair, _, _) in enumerate(sample.parity):
        row = first + 2 * number
        pairs.append(
            ScoredPairWithTexts(
                id=pair.id,
                category=pair.category,
                prompt=pair.prompt,
                chosen=pair.chosen,
                rejected=pair.rejected,
                reference=_two(final_scores.reference, row),
                quantized=_two(final_scores.quantized, row),
                unrepaired=None if before is None else _two(before, row),
                noise_floor=_two(final_scores.noise_floor, 2 * number),
            )
        )
    return pairs


def _two(scores: torch.Tensor, row: int) -> tuple[float, float]:
    return float(scores[row]), float(scores[row + 1])


def prompt_groups(sample: Sample) -> list[int]:
    """Number the prompts of the calibration rows; rows with the same prompt get the same number."""
    numbers: dict[str, int] = {}
    prompts = (repr(row.conversation.messages[:-1]) for row in sample.calibration)
    return [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]


def _check_finite_scores(scores: torch.Tensor, model: str) -> None:
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        raise NonFiniteError(
            f"the {model} score of row {int(bad[0])} is not finite, but all block outputs were; check the score head "
            "for damaged weights."
        )
