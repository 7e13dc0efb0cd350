"""The public face: load a checkpoint, score conversations."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from runtime.batching import PackedBatch, pack
from runtime.chat import Rendered, Renderer
from runtime.checkpoint import Checkpoint, open_checkpoint
from runtime.conversation import Message
from runtime.devices import Memory, Names
from runtime.errors import NonFiniteError
from runtime.loading import load_blocks
from runtime.numerics import FLOAT32, Numerics
from runtime.pipeline import run_pipeline
from runtime.placement import Plan, make_plan
from runtime.preference import probability_preferred
from runtime.streaming import run_sweeps
from runtime.sweep import read_head


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
    """A loaded model and the one way to score with it.

    A score does not depend on what else is scored, in which order or in which batch, nor on where the blocks live.

    Attributes:
        plan: which block lives where, and how many tokens are computed at once.
        head: final norm and score head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan | None = None,
        *,
        numerics: Numerics = FLOAT32,
        token_budget: int | None = None,
    ):
        """Load a checkpoint as planned; without a plan, on the CPU, in `numerics` and with that token budget."""
        self.checkpoint = checkpoint
        self.plan = plan or make_plan(checkpoint, devices="cpu", dtype=numerics, token_budget=token_budget)
        self.renderer = Renderer.from_directory(checkpoint.directory, checkpoint.architecture.max_position_embeddings)
        self._embedding = checkpoint.read("model.embed_tokens.weight")
        self._shares = load_blocks(checkpoint, self.plan, Console(stderr=True))
        self.head = read_head(checkpoint, self._shares[-1].device)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        devices: Names = "auto",
        memory: Memory | None = None,
        dtype: str = "auto",
        token_budget: int | None = None,
        stream: bool = False,
    ) -> Scorer:
        """Load a directory, a hub id or `demo`, 16-bit or quantized.

        Args:
            devices: `auto`, `cpu`, or CUDA devices such as `cuda:0` or `cuda:0,cuda:1`. Several hold a part of the
                blocks each. Where the blocks do not fit, some are brought in for every call.
            memory: what may be used, as in `{"cuda:0": "20GiB"}` or `cuda:0=20GiB,cpu=40GiB`, in place of what is free;
                `cpu` is the host's.
            dtype: of matmul inputs, `float32` or `bfloat16`; `auto` is bfloat16 wherever that is faster. `fp8` rounds
                inputs and weights of the blocks' linears further, for GPTQ weights of 4 bits on GPUs since Ada.
            token_budget: tokens computed at once, in place of the plan's choice.
            stream: hold no block, and read each from disk for every call: the least memory. Bring many conversations.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
            PlanError: an unknown dtype, a device that is not there, or one without room for a single block.
        """
        checkpoint = open_checkpoint(source)
        plan = make_plan(
            checkpoint, devices=devices, memory=memory, dtype=dtype, token_budget=token_budget, stream=stream
        )
        return cls(checkpoint, plan)

    @property
    def numerics(self) -> Numerics:
        """In which dtypes it computes."""
        return self.plan.numerics

    @property
    def token_budget(self) -> int:
        """Tokens computed at once."""
        return self.plan.token_budget

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
        return Comparison(score_a, score_b, margin, probability_preferred(margin))

    def score_rendered(self, rendered: Sequence[Rendered]) -> torch.Tensor:
        """Scores fp32 [n] of conversations that are tokens already."""
        scores = self.head(self.hidden_at_scored(rendered))
        bad = (~torch.isfinite(scores)).nonzero()
        if len(bad):
            raise NonFiniteError(f"conversation {int(bad[0])} has a non-finite score: the score head overflowed.")
        return scores.cpu()

    def warm_up(self) -> None:
        """Score a full chunk of nothing in particular: what is compiled and allocated for one is there from then on.

        So a server's first request waits no longer than others, and what is free tells a next model the truth.
        """
        longest = self.checkpoint.architecture.max_position_embeddings
        lengths = [min(longest, self.token_budget - start) for start in range(0, self.token_budget, longest)]
        self.score_rendered([Rendered([row] + [0] * (length - 1), length - 1) for row, length in enumerate(lengths)])

    def scores(self, rendered: Sequence[Rendered]) -> list[float]:
        """`score_rendered` as plain numbers."""
        return self.score_rendered(rendered).tolist()

    @torch.inference_mode()
    def hidden_at_scored(self, rendered: Sequence[Rendered]) -> torch.Tensor:
        """What the head starts from: the last block's hidden states [n, H] at the scored tokens."""
        hidden = torch.empty(len(rendered), self.checkpoint.architecture.hidden_size, device=self._shares[-1].device)
        with closing(self._run(rendered)) as chunks:
            for batch, rows in chunks:
                hidden[list(batch.rows)] = rows.to(hidden.device, hidden.dtype)
        return hidden

    def _run(self, rendered: Sequence[Rendered]) -> Generator[tuple[PackedBatch, torch.Tensor], None, None]:
        """Batches with their hidden states [S, H] at the scored tokens."""
        batches = pack(rendered, self.plan.chunk_tokens(sum(len(each.token_ids) for each in rendered)))
        if self.plan.placement == "streamed":
            yield from run_sweeps(self._shares, self.plan, batches, self._embedding)
        else:
            yield from run_pipeline(self._shares, batches, self._embed)

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        # Widened where it arrives: half the bytes cross the bus.
        return self._embedding[batch.token_ids].to(self._shares[0].device).to(self.numerics.stream)
