"""Search for the scales and zeros of uniform grids: w ~ scale * (code - zero), one pair per group and output row.

Min-max scales make the grid cover the group exactly. The search instead minimises the weighted squared error
sum_k h_k (w_k - scale * (code_k - zero))^2, where h_k is the importance of column k. Each candidate scale gives codes,
and the best scale for those codes is the least-squares fit sum h w c / sum h c^2 with c = code - zero (as in
llama.cpp's k-quants). A scale may be negative: a symmetric grid has one more step below zero than above, and the sign
of the scale selects the side that gets it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_SCALE = 2.0**-14  # fp16's smallest normal number: some kernels flush subnormals to 0
LARGEST_SCALE = 65504.0
MAX_WEIGHT_MAGNITUDE = 2.0**24  # the limit of an 8-bit grid with an fp16 scale; larger squares could overflow
TINY = torch.finfo(torch.float32).tiny

SHRINKS = {4: (0.4, 1.2), 8: (0.85, 1.1)}  # by bits: searched range, as a fraction of the min-max step
CANDIDATE_COUNT = 34  # measured: twice as many gain 0.3 %, half as many lose 0.5 %
REFITS = 3  # rounds of alternating codes and least-squares scale


def group_scales(
    weight: Tensor, importance: Tensor | None, bits: int, group_size: int, sym: bool
) -> tuple[Tensor, Tensor]:
    """Choose scales and zeros for weight [N, K] in groups of consecutive columns.

    Args:
        importance: [K], weight of each column's squared error; None for min-max scales.
        group_size: columns per group, -1 for all; the last group may be shorter.

    Returns:
        scales fp16 [G, N], finite and normal (never 0), and zeros uint8 [G, N], at least 1: format v1 stores zero - 1,
        and readers disagree on the meaning of a stored -1.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    padding = groups * size - columns  # padding with zeros does not change the choice: every grid contains 0
    if importance is not None:
        importance = _normalised(functional.pad(importance.float(), (0, padding)).view(groups, size))
    scales = torch.empty(groups, rows, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(groups, rows, dtype=torch.uint8, device=weight.device)
    rows_at_once = max(1, (2**24 if weight.is_cuda else 2**16) // columns)  # on a CPU, so that a chunk fits in cache
    for start in range(0, rows, rows_at_once):
        chunk = weight[start : start + rows_at_once].float().clamp(-MAX_WEIGHT_MAGNITUDE, MAX_WEIGHT_MAGNITUDE)
        chunk = functional.pad(chunk, (0, padding)).view(-1, groups, size)
        candidates, zero = _symmetric(chunk, bits) if sym else _asymmetric(chunk, bits)
        best = candidates[0]
        if importance is not None:
            best = _Search(chunk, importance, zero, bits).best(candidates)
        scales[:, start : start + rows_at_once] = best.T
        zeros[:, start : start + rows_at_once] = zero.T
    return scales, zeros


def _normalised(importance: Tensor) -> Tensor:
    """Scale importance [G, g] to mean 1 in each group, so that sums neither underflow nor overflow."""
    mean = importance.mean(dim=1, keepdim=True)
    return torch.where(mean > 0, importance / mean, torch.ones_like(importance))


def to_storable_fp16(scale: Tensor) -> Tensor:
    """Round `scale` to a finite, normal fp16 value of the same sign, returned as fp32."""
    magnitude = scale.abs().clamp_(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    return torch.copysign(magnitude, scale)


def _symmetric(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Candidate scales [C, R, G] for weight [R, G, g], min-max first, and the zero [R, G] that they share."""
    half = 1 << (bits - 1)
    extreme = weight.gather(2, weight.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    shrinks = torch.linspace(*SHRINKS[bits], CANDIDATE_COUNT // 2, device=weight.device)
    steps = torch.cat([shrinks / -half, shrinks / (half - 1)])  # the extreme on the longer or the shorter side
    scales = torch.cat([extreme.abs()[None] / (half - 0.5), steps[:, None, None] * extreme])
    return to_storable_fp16(scales), torch.full_like(extreme, half)


def _asymmetric(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `_symmetric`. The range shrinks at both ends by the same factor, so the zero does not change."""
    max_code = (1 << bits) - 1
    low = weight.amin(dim=2).clamp_(max=0)
    step = ((weight.amax(dim=2).clamp_(min=0) - low) / max_code).clamp_(min=TINY)
    shrinks = torch.linspace(*SHRINKS[bits], CANDIDATE_COUNT, device=weight.device)
    scales = torch.cat([step[None], shrinks[:, None, None] * step])
    return to_storable_fp16(scales), (-low / step).round_().clamp_(1, max_code)


class _Search:
    """Find the best scale of every group in one chunk: weight [R, G, g], importance [G, g], zero [R, G].

    For speed, full-size results go to preallocated buffers, and no operation broadcasts two operands, which torch does
    not vectorise on a CPU.
    """

    def __init__(self, weight: Tensor, importance: Tensor, zero: Tensor, bits: int) -> None:
        self._weight = weight
        self._importance = importance
        self._zero = zero[..., None]
        self._top = (1 << bits) - 1
        self._steps = torch.empty_like(weight)
        self._weighted = torch.empty_like(weight)
        self._product = torch.empty_like(weight)

    def best(self, scales: Tensor) -> Tensor:
        """Select the candidate of [C, R, G] whose least-squares fit has the least error, and refine it to [R, G]."""
        numerator, denominator = torch.empty_like(scales), torch.empty_like(scales)
        for index, scale in enumerate(scales):
            self._round(scale)
            self._sums(numerator[index], denominator[index])
        fitted = numerator / denominator.clamp_(min=TINY)
        removed = numerator * fitted  # reduction of the weighted squared error by the fit
        return self._refit(fitted.gather(0, removed.argmax(dim=0, keepdim=True))[0])

    def _refit(self, scale: Tensor) -> Tensor:
        """Alternate rounding and least-squares fit; return the fp16-rounded scale [R, G] with the least error."""
        numerator, denominator = torch.empty_like(scale), torch.empty_like(scale)
        best, least = scale, torch.full_like(scale, torch.inf)
        for _ in range(REFITS):
            scale = to_storable_fp16(scale)
            self._round(scale)
            self._sums(numerator, denominator)
            error = self._error(scale)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
            scale = numerator / denominator.clamp_(min=TINY)
        return best

    def _round(self, scale: Tensor) -> None:
        """Set `_steps` to code - zero of the grid point nearest to each weight."""
        torch.mul(self._weight, scale.reciprocal()[..., None], out=self._steps)
        self._steps.add_(self._zero).round_().clamp_(0, self._top).sub_(self._zero)

    def _sums(self, numerator: Tensor, denominator: Tensor) -> None:
        """Write sum h w c and sum h c^2 of the current steps c, both [R, G]."""
        torch.mul(self._steps, self._importance, out=self._weighted)
        torch.sum(torch.mul(self._weighted, self._weight, out=self._product), dim=2, out=numerator)
        torch.sum(torch.mul(self._weighted, self._steps, out=self._product), dim=2, out=denominator)

    def _error(self, scale: Tensor) -> Tensor:
        """Weighted squared error [R, G] of the current steps at `scale`."""
        torch.addcmul(self._weight, self._steps, scale[..., None], value=-1, out=self._product)
        return self._product.square_().mul_(self._importance).sum(dim=2)
