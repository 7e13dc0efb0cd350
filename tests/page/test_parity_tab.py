"""The Parity tab: stored reports, a new measurement, and the messages when there is no report."""

from __future__ import annotations

import shutil

import pytest

from runtime.api.service import Service
from runtime.evaluation.golden import GOLDEN_CONVERSATIONS, PUBLISHED_SCORES
from runtime.evaluation.report import read_report
from runtime.page.parity_check import ParityCheck
from runtime.page.tabs.parity import measure_parity, show_side_by_side, show_stored


def test_the_stored_report_is_shown_whole(page_service, page_models):
    html = show_stored(page_service, None)
    report = read_report(page_models[0] / "parity.json")
    for section in ('id="figures"', 'id="charts"', 'id="where"', 'id="worst"', 'id="made"'):
        assert section in html
    assert html.count('class="worst"') == len(report.worst) and "rule of thumb" in html
    assert report.worst[0].chosen[0]["content"] in html


def test_an_unquantized_model_has_none(page_service):
    assert "not quantized" in show_stored(page_service, list(page_service.models)[1])
    assert "not served" in show_stored(page_service, "other")


def test_several_reports_are_put_side_by_side(page_service, page_models):
    from tests.helpers.page_server import load

    assert show_side_by_side(page_service) == ""  # the other model has no report
    two = load(Service(), [page_models[0], page_models[0]])
    html = show_side_by_side(two)
    assert "tiny-gptq-4bit-2" in html and "Pair agreement" in html
    two.close()


def test_checking_again_gives_the_stored_figures(page_service, page_models):
    *_, (said, html, _, _) = measure_parity(page_service, None)
    assert "none are published for tiny-gptq-4bit" in said and "Measured just now" in html
    quick = ParityCheck.prepare(page_service.get(None))
    assert [quick.done for _ in quick.run()][-1] == len(quick.selection.pairs)
    then = {pair.id: pair.quantized for pair in read_report(page_models[0] / "parity.json").scores}
    assert len(quick.report.scores) == len(then)
    for pair in quick.report.scores:
        assert pair.quantized == pytest.approx(then[pair.id], abs=1e-4)


def test_a_model_without_pairs_says_so(page_models, tmp_path):
    from tests.helpers.page_server import load

    bare = shutil.copytree(page_models[0], tmp_path / "bare")
    (bare / "parity_pairs.jsonl").unlink()
    service = load(Service(), [bare, page_models[1]])
    *_, (said, *_) = measure_parity(service, None)
    assert "No parity_pairs.jsonl" in said
    *_, (said, *_) = measure_parity(service, "tiny")
    assert "This is an unquantized model" in said
    service.close()


def test_golden_scores_are_held_against_the_published(page_models, tmp_path, monkeypatch):
    from tests.helpers.page_server import load

    service = load(Service(), [shutil.copytree(page_models[1], tmp_path / "WorldPM-72B")])
    good, bad = service.get(None).scorer.score(GOLDEN_CONVERSATIONS).tolist()
    for off, verdict, missed in ((0.0, "pass", False), (1.0, "FAIL", True)):
        monkeypatch.setitem(PUBLISHED_SCORES, "Qwen/WorldPM-72B", (good + off, bad))
        *_, (said, *_) = measure_parity(service, None)
        assert verdict in said and ("missed" in said) == missed
    service.close()
