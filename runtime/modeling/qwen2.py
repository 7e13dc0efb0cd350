"""A Qwen2 decoder block in plain torch.

A block is split into steps at its linear groups, so that quantization can read the input of each group. Scoring calls
the block, which runs the same steps in order, and takes a long conversation through them in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.checkpoints.model_config import BLOCK_LINEARS, BLOCK_NORMS, ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, QuantizationConfig
from runtime.modeling.attention import causal_attention, scored_token_attention
from runtime.modeling.elementwise import rms_norm, swiglu
from runtime.modeling.fp8 import Float8Linear, make_float8_linear
from runtime.modeling.linear import (
    Linear,
    StackedLinear,
    Tensors,
    dequantize,
    make_linear,
    stack,
)
from runtime.modeling.packed_batch import PackedBatch
from runtime.modeling.precision import Precision

QKV, _, GATE_UP, _ = BLOCK_LINEAR_GROUPS


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
        """Stack q, k and v, and gate and up. Afterwards quantization cannot use the block."""
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

    def __call__(self, hidden: torch.Tensor, batch: PackedBatch, *, in_place: bool = False) -> torch.Tensor:
        """Run the block: hidden states [T, H] to [T, H].

        Args:
            in_place: the result may overwrite `hidden`, which saves memory if the batch has several chunks.
        """
        if batch.tokens <= batch.chunk_tokens:
            return self.at_once(hidden, batch)
        out = hidden if in_place else torch.empty_like(hidden)
        key, value = self._keys_and_values(hidden, batch)
        for tokens, segments in reversed([*batch.chunks()]):  # as in `tiled_attention`, to use freed memory again
            query = self._queries(hidden[tokens], batch.positions[tokens])
            part = self.after_attention(hidden[tokens], causal_attention(query, key, value, segments))
            out[tokens] = self.after_mlp(part, self.mlp_activation(self.mlp_input(part)))
        return out

    def at_once(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Run the block on all tokens at once, even if the batch has several chunks."""
        hidden = self.after_attention(hidden, self.attention_context(self.attention_input(hidden), batch))
        return self.after_mlp(hidden, self.mlp_activation(self.mlp_input(hidden)))

    def at_scored_tokens(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Run the block, but return only the scored tokens, [S, H]; for the last block."""
        key, value = self._keys_and_values(hidden, batch)
        hidden = hidden[batch.scored]
        query = self._queries(hidden, batch.positions[batch.scored])
        hidden = self.after_attention(hidden, scored_token_attention(batch, query, key, value))
        return self.after_mlp(hidden, self.mlp_activation(self.mlp_input(hidden)))

    def _queries(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the queries of the tokens in `hidden` [Q, H] at `positions`: [Q, heads, head_dim]."""
        (query,) = self._project(QKV, self.attention_input(hidden), QKV[:1])
        return self._apply_rotary(self._heads(query), positions)

    def _keys_and_values(self, hidden: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and the values of all tokens, each [T, kv_heads, head_dim], computed in chunks."""
        keys, values = [], []
        for tokens, _ in batch.chunks():
            key, value = self._project(QKV, self.attention_input(hidden[tokens]), QKV[1:])
            keys.append(self._apply_rotary(self._heads(key), batch.positions[tokens]))
            values.append(self._heads(value))
        return torch.cat(keys), torch.cat(values)

    def _project(
        self, names: tuple[str, ...], x: torch.Tensor, wanted: Sequence[str] | None = None
    ) -> list[torch.Tensor]:
        """Return the outputs of linears that have the same input, or of the `wanted` ones."""
        wanted, stacked = wanted or names, self._stacked.get(names)
        if stacked is None:
            return [self.linears[name](x) for name in wanted]
        outputs = dict(zip(names, stacked(x).split(stacked.widths, -1), strict=True))
        return [outputs[name] for name in wanted]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.model_config.head_dim))

    def _apply_rotary(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.rotary.rotate(x.to(self.precision.residual_dtype), positions).to(self.precision.matmul_dtype)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.norms[name], self.model_config.rms_norm_eps).to(self.precision.matmul_dtype)
