"""Attention against torch's own, conversation by conversation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.conversations.rendering import RenderedConversation
from runtime.modeling import attention
from runtime.modeling.attention import causal_attention, scored_token_attention
from runtime.modeling.packed_batch import pack_batches


def rows_with_prefixes(seed: int, lengths: list[tuple[int, int]]) -> list[RenderedConversation]:
    """Return conversations of (shared, own) tokens; the shared ones come from one common prefix."""
    generator = torch.Generator().manual_seed(seed)
    stem = torch.randint(0, 50, (max(shared for shared, _ in lengths),), generator=generator).tolist()
    rows = [stem[:shared] + torch.randint(0, 50, (own,), generator=generator).tolist() for shared, own in lengths]
    return [RenderedConversation(row, len(row) - 1) for row in rows]


def by_torch(query, key, value, path) -> torch.Tensor:
    tokens = torch.tensor([token for start, end in path for token in range(start, end)])
    q, k, v = (x[tokens].transpose(0, 1)[None] for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)[0].transpose(0, 1).flatten(1)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 200)), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    seed=st.integers(0, 99),
)
def test_equals_torch_attention_per_conversation(lengths, heads, seed):
    (batch,) = pack_batches(rows_with_prefixes(seed, lengths), 10_000)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(batch.tokens, n, 16, generator=generator) for n in (heads[0], heads[1], heads[1]))
    ours = causal_attention(query, key, value, batch.segments)
    at_scored_tokens = scored_token_attention(batch, query[batch.scored], key, value)
    for number, path in enumerate(batch.token_ranges):
        expected = by_torch(query, key, value, path)
        tokens = torch.tensor([token for start, end in path for token in range(start, end)])
        assert (ours[tokens] - expected).abs().max() < 5e-6
        assert (at_scored_tokens[number] - expected[-1]).abs().max() < 5e-6


def test_many_keys_are_computed_some_heads_at_a_time(monkeypatch):
    (batch,) = pack_batches(rows_with_prefixes(0, [(100, 90), (100, 200)]), 10_000)
    query, key, value = (torch.randn(batch.tokens, n, 16) for n in (6, 3, 3))
    expected = causal_attention(query, key, value, batch.segments)
    monkeypatch.setattr(attention, "MAX_SCORES", 2 * 2 * attention.TILE * 128)  # two kv heads of three, later one
    assert torch.allclose(causal_attention(query, key, value, batch.segments), expected, atol=1e-6)


def test_bf16_error_is_close_to_torchs():
    (batch,) = pack_batches(rows_with_prefixes(0, [(100, 90), (100, 200)]), 10_000)
    exact = [torch.randn(batch.tokens, n, 64) for n in (6, 2, 2)]
    rounded = [x.bfloat16() for x in exact]
    ours = causal_attention(*rounded, batch.segments).float()
    path = batch.token_ranges[1]
    tokens = torch.tensor([token for start, end in path for token in range(start, end)])
    expected = by_torch(*(x.float() for x in rounded), path)
    theirs = by_torch(*rounded, path).float()
    assert (ours[tokens] - expected).abs().mean() < 1.2 * (theirs - expected).abs().mean()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_equals_tiled_attention():
    (batch,) = pack_batches(rows_with_prefixes(0, [(100, 90), (100, 200), (0, 33), (60, 10)]), 10_000)
    tensors = [torch.randn(batch.tokens, n, 128).bfloat16() for n in (8, 2, 2)]
    plain = causal_attention(*(x.float() for x in tensors), batch.segments)
    flash = causal_attention(*(x.cuda() for x in tensors), batch.segments).cpu().float()
    assert (flash - plain).abs().max() < 0.02
