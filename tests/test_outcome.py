"""After the last block: who scores what, what the repair may learn from, and what the report is given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from calibration.conversations import Conversation
from calibration.sampling import CalibrationRow, ParityPair, Sample
from quantize import outcome
from quantize.outcome import Outcome, conclude, parity_pairs
from quantize.repair import Evidence, Repair
from quantize.streams import Streams
from runtime.chat import Rendered
from runtime.conversation import PreferencePair
from runtime.errors import NonFiniteError
from runtime.qwen2 import ScoreHead
from tests.test_job import RECIPE
from tests.test_repair import make_features, make_head

ROWS, PAIRS = 12, 5


class FinishedStreams(SimpleNamespace):
    """Streams after their last block: features of calibration rows first, then of parity rows."""

    def features(self, head: ScoreHead) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.reference, self.quantized, self.floor


def make_streams() -> Streams:
    reference = make_features(ROWS + 2 * PAIRS)
    quantized = reference + 0.4
    return FinishedStreams(  # type: ignore[return-value]
        reference=reference, quantized=quantized, floor=reference[ROWS:].bfloat16(), calibration_rows=ROWS
    )


def make_sample() -> Sample:
    """Two rows a prompt, as preference pairs give them; rendering plays no part here."""
    rendered = Rendered([1, 2], 1)

    def turns(text: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    rows = [CalibrationRow(Conversation(turns(f"q{i // 2}", f"a{i}")), rendered) for i in range(ROWS)]
    pairs = [
        PreferencePair(turns(f"p{i}", "")[:1], turns("", f"good {i}")[1:], turns("", f"bad {i}")[1:], "safety")
        for i in range(PAIRS)
    ]
    return Sample(rows, [ParityPair(pair, rendered, rendered) for pair in pairs], 0, [])


def test_every_row_is_scored_in_every_model():
    head, streams = make_head(), make_streams()
    result = conclude(streams, head, make_sample(), replace(RECIPE, repair=False))
    assert torch.equal(result.reference, head.score(streams.reference))
    assert torch.equal(result.quantized, head.score(streams.quantized))
    assert torch.equal(result.noise_floor, head.score(streams.floor)) and len(result.noise_floor) == 2 * PAIRS
    assert result.repair is None and result.unrepaired is None


def test_the_repair_learns_from_calibration_rows_alone_by_prompt(monkeypatch):
    given: list[Evidence] = []
    head, streams = make_head(), make_streams()
    monkeypatch.setattr(
        outcome, "fit_repair", lambda head, evidence: (given.append(evidence), Repair("none", {}, ROWS, head))[1]
    )
    conclude(streams, head, make_sample(), RECIPE)
    (evidence,) = given
    assert torch.equal(evidence.reference_features, streams.reference[:ROWS])
    assert torch.equal(evidence.quantized_features, streams.quantized[:ROWS])
    assert torch.equal(evidence.reference_scores, head.score(streams.reference[:ROWS]))
    assert evidence.groups == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_a_repair_is_scored_with_its_head_and_the_scores_before_it_are_kept(monkeypatch):
    head, streams = make_head(), make_streams()
    better = replace(head, score_2_bias=head.score_2_bias + 1)
    monkeypatch.setattr(outcome, "fit_repair", lambda *_: Repair("affine", {}, ROWS, better))
    result = conclude(streams, head, make_sample(), RECIPE)
    assert result.unrepaired is not None
    assert torch.equal(result.quantized, better.score(streams.quantized))
    assert torch.equal(result.unrepaired, head.score(streams.quantized))


@pytest.mark.parametrize("which", ["reference", "quantized"])
def test_a_score_that_is_no_number_is_named_by_model_and_row(which):
    streams = make_streams()
    getattr(streams, which)[7] = torch.nan
    with pytest.raises(NonFiniteError, match=f"the {which} score of row 7 is not finite"):
        conclude(streams, make_head(), make_sample(), RECIPE)


def test_pairs_get_the_scores_of_their_two_rows():
    count = ROWS + 2 * PAIRS
    scores = Outcome(
        torch.arange(count).float(), torch.arange(count) + 100.0, torch.arange(count) + 200.0,
        torch.arange(2 * PAIRS) + 300.0, None,
    )  # fmt: skip
    sample = make_sample()
    pairs = parity_pairs(scores, sample)
    assert [pair.id for pair in pairs] == [entry.pair.id for entry in sample.parity]
    assert pairs[2].reference == (16.0, 17.0) and pairs[2].quantized == (116.0, 117.0)
    assert pairs[2].unrepaired == (216.0, 217.0) and pairs[2].noise_floor == (304.0, 305.0)
    assert (pairs[2].category, pairs[2].chosen[0]["content"]) == ("safety", "good 2")
    assert parity_pairs(replace(scores, unrepaired=None), sample)[0].unrepaired is None
