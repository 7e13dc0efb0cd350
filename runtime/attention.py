"""Exact causal attention over packed, prefix-shared tokens: each segment sees itself and its own prefix.

On CUDA this is flash attention (Dao 2023, arXiv 2307.08691) over variable lengths, as torch ships it. Elsewhere
a tile of queries at a time is multiplied with all the keys before them: two plain matrix products and a softmax,
which on CPUs is faster than torch's fused attention at every length that was measured (256 to 2,048 tokens).
Tiles begin where a conversation does, and not where a segment does: what is shared leaves no trace in the bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.batching import PackedBatch, Segment
from runtime.linear import FEWEST_ROWS

TILE = 64  # queries at once: bounds the scores in memory to 64 x heads x keys, and what is computed above the diagonal


def causal_attention(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Attention of every token to those of its segment up to itself, and to all of the segment's context.

    Args:
        query: [T, heads, head_dim].
        key, value: [T, kv_heads, head_dim]; a kv head serves heads / kv_heads consecutive heads.
        segments: cover the T tokens in order.

    Returns:
        [T, heads * head_dim] in the dtype of `value`. Scores and softmax are fp32.
    """
    if query.is_cuda and query.dtype != torch.float32:
        return _flash_attention(query, key, value, segments)
    outputs = query.new_empty(query.shape, dtype=value.dtype)
    for segment in segments:
        keys, values = _tiled(key, segment, torch.float32), _tiled(value, segment, value.dtype)
        first, end = segment.prefix, segment.prefix + segment.end - segment.start
        row = segment.start
        for tile in range(first // TILE * TILE, end, TILE):
            rows = min(tile + TILE, end) - max(tile, first)
            outputs[row : row + rows] = _attend(query[row : row + rows], keys, values, max(tile, first))
            row += rows
    return outputs.flatten(1)


def _tiled(x: Tensor, segment: Segment, dtype: torch.dtype) -> Tensor:
    """What a segment sees of x [T, kv_heads, head_dim], as [kv_heads, K, head_dim] with K in whole tiles."""
    ranges = (*segment.context, (segment.start, segment.end))
    length = sum(end - start for start, end in ranges)
    tiled = x.new_zeros(x.shape[1], -(-length // TILE) * TILE, x.shape[2], dtype=dtype)
    filled = 0
    for start, end in ranges:
        tiled[:, filled : filled + end - start] = x[start:end].transpose(0, 1)
        filled += end - start
    return tiled


def _attend(query: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """Of query [Q, heads, head_dim], whose tokens begin at `position` and lie in one tile.

    Wherever a segment begins and ends, the products are over whole tiles. So a token's attention has the same bits
    whether or not its prefix is shared.
    """
    queries, kv_heads, seen = len(query), len(keys), (position // TILE + 1) * TILE
    if queries < FEWEST_ROWS:
        query = F.pad(query, (0, 0, 0, 0, 0, FEWEST_ROWS - queries))
    rows = (query.float() * query.shape[2] ** -0.5).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    scores = torch.bmm(rows.flatten(1, 2), keys[:, :seen].transpose(1, 2)).unflatten(1, (-1, len(query)))
    future = torch.ones(len(query), TILE, dtype=torch.bool, device=keys.device).triu_(position % TILE + 1)
    scores[..., seen - TILE :].masked_fill_(future, -torch.inf)
    shares = scores.softmax(-1).to(values.dtype).flatten(1, 2)
    mixed = torch.bmm(shares, values[:, :seen]).unflatten(1, (-1, len(query)))
    return mixed[:, :, :queries].permute(2, 0, 1, 3).flatten(1, 2)


def attention_at(batch: PackedBatch, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of each conversation's scored token alone.

    Args:
        query: [S, heads, head_dim], of the scored tokens.
        key, value: [T, kv_heads, head_dim].

    Returns:
        [S, heads * head_dim].
    """
    outputs = torch.empty(len(query), query[0].numel(), dtype=value.dtype, device=query.device)
    for sequence, (path, scored) in enumerate(zip(batch.paths, batch.scored.tolist(), strict=True)):
        context = [each for each in path if each[0] <= scored]
        segment = Segment(context[-1][0], scored + 1, tuple(context[:-1]))
        keys, values = _tiled(key, segment, torch.float32), _tiled(value, segment, value.dtype)
        position = segment.prefix + segment.end - segment.start - 1
        outputs[sequence] = _attend(query[sequence : sequence + 1], keys, values, position).flatten()
    return outputs


def gather(x: Tensor, segment: Segment) -> Tensor:
    """The rows of x that a segment sees, root first; a view where they lie side by side."""
    ranges = [*segment.context, (segment.start, segment.end)]
    merged = ranges[:1]
    for start, end in ranges[1:]:
        if merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    parts = [x[start:end] for start, end in merged]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment]) -> Tensor:
    """One call for all segments; a shared prefix's keys and values are copied once for each that sees it."""
    from torch.nn.attention.varlen import varlen_attn

    own = [segment.end - segment.start for segment in segments]
    seen = [segment.prefix + length for segment, length in zip(segments, own, strict=True)]
    if any(segment.context for segment in segments):
        key, value = (torch.cat([gather(x, segment) for segment in segments]) for x in (key, value))
    cu_q, cu_k = (
        torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32) for lengths in (own, seen)
    )
    # (-1, 0) sees all before and nothing after, counted from the last key: causal behind a prefix.
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.12 asks for it, 2.11 takes it as given
        options["enable_gqa"] = True
    outputs = varlen_attn(query, key, value, cu_q, cu_k, max(own), max(seen), **options)
    assert isinstance(outputs, Tensor)
    return outputs.flatten(1)
