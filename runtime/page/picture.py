"""Geometry of a comparison: two scores on one axis, and how much of their difference quantizing may have made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.charts import Axis
from runtime.page.markup import percent
from runtime.preference import probability_preferred

Side = Literal["A", "B", ""]
USUAL = 2.5  # standard deviations of the reference scores that the axis shows even where no score lies
EDGE = 12.0  # percent of the width within which a label is set beside its point rather than centred on it


@dataclass(frozen=True)
class Picture:
    """What the comparison's template draws; coordinates are percent of the width.

    Attributes:
        preferred: empty where it is too close to call.
        error: the parity error of a margin, None where none was measured.
        chance: P(A preferred) in percent; `chance_low` and `chance_high` are that with the margin off by the error.
        tie: where the preferred response's score would be too close to call, None without an error.
    """

    score_a: float
    score_b: float
    margin: float
    preferred: Side
    error: float | None
    chance: float
    chance_low: float
    chance_high: float
    axis: Axis
    tie: tuple[float, float] | None

    @property
    def headline(self) -> str:
        """The outcome in a few words."""
        return f"{self.preferred} is preferred" if self.preferred else "Too close to call"

    @property
    def sentence(self) -> str:
        """What the picture shows, for those who do not see it and those who want it said."""
        if self.margin == 0:
            return "Both responses have the same score."
        first, second = ("A", "B") if self.margin > 0 else ("B", "A")
        probability = probability_preferred(abs(self.margin))
        lead = f"{first} scores {abs(self.margin):.2f} above {second}"
        if self.preferred:
            lead += f", which reads as a probability of {percent(probability)} that people prefer {first}"
        return f"{lead}.{self._trust()}"

    def _trust(self) -> str:
        if self.error is None:
            return ""
        if not self.preferred:
            return f" Quantizing moves a margin by about {self.error:.2f}, so the original may well prefer the other."
        ratio = abs(self.margin) / self.error if self.error else 0.0
        times = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
        return f" That is {times} times as far as quantizing moves a margin, {self.error:.2f}." if ratio else ""

    def x(self, score: float) -> float:
        """Where a score lies."""
        return self.axis.at(score)

    def anchor(self, score: float) -> str:
        """How a label is set at a score: `start`, `middle` or `end`."""
        return "start" if self.x(score) < EDGE else "end" if self.x(score) > 100 - EDGE else "middle"


def draw(score_a: float, score_b: float, error: float | None, usual: tuple[float, float] | None = None) -> Picture:
    """Lay out a comparison.

    Args:
        error: the parity error of a margin, in units of the score.
        usual: mean and standard deviation of the scores that the original model gives.
    """
    margin = score_a - score_b
    decided = margin != 0 and (error is None or abs(margin) > error)
    preferred: Side = "" if not decided else "A" if margin > 0 else "B"
    off = error or 0.0
    trailing = min(score_a, score_b)
    return Picture(
        score_a,
        score_b,
        margin,
        preferred,
        error,
        100 * probability_preferred(margin),
        100 * probability_preferred(margin - off),
        100 * probability_preferred(margin + off),
        _axis([score_a, score_b, trailing - off, trailing + off], usual),
        None if error is None else (trailing - off, trailing + off),
    )


def _axis(values: list[float], usual: tuple[float, float] | None) -> Axis:
    if usual is not None:
        mean, spread = usual
        values = [*values, mean - USUAL * spread, mean + USUAL * spread]
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 1.0
    return Axis(low - air, high + air, 0.0, 100.0)
