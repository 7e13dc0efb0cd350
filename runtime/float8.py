"""Products in fp8, of 4-bit weights: for GPUs whose matrix units multiply it at twice the rate of bf16 (W4A8).

e4m3 (Micikevicius et al. 2022, arXiv 2209.05433) has 3 bits of mantissa and ends at 448. Each token's inputs are scaled
to reach that. A row of the weight is scaled by a power of two, and the packed form has a place for it, its scales: so
the kernels that dequantize into bf16 write e4m3 just as well, rounding once, and half the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from runtime.kernels.pieces import at_once, pieces
from runtime.linear import Linear, QuantizedLinear, StackedLinear, multiply
from runtime.workspace import Workspace

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
WIDTHS = 16  # those of a GPU's fp8 products are multiples of it
_ROOM = 8  # weights stay below 2**8


@dataclass(frozen=True)
class Float8Linear:
    """A GPTQ weight, or several that see the same input, multiplied in fp8. Made by `in_float8`.

    Attributes:
        scaled: W[n, k] / units[n], packed, none beyond e4m3's range.
        units: fp32 [N], powers of two.
        bias: [N] or None.
    """

    scaled: StackedLinear
    units: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.scaled.shape

    @property
    def widths(self) -> tuple[int, ...]:
        return self.scaled.widths

    @property
    def device(self) -> torch.device:
        return self.units.device

    @property
    def transposed(self) -> bool:
        return self.scaled.transposed

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.scaled.weight(dtype, out).mul_(self.units[:, None])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        codes, units = round_rows(x)
        buffer = Workspace.of(x.device).take("weight", self.shape, E4M3)
        product = multiply_scaled if x.is_cuda else multiply_plainly
        y = product(codes, units, self.scaled.weight(E4M3, buffer), self.units).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias.to(x.dtype))


def in_float8(linear: Linear) -> Float8Linear:
    """A packed GPTQ linear, or a stack of them, as one whose products are fp8.

    Raises:
        TypeError: a weight is stored in another way.
    """
    parts, units = zip(*map(_scaled, linear.parts if isinstance(linear, StackedLinear) else (linear,)), strict=True)
    return Float8Linear(StackedLinear(parts, tuple(part.shape[0] for part in parts)), torch.cat(units), linear.bias)


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as e4m3 codes [T, K] times units, fp32 [T, 1]. An infinity or a NaN leaves its token not finite."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    units = largest.clamp_min(LARGEST * torch.finfo(torch.float32).tiny) / LARGEST
    return (x / units).to(E4M3), units


def multiply_plainly(
    codes: torch.Tensor, units: torch.Tensor, weight: torch.Tensor, weight_units: torch.Tensor
) -> torch.Tensor:
    """fp32 [T, N] of codes [T, K] in units [T, 1] and weight [N, K] in units [N], as any machine can: the plain twin.

    Products of two e4m3 numbers are exact in fp32. Some outputs at a time, so that little is widened at once.
    """
    wide, step = codes.float(), at_once(weight.shape[1], weight.device)
    parts = [multiply(wide, weight[some].float(), None) for some in pieces(len(weight), step)]
    return torch.cat(parts, dim=1).mul_(units).mul_(weight_units)


def multiply_scaled(
    codes: torch.Tensor, units: torch.Tensor, weight: torch.Tensor, weight_units: torch.Tensor
) -> torch.Tensor:
    """`multiply_plainly` by the GPU's fp8 units, in bf16. N and K must be multiples of `WIDTHS`."""
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(codes, weight.t(), units, by_row, weight_units[None], by_row, output_dtype=torch.bfloat16)


def _scaled(linear: Linear) -> tuple[QuantizedLinear, torch.Tensor]:
    """The same codes under scales that bring each row of W close to e4m3's end, and the units [N] that give W back."""
    if not isinstance(linear, QuantizedLinear) or linear.quantization.method != "gptq":
        raise TypeError(f"fp8 products are of packed GPTQ weights, and this one is a {type(linear).__name__}")
    stored = linear.tensors["scales"]  # [G, N]
    most = stored.float().abs().amax(0) * (2**linear.quantization.bits - 1)  # no weight of the row is beyond it
    _, exponents = torch.frexp(most.clamp_min(2.0**-24))
    # A GPU's conversion ends an infinity at 448, so it has to show in the units.
    units = torch.ldexp(torch.ones_like(most), exponents - _ROOM).where(most.isfinite(), torch.nan)
    scales = (stored.float() / units).to(stored.dtype)  # exact but where it underflows, 2**19 below the largest
    return replace(linear, tensors=linear.tensors | {"scales": scales}), units
