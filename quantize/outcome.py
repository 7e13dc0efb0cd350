"""After the last block: scores, the repair of the head, and the pairs that the parity report compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.sampling import Sample
from quantize.recipe import Recipe
from quantize.repair import Evidence, Repair, fit_repair
from quantize.streams import Streams
from runtime.errors import NonFiniteError
from runtime.qwen2 import ScoreHead
from runtime.scored_pair import PairScores


@dataclass(frozen=True)
class Outcome:
    """Scores fp32 of all rows, calibration first, and the head to store.

    Attributes:
        reference: the unquantized model's.
        quantized: the packed model's, with the stored head.
        unrepaired: the packed model's with the original head, None where the head was left alone.
        noise_floor: the unquantized model's in plain bf16, parity rows only.
        repair: what was done to the head, None where it was not to be touched.
    """

    reference: torch.Tensor
    quantized: torch.Tensor
    unrepaired: torch.Tensor | None
    noise_floor: torch.Tensor
    repair: Repair | None


def conclude(streams: Streams, head: ScoreHead, sample: Sample, recipe: Recipe) -> Outcome:
    """Score all rows, and fit the repair on the calibration rows if the recipe asks for one.

    Raises:
        NonFiniteError: a score is not finite.
    """
    reference_features, quantized_features, floor_features = streams.features(head)
    reference, quantized = head.score(reference_features), head.score(quantized_features)
    _refuse_non_finite(reference, "reference")
    _refuse_non_finite(quantized, "quantized")
    floor = head.score(floor_features)
    if not recipe.repair:
        return Outcome(reference, quantized, None, floor, None)
    rows = slice(0, streams.calibration_rows)
    evidence = Evidence(reference_features[rows], quantized_features[rows], reference[rows], prompt_groups(sample))
    repair = fit_repair(head, evidence)
    repaired = repair.head.score(quantized_features)
    return Outcome(reference, repaired, quantized if repair.changed else None, floor, repair)


def parity_pairs(outcome: Outcome, sample: Sample) -> list[PairScores]:
    """The parity pairs with all their scores."""
    first = len(sample.calibration)
    unrepaired = outcome.unrepaired
    pairs = []
    for number, (pair, _, _) in enumerate(sample.parity):
        row = first + 2 * number
        pairs.append(
            PairScores(
                id=pair.id,
                category=pair.category,
                prompt=pair.prompt,
                chosen=pair.chosen,
                rejected=pair.rejected,
                reference=_two(outcome.reference, row),
                quantized=_two(outcome.quantized, row),
                unrepaired=None if unrepaired is None else _two(unrepaired, row),
                noise_floor=_two(outcome.noise_floor, 2 * number),
            )
        )
    return pairs


def _two(scores: torch.Tensor, row: int) -> tuple[float, float]:
    return float(scores[row]), float(scores[row + 1])


def prompt_groups(sample: Sample) -> list[int]:
    """Calibration rows of one prompt get one number."""
    numbers: dict[str, int] = {}
    prompts = (repr(row.conversation.messages[:-1]) for row in sample.calibration)
    return [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]


def _refuse_non_finite(scores: torch.Tensor, which: str) -> None:
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        raise NonFiniteError(f"the {which} score of row {int(bad[0])} is not finite, though every block's output was.")
