"""Find NaNs and infinities in hidden states: the first one as an error, or a record for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.common.errors import NonFiniteError
from runtime.modeling.packed_batch import PackedBatch

REMEDY = "check the weights of this block for damage, or compute in float32 if the checkpoint is float16."


class FiniteRecord:
    """The first block after which each token of a batch was not finite, kept on the device without waiting for it.

    Attributes:
        blocks: int16 [T], or -1 where all hidden states were finite.
    """

    def __init__(self, tokens: int, device: torch.device | str) -> None:
        self.blocks = torch.full((tokens,), -1, dtype=torch.int16, device=device)

    def add(self, hidden: Tensor, block: int) -> None:
        """Check the hidden states [T, H] after `block`."""
        finite = torch.isfinite(hidden.sum(dim=1, dtype=torch.float64))  # a sum is finite only if every term is
        self.blocks = torch.where((self.blocks < 0) & ~finite, block, self.blocks)

    def to(self, device: torch.device) -> FiniteRecord:
        """Return the record, for further blocks on `device`."""
        self.blocks = self.blocks.to(device)
        return self

    def first_block(self, batch: PackedBatch, row: int) -> int | None:
        """The first block that shows it in a conversation, by the caller's number of it; None if none does."""
        ranges = batch.token_ranges[batch.rows.index(row)]
        found = torch.cat([self.blocks[start:end] for start, end in ranges])
        found = found[found >= 0]
        return int(found.min()) if len(found) else None


def nonfinite_error(block: int | None) -> NonFiniteError:
    """Why a conversation has no score; `block` is None if the hidden states were finite."""
    error = NonFiniteError(
        "a non-finite score: the score head overflowed."
        if block is None
        else f"block {block}: a non-finite activation; {REMEDY}"
    )
    error.block = block
    return error


def check_finite_hidden_states(hidden: Tensor, batch: PackedBatch, block: int, states_name: str) -> None:
    """Check that the hidden states [T, H] of `batch` after `block` are finite.

    Args:
        states_name: named in the error; several sets of hidden states may be computed.

    Raises:
        NonFiniteError: naming the block and the first row with a NaN or infinity.
    """
    if torch.isfinite(hidden.sum(dtype=torch.float64)):  # finite only if every term is
        return
    row = batch.row_of_token(int((~torch.isfinite(hidden)).any(-1).nonzero()[0]))
    error = NonFiniteError(f"block {block}, {states_name}: a non-finite activation in conversation {row}; {REMEDY}")
    error.block = block
    raise error
