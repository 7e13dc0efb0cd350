"""When not one row has a finite score, the tensor at fault is named."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.batch.engine import find_nonfinite_tensor, score_window
from runtime.batch.reader import ScoreInput
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.common.errors import NonFiniteError
from runtime.scorer import Scorer
from tests.helpers.damage import change_tensors
from tests.helpers.tiny_score import assistant, user

ROWS = [("f:1", {"prompt": "Q", "chosen": "yes", "rejected": "no"}), ("f:2", {"messages": [user("Q"), assistant("a")]})]
DAMAGED = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tensor_is_named_wherever_it_is(damaged, name):
    change_tensors(damaged, lambda tensors: tensors[name].view(-1).fill_(float("nan")))
    scorer = Scorer(open_checkpoint(damaged))
    (window,) = ScoreInput(ROWS).windows(scorer.renderer, tokens=1000, truncate=False, strict=False)
    with pytest.raises(NonFiniteError, match=f"{damaged}: {name} holds a NaN or an infinity; download or create"):
        score_window(scorer.scores, window, scorer.checkpoint)


def test_a_model_that_only_overflows_is_told_by_row_and_block(damaged):
    change_tensors(damaged, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38))
    scorer = Scorer(open_checkpoint(damaged))
    (window,) = ScoreInput(ROWS).windows(scorer.renderer, tokens=1000, truncate=False, strict=False)
    with pytest.raises(
        NonFiniteError, match="f:1: block 1: a non-finite activation in conversation [01]; check the weights"
    ):
        score_window(scorer.scores, window, scorer.checkpoint)


def test_a_whole_checkpoint_has_no_damage(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert [find_nonfinite_tensor(checkpoint, block) for block in (None, 0, 1)] == [None] * 3
    assert torch.isfinite(Scorer(checkpoint).score([[user("Q"), assistant("a")]])).all()


def test_a_bad_row_costs_few_calls(tiny_checkpoint):
    """Where blocks are streamed, each reads the whole model."""
    scorer, calls = Scorer(open_checkpoint(tiny_checkpoint)), []
    rows = [(f"f:{n}", {"messages": [user("Q"), assistant("bad" if n == 37 else f"good {n}")]}) for n in range(64)]
    (window,) = ScoreInput(rows).windows(scorer.renderer, tokens=10_000, truncate=False, strict=False)
    bad = window[37].rendered[0]

    def score(rendered):
        calls.append(len(rendered))
        if any(each.token_ids == bad.token_ids for each in rendered):
            raise NonFiniteError("an overflow")
        return scorer.scores(rendered)

    records = score_window(score, window, scorer.checkpoint)
    assert [record["where"] for record in records if "error" in record] == ["f:37"]
    assert [record["score"] for record in records if "score" in record] == scorer.scores(
        [row.rendered[0] for row in window if row.rendered]
    )
    assert len(calls) <= 1 + 2 * math.log2(64)  # bisection: both halves at each level


def test_a_row_that_the_gpu_has_no_memory_for_fails_alone(tiny_checkpoint):
    scorer = Scorer(open_checkpoint(tiny_checkpoint))
    long = {"prompt": "Q", "chosen": "yes", "rejected": "no " * 60}

    def score(rendered):
        if sum(len(each.token_ids) for each in rendered) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scorer.scores(rendered)

    (window,) = ScoreInput([*ROWS, ("f:3", long)]).windows(scorer.renderer, tokens=1000, truncate=False, strict=False)
    (expected,) = ScoreInput(ROWS).windows(scorer.renderer, tokens=1000, truncate=False, strict=False)
    *others, last = score_window(score, window, scorer.checkpoint)
    assert others == score_window(scorer.scores, expected, scorer.checkpoint)
    assert last["where"] == "f:3" and "tokens needs more memory than the GPU has free" in last["error"]
    (alone,) = ScoreInput([("f:3", long)]).windows(scorer.renderer, tokens=1000, truncate=False, strict=False)
    assert "memory" in score_window(score, alone, scorer.checkpoint)[0]["error"]
