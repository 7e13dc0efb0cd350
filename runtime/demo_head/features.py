"""What the score head sees: hidden states after the final norm, at each conversation's scored token."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from runtime.batching import pack
from runtime.chat import Rendered
from runtime.checkpoint import Checkpoint
from runtime.files import whole_file
from runtime.linear import DenseLinear
from runtime.numerics import BFLOAT16, Numerics
from runtime.qwen2 import Block, Rotary
from runtime.sweep import read_head

TOKENS_A_BATCH = 2048  # what a CPU's cache still likes
GROUP_SIZE = 64  # the largest common one that divides the demo's hidden size
AT_ONCE = 200  # conversations between two saves


Disturb = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""Weight [out, in] to the weight with noise in it, same dtype."""


class Backbone:
    """A small checkpoint's blocks, all in memory, for passes over many conversations."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        numerics: Numerics = BFLOAT16,
        disturb: Disturb | None = None,
        seed: int = 0,
    ):
        """`disturb` is applied to every linear weight of the blocks."""
        architecture = checkpoint.architecture
        rotary = Rotary(architecture, architecture.max_position_embeddings)
        tensors = (checkpoint.read_block(index) for index in range(architecture.num_hidden_layers))
        self.blocks = [Block.from_tensors(architecture, block, rotary, numerics) for block in tensors]
        self.embedding = checkpoint.read("model.embed_tokens.weight")
        self.head = read_head(checkpoint)
        self.numerics = numerics
        generator = torch.Generator().manual_seed(seed)
        for linears in [block.linears for block in self.blocks] if disturb else []:
            for name, linear in linears.items():
                assert isinstance(linear, DenseLinear) and disturb
                linears[name] = DenseLinear(disturb(linear.stored, generator), linear.bias)

    @torch.inference_mode()
    def features(self, rendered: Mapping[str, Rendered], label: str) -> dict[str, torch.Tensor]:
        """fp32 [H] of every conversation, under its key. Progress goes to stderr under `label`."""
        keys, features = list(rendered), {}
        batches = pack(list(rendered.values()), TOKENS_A_BATCH)
        total, done, started = sum(batch.tokens for batch in batches), 0, time.monotonic()
        for batch in batches:
            hidden = self.embedding[batch.token_ids].to(self.numerics.stream)
            for block in self.blocks:
                hidden = block(hidden, batch)
            seen = self.head.features(hidden[batch.scored]).float()
            features.update({keys[row]: vector.clone() for row, vector in zip(batch.rows, seen, strict=True)})
            done += batch.tokens
            minutes = (time.monotonic() - started) / done * (total - done) / 60
            print(f"\r{label}: {done:,} of {total:,} tokens, {minutes:.0f} min left ", end="", file=sys.stderr)
        print(file=sys.stderr)
        return features


def within_a_step(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uniform noise as wide as one step of a symmetric 4-bit grid."""
    grouped = weight.float().unflatten(1, (-1, GROUP_SIZE))
    step = grouped.abs().amax(-1, keepdim=True) / 8
    noise = torch.rand(grouped.shape, generator=generator) - 0.5
    return (grouped + step * noise).flatten(1).to(weight.dtype)


def by_two_percent(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal noise of 2 % of each weight."""
    noise = torch.randn(weight.shape, generator=generator)
    return (weight.float() * (1 + 0.02 * noise)).to(weight.dtype)


class FeatureStore:
    """Features on disk, named `VARIANT/CONVERSATION`, so that work cut off is not done again."""

    def __init__(self, path: Path):
        self.path = path
        self.features = load_file(path) if path.exists() else {}

    def add(self, variant: str, rendered: Mapping[str, Rendered], backbone: Callable[[], Backbone]) -> None:
        """Compute what is missing of `rendered` with `backbone`, which is made only if something is."""
        missing = [key for key in rendered if f"{variant}/{key}" not in self.features]
        if not missing:
            return
        ready = backbone()
        for start in range(0, len(missing), AT_ONCE):
            part = {key: rendered[key] for key in missing[start : start + AT_ONCE]}
            computed = ready.features(part, f"{variant} {start} of {len(missing)}")
            self.features.update({f"{variant}/{key}": vector for key, vector in computed.items()})
            with whole_file(self.path) as temporary:
                save_file(self.features, temporary)

    def keys(self, variant: str) -> list[str]:
        """The conversations stored under `variant`, sorted."""
        prefix = variant + "/"
        return sorted(name.removeprefix(prefix) for name in self.features if name.startswith(prefix))

    def rows(self, variant: str, keys: list[str]) -> torch.Tensor:
        """fp32 [len(keys), H]."""
        return torch.stack([self.features[f"{variant}/{key}"] for key in keys])
