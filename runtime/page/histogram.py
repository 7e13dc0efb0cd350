"""Geometry of a histogram of margins or scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.charts import Axis, round_step

BARS = 28  # about
LEFT, RIGHT = 6.0, 99.0  # percent of the width
TOP, BOTTOM = 12.0, 180.0  # pixels


@dataclass(frozen=True)
class Bar:
    """One bin: where it is drawn, on which side of zero it lies, what it counts."""

    x: float
    width: float
    y: float
    side: str
    label: str


@dataclass(frozen=True)
class Histogram:
    """What the template draws: x in percent of the width, y in pixels.

    Attributes:
        tie: values too close to zero to call, None where there is nothing to call, or zero is far from the axis.
    """

    x: Axis
    y: Axis
    bars: list[Bar]
    tie: tuple[float, float] | None
    description: str

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Some whole numbers up to the highest bar, as (coordinate, label)."""
        step = max(1, math.ceil(round_step(self.y.high / 3)))
        return [(self.y.at(count), f"{count:,}") for count in range(0, int(self.y.high) + 1, step)]


def histogram(values: Sequence[float], what: str, error: float | None = None) -> Histogram:
    """Bins of a round width with zero at an edge; `error` is the parity error where the values are margins."""
    low, high = min(values), max(values)
    width = round_step((high - low) / BARS) if high > low else 1.0
    counts = Counter(math.floor(value / width) for value in values)
    first, last = min(counts), max(counts)
    x = Axis(first * width, (last + 1) * width, LEFT, RIGHT)
    most = max(counts.values())
    y = Axis(0, most, BOTTOM, TOP)
    decimals = max(0, 2 - math.floor(math.log10(width)))
    bars = [
        Bar(
            x.at(bin * width),
            round(max(x.at((bin + 1) * width) - x.at(bin * width) - 0.25, 0.1), 2),
            y.at(count),
            "below" if bin < 0 else "above",
            f"{bin * width:.{decimals}f} to {(bin + 1) * width:.{decimals}f}: {count:,}",
        )
        for bin, count in sorted(counts.items())
    ]
    tie = None if error is None or error < x.low or -error > x.high else (max(-error, x.low), min(error, x.high))
    above = sum(value > 0 for value in values)
    return Histogram(
        x,
        y,
        bars,
        tie,
        f"Histogram of {len(values):,} {what}, from {low:.2f} to {high:.2f}; {above:,} are above zero.",
    )
