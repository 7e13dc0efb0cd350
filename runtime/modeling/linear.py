"""Linear layers of a block: dense or packed weights, single or stacked, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.kernels.packed_weight import PackedWeight, packed_weight
from runtime.kernels.workspace import Workspace

MIN_ROWS = 16
"""Minimum rows of a product on a CPU. With fewer rows, CPU libraries use other kernels, which round differently."""

Tensors = dict[str, torch.Tensor]


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
        """Whether `weight` is fastest into an `out` whose transpose [in, out] is contiguous."""

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W [out, in] in `dtype`, written into `out` if given (same shape and dtype, any strides)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [T, out] for x [T, in], computed in the dtype of x."""


@dataclass(frozen=True)
class DenseLinear:
    """A floating-point weight, cast for each product if its dtype differs from the input's.

    The cast takes 3 % of a 2,048-token product on a CPU and avoids a second copy of the block.
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
        return _forward(self, x)


@dataclass(frozen=True)
class QuantizedLinear:
    """A packed weight, dequantized for each product into a buffer shared by all linears.

    Attributes:
        tensors: the stored tensors by suffix (`qweight`, `scales`, ... or `weight`, `weight.absmax`, ...).
        shape: (out, in).
    """

    tensors: Tensors
    quantization: QuantizationConfig
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
        self.packed.dequantize_into(out)
        return out

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _forward(self, x)


@dataclass(frozen=True)
class StackedLinear:
    """Several linears with the same input as one linear, W [sum of outs, in]. Made by `stack`.

    Attributes:
        parts: the linears whose weights form W; their biases are not used.
        widths: out_features of the original linears: `y.split(stacked.widths, dim=-1)` gives their outputs.
        bias: [sum of outs] or None.
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
        return _write_weights(self.parts, _empty_weight(self, dtype) if out is None else out)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _forward(self, x)


def make_linear(tensors: Tensors, quantization: QuantizationConfig | None, shape: tuple[int, int]) -> Linear:
    """Return the linear stored as `tensors`, keyed by suffix."""
    if quantization is None:
        return DenseLinear(tensors["weight"], tensors.get("bias"))
    packed = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "bias"}
    return QuantizedLinear(packed, quantization, shape, tensors.get("bias"))


def stack(linears: Sequence[Linear], dtype: torch.dtype, *, keep_dequantized: bool = False) -> StackedLinear:
    """Stack linears that have the same input, for products in `dtype`.

    Adjacent dense weights are concatenated into one new weight in `dtype`, so the originals can be freed. Packed
    weights stay packed, unless `keep_dequantized` asks for a dequantized copy.
    """
    parts: list[Linear] = []
    for dense, adjacent in groupby(linears, lambda linear: keep_dequantized or isinstance(linear, DenseLinear)):
        run = list(adjacent)
        parts += [_concatenate(run, dtype)] if dense else run
    return StackedLinear(
        tuple(parts), tuple(linear.shape[0] for linear in linears), _concatenate_biases(linears, dtype)
    )


def dequantize(linear: Linear, dtype: torch.dtype) -> DenseLinear:
    """Return a dense copy in `dtype`: more memory, but no dequantization for each product."""
    return DenseLinear(linear.weight(dtype), None if linear.bias is None else linear.bias.to(dtype))


def _concatenate(linears: list[Linear], dtype: torch.dtype) -> DenseLinear:
    if len(linears) == 1:
        return DenseLinear(linears[0].weight(dtype))
    whole = StackedLinear(tuple(linears), tuple(linear.shape[0] for linear in linears))
    return DenseLinear(whole.weight(dtype))


def _concatenate_biases(linears: Sequence[Linear], dtype: torch.dtype) -> torch.Tensor | None:
    """Concatenate biases, with zeros for linears without one; None if no linear has a bias."""
    if all(linear.bias is None for linear in linears):
        return None
    zeros = (torch.zeros(linear.shape[0], dtype=dtype, device=linear.device) for linear in linears)
    return torch.cat(
        [zero if own.bias is None else own.bias.to(dtype) for own, zero in zip(linears, zeros, strict=True)]
    )


def _write_weights(linears: Sequence[Linear], out: torch.Tensor) -> torch.Tensor:
    """Write the weights of `linears` into consecutive rows of `out` [sum of outs, in]."""
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


def _forward(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T + b; a weight not stored in the dtype of x is written to the thread's workspace first."""
    stored = linear.parts[0] if isinstance(linear, StackedLinear) and len(linear.parts) == 1 else linear
    if isinstance(stored, DenseLinear) and stored.stored.dtype == x.dtype:
        weight = stored.stored
    else:
        rows, columns = linear.shape
        shape = (columns, rows) if linear.transposed else (rows, columns)
        buffer = Workspace.of(x.device).get_buffer("weight", shape, x.dtype)
        weight = linear.weight(x.dtype, buffer.t() if linear.transposed else buffer)
    return batch_invariant_linear(x, weight, None if linear.bias is None else linear.bias.to(x.dtype))


def batch_invariant_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b for x [T, in]; on CPUs, x is padded to `MIN_ROWS` rows.

    Each row has the same bits for every T, as far as the vendor's matmul kernels allow it.
    """
    padding_rows = 0 if x.is_cuda else max(0, MIN_ROWS - len(x))
    return F.linear(F.pad(x, (0, 0, 0, padding_rows)) if padding_rows else x, weight, bias)[: len(x)]
