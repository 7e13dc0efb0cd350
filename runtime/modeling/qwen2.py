"""Qwen2 reward model in plain torch: rotary embedding, decoder block, final norm and score head.

A block is split into steps at its linear groups, so that quantization can read the input of each group. Scoring calls
the block, which runs the same steps in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.checkpoints.model_config import BLOCK_LINEARS, BLOCK_NORMS, ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, QuantizationConfig
from runtime.modeling.attention import causal_attention, scored_token_attention
from runtime.modeling.fp8 import Float8Linear, make_float8_linear
from runtime.modeling.linear import (
    Linear,
    StackedLinear,
    Tensors,
    batch_invariant_linear,
    dequantize,
    make_linear,
    stack,
)
from runtime.modeling.packed_batch import PackedBatch
from runtime.modeling.precision import Precision

QKV, _, GATE_UP, _ = BLOCK_LINEAR_GROUPS
SWIGLU_CHUNK_SIZE = 1 << 18  # elements per chunk on a CPU


class RotaryEmbedding:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the rotate-half layout."""

    def __init__(self, model_config: ModelConfig, length: int, device: torch.device | str = "cpu"):
        """Compute cosines and sines for positions 0 to `length` - 1."""
        exponents = torch.arange(0, model_config.head_dim, 2, dtype=torch.float32) / model_config.head_dim
        angles = torch.arange(length, dtype=torch.float32)[:, None] / model_config.rope_theta**exponents
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat((cos, cos), dim=-1).to(device)  # [length, head_dim]
        self.sin = torch.cat((-sin, sin), dim=-1).to(device)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, head_dim] by `positions` [T], in the dtype of x."""
        cos, sin = (table[positions][:, None].to(x.dtype) for table in (self.cos, self.sin))
        return (x * cos).add_(x.roll(x.shape[-1] // 2, dims=-1).mul_(sin))


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


class Block:
    """A decoder block. Quantization replaces its linears one by one."""

    def __init__(
        self,
        model_config: ModelConfig,
        norms: Tensors,
        linears: dict[str, Linear],
        rotary: RotaryEmbedding,
        precision: Precision,
    ):
        """`norms` and `linears` are keyed as in `BLOCK_NORMS` and `BLOCK_LINEARS`."""
        self.model_config = model_config
        self.norms = norms
        self.linears = linears
        self.rotary = rotary
        self.precision = precision
        self._stacked: dict[tuple[str, ...], StackedLinear | Float8Linear] = {}

    @classmethod
    def from_tensors(
        cls,
        model_config: ModelConfig,
        tensors: Tensors,
        rotary: RotaryEmbedding,
        precision: Precision,
        quantizations: Mapping[str, QuantizationConfig] | None = None,
    ) -> Block:
        """Create a block from its stored tensors, named without their `model.layers.N.` prefix.

        Args:
            quantizations: of each linear, by name; None if the block is unquantized.
        """
        linears = {}
        for name in BLOCK_LINEARS:
            stored = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
            quantization = quantizations[name] if quantizations else None
            linears[name] = make_linear(stored, quantization, model_config.linear_shape(name))
        return cls(model_config, {name: tensors[name] for name in BLOCK_NORMS}, linears, rotary, precision)

    def dequantize(self) -> None:
        """Replace the stored weights by dequantized copies in the matmul dtype."""
        self.linears = {name: dequantize(linear, self.precision.matmul_dtype) for name, linear in self.linears.items()}

    def stack(self) -> None:
        """Stack q, k and v, and gate and up. Afterwards `at_scored_tokens` and quantization cannot use the block."""
        for names in (QKV, GATE_UP):
            linears = [self.linears.pop(name) for name in names]
            self._stacked[names] = stack(linears, self.precision.matmul_dtype)

    def to_float8(self) -> None:
        """Multiply packed GPTQ weights in fp8. Call `stack` first: it does not accept fp8 linears."""
        self.linears = {name: make_float8_linear(linear) for name, linear in self.linears.items()}
        self._stacked = {names: make_float8_linear(linear) for names, linear in self._stacked.items()}

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of q, k and v: [T, H] in the matmul dtype."""
        return self._norm("input_layernorm.weight", hidden)

    def attention_context(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Return the input of o_proj, given `attention_input`: [T, heads * head_dim]."""
        query, key, value = (self._heads(projected) for projected in self._project(QKV, x))
        query, key = (self._apply_rotary(heads, batch.positions) for heads in (query, key))
        return causal_attention(query, key, value, batch.segments)

    def scored_attention_context(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Return `attention_context` at the scored tokens only: [S, heads * head_dim]."""
        query, key, value = (self._heads(self.linears[name](x[batch.scored] if name == QKV[0] else x)) for name in QKV)
        query = self._apply_rotary(query, batch.positions[batch.scored])
        return scored_token_attention(batch, query, self._apply_rotary(key, batch.positions), value)

    def after_attention(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return the residual stream after attention: [T, H]."""
        return hidden + self.linears["self_attn.o_proj"](context)

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of gate and up: [T, H] in the matmul dtype."""
        return self._norm("post_attention_layernorm.weight", hidden)

    def mlp_activation(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input of down_proj, given `mlp_input`: [T, I]."""
        gate, up = self._project(GATE_UP, x)
        return swiglu(gate, up, self.precision)

    def after_mlp(self, hidden: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """Return the residual stream after the MLP: [T, H]."""
        return hidden + self.linears["mlp.down_proj"](activation)

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Run the block: hidden states [T, H] to [T, H]."""
        hidden = self.after_attention(hidden, self.attention_context(self.attention_input(hidden), batch))
        return self.after_mlp(hidden, self.mlp_activation(self.mlp_input(hidden)))

    def at_scored_tokens(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Run the block, but return only the scored tokens, [S, H]; for the last block."""
        context = self.scored_attention_context(self.attention_input(hidden), batch)
        hidden = self.after_attention(hidden[batch.scored], context)
        return self.after_mlp(hidden, self.mlp_activation(self.mlp_input(hidden)))

    def _project(self, names: tuple[str, ...], x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the outputs of linears that have the same input."""
        stacked = self._stacked.get(names)
        return [self.linears[name](x) for name in names] if stacked is None else stacked(x).split(stacked.widths, -1)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.model_config.head_dim))

    def _apply_rotary(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.rotary.rotate(x.to(self.precision.residual_dtype), positions).to(self.precision.matmul_dtype)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.norms[name], self.model_config.rms_norm_eps).to(self.precision.matmul_dtype)


@dataclass(frozen=True)
class ScoreHead:
    """Final norm, then `Linear -> ReLU -> Linear`. Never quantized; computed in the residual dtype.

    Attributes:
        norm: [H]; score_0_weight: [H, H]; score_0_bias: [H]; score_2_weight: [1, H]; score_2_bias: [1].
    """

    norm: torch.Tensor
    score_0_weight: torch.Tensor
    score_0_bias: torch.Tensor
    score_2_weight: torch.Tensor
    score_2_bias: torch.Tensor
    eps: float

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of the head, given hidden states [S, H] of the last block at the scored tokens."""
        return rms_norm(hidden, self.norm, self.eps)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Return scores fp32 [S] for features [S, H]."""
        dtype = features.dtype
        inner = batch_invariant_linear(features, self.score_0_weight.to(dtype), self.score_0_bias.to(dtype)).relu()
        # Not a matrix product: with a single output column, the order of summation can differ between rows.
        score = (inner.float() * self.score_2_weight.to(dtype).float()).sum(-1) + self.score_2_bias.to(dtype).float()
        return score.to(dtype).float()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(self.features(hidden))
