"""Pack conversations into batches without padding; shared prefixes are stored and computed once.

A batch is a trie of token sequences laid out end to end. A prefix that several conversations share (such as the prompt
of N responses) is one segment, and each continuation is another. Attention never crosses conversations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from runtime.conversations.rendering import RenderedConversation

MIN_SHARED_PREFIX = 16  # tokens; a shorter one, such as the chat template's opening, costs more than it saves

TokenRanges = tuple[tuple[int, int], ...]
"""(start, end) ranges of tokens in a batch that form a conversation or a prefix, in order."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` of a batch; they continue the tokens in `prefix_ranges`."""

    start: int
    end: int
    prefix_ranges: TokenRanges = ()

    @property
    def prefix_length(self) -> int:
        """Number of tokens in the prefix."""
        return sum(end - start for start, end in self.prefix_ranges)

    def part(self, start: int, end: int) -> Segment:
        """Return the tokens `start` to `end` of the segment, which continue those before them."""
        before = ((self.start, start),) if start > self.start else ()
        return Segment(start, end, self.prefix_ranges + before)


@dataclass(frozen=True)
class PackedBatch:
    """Conversations laid out as a trie: T tokens, S conversations.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], position of each token in its conversation, from 0.
        segments: cover the T tokens in order; a segment comes after its prefix.
        scored: int64 [S], index among the T tokens of each conversation's scored token.
        rows: length S, index of each conversation in the caller's order.
        token_ranges: length S, the tokens of each conversation.
        chunk_tokens: tokens that a block computes at once; only a batch of one long conversation has more.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    scored: torch.Tensor
    rows: tuple[int, ...]
    token_ranges: tuple[TokenRanges, ...]
    chunk_tokens: int

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.token_ids)

    def chunks(self) -> Iterator[tuple[slice, tuple[Segment, ...]]]:
        """Yield the tokens of each chunk of at most `chunk_tokens`, and the segments that cover them."""
        for first in range(0, self.tokens, self.chunk_tokens):
            stop = min(first + self.chunk_tokens, self.tokens)
            inside = (each for each in self.segments if each.start < stop and each.end > first)
            yield slice(first, stop), tuple(each.part(max(each.start, first), min(each.end, stop)) for each in inside)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the batch with its tensors on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            scored=self.scored.to(device),
        )

    def row_of_token(self, token: int) -> int:
        """Return the caller's lowest row that contains token `token` of this batch."""
        return min(
            row
            for row, ranges in zip(self.rows, self.token_ranges, strict=True)
            if any(start <= token < end for start, end in ranges)
        )


def pack_batches(
    rendered: Sequence[RenderedConversation], token_budget: int, first_row: int = 0, *, share_prefixes: bool = True
) -> list[PackedBatch]:
    """Pack conversations into batches of up to `token_budget` tokens.

    Conversations are sorted by token ids, which puts shared prefixes next to each other. A conversation longer than the
    budget gets a batch of its own, which blocks compute in chunks; none is truncated.

    Args:
        first_row: number of the first conversation in `PackedBatch.rows`.
        share_prefixes: if False, keep the given order and share no prefixes.
    """
    sequences = [np.asarray(conversation.token_ids) for conversation in rendered]
    order = list(range(len(rendered)))
    if share_prefixes:
        order.sort(key=lambda row: rendered[row].token_ids)
    batches: list[PackedBatch] = []
    members: list[int] = []
    shared: list[int] = []  # length of the prefix that each member shares with the previous one
    filled = 0
    for row in order:
        common = _common_prefix_length(sequences[members[-1]], sequences[row]) if share_prefixes and members else 0
        if members and filled + len(sequences[row]) - common > token_budget:
            batches.append(_build_batch(rendered, sequences, members, shared, first_row, token_budget))
            members, shared, filled, common = [], [], 0, 0
        members.append(row)
        shared.append(common)
        filled += len(sequences[row]) - common
    if members:
        batches.append(_build_batch(rendered, sequences, members, shared, first_row, token_budget))
    return batches


def _common_prefix_length(left: np.ndarray, right: np.ndarray) -> int:
    """Return the length of the common prefix, or 0 if it is below `MIN_SHARED_PREFIX`."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    common = int(differs.argmax()) if differs.any() else length
    return common if common >= MIN_SHARED_PREFIX else 0


def _build_batch(
    rendered: Sequence[RenderedConversation],
    sequences: list[np.ndarray],
    members: list[int],
    shared: list[int],
    first_row: int,
    chunk_tokens: int,
) -> PackedBatch:
    """Lay out `members` as a trie; `shared[i]` tokens of member i are a prefix of member i - 1."""
    pieces: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    token_ranges: dict[int, TokenRanges] = {}
    filled = 0
    # Depth-first over the trie: members low to high - 1 share `prefix_ranges`, `depth` tokens in total.
    pending: list[tuple[int, int, int, TokenRanges]] = [(0, len(members), 0, ())]
    while pending:
        low, high, depth, prefix_ranges = pending.pop()
        tokens = sequences[members[low]]
        end = min(shared[low + 1 : high], default=len(tokens))
        if end > depth:
            pieces.append(tokens[depth:end])
            positions.append(np.arange(depth, end))
            segments.append(Segment(filled, filled + end - depth, prefix_ranges))
            prefix_ranges = (*prefix_ranges, (filled, filled + end - depth))
            filled += end - depth
        if high - low == 1:
            token_ranges[low] = prefix_ranges
            continue
        starts = [low, *(member for member in range(low + 1, high) if shared[member] == end)]
        pending += [(a, b, end, prefix_ranges) for a, b in zip(starts, [*starts[1:], high], strict=True)][::-1]
    return PackedBatch(
        torch.from_numpy(np.concatenate(pieces).astype(np.int64)),
        torch.from_numpy(np.concatenate(positions)),
        tuple(segments),
        torch.tensor([_token_index(token_ranges[i], rendered[row].scored_index) for i, row in enumerate(members)]),
        tuple(first_row + row for row in members),
        tuple(token_ranges[i] for i in range(len(members))),
        chunk_tokens,
    )


def _token_index(ranges: TokenRanges, index: int) -> int:
    """Return the batch index of token `index` of the conversation that consists of `ranges`."""
    for start, end in ranges:
        if index < end - start:
            return start + index
        index -= end - start
    raise IndexError(index)
