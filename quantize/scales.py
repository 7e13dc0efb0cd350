"""Scales and zeros of uniform grids: w ~ scale * (code - zero), one (scale, zero) a group and output row.

Min-max takes the grid that just covers the group. The search looks for the grid with the least weighted
squared error sum_k h_k (w_k - scale * (code_k - zero))^2, h being how active input k is. Each candidate grid
gives codes, and the best scale for those codes is a least-squares fit, sum h w c / sum h c^2 with
c = code - zero (as in llama.cpp's k-quants). A scale may be negative: a symmetric grid reaches one step
further below zero than above, and the scale's sign says which side of the group that is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_SCALE = 2.0**-14  # fp16's smallest normal number: some kernels flush what is smaller to 0
LARGEST_SCALE = 65504.0

# Shares of the min-max step that the search tries: first, last, how many.
SHRINK = {4: (0.5, 1.1, 13), 8: (0.9, 1.02, 7)}
REFITS = 2


def group_scales(
    weight: Tensor, importance: Tensor | None, bits: int, group_size: int, sym: bool
) -> tuple[Tensor, Tensor]:
    """Scales fp16 [G, N] and zeros uint8 [G, N] for weight [N, K] in groups of consecutive columns.

    Args:
        importance: [K], how much an error in each column counts; None for plain min-max grids.
        group_size: columns a group, -1 for all; the last group may be shorter.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    padding = groups * size - columns
    scales = torch.empty(groups, rows, dtype=torch.float16, device=weight.device)
    zeros = torch.full((groups, rows), 1 << (bits - 1), dtype=torch.uint8, device=weight.device)
    if importance is not None:
        importance = _normalised(functional.pad(importance.float(), (0, padding)).view(groups, size))
    rows_at_once = max(1, (2**25 if weight.is_cuda else 2**16) // columns)
    for start in range(0, rows, rows_at_once):
        chunk = functional.pad(weight[start : start + rows_at_once].float(), (0, padding)).view(
            -1, groups, size
        )
        scale, zero = (_symmetric if sym else _asymmetric)(chunk, importance, bits)
        scales[:, start : start + rows_at_once] = scale.T.half()
        zeros[:, start : start + rows_at_once] = zero.T.to(torch.uint8)
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


def _storable(scale: Tensor) -> Tensor:
    """The fp16 value that will be stored, as fp32: finite, normal, its sign kept."""
    magnitude = scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    return torch.where(scale < 0, -magnitude, magnitude)


def _symmetric(weight: Tensor, importance: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero [R, G] of weight [R, G, g] on the grid -2^(b-1) .. 2^(b-1) - 1."""
    half = 1 << (bits - 1)
    zero = torch.full(weight.shape[:2], float(half), device=weight.device)
    extreme = weight.gather(2, weight.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    if importance is None:
        largest = extreme.abs()
        return _storable(torch.where(largest > 0, largest / (half - 1), 1.0)), zero
    starts = [-shrink * extreme / half for shrink in _shrinks(bits)]
    starts += [shrink * extreme / (half - 1) for shrink in _shrinks(bits)]
    scale = _search(weight, importance, [(start, zero) for start in starts], bits)[0]
    return torch.where(extreme == 0, 1.0, scale), zero


def _asymmetric(weight: Tensor, importance: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero [R, G] of weight [R, G, g] on the grid -zero .. 2^b - 1 - zero.

    The zero is at least 1: format v1 stores zero - 1, and readers disagree on what a stored -1 means.
    """
    top = (1 << bits) - 1
    low = weight.amin(dim=2).clamp(max=0)
    span = weight.amax(dim=2).clamp(min=0) - low
    step = torch.where(span > 0, span / top, 1.0)
    if importance is None:
        scale = _storable(step)
        return scale, (-low / scale).round_().clamp_(1, top)
    candidates = []
    for shrink in _shrinks(bits):
        # the clipped range keeps the group's balance: both ends shrink alike
        candidates.append((step * shrink, (-low / step).round().clamp(1, top)))
    return _search(weight, importance, candidates, bits)


def _shrinks(bits: int) -> list[float]:
    first, last, count = SHRINK[bits]
    return torch.linspace(first, last, count).tolist()


def _search(
    weight: Tensor, importance: Tensor, candidates: list[tuple[Tensor, Tensor]], bits: int
) -> tuple[Tensor, Tensor]:
    """The best (scale, zero), each [R, G], of grids grown from `candidates` for weight [R, G, g]."""
    weighted = weight * importance
    best_scale, best_zero = candidates[0]
    best_gain = torch.full_like(best_scale, -1.0)
    for scale, zero in candidates:
        steps = _steps(weight, scale, zero, bits)
        gain, fitted = _least_squares(steps, weighted, importance)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, fitted, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return _settle(weight, weighted, importance, best_scale, best_zero, bits), best_zero


def _settle(
    weight: Tensor, weighted: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """Alternate codes and scale, as stored in fp16, and keep the scale with the least error."""
    scale = _storable(scale)
    best_scale, best_error = scale, torch.full_like(scale, torch.inf)
    for refit in range(REFITS + 1):
        steps = _steps(weight, scale, zero, bits)
        error = (torch.addcmul(weight, steps, scale[..., None], value=-1).square_() * importance).sum(dim=2)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
        if refit < REFITS:
            scale = _storable(_least_squares(steps, weighted, importance)[1])
    return best_scale


def _steps(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """code - zero [R, G, g] of the nearest grid point."""
    steps = (weight * scale.reciprocal().nan_to_num_(0, 0, 0)[..., None]).round_()
    low = -zero[..., None]
    return torch.clamp(steps, low, low + ((1 << bits) - 1), out=steps)


def _least_squares(steps: Tensor, weighted: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """For fixed steps: how much squared error the best scale removes, and that scale; each [R, G]."""
    along = (steps * weighted).sum(dim=2)
    power = (steps.square() * importance).sum(dim=2).clamp_(min=torch.finfo(torch.float32).tiny)
    scale = along / power
    return along * scale, scale
