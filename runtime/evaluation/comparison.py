"""Compare a variant's scores with reference scores and with the golden scores: scores in, parity report out.

No model is loaded here; `run.score_variant` and `runtime.page.parity_check` supply the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import JsonValue

from runtime.common.errors import ConversationError, NonFiniteError
from runtime.evaluation.breakdowns import by_area, by_category, by_margin, by_style
from runtime.evaluation.golden import PUBLISHED_SCORES, GoldenResult, default_tolerance
from runtime.evaluation.metrics import margins, measure_metrics, proportion, round_significant, standard_deviation
from runtime.evaluation.pairs import PairReferenceScores, Selection
from runtime.evaluation.report import BlockError, ParityReport, Subject, Thresholds, check_thresholds
from runtime.evaluation.scored_pair import ScoredPairWithTexts, Scores, check_finite_scores, pair_score_array
from runtime.evaluation.variant import Variant
from runtime.evaluation.worst_pairs import worst_pairs


@dataclass(frozen=True)
class VariantScores:
    """Scores that one variant computed on this machine.

    Attributes:
        scores: of the selected pairs, in their order.
        golden: of the model card's conversations; None if they were not scored.
        product_dtype: dtype of the inputs of matmuls in the blocks.
        token_budget: tokens per batch.
    """

    scores: list[Scores]
    golden: tuple[float, ...] | None
    product_dtype: torch.dtype
    token_budget: int

    @property
    def arithmetic(self) -> str:
        """Name of `product_dtype`, such as `float32`."""
        return str(self.product_dtype).removeprefix("torch.")


def measure_parity(
    pairs: Sequence[ScoredPairWithTexts],
    subject: Subject,
    *,
    block_errors: Iterable[BlockError] = (),
    repair: dict[str, JsonValue] | None = None,
    notes: Iterable[str] = (),
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> ParityReport:
    """Measure the parity of quantized with reference scores.

    Args:
        pairs: all with scores from the same sources (see `ScoredPair`).
        block_errors, repair, notes: copied into the report.
        seed: of the bootstrap.

    Raises:
        ConversationError: there are no pairs.
        NonFiniteError: a score or a block error is NaN or infinite.
    """
    block_errors = list(block_errors)
    if not pairs:
        raise ConversationError("parity cannot be measured on 0 preference pairs; give at least one.")
    check_finite_scores(pairs)
    _check_finite_block_errors(block_errors)
    reference = pair_score_array(pairs, "reference")
    assert reference is not None
    figures, noise_floor, before_repair = (
        None if (scores := pair_score_array(pairs, source)) is None else measure_metrics(reference, scores, seed)
        for source in ("quantized", "noise_floor", "unrepaired")
    )
    assert figures is not None
    return ParityReport(
        subject=subject,
        reference_mean=round_significant(reference.mean()) or 0.0,
        reference_std=round_significant(standard_deviation(reference)) or 0.0,
        reference_accuracy=proportion(int((margins(reference) > 0).sum()), len(pairs)),
        figures=figures,
        noise_floor=noise_floor,
        before_repair=before_repair,
        by_margin=by_margin(pairs),
        by_area=by_area(pairs),
        by_category=by_category(pairs),
        by_style=by_style(pairs),
        thresholds=check_thresholds(figures, thresholds),
        block_errors=block_errors,
        repair=repair,
        notes=list(notes),
        worst=worst_pairs(pairs),
        scores=[pair.without_texts() for pair in pairs],
    )


def build_parity_report(
    model: Variant,
    variant_scores: VariantScores,
    reference_scores: PairReferenceScores,
    selection: Selection,
    golden: GoldenResult | None,
    devices: str,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
) -> ParityReport:
    """Build the parity report of one variant on the selected pairs; `devices` is recorded in its settings.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    noise_floor_scores: Sequence[Scores | None] = reference_scores.noise_floor or [None] * len(selection.pairs)
    pairs = [
        ScoredPairWithTexts(
            id=pair.id,
            category=pair.category,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            reference=reference,
            quantized=scores,
            noise_floor=noise_floor,
        )
        for pair, reference, scores, noise_floor in zip(
            selection.pairs, reference_scores.scores, variant_scores.scores, noise_floor_scores, strict=True
        )
    ]
    here: dict[str, JsonValue] = {
        "devices": devices,
        "arithmetic": variant_scores.arithmetic,
        "token_budget": variant_scores.token_budget,
    }
    golden_notes = [golden.message()] if golden else []
    return measure_parity(
        pairs,
        model.subject(reference_scores.name, reference_scores.dtype, {"here": here}),
        notes=[
            *selection.notes[model.label],
            *_other_reference_note(model, reference_scores),
            *_score_change_note(model, pairs),
            *golden_notes,
        ],
        thresholds=thresholds,
    )


def check_golden_scores(model: Variant, variant_scores: VariantScores, tolerance: float | None) -> GoldenResult:
    """Compare the scores of the model card's conversations with the published ones.

    Args:
        tolerance: largest accepted absolute difference; None uses `default_tolerance`.
    """
    if model.golden_name is None or variant_scores.golden is None:
        return GoldenResult(model=model.label)
    if tolerance is None:
        tolerance = default_tolerance(model.golden_name, variant_scores.product_dtype, model.checkpoint.quantization)
    return GoldenResult(
        model=model.label,
        name=model.golden_name,
        published=PUBLISHED_SCORES[model.golden_name],
        scores=variant_scores.golden,
        tolerance=tolerance,
    )


def _other_reference_note(model: Variant, reference_scores: PairReferenceScores) -> list[str]:
    """A note if the variant was quantized from another checkpoint than the reference."""
    if model.stored_reference is None or model.stored_reference.fingerprint == reference_scores.fingerprint:
        return []
    return [f"it was quantized from {model.stored_reference.model}, but the reference here is another checkpoint"]


def _score_change_note(model: Variant, pairs: Sequence[ScoredPairWithTexts]) -> list[str]:
    """A note on how far the scores are from those in the variant's own parity.json, measured when it was quantized."""
    scores_when_quantized = {pair.id: pair.quantized for pair in model.report.scores} if model.report else {}
    both = [(pair.quantized, scores_when_quantized[pair.id]) for pair in pairs if pair.id in scores_when_quantized]
    reference_std = standard_deviation(np.array([pair.reference for pair in pairs]))
    if not both or not reference_std:
        return []
    here, before = np.array(both).swapaxes(0, 1)
    return [
        f"its scores are within {np.abs(here - before).max() / reference_std:.2g} sd of those in its own parity.json, "
        f"on {len(both):,} pairs"
    ]


def _check_finite_block_errors(block_errors: Sequence[BlockError]) -> None:
    for each in block_errors:
        numbers = {"mean_error": each.mean_error, "max_error": each.max_error}
        numbers |= {f"loss of {name}": loss for name, loss in each.linear_losses.items()}
        numbers |= {f"SQNR of {name}": ratio for name, ratio in each.sqnr.items() if ratio is not None}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"Block {each.block}: {name} is {value}; quantize again with a larger --damp-percent."
                )
