"""Accuracy of judged rows by the groups and sections of a benchmark, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.evaluation.metrics import Estimate, wilson_interval
from runtime.preference_benchmarks.benchmark import Benchmark, JudgedRow, Weights


@dataclass(frozen=True)
class Section:
    """A section of a benchmark.

    Attributes:
        accuracy: without an interval if a group of the section has a special score.
        rows: number of rows that count in it.
        shares: share that each row won, by the row's index.
    """

    accuracy: Estimate
    rows: int
    shares: Mapping[int, float]


@dataclass(frozen=True)
class Accuracy:
    """The result of one variant on one benchmark.

    Attributes:
        groups: the score of each group, such as a subset of RewardBench.
        sections: by name; the last is the overall accuracy.
        rows: number of all rows.
        errors: why rows have no scores. They count as lost.
    """

    groups: dict[str, float]
    sections: dict[str, Section]
    rows: int
    errors: list[str]

    @property
    def overall(self) -> float | None:
        """The accuracy of the last section; None if no row counts."""
        return list(self.sections.values())[-1].accuracy.value if self.sections else None


def measure(benchmark: Benchmark, rows: Sequence[JudgedRow]) -> Accuracy:
    """Combine judged rows by the rules of the benchmark.

    Raises:
        ConversationError: as `Benchmark.special_scores`.
    """
    comparisons: dict[str, int] = {}
    won: dict[str, float] = {}
    for outcome in (outcome for row in rows for outcome in row.outcomes):
        comparisons[outcome.group] = comparisons.get(outcome.group, 0) + outcome.of
        won[outcome.group] = won.get(outcome.group, 0) + outcome.won
    special = benchmark.special_scores(rows)
    groups = {group: won[group] / comparisons[group] for group in sorted(comparisons)} | dict(special)
    sections = {
        name: _section(weights, rows, comparisons, groups, has_interval=not set(weights) & set(special))
        for name, weights in benchmark.sections(comparisons).items()
    }
    return Accuracy(groups, sections, len(rows), [row.error for row in rows if row.error])


def _section(
    weights: Weights,
    rows: Sequence[JudgedRow],
    comparisons: Mapping[str, int],
    groups: Mapping[str, float],
    *,
    has_interval: bool,
) -> Section:
    """The weighted mean of groups.

    Comparisons of one row are not independent, so the interval counts rows, at their weights: Kish's effective number
    of rows, (sum of weights)^2 / (sum of their squares). It is the number of rows if all weigh the same.
    """
    total = sum(weights.values())
    value = sum(weight / total * groups[group] for group, weight in weights.items())
    shares: dict[int, float] = {}
    row_weights: list[float] = []
    for index, row in enumerate(rows):
        counted = [
            (weights[each.group] / comparisons[each.group], each) for each in row.outcomes if each.group in weights
        ]
        if weight := sum(unit * each.of for unit, each in counted):
            shares[index] = sum(unit * each.won for unit, each in counted) / weight
            row_weights.append(weight)
    effective = sum(row_weights) ** 2 / sum(weight * weight for weight in row_weights)
    low, high = wilson_interval(value, effective) if has_interval else (None, None)
    return Section(Estimate(value=value, low=low, high=high), len(shares), shares)
