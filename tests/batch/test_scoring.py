"""Rows without a score: each has its own reason, and a model that is at fault ends the run."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.batch.engine import MIN_ROWS_TO_BLAME, find_nonfinite_tensor, score_window
from runtime.batch.reader import ScoreInput
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.common.errors import ConversationError, NonFiniteError
from runtime.conversations.rendering import RenderedConversation
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
        score_window(scorer.score_each, window, scorer.checkpoint)


def overflowing(damaged, rows):
    """A model whose every score overflows without a damaged tensor, and a window of rows."""
    change_tensors(damaged, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38))
    scorer = Scorer(open_checkpoint(damaged))
    (window,) = ScoreInput(rows).windows(scorer.renderer, tokens=10_000, truncate=False, strict=False)
    return scorer, window


def test_a_few_rows_that_overflow_are_told_by_row_and_block(damaged):
    """The model is not blamed: the run goes on, and `--resume` does not meet them again."""
    scorer, window = overflowing(damaged, ROWS)
    first, second = score_window(scorer.score_each, window, scorer.checkpoint)
    for record, where in ((first, "f:1"), (second, "f:2")):
        assert record["error"].startswith(f"{where}: block 1: a non-finite activation; check the weights")


def test_a_model_that_overflows_for_every_row_ends_the_run(damaged):
    rows = [(f"f:{number}", ROWS[1][1]) for number in range(MIN_ROWS_TO_BLAME)]
    scorer, window = overflowing(damaged, rows)
    with pytest.raises(NonFiniteError, match="None of 16 rows has a finite score; the first: f:0: block 1"):
        score_window(scorer.score_each, window, scorer.checkpoint)


def test_a_whole_checkpoint_has_no_damage(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert [find_nonfinite_tensor(checkpoint, block) for block in (None, 0, 1)] == [None] * 3
    assert torch.isfinite(Scorer(checkpoint).score([[user("Q"), assistant("a")]])).all()


@pytest.mark.parametrize("budget", [40, 4096])
def test_a_nan_stays_in_its_conversation(tiny_checkpoint, budget):
    """A token whose embedding is NaN spoils the conversations with it: no neighbour, also one with a common prefix."""
    scorer = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32", token_budget=budget)
    draw = torch.Generator().manual_seed(0)
    prefix = torch.randint(5, 250, (20,), generator=draw).tolist()
    rows = [[*prefix, *torch.randint(5, 250, (6,), generator=draw).tolist()] for _ in range(6)]
    rows[2][22] = rows[4][25] = 3
    rendered = [RenderedConversation(row, len(row) - 1) for row in rows]
    expected = scorer.score_each(rendered)
    scorer._embedding = scorer._embedding.clone()
    scorer._embedding[3] = float("nan")
    results = scorer.score_each(rendered)
    for row, (result, before) in enumerate(zip(results, expected, strict=True)):
        if row in (2, 4):
            assert isinstance(result, NonFiniteError) and result.block == 0 and str(result).startswith("block 0: ")
        else:
            assert result == before
    with pytest.raises(NonFiniteError, match="^conversation 2: block 0: a non-finite activation"):
        scorer.score_rendered(rendered)


def test_the_first_block_that_shows_it_is_named(tiny_checkpoint):
    scorer = Scorer.from_pretrained(tiny_checkpoint, devices="cpu", dtype="float32")
    rendered = [scorer.renderer.render([user("Q"), assistant("a" * 30)])]
    last = scorer.checkpoint.model_config.num_hidden_layers - 1
    for block in reversed(range(last + 1)):
        scorer._device_blocks[0].resident[block].norms["input_layernorm.weight"].fill_(float("inf"))
        (result,) = scorer.score_each(rendered)
        assert isinstance(result, NonFiniteError) and result.block == block


def test_what_the_gpu_has_no_memory_for_fails_alone(tiny_checkpoint, monkeypatch):
    scorer = Scorer(open_checkpoint(tiny_checkpoint))
    conversations = [[user("Q"), assistant("no " * (60 if number == 5 else number))] for number in range(1, 9)]
    rendered = [scorer.renderer.render(each) for each in conversations]
    expected, real, calls = scorer.score_each(rendered), Scorer._compute, []

    def compute(self, rendered):
        calls.append(len(rendered))
        if sum(len(each.token_ids) for each in rendered) > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, rendered)

    monkeypatch.setattr(Scorer, "_compute", compute)
    *results, bad, after_1, after_2, after_3 = scorer.score_each(rendered)
    torch.testing.assert_close([*results, after_1, after_2, after_3], [*expected[:4], *expected[5:]])
    assert isinstance(bad, ConversationError) and "tokens needs more memory than the GPU has free" in str(bad)
    assert calls[0] == 8 and len(calls) <= 1 + 2 * math.log2(8)
