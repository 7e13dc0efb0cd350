"""A block that autograd can differentiate, and whose linears report the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from runtime.modeling.attention import tiled_attention
from runtime.modeling.linear import Linear
from runtime.modeling.packed_batch import PackedBatch
from runtime.modeling.qwen2 import GATE_UP, QKV, Block

GradientCallback = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with a linear's name, the gradient [T, N] of its output and its input [T, K], both in the matmul dtype."""


class DifferentiableBlock(Block):
    """A block of dense linears; steps that work in place are replaced by steps that autograd can differentiate."""

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, *, in_place: bool = False) -> torch.Tensor:
        return self.at_once(hidden, batch)  # in chunks, keys and values would be recorded twice

    def attention_context(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        query, key, value = (self._heads(projected) for projected in self._project(QKV, x))
        query, key = (self._apply_rotary(heads, batch.positions) for heads in (query, key))
        return tiled_attention(query, key, value, batch.segments)

    def mlp_activation(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (each.to(self.precision.residual_dtype) for each in self._project(GATE_UP, x))
        return (F.silu(gate) * up).to(self.precision.matmul_dtype)

    def gradient(
        self, hidden: torch.Tensor, batch: PackedBatch, gradient: torch.Tensor, on_gradient: GradientCallback
    ) -> torch.Tensor:
        """Backpropagate through the block, which is computed again: [T, H] to [T, H].

        Args:
            hidden: the block's input.
            gradient: of the scores by the block's output.
            on_gradient: called for each linear.
        """
        linears = self.linears
        self.linears = {name: _Recorder(linear, partial(on_gradient, name)) for name, linear in linears.items()}  # type: ignore[misc]
        try:
            with torch.enable_grad():
                entry = hidden.detach().requires_grad_()
                (result,) = torch.autograd.grad(self(entry, batch), entry, gradient)
        finally:
            self.linears = linears
        return result


class _Recorder:
    """A linear whose backward pass passes the gradient of its output, and its input, to `record`."""

    def __init__(self, linear: Linear, record: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self.linear, self.record = linear, record

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _RecordedProduct.apply(x, self.linear, self.record)


class _RecordedProduct(torch.autograd.Function):
    """y = x W^T + b. No weight is saved: a cast one is in the thread's workspace, which the next linear overwrites."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, linear: Linear, record: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.linear, ctx.record = linear, record
        ctx.save_for_backward(x)
        return linear(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.record(gradient, *ctx.saved_tensors)
        return gradient @ ctx.linear.weight(gradient.dtype), None, None
