"""GPTQ: round one column at a time, and let the columns still to come absorb its output error.

With H = U^T diag(pivots) U and the first column to be quantized placed last, GPTQ (Frantar et al. 2022,
arXiv 2210.17323) is Babai's nearest plane algorithm (Chen et al. 2025, arXiv 2507.18553). The output error

    tr(D H D^T) = sum_j pivots[j] |target[j] - q[j]|^2
    target[j] = w[j] + sum_{k > j} U[j, k] (w[k] - q[k])

separates, so going down from the last j each q[j] is simply the grid point nearest to its target. This takes
one Cholesky factorisation of H and no inverse; the usual formulation needs the Cholesky factor of H^-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.factor import Factor, factorise, weighted_square
from quantize.scales import dequantize, group_scales
from quantize.settings import GPTQSettings, usable_group_size
from runtime.errors import NonFiniteError

__all__ = ["Factor", "GPTQSettings", "SolvedLinear", "factorise", "solve", "usable_group_size"]

INNER_BLOCK = 16  # columns that correct one another by matrix-vector products


@dataclass(frozen=True)
class SolvedLinear:
    """One quantized linear; K = in_features, N = out_features, G = groups.

    Attributes:
        codes: uint8 [K, N].
        zeros: uint8 [G, N].
        scales: fp16 [G, N].
        g_idx: int32 [K].
        loss: mean squared output error over the calibration tokens, tr(D H D^T), without damping.
        energy: the mean squared output, tr(W H W^T).
        damp: what was added to the Hessian's diagonal.
        dead_columns: how many input features were 0 throughout calibration; their weights became 0.
        notes: fallbacks taken, for the report.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor
    loss: float
    energy: float
    damp: float
    dead_columns: int
    notes: tuple[str, ...]

    @property
    def weight(self) -> Tensor:
        """fp32 [N, K], exactly what a reader computes from codes, zeros, scales and g_idx."""
        return dequantize(self.codes, self.zeros, self.scales, self.g_idx)

    @property
    def relative_loss(self) -> float:
        """The loss over the mean squared output."""
        return self.loss / self.energy if self.energy > 0 else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise at the output, in decibels."""
        return -10 * math.log10(self.relative_loss) if self.relative_loss > 0 else math.inf


def solve(weight: Tensor, factor: Factor, settings: GPTQSettings, name: str = "a linear layer") -> SolvedLinear:
    """Quantize weight [N, K] under the Hessian that `factor` was made of, on the factor's device.

    Raises:
        NonFiniteError: the weight holds a NaN or an infinity; `name` names the linear.
    """
    columns = factor.columns
    weight = weight.to(columns.device)
    if len(factor.dead):
        weight = weight.index_fill(1, factor.dead, 0)
    work = weight.T[columns].float()  # [K, N]: w, and w - q in the rows that are solved
    energy = factor.energy(work)
    if not math.isfinite(energy):
        raise NonFiniteError(f"{name}: a weight is NaN or infinite; the checkpoint is damaged, fetch it again.")
    grid = _Grid(weight, factor, settings)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    loss = torch.zeros((), dtype=torch.float64, device=work.device)
    for stop in range(len(work), 0, -grid.block_size):
        start = max(stop - grid.block_size, 0)
        block, square = work[start:stop], factor.upper[start:stop, start:stop]
        target = torch.addmm(block, factor.upper[start:stop, stop:], work[stop:])
        if not grid.static:
            grid.enter(start, stop, _updated_weights(block, target, square))
        zero, scale = grid.rows(start, stop)
        solved = _solve_block(square, target, block, zero, scale, grid.top)
        codes[columns[start:stop]] = solved.to(torch.uint8)
        target.addcmul_(zero, scale).addcmul_(solved, scale, value=-1)  # target - q
        loss += weighted_square(target, factor.pivots[start:stop]) - factor.damp * weighted_square(block)
    undamped = max(loss.item(), 0.0)
    return SolvedLinear(
        codes=codes,
        zeros=grid.zeros,
        scales=grid.scales,
        g_idx=grid.g_idx,
        loss=undamped,
        energy=energy,
        damp=factor.damp,
        dead_columns=len(factor.dead),
        notes=factor.notes,
    )


class _Grid:
    """Scales and zeros, all chosen at once or (not `static`) group by group as the solver enters them.

    Groups that are chosen on entry are consecutive in the order of quantization, and so are the blocks then.
    """

    def __init__(self, weight: Tensor, factor: Factor, settings: GPTQSettings) -> None:
        out_features, in_features = weight.shape
        size = in_features if settings.group_size == -1 else settings.group_size
        self.top = (1 << settings.bits) - 1
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
        self._group_of = self.g_idx[factor.columns].long()
        if self.static:
            self.scales, self.zeros = self._choose(weight[:, grouping] if settings.desc_act else weight, grouping, size)
        else:
            groups = -(-in_features // size)
            self.scales = torch.empty(groups, out_features, dtype=torch.float16, device=weight.device)
            self.zeros = torch.empty(groups, out_features, dtype=torch.uint8, device=weight.device)

    def enter(self, start: int, stop: int, updated: Tensor) -> None:
        """Choose the grid of the group at positions start .. stop from their updated weights [., N]."""
        group = self._group_of[start]
        scales, zeros = self._choose(updated.T, self._columns[start:stop], -1)
        self.scales[group], self.zeros[group] = scales[0], zeros[0]

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Zero and scale fp32 [stop - start, N] of positions start .. stop."""
        groups = self._group_of[start:stop]
        return self.zeros[groups].float(), self.scales[groups].float()

    def _choose(self, weight: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
        importance = None if self._importance is None else self._importance[columns]
        return group_scales(weight, importance, self._settings.bits, size, self._settings.sym)


def _updated_weights(block: Tensor, target: Tensor, square: Tensor) -> Tensor:
    """The weights that OBS would hold for a block [B, N] before its first column is quantized.

    They minimise the output error given the columns already solved: w + U_bb^-1 U_b,solved (w - q)_solved.
    """
    shift = torch.linalg.solve_triangular(square, target - block, upper=True, unitriangular=True)
    return block + shift


def _solve_block(square: Tensor, target: Tensor, work: Tensor, zero: Tensor, scale: Tensor, top: int) -> Tensor:
    """Codes fp32 [B, N] of one block, last row first.

    Args:
        square: the block [B, B] of the factor's `upper`.
        target: [B, N], w corrected for everything solved before this block; completed in place.
        work: [B, N], w; becomes w - q in place.
        zero, scale: [B, N].
        top: the largest code.
    """
    codes = torch.empty_like(target)
    work.addcmul_(zero, scale)  # then w - q is work - code * scale
    tensors = (codes, target, work, zero, scale, square)
    rows = list(zip(*(tensor.unbind() for tensor in tensors), strict=True))
    for stop in range(len(target), 0, -INNER_BLOCK):
        start = max(stop - INNER_BLOCK, 0)
        target[start:stop].addmm_(square[start:stop, stop:], work[stop:])
        for row in range(stop - 1, start - 1, -1):
            code, wanted, error, zero_row, scale_row, factors = rows[row]
            if row + 1 < stop:
                wanted.addmv_(work[row + 1 : stop].T, factors[row + 1 : stop])
            torch.addcdiv(zero_row, wanted, scale_row, out=code).round_().clamp_(0, top)
            error.addcmul_(code, scale_row, value=-1)
    return codes
