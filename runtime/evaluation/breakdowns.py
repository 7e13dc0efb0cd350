"""Breakdowns of parity by margin, area, category, response length and markdown.

Quantization can keep the overall agreement and still lose accuracy in one category, or introduce a length bias. Every
group therefore also has both models' accuracy: among pairs whose chosen response is longer, that is how often each
model prefers the longer response.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from runtime.evaluation.metrics import Estimate, margins, proportion, round_significant, standard_deviation
from runtime.evaluation.scored_pair import ScoredPairWithTexts, pair_score_array

MARGIN_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)  # in standard deviations of the reference scores
SIMILAR_LENGTH = 1.2  # largest ratio of lengths that counts as similar

LENGTH_GROUPS = ("chosen longer", "similar length", "chosen shorter")
MARKDOWN_GROUPS = ("chosen has more", "the same", "chosen has less")

_MARKDOWN_PATTERN = re.compile(
    r"^[ ]{0,8}(?:\#{1,6}\s | [-*+]\s | \d{1,3}[.)]\s | >\s | ``` | \|.*\|)"  # heading, list, quote, table
    r"| \*\*(?=\S) | `[^`\n]+`",  # bold, inline code
    re.MULTILINE | re.VERBOSE,
)


class BenchmarkSection(BaseModel):
    """Accuracy in one section of a public benchmark.

    Attributes:
        published: what the WorldPM paper prints for the model; None without it.
        reference_accuracy, flips, p_value: of the comparison with a reference; None without one. `p_value` is of
            McNemar's exact test.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    rows: int
    accuracy: Estimate
    published: float | None = None
    reference_accuracy: float | None = None
    flips: int | None = None
    p_value: float | None = None


class BenchmarkAccuracy(BaseModel):
    """The evaluation on a public benchmark, as `python -m runtime.evaluate` adds it to a report.

    Attributes:
        title: of the benchmark.
        reference: label of the model that was compared with; empty without one.
    """

    model_config = ConfigDict(frozen=True)

    title: str
    reference: str
    sections: list[BenchmarkSection]


class GroupMetrics(BaseModel):
    """Metrics of one group of pairs.

    Attributes:
        noise_agreement: agreement of the bf16 noise floor with the reference; None if it was not measured.
        mean_shift: mean absolute shift in standard deviations of all reference scores, not only the group's.
        reference_accuracy, quantized_accuracy: share of pairs whose chosen response gets the higher score.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    pairs: int
    flips: int
    agreement: Estimate
    noise_agreement: float | None
    mean_shift: float | None
    reference_accuracy: float
    quantized_accuracy: float

    @field_validator("agreement")
    @classmethod
    def _has_an_interval(cls, agreement: Estimate) -> Estimate:
        if None in (agreement.value, agreement.low, agreement.high):
            raise ValueError("a value with its interval was expected")
        return agreement


def by_margin(pairs: Sequence[ScoredPairWithTexts]) -> list[GroupMetrics]:
    """Bins of the absolute reference margin, in standard deviations, ascending; empty bins are left out."""
    reference_std = _reference_std(pairs)
    names = [f"{low:g} to {high:g}" for low, high in zip(MARGIN_EDGES, MARGIN_EDGES[1:], strict=False)]
    names.append(f"{MARGIN_EDGES[-1]:g} or more")

    def group_name(pair: ScoredPairWithTexts) -> str:
        margin = abs(pair.reference_margin) / reference_std if reference_std else 0.0
        return names[int(np.searchsorted(MARGIN_EDGES, margin, side="right")) - 1]

    return _measure_groups(pairs, group_name, names)


def by_area(pairs: Sequence[ScoredPairWithTexts]) -> list[GroupMetrics]:
    """Areas in alphabetical order; the area of category "objective/maths" is "objective"."""
    return _measure_groups(pairs, _top_level_category, sorted({_top_level_category(pair) for pair in pairs}))


def by_category(pairs: Sequence[ScoredPairWithTexts]) -> list[GroupMetrics]:
    """Categories in alphabetical order."""
    return _measure_groups(pairs, lambda pair: pair.category, sorted({pair.category for pair in pairs}))


def by_style(pairs: Sequence[ScoredPairWithTexts]) -> dict[str, list[GroupMetrics]]:
    """Groups by which response is longer ("length") and by which has more markdown ("markdown")."""
    return {
        "length": _measure_groups(pairs, length_style, LENGTH_GROUPS),
        "markdown": _measure_groups(pairs, markdown_style, MARKDOWN_GROUPS),
    }


def length_style(pair: ScoredPairWithTexts) -> str:
    """One of `LENGTH_GROUPS`, from the number of characters in each response."""
    chosen, rejected = len(_text(pair.chosen)), len(_text(pair.rejected))
    if max(chosen, rejected) <= SIMILAR_LENGTH * min(chosen, rejected):
        return LENGTH_GROUPS[1]
    return LENGTH_GROUPS[0] if chosen > rejected else LENGTH_GROUPS[2]


def markdown_style(pair: ScoredPairWithTexts) -> str:
    """One of `MARKDOWN_GROUPS`, from the number of headings, list items, quotes, table rows, code and bold spans."""
    chosen, rejected = (len(_MARKDOWN_PATTERN.findall(_text(side))) for side in (pair.chosen, pair.rejected))
    return MARKDOWN_GROUPS[1 - (chosen > rejected) + (chosen < rejected)]


def _measure_groups(
    pairs: Sequence[ScoredPairWithTexts], group_name: Callable[[ScoredPairWithTexts], str], names: Sequence[str]
) -> list[GroupMetrics]:
    reference_std = _reference_std(pairs)
    pairs_by_group: dict[str, list[ScoredPairWithTexts]] = {name: [] for name in names}
    for pair in pairs:
        pairs_by_group[group_name(pair)].append(pair)
    return [
        _measure_group(name, group_pairs, reference_std) for name, group_pairs in pairs_by_group.items() if group_pairs
    ]


def _measure_group(name: str, pairs: Sequence[ScoredPairWithTexts], reference_std: float) -> GroupMetrics:
    reference, quantized = pair_score_array(pairs, "reference"), pair_score_array(pairs, "quantized")
    noise = pair_score_array(pairs, "noise_floor")
    assert reference is not None and quantized is not None
    reference_signs = np.sign(margins(reference))
    same = reference_signs == np.sign(margins(quantized))
    return GroupMetrics(
        name=name,
        pairs=len(pairs),
        flips=sum(pair.flipped for pair in pairs),
        agreement=proportion(int(same.sum()), len(pairs)),
        noise_agreement=None
        if noise is None
        else round_significant(np.mean(reference_signs == np.sign(margins(noise)))),
        mean_shift=round_significant(np.abs(quantized - reference).mean() / reference_std) if reference_std else None,
        reference_accuracy=float(np.mean(reference_signs > 0)),
        quantized_accuracy=float(np.mean(margins(quantized) > 0)),
    )


def _reference_std(pairs: Sequence[ScoredPairWithTexts]) -> float:
    reference = pair_score_array(pairs, "reference")
    assert reference is not None
    return standard_deviation(reference)


def _top_level_category(pair: ScoredPairWithTexts) -> str:
    return pair.category.partition("/")[0]


def _text(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)
