"""Hidden states of all rows between two blocks, in the unquantized and in the quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.checkpoints.model_config import ModelConfig
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.hidden_states import HiddenStates
from runtime.modeling.linear import Tensors
from runtime.modeling.packed_batch import pack_batches
from runtime.modeling.precision import PURE_BFLOAT16, Precision
from runtime.modeling.qwen2 import Block, RotaryEmbedding
from runtime.modeling.score_head import ScoreHead


class SweepStates:
    """Hidden states of calibration and parity rows in the unquantized and in the quantized model.

    A third set holds the parity rows of the unquantized model in plain bf16, as a noise floor to compare with. Rows are
    numbered calibration first, then parity; no batch contains both.

    Attributes:
        reference, quantized: all rows in the unquantized and in the quantized model.
        noise_floor: parity rows in the unquantized model, all arithmetic in bf16.
        calibration_rows: number of calibration rows.
        calibration_batches, parity_batches: batch indices of `reference` and `quantized`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        precision: Precision,
        calibration: Sequence[RenderedConversation],
        parity: Sequence[RenderedConversation],
        *,
        token_budget: int,
        device: torch.device | str = "cpu",
        directory: Path | None = None,
        finished_blocks: int = 0,
    ):
        """
        Args:
            directory: where the buffers are kept as files; None keeps them in memory.
            finished_blocks: blocks that a resumed job has finished.

        Raises:
            UnresumableJobError: `finished_blocks` is above 0 and a buffer file is missing or too short.
            OSError: the disk has no room for the buffers.
        """
        self.model_config = model_config
        self.precision = precision
        self.device = device
        calibration_batches = pack_batches(calibration, token_budget)
        parity_batches = pack_batches(parity, token_budget, first_row=len(calibration))
        self.calibration_rows = len(calibration)
        self.calibration_batches = range(len(calibration_batches))
        self.parity_batches = range(len(calibration_batches), len(calibration_batches) + len(parity_batches))
        longest = max(len(row.token_ids) for row in (*calibration, *parity))
        self.rotary = RotaryEmbedding(model_config, longest, device)

        def hidden_states(name: str, batches: list, dtype: torch.dtype) -> HiddenStates:
            return HiddenStates(
                batches,
                model_config.hidden_size,
                dtype,
                device=device,
                directory=directory if batches else None,
                name=name,
                finished_blocks=finished_blocks,
            )

        everything = calibration_batches + parity_batches
        self.reference = hidden_states("reference", everything, precision.residual_dtype)
        self.quantized = hidden_states("quantized", everything, precision.residual_dtype)
        self.noise_floor = hidden_states("noise-floor", parity_batches, PURE_BFLOAT16.residual_dtype)

    @property
    def all(self) -> tuple[HiddenStates, HiddenStates, HiddenStates]:
        return self.reference, self.quantized, self.noise_floor

    def embed(self, embedding: torch.Tensor) -> None:
        """Fill the buffers with the embeddings of all tokens, from `embedding` [vocab, H]."""
        for each in self.all:
            each.embed(embedding)

    def block(self, tensors: Tensors, precision: Precision | None = None) -> Block:
        """Make an unquantized block that shares `tensors`."""
        return Block.from_tensors(self.model_config, tensors, self.rotary, precision or self.precision)

    def advance_noise_floor(self, tensors: Tensors, index: int) -> None:
        """Compute unquantized block `index` in bf16 for the noise floor."""
        self.noise_floor.advance(self.block(tensors, PURE_BFLOAT16), index)

    def hidden_errors(self) -> torch.Tensor:
        """Relative error after the block of the hidden state at each parity row's scored token: [parity rows]."""
        reference = self.reference.at_scored_tokens(next_buffer=True)[self.calibration_rows :]
        quantized = self.quantized.at_scored_tokens(next_buffer=True)[self.calibration_rows :]
        return (quantized - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)

    def sync(self) -> None:
        """Flush the block's output to disk."""
        for each in self.all:
            each.sync()

    def swap_buffers(self) -> None:
        """Finish a block: its output becomes the input of the next one."""
        for each in self.all:
            each.swap_buffers()

    def features(self, head: ScoreHead) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input of the score head, [rows, H], after the last block: reference, quantized, noise floor.

        The noise floor has parity rows only.
        """
        reference, quantized, floor = (head.features(each.at_scored_tokens()) for each in self.all)
        return reference, quantized, floor
