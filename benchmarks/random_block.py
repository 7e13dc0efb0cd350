"""A transformer block of random weights in every storage format, for benchmarks."""

from __future__ import annotations

import torch

from runtime.checkpoints.model_config import BLOCK_LINEARS, BLOCK_NORMS, ModelConfig
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.modeling.linear import DenseLinear, Linear, make_linear
from runtime.modeling.precision import BFLOAT16, FLOAT8
from runtime.modeling.qwen2 import Block, RotaryEmbedding
from tests.helpers.packed import packed_tensors


class RandomBlock:
    """Random weights of one block's shapes; `kind` is `16-bit`, `gptq-4`, `gptq-4 fp8` or `nf4`."""

    def __init__(self, model_config: ModelConfig, quantization: QuantizationConfig, device: str):
        self.model_config, self.quantization, self.device = model_config, quantization, device
        self.generator = torch.Generator(device).manual_seed(0)

    def block(self, kind: str, max_positions: int) -> Block:
        """A block of random weights."""
        linears = {name: self.linear(name, kind) for name in BLOCK_LINEARS}
        norms = {name: torch.ones(self.model_config.hidden_size, device=self.device) for name in BLOCK_NORMS}
        precision = FLOAT8 if kind.endswith("fp8") else BFLOAT16
        block = Block(
            self.model_config, norms, linears, RotaryEmbedding(self.model_config, max_positions, self.device), precision
        )
        block.stack()
        if precision.float8:
            block.to_float8()
        return block

    def linear(self, name: str, kind: str) -> Linear:
        if kind == "16-bit":
            return DenseLinear(self.weight(name))
        shape = self.model_config.linear_shape(name)
        quantization = QuantizationConfig("nf4", 4) if kind == "nf4" else self.quantization
        tensors = {suffix: each.to(self.device) for suffix, each in packed_tensors(shape, quantization).items()}
        if "scales" in tensors:
            tensors["scales"] = torch.full_like(tensors["scales"], 0.2 * shape[1] ** -0.5)
        return make_linear(tensors, quantization, shape)

    def weight(self, name: str) -> torch.Tensor:
        out_features, in_features = self.model_config.linear_shape(name)
        weight = torch.randn(out_features, in_features, device=self.device, generator=self.generator)
        return (weight * in_features**-0.5).bfloat16()
