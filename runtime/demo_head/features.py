"""What the score head sees: hidden states after the final norm, at each conversation's scored token."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from runtime.batching import pack
from runtime.chat import Rendered
from runtime.checkpoint import Checkpoint
from runtime.qwen2 import BFLOAT16, Block, Numerics, Rotary
from runtime.sweep import read_head

TOKENS_A_BATCH = 2048  # what a CPU's cache still likes


class Backbone:
    """All blocks of a small checkpoint in memory, for passes over many conversations."""

    def __init__(self, checkpoint: Checkpoint, numerics: Numerics = BFLOAT16):
        architecture = checkpoint.architecture
        rotary = Rotary(architecture, architecture.max_position_embeddings)
        tensors = (checkpoint.read_block(index) for index in range(architecture.num_hidden_layers))
        self.blocks = [Block.from_tensors(architecture, block, rotary, numerics) for block in tensors]
        self.embedding = checkpoint.read("model.embed_tokens.weight")
        self.head = read_head(checkpoint)
        self.numerics = numerics

    @torch.inference_mode()
    def features(self, rendered: Sequence[Rendered], label: str = "features") -> torch.Tensor:
        """fp32 [len(rendered), H], in the given order. Progress goes to stderr under `label`."""
        features = torch.empty(len(rendered), self.embedding.shape[1])
        batches = pack(rendered, TOKENS_A_BATCH)
        total, done, started = sum(batch.tokens for batch in batches), 0, time.monotonic()
        for batch in batches:
            hidden = self.embedding[batch.token_ids].to(self.numerics.stream)
            for block in self.blocks:
                hidden = block(hidden, batch)
            features[list(batch.rows)] = self.head.features(hidden[batch.scored]).float()
            done += batch.tokens
            minutes = (time.monotonic() - started) / done * (total - done) / 60
            print(f"\r{label}: {done:,} of {total:,} tokens, {minutes:.0f} min left ", end="", file=sys.stderr)
        print(file=sys.stderr)
        return features
