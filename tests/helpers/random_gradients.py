"""Gradient statistics of a block as the backward sweep saves them, from random gradients."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from quantize.gradients.statistics import BlockGradients, GradientStatistics
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig


def random_gradients(model_config: ModelConfig, tokens: int, seed: int = 0) -> GradientStatistics:
    """Statistics of `tokens` tokens, whose gradients differ in size."""
    generator = torch.Generator().manual_seed(seed)
    gradients = BlockGradients(model_config, tokens, "cpu")
    sizes = torch.rand(tokens, 1, generator=generator)
    for name in BLOCK_LINEARS:
        out_features, in_features = model_config.linear_shape(name)
        each = sizes * torch.randn(tokens, out_features, generator=generator)
        gradients.add(slice(0, tokens), None, name, each, torch.zeros(tokens, in_features))
    with TemporaryDirectory() as directory:
        gradients.save(Path(directory) / "gradients.safetensors")
        return GradientStatistics(Path(directory) / "gradients.safetensors", "cpu")
