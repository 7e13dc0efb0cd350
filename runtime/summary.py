"""A parity report in words: the verdict, and the table of figures that the terminal and the page share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from runtime.figures import Estimate, Figures
from runtime.parity_report import ParityReport, Subject, ThresholdResult

# The rule of thumb behind a verdict, unless thresholds were set. A variant is never held to more than the
# unquantized model reaches in plain bf16, which people run without a second thought.
FEWEST_PAIRS = 30
GOOD_AGREEMENT, FAIR_AGREEMENT = 0.95, 0.90
GOOD_SHIFT, FAIR_SHIFT = 0.10, 0.30  # in standard deviations of the reference scores

Grade = Literal["good", "fair", "poor", "unknown"]
Kind = Literal["percent", "correlation", "shift", "signed", "raw"]


@dataclass(frozen=True)
class FigureRow:
    """One row of the figure table: a field of `Figures`, its label, how it is written, what it means."""

    field: str
    label: str
    kind: Kind
    meaning: str

    def value(self, figures: Figures) -> str:
        return number(self.estimate(figures).value, self.kind)

    def interval(self, figures: Figures) -> str:
        """The 95% interval as "low to high", empty where there is none."""
        estimate = self.estimate(figures)
        if estimate.low is None or estimate.high is None:
            return ""
        low, high = number(estimate.low, self.kind), number(estimate.high, self.kind)
        return f"{low.removesuffix('%')} to {high}"

    def estimate(self, figures: Figures) -> Estimate:
        estimate: Estimate = getattr(figures, self.field)
        return estimate


FIGURE_ROWS = (
    FigureRow("agreement", "Pair agreement", "percent", "Pairs in which both prefer the same response."),
    FigureRow(
        "flip_rate",
        "Flip rate",
        "percent",
        "Pairs in which they prefer opposite responses. A tie in one run alone disagrees without flipping.",
    ),
    FigureRow("chosen_accuracy", "Chosen preferred", "percent", "Pairs in which the labelled winner wins."),
    FigureRow("mean_shift", "Mean shift", "shift", "How far a score moves on average, up or down."),
    FigureRow("max_shift", "Largest shift", "shift", "How far the score that moves most moves."),
    FigureRow("signed_shift", "Drift", "signed", "The same mean with its sign: above 0, scores rise."),
    FigureRow(
        "shift_after_affine",
        "Shift left by a line",
        "shift",
        "Mean shift that stays after the best straight-line correction of the scores.",
    ),
    FigureRow(
        "slope",
        "Slope",
        "raw",
        "Of the line score = slope × reference + offset. Below 1, scores are drawn together.",
    ),
    FigureRow("offset", "Offset", "signed", "Of the same line, in the units of the scores."),
    FigureRow("pearson", "Pearson", "correlation", "Linear correlation over the scores of all conversations."),
    FigureRow("spearman", "Spearman", "correlation", "Correlation of their ranks."),
    FigureRow(
        "kendall",
        "Kendall τ-b",
        "correlation",
        "Share of all two conversations kept in order, less share reversed.",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a variant can be trusted: a grade, the headline, and the sentences that bear it out."""

    grade: Grade
    headline: str
    sentences: tuple[str, ...]


def verdict(report: ParityReport) -> Verdict:
    """Judge by the thresholds that were set, or else by the rule of thumb."""
    if report.thresholds:
        missed = [threshold for threshold in report.thresholds if not threshold.met]
        grade: Grade = "poor" if missed else "good"
        of = len(report.thresholds)
        all_of_them = "the threshold" if of == 1 else "both thresholds"
        some = all_of_them if len(missed) in (0, of) else f"{len(missed)} of the {of} thresholds"
        headline = f"{'No: it misses' if missed else 'Yes: it meets'} {some} set for it."
    else:
        grade, headline = _rule_of_thumb(report)
    return Verdict(grade, headline, (_ranking(report), _flips(report), _shift(report)))


def summary_table(report: ParityReport) -> list[tuple[str, ...]]:
    """Rows of (label, value, ...), the first being the header; one column for each run that was compared."""
    return tabulate(columns(report))


def columns(report: ParityReport) -> dict[str, Figures]:
    """What was held against the reference, by name."""
    runs = {
        "quantized": report.figures,
        "before repair": report.before_repair,
        "plain bf16": report.noise_floor,
    }
    return {name: figures for name, figures in runs.items() if figures is not None}


def tabulate(figures: Mapping[str, Figures]) -> list[tuple[str, ...]]:
    """A figure table of any variants, by name."""
    table: list[tuple[str, ...]] = [("figure", *figures)]
    for row in FIGURE_ROWS:
        cells = ((row.value(each), row.interval(each)) for each in figures.values())
        table.append((row.label, *(f"{value} ({interval})" if interval else value for value, interval in cells)))
    return table


def describe(subject: Subject) -> str:
    """The variant in words: "GPTQ, 4 bits in groups of 128, 4.25 bits per weight"."""
    groups = f" in groups of {subject.group_size}" if subject.group_size > 0 else ""
    stored = f"{subject.bits_per_weight:.4g} bits per weight"
    return f"{subject.method.upper()}, {subject.bits} bits{groups}, {stored}"


def describe_threshold(threshold: ThresholdResult) -> str:
    """One sentence: what was asked, what was found."""
    if threshold.name == "min_agreement":
        asked, unit, factor = "agreement of at least", "%", 100
    else:
        asked, unit, factor = "mean shift of at most", " sd", 1
    limit = f"{factor * threshold.limit:.4g}{unit}"
    found = "nothing" if threshold.value is None else f"{factor * threshold.value:.4g}{unit}"
    return f"{'Met' if threshold.met else 'Missed'}: {asked} {limit}; measured {found}."


def number(value: float | None, kind: Kind = "percent") -> str:
    """A figure as it is written everywhere; "n/a" where it cannot be told."""
    if value is None:
        return "n/a"
    if kind == "percent":
        text = f"{100 * value:.1f}%"
        rounded_away = {"100.0%": ">99.9%", "0.0%": "<0.1%"} if 0 < value < 1 else {}
        return rounded_away.get(text, text)
    decimals = 4 if kind == "correlation" else 3
    sign = "+" if kind == "signed" else ""
    text = f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"  # + 0.0 turns -0.0 into 0.0
    return text.replace("-", "−")


def _rule_of_thumb(report: ParityReport) -> tuple[Grade, str]:
    ranking, scores = _ranking_grade(report), _score_grade(report)
    if report.figures.pairs < FEWEST_PAIRS:
        return "unknown", "Too few pairs to tell."
    if ranking == "poor":
        return "poor", "No: too many pairs change their winner."
    if ranking == "fair":
        return "fair", "With care: some pairs change their winner."
    if ranking == "unknown":
        return "unknown", "Probably for ranking; more pairs would tell."
    if scores == "good":
        return "good", "Yes, for ranking and for score thresholds."
    if scores == "fair":
        return "fair", "Yes for ranking; set score thresholds anew."
    return "fair", "Yes for ranking, not for score thresholds."


def _ranking_grade(report: ParityReport) -> Grade:
    found, noise = report.figures.agreement, report.noise_floor
    floor = noise.agreement if noise else Estimate(value=1.0, low=1.0)
    if _reaches(found.value, GOOD_AGREEMENT, floor.value):
        return "good" if _reaches(found.low, FAIR_AGREEMENT, floor.low) else "unknown"
    return "fair" if _reaches(found.value, FAIR_AGREEMENT, floor.value) else "poor"


def _reaches(value: float | None, wanted: float, floor: float | None) -> bool:
    return value is not None and value >= min(wanted, 1.0 if floor is None else floor)


def _score_grade(report: ParityReport) -> Grade:
    shift, noise = report.figures.mean_shift.value, report.noise_floor
    if shift is None:
        return "unknown"
    if shift <= max(GOOD_SHIFT, (noise.mean_shift.value or 0.0) if noise else 0.0):
        return "good"
    return "fair" if shift <= FAIR_SHIFT else "poor"


def _ranking(report: ParityReport) -> str:
    figures, row = report.figures, FIGURE_ROWS[0]
    kept = sum(pair.agrees for pair in report.scores)
    sentence = (
        f"On {count(figures.pairs, 'preference pair')} the quantized model picks the same winner as the "
        f"reference in {kept} ({row.value(figures)}, 95% interval {row.interval(figures)})"
    )
    return f"{sentence}; plain bf16 does in {row.value(report.noise_floor)}." if report.noise_floor else f"{sentence}."


def _flips(report: ParityReport) -> str:
    flipped = [abs(pair.reference_margin) for pair in report.scores if pair.flipped]
    ties = sum(not pair.agrees and not pair.flipped for pair in report.scores)
    also = f" {count(ties, 'pair')} more {'ties' if ties == 1 else 'tie'} in one run only." if ties else ""
    if not flipped or not report.reference_std:
        return f"No pair flips.{also}"
    widest = number(max(flipped) / report.reference_std, "shift")
    which = "1 pair flips, one" if len(flipped) == 1 else f"{len(flipped)} pairs flip, all among those"
    return f"{which} that the reference separates by no more than {widest} standard deviations.{also}"


def _shift(report: ParityReport) -> str:
    figures, noise = report.figures, report.noise_floor
    if figures.mean_shift.value is None:
        return "The reference scores are all equal, so a shift has no unit to be told in."
    mean, largest = (number(each.value, "shift") for each in (figures.mean_shift, figures.max_shift))
    sentence = f"Scores move by {mean} standard deviations on average and {largest} at most"
    if noise and noise.mean_shift.value is not None:
        sentence += f"; plain bf16 moves them by {number(noise.mean_shift.value, 'shift')}"
    left = figures.shift_after_affine.value
    if left is not None and left < 0.7 * figures.mean_shift.value:
        sentence += f". A straight-line correction would leave {number(left, 'shift')}"
    return f"{sentence}."


def count(number: int, noun: str) -> str:
    """ "1 pair", "2 pairs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
