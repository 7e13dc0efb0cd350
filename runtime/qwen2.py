"""The Qwen2 reward model in plain torch: block, embedding, final norm and score head.

A block is written as the four steps between its linear groups, so that quantization can stop at each and
look at what goes in; scoring calls the block itself, which is the same steps in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.architecture import BLOCK_LINEARS, BLOCK_NORMS, Architecture
from runtime.batching import PackedBatch
from runtime.linear import Linear, Tensors, make_linear
from runtime.quantization import Quantization


@dataclass(frozen=True)
class Numerics:
    """In which dtypes a block computes.

    Attributes:
        stream: the residual stream and everything elementwise (norms, rotary embedding, SwiGLU).
        matmul: inputs of matrix products and attention; products accumulate in fp32.
    """

    stream: torch.dtype
    matmul: torch.dtype


# A small model of this family carries activations near 1.5e4 in one channel at the scored token, where a
# bf16 residual loses what the head needs. So the stream is fp32 even when products are bf16.
FLOAT32 = Numerics(torch.float32, torch.float32)
BFLOAT16 = Numerics(torch.float32, torch.bfloat16)
# What a user gets from transformers with dtype=bfloat16: the noise floor that parity is held against.
PLAIN_BFLOAT16 = Numerics(torch.bfloat16, torch.bfloat16)


class Rotary:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864), rotate-half layout."""

    def __init__(self, architecture: Architecture, length: int, device: torch.device | str = "cpu"):
        """Tabulate positions 0 to `length` - 1."""
        exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
        angles = torch.arange(length, dtype=torch.float32)[:, None] / architecture.rope_theta**exponents
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)  # [length, head_dim / 2]

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, head_dim] by its positions [T], in x's dtype."""
        cos, sin = (table[positions][:, None].to(x.dtype) for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of hidden [T, H] in fp32, scaled in hidden's dtype."""
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(hidden.dtype) * weight.to(hidden.dtype)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: tuple[int, ...]
) -> torch.Tensor:
    """Exact causal attention within each packed sequence.

    Args:
        query: [T, heads, head_dim].
        key, value: [T, kv_heads, head_dim].
        cu_seqlens: boundaries of the sequences.

    Returns:
        [T, heads * head_dim].
    """
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)[0])
    return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)


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

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What q, k and v see: [T, H] in the matmul dtype."""
        return self._norm("input_layernorm.weight", hidden)

    def attention_context(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """What the output projection sees, from `attention_input`: [T, heads * head_dim]."""
        query, key, value = (
            self.linears[f"self_attn.{name}_proj"](x).unflatten(-1, (-1, self.architecture.head_dim)) for name in "qkv"
        )
        query, key = (
            self.rotary.turn(x.to(self.numerics.stream), batch.positions).to(self.numerics.matmul) for x in (query, key)
        )
        return causal_attention(query, key, value, batch.cu_seqlens)

    def after_attention(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The residual stream after attention: [T, H]."""
        return hidden + self.linears["self_attn.o_proj"](context)

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What gate and up see: [T, H] in the matmul dtype."""
        return self._norm("post_attention_layernorm.weight", hidden)

    def mlp_activation(self, x: torch.Tensor) -> torch.Tensor:
        """What the down projection sees, from `mlp_input`: [T, I]."""
        gate = self.linears["mlp.gate_proj"](x).to(self.numerics.stream)
        up = self.linears["mlp.up_proj"](x).to(self.numerics.stream)
        return F.silu(gate).mul_(up).to(self.numerics.matmul)

    def after_mlp(self, hidden: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
        """The residual stream after the MLP: [T, H]."""
        return hidden + self.linears["mlp.down_proj"](activation)

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """hidden [T, H] to hidden [T, H]."""
        hidden = self.after_attention(hidden, self.attention_context(self.attention_input(hidden), batch))
        return self.after_mlp(hidden, self.mlp_activation(self.mlp_input(hidden)))

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
        inner = F.linear(features, self.score_0_weight.to(dtype), self.score_0_bias.to(dtype)).relu()
        return F.linear(inner, self.score_2_weight.to(dtype), self.score_2_bias.to(dtype)).float().squeeze(-1)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(self.features(hidden))
