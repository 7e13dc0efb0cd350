"""fp8 matrix products with 4-bit GPTQ weights (W4A8), for GPUs whose fp8 throughput is twice that of bf16.

e4m3 (Micikevicius et al. 2022, arXiv 2209.05433) has 3 mantissa bits and a maximum of 448. Inputs are scaled per token
so that the largest magnitude becomes 448. Weights are scaled per output row by a power of two, which is folded into the
GPTQ scales. The dequantization kernels then write e4m3 directly, rounding once, with half the bytes of bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from runtime.kernels.workspace import Workspace, chunks, items_per_chunk
from runtime.modeling.linear import Linear, QuantizedLinear, StackedLinear, batch_invariant_linear

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
FLOAT8_SIZE_MULTIPLE = 16  # N and K of fp8 products on a GPU must be multiples of this
_MAX_EXPONENT = 8  # scaled weights stay below 2**8


@dataclass(frozen=True)
class Float8Linear:
    """A GPTQ weight, or a stack of them, multiplied in fp8. Made by `make_float8_linear`.

    Attributes:
        scaled_linear: W[n, k] / row_scales[n], packed, within the range of e4m3.
        row_scales: fp32 [N], powers of two.
        bias: [N] or None.
    """

    scaled_linear: StackedLinear
    row_scales: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.scaled_linear.shape

    @property
    def widths(self) -> tuple[int, ...]:
        return self.scaled_linear.widths

    @property
    def device(self) -> torch.device:
        return self.row_scales.device

    @property
    def transposed(self) -> bool:
        return self.scaled_linear.transposed

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.scaled_linear.weight(dtype, out).mul_(self.row_scales[:, None])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, token_scales = quantize_rows(x)
        buffer = Workspace.of(x.device).get_buffer("weight", self.shape, E4M3)
        product = scaled_mm_cuda if x.is_cuda else scaled_mm_reference
        y = product(codes, token_scales, self.scaled_linear.weight(E4M3, buffer), self.row_scales).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias.to(x.dtype))


def make_float8_linear(linear: Linear) -> Float8Linear:
    """Return `linear`, a packed GPTQ linear or a stack of them, with fp8 products.

    Raises:
        TypeError: a weight is not a packed GPTQ weight.
    """
    parts, row_scales = zip(
        *map(_rescale_rows, linear.parts if isinstance(linear, StackedLinear) else (linear,)), strict=True
    )
    return Float8Linear(
        StackedLinear(parts, tuple(part.shape[0] for part in parts)), torch.cat(row_scales), linear.bias
    )


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [T, K] to e4m3 codes [T, K] and scales fp32 [T, 1]; x is about codes * scales.

    A token with an infinity or a NaN gives a product that is not finite.
    """
    row_max = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    row_scales = row_max.clamp_min(E4M3_MAX * torch.finfo(torch.float32).tiny) / E4M3_MAX
    return (x / row_scales).to(E4M3), row_scales


def scaled_mm_reference(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """Return (codes * row_scales) (weight * weight_scales)^T in fp32 [T, N]. Runs on any device; reference for CUDA.

    Products of two e4m3 numbers are exact in fp32. Computed for a chunk of output rows at a time, to bound the memory
    of the fp32 copy.

    Args:
        codes: e4m3 [T, K].
        row_scales: fp32 [T, 1].
        weight: e4m3 [N, K].
        weight_scales: fp32 [N].
    """
    wide, step = codes.float(), items_per_chunk(weight.shape[1], weight.device)
    parts = [batch_invariant_linear(wide, weight[rows].float(), None) for rows in chunks(len(weight), step)]
    return torch.cat(parts, dim=1).mul_(row_scales).mul_(weight_scales)


def scaled_mm_cuda(
    codes: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """Compute `scaled_mm_reference` on the fp8 units of a GPU, in bf16 [T, N].

    N and K must be multiples of `FLOAT8_SIZE_MULTIPLE`.
    """
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(codes, weight.t(), row_scales, by_row, weight_scales[None], by_row, output_dtype=torch.bfloat16)


def _rescale_rows(linear: Linear) -> tuple[QuantizedLinear, torch.Tensor]:
    """Return the linear with each row of W divided by a power of two to fit e4m3, and those powers, fp32 [N]."""
    if not isinstance(linear, QuantizedLinear) or linear.quantization.method != "gptq":
        raise TypeError(f"fp8 products need packed GPTQ weights; this one is a {type(linear).__name__}")
    stored = linear.tensors["scales"]  # [G, N]
    weight_bound = stored.float().abs().amax(0) * (2**linear.quantization.bits - 1)  # upper bound of |W| in the row
    _, exponents = torch.frexp(weight_bound.clamp_min(2.0**-24))
    # The conversion to e4m3 on a GPU saturates an infinity at 448, so a row that has one gets a NaN scale.
    row_scales = torch.ldexp(torch.ones_like(weight_bound), exponents - _MAX_EXPONENT).where(
        weight_bound.isfinite(), torch.nan
    )
    scales = (stored.float() / row_scales).to(stored.dtype)  # exact unless it underflows, 2**19 below the largest
    return replace(linear, tensors=linear.tensors | {"scales": scales}), row_scales
