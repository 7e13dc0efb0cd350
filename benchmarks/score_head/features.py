"""Compute and store the score head's inputs: normalized hidden states at each conversation's scored token."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.common.files import atomic_file
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.block_loading import read_head
from runtime.modeling.linear import DenseLinear
from runtime.modeling.packed_batch import pack_batches
from runtime.modeling.precision import BFLOAT16, Precision
from runtime.modeling.qwen2 import Block, RotaryEmbedding

TOKENS_PER_BATCH = 2048  # so that activations fit the CPU cache
CONVERSATIONS_PER_SAVE = 200

WeightNoise = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""Adds noise to a weight [out, in] and keeps its dtype."""


class Backbone:
    """All blocks of a small checkpoint in memory, for passes over many conversations."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision = BFLOAT16,
        add_noise: WeightNoise | None = None,
        seed: int = 0,
    ):
        """Load the blocks; `add_noise` is applied to every weight of their linears."""
        model_config = checkpoint.model_config
        rotary = RotaryEmbedding(model_config, model_config.max_position_embeddings)
        tensors = (checkpoint.read_block(index) for index in range(model_config.num_hidden_layers))
        self.blocks = [Block.from_tensors(model_config, block, rotary, precision) for block in tensors]
        self.embedding = checkpoint.read("model.embed_tokens.weight")
        self.head = read_head(checkpoint)
        self.precision = precision
        generator = torch.Generator().manual_seed(seed)
        for linears in [block.linears for block in self.blocks] if add_noise else []:
            for name, linear in linears.items():
                assert isinstance(linear, DenseLinear) and add_noise
                linears[name] = DenseLinear(add_noise(linear.stored, generator), linear.bias)

    @torch.inference_mode()
    def features(self, rendered: Mapping[str, RenderedConversation], label: str) -> dict[str, torch.Tensor]:
        """Features fp32 [H] of every conversation, by key. Progress is printed to stderr with `label`."""
        keys, features = list(rendered), {}
        batches = pack_batches(list(rendered.values()), TOKENS_PER_BATCH)
        total, done, started = sum(batch.tokens for batch in batches), 0, time.monotonic()
        for batch in batches:
            hidden = self.embedding[batch.token_ids].to(self.precision.residual_dtype)
            for block in self.blocks:
                hidden = block(hidden, batch)
            rows = self.head.features(hidden[batch.scored]).float()
            features.update({keys[row]: vector.clone() for row, vector in zip(batch.rows, rows, strict=True)})
            done += batch.tokens
            minutes = (time.monotonic() - started) / done * (total - done) / 60
            print(f"\r{label}: {done:,} of {total:,} tokens, {minutes:.0f} min left ", end="", file=sys.stderr)
        print(file=sys.stderr)
        return features


def quantization_step_noise(weight: torch.Tensor, generator: torch.Generator, group_size: int) -> torch.Tensor:
    """Add uniform noise with the width of one step of a symmetric 4-bit grid in groups of `group_size`."""
    grouped = weight.float().unflatten(1, (-1, group_size))
    step = grouped.abs().amax(-1, keepdim=True) / 8
    noise = torch.rand(grouped.shape, generator=generator) - 0.5
    return (grouped + step * noise).flatten(1).to(weight.dtype)


def two_percent_noise(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add normal noise with a standard deviation of 2 % of each weight."""
    noise = torch.randn(weight.shape, generator=generator)
    return (weight.float() * (1 + 0.02 * noise)).to(weight.dtype)


class FeatureStore:
    """Features in a safetensors file, named `VARIANT/CONVERSATION`, so that an interrupted run can be resumed."""

    def __init__(self, path: Path):
        self.path = path
        self.features = load_file(path) if path.exists() else {}

    def add(self, variant: str, rendered: Mapping[str, RenderedConversation], backbone: Callable[[], Backbone]) -> None:
        """Compute the missing features of `rendered`; `backbone` is called only if some are missing."""
        missing = [key for key in rendered if f"{variant}/{key}" not in self.features]
        if not missing:
            return
        ready = backbone()
        for start in range(0, len(missing), CONVERSATIONS_PER_SAVE):
            part = {key: rendered[key] for key in missing[start : start + CONVERSATIONS_PER_SAVE]}
            computed = ready.features(part, f"{variant} {start} of {len(missing)}")
            self.features.update({f"{variant}/{key}": vector for key, vector in computed.items()})
            with atomic_file(self.path) as temporary:
                save_file(self.features, temporary)

    def keys(self, variant: str) -> list[str]:
        """Sorted keys of the conversations stored for `variant`."""
        prefix = variant + "/"
        return sorted(name.removeprefix(prefix) for name in self.features if name.startswith(prefix))

    def rows(self, variant: str, keys: list[str]) -> torch.Tensor:
        """Features fp32 [len(keys), H] of `variant`."""
        return torch.stack([self.features[f"{variant}/{key}"] for key in keys])
