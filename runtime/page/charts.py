"""Geometry of the page's charts: a comparison of two scores, and a histogram. `figures.html` draws them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.evaluation.charts import Axis, round_step
from runtime.page.formatting import percent
from runtime.scorer import probability_preferred

Side = Literal["A", "B", ""]
SHOWN_REFERENCE_STDS = 2.5  # the score axis covers at least the reference mean ± this many standard deviations
LABEL_EDGE = 12.0  # percent of the width; closer to an edge, a label starts or ends at its point instead of centring
TARGET_BINS = 28
LEFT, RIGHT = 6.0, 99.0  # plotting area of the histogram, percent of the width
TOP, BOTTOM = 12.0, 180.0  # pixels


@dataclass(frozen=True)
class ComparisonChart:
    """Two scores on one axis, and the zone within which the original model may disagree.

    Attributes:
        preferred: empty if the scores are equal or the margin is within the parity error.
        parity_error: of a margin, in units of the score; None if unknown.
        percent_a: P(A preferred) in percent; `percent_a_low` and `percent_a_high` are for the margin -/+ parity error.
        axis: from scores to percent of the width.
        tie_zone: scores within the parity error of the lower score; None if the parity error is unknown.
    """

    score_a: float
    score_b: float
    margin: float
    preferred: Side
    parity_error: float | None
    percent_a: float
    percent_a_low: float
    percent_a_high: float
    axis: Axis
    tie_zone: tuple[float, float] | None

    @property
    def headline(self) -> str:
        return f"{self.preferred} is preferred" if self.preferred else "Too close to call"

    @property
    def sentence(self) -> str:
        """The outcome as text, which also serves readers who cannot see the chart."""
        if self.margin == 0:
            return "Both responses have the same score."
        first, second = ("A", "B") if self.margin > 0 else ("B", "A")
        text = f"{first} scores {abs(self.margin):.2f} above {second}"
        if self.preferred:
            probability = percent(probability_preferred(abs(self.margin)))
            text += f", which corresponds to a probability of {probability} that people prefer {first}"
        return f"{text}.{self._parity_sentence()}"

    def _parity_sentence(self) -> str:
        if not self.parity_error:
            return ""
        typical = f" Quantization typically changes a margin by {self.parity_error:.2f}"
        if not self.preferred:
            return f"{typical}, so the original model may prefer the other response."
        ratio = abs(self.margin) / self.parity_error
        return f"{typical}; this margin is {ratio:.{0 if ratio >= 10 else 1}f} times as large."

    def x(self, score: float) -> float:
        """The coordinate of a score."""
        return self.axis.at(score)

    def anchor(self, score: float) -> str:
        """The SVG `text-anchor` of a label at a score."""
        return "start" if self.x(score) < LABEL_EDGE else "end" if self.x(score) > 100 - LABEL_EDGE else "middle"


def make_comparison_chart(
    score_a: float,
    score_b: float,
    parity_error: float | None,
    reference_stats: tuple[float, float] | None = None,
) -> ComparisonChart:
    """Lay out the chart of two scores.

    Args:
        parity_error: of a margin, in units of the score.
        reference_stats: mean and standard deviation of the reference scores.
    """
    margin = score_a - score_b
    decided = margin != 0 and (parity_error is None or abs(margin) > parity_error)
    error = parity_error or 0.0
    lower = min(score_a, score_b)
    return ComparisonChart(
        score_a=score_a,
        score_b=score_b,
        margin=margin,
        preferred="" if not decided else "A" if margin > 0 else "B",
        parity_error=parity_error,
        percent_a=100 * probability_preferred(margin),
        percent_a_low=100 * probability_preferred(margin - error),
        percent_a_high=100 * probability_preferred(margin + error),
        axis=_score_axis([score_a, score_b, lower - error, lower + error], reference_stats),
        tie_zone=None if parity_error is None else (lower - error, lower + error),
    )


def _score_axis(values: list[float], reference_stats: tuple[float, float] | None) -> Axis:
    if reference_stats is not None:
        mean, std = reference_stats
        values = [*values, mean - SHOWN_REFERENCE_STDS * std, mean + SHOWN_REFERENCE_STDS * std]
    low, high = min(values), max(values)
    padding = 0.06 * (high - low) or 1.0
    return Axis(low - padding, high + padding, 0.0, 100.0)


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram; `side` is `below` or `above` zero."""

    x: float
    width: float
    y: float
    side: str
    label: str


@dataclass(frozen=True)
class Histogram:
    """Bars with x in percent of the width and y in pixels.

    Attributes:
        tie_zone: margins within the parity error of zero, clipped to the axis; None if unknown or off the axis.
    """

    x: Axis
    y: Axis
    bars: list[Bar]
    tie_zone: tuple[float, float] | None
    description: str

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Whole numbers up to the highest bar, as (coordinate, label)."""
        step = max(1, math.ceil(round_step(self.y.high / 3)))
        return [(self.y.at(count), f"{count:,}") for count in range(0, int(self.y.high) + 1, step)]


def make_histogram(values: Sequence[float], noun: str, parity_error: float | None = None) -> Histogram:
    """Count values in bins of a round width with an edge at zero.

    Args:
        noun: what the values are, such as `margins`.
        parity_error: of a margin, if the values are margins.
    """
    low, high = min(values), max(values)
    width = round_step((high - low) / TARGET_BINS) if high > low else 1.0
    counts = Counter(math.floor(value / width) for value in values)
    x = Axis(min(counts) * width, (max(counts) + 1) * width, LEFT, RIGHT)
    y = Axis(0, max(counts.values()), BOTTOM, TOP)
    decimals = max(0, 2 - math.floor(math.log10(width)))
    bars = [
        Bar(
            x=x.at(bin * width),
            width=round(max(x.at((bin + 1) * width) - x.at(bin * width) - 0.25, 0.1), 2),
            y=y.at(count),
            side="below" if bin < 0 else "above",
            label=f"{bin * width:.{decimals}f} to {(bin + 1) * width:.{decimals}f}: {count:,}",
        )
        for bin, count in sorted(counts.items())
    ]
    above = sum(value > 0 for value in values)
    description = f"Histogram of {len(values):,} {noun}, from {low:.2f} to {high:.2f}; {above:,} are above zero."
    return Histogram(x, y, bars, _clip_tie_zone(parity_error, x), description)


def _clip_tie_zone(parity_error: float | None, x: Axis) -> tuple[float, float] | None:
    if parity_error is None or parity_error < x.low or -parity_error > x.high:
        return None
    return max(-parity_error, x.low), min(parity_error, x.high)
