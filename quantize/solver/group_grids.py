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
    """Scales and zeros of all groups, chosen before the solve (`static`) or when the solver reaches a group.

    In the second case each group is contiguous in the order of quantization, and one block of the solve is one group.
    """

    quant_state = None
    levels = None

    def __init__(self, weight: Tensor, factor: CholeskyFactor, settings: GPTQSettings) -> None:
        out_features, in_features = weight.shape
        size = in_features if settings.group_size == -1 else settings.group_size
        self.max_code = (1 << settings.bits) - 1
        self.static = settings.static_groups or size == in_features
        self.block_size = settings.block_size if self.static else size
        self._settings = settings
        self._columns = factor.columns
        self._importance = factor.importance if settings.importance_scales else None

        grouping = torch.arange(in_features, device=weight.device)
        if settings.desc_act:
            grouping = factor.columns.flip(0)
        self.g_idx = torch.empty(in_features, dtype=torch.int32, device=weight.device)
        self.g_idx[grouping] = torch.arange(in_features, dtype=torch.int32, device=weight.device) // size
        self._group_index = self.g_idx[factor.columns].long()
        if self.static:
            self.scales, self.zeros = self._choose(weight[:, grouping] if settings.desc_act else weight, grouping, size)
        else:
            groups = -(-in_features // size)
            self.scales = torch.empty(groups, out_features, dtype=torch.float16, device=weight.device)
            self.zeros = torch.empty(groups, out_features, dtype=torch.uint8, device=weight.device)

    def choose_group_scales(self, start: int, stop: int, updated: Tensor) -> None:
        """Choose scale and zero of the group at positions start..stop from its updated weights [stop - start, N]."""
        group = self._group_index[start]
        scales, zeros = self._choose(updated.T, self._columns[start:stop], -1)
        self.scales[group], self.zeros[group] = scales[0], zeros[0]

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Zero and scale, both fp32 [stop - start, N], of positions start..stop."""
        groups = self._group_index[start:stop]
        return self.zeros[groups].float(), self.scales[groups].float()

    def whole(self) -> Grid:
        """The grid of the whole weight."""
        return Grid(self.scales.float(), self.zeros.float(), self._group_index, self.max_code)

    def _choose(self, weight: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
        importance = None if self._importance is None else self._importance[columns]
        return group_scales(weight, importance, self._settings.bits, size, self._settings.sym)


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
