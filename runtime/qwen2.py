"""The Qwen2 reward model in plain torch: block, embedding, final norm and score head.

A block is written as the four steps between its linear groups, so that quantization can stop at each and
look at what goes in; scoring calls the block itself, which is the same steps in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.architecture import BLOCK_LINEARS, BLOCK_NORMS, Architecture
from runtime.attention import attention_at, causal_attention
from runtime.batching import PackedBatch
from runtime.float8 import Float8Linear, in_float8
from runtime.linear import Linear, StackedLinear, Tensors, densify, make_linear, multiply, stack
from runtime.numerics import Numerics
from runtime.quantization import BLOCK_LINEAR_GROUPS, Quantization

QKV, _, GATE_UP, _ = BLOCK_LINEAR_GROUPS
SWIGLU_AT_ONCE = 1 << 18


class Rotary:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864), rotate-half layout."""

    def __init__(self, architecture: Architecture, length: int, device: torch.device | str = "cpu"):
        """Tabulate positions 0 to `length` - 1."""
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        angles = torch.arange(length, dtype=torch.float32)[:, None] / architecture.rope_theta**exponents
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat((cos, cos), dim=-1).to(device)  # [length, head_dim]
        self.sin = torch.cat((-sin, sin), dim=-1).to(device)

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, head_dim] by its positions [T], in x's dtype."""
        cos, sin = (table[positions][:, None].to(x.dtype) for table in (self.cos, self.sin))
        return (x * cos).add_(x.roll(x.shape[-1] // 2, dims=-1).mul_(sin))


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of hidden [T, H] in fp32, scaled in hidden's dtype."""
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(hidden.dtype) * weight.to(hidden.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """silu(gate) * up of [T, I], computed in the stream's dtype, in the matmul dtype.

    On a CPU some rows at a time, so that what is between stays in cache.
    """
    rows = len(gate) if gate.is_cuda else max(1, SWIGLU_AT_ONCE // gate.shape[1])
    product = torch.empty_like(gate, dtype=numerics.matmul, memory_format=torch.contiguous_format)
    for out, *parts in zip(product.split(rows), gate.split(rows), up.split(rows), strict=True):
        some, others = (part.to(numerics.stream) for part in parts)
        out.copy_(F.silu(some).mul_(others))
    return product


class Block:
    """One decoder block. Its linears can be replaced while a quantization passes through it."""

    def __init__(
        self, architecture: Architecture, norms: Tensors, linears: dict[str, Linear], rotary: Rotary, numerics: Numerics
    ):
        """`norms` and `linears` are keyed as in `BLOCK_NORMS` and `BLOCK_LINEARS`."""
        self.architecture = architecture
        self.norms = norms
        self.linears = linears
        self.rotary = rotary
        self.numerics = numerics
        self._stacked: dict[tuple[str, ...], StackedLinear | Float8Linear] = {}

    @classmethod
    def from_tensors(
        cls,
        architecture: Architecture,
        tensors: Tensors,
        rotary: Rotary,
        numerics: Numerics,
        quantization: Quantization | None = None,
    ) -> Block:
        """A block from its stored tensors, named without their `model.layers.N.` prefix."""
        linears = {}
        for name in BLOCK_LINEARS:
            stored = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
            linears[name] = make_linear(stored, quantization, architecture.linear_shape(name))
        return cls(architecture, {name: tensors[name] for name in BLOCK_NORMS}, linears, rotary, numerics)

    def densify(self) -> None:
        """Keep dequantized copies of all weights in the matmul dtype, in place of the stored ones."""
        self.linears = {name: densify(linear, self.numerics.matmul) for name, linear in self.linears.items()}

    def stack(self) -> None:
        """Make q, k and v one product, and gate and up another. `at_scored` and a quantization need them apart."""
        for names in (QKV, GATE_UP):
            linears = [self.linears.pop(name) for name in names]
            self._stacked[names] = stack(linears, self.numerics.matmul)

    def to_float8(self) -> None:
        """Let packed GPTQ weights be multiplied in fp8. After `stack`, which takes no others."""
        self.linears = {name: in_float8(linear) for name, linear in self.linears.items()}
        self._stacked = {names: in_float8(linear) for names, linear in self._stacked.items()}

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What q, k and v see: [T, H] in the matmul dtype."""
        return self._norm("input_layernorm.weight", hidden)

    def attention_context(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What the output projection sees, from `attention_input`: [T, heads * head_dim]."""
        query, key, value = (self._heads(each) for each in self._project(QKV, x))
        query, key = (self._turn(each, batch.positions) for each in (query, key))
        return causal_attention(query, key, value, batch.segments)

    def scored_context(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """`attention_context` at the scored tokens alone: [S, heads * head_dim]."""
        query, key, value = (self._heads(self.linears[name](x[batch.scored] if name == QKV[0] else x)) for name in QKV)
        query = self._turn(query, batch.positions[batch.scored])
        return attention_at(batch, query, self._turn(key, batch.positions), value)

    def after_attention(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The residual stream after attention: [T, H]."""
        return hidden + self.linears["self_attn.o_proj"](context)

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What gate and up see: [T, H] in the matmul dtype."""
        return self._norm("post_attention_layernorm.weight", hidden)

    def mlp_activation(self, x: torch.Tensor) -> torch.Tensor:
        """What the down projection sees, from `mlp_input`: [T, I]."""
        gate, up = self._project(GATE_UP, x)
        return swiglu(gate, up, self.numerics)

    def after_mlp(self, hidden: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """The residual stream after the MLP: [T, H]."""
        return hidden + self.linears["mlp.down_proj"](activation)

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """hidden [T, H] to hidden [T, H]."""
        hidden = self.after_attention(hidden, self.attention_context(self.attention_input(hidden), batch))
        return self.after_mlp(hidden, self.mlp_activation(self.mlp_input(hidden)))

    def at_scored(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """hidden [T, H] to hidden [S, H] at the scored tokens: all that anybody needs of the last block."""
        context = self.scored_context(self.attention_input(hidden), batch)
        hidden = self.after_attention(hidden[batch.scored], context)
        return self.after_mlp(hidden, self.mlp_activation(self.mlp_input(hidden)))

    def _project(self, names: tuple[str, ...], x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The outputs of linears that see the same input."""
        stacked = self._stacked.get(names)
        return [self.linears[name](x) for name in names] if stacked is None else stacked(x).split(stacked.widths, -1)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.architecture.head_dim))

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.rotary.turn(x.to(self.numerics.stream), positions).to(self.numerics.matmul)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.norms[name], self.architecture.rms_norm_eps).to(self.numerics.matmul)


@dataclass(frozen=True)
class ScoreHead:
    """Final norm, then `Linear -> ReLU -> Linear`. Never quantized; computed in the stream's dtype.

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
        """What the head sees, from the last block's hidden states [S, H] at the scored tokens."""
        return rms_norm(hidden, self.norm, self.eps)

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """features [S, H] to scores fp32 [S]."""
        dtype = features.dtype
        inner = multiply(features, self.score_0_weight.to(dtype), self.score_0_bias.to(dtype)).relu()
        # Not as a product: one of a single column sums in another order for some of its rows.
        score = (inner.float() * self.score_2_weight.to(dtype).float()).sum(-1) + self.score_2_bias.to(dtype).float()
        return score.to(dtype).float()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(self.features(hidden))
