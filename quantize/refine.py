"""Change a solved linear's scales and codes one at a time as long as its output error falls.

GPTQ visits each column once and knows nothing yet of those still to come. With all of them there, each code and each
scale has a best value given the others. With E what was asked for less the quantized weight q, and R = H E:

    a group's scale gains    c . R_g / c . H_gg c,    c being the group's steps from zero, code - zero
    a weight is wanted at    q_j + R_j / H_jj,        and takes the grid point nearest to that

This is coordinate descent (as QuantEase, Behdin et al. 2023, arXiv 2309.01885, but begun where GPTQ ended, and over the
scales too). The damped error cannot rise, and the first few passes take most of what there is to gain.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.factor import Factor
from quantize.gptq import INNER_BLOCK, SolvedLinear
from quantize.scales import TINY, storable
from quantize.settings import GPTQSettings

WIDEST = 1024  # columns visited at once; a group of more keeps its scale, which so many codes hardly ask to move


def refine(
    target: Tensor, solved: SolvedLinear, hessian: Tensor, factor: Factor, settings: GPTQSettings
) -> SolvedLinear:
    """`solved` after `refine_passes` passes over all its groups.

    Args:
        target: [N, K], the weight that was solved for.
        hessian: fp32 [K, K] of `factor.into_hessian()`, which the linears of one input share.
    """
    columns, group_of = factor.columns, solved.g_idx[factor.columns].long()
    size = len(columns) if settings.group_size == -1 else settings.group_size
    codes, scales, zeros = solved.codes[columns], solved.scales.float(), solved.zeros.float()
    error = solved.weight.neg_().add_(target).T[columns]
    error[torch.isin(columns, factor.dead)] = 0  # their weights became 0, whatever they were
    residual = hessian @ error
    groups = group_of.argsort(stable=True).split(size)
    for _ in range(settings.refine_passes):
        for members, scale, zero in zip(groups, scales, zeros, strict=True):
            for rows in members.split(WIDEST):
                across = hessian[rows]
                visit = _Visit(across[:, rows], residual[rows], codes[rows].float(), scale, zero)
                if len(rows) == len(members):
                    visit.refit_scale()
                visit.round_codes((1 << settings.bits) - 1)
                codes[rows] = visit.codes.to(torch.uint8)
                error[rows] -= visit.gained
                residual.addmm_(across.T, visit.gained, alpha=-1)
    by_weight = residual.sub_(error, alpha=factor.damp).mul_(error)
    loss = max(float(by_weight.sum(dim=1).sum(dtype=torch.float64)), 0.0)
    return replace(
        solved,
        codes=torch.empty_like(codes).index_copy_(0, columns, codes),
        scales=scales.half(),
        loss=loss,
    )


class _Visit:
    """Columns of one group, one after another.

    Attributes:
        codes: fp32 [B, N].
        gained: fp32 [B, N], what the weights have gained.
    """

    def __init__(self, square: Tensor, residual: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """
        Args:
            square: their part [B, B] of H.
            residual: their rows [B, N] of H E; overwritten.
            scale: [N], changed in place.
            zero: [N].
        """
        self.codes, self.gained = codes, torch.zeros_like(codes)
        self._square, self._residual, self._scale, self._zero = square, residual, scale, zero

    def refit_scale(self) -> None:
        """Move the scale to its best value, as fp16 stores it."""
        steps = self.codes - self._zero
        curved = self._square @ steps
        along, power = (steps * self._residual).sum(dim=0), (steps * curved).sum(dim=0)
        scale = storable(self._scale + along / power.clamp(min=TINY))
        moved = scale - self._scale
        better = (power > TINY) & (moved * (2 * along - moved * power) > 0)  # rounding to fp16 may have spoilt it
        moved *= better
        self._scale.copy_(torch.where(better, scale, self._scale))
        self._residual.addcmul_(curved, moved, value=-1)
        self.gained.addcmul_(steps, moved)

    def round_codes(self, top: int) -> None:
        """Give each weight the grid point nearest to q_j + R_j / H_jj, counted in the steps that a group shares."""
        curvature = self._square.diagonal()[:, None]
        wanted = self._residual.div_(curvature).div_(self._scale).add_(self.codes)
        factors = self._square / curvature
        codes, moved = torch.empty_like(wanted), torch.empty_like(wanted)
        rows = list(zip(*(each.unbind() for each in (wanted, factors, self.codes, codes, moved)), strict=True))
        for start in range(0, len(rows), INNER_BLOCK):
            stop = min(start + INNER_BLOCK, len(rows))
            wanted[start:stop].addmm_(factors[start:stop, :start], moved[:start], alpha=-1)
            for row in range(start, stop):
                asked, factor, before, code, change = rows[row]
                if row > start:
                    asked.addmv_(moved[start:row].T, factor[start:row], alpha=-1)
                torch.round(asked, out=code).clamp_(0, top)
                torch.sub(code, before, out=change)
        self.codes = codes
        self.gained.addcmul_(moved, self._scale)
