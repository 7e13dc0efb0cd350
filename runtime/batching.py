"""Conversations into packed batches: sequences end to end, no padding, one causal island each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from runtime.chat import Rendered


@dataclass(frozen=True)
class PackedBatch:
    """Some conversations laid end to end.

    Attributes:
        token_ids: int64 [T].
        positions: int64 [T], counted from 0 within each sequence.
        cu_seqlens: boundaries of the S sequences in the T tokens, length S + 1.
        scored: int64 [S], the row of each sequence's scored token among the T.
        rows: the place of each sequence in the caller's order, length S.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: tuple[int, ...]
    scored: torch.Tensor
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return self.cu_seqlens[-1]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            scored=self.scored.to(device),
        )

    def row_at(self, token: int) -> int:
        """The caller's row that holds token `token` of this batch."""
        sequence = next(i for i, end in enumerate(self.cu_seqlens[1:]) if token < end)
        return self.rows[sequence]


def pack(rendered: Sequence[Rendered], token_budget: int, first_row: int = 0) -> list[PackedBatch]:
    """Fill batches in the given order, each up to `token_budget` tokens.

    A conversation longer than the budget gets a batch of its own; none is cut. Rows are numbered from
    `first_row`.
    """
    batches: list[PackedBatch] = []
    members: list[int] = []
    filled = 0
    for row, conversation in enumerate(rendered):
        length = len(conversation.token_ids)
        if members and filled + length > token_budget:
            batches.append(_lay_out(rendered, members, first_row))
            members, filled = [], 0
        members.append(row)
        filled += length
    if members:
        batches.append(_lay_out(rendered, members, first_row))
    return batches


def _lay_out(rendered: Sequence[Rendered], members: list[int], first_row: int) -> PackedBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    boundaries, scored = [0], []
    for row in members:
        conversation = rendered[row]
        scored.append(len(token_ids) + conversation.scored_index)
        token_ids.extend(conversation.token_ids)
        positions.extend(range(len(conversation.token_ids)))
        boundaries.append(len(token_ids))
    return PackedBatch(
        torch.tensor(token_ids),
        torch.tensor(positions),
        tuple(boundaries),
        torch.tensor(scored),
        tuple(first_row + row for row in members),
    )
