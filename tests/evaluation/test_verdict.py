"""The verdict and the metrics table."""

from __future__ import annotations

import pytest

from runtime.evaluation.comparison import measure_parity
from runtime.evaluation.report import Thresholds
from runtime.evaluation.verdict import format_metric, summary_table, verdict
from tests.helpers.scored import SUBJECT, pair, random_pairs


def test_the_summary_has_a_column_for_each_run():
    report = measure_parity(random_pairs(40, noise=True, unrepaired=True), SUBJECT)
    table = summary_table(report)
    assert table[0] == ("metric", "quantized", "before recalibration", "plain bf16")
    assert {len(row) for row in table} == {4}
    assert len(summary_table(measure_parity(random_pairs(3), SUBJECT))[0]) == 2


def grade(wrong: int, of: int, shift: float, noise_wrong: int | None = None) -> str:
    """Of `of` pairs with margins of 2, `wrong` flip; the rest of the chosen scores move by `shift`."""

    def run(flipped: int, moved: float) -> list[tuple[float, float]]:
        return [(-1.0, 1.0) if i < flipped else (1.0 + moved, -1.0) for i in range(of)]

    noise = run(noise_wrong, 0) if noise_wrong is not None else [None] * of
    pairs = [pair((1, -1), q, noise_floor=n) for q, n in zip(run(wrong, shift), noise, strict=True)]
    return verdict(measure_parity(pairs, SUBJECT)).headline


def test_the_rule_of_thumb():
    assert grade(0, 29, 0.0).startswith("Too few")
    assert grade(0, 100, 0.0) == "Yes, for ranking and for score thresholds."
    assert grade(0, 100, 0.4) == "Yes for ranking; recalibrate score thresholds."
    assert grade(0, 100, 0.8) == "Yes for ranking, not for score thresholds."
    assert grade(1, 40, 0.0).startswith("Probably")
    assert grade(7, 100, 0.0).startswith("With caution")
    assert grade(7, 100, 0.0, noise_wrong=8).startswith("Yes")
    assert grade(20, 100, 0.0).startswith("No")


def test_thresholds_decide_the_headline():
    pairs = [pair((1, 0), (1, 0))] * 3 + [pair((1, 0), (0, 1))]  # agreement 0.75, mean shift 0.5

    def headline(**limits: float) -> str:
        return verdict(measure_parity(pairs, SUBJECT, thresholds=Thresholds(**limits))).headline

    assert headline(min_agreement=0.7) == "Yes: it meets the threshold."
    assert headline(min_agreement=0.8) == "No: it misses the threshold."
    assert headline(min_agreement=0.7, max_shift=0.6) == "Yes: it meets both thresholds."
    assert headline(min_agreement=0.7, max_shift=0.1) == "No: it misses 1 of the 2 thresholds."
    assert headline(min_agreement=0.8, max_shift=0.1) == "No: it misses both thresholds."


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.5, "percent", "50.0%"),
        (0.9999, "percent", ">99.9%"),
        (0.0001, "percent", "<0.1%"),
        (1.0, "percent", "100.0%"),
        (-0.0001, "signed", "+0.000"),
        (-0.25, "signed", "−0.250"),
        (None, "shift", "n/a"),
    ],
)
def test_metrics_are_formatted(value, kind, text):
    assert format_metric(value, kind) == text


def test_the_verdict_distinguishes_flips_from_ties():
    flip, tie, same = pair((1, 0), (0, 1)), pair((1, 0), (0, 0)), pair((2, 0), (2, 0))
    sentence = verdict(measure_parity([flip, tie, same], SUBJECT)).sentences[1]
    assert sentence.startswith("1 pair flips") and "1 pair ties in one model only" in sentence
    assert verdict(measure_parity([same], SUBJECT)).sentences[1] == "No pair flips."
