"""Change a solved linear's scales and codes one at a time as long as its output error falls.

GPTQ visits each column once and knows nothing yet of those still to come. With all of them there, each code and each
scale has a best value given the others. E is what was asked for less what there is, R = H E:

    a group's scale gains   c . R_g / c . H_gg c,       c being the group's steps from zero, code - zero
    a weight is asked to    w_j + R_j / H_jj,           and takes the grid point nearest to that

This is coordinate descent (as QuantEase, Behdin et al. 2023, arXiv 2309.01885, but begun where GPTQ ended, and over the
scales too). The error cannot rise, and the first few passes take most of what there is to gain.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantize.factor import Factor, weighted_square
from quantize.gptq import INNER_BLOCK, SolvedLinear
from quantize.scales import TINY, storable
from quantize.settings import GPTQSettings

ROWS_AT_ONCE = 1024  # bounds the temporaries


def refine(
    target: Tensor, solved: SolvedLinear, hessian: Tensor, factor: Factor, settings: GPTQSettings
) -> SolvedLinear:
    """`solved` after `refine_passes` passes over all its groups.

    Args:
        target: [N, K], the weight that was solved for.
        hessian: fp32 [K, K] of `factor.into_hessian()`, which the linears of one input share.
    """
    columns, group_of = factor.columns, solved.g_idx[factor.columns].long()
    codes, scales, zeros = solved.codes[columns], solved.scales.float(), solved.zeros.float()
    error = _error(target, codes, scales, zeros, group_of, factor)
    residual = hessian @ error
    groups = [(group_of == group).nonzero().flatten() for group in range(len(scales))]
    for _ in range(settings.refine_passes):
        for rows, scale, zero in zip(groups, scales, zeros, strict=True):
            across, code = hessian[rows], codes[rows].float()
            change = _refine_group(across[:, rows], residual[rows], code, scale, zero, (1 << settings.bits) - 1)
            codes[rows] = code.to(torch.uint8)
            error[rows] -= change
            residual.addmm_(across.T, change, alpha=-1)
    damping = factor.damp * weighted_square(error)
    loss = max(float(error.mul_(residual).sum(dtype=torch.float64) - damping), 0.0)
    return replace(
        solved,
        codes=torch.empty_like(codes).index_copy_(0, columns, codes),
        scales=scales.half(),
        loss=loss,
        relative_loss=solved.relative_loss * (loss / solved.loss) if solved.loss else 0.0,
    )


def _error(target: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, factor: Factor) -> Tensor:
    """What was asked for less what there is, fp32 [K, N], in the factor's order."""
    error = target.T[factor.columns].float()
    for start in range(0, len(error), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        error[rows] -= (codes[rows] - zeros[group_of[rows]]) * scales[group_of[rows]]
    error[torch.isin(factor.columns, factor.dead)] = 0  # their weights became 0, whatever they were
    return error


def _refine_group(square: Tensor, residual: Tensor, code: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Visit a group's scale and then its codes; what its weights gained, fp32 [B, N].

    Args:
        square: the group's part [B, B] of H.
        residual: its rows [B, N] of H E; overwritten.
        code: [B, N], its codes; changed in place.
        scale: [N], changed in place.
        zero: [N].
        top: the largest code.
    """
    steps = code - zero
    change = steps * _refit(square, residual, steps, scale)
    gained = torch.empty_like(code)
    steps_a_weight = scale.reciprocal()
    curvature = square.diagonal().reciprocal().tolist()
    rows = list(zip(residual.unbind(), code.unbind(), gained.unbind(), square.unbind(), curvature, strict=True))
    for start in range(0, len(code), INNER_BLOCK):
        stop = min(start + INNER_BLOCK, len(code))
        residual[start:stop].addmm_(square[start:stop, :start], gained[:start], alpha=-1)
        for row in range(start, stop):
            slope, old, gain, factors, inverse = rows[row]
            if row > start:
                slope.addmv_(gained[start:row].T, factors[start:row], alpha=-1)
            new = torch.addcmul(old, slope, steps_a_weight, value=inverse).round_().clamp_(0, top)
            torch.sub(new, old, out=gain).mul_(scale)
            old.copy_(new)
    return change.add_(gained)


def _refit(square: Tensor, residual: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """Move `scale` [N] to its best value as fp16 stores it, and `residual` along; how far it went, [N]."""
    curved = square @ steps
    along, power = (steps * residual).sum(dim=0), (steps * curved).sum(dim=0)
    moved = storable(scale + along / power.clamp_(min=TINY)) - scale
    moved *= moved * (2 * along - moved * power) > 0  # rounding to fp16 may have spoilt it
    scale += moved
    residual.addcmul_(curved, moved, value=-1)
    return moved
