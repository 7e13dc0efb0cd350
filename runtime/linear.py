"""One interface for the linear layers of a block, however their weights are stored, alone or several as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F

from runtime.kernels import PackedWeight, packed_weight
from runtime.quantization import Quantization
from runtime.workspace import Workspace

Tensors = dict[str, torch.Tensor]

FEWEST_ROWS = 16
"""Products on a CPU have at least so many rows. Those of fewer take other kernels, which round otherwise."""


class Linear(Protocol):
    """`y = x W^T + b` with W [out, in] and b [out] or None."""

    @property
    def bias(self) -> torch.Tensor | None: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def device(self) -> torch.device: ...

    @property
    def transposed(self) -> bool:
        """Whether W is written fastest where its transpose [in, out] is contiguous."""

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """W [out, in] in `dtype`; written into `out` of that shape and dtype, and any strides, where it is given."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] to y [T, out], computed in x's dtype."""


@dataclass(frozen=True)
class DenseLinear:
    """A stored floating-point weight, cast to the input's dtype for each product if it has another one.

    The cast costs 3 % of a 2,048-token product on a CPU, and spares a second copy of the block.
    """

    stored: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def transposed(self) -> bool:
        return not self.stored.is_contiguous()

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.stored.to(dtype) if out is None else out.copy_(self.stored)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(self, x)


@dataclass(frozen=True)
class QuantizedLinear:
    """A packed weight, dequantized for each product into a buffer that all linears share.

    Attributes:
        tensors: the stored tensors by suffix (`qweight`, `scales`, ... or `weight`, `weight.absmax`, ...).
        shape: (out, in).
    """

    tensors: Tensors
    quantization: Quantization
    shape: tuple[int, int]
    bias: torch.Tensor | None = None

    @cached_property
    def packed(self) -> PackedWeight:
        return packed_weight(self.tensors, self.quantization, self.shape)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def transposed(self) -> bool:
        return self.packed.transposed

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            out = _empty_weight(self, dtype)
        self.packed.write(out)
        return out

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(self, x)


@dataclass(frozen=True)
class StackedLinear:
    """Linears that see the same input, as one: W [sum of outs, in]. Made by `stack`.

    Attributes:
        parts: what W consists of; their own biases are not used.
        widths: the outs, in order: `y.split(stacked.widths, dim=-1)` takes the outputs apart.
    """

    parts: tuple[Linear, ...]
    widths: tuple[int, ...]
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.widths), self.parts[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def transposed(self) -> bool:
        return self.parts[0].transposed

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.parts[0].weight(dtype, out)
        return _side_by_side(self.parts, _empty_weight(self, dtype) if out is None else out)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(self, x)


def make_linear(tensors: Tensors, quantization: Quantization | None, shape: tuple[int, int]) -> Linear:
    """The linear layer stored as `tensors`, keyed by suffix."""
    if quantization is None:
        return DenseLinear(tensors["weight"], tensors.get("bias"))
    packed = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "bias"}
    return QuantizedLinear(packed, quantization, shape, tensors.get("bias"))


def stack(linears: Sequence[Linear], dtype: torch.dtype, *, keep: bool = False) -> StackedLinear:
    """Linears that see the same input as one, for products in `dtype`.

    Dense neighbours become one new weight in `dtype`, so their own may be let go. Packed ones stay packed, unless
    `keep` asks for a dequantized copy.
    """
    parts: list[Linear] = []
    for dense, neighbours in groupby(linears, lambda linear: keep or isinstance(linear, DenseLinear)):
        run = list(neighbours)
        parts += [_joined(run, dtype)] if dense else run
    return StackedLinear(tuple(parts), tuple(linear.shape[0] for linear in linears), _joined_bias(linears, dtype))


def densify(linear: Linear, dtype: torch.dtype) -> DenseLinear:
    """A dequantized copy: what costs memory once instead of time for each product."""
    return DenseLinear(linear.weight(dtype), None if linear.bias is None else linear.bias.to(dtype))


def _joined(linears: list[Linear], dtype: torch.dtype) -> DenseLinear:
    if len(linears) == 1:
        return DenseLinear(linears[0].weight(dtype))
    whole = StackedLinear(tuple(linears), tuple(linear.shape[0] for linear in linears))
    return DenseLinear(whole.weight(dtype))


def _joined_bias(linears: Sequence[Linear], dtype: torch.dtype) -> torch.Tensor | None:
    """A linear without a bias has one of zeros beside one that has."""
    if all(linear.bias is None for linear in linears):
        return None
    zeros = (torch.zeros(linear.shape[0], dtype=dtype, device=linear.device) for linear in linears)
    return torch.cat(
        [zero if own.bias is None else own.bias.to(dtype) for own, zero in zip(linears, zeros, strict=True)]
    )


def _side_by_side(linears: Sequence[Linear], out: torch.Tensor) -> torch.Tensor:
    """Write the weights of `linears` below one another into `out` [sum of outs, in]."""
    start = 0
    for linear in linears:
        end = start + linear.shape[0]
        linear.weight(out.dtype, out[start:end])
        start = end
    return out


def _empty_weight(linear: Linear, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = linear.shape
    if linear.transposed:
        return torch.empty(columns, rows, dtype=dtype, device=linear.device).t()
    return torch.empty(rows, columns, dtype=dtype, device=linear.device)


def _multiply(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """x W^T + b. A weight that is not stored in x's dtype lasts until the thread's next product on the device."""
    stored = linear.parts[0] if isinstance(linear, StackedLinear) and len(linear.parts) == 1 else linear
    if isinstance(stored, DenseLinear) and stored.stored.dtype == x.dtype:
        weight = stored.stored
    else:
        rows, columns = linear.shape
        shape = (columns, rows) if linear.transposed else (rows, columns)
        buffer = Workspace.of(x.device).take("weight", shape, x.dtype)
        weight = linear.weight(x.dtype, buffer.t() if linear.transposed else buffer)
    return multiply(x, weight, None if linear.bias is None else linear.bias.to(x.dtype))


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b of x [T, in], with bits that do not depend on T where the vendor's kernels allow it."""
    few = 0 if x.is_cuda else max(0, FEWEST_ROWS - len(x))
    return F.linear(F.pad(x, (0, 0, 0, few)) if few else x, weight, bias)[: len(x)]
