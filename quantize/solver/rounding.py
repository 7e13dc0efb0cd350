"""Grids that weights are rounded to: scale * (code - zero), or scale * level[code]."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The grid of a weight [K, N] whose columns are in the order of the solve.

    Attributes:
        scales, zeros: fp32 [G, N].
        group_index: int64 [K], the row of `scales` for each column.
        max_code: the largest code of a uniform grid.
        levels: fp32, ascending, for a grid that is not uniform; `zeros` is then 0.
    """

    scales: Tensor
    zeros: Tensor
    group_index: Tensor
    max_code: int
    levels: Tensor | None = None

    @cached_property
    def _middles(self) -> Tensor:
        assert self.levels is not None
        return (self.levels[1:] + self.levels[:-1]) / 2

    def round(self, target: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> Tensor:
        """Write the code of the grid point nearest to each target to `out`, all fp32 of one shape; return its value."""
        if self.levels is None:
            torch.addcdiv(zero, target, scale, out=out).round_().clamp_(0, self.max_code)
        else:
            out.copy_(torch.bucketize(target / scale, self._middles))
        return self.value(out, scale, zero)

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The values of fp32 codes."""
        return (codes - zero).mul_(scale) if self.levels is None else self.levels[codes.long()].mul_(scale)

    def tiles(self, first: int, stop: int, offset: int, size: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of the tiles (i + offset, i) for first <= i < stop: fp32 [stop - first, size, size]."""
        groups = self.group_index[(first + offset) * size : (stop + offset) * size].view(-1, size)
        rows = torch.arange(first, stop, device=groups.device)[:, None]
        return tuple(each.unflatten(1, (-1, size))[groups, rows] for each in (self.scales, self.zeros))

    def padded(self, columns: int, rows: int) -> Grid:
        """The grid of a weight with further columns and rows of zeros."""
        return replace(
            self,
            scales=F.pad(self.scales, (0, rows), value=1.0),
            zeros=F.pad(self.zeros, (0, rows)),
            group_index=F.pad(self.group_index, (0, columns)),
        )
