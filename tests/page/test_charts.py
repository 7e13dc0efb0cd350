"""Geometry and text of the charts, and the formatting of numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.page.charts import make_comparison_chart, make_histogram
from runtime.page.formatting import duration, percent, signed
from runtime.page.markup import notice, render_template
from runtime.scorer import probability_preferred

SCORES = st.floats(-50, 50, width=32)  # the scorer gives float32
ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}${7*7}"


@given(SCORES, SCORES, st.none() | st.floats(0, 5))
def test_everything_lies_on_the_axis(a, b, error):
    chart = make_comparison_chart(a, b, error, (0.0, 1.0))
    places = [chart.x(a), chart.x(b), *(chart.x(score) for score in chart.tie_zone or ())]
    assert all(0 <= place <= 100 for place in places)
    assert (chart.x(a) <= chart.x(b)) == (a <= b) or math.isclose(a, b, abs_tol=0.01)
    assert chart.percent_a_low <= chart.percent_a <= chart.percent_a_high
    assert chart.percent_a == pytest.approx(100 * probability_preferred(a - b))


@pytest.mark.parametrize(
    ("margin", "error", "preferred"),
    [
        (1.0, 0.5, "A"),
        (-1.0, 0.5, "B"),
        (0.5, 0.5, ""),
        (-0.4, 0.5, ""),
        (0.1, None, "A"),
        (0.0, None, ""),
        (0.1, 0.0, "A"),
    ],
)
def test_a_margin_within_the_parity_error_is_too_close_to_call(margin, error, preferred):
    chart = make_comparison_chart(margin, 0.0, error)
    assert chart.preferred == preferred
    assert ("Too close" in chart.headline) == (preferred == "")


def test_the_tie_zone_is_around_the_lower_score():
    """The higher score lies outside it exactly if the comparison is decided."""
    for a, b in [(2.0, 1.0), (1.0, 2.0), (1.2, 1.0), (1.0, 1.2)]:
        chart = make_comparison_chart(a, b, 0.5)
        assert chart.tie_zone == (0.5, 1.5)
        assert (max(a, b) > chart.tie_zone[1]) == bool(chart.preferred)


def test_the_sentence_names_who_leads_by_how_much_and_how_far_to_trust_that():
    assert make_comparison_chart(3.0, 1.0, 0.5).sentence == (
        "A scores 2.00 above B, which corresponds to a probability of 88 % that people prefer A. Quantization "
        "typically changes a margin by 0.50; this margin is 4.0 times as large."
    )
    assert (
        "B scores 0.20 above A" in make_comparison_chart(1.0, 1.2, 0.5).sentence
        and "may prefer" in make_comparison_chart(1.0, 1.2, 0.5).sentence
    )
    assert make_comparison_chart(1.0, 1.0, None).sentence == "Both responses have the same score."
    assert "quantization" not in make_comparison_chart(3.0, 1.0, None).sentence.lower()


@given(st.lists(SCORES, min_size=2, max_size=60), st.none() | st.floats(0, 5))
def test_a_histogram_counts_every_value_once(values, error):
    plot = make_histogram(values, "margins", error)
    counts = [int(bar.label.rpartition(": ")[2].replace(",", "")) for bar in plot.bars]
    assert sum(counts) == len(values)
    below = sum(count for bar, count in zip(plot.bars, counts, strict=True) if bar.side == "below")
    assert below == sum(value < 0 for value in values)  # an edge lies at zero
    assert all(plot.x.start - 0.01 <= bar.x and bar.x + bar.width <= plot.x.end + 0.01 for bar in plot.bars)
    assert len(plot.bars) <= 62 and plot.y_ticks[0][1] == "0"


def test_margins_far_from_zero_have_no_tie_band():
    for values in ([2.0, 3.0, 5.0], [-5.0, -3.0, -2.0]):
        assert make_histogram(values, "margins", 0.1).tie_zone is None
    low, high = make_histogram([0.05, 3.0, 5.0], "margins", 0.1).tie_zone
    assert low < high == 0.1


def test_a_histogram_of_equal_values_is_one_bar():
    assert len(make_histogram([0.3] * 5, "scores").bars) == 1


def test_numbers_as_they_are_written():
    assert [signed(value) for value in (1.2345, -0.5, 0.0, -0.0001)] == ["+1.234", "−0.500", "0.000", "0.000"]
    assert [percent(share) for share in (0.0, 0.0001, 0.5, 0.9999, 1.0)] == [
        "0 %",
        "under 1 %",
        "50 %",
        "over 99 %",
        "100 %",
    ]
    assert [duration(seconds) for seconds in (0.4216, 12.4, 200)] == ["0.42 s", "12 s", "3 min 20 s"]


def test_every_text_is_escaped():
    for html in (notice(ATTACK), render_template("masthead", ready=False, failure=None, status=ATTACK, models=[])):
        assert "<script" not in html and "<img" not in html and "&lt;script" in html
