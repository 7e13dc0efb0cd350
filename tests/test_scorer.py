from __future__ import annotations

import math

import pytest
import torch

from runtime import Scorer
from runtime.errors import ConversationError, NonFiniteError, PlanError

QUESTION = [{"role": "user", "content": "Tips for better sleep?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [*QUESTION, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint) -> Scorer:
    return Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")


def test_order_and_neighbours_change_nothing(scorer):
    conversations = [answer("word " * count) for count in (1, 30, 7, 90, 2)]
    together = scorer.score(conversations)
    alone = torch.cat([scorer.score([each]) for each in conversations])
    assert (together - alone).abs().max() < 1e-5 * alone.std()
    assert (scorer.score(conversations[::-1]).flip(0) - together).abs().max() < 1e-5 * alone.std()


def test_compare_is_the_two_scores(scorer):
    comparison = scorer.compare("Tips for better sleep?", "Keep a rhythm.", "idk")
    scores = scorer.score([answer("Keep a rhythm."), answer("idk")])
    assert [comparison.score_a, comparison.score_b] == pytest.approx(scores.tolist(), abs=1e-6)
    assert comparison.margin == comparison.score_a - comparison.score_b
    assert comparison.probability_a == pytest.approx(1 / (1 + math.exp(-comparison.margin)))


def test_bfloat16_products_stay_close(tiny_checkpoint, scorer):
    conversations = [answer("word " * count) for count in range(1, 20)]
    exact = scorer.score(conversations)
    rounded = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="bfloat16").score(conversations)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.std()


def test_errors_name_the_conversation(scorer):
    with pytest.raises(ConversationError, match="conversation 1"):
        scorer.score([answer("fine"), QUESTION])


def test_a_head_that_overflows_is_an_error_not_a_score(tiny_checkpoint):
    scorer = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")
    scorer.head.score_2_bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="conversation 0 has a non-finite score"):
        scorer.score([answer("x")])


def test_unknown_dtype_is_refused(tiny_checkpoint):
    with pytest.raises(PlanError, match="'float16'"):
        Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float16")
