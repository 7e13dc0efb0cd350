"""NF4 dequantization on a GPU. Imported only where there is Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from runtime.quantization import NF4_BLOCKSIZE, NF4_NESTED_BLOCKSIZE

if TYPE_CHECKING:
    from runtime.kernels.nf4 import NF4Weight

_BLOCKS = 64  # of a program: 4,096 weights


def write_nf4(weight: NF4Weight, out: torch.Tensor) -> None:
    """Dequantize into `out` [N*K], contiguous."""
    absmax, double = weight.tensors["weight.absmax"], weight.nested_offset is not None
    nf4_kernel[(triton.cdiv(len(absmax), _BLOCKS),)](
        weight.codes,
        weight.table,
        absmax,
        weight.tensors["weight.nested_absmax"] if double else absmax,
        weight.tensors["weight.nested_quant_map"] if double else absmax,
        weight.nested_offset or 0.0,
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
    """BLOCKS blocks that share an absmax each: a row of bytes gives a row of twice as many weights."""
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
    place = block * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    values = tl.join(high, low).reshape(BLOCKS, BLOCKSIZE)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < count)
