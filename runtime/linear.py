"""One interface for the linear layers of a block, however their weights are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from runtime.packing import dequantize_gptq, dequantize_int8, dequantize_nf4
from runtime.quantization import Quantization

Tensors = dict[str, torch.Tensor]


class Linear(Protocol):
    """`y = x W^T + b` with W [out, in] and b [out] or None."""

    @property
    def bias(self) -> torch.Tensor | None: ...

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out, in] in `dtype`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] to y [T, out], computed in x's dtype."""


@dataclass(frozen=True)
class DenseLinear:
    """A stored floating-point weight, cast to the input's dtype for each product.

    The cast costs 3 % of a 2,048-token product on a CPU, and spares a second copy of the block.
    """

    stored: torch.Tensor
    bias: torch.Tensor | None = None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self.stored.to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@dataclass(frozen=True)
class QuantizedLinear:
    """A packed weight, dequantized for each product.

    Attributes:
        tensors: the stored tensors by suffix (`qweight`, `scales`, ... or `weight`, `weight.absmax`, ...).
        shape: (out, in).
    """

    tensors: Tensors
    quantization: Quantization
    shape: tuple[int, int]
    bias: torch.Tensor | None = None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        if self.quantization.method == "gptq":
            bits, version = self.quantization.bits, self.quantization.checkpoint_format
            return dequantize_gptq(self.tensors, bits, dtype, version)
        if self.quantization.method == "nf4":
            return dequantize_nf4(self.tensors, self.shape, dtype)
        return dequantize_int8(self.tensors, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def make_linear(tensors: Tensors, quantization: Quantization | None, shape: tuple[int, int]) -> Linear:
    """The linear layer stored as `tensors`, keyed by suffix."""
    if quantization is None:
        return DenseLinear(tensors["weight"], tensors.get("bias"))
    packed = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "bias"}
    return QuantizedLinear(packed, quantization, shape, tensors.get("bias"))
