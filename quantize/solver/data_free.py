"""Quantization methods that need no calibration data: round to nearest, NF4 and LLM.int8."""

from __future__ import annotations

import torch

from quantize.solver.scale_search import group_scales
from quantize.solver.settings import GPTQSettings
from quantize.solver.solved_linear import SolvedLinear, dequantize_codes
from runtime.checkpoints.quantization_config import NF4_BLOCKSIZE
from runtime.modeling.linear import Tensors

ROW_ORDER = 0  # bitsandbytes' `weight_format` for row-major codes, the only format it still writes


def round_to_nearest(weight: torch.Tensor, settings: GPTQSettings) -> SolvedLinear:
    """Quantize weight [N, K] on GPTQ's grid, each weight to its nearest grid point.

    Scales minimise the squared error of the weights, or are min-max scales if `importance_scales` is off. The loss is
    the mean squared error of the weights.
    """
    weight = weight.float()
    columns = weight.shape[1]
    importance = torch.ones(columns, device=weight.device) if settings.importance_scales else None
    scales, zeros = group_scales(weight, importance, settings.bits, settings.group_size, settings.sym)
    size = columns if settings.group_size == -1 else settings.group_size
    g_idx = (torch.arange(columns, device=weight.device) // size).int()
    groups = g_idx.long()
    steps = (weight.T / scales.float()[groups]).round_() + zeros.float()[groups]
    codes = steps.clamp_(0, (1 << settings.bits) - 1).to(torch.uint8)
    error = dequantize_codes(codes, zeros, scales, g_idx) - weight
    loss, power = float(error.square().mean()), float(weight.square().mean())
    return SolvedLinear(codes, zeros, scales, g_idx, loss, power, damp=0.0, dead_columns=0, notes=())


def quantize_nf4(weight: torch.Tensor) -> Tensors:
    """Quantize weight [N, K] to NF4 with double quantization (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

    Args:
        weight: in the checkpoint's dtype, which is stored as the dtype to dequantize to.

    Returns:
        The tensors that transformers reads, by suffix (`weight`, `weight.absmax`, ...).
    """
    # Imported here: bitsandbytes imports torch's compiler, which doubles the start time, and logs warnings about its
    # CPU backend.
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCKSIZE, compress_statistics=True, quant_type="nf4"
    )
    stored = {"weight": packed} | {f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}
    return {name: tensor.to(weight.device) for name, tensor in stored.items()}


def quantize_int8(weight: torch.Tensor) -> Tensors:
    """Quantize weight [N, K] to int8 with one scale per output row, the stored part of LLM.int8.

    LLM.int8: Dettmers et al. 2022, arXiv 2208.07339. Row n of the weight is code * SCB[n] / 127. The arithmetic is that
    of bitsandbytes' `int8_vectorwise_quant`, but in fp32, where bitsandbytes first rounds the weight to fp16.

    Returns:
        `weight` int8, `SCB` fp32 and `weight_format`, as bitsandbytes' `Linear8bitLt` saves them.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1)
    codes = (wide * (127.0 / scales.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round_()
    return {
        "weight": codes.clamp_(-127, 127).to(torch.int8),
        "SCB": scales,
        "weight_format": torch.tensor(ROW_ORDER, dtype=torch.uint8),
    }
