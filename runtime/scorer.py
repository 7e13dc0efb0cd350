"""The public face: load a checkpoint, score conversations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.batching import PackedBatch, pack
from runtime.chat import Rendered, Renderer
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.conversation import Message
from runtime.errors import NonFiniteError
from runtime.numerics import FLOAT32, NUMERICS, Numerics, matmul_dtype
from runtime.qwen2 import Block, Rotary
from runtime.sweep import check_finite, read_blocks, read_head

TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt.

    Attributes:
        margin: score_a - score_b.
        probability_a: P(A preferred) = sigmoid(margin), the Bradley-Terry reading of the scores.
    """

    score_a: float
    score_b: float
    margin: float
    probability_a: float


class Scorer:
    """A resident model and the one way to score with it.

    A score does not depend on what else is scored, in which order or in which batch.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        numerics: Numerics = FLOAT32,
        token_budget: int = TOKEN_BUDGET,
    ):
        """`token_budget` is the tokens computed at once."""
        self.checkpoint = checkpoint
        self.device = device
        self.token_budget = token_budget
        self.numerics = numerics
        architecture = checkpoint.architecture
        self.renderer = Renderer.from_directory(checkpoint.directory, architecture.max_position_embeddings)
        rotary = Rotary(architecture, architecture.max_position_embeddings, device)
        self._embedding = checkpoint.read("model.embed_tokens.weight")
        self._blocks = [
            Block.from_tensors(
                architecture,
                {name: tensor.to(device) for name, tensor in tensors.items()},
                rotary,
                self.numerics,
                checkpoint.quantization,
            )
            for _, tensors in read_blocks(checkpoint)
        ]
        for block in self._blocks[:-1]:
            block.stack()
        self.head = read_head(checkpoint, device)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, devices: str = "auto", dtype: str = "auto", token_budget: int = TOKEN_BUDGET
    ) -> Scorer:
        """Load a directory, a hub id or `demo`, 16-bit or quantized.

        Args:
            devices: `auto`, `cpu` or one CUDA device such as `cuda:0`; the model must fit there.
            dtype: of matmul inputs, `float32` or `bfloat16`; `auto` is bfloat16 wherever that is faster.
            token_budget: tokens computed at once.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
            PlanError: an unknown dtype, or a device that is not there.
        """
        device = ("cuda:0" if torch.cuda.is_available() else "cpu") if devices == "auto" else devices
        numerics = NUMERICS[matmul_dtype(dtype, device)]
        return cls(open_checkpoint(source), device=device, numerics=numerics, token_budget=token_budget)

    def score(self, conversations: Sequence[Sequence[Message]], *, truncate: bool = False) -> torch.Tensor:
        """Scores fp32 [n] of conversations that end in the response to be judged.

        Raises:
            ConversationError: a conversation is malformed or, unless `truncate`, too long.
            NonFiniteError: naming the conversation and the block that first showed it.
        """
        rendered = [
            self.renderer.render(conversation, truncate=truncate, where=f"conversation {row}")
            for row, conversation in enumerate(conversations)
        ]
        return self.score_rendered(rendered)

    def compare(self, prompt: Sequence[Message] | str, response_a: str, response_b: str) -> Comparison:
        """Score two responses to one prompt, which is a question or the turns before the response."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        both = [[*turns, {"role": "assistant", "content": text}] for text in (response_a, response_b)]
        score_a, score_b = self.score(both).tolist()
        margin = score_a - score_b
        return Comparison(score_a, score_b, margin, _sigmoid(margin))

    def score_rendered(self, rendered: Sequence[Rendered]) -> torch.Tensor:
        """Scores fp32 [n] of conversations that are tokens already."""
        scores = self.head(self.hidden_at_scored(rendered))
        bad = (~torch.isfinite(scores)).nonzero()
        if len(bad):
            raise NonFiniteError(f"conversation {int(bad[0])} has a non-finite score: the score head overflowed.")
        return scores.cpu()

    @torch.inference_mode()
    def hidden_at_scored(self, rendered: Sequence[Rendered]) -> torch.Tensor:
        """What the head starts from: the last block's hidden states [n, H] at the scored tokens."""
        hidden = torch.empty(len(rendered), self.checkpoint.architecture.hidden_size, device=self.device)
        for batch in pack(rendered, self.token_budget):
            hidden[list(batch.rows)] = self._pass(batch.to(self.device)).float()
        return hidden

    def _pass(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states [S, H] at the scored tokens after the last block."""
        hidden = self._embedding[batch.token_ids.cpu()].to(self.device, self.numerics.stream)
        *blocks, last = self._blocks
        for index, block in enumerate(blocks):
            hidden = block(hidden, batch)
            check_finite(hidden, batch, f"block {index}")
        hidden = last.at_scored(hidden, batch)
        check_finite(hidden, batch, f"block {len(blocks)}", scored=True)
        return hidden


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
