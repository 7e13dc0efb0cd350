"""Measuring a parity report, its thresholds, and reading it back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtime.common.errors import ConversationError, KitError, NonFiniteError
from runtime.evaluation.comparison import measure_parity
from runtime.evaluation.report import BlockError, ParityReport, Thresholds, read_report
from runtime.evaluation.verdict import verdict
from tests.helpers.scored import SUBJECT, pair, random_pairs


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
def test_a_non_finite_score_is_an_error_that_names_pair_and_run(run, value):
    runs = {"reference": (1.0, 0.0), "quantized": (1.0, 0.0), run: (0.0, value)}
    with pytest.raises(NonFiniteError, match=f"Pair bad .*{run}"):
        measure_parity([pair((1, 0), (1, 0)), pair(id="bad", **runs)], SUBJECT)


def test_a_non_finite_block_error_is_an_error_but_a_lossless_layer_is_not():
    lossless = BlockError(block=0, mean_error=0, max_error=0, sqnr={"q_proj": np.inf})
    assert measure_parity([pair((1, 0), (1, 0))], SUBJECT, block_errors=[lossless]).block_errors[0].sqnr == {
        "q_proj": None
    }
    broken = BlockError(block=7, mean_error=0, max_error=0, linear_losses={"up_proj": np.nan})
    with pytest.raises(NonFiniteError, match="Block 7: loss of up_proj is nan"):
        measure_parity([pair((1, 0), (1, 0))], SUBJECT, block_errors=[broken])


def test_measuring_without_pairs_is_an_error():
    with pytest.raises(ConversationError, match="0 preference pairs"):
        measure_parity([], SUBJECT)


def test_worst_pairs_are_disagreements_first_then_by_margin_change():
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
        ({"max_shift": 0.5}, [True]),
        ({"min_agreement": 0.5, "max_shift": 0.0}, [True, False]),
    ],
)
def test_thresholds(limits, met):
    pairs = [pair((1, 0), (1, 0))] * 3 + [pair((1, 0), (0, 1))]
    report = measure_parity(pairs, SUBJECT, thresholds=Thresholds(**limits))
    assert [threshold.met for threshold in report.thresholds] == met
    assert report.passed == all(met)
    assert verdict(report).grade == ("unknown" if not met else "good" if all(met) else "poor")


def test_an_undefined_shift_meets_no_threshold():
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
        "not a parity report": {"scores": []},
    }.items():
        path.write_text(json.dumps(damaged))
        with pytest.raises(KitError, match=fault):
            read_report(path)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(KitError, match="not a parity report"):
            read_report(path)
    with pytest.raises(KitError, match="not a parity report"):
        read_report(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"reference_mean":', '"reference_mean": NaN, "x":', "NaN is no finite number"),
        ('"reference_mean":', '"reference_mean": 1e999, "x":', "1e999 is no finite number"),
        ('"reference_mean":', f'"reference_mean": {10**400}, "x":', "is no finite number"),
        ('"content":', '"contents":', "messages with role and content"),
        ('"agreement": {', '"agreement": {"low": null, "value": 1.0}, "y": {', "a value with its interval"),
    ],
)
def test_what_the_page_could_not_show_is_refused(tmp_path, old, new, fault):
    text = measure_parity(random_pairs(4), SUBJECT).to_json()
    (tmp_path / "parity.json").write_text(text.replace(old, new))
    with pytest.raises(KitError, match=fault):
        read_report(tmp_path / "parity.json")


def test_a_report_is_frozen():
    report: ParityReport = measure_parity(random_pairs(3), SUBJECT)
    with pytest.raises(ValueError, match="frozen"):
        report.notes = []  # type: ignore[misc]
