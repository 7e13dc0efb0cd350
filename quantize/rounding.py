"""Round-to-nearest on GPTQ's grids: the baseline that looks at no data."""

from __future__ import annotations

import torch

from quantize.gptq import SolvedLinear
from quantize.scales import dequantize, group_scales
from quantize.settings import GPTQSettings


def round_to_nearest(weight: torch.Tensor, settings: GPTQSettings) -> SolvedLinear:
    """Quantize weight [N, K], each weight to its nearest grid point.

    Scales are searched for the least squared error of the weights, or cover the group from minimum to
    maximum where `importance_scales` is off. The loss is the weights' mean squared error.
    """
    weight = weight.float()
    columns = weight.shape[1]
    alike = torch.ones(columns, device=weight.device) if settings.importance_scales else None
    scales, zeros = group_scales(weight, alike, settings.bits, settings.group_size, settings.sym)
    size = columns if settings.group_size == -1 else settings.group_size
    g_idx = (torch.arange(columns, device=weight.device) // size).int()
    groups = g_idx.long()
    steps = (weight.T / scales.float()[groups]).round_() + zeros.float()[groups]
    codes = steps.clamp_(0, (1 << settings.bits) - 1).to(torch.uint8)
    error = dequantize(codes, zeros, scales, g_idx) - weight
    loss, power = float(error.square().mean()), float(weight.square().mean())
    return SolvedLinear(codes, zeros, scales, g_idx, loss, power, damp=0.0, dead_columns=0, notes=())
