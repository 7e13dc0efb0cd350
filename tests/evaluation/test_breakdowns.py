"""Breakdowns: every pair is in exactly one group of each."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.evaluation.breakdowns import length_style, markdown_style
from runtime.evaluation.comparison import measure_parity
from tests.helpers.scored import SUBJECT, pair, random_pairs


def test_every_breakdown_covers_every_pair_once():
    pairs = random_pairs(50, noise=True)
    report = measure_parity(pairs, SUBJECT)
    assert [group.name for group in report.by_area] == ["chat", "objective"]
    assert [group.name for group in report.by_category] == ["chat", "objective/code", "objective/maths"]
    for groups in (report.by_margin, report.by_area, report.by_category, *report.by_style.values()):
        assert sum(group.pairs for group in groups) == 50
        assert sum(group.flips for group in groups) == report.figures.flips
        agreeing = sum(group.agreement.value * group.pairs for group in groups)
        assert agreeing == pytest.approx(report.figures.agreement.value * 50, abs=1e-3)
        assert np.average([g.mean_shift for g in groups], weights=[g.pairs for g in groups]) == pytest.approx(
            report.figures.mean_shift.value, rel=1e-4
        )


def test_margins_are_binned_in_standard_deviations_of_the_reference():
    # Scores 0 and 2: their standard deviation is 1, and the margins are 0, 2 and 2.
    pairs = [pair((0, 0), (0, 0)), pair((2, 0), (2, 0)), pair((0, 2), (0, 2)), pair((2, 2), (2, 2))]
    assert [(g.name, g.pairs) for g in measure_parity(pairs, SUBJECT).by_margin] == [
        ("0 to 0.1", 2),
        ("2 or more", 2),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "length", "markdown"),
    [
        ("word " * 20, "word " * 20, "similar length", "the same"),
        ("word " * 30, "word " * 20, "chosen longer", "the same"),
        ("word " * 20, "word " * 30, "chosen shorter", "the same"),
        ("- one\n- two", "one. two...", "similar length", "chosen has more"),
        ("one. two, three", "**one** `two` 3", "similar length", "chosen has less"),
        ("# One\n\n| a | b |", "1. One\n\n> quoted", "similar length", "the same"),
        ("2 * 3 * 4 = 24 - 0", "-1 is below 0 * 10", "similar length", "the same"),
    ],
)
def test_styles(chosen, rejected, length, markdown):
    found = pair((1, 0), (1, 0), chosen=chosen, rejected=rejected)
    assert (length_style(found), markdown_style(found)) == (length, markdown)
