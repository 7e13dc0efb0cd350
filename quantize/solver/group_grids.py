"""The scales of a weight's groups, chosen for the solver: uniform grids and NF4."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.solver.factor import CholeskyFactor
from quantize.solver.nf4_grid import choose_absmax, nf4_levels
from quantize.solver.rounding import Grid
from quantize.solver.scale_search import group_scales
from quantize.solver.settings import GPTQSettings
from runtime.checkpoints.quantization_config import NF4_BLOCKSIZE


class UniformGrid:
    """Scales and zeros of all groups of a weight [N, K], chosen before the solve."""

    quant_state = None
    levels = None

    def __init__(self, weight: Tensor, factor: CholeskyFactor, settings: GPTQSettings) -> None:
        in_features = weight.shape[1]
        size = in_features if settings.group_size == -1 else settings.group_size
        self.max_code = (1 << settings.bits) - 1
        importance = factor.importance if settings.importance_scales else None
        grouping = torch.arange(in_features, device=weight.device)
        if settings.desc_act:
            grouping = factor.columns.flip(0)
        self.g_idx = torch.empty(in_features, dtype=torch.int32, device=weight.device)
        self.g_idx[grouping] = torch.arange(in_features, dtype=torch.int32, device=weight.device) // size
        self._group_index = self.g_idx[factor.columns].long()
        if settings.desc_act:
            weight, importance = weight[:, grouping], None if importance is None else importance[grouping]
        self.scales, self.zeros = group_scales(weight, importance, settings.bits, size, settings.sym)

    def whole(self) -> Grid:
        """The grid of the whole weight."""
        return Grid(self.scales.float(), self.zeros.float(), self._group_index, self.max_code)


class NF4Grid:
    """Absmax of all blocks of a weight [N, K], chosen before the solve; K is a multiple of 64."""

    def __init__(self, weight: Tensor, factor: CholeskyFactor, settings: GPTQSettings) -> None:
        importance = factor.importance if settings.importance_scales else None
        self.scales, self.quant_state = choose_absmax(weight, importance)
        self.zeros = torch.zeros_like(self.scales, dtype=torch.uint8)
        self.g_idx = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // NF4_BLOCKSIZE
        self.levels = nf4_levels(weight.device)
        self._group_index = self.g_idx[factor.columns].long()

    def whole(self) -> Grid:
        """The grid of the whole weight."""
        return Grid(self.scales, self.zeros.float(), self._group_index, len(self.levels) - 1, self.levels)
