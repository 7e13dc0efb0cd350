"""How much the scores would move if single groups of linears were rounded, measured in the backward sweep.

To first order a weight change D of one linear moves a score by e = sum_t g_t . D x_t, where g_t is the gradient of the
score by the linear's output at token t. D is here the error of a variant that exists, or that of rounding to nearest.
The solver leaves about a seventh of the latter, and not equally much everywhere, so a variant shows better which groups
need more bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.solver.data_free import round_to_nearest
from quantize.solver.settings import GPTQSettings
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, QuantizationConfig
from runtime.modeling.packed_batch import PackedBatch
from runtime.modeling.qwen2 import Block


class BlockSensitivity:
    """Accumulates e^2 of each group of linears of one block over the calibration conversations.

    Attributes:
        squares: fp64 [4], sum of e^2 by group; conversations that share tokens count as one, with random signs.
        shares: fp64 [4, options], squared rounding error with each option relative to the first one.
    """

    def __init__(
        self, block: Block, options: Sequence[QuantizationConfig], dtype: torch.dtype, variant: Block | None = None
    ) -> None:
        """
        Args:
            options: ways to store a linear; e is measured for the first.
            dtype: of the products.
            variant: the block stored with the first option; None measures rounding to nearest.
        """
        self._errors: dict[str, Tensor] = {}
        self._sums: list[Tensor | None] = [None] * len(BLOCK_LINEAR_GROUPS)
        self.squares = torch.zeros(len(BLOCK_LINEAR_GROUPS), dtype=torch.float64)
        power = torch.zeros(len(BLOCK_LINEAR_GROUPS), len(options), dtype=torch.float64)
        for group, names in enumerate(BLOCK_LINEAR_GROUPS):
            for name in names:
                weight = block.linears[name].weight(torch.float32)
                for number, option in reversed([*enumerate(options)]):
                    error = rounding_error(weight, option)
                    power[group, number] += float(torch.linalg.vector_norm(error)) ** 2
                if variant:
                    error = variant.linears[name].weight(torch.float32) - weight
                self._errors[name] = error.to(dtype)  # of the first option
        self.shares = power / power[:, :1].clamp_min(torch.finfo(torch.float64).tiny)

    def add(self, group: int, linear: str, gradients: Tensor, x: Tensor, tries: Tensor) -> None:
        """Add a batch's gradients [T, N] of the output of a linear of `group` at inputs x [T, K].

        Args:
            tries: as `tries_of_tokens`.
        """
        moved = torch.nn.functional.linear(x, self._errors[linear]).float().mul_(gradients.float()).sum(dim=1)
        sums = torch.zeros(int(tries.max()) + 1, device=moved.device).index_add_(0, tries, moved)
        previous = self._sums[group]
        self._sums[group] = sums if previous is None else previous + sums

    def finish_batch(self) -> None:
        """Square the sums of the batch's conversations, once all linears were added."""
        for group, sums in enumerate(self._sums):
            assert sums is not None
            self.squares[group] += float(sums.double().square().sum())
            self._sums[group] = None

    def errors(self) -> Tensor:
        """Estimated sum of e^2 by group and option, fp64 [4, options]."""
        return self.squares[:, None] * self.shares


def rounding_error(weight: Tensor, option: QuantizationConfig) -> Tensor:
    """Error of rounding weight fp32 [N, K] to nearest on a min-max grid, fp32 [N, K]."""
    settings = GPTQSettings(bits=option.bits, group_size=option.group_size, sym=option.sym, importance_scales=False)
    return round_to_nearest(weight, settings).weight - weight


def tries_of_tokens(batch: PackedBatch) -> Tensor:
    """Number of the trie of each token, int64 [T]: one per conversation, or per set of them that shares a prefix."""
    numbers: dict[int, int] = {}
    tries = torch.empty(batch.tokens, dtype=torch.int64)
    for segment in batch.segments:
        first = segment.prefix_ranges[0][0] if segment.prefix_ranges else segment.start
        tries[segment.start : segment.end] = numbers.setdefault(first, len(numbers))
    return tries.to(batch.token_ids.device)
