"""Exact causal attention over packed batches with shared prefixes: a segment attends to itself and its own prefix.

On CUDA this is torch's variable-length flash attention (Dao 2023, arXiv 2307.08691). On CPUs, and in fp32, each tile of
queries is multiplied with all keys up to it: two matrix products and a softmax. On CPUs this was faster than torch's
fused attention at all measured lengths (256 to 2,048 tokens). Tiles are aligned to the start of the conversation, not
of the segment, so on CPUs prefix sharing is bitwise neutral.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.modeling.linear import MIN_ROWS
from runtime.modeling.packed_batch import PackedBatch, Segment

TILE = 64  # queries per tile; bounds the attention scores to heads x 64 x keys, and the work above the diagonal
MAX_SCORES = 1 << 24  # of a tile at once, 64 MiB; with more keys, some of the heads are computed at a time


def causal_attention(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Compute attention of every token to its segment up to itself, and to the segment's whole prefix.

    Args:
        query: [Q, heads, head_dim], of all T tokens or of some of them.
        key, value: [T, kv_heads, head_dim]; each kv head serves heads / kv_heads consecutive query heads.
        segments: cover the Q tokens in order.

    Returns:
        [Q, heads * head_dim] in the dtype of `value`. Attention scores and softmax are fp32.
    """
    if query.is_cuda and query.dtype != torch.float32:
        return _flash_attention(query, key, value, segments)
    return tiled_attention(query, key, value, segments)


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Compute the same as `causal_attention` in plain torch, tile by tile; autograd can differentiate it."""
    outputs, stop = query.new_empty(query.shape, dtype=value.dtype), len(query)
    for segment in reversed(segments):
        keys, values = _copy_to_tiles(key, segment, torch.float32), _copy_to_tiles(value, segment, value.dtype)
        first, end = segment.prefix_length, segment.prefix_length + segment.end - segment.start
        # The last tile has the most keys. Each of the others then fits into the memory that the one before it freed.
        for tile in reversed(range(first // TILE * TILE, end, TILE)):
            start = stop - (min(tile + TILE, end) - max(tile, first))
            outputs[start:stop] = _attend_tile(query[start:stop], keys, values, max(tile, first))
            stop = start
    return outputs.flatten(1)


def _copy_to_tiles(x: Tensor, segment: Segment, dtype: torch.dtype) -> Tensor:
    """Copy the segment and its prefix from x [T, kv_heads, head_dim] to [kv_heads, K, head_dim], K in whole tiles."""
    ranges = (*segment.prefix_ranges, (segment.start, segment.end))
    length = sum(end - start for start, end in ranges)
    tiled = x.new_zeros(x.shape[1], -(-length // TILE) * TILE, x.shape[2], dtype=dtype)
    filled = 0
    for start, end in ranges:
        tiled[:, filled : filled + end - start] = x[start:end].transpose(0, 1)
        filled += end - start
    return tiled


def _attend_tile(query: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """Compute attention of query [Q, heads, head_dim], at most one tile whose first token is at `position`.

    Products always run over whole tiles of keys, so a token's result has the same bits wherever its segment begins.

    Args:
        keys, values: [kv_heads, K, head_dim], K in whole tiles.
    """
    queries, kv_heads, seen = len(query), len(keys), (position // TILE + 1) * TILE
    shared = query.shape[1] // kv_heads  # query heads of a kv head
    at_once = max(1, MAX_SCORES // (shared * TILE * seen))
    if at_once < kv_heads:
        parts = zip(query.split(at_once * shared, 1), keys.split(at_once), values.split(at_once), strict=True)
        return torch.cat([_attend_tile(*part, position) for part in parts], 1)
    if queries < MIN_ROWS:
        query = F.pad(query, (0, 0, 0, 0, 0, MIN_ROWS - queries))
    rows = (query.float() * query.shape[2] ** -0.5).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    scores = torch.bmm(rows.flatten(1, 2), keys[:, :seen].transpose(1, 2)).unflatten(1, (-1, len(query)))
    future = torch.ones(len(query), TILE, dtype=torch.bool, device=keys.device).triu_(position % TILE + 1)
    scores[..., seen - TILE :].masked_fill_(future, -torch.inf)
    probabilities = scores.softmax(-1).to(values.dtype).flatten(1, 2)
    mixed = torch.bmm(probabilities, values[:, :seen]).unflatten(1, (-1, len(query)))
    return mixed[:, :, :queries].permute(2, 0, 1, 3).flatten(1, 2)


def scored_token_attention(batch: PackedBatch, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention of the scored token of each conversation.

    Args:
        query: [S, heads, head_dim], at the scored tokens.
        key, value: [T, kv_heads, head_dim].

    Returns:
        [S, heads * head_dim].
    """
    outputs = torch.empty(len(query), query[0].numel(), dtype=value.dtype, device=query.device)
    for sequence, (ranges, scored) in enumerate(zip(batch.token_ranges, batch.scored.tolist(), strict=True)):
        prefix_ranges = [(start, end) for start, end in ranges if start <= scored]
        segment = Segment(prefix_ranges[-1][0], scored + 1, tuple(prefix_ranges[:-1]))
        keys, values = _copy_to_tiles(key, segment, torch.float32), _copy_to_tiles(value, segment, value.dtype)
        position = segment.prefix_length + segment.end - segment.start - 1
        outputs[sequence] = _attend_tile(query[sequence : sequence + 1], keys, values, position).flatten()
    return outputs


def gather_rows(x: Tensor, segment: Segment) -> Tensor:
    """Return the rows of x in the segment's prefix and the segment, in order; a view if they are adjacent in x."""
    ranges = [*segment.prefix_ranges, (segment.start, segment.end)]
    merged = ranges[:1]
    for start, end in ranges[1:]:
        if merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    parts = [x[start:end] for start, end in merged]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Run one kernel for all segments; keys and values of a shared prefix are copied for each segment that uses it."""
    from torch.nn.attention.varlen import varlen_attn

    query_lengths = [segment.end - segment.start for segment in segments]
    seen = [segment.prefix_length + length for segment, length in zip(segments, query_lengths, strict=True)]
    if any(segment.prefix_ranges for segment in segments):
        key, value = (torch.cat([gather_rows(x, segment) for segment in segments]) for x in (key, value))
    cu_q, cu_k = (
        torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32)
        for lengths in (query_lengths, seen)
    )
    # (-1, 0): unlimited to the left, nothing to the right, aligned to the last key; causal also behind a prefix.
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # required since torch 2.12, implied before
        options["enable_gqa"] = True
    outputs = varlen_attn(query, key, value, cu_q, cu_k, max(query_lengths), max(seen), **options)
    assert isinstance(outputs, Tensor)
    return outputs.flatten(1)
