"""Every metric and interval against a direct implementation of its definition."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from runtime.evaluation.metrics import ParityMetrics, measure_metrics
from tests.helpers.scored import random_scores

scores = st.floats(-50, 50, allow_nan=False, width=32).map(lambda value: round(value, 3))
score_pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=12)


def naive(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """Every metric by its definition, without weights."""
    r, q = reference.ravel(), candidate.ravel()
    signs = [(np.sign(a - b), np.sign(c - d)) for (a, b), (c, d) in zip(reference, candidate, strict=True)]
    slope, offset = np.polyfit(r, q, 1)
    back = np.polyval(np.polyfit(q, r, 1), q)
    return {
        "agreement": float(np.mean([a == b for a, b in signs])),
        "flip_rate": float(np.mean([a * b < 0 for a, b in signs])),
        "chosen_accuracy": float(np.mean([b > 0 for _, b in signs])),
        "spearman": stats.spearmanr(r, q).statistic,
        "kendall": stats.kendalltau(r, q).statistic,
        "pearson": stats.pearsonr(r, q).statistic,
        "mean_shift": np.abs(q - r).mean() / r.std(),
        "max_shift": np.abs(q - r).max() / r.std(),
        "signed_shift": (q - r).mean() / r.std(),
        "slope": slope,
        "offset": offset,
        "shift_after_affine": np.abs(back - r).mean() / r.std(),
    }


@pytest.mark.parametrize("decimals", [6, 0], ids=["distinct", "many ties"])
def test_metrics_equal_their_definitions(decimals: int):
    reference, candidate = (scores.round(decimals) for scores in random_scores(60))
    figures = measure_metrics(reference, candidate)
    for name, expected in naive(reference, candidate).items():
        assert getattr(figures, name).value == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("decimals", [6, 0], ids=["distinct", "many ties"])
def test_intervals_equal_a_bootstrap_that_resamples_pairs(decimals: int):
    reference, candidate = (scores.round(decimals) for scores in random_scores(24))
    drawn = np.random.default_rng(5).integers(24, size=(1000, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resamples = [naive(reference[rows], candidate[rows]) for rows in drawn]
    figures = measure_metrics(reference, candidate, seed=5)
    bootstrapped = ("spearman", "kendall", "pearson", "mean_shift", "signed_shift", "slope", "offset")
    for name in (*bootstrapped, "shift_after_affine"):
        low, high = np.quantile([each[name] for each in resamples], [0.025, 0.975])
        estimate = getattr(figures, name)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-4, abs=1e-7), name


def test_proportions_carry_wilson_intervals():
    figures = measure_metrics(*random_scores(40))
    n, p, z = 40, figures.agreement.value, stats.norm.ppf(0.975)
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wilson = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert (figures.agreement.low, figures.agreement.high) == pytest.approx(wilson, rel=1e-5)


def test_a_thousand_resamples_of_500_pairs_take_under_two_seconds():
    scores = random_scores(500)
    start = time.process_time()
    figures = measure_metrics(*scores)
    assert time.process_time() - start < 2
    assert figures.kendall.low < figures.kendall.value < figures.kendall.high


def test_large_inputs_lack_only_kendalls_interval():
    figures = measure_metrics(*random_scores(1001))
    assert figures.kendall.value is not None and figures.kendall.low is None
    assert figures.spearman.low is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(scores, scores, scores, scores), min_size=1, max_size=12))
def test_shares_add_up_and_nothing_is_nan(rows):
    table = np.array(rows, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = measure_metrics(table[:, :2], table[:, 2:])
    assert 0 <= figures.flip_rate.value <= 1
    assert figures.agreement.value + figures.flip_rate.value <= 1 + 1e-6
    for field in ParityMetrics.model_fields:
        estimate = getattr(figures, field)
        if not isinstance(estimate, int):
            assert all(value is None or np.isfinite(value) for value in estimate.model_dump().values())


@settings(max_examples=60, deadline=None)
@given(score_pairs, score_pairs, st.sampled_from([0.25, 0.5, 2.0, 8.0]), st.integers(-8, 8))
def test_agreement_and_ranks_are_invariant_to_an_increasing_linear_map(reference, candidate, slope, offset):
    size = min(len(reference), len(candidate))
    reference, candidate = np.array(reference[:size]), np.array(candidate[:size])
    before, after = measure_metrics(reference, candidate), measure_metrics(reference, slope * candidate)
    assert (before.agreement, before.flip_rate) == (after.agreement, after.flip_rate)
    assert (before.spearman, before.kendall) == (after.spearman, after.kendall)
    moved = measure_metrics(reference, slope * reference + offset)
    assert moved.flips == 0
    assert moved.shift_after_affine.value in (None, pytest.approx(0, abs=1e-6))


@settings(max_examples=40, deadline=None)
@given(score_pairs)
def test_identical_scores_are_perfect(rows):
    reference = np.array(rows)
    figures = measure_metrics(reference, reference.copy())
    assert (figures.agreement.value, figures.flips) == (1, 0)
    spread = len(set(reference.ravel())) > 1
    assert figures.mean_shift.value == (0 if spread else None)
    correlations = (figures.pearson, figures.spearman, figures.kendall)
    assert {each.value for each in correlations} == ({1.0} if spread and len(rows) > 1 else {None})


def test_constant_scores_have_no_correlation_and_no_unit():
    flat, moving = np.full((20, 2), 0.1), random_scores(20)[0]
    against_flat, from_flat = measure_metrics(flat, moving), measure_metrics(moving, flat)
    assert against_flat.mean_shift.value is None and against_flat.slope.value is None
    assert from_flat.pearson.value is None and from_flat.spearman.value is None
    assert from_flat.slope.value == 0
    assert from_flat.shift_after_affine.value == pytest.approx(
        np.abs(moving - moving.mean()).mean() / moving.std(), rel=1e-5
    )
