"""The block against transformers' Qwen2, and the invariants of packing and of the sweep."""

from __future__ import annotations

import pytest
import torch

from runtime.batching import pack
from runtime.chat import Rendered
from runtime.checkpoint import open_checkpoint
from runtime.errors import NonFiniteError
from runtime.hf_model import Qwen2ForRewardModel
from runtime.numerics import FLOAT32, PLAIN_BFLOAT16, Numerics
from runtime.qwen2 import Block, Rotary
from runtime.sweep import Stream, read_blocks, read_head
from tests.tiny import write_tiny_checkpoint


def random_rows(count: int, seed: int = 0) -> list[Rendered]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 60, (count,), generator=generator).tolist()
    rows = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    rows[1::3] = [row[:20] + other for row, other in zip(rows[0::3], rows[1::3], strict=False)]  # shared prefixes
    return [Rendered(row, len(row) - 1) for row in rows]


def swept_scores(directory, rendered, numerics: Numerics, token_budget: int = 128) -> torch.Tensor:
    checkpoint = open_checkpoint(directory)
    architecture = checkpoint.architecture
    rotary = Rotary(architecture, 128)
    stream = Stream(pack(rendered, token_budget), architecture.hidden_size, numerics.stream)
    stream.embed(checkpoint.read("model.embed_tokens.weight"))
    for index, tensors in read_blocks(checkpoint):
        stream.advance(Block.from_tensors(architecture, tensors, rotary, numerics), index)
        stream.turn_over()
    return read_head(checkpoint)(stream.at_scored())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scores_equal_transformers_in_fp32(tmp_path, kv_heads):
    directory = write_tiny_checkpoint(tmp_path / "m", layers=3, heads=4, kv_heads=kv_heads)
    rendered = random_rows(12)
    theirs = Qwen2ForRewardModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row.token_ids])) for row in rendered])
    ours = swept_scores(directory, rendered, FLOAT32)
    assert (ours - expected).abs().max() < 1e-5 * expected.std()


def test_plain_bf16_is_what_transformers_gives(tiny_checkpoint):
    rendered = random_rows(12)
    theirs = Qwen2ForRewardModel.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row.token_ids])) for row in rendered])
    exact = swept_scores(tiny_checkpoint, rendered, FLOAT32)
    ours = swept_scores(tiny_checkpoint, rendered, PLAIN_BFLOAT16)
    theirs_error, our_error = (expected - exact).abs().mean(), (ours - exact).abs().mean()
    assert 0.5 < our_error / theirs_error < 2


def test_a_score_does_not_depend_on_its_neighbours(tiny_checkpoint):
    rendered = random_rows(20)
    together = swept_scores(tiny_checkpoint, rendered, FLOAT32, token_budget=10_000)
    alone = swept_scores(tiny_checkpoint, rendered, FLOAT32, token_budget=1)
    backwards = swept_scores(tiny_checkpoint, rendered[::-1], FLOAT32, token_budget=100).flip(0)
    assert (together - alone).abs().max() < 1e-5 * alone.std()
    assert (backwards - alone).abs().max() < 1e-5 * alone.std()


def test_the_last_block_at_the_scored_tokens_alone(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    _, tensors = next(read_blocks(checkpoint))
    block = Block.from_tensors(checkpoint.architecture, tensors, Rotary(checkpoint.architecture, 128), FLOAT32)
    (batch,) = pack(random_rows(9), 10_000)
    hidden = torch.randn(batch.tokens, checkpoint.architecture.hidden_size)
    assert batch.tokens < sum(end - start for path in batch.paths for start, end in path)
    assert torch.allclose(block.at_scored(hidden, batch), block(hidden, batch)[batch.scored], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("densify", [False, True])
def test_stacked_linears_give_what_single_ones_do(tiny_checkpoint, densify):
    checkpoint = open_checkpoint(tiny_checkpoint)
    rotary = Rotary(checkpoint.architecture, 128)
    plain, stacked = (
        Block.from_tensors(checkpoint.architecture, checkpoint.read_block(0), rotary, FLOAT32) for _ in range(2)
    )
    if densify:
        stacked.densify()
    stacked.stack()
    (batch,) = pack(random_rows(9), 10_000)
    hidden = torch.randn(batch.tokens, checkpoint.architecture.hidden_size)
    assert torch.allclose(stacked(hidden, batch), plain(hidden, batch), atol=1e-5, rtol=1e-5)


def test_streams_in_files_equal_streams_in_memory(tiny_checkpoint, tmp_path):
    batches = pack(random_rows(5), 64)
    embedding = open_checkpoint(tiny_checkpoint).read("model.embed_tokens.weight")
    in_files = Stream(batches, 64, directory=tmp_path, name="x")
    in_memory = Stream(batches, 64)
    for stream in (in_files, in_memory):
        stream.embed(embedding)
        stream.write(0, stream.read(0) + 1)
        stream.sync()
    again = Stream(batches, 64, directory=tmp_path, name="x", finished_blocks=1)
    assert torch.equal(in_files.current, in_memory.current)
    assert torch.equal(again.read(0), in_memory.read(0, following=True))


def test_a_non_finite_activation_names_block_and_row(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    _, tensors = next(read_blocks(checkpoint))
    tensors["mlp.down_proj.weight"][3, 5] = float("nan")
    stream = Stream(pack(random_rows(3), 1000), 64)
    stream.embed(checkpoint.read("model.embed_tokens.weight"))
    block = Block.from_tensors(checkpoint.architecture, tensors, Rotary(checkpoint.architecture, 128), FLOAT32)
    with pytest.raises(NonFiniteError, match="block 7, stream: .* conversation 0"):
        stream.advance(block, 7)
