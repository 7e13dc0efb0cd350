"""Scales and zeros of uniform grids: w ~ scale * (code - zero), one (scale, zero) a group and output row.

Min-max takes the grid that just covers the group. The search looks for the grid with the least weighted
squared error sum_k h_k (w_k - scale * (code_k - zero))^2, h being what an error there costs. Each candidate
grid gives codes, and the best scale for those codes is a least-squares fit, sum h w c / sum h c^2 with
c = code - zero (as in llama.cpp's k-quants). A scale may be negative: a symmetric grid reaches one step
further below zero than above, and the scale's sign says which side of the group that is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_SCALE = 2.0**-14  # fp16's smallest normal number: some kernels flush what is smaller to 0
LARGEST_SCALE = 65504.0
FURTHEST = 2.0**24  # no fp16 grid of 8 bits reaches further; squares of larger weights could overflow
TINY = torch.finfo(torch.float32).tiny

SHRINKS = {4: (0.4, 1.2), 8: (0.85, 1.1)}  # the shares of the min-max step that are searched
CANDIDATES = 34  # how many are tried; twice as many gain 0.3 %, half of them lose 0.5 %
REFITS = 3


def group_scales(
    weight: Tensor, importance: Tensor | None, bits: int, group_size: int, sym: bool
) -> tuple[Tensor, Tensor]:
    """Scales fp16 [G, N] and zeros uint8 [G, N] for weight [N, K] in groups of consecutive columns.

    A scale is never 0, infinite or subnormal, and a zero never 0: format v1 stores zero - 1, and readers
    disagree on what a stored -1 means.

    Args:
        importance: [K], how much a squared error in each column counts; None for plain min-max grids.
        group_size: columns a group, -1 for all; the last group may be shorter.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    padding = groups * size - columns  # zeros are on every grid, so padding decides nothing
    if importance is not None:
        importance = _normalised(functional.pad(importance.float(), (0, padding)).view(groups, size))
    scales = torch.empty(groups, rows, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(groups, rows, dtype=torch.uint8, device=weight.device)
    rows_at_once = max(1, (2**24 if weight.is_cuda else 2**16) // columns)  # on a CPU, what stays in cache
    for start in range(0, rows, rows_at_once):
        chunk = weight[start : start + rows_at_once].float().clamp(-FURTHEST, FURTHEST)
        chunk = functional.pad(chunk, (0, padding)).view(-1, groups, size)
        candidates, zero = _symmetric(chunk, bits) if sym else _asymmetric(chunk, bits)
        best = candidates[0]
        if importance is not None:
            best = _Search(chunk, importance, zero, bits).best(candidates)
        scales[:, start : start + rows_at_once] = best.T
        zeros[:, start : start + rows_at_once] = zero.T
    return scales, zeros


def dequantize(codes: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """Weight fp32 [N, K] of codes [K, N], zeros and scales [G, N], g_idx [K]: what every reader computes."""
    weight = torch.empty(codes.shape[1], codes.shape[0], device=codes.device)
    for start in range(0, len(codes), 256):
        groups = g_idx[start : start + 256].long()
        steps = codes[start : start + 256].float() - zeros[groups].float()
        weight[:, start : start + 256] = (steps * scales[groups].float()).T
    return weight


def _normalised(importance: Tensor) -> Tensor:
    """Importance [G, g] with mean 1 in each group, so that sums neither vanish nor overflow."""
    mean = importance.mean(dim=1, keepdim=True)
    return torch.where(mean > 0, importance / mean, torch.ones_like(importance))


def storable(scale: Tensor) -> Tensor:
    """The fp16 value that will be stored, as fp32: finite, normal, its sign kept."""
    magnitude = scale.abs().clamp_(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    return torch.copysign(magnitude, scale)


def _symmetric(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales [C, R, G] to try for weight [R, G, g], the min-max one first, and their zero [R, G]."""
    half = 1 << (bits - 1)
    extreme = weight.gather(2, weight.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    shrinks = torch.linspace(*SHRINKS[bits], CANDIDATES // 2, device=weight.device)
    steps = torch.cat([shrinks / -half, shrinks / (half - 1)])  # the extreme on the long side, or the short
    scales = torch.cat([extreme.abs()[None] / (half - 0.5), steps[:, None, None] * extreme])
    return storable(scales), torch.full_like(extreme, half)


def _asymmetric(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `_symmetric`; the range shrinks at both ends alike, so the zero stays where it is."""
    top = (1 << bits) - 1
    low = weight.amin(dim=2).clamp_(max=0)
    step = ((weight.amax(dim=2).clamp_(min=0) - low) / top).clamp_(min=TINY)
    shrinks = torch.linspace(*SHRINKS[bits], CANDIDATES, device=weight.device)
    scales = torch.cat([step[None], shrinks[:, None, None] * step])
    return storable(scales), (-low / step).round_().clamp_(1, top)


class _Search:
    """Finds the best scale of every group in one chunk: weight [R, G, g], importance [G, g], zero [R, G].

    Full-size results go to buffers that are made once: allocation would cost as much as the arithmetic. For
    the same reason no operation broadcasts two operands, which torch does not vectorise on a CPU.
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
        """Scale [R, G] grown from candidates [C, R, G], each judged by the least-squares fit it leads to."""
        along, power = torch.empty_like(scales), torch.empty_like(scales)
        for index, scale in enumerate(scales):
            self._round(scale)
            self._sums(along[index], power[index])
        fitted = along / power.clamp_(min=TINY)
        removed = along * fitted  # how much of the squared weight the fit explains
        return self._settle(fitted.gather(0, removed.argmax(dim=0, keepdim=True))[0])

    def _settle(self, scale: Tensor) -> Tensor:
        """Alternate codes and scale, as fp16 stores it; the scale [R, G] with the least error on the way."""
        along, power = torch.empty_like(scale), torch.empty_like(scale)
        best, least = scale, torch.full_like(scale, torch.inf)
        for _ in range(REFITS):
            scale = storable(scale)
            self._round(scale)
            self._sums(along, power)
            error = self._error(scale)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
            scale = along / power.clamp_(min=TINY)
        return best

    def _round(self, scale: Tensor) -> None:
        """Set steps to code - zero of the grid point nearest to each weight."""
        torch.mul(self._weight, scale.reciprocal()[..., None], out=self._steps)
        self._steps.add_(self._zero).round_().clamp_(0, self._top).sub_(self._zero)

    def _sums(self, along: Tensor, power: Tensor) -> None:
        """Set along to sum h w c and power to sum h c^2, both [R, G], of these steps c."""
        torch.mul(self._steps, self._importance, out=self._weighted)
        torch.sum(torch.mul(self._weighted, self._weight, out=self._product), dim=2, out=along)
        torch.sum(torch.mul(self._weighted, self._steps, out=self._product), dim=2, out=power)

    def _error(self, scale: Tensor) -> Tensor:
        """Weighted squared error [R, G] of these steps at `scale`."""
        torch.addcmul(self._weight, self._steps, scale[..., None], value=-1, out=self._product)
        return self._product.square_().mul_(self._importance).sum(dim=2)
