"""The verdict on a parity report, and the table of metrics, as text for terminal, page and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runtime.evaluation.metrics import Estimate, ParityMetrics
from runtime.evaluation.report import ParityReport, Subject, ThresholdResult

# Limits of the rule of thumb, which applies when no thresholds are set. Where the unquantized model in plain bf16 does
# not reach a limit, its own value is the limit: bf16 is the accepted way to run it.
MIN_PAIRS = 30
GOOD_AGREEMENT, FAIR_AGREEMENT = 0.95, 0.90
GOOD_SHIFT, FAIR_SHIFT = 0.10, 0.30  # in standard deviations of the reference scores

Grade = Literal["good", "fair", "poor", "unknown"]
NumberFormat = Literal["percent", "correlation", "shift", "signed", "raw"]


@dataclass(frozen=True)
class MetricRow:
    """One row of the metrics table: a field of `ParityMetrics`, its label, number format and definition."""

    field: str
    label: str
    number_format: NumberFormat
    meaning: str

    def value(self, figures: ParityMetrics) -> str:
        """The formatted value."""
        return format_metric(self.estimate(figures).value, self.number_format)

    def interval(self, figures: ParityMetrics) -> str:
        """The 95% interval as "low to high"; empty without an interval."""
        estimate = self.estimate(figures)
        if estimate.low is None or estimate.high is None:
            return ""
        low, high = format_metric(estimate.low, self.number_format), format_metric(estimate.high, self.number_format)
        return f"{low.removesuffix('%')} to {high}"

    def estimate(self, figures: ParityMetrics) -> Estimate:
        """The value and its interval."""
        estimate: Estimate = getattr(figures, self.field)
        return estimate


METRIC_ROWS = (
    MetricRow(
        "agreement", "Pair agreement", "percent", "Pairs in which both models prefer the same response or both tie."
    ),
    MetricRow(
        "flip_rate", "Flip rate", "percent", "Pairs in which they prefer opposite responses; a tie is not a flip."
    ),
    MetricRow("chosen_accuracy", "Accuracy", "percent", "Pairs in which the chosen response scores higher."),
    MetricRow("mean_shift", "Mean absolute shift", "shift", "Mean of |score − reference score|."),
    MetricRow("max_shift", "Largest absolute shift", "shift", "Maximum of |score − reference score|."),
    MetricRow(
        "signed_shift", "Mean signed shift", "signed", "Mean of score − reference score; positive if scores rise."
    ),
    MetricRow(
        "shift_after_affine",
        "Shift after linear fit",
        "shift",
        "Mean absolute shift that remains after a least-squares linear correction of the scores.",
    ),
    MetricRow(
        "slope",
        "Slope",
        "raw",
        "Of the least-squares fit score = slope × reference score + offset. Below 1, score differences shrink.",
    ),
    MetricRow("offset", "Offset", "signed", "Of the same fit, in score units."),
    MetricRow("pearson", "Pearson correlation", "correlation", "Of the scores of all conversations."),
    MetricRow("spearman", "Spearman rank correlation", "correlation", "Of the scores of all conversations."),
    MetricRow("kendall", "Kendall τ-b", "correlation", "Rank correlation from pairwise order, corrected for ties."),
)


@dataclass(frozen=True)
class Verdict:
    """A grade, a headline that answers whether the variant can replace the reference, and the supporting sentences."""

    grade: Grade
    headline: str
    sentences: tuple[str, ...]


def verdict(report: ParityReport) -> Verdict:
    """Grade a report by its thresholds, or without any by the rule of thumb."""
    if report.thresholds:
        missed = [threshold for threshold in report.thresholds if not threshold.met]
        grade: Grade = "poor" if missed else "good"
        total = len(report.thresholds)
        everything = "the threshold" if total == 1 else "both thresholds"
        which = everything if len(missed) in (0, total) else f"{len(missed)} of the {total} thresholds"
        headline = f"{'No: it misses' if missed else 'Yes: it meets'} {which}."
    else:
        grade, headline = _rule_of_thumb(report)
    return Verdict(grade, headline, (_ranking_sentence(report), _flip_sentence(report), _shift_sentence(report)))


def summary_table(report: ParityReport) -> list[tuple[str, ...]]:
    """The metrics table of one report, with a column for each run: rows of (label, value, ...), header first."""
    return metrics_table(metrics_by_source(report))


def metrics_by_source(report: ParityReport) -> dict[str, ParityMetrics]:
    """The metrics of every run that was compared with the reference, by its name in tables."""
    runs = {
        "quantized": report.figures,
        "before recalibration": report.before_repair,
        "plain bf16": report.noise_floor,
    }
    return {name: figures for name, figures in runs.items() if figures is not None}


def metrics_table(figures: Mapping[str, ParityMetrics]) -> list[tuple[str, ...]]:
    """A table with a row for each metric and a column for each entry of `figures`: rows of cells, header first."""
    table: list[tuple[str, ...]] = [("metric", *figures)]
    for row in METRIC_ROWS:
        cells = ((row.value(each), row.interval(each)) for each in figures.values())
        table.append((row.label, *(f"{value} ({interval})" if interval else value for value, interval in cells)))
    return table


def describe_quantization(subject: Subject) -> str:
    """The stored format, such as "GPTQ, 4 bits in groups of 128, 4.25 bits per weight"."""
    groups = f" in groups of {subject.group_size}" if subject.group_size > 0 else ""
    stored = f"{subject.bits_per_weight:.4g} bits per weight"
    return f"{subject.method.upper()}, {subject.bits:g} bits{groups}, {stored}"


def describe_threshold(threshold: ThresholdResult) -> str:
    """The limit and the measured value, in one sentence."""
    if threshold.name == "min_agreement":
        requirement, unit, factor = "agreement of at least", "%", 100
    else:
        requirement, unit, factor = "mean absolute shift of at most", " sd", 1
    limit = f"{factor * threshold.limit:.4g}{unit}"
    measured = "undefined" if threshold.value is None else f"measured {factor * threshold.value:.4g}{unit}"
    return f"{'Met' if threshold.met else 'Missed'}: {requirement} {limit}; {measured}."


def describe_rule_of_thumb() -> str:
    """How a verdict is reached without thresholds."""
    good, fair = format_metric(GOOD_AGREEMENT), format_metric(FAIR_AGREEMENT)
    return (
        "No thresholds were set, so the verdict follows a rule of thumb. "
        f"Ranking: agreement of at least {good}, and at least {fair} at the lower end of its interval; with caution, "
        f"agreement of at least {fair}. Score thresholds: mean absolute shift of at most {GOOD_SHIFT} sd; after "
        f"recalibrating them, at most {FAIR_SHIFT} sd. Where plain bf16 does not reach a limit, its own value is the "
        f"limit. At least {MIN_PAIRS} pairs are required."
    )


def format_metric(value: float | None, number_format: NumberFormat = "percent") -> str:
    """A metric as text; "n/a" if undefined. Shares below 100% never show as 100.0%, nor those above 0% as 0.0%."""
    if value is None:
        return "n/a"
    if number_format == "percent":
        text = f"{100 * value:.1f}%"
        rounded_away = {"100.0%": ">99.9%", "0.0%": "<0.1%"} if 0 < value < 1 else {}
        return rounded_away.get(text, text)
    decimals = 4 if number_format == "correlation" else 3
    sign = "+" if number_format == "signed" else ""
    text = f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # + 0.0 turns -0.0 into 0.0
    return text.replace("-", "−")


def _rule_of_thumb(report: ParityReport) -> tuple[Grade, str]:
    ranking, scores = _ranking_grade(report), _score_grade(report)
    if report.figures.pairs < MIN_PAIRS:
        return "unknown", "Too few pairs for a verdict."
    if ranking == "poor":
        return "poor", "No: too many pairs change their preferred response."
    if ranking == "fair":
        return "fair", "With caution: some pairs change their preferred response."
    if ranking == "unknown":
        return "unknown", "Probably, for ranking; confirm on more pairs."
    if scores == "good":
        return "good", "Yes, for ranking and for score thresholds."
    if scores == "fair":
        return "fair", "Yes for ranking; recalibrate score thresholds."
    return "fair", "Yes for ranking, not for score thresholds."


def _ranking_grade(report: ParityReport) -> Grade:
    found, noise = report.figures.agreement, report.noise_floor
    floor = noise.agreement if noise else Estimate(value=1.0, low=1.0)
    if _meets_limit(found.value, GOOD_AGREEMENT, floor.value):
        return "good" if _meets_limit(found.low, FAIR_AGREEMENT, floor.low) else "unknown"
    return "fair" if _meets_limit(found.value, FAIR_AGREEMENT, floor.value) else "poor"


def _meets_limit(value: float | None, wanted: float, floor: float | None) -> bool:
    return value is not None and value >= min(wanted, 1.0 if floor is None else floor)


def _score_grade(report: ParityReport) -> Grade:
    shift, noise = report.figures.mean_shift.value, report.noise_floor
    if shift is None:
        return "unknown"
    if shift <= max(GOOD_SHIFT, (noise.mean_shift.value or 0.0) if noise else 0.0):
        return "good"
    return "fair" if shift <= FAIR_SHIFT else "poor"


def _ranking_sentence(report: ParityReport) -> str:
    figures, row = report.figures, METRIC_ROWS[0]
    kept = sum(pair.agrees for pair in report.scores)
    noise = f"; plain bf16 does in {row.value(report.noise_floor)}" if report.noise_floor else ""
    return (
        f"On {pluralize(figures.pairs, 'preference pair')} the quantized model prefers the same response as the "
        f"reference in {kept} ({row.value(figures)}, 95% Wilson interval {row.interval(figures)}){noise}."
    )


def _flip_sentence(report: ParityReport) -> str:
    flipped = [abs(pair.reference_margin) for pair in report.scores if pair.flipped]
    ties = sum(not pair.agrees and not pair.flipped for pair in report.scores)
    tie_note = f" {pluralize(ties, 'pair')} {'ties' if ties == 1 else 'tie'} in one model only." if ties else ""
    if not flipped or not report.reference_std:
        return f"No pair flips.{tie_note}"
    largest = format_metric(max(flipped) / report.reference_std, "shift")
    if len(flipped) == 1:
        return f"1 pair flips; its reference margin is {largest} standard deviations.{tie_note}"
    return f"{len(flipped)} pairs flip; their reference margins are at most {largest} standard deviations.{tie_note}"


def _shift_sentence(report: ParityReport) -> str:
    figures, noise = report.figures, report.noise_floor
    if figures.mean_shift.value is None:
        return "All reference scores are equal, so shifts in standard deviations are undefined."
    mean, largest = (format_metric(each.value, "shift") for each in (figures.mean_shift, figures.max_shift))
    sentence = f"The mean absolute shift is {mean} standard deviations, the largest {largest}"
    if noise and noise.mean_shift.value is not None:
        sentence += f"; the mean of plain bf16 is {format_metric(noise.mean_shift.value, 'shift')}"
    left = figures.shift_after_affine.value
    if left is not None and left < 0.7 * figures.mean_shift.value:
        sentence += f". A linear correction of the scores would reduce the mean to {format_metric(left, 'shift')}"
    return f"{sentence}."


def pluralize(count: int, noun: str) -> str:
    """Count and noun, such as "1 pair" or "2 pairs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
