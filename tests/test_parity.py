"""Figures against slow plain references, and the shape of a report."""

from __future__ import annotations

import json
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from runtime.breakdown import length_style, markdown_style
from runtime.errors import ConversationError, KitError, NonFiniteError
from runtime.figures import Figures, measure_figures
from runtime.parity import (
    BlockError,
    PairScores,
    ParityReport,
    Subject,
    Thresholds,
    measure_parity,
    read_report,
)
from runtime.summary import summary_table, verdict

SUBJECT = Subject(
    model="tiny",
    method="gptq",
    bits=4,
    bits_per_weight=4.25,
    group_size=64,
    reference_dtype="bfloat16 weights, float32 arithmetic",
    kit_version="0",
)


def pair(
    reference, quantized, *, id="a", category="maths", chosen="yes", rejected="no", **runs
) -> PairScores:
    return PairScores(
        id=id,
        category=category,
        reference=reference,
        quantized=quantized,
        prompt=[{"role": "user", "content": "Is it?"}],
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        **runs,
    )


def random_scores(pairs: int, noise: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    reference = generator.normal(size=(pairs, 2))
    return reference, 0.9 * reference + 0.2 + noise * generator.normal(size=(pairs, 2))


def random_pairs(pairs: int, seed: int = 0, **runs: bool) -> list[PairScores]:
    reference, quantized = random_scores(pairs, seed=seed)
    noise, unrepaired = random_scores(pairs, 0.05, seed)[1], random_scores(pairs, 0.6, seed)[1]
    return [
        pair(
            tuple(reference[i]),
            tuple(quantized[i]),
            id=f"{i:03}",
            category=("objective/maths", "objective/code", "chat")[i % 3],
            noise_floor=tuple(noise[i]) if runs.get("noise") else None,
            unrepaired=tuple(unrepaired[i]) if runs.get("unrepaired") else None,
        )
        for i in range(pairs)
    ]


def naive(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """Every figure as its definition says it, one pair at a time."""
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
def test_figures_equal_their_plain_definitions(decimals: int):
    reference, candidate = (scores.round(decimals) for scores in random_scores(60))
    figures = measure_figures(reference, candidate)
    for name, expected in naive(reference, candidate).items():
        assert getattr(figures, name).value == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("decimals", [6, 0], ids=["distinct", "many ties"])
def test_intervals_equal_a_bootstrap_that_resamples_and_measures_anew(decimals: int):
    reference, candidate = (scores.round(decimals) for scores in random_scores(24))
    drawn = np.random.default_rng(5).integers(24, size=(1000, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resamples = [naive(reference[rows], candidate[rows]) for rows in drawn]
    figures = measure_figures(reference, candidate, seed=5)
    bootstrapped = ("spearman", "kendall", "pearson", "mean_shift", "signed_shift", "slope", "offset")
    for name in (*bootstrapped, "shift_after_affine"):
        low, high = np.quantile([each[name] for each in resamples], [0.025, 0.975])
        estimate = getattr(figures, name)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-4, abs=1e-7), name


def test_proportions_carry_wilson_intervals():
    figures = measure_figures(*random_scores(40))
    n, p, z = 40, figures.agreement.value, stats.norm.ppf(0.975)
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    wilson = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert (figures.agreement.low, figures.agreement.high) == pytest.approx(wilson, rel=1e-5)


def test_a_thousand_resamples_of_500_pairs_take_under_two_seconds():
    scores = random_scores(500)
    start = time.process_time()
    figures = measure_figures(*scores)
    assert time.process_time() - start < 2
    assert figures.kendall.low < figures.kendall.value < figures.kendall.high


def test_large_inputs_go_without_kendalls_interval_only():
    figures = measure_figures(*random_scores(1001))
    assert figures.kendall.value is not None and figures.kendall.low is None
    assert figures.spearman.low is not None


scores = st.floats(-50, 50, allow_nan=False, width=32).map(lambda value: round(value, 3))
score_pairs = st.lists(st.tuples(scores, scores), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(scores, scores, scores, scores), min_size=1, max_size=12))
def test_shares_add_up_and_nothing_is_nan(rows):
    table = np.array(rows, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = measure_figures(table[:, :2], table[:, 2:])
    assert 0 <= figures.flip_rate.value <= 1
    assert figures.agreement.value + figures.flip_rate.value <= 1 + 1e-6
    for field in Figures.model_fields:
        estimate = getattr(figures, field)
        if not isinstance(estimate, int):
            assert all(value is None or np.isfinite(value) for value in estimate.model_dump().values())


@settings(max_examples=60, deadline=None)
@given(score_pairs, score_pairs, st.sampled_from([0.25, 0.5, 2.0, 8.0]), st.integers(-8, 8))
def test_agreement_and_rank_survive_a_rising_line(reference, candidate, slope, offset):
    size = min(len(reference), len(candidate))
    reference, candidate = np.array(reference[:size]), np.array(candidate[:size])
    before, after = measure_figures(reference, candidate), measure_figures(reference, slope * candidate)
    assert (before.agreement, before.flip_rate) == (after.agreement, after.flip_rate)
    assert (before.spearman, before.kendall) == (after.spearman, after.kendall)
    moved = measure_figures(reference, slope * reference + offset)
    assert moved.flips == 0
    assert moved.shift_after_affine.value in (None, pytest.approx(0, abs=1e-6))


@settings(max_examples=40, deadline=None)
@given(score_pairs)
def test_identical_scores_are_perfect(rows):
    reference = np.array(rows)
    figures = measure_figures(reference, reference.copy())
    assert (figures.agreement.value, figures.flips) == (1, 0)
    spread = len(set(reference.ravel())) > 1
    assert figures.mean_shift.value == (0 if spread else None)
    correlations = (figures.pearson, figures.spearman, figures.kendall)
    assert {each.value for each in correlations} == ({1.0} if spread and len(rows) > 1 else {None})


def test_constant_scores_have_no_correlation_and_no_unit():
    flat, moving = np.full((20, 2), 0.1), random_scores(20)[0]
    against_flat, from_flat = measure_figures(flat, moving), measure_figures(moving, flat)
    assert against_flat.mean_shift.value is None and against_flat.slope.value is None
    assert from_flat.pearson.value is None and from_flat.spearman.value is None
    assert from_flat.slope.value == 0
    assert from_flat.shift_after_affine.value == pytest.approx(
        np.abs(moving - moving.mean()).mean() / moving.std(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("reference", "quantized", "agrees", "flipped"),
    [
        ((2, 1), (1, 0), True, False),
        ((2, 1), (1, 2), False, True),
        ((2, 1), (1, 1), False, False),
        ((1, 1), (1, 2), False, False),
        ((1, 1), (2, 2), True, False),
    ],
)
def test_ties_agree_only_with_ties(reference, quantized, agrees, flipped):
    found = pair(reference, quantized)
    figures = measure_parity([found], SUBJECT).figures
    assert (found.agrees, found.flipped) == (agrees, flipped)
    assert (figures.agreement.value, figures.flips) == (agrees, flipped)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("run", ["reference", "quantized", "noise_floor", "unrepaired"])
def test_scores_that_are_no_numbers_are_refused_by_pair_and_run(run, value):
    runs = {"reference": (1.0, 0.0), "quantized": (1.0, 0.0), run: (0.0, value)}
    with pytest.raises(NonFiniteError, match=f"Pair bad .*{run}"):
        measure_parity([pair((1, 0), (1, 0)), pair(id="bad", **runs)], SUBJECT)


def test_block_errors_that_are_no_numbers_are_refused_but_lossless_layers_are_not():
    lossless = BlockError(block=0, mean_error=0, max_error=0, sqnr={"q_proj": np.inf})
    assert measure_parity([pair((1, 0), (1, 0))], SUBJECT, block_errors=[lossless]).block_errors[0].sqnr == {
        "q_proj": None
    }
    broken = BlockError(block=7, mean_error=0, max_error=0, linear_losses={"up_proj": np.nan})
    with pytest.raises(NonFiniteError, match="Block 7: loss of up_proj is nan"):
        measure_parity([pair((1, 0), (1, 0))], SUBJECT, block_errors=[broken])


def test_no_pairs_are_refused():
    with pytest.raises(ConversationError, match="0 preference pairs"):
        measure_parity([], SUBJECT)


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


def test_the_worst_pairs_are_disagreements_first_then_by_movement():
    pairs = [
        pair((1, 0), (1, 0), id="still"),
        pair((3, 0), (1, 0), id="moved most"),
        pair((0.1, 0), (0, 0.1), id="small flip"),
        pair((1, 0), (0, 1), id="large flip"),
    ]
    report = measure_parity(pairs, SUBJECT)
    assert [each.id for each in report.worst] == ["large flip", "small flip", "moved most"]
    assert len(measure_parity(random_pairs(30), SUBJECT).worst) == 10


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({}, []),
        ({"min_agreement": 0.75}, [True]),
        ({"min_agreement": 0.76}, [False]),
        ({"min_agreement": 0.5, "max_shift": 0.0}, [True, False]),
    ],
)
def test_thresholds(limits, met):
    pairs = [pair((1, 0), (1, 0))] * 3 + [pair((1, 0), (0, 1))]
    report = measure_parity(pairs, SUBJECT, thresholds=Thresholds(**limits))
    assert [threshold.met for threshold in report.thresholds] == met
    assert report.passed == all(met)
    assert verdict(report).grade == ("unknown" if not met else "good" if all(met) else "poor")


def test_a_shift_that_cannot_be_told_meets_no_threshold():
    report = measure_parity([pair((1, 1), (1, 1))], SUBJECT, thresholds=Thresholds(max_shift=1))
    assert report.figures.mean_shift.value is None and not report.passed


def test_json_survives_the_round_trip_and_has_no_nan(tmp_path):
    blocks = [BlockError(block=0, mean_error=0.1, max_error=0.2, sqnr={"q_proj": 20.0})]
    for pairs in (random_pairs(20, noise=True, unrepaired=True), [pair((1, 1), (1, 1))]):
        report = measure_parity(pairs, SUBJECT, block_errors=blocks, repair={"slope": 1.5}, notes=["cut"])
        (tmp_path / "parity.json").write_text(report.to_json())
        assert "NaN" not in report.to_json() and "Infinity" not in report.to_json()
        assert read_report(tmp_path / "parity.json") == report


def test_identical_runs_give_identical_bytes_and_the_seed_matters():
    reports = [measure_parity(random_pairs(20), SUBJECT, seed=seed).to_json() for seed in (0, 0, 1)]
    assert reports[0] == reports[1] != reports[2]


def test_only_the_schema_version_of_this_kit_is_read(tmp_path):
    path = tmp_path / "parity.json"
    content = json.loads(measure_parity(random_pairs(3), SUBJECT).to_json())
    assert content["schema_version"] == 1
    for fault, damaged in {
        "schema_version is 2": content | {"schema_version": 2},
        "figures: ": content | {"figures": None},
        "no parity report": {"scores": []},
    }.items():
        path.write_text(json.dumps(damaged))
        with pytest.raises(KitError, match=fault):
            read_report(path)
    path.write_text("{")
    with pytest.raises(KitError, match="no parity report"):
        read_report(path)


def test_the_summary_has_a_column_for_each_run():
    report = measure_parity(random_pairs(40, noise=True, unrepaired=True), SUBJECT)
    table = summary_table(report)
    assert table[0] == ("figure", "quantized", "before repair", "plain bf16")
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
    assert grade(0, 100, 0.4) == "Yes for ranking; set score thresholds anew."
    assert grade(0, 100, 0.8) == "Yes for ranking, not for score thresholds."
    assert grade(1, 40, 0.0).startswith("Probably")
    assert grade(7, 100, 0.0).startswith("With care")
    assert grade(7, 100, 0.0, noise_wrong=8).startswith("Yes")
    assert grade(20, 100, 0.0).startswith("No")


def test_the_verdict_tells_flips_and_ties_apart():
    flip, tie, same = pair((1, 0), (0, 1)), pair((1, 0), (0, 0)), pair((2, 0), (2, 0))
    sentence = verdict(measure_parity([flip, tie, same], SUBJECT)).sentences[1]
    assert sentence.startswith("1 pair flips") and "1 pair more ties" in sentence
    assert verdict(measure_parity([same], SUBJECT)).sentences[1] == "No pair flips."


def test_a_report_is_frozen():
    report: ParityReport = measure_parity(random_pairs(3), SUBJECT)
    with pytest.raises(ValueError, match="frozen"):
        report.notes = []  # type: ignore[misc]
