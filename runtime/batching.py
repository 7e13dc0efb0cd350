"""Conversations into packed batches: a trie of tokens laid out end to end, without padding.

What several conversations of a batch begin with (the prompt of two responses, or of N) is there once, and each
continues it as a *segment* of its own. Nothing else is shared, and no token sees another conversation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from runtime.chat import Rendered

SHORTEST_SHARED = 16  # tokens in common; sharing fewer, as all renderings have, costs more than it saves

Path = tuple[tuple[int, int], ...]
"""Ranges of a batch's tokens that follow one another in a conversation, its first ones first."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` of a batch, which continue those in `context`."""

    start: int
    end: int
    context: Path = ()

    @property
    def prefix(self) -> int:
        """How many tokens come before the segment."""
        return sum(end - start for start, end in self.context)


@dataclass(frozen=True)
class PackedBatch:
    """Some conversations laid out as a trie.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], counted from 0 within each conversation.
        segments: cover the T tokens in order; a segment comes after its context.
        scored: int64 [S], the row of each conversation's scored token among the T.
        rows: the place of each conversation in the caller's order, length S.
        paths: what each conversation is made of, length S.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]
    scored: torch.Tensor
    rows: tuple[int, ...]
    paths: tuple[Path, ...]

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return len(self.token_ids)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            scored=self.scored.to(device),
        )

    def row_at(self, token: int) -> int:
        """The first of the caller's rows that holds token `token` of this batch."""
        return min(
            row
            for row, path in zip(self.rows, self.paths, strict=True)
            if any(start <= token < end for start, end in path)
        )


def pack(
    rendered: Sequence[Rendered], token_budget: int, first_row: int = 0, *, share: bool = True
) -> list[PackedBatch]:
    """Fill batches of up to `token_budget` tokens, in the order of the tokens, which brings prefixes together.

    A conversation longer than the budget gets a batch of its own; none is cut. Rows are numbered from
    `first_row`. Without `share` every conversation is laid out whole, in the given order.
    """
    sequences = [np.asarray(conversation.token_ids) for conversation in rendered]
    order = sorted(range(len(rendered)), key=lambda row: rendered[row].token_ids) if share else range(len(rendered))
    batches: list[PackedBatch] = []
    members: list[int] = []
    shared: list[int] = []  # tokens that a member has in common with the one before it
    filled = 0
    for row in order:
        common = _common(sequences[members[-1]], sequences[row]) if share and members else 0
        if members and filled + len(sequences[row]) - common > token_budget:
            batches.append(_lay_out(rendered, sequences, members, shared, first_row))
            members, shared, filled, common = [], [], 0, 0
        members.append(row)
        shared.append(common)
        filled += len(sequences[row]) - common
    if members:
        batches.append(_lay_out(rendered, sequences, members, shared, first_row))
    return batches


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the common prefix, 0 where it is not worth sharing."""
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    common = int(differs.argmax()) if differs.any() else length
    return common if common >= SHORTEST_SHARED else 0


def _lay_out(
    rendered: Sequence[Rendered], sequences: list[np.ndarray], members: list[int], shared: list[int], first_row: int
) -> PackedBatch:
    pieces: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    paths: dict[int, Path] = {}
    filled = 0
    # Members low .. high, which continue `context` after `depth` tokens.
    pending: list[tuple[int, int, int, Path]] = [(0, len(members), 0, ())]
    while pending:
        low, high, depth, context = pending.pop()
        tokens = sequences[members[low]]
        end = min(shared[low + 1 : high], default=len(tokens))
        if end > depth:
            pieces.append(tokens[depth:end])
            positions.append(np.arange(depth, end))
            segments.append(Segment(filled, filled + end - depth, context))
            context = (*context, (filled, filled + end - depth))
            filled += end - depth
        if high - low == 1:
            paths[low] = context
            continue
        starts = [low, *(member for member in range(low + 1, high) if shared[member] == end)]
        pending += [(a, b, end, context) for a, b in zip(starts, [*starts[1:], high], strict=True)][::-1]
    return PackedBatch(
        torch.from_numpy(np.concatenate(pieces).astype(np.int64)),
        torch.from_numpy(np.concatenate(positions)),
        tuple(segments),
        torch.tensor([_place(paths[i], rendered[row].scored_index) for i, row in enumerate(members)]),
        tuple(first_row + row for row in members),
        tuple(paths[i] for i in range(len(members))),
    )


def _place(path: Path, index: int) -> int:
    """Where in the batch token `index` of the conversation on `path` lies."""
    for start, end in path:
        if index < end - start:
            return start + index
        index -= end - start
    raise IndexError(index)
