"""Parity of a quantized reward model with its unquantized reference, measured on preference pairs.

Everything here is arithmetic on scores: no model is needed, and nothing depends on the clock, so two
identical runs write identical reports.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, field_validator

from runtime.breakdown import Group, by_area, by_category, by_margin, by_style
from runtime.errors import ConversationError, KitError, NonFiniteError
from runtime.figures import Estimate, Figures, margins, measure_figures, proportion, spread, tidy
from runtime.scored_pair import PairScores, ScoredPair, check_finite, scores_of

__all__ = [
    "BlockError",
    "PairScores",
    "ParityReport",
    "ScoredPair",
    "Subject",
    "ThresholdResult",
    "Thresholds",
    "hold",
    "measure_parity",
    "read_report",
]

SCHEMA_VERSION = 1
WORST_PAIRS = 10


class Subject(BaseModel):
    """What was compared with what.

    `reference` says whose scores are the reference's; `reference_dtype` is the truth in words, such as
    "bfloat16 weights, float32 arithmetic"; `group_size` is -1 where there are no groups.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    method: str
    bits: int
    bits_per_weight: float
    group_size: int = -1
    reference: str = "the unquantized model"
    reference_dtype: str
    kit_version: str
    settings: dict[str, JsonValue] = {}


class BlockError(BaseModel):
    """How far one block's output is from the reference stream, and how well its linear layers were solved.

    `mean_error` and `max_error` are over conversations: the norm of the difference of the hidden states at
    the scored token, relative to the reference's norm. `linear_losses` and `sqnr` (signal to quantization
    noise, in dB; None where nothing was lost) are by linear layer.
    """

    model_config = ConfigDict(frozen=True)

    block: int
    mean_error: float
    max_error: float
    linear_losses: dict[str, float] = {}
    sqnr: dict[str, float | None] = {}

    @field_validator("sqnr")
    @classmethod
    def _nothing_lost(cls, sqnr: dict[str, float | None]) -> dict[str, float | None]:
        return {name: None if ratio == math.inf else ratio for name, ratio in sqnr.items()}


class Thresholds(BaseModel):
    """Limits a report is held to. `min_agreement` is a share of pairs, `max_shift` a mean shift in
    standard deviations of the reference scores; None asks for nothing."""

    model_config = ConfigDict(frozen=True)

    min_agreement: float | None = None
    max_shift: float | None = None


class ThresholdResult(BaseModel):
    """One limit, the value held against it, and whether it was met; a value that cannot be told is not."""

    model_config = ConfigDict(frozen=True)

    name: Literal["min_agreement", "max_shift"]
    limit: float
    value: float | None
    met: bool


class ParityReport(BaseModel):
    """Everything a reader needs to trust or refuse a quantized variant. Written as parity.json."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    subject: Subject
    reference_mean: float
    reference_std: float
    reference_accuracy: Estimate
    figures: Figures
    noise_floor: Figures | None
    before_repair: Figures | None
    by_margin: list[Group]
    by_area: list[Group]
    by_category: list[Group]
    by_style: dict[str, list[Group]]
    thresholds: list[ThresholdResult]
    block_errors: list[BlockError]
    repair: dict[str, JsonValue] | None
    notes: list[str]
    worst: list[PairScores]
    scores: list[ScoredPair]

    @property
    def passed(self) -> bool:
        """Whether every threshold that was set is met."""
        return all(threshold.met for threshold in self.thresholds)

    def to_json(self) -> str:
        """Indented JSON, ending in a newline; `read_report` reads it back unchanged."""
        return self.model_dump_json(indent=2) + "\n"


def measure_parity(
    pairs: Sequence[PairScores],
    subject: Subject,
    *,
    block_errors: Iterable[BlockError] = (),
    repair: dict[str, JsonValue] | None = None,
    notes: Iterable[str] = (),
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> ParityReport:
    """Compare quantized with reference scores; `seed` draws the bootstrap resamples.

    Raises:
        ConversationError: there are no pairs.
        NonFiniteError: a score or a block error is NaN or infinite.
    """
    block_errors = list(block_errors)
    if not pairs:
        raise ConversationError("Parity was asked for on 0 preference pairs; give at least one.")
    check_finite(pairs)
    _check_blocks(block_errors)
    reference = scores_of(pairs, "reference")
    assert reference is not None
    compared = {
        run: measure_figures(reference, scores, seed)
        for run in ("quantized", "noise_floor", "unrepaired")
        if (scores := scores_of(pairs, run)) is not None
    }
    figures = compared["quantized"]
    return ParityReport(
        subject=subject,
        reference_mean=tidy(reference.mean()) or 0.0,
        reference_std=tidy(spread(reference)) or 0.0,
        reference_accuracy=proportion(int((margins(reference) > 0).sum()), len(pairs)),
        figures=figures,
        noise_floor=compared.get("noise_floor"),
        before_repair=compared.get("unrepaired"),
        by_margin=by_margin(pairs),
        by_area=by_area(pairs),
        by_category=by_category(pairs),
        by_style=by_style(pairs),
        thresholds=hold(figures, thresholds),
        block_errors=block_errors,
        repair=repair,
        notes=list(notes),
        worst=worst_pairs(pairs),
        scores=[pair.without_texts() for pair in pairs],
    )


def worst_pairs(pairs: Sequence[PairScores], count: int = WORST_PAIRS) -> list[PairScores]:
    """Disagreements first, then by how much the margin moved; pairs that did not move are left out."""

    def move(pair: PairScores) -> float:
        return abs(pair.quantized_margin - pair.reference_margin)

    moved = [pair for pair in pairs if move(pair) > 0]
    return sorted(moved, key=lambda pair: (pair.agrees, -move(pair)))[:count]


def read_report(path: str | Path) -> ParityReport:
    """Read a parity.json.

    Raises:
        KitError: the file is not a parity report, or of a schema version that this kit does not read.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise KitError(f"{path} is no parity report ({error!r}); name a parity.json of this kit.") from error
    if version != SCHEMA_VERSION:
        raise KitError(f"{path}: schema_version is {version!r}, this kit reads {SCHEMA_VERSION}; measure parity again.")
    try:
        return ParityReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise KitError(f"{path}: {place}: {fault['msg']}; measure parity again.") from error


def _check_blocks(block_errors: Sequence[BlockError]) -> None:
    for each in block_errors:
        numbers = {"mean_error": each.mean_error, "max_error": each.max_error}
        numbers |= {f"loss of {name}": loss for name, loss in each.linear_losses.items()}
        numbers |= {f"SQNR of {name}": ratio for name, ratio in each.sqnr.items() if ratio is not None}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"Block {each.block}: {name} is {value}; quantize that block again with more damping."
                )


def hold(figures: Figures, thresholds: Thresholds) -> list[ThresholdResult]:
    """Each limit that is set, and whether the figures meet it."""
    results = []
    if (limit := thresholds.min_agreement) is not None:
        value = figures.agreement.value
        met = value is not None and value >= limit
        results.append(ThresholdResult(name="min_agreement", limit=limit, value=value, met=met))
    if (limit := thresholds.max_shift) is not None:
        value = figures.mean_shift.value
        met = value is not None and value <= limit
        results.append(ThresholdResult(name="max_shift", limit=limit, value=value, met=met))
    return results
