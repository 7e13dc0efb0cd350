"""Load a reward model, score conversations, and compare two responses."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.common.errors import ConversationError, KitError, in_conversation
from runtime.common.terminal import CommandConsole
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.block_loading import load_blocks, read_head
from runtime.execution.devices import DeviceNames, MemoryLimits
from runtime.execution.nonfinite import FiniteRecord, nonfinite_error
from runtime.execution.pipeline import Chunk, run_pipeline
from runtime.execution.placement import plan_placement
from runtime.execution.placement_plan import PlacementPlan
from runtime.execution.streaming import run_sweeps
from runtime.modeling.packed_batch import PackedBatch, pack_batches
from runtime.modeling.precision import FLOAT32, Precision


def probability_preferred(margin: float) -> float:
    """Bradley-Terry probability that the first response is preferred, from its score minus the second one's."""
    return math.exp(min(margin, 0)) / (1 + math.exp(-abs(margin)))  # exp of a non-positive number cannot overflow


ScoreResult = float | KitError
"""A score, or why a conversation has none."""


@dataclass(frozen=True)
class Comparison:
    """Scores of two responses to one prompt.

    Attributes:
        margin: score_a - score_b.
        probability_a: P(A preferred) = sigmoid(margin), the Bradley-Terry model.
    """

    score_a: float
    score_b: float
    margin: float
    probability_a: float


class Scorer:
    """A loaded reward model.

    A conversation's score does not depend on the other conversations, their order, the batch size or the placement.

    Attributes:
        plan: which device holds which blocks, and how many tokens are computed at once.
        renderer: turns conversations into token ids.
        head: final norm and score head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: PlacementPlan | None = None,
        *,
        precision: Precision = FLOAT32,
        token_budget: int | None = None,
    ):
        """Load a checkpoint as `plan` says.

        Without a plan, load it on the CPU with `precision` and `token_budget`, which are otherwise ignored.
        """
        self.checkpoint = checkpoint
        self.plan = plan or plan_placement(checkpoint, devices="cpu", dtype=precision, token_budget=token_budget)
        self.renderer = checkpoint.renderer()
        self._embedding = checkpoint.read("model.embed_tokens.weight")
        self._device_blocks = load_blocks(checkpoint, self.plan, CommandConsole())
        self.head = read_head(checkpoint, self._device_blocks[-1].device).cast(self.precision.residual_dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        devices: DeviceNames = "auto",
        memory: MemoryLimits | None = None,
        dtype: str = "auto",
        token_budget: int | None = None,
        stream: bool = False,
    ) -> Scorer:
        """Load a 16-bit or quantized checkpoint.

        Args:
            source: a directory, a hub id such as `Qwen/WorldPM-72B` or `Qwen/WorldPM-72B@main`, or `demo`.
            devices: `auto`, `cpu`, or CUDA devices such as `cuda:0` or `cuda:0,cuda:1`. Blocks are split over several
                devices. Blocks that do not fit are streamed for every call.
            memory: memory limit per device, such as `{"cuda:0": "20GiB"}` or `cuda:0=20GiB,cpu=40GiB`, where `cpu` is
                host memory; 90 % of the free memory by default.
            dtype: of matmul inputs, `float32`, `bfloat16` or `fp8`; `auto` is bfloat16 where that is faster, else
                float32. `fp8` also rounds inputs and weights of the blocks' linears to fp8; it needs 4-bit GPTQ weights
                and a GPU of Ada or later.
            token_budget: tokens computed at once; chosen from device and memory by default.
            stream: keep no block in memory and read each from disk for every call, which takes the least memory. Pass
                many conversations per call then.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
            ConfigurationError: an unknown dtype or device, or a device without room for one block.
        """
        checkpoint = open_checkpoint(source)
        plan = plan_placement(
            checkpoint, devices=devices, memory=memory, dtype=dtype, token_budget=token_budget, stream=stream
        )
        return cls(checkpoint, plan)

    @property
    def precision(self) -> Precision:
        """The dtypes of the computation."""
        return self.plan.precision

    @property
    def token_budget(self) -> int:
        """Tokens computed at once."""
        return self.plan.token_budget

    def score(self, conversations: Sequence[Sequence[ChatMessage]], *, truncate: bool = False) -> torch.Tensor:
        """Score conversations, each ending with the response to be judged.

        Args:
            truncate: drop the oldest whole turns of a conversation that is too long.

        Returns:
            fp32 [n], on the CPU.

        Raises:
            ConversationError: a conversation is malformed or, unless `truncate`, too long.
            NonFiniteError: naming the first block and conversation with a NaN or infinity.
        """
        rendered = [
            self.renderer.render(conversation, truncate=truncate, where=f"conversation {row}")
            for row, conversation in enumerate(conversations)
        ]
        return self.score_rendered(rendered)

    def compare(self, prompt: Sequence[ChatMessage] | str, response_a: str, response_b: str) -> Comparison:
        """Score two responses to one prompt.

        Args:
            prompt: the user's question, or the messages before the response.

        Raises:
            ConversationError, NonFiniteError: as `score`.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        both = [[*turns, {"role": "assistant", "content": text}] for text in (response_a, response_b)]
        score_a, score_b = self.score(both).tolist()
        margin = score_a - score_b
        return Comparison(score_a, score_b, margin, probability_preferred(margin))

    def score_rendered(self, rendered: Sequence[RenderedConversation]) -> torch.Tensor:
        """Score rendered conversations; fp32 [n], on the CPU.

        Raises:
            ConversationError: the device has too little memory for a conversation.
            NonFiniteError: naming the first conversation with a NaN or infinity, and the block if it is in one.
        """
        results = self.score_each(rendered)
        for row, result in enumerate(results):
            if isinstance(result, KitError):
                raise in_conversation(result, row)
        return torch.tensor(results, dtype=torch.float32)

    def score_each(self, rendered: Sequence[RenderedConversation]) -> list[ScoreResult]:
        """Score rendered conversations, each with its own result: a NaN cannot pass from one to another.

        If the memory of the device does not suffice, the conversations are scored in halves.
        """
        try:
            return self._score_each(rendered)
        except torch.OutOfMemoryError:
            if len(rendered) == 1:
                tokens = len(rendered[0].token_ids)
                return [
                    ConversationError(
                        f"a conversation of {tokens:,} tokens needs more memory than the GPU has free; free some with "
                        "--memory or --stream."
                    )
                ]
        # Outside the except block, where the exception would keep the failed call's tensors alive.
        half = len(rendered) // 2
        return self.score_each(rendered[:half]) + self.score_each(rendered[half:])

    def _score_each(self, rendered: Sequence[RenderedConversation]) -> list[ScoreResult]:
        hidden, records = self._compute(rendered)
        scores = self.head(hidden).cpu()
        results: list[ScoreResult] = scores.tolist()
        failed = set((~torch.isfinite(scores)).nonzero().flatten().tolist())
        for batch, record in records if failed else ():
            for row in failed.intersection(batch.rows):
                block = record.first_block(batch, row)
                if block is None and not torch.isfinite(hidden[row]).all():
                    block = self.checkpoint.model_config.num_hidden_layers - 1
                results[row] = nonfinite_error(block)
        return results

    def warm_up(self) -> None:
        """Run one full-size dummy batch, so that kernels are compiled and buffers allocated.

        Then a server's first request is as fast as later ones, and the free memory is known before another model loads.
        """
        longest = self.checkpoint.model_config.max_position_embeddings
        lengths = [min(longest, self.token_budget - start) for start in range(0, self.token_budget, longest)]
        self.score_rendered(
            [RenderedConversation([row] + [0] * (length - 1), length - 1) for row, length in enumerate(lengths)]
        )

    def scores(self, rendered: Sequence[RenderedConversation]) -> list[float]:
        """`score_rendered` as a list of floats."""
        return self.score_rendered(rendered).tolist()

    def hidden_at_scored_tokens(self, rendered: Sequence[RenderedConversation]) -> torch.Tensor:
        """The input of the head: hidden states [n, H] at the scored tokens after the last block; not checked."""
        return self._compute(rendered)[0]

    @torch.inference_mode()
    def _compute(
        self, rendered: Sequence[RenderedConversation]
    ) -> tuple[torch.Tensor, list[tuple[PackedBatch, FiniteRecord]]]:
        """Hidden states [n, H] at the scored tokens, and where each batch was finite."""
        hidden = torch.empty(
            len(rendered), self.checkpoint.model_config.hidden_size, device=self._device_blocks[-1].device
        )
        records = []
        with closing(self._run(rendered)) as chunks:
            for batch, rows, record in chunks:
                hidden[list(batch.rows)] = rows.to(hidden.device, hidden.dtype)
                records.append((batch, record))
        return hidden, records

    def _run(self, rendered: Sequence[RenderedConversation]) -> Generator[Chunk, None, None]:
        """Yield each batch with its hidden states [S, H] at the scored tokens after the last block."""
        batches = pack_batches(rendered, self.plan.chunk_tokens(sum(len(each.token_ids) for each in rendered)))
        if self.plan.placement == "streamed":
            yield from run_sweeps(self._device_blocks, self.plan, batches, self._embedding)
        else:
            yield from run_pipeline(self._device_blocks, batches, self._embed)

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        # Cast on the device: a 16-bit copy to it is half as large.
        return self._embedding[batch.token_ids].to(self._device_blocks[0].device).to(self.precision.residual_dtype)
