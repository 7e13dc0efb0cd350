"""Triton kernel that dequantizes NF4 weights on a GPU. Import only if Triton is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from runtime.checkpoints.quantization_config import NF4_BLOCKSIZE, NF4_NESTED_BLOCKSIZE

_BLOCKS = 64  # NF4 blocks per program: 4,096 weights


def dequantize_nf4_triton(tensors: Mapping[str, torch.Tensor], nested_offset: float | None, out: torch.Tensor) -> None:
    """Dequantize into `out` [N*K], contiguous.

    Args:
        tensors: as `QuantizationConfig.linear_tensors` lists them.
        nested_offset: the mean that double quantization subtracted from each absmax; None without it.
    """
    absmax, double = tensors["weight.absmax"], nested_offset is not None
    nf4_kernel[(triton.cdiv(len(absmax), _BLOCKS),)](
        tensors["weight"].flatten(),
        tensors["weight.quant_map"],
        absmax,
        tensors["weight.nested_absmax"] if double else absmax,
        tensors["weight.nested_quant_map"] if double else absmax,
        nested_offset or 0.0,
        out,
        out.numel(),
        DOUBLE=double,
        BLOCKS=_BLOCKS,
        BLOCKSIZE=NF4_BLOCKSIZE,
        NESTED=NF4_NESTED_BLOCKSIZE,
        enable_fp_fusion=False,  # absmax is rounded after the product and after the sum, as in bitsandbytes
    )


@triton.jit
def nf4_kernel(
    codes: tl.tensor,
    table: tl.tensor,
    absmax: tl.tensor,
    nested_absmax: tl.tensor,
    nested_map: tl.tensor,
    nested_offset: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    DOUBLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
) -> None:
    """Dequantize BLOCKS blocks, each with one absmax; each packed byte gives two weights."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    exists = block * BLOCKSIZE < count
    scale = tl.load(absmax + block, mask=exists, other=0)
    if DOUBLE:
        deviation = tl.load(nested_map + scale.to(tl.int32), mask=exists, other=0)
        deviation *= tl.load(nested_absmax + block // NESTED, mask=exists, other=0)
        scale = deviation + nested_offset
    byte = block * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    packed = tl.load(codes + byte, mask=byte * 2 < count, other=0).to(tl.int32)
    high = tl.load(table + (packed >> 4)) * scale
    low = tl.load(table + (packed & 15)) * scale
    weight_index = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    values = tl.join(high, low).reshape(BLOCKS, BLOCKSIZE)
    tl.store(out + weight_index, values.to(out.dtype.element_ty), mask=weight_index < count)
