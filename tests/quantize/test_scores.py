"""After the last block: who scores what, what the repair may learn from, and what the report is given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from calibration.sampling import CalibrationRow, ParityPair, Sample
from calibration.sources import ConversationRow
from quantize.report import scores as final_scores
from quantize.report.head_recalibration import HeadRecalibration, RecalibrationData
from quantize.report.scores import FinalScores, compute_final_scores, parity_pairs
from quantize.sweep.hidden_states import SweepStates
from runtime.common.errors import NonFiniteError
from runtime.conversations.conversation import PreferencePair
from runtime.conversations.rendering import RenderedConversation
from runtime.modeling.score_head import ScoreHead
from tests.quantize.test_head_recalibration import make_features, make_head
from tests.quantize.test_job import RECIPE

ROWS, PAIRS = 12, 5


class FinishedStreams(SimpleNamespace):
    """Streams after their last block: features of calibration rows first, then of parity rows."""

    def features(self, head: ScoreHead) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.reference, self.quantized, self.floor


def make_streams() -> SweepStates:
    reference = make_features(ROWS + 2 * PAIRS)
    quantized = reference + 0.4
    return FinishedStreams(  # type: ignore[return-value]
        reference=reference, quantized=quantized, floor=reference[ROWS:].bfloat16(), calibration_rows=ROWS
    )


def make_sample() -> Sample:
    """Two rows a prompt, as preference pairs give them; rendering plays no part here."""
    rendered = RenderedConversation([1, 2], 1)

    def turns(text: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    rows = [CalibrationRow(ConversationRow(turns(f"q{i // 2}", f"a{i}")), rendered) for i in range(ROWS)]
    pairs = [
        PreferencePair(turns(f"p{i}", "")[:1], turns("", f"good {i}")[1:], turns("", f"bad {i}")[1:], "safety")
        for i in range(PAIRS)
    ]
    return Sample(rows, [ParityPair(pair, rendered, rendered) for pair in pairs], 0, [])


def test_every_row_is_scored_in_every_model():
    head, states = make_head(), make_streams()
    result = compute_final_scores(states, head, make_sample(), replace(RECIPE, repair=False))
    assert torch.equal(result.reference, head.score(states.reference))
    assert torch.equal(result.quantized, head.score(states.quantized))
    assert torch.equal(result.noise_floor, head.score(states.floor)) and len(result.noise_floor) == 2 * PAIRS
    assert result.recalibration is None and result.before_recalibration is None


def test_the_repair_learns_from_calibration_rows_alone_by_prompt(monkeypatch):
    given: list[RecalibrationData] = []
    head, states = make_head(), make_streams()
    monkeypatch.setattr(
        final_scores,
        "recalibrate_head",
        lambda head, data: (given.append(data), HeadRecalibration("none", {}, ROWS, head))[1],
    )
    compute_final_scores(states, head, make_sample(), RECIPE)
    (data,) = given
    assert torch.equal(data.features, states.quantized[:ROWS])
    assert torch.equal(data.reference_scores, head.score(states.reference[:ROWS]))
    assert data.groups == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_repair_is_scored_with_its_head_and_the_scores_before_it_are_kept(monkeypatch):
    head, states = make_head(), make_streams()
    better = head.with_tensors({"score.2.bias": head.tensors["score.2.bias"] + 1})
    monkeypatch.setattr(final_scores, "recalibrate_head", lambda *_: HeadRecalibration("affine", {}, ROWS, better))
    result = compute_final_scores(states, head, make_sample(), RECIPE)
    assert result.before_recalibration is not None
    assert torch.equal(result.quantized, better.score(states.quantized))
    assert torch.equal(result.before_recalibration, head.score(states.quantized))


@pytest.mark.parametrize("which", ["reference", "quantized"])
def test_a_score_that_is_no_number_is_named_by_model_and_row(which):
    states = make_streams()
    getattr(states, which)[7] = torch.nan
    with pytest.raises(NonFiniteError, match=f"the {which} score of row 7 is not finite"):
        compute_final_scores(states, make_head(), make_sample(), RECIPE)


def test_pairs_get_the_scores_of_their_two_rows():
    count = ROWS + 2 * PAIRS
    scores = FinalScores(
        torch.arange(count).float(), torch.arange(count) + 100.0, torch.arange(count) + 200.0,
        torch.arange(2 * PAIRS) + 300.0, None,
    )  # fmt: skip
    sample = make_sample()
    pairs = parity_pairs(scores, sample)
    assert [pair.id for pair in pairs] == [entry.pair.id for entry in sample.parity]
    assert pairs[2].reference == (16.0, 17.0) and pairs[2].quantized == (116.0, 117.0)
    assert pairs[2].unrepaired == (216.0, 217.0) and pairs[2].noise_floor == (304.0, 305.0)
    assert (pairs[2].category, pairs[2].chosen[0]["content"]) == ("safety", "good 2")
    assert parity_pairs(replace(scores, before_recalibration=None), sample)[0].unrepaired is None
