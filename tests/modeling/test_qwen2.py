"""The block against transformers' Qwen2; packing and stacking do not change scores."""

from __future__ import annotations

import pytest
import torch

from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel
from runtime.common.errors import NonFiniteError
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.block_loading import read_blocks, read_head
from runtime.execution.hidden_states import HiddenStates
from runtime.modeling.packed_batch import pack_batches
from runtime.modeling.precision import FLOAT32, PURE_BFLOAT16, Precision
from runtime.modeling.qwen2 import Block, RotaryEmbedding
from tests.helpers.placed import rounds_rows_alike
from tests.helpers.tiny import write_tiny_checkpoint


def random_rows(count: int, seed: int = 0) -> list[RenderedConversation]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 60, (count,), generator=generator).tolist()
    rows = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    rows[1::3] = [row[:20] + other for row, other in zip(rows[0::3], rows[1::3], strict=False)]  # shared prefixes
    return [RenderedConversation(row, len(row) - 1) for row in rows]


def swept_scores(directory, rendered, precision: Precision, token_budget: int = 128) -> torch.Tensor:
    checkpoint = open_checkpoint(directory)
    model_config = checkpoint.model_config
    rotary = RotaryEmbedding(model_config, 128)
    stream = HiddenStates(pack_batches(rendered, token_budget), model_config.hidden_size, precision.residual_dtype)
    stream.embed(checkpoint.read("model.embed_tokens.weight"))
    for index, tensors in read_blocks(checkpoint):
        stream.advance(Block.from_tensors(model_config, tensors, rotary, precision), index)
        stream.swap_buffers()
    return read_head(checkpoint)(stream.at_scored_tokens())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scores_equal_transformers_in_fp32(tmp_path, kv_heads):
    directory = write_tiny_checkpoint(tmp_path / "m", layers=3, heads=4, kv_heads=kv_heads)
    rendered = random_rows(12)
    theirs = Qwen2ForRewardModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row.token_ids])) for row in rendered])
    ours = swept_scores(directory, rendered, FLOAT32)
    assert (ours - expected).abs().max() < 1e-5 * expected.std()


def test_pure_bf16_error_is_that_of_transformers(tiny_checkpoint):
    rendered = random_rows(12)
    theirs = Qwen2ForRewardModel.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([row.token_ids])) for row in rendered])
    exact = swept_scores(tiny_checkpoint, rendered, FLOAT32)
    ours = swept_scores(tiny_checkpoint, rendered, PURE_BFLOAT16)
    theirs_error, our_error = (expected - exact).abs().mean(), (ours - exact).abs().mean()
    assert 0.5 < our_error / theirs_error < 2


def test_a_score_does_not_depend_on_the_batch(tiny_checkpoint):
    rendered = random_rows(20)
    together = swept_scores(tiny_checkpoint, rendered, FLOAT32, token_budget=10_000)
    alone = swept_scores(tiny_checkpoint, rendered, FLOAT32, token_budget=1)
    backwards = swept_scores(tiny_checkpoint, rendered[::-1], FLOAT32, token_budget=100).flip(0)
    assert (together - alone).abs().max() < 1e-5 * alone.std()
    assert (backwards - alone).abs().max() < 1e-5 * alone.std()


def test_the_last_block_at_the_scored_tokens_alone(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    _, tensors = next(read_blocks(checkpoint))
    block = Block.from_tensors(checkpoint.model_config, tensors, RotaryEmbedding(checkpoint.model_config, 128), FLOAT32)
    (batch,) = pack_batches(random_rows(9), 10_000)
    hidden = torch.randn(batch.tokens, checkpoint.model_config.hidden_size)
    assert batch.tokens < sum(end - start for path in batch.token_ranges for start, end in path)
    assert torch.allclose(
        block.at_scored_tokens(hidden, batch), block(hidden, batch)[batch.scored], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("chunk", [1, 16, 100, 511])
def test_chunks_of_a_long_conversation_give_the_same_output(tiny_checkpoint, chunk, stacked):
    checkpoint = open_checkpoint(tiny_checkpoint)
    rotary = RotaryEmbedding(checkpoint.model_config, 512)
    block = Block.from_tensors(checkpoint.model_config, checkpoint.read_block(0), rotary, FLOAT32)
    if stacked:
        block.stack()
    (batch,) = pack_batches([RenderedConversation([*range(512)], 400)], chunk)
    hidden = torch.randn(batch.tokens, checkpoint.model_config.hidden_size)
    expected = block.at_once(hidden, batch)
    assert torch.allclose(block(hidden, batch), expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(block.at_scored_tokens(hidden, batch), expected[400], atol=1e-5, rtol=1e-5)
    overwritten = hidden.clone()
    assert block(overwritten, batch, in_place=True) is overwritten
    assert torch.allclose(overwritten, expected, atol=1e-5, rtol=1e-5)


def test_chunks_do_not_change_a_bit(tiny_checkpoint):
    if not rounds_rows_alike(torch.float32):
        pytest.skip("products of this machine depend on the number of rows")
    rendered = random_rows(20)
    together, alone = (swept_scores(tiny_checkpoint, rendered, FLOAT32, token_budget=budget) for budget in (10_000, 7))
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dequantize", [False, True])
def test_stacked_linears_give_the_same_output(tiny_checkpoint, dequantize):
    checkpoint = open_checkpoint(tiny_checkpoint)
    rotary = RotaryEmbedding(checkpoint.model_config, 128)
    plain, stacked = (
        Block.from_tensors(checkpoint.model_config, checkpoint.read_block(0), rotary, FLOAT32) for _ in range(2)
    )
    if dequantize:
        stacked.dequantize()
    stacked.stack()
    (batch,) = pack_batches(random_rows(9), 10_000)
    hidden = torch.randn(batch.tokens, checkpoint.model_config.hidden_size)
    assert torch.allclose(stacked(hidden, batch), plain(hidden, batch), atol=1e-5, rtol=1e-5)


def test_streams_in_files_equal_streams_in_memory(tiny_checkpoint, tmp_path):
    batches = pack_batches(random_rows(5), 64)
    embedding = open_checkpoint(tiny_checkpoint).read("model.embed_tokens.weight")
    in_files = HiddenStates(batches, 64, directory=tmp_path, name="x")
    in_memory = HiddenStates(batches, 64)
    for stream in (in_files, in_memory):
        stream.embed(embedding)
        stream.write(0, stream.read(0) + 1)
        stream.sync()
    again = HiddenStates(batches, 64, directory=tmp_path, name="x", finished_blocks=1)
    assert torch.equal(in_files.current_buffer, in_memory.current_buffer)
    assert torch.equal(again.read(0), in_memory.read(0, next_buffer=True))


def test_a_non_finite_activation_names_block_and_row(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    _, tensors = next(read_blocks(checkpoint))
    tensors["mlp.down_proj.weight"][3, 5] = float("nan")
    stream = HiddenStates(pack_batches(random_rows(3), 1000), 64)
    stream.embed(checkpoint.read("model.embed_tokens.weight"))
    block = Block.from_tensors(checkpoint.model_config, tensors, RotaryEmbedding(checkpoint.model_config, 128), FLOAT32)
    with pytest.raises(NonFiniteError, match="block 7, stream: .* conversation 0"):
        stream.advance(block, 7)
