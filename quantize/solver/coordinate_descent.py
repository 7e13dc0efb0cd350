"""Coordinate descent over the codes and scales of a solved linear.

GPTQ rounds each column once, before later columns are known. Given all other codes and scales, each code and each scale
has an optimal value. With q the quantized weight, E = target - q and R = H E:

    scale of group g:   increases by c . R_g / c . H_gg c, where c = code - zero
    weight j:           optimum q_j + R_j / H_jj, rounded to the nearest grid point

The method is that of QuantEase (Behdin et al. 2023, arXiv 2309.01885), but it starts at GPTQ's solution and also
updates scales. The damped error never increases, and the first few passes give most of the gain.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.solver.factor import CholeskyFactor
from quantize.solver.scale_search import TINY, to_storable_fp16
from quantize.solver.settings import INNER_BLOCK_SIZE, GPTQSettings
from quantize.solver.solved_linear import SolvedLinear

MAX_COLUMNS_AT_ONCE = 1024  # larger groups are split and keep their scale, which would hardly change


def coordinate_descent(
    target: Tensor, solved: SolvedLinear, hessian: Tensor, factor: CholeskyFactor, settings: GPTQSettings
) -> SolvedLinear:
    """Return `solved` after `settings.descent_passes` passes over all groups.

    Args:
        target: [N, K], the weight that `solved` approximates.
        hessian: fp32 [K, K], the result of `factor.into_hessian()`, shared by linears with the same input.
    """
    columns, group_index = factor.columns, solved.g_idx[factor.columns].long()
    size = len(columns) if settings.group_size == -1 else settings.group_size
    codes, scales, zeros = solved.codes[columns], solved.scales.float(), solved.zeros.float()
    error = solved.weight.neg_().add_(target).T[columns]
    error[torch.isin(columns, factor.dead)] = 0  # solve() set the weights of dead features to 0
    residual = hessian @ error
    groups = group_index.argsort(stable=True).split(size)
    for _ in range(settings.descent_passes):
        for members, scale, zero in zip(groups, scales, zeros, strict=True):
            for rows in members.split(MAX_COLUMNS_AT_ONCE):
                hessian_rows = hessian[rows]
                column_block = _ColumnBlock(hessian_rows[:, rows], residual[rows], codes[rows].float(), scale, zero)
                if len(rows) == len(members):
                    column_block.refit_scale()
                column_block.round_codes((1 << settings.bits) - 1)
                codes[rows] = column_block.codes.to(torch.uint8)
                error[rows] -= column_block.weight_change
                residual.addmm_(hessian_rows.T, column_block.weight_change, alpha=-1)
    by_weight = residual.addcmul_(error, factor.damp[:, None], value=-1).mul_(error)
    loss = max(float(by_weight.sum(dim=1).sum(dtype=torch.float64)), 0.0)
    return replace(
        solved,
        codes=torch.empty_like(codes).index_copy_(0, columns, codes),
        scales=scales.half(),
        loss=loss,
    )


class _ColumnBlock:
    """B columns of one group, updated in place.

    Attributes:
        codes: fp32 [B, N].
        weight_change: fp32 [B, N], change of the dequantized weights so far.
    """

    def __init__(self, square: Tensor, residual: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """
        Args:
            square: [B, B], the columns' part of H.
            residual: [B, N], the columns' rows of H E; overwritten.
            codes: fp32 [B, N].
            scale: [N], modified in place.
            zero: [N].
        """
        self.codes, self.weight_change = codes, torch.zeros_like(codes)
        self._square, self._residual, self._scale, self._zero = square, residual, scale, zero

    def refit_scale(self) -> None:
        """Set each scale to its optimum rounded to fp16, if that reduces the error."""
        steps = self.codes - self._zero
        hessian_times_steps = self._square @ steps
        numerator, denominator = (steps * self._residual).sum(dim=0), (steps * hessian_times_steps).sum(dim=0)
        scale = to_storable_fp16(self._scale + numerator / denominator.clamp(min=TINY))
        delta = scale - self._scale
        # Rounding to fp16 may have turned the improvement into a loss.
        better = (denominator > TINY) & (delta * (2 * numerator - delta * denominator) > 0)
        delta *= better
        self._scale.copy_(torch.where(better, scale, self._scale))
        self._residual.addcmul_(hessian_times_steps, delta, value=-1)
        self.weight_change.addcmul_(steps, delta)

    def round_codes(self, max_code: int) -> None:
        """Round each weight to the grid point nearest to q_j + R_j / H_jj, in units of the group's scale."""
        curvature = self._square.diagonal()[:, None]
        optimum = self._residual.div_(curvature).div_(self._scale).add_(self.codes)
        factors = self._square / curvature
        codes, delta = torch.empty_like(optimum), torch.empty_like(optimum)
        rows = list(zip(*(each.unbind() for each in (optimum, factors, self.codes, codes, delta)), strict=True))
        for start in range(0, len(rows), INNER_BLOCK_SIZE):
            stop = min(start + INNER_BLOCK_SIZE, len(rows))
            optimum[start:stop].addmm_(factors[start:stop, :start], delta[:start], alpha=-1)
            for row in range(start, stop):
                wanted, factor, before, code, change = rows[row]
                if row > start:
                    wanted.addmv_(delta[start:row].T, factor[start:row], alpha=-1)
                torch.round(wanted, out=code).clamp_(0, max_code)
                torch.sub(code, before, out=change)
        self.codes = codes
        self.weight_change.addcmul_(delta, self._scale)
