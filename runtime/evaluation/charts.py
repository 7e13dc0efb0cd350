"""Coordinates of the report's charts, computed from scores. templates/charts.html draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from runtime.evaluation.breakdowns import GroupMetrics
from runtime.evaluation.report import BlockError, ParityReport
from runtime.evaluation.scored_pair import ScoredPair

# In SVG user units.
WIDTH, SCATTER_HEIGHT, BLOCK_CHART_HEIGHT = 360.0, 360.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 10.0, 14.0, 40.0  # margins around the plotting area
ROUND_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
MAX_BLOCKS_WITH_DOTS = 40  # with more blocks the dots would overlap


@dataclass(frozen=True)
class Axis:
    """A linear scale that maps values `low` to `high` to coordinates `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of `value`, rounded to 0.01."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self, target_count: int = 7) -> list[tuple[float, str]]:
        """Ticks at round values, as (coordinate, label); about `target_count` of them."""
        step = round_step((self.high - self.low) / target_count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        exponent = Decimal(f"{step:.3g}").normalize().as_tuple().exponent
        decimals = max(0, -int(exponent))
        values = [index * step + 0.0 for index in range(first, last + 1)]
        return [(self.at(value), f"{value:.{decimals}f}".replace("-", "−")) for value in values]


@dataclass(frozen=True)
class Mark:
    """A labelled dot; `link` is a fragment of the page such as "#worst-1", or empty."""

    x: float
    y: float
    name: str
    link: str


@dataclass(frozen=True)
class Scatter:
    """A square scatter plot; each layer is (CSS class, SVG path of dots)."""

    x: Axis
    y: Axis
    layers: list[tuple[str, str]]
    marks: list[Mark]


@dataclass(frozen=True)
class BlockChart:
    """Error by block: a band from the mean to the largest error, a line and dots at the means."""

    x: Axis
    y: Axis
    x_ticks: list[tuple[float, str]]
    band: str
    line: str
    dots: str


def score_scatter(report: ParityReport) -> Scatter:
    """One dot per conversation, reference score on x and score on y; dots before recalibration lie behind."""
    points: dict[str, list[tuple[float, float]]] = {"unrepaired": [], "quantized": []}
    for pair in report.scores:
        points["quantized"] += zip(pair.reference, pair.quantized, strict=True)
        points["unrepaired"] += zip(pair.reference, pair.unrepaired or (), strict=False)
    x, y = _square_axes(value for layer in points.values() for point in layer for value in point)
    return Scatter(x, y, [(name, _dots(x, y, layer)) for name, layer in points.items() if layer], [])


def margin_scatter(report: ParityReport) -> Scatter:
    """One dot per pair: reference margin on x, quantized margin on y; disagreements are labelled marks."""
    x, y = _square_axes(margin for pair in report.scores for margin in (*_margins(pair), 0.0))
    agreeing = [_margins(pair) for pair in report.scores if pair.agrees]
    anchors = {pair.id: f"#worst-{rank}" for rank, pair in reversed(list(enumerate(report.worst, 1)))}
    marks = [
        Mark(
            x.at(pair.reference_margin),
            y.at(pair.quantized_margin),
            f"{pair.category}: {pair.reference_margin:+.3f} becomes {pair.quantized_margin:+.3f}",
            anchors.get(pair.id, ""),
        )
        for pair in report.scores
        if not pair.agrees
    ]
    return Scatter(x, y, [("quantized", _dots(x, y, agreeing))] if agreeing else [], marks)


def block_chart(errors: Sequence[BlockError]) -> BlockChart | None:
    """Mean and largest relative error of each block, on an axis from 0; None without blocks."""
    if not errors:
        return None
    first, last = errors[0].block, errors[-1].block
    x = Axis(first - 0.5 * (first == last), max(last, first + 0.5), LEFT, WIDTH - RIGHT)
    top = max((error.max_error for error in errors), default=0.0) or 1.0
    y = Axis(0.0, round_step(top / 4) * math.ceil(top / round_step(top / 4) - 1e-9), BLOCK_CHART_HEIGHT - BOTTOM, TOP)
    means = [(error.block, error.mean_error) for error in errors]
    maxima = [(error.block, error.max_error) for error in errors]
    tick_interval = max(1, int(round_step(max(1, (last - first) / 8))))
    ticks = [(x.at(block), str(block)) for block in range(first, last + 1) if block % tick_interval == 0]
    return BlockChart(
        x=x,
        y=y,
        x_ticks=ticks,
        band=_line(x, y, [*maxima, *reversed(means)]) + "Z",
        line=_line(x, y, means),
        dots=_dots(x, y, means) if len(means) <= MAX_BLOCKS_WITH_DOTS else "",
    )


def agreement_axis(groups: Iterable[GroupMetrics]) -> Axis:
    """Axis of agreement, in percent of a table cell: from 0.5 (chance), or from 0 if a group is below chance."""
    agreements = [value for group in groups for value in (group.agreement.value, group.noise_agreement)]
    below_chance = any(value is not None and value < 0.5 for value in agreements)
    return Axis(0.0 if below_chance else 0.5, 1.0, 3.0, 97.0)


def margin_axis(pairs: Iterable[ScoredPair]) -> Axis:
    """Axis of margins, in percent of the line's width, with 0 in the middle."""
    widest = max((abs(margin) for pair in pairs for margin in _margins(pair)), default=0.0) or 1.0
    return Axis(-widest, widest, 2.0, 98.0)


def round_step(step: float) -> float:
    """The smallest value of the form 1, 2, 2.5 or 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(each * power for each in ROUND_STEPS if each * power >= step * (1 - 1e-9))


def _margins(pair: ScoredPair) -> tuple[float, float]:
    return pair.reference_margin, pair.quantized_margin


def _square_axes(values: Iterable[float]) -> tuple[Axis, Axis]:
    """Two axes with the same range, which is 4% wider than the values on each side."""
    values = list(values)
    low, high = min(values), max(values)
    padding = 0.04 * (high - low) or 0.5
    low, high = low - padding, high + padding
    return Axis(low, high, LEFT, WIDTH - RIGHT), Axis(low, high, SCATTER_HEIGHT - BOTTOM, TOP)


def _dots(x: Axis, y: Axis, points: Iterable[tuple[float, float]]) -> str:
    """An SVG path of zero-length strokes. With round line caps each is a dot, far smaller than a <circle>."""
    return "".join(f"M{x.at(x_value):g} {y.at(y_value):g}h0" for x_value, y_value in points)


def _line(x: Axis, y: Axis, points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x.at(x_value):g} {y.at(y_value):g}" for x_value, y_value in points)
