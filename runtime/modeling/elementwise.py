"""The operations of a block between its matrix products and its attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from runtime.modeling.precision import Precision

SWIGLU_CHUNK_SIZE = 1 << 18  # elements per chunk on a CPU


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize hidden [T, H] in fp32, then multiply by `weight` in the dtype of hidden (RMSNorm)."""
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(hidden.dtype) * weight.to(hidden.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Return silu(gate) * up for [T, I], computed in the residual dtype and rounded to the matmul dtype.

    On a CPU it is computed in chunks of rows, so that intermediates stay in cache.
    """
    rows = len(gate) if gate.is_cuda else max(1, SWIGLU_CHUNK_SIZE // gate.shape[1])
    product = torch.empty_like(gate, dtype=precision.matmul_dtype, memory_format=torch.contiguous_format)
    for out, *parts in zip(product.split(rows), gate.split(rows), up.split(rows), strict=True):
        gate_chunk, up_chunk = (part.to(precision.residual_dtype) for part in parts)
        out.copy_(F.silu(gate_chunk).mul_(up_chunk))
    return product
