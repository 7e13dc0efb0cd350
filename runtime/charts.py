"""Geometry of the report's charts: from scores to coordinates. The templates only draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from runtime.breakdown import Group
from runtime.parity_report import BlockError, ParityReport
from runtime.scored_pair import ScoredPair

WIDTH, SQUARE, LOW = 360.0, 360.0, 250.0  # of the plots, in SVG user units; `LOW` is a height
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 14.0, 40.0  # margins around the plotting area
NICE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """A linear scale from values `low` to `high` onto coordinates `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of `value`, to a hundredth."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self, about: int = 7) -> list[tuple[float, str]]:
        """Some round values inside the axis, as (coordinate, label)."""
        step = round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        exponent = Decimal(f"{step:.3g}").normalize().as_tuple().exponent
        decimals = max(0, -int(exponent))
        values = [index * step + 0.0 for index in range(first, last + 1)]
        return [(self.at(value), f"{value:.{decimals}f}".replace("-", "−")) for value in values]


@dataclass(frozen=True)
class Mark:
    """A dot that deserves a name, and where on the page it leads, if anywhere."""

    x: float
    y: float
    name: str
    link: str


@dataclass(frozen=True)
class Scatter:
    """A square plot of one run against another; each layer is (class, path of dots)."""

    x: Axis
    y: Axis
    layers: list[tuple[str, str]]
    marks: list[Mark]


@dataclass(frozen=True)
class BlockChart:
    """Errors over blocks: a band up to the largest, a line and dots at the means."""

    x: Axis
    y: Axis
    x_ticks: list[tuple[float, str]]
    band: str
    line: str
    dots: str


def score_scatter(report: ParityReport) -> Scatter:
    """Every conversation: reference score across, quantized score up, before repair behind it."""
    points: dict[str, list[tuple[float, float]]] = {"unrepaired": [], "quantized": []}
    for pair in report.scores:
        points["quantized"] += zip(pair.reference, pair.quantized, strict=True)
        points["unrepaired"] += zip(pair.reference, pair.unrepaired or (), strict=False)
    x, y = _square(value for layer in points.values() for point in layer for value in point)
    return Scatter(x, y, [(name, _dots(x, y, layer)) for name, layer in points.items() if layer], [])


def margin_scatter(report: ParityReport) -> Scatter:
    """Every pair: reference margin across, quantized margin up; pairs that disagree are marked by name."""
    x, y = _square(margin for pair in report.scores for margin in (*_margins(pair), 0.0))
    agreeing = [_margins(pair) for pair in report.scores if pair.agrees]
    anchors = {pair.id: f"#worst-{rank}" for rank, pair in reversed(list(enumerate(report.worst, 1)))}
    marks = [
        Mark(
            x.at(across),
            y.at(up),
            f"{pair.category}: {across:+.3f} becomes {up:+.3f}",
            anchors.get(pair.id, ""),
        )
        for pair in report.scores
        if not pair.agrees
        for across, up in [_margins(pair)]
    ]
    return Scatter(x, y, [("quantized", _dots(x, y, agreeing))] if agreeing else [], marks)


def block_chart(errors: Sequence[BlockError]) -> BlockChart | None:
    """Mean and largest relative error of each block, from zero; None without any."""
    if not errors:
        return None
    first, last = errors[0].block, errors[-1].block
    x = Axis(first - 0.5 * (first == last), max(last, first + 0.5), LEFT, WIDTH - RIGHT)
    top = max((error.max_error for error in errors), default=0.0) or 1.0
    y = Axis(0.0, round_step(top / 4) * math.ceil(top / round_step(top / 4) - 1e-9), LOW - BOTTOM, TOP)
    means = [(error.block, error.mean_error) for error in errors]
    ceiling = [(error.block, error.max_error) for error in errors]
    every = max(1, int(round_step(max(1, (last - first) / 8))))
    ticks = [(x.at(block), str(block)) for block in range(first, last + 1) if block % every == 0]
    return BlockChart(
        x=x,
        y=y,
        x_ticks=ticks,
        band=_line(x, y, [*ceiling, *reversed(means)]) + "Z",
        line=_line(x, y, means),
        dots=_dots(x, y, means) if len(means) <= 40 else "",
    )


def agreement_axis(groups: Iterable[Group]) -> Axis:
    """Agreement in percent of a cell's width, from chance, or from nothing where a group is below chance."""
    agreements = [value for group in groups for value in (group.agreement.value, group.noise_agreement)]
    below_chance = any(value is not None and value < 0.5 for value in agreements)
    return Axis(0.0 if below_chance else 0.5, 1.0, 3.0, 97.0)


def margin_axis(pairs: Iterable[ScoredPair]) -> Axis:
    """Margins in percent of a line's width, zero in its middle."""
    widest = max((abs(margin) for pair in pairs for margin in _margins(pair)), default=0.0) or 1.0
    return Axis(-widest, widest, 2.0, 98.0)


def round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(nice * power for nice in NICE_STEPS if nice * power >= step * (1 - 1e-9))


def _margins(pair: ScoredPair) -> tuple[float, float]:
    return pair.reference_margin, pair.quantized_margin


def _square(values: Iterable[float]) -> tuple[Axis, Axis]:
    """Equal domains for both axes, a little wider than the values."""
    values = list(values)
    low, high = min(values), max(values)
    air = 0.04 * (high - low) or 0.5
    low, high = low - air, high + air
    return Axis(low, high, LEFT, WIDTH - RIGHT), Axis(low, high, SQUARE - BOTTOM, TOP)


def _dots(x: Axis, y: Axis, points: Iterable[tuple[float, float]]) -> str:
    """A path of zero-length strokes: with round caps, one dot a point for a dozen bytes each."""
    return "".join(f"M{x.at(across):g} {y.at(up):g}h0" for across, up in points)


def _line(x: Axis, y: Axis, points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x.at(across):g} {y.at(up):g}" for across, up in points)
