"""Backpropagate the scores of all calibration rows through the unquantized model, block by block.

The forward pass keeps the input of every segment of blocks. The backward pass takes the segments from the last to the
first: it computes the inputs of the segment's blocks again, then backpropagates through them. So the weights of one
block are in memory at a time, and a killed job continues with the pass it was in (gradient checkpointing, Chen et al.
2016, arXiv 1604.06174, on disk).

Rows that share a prefix share its tokens. A random sign per row keeps their gradients apart: the mean of
(g_1 +- g_2)(g_1 +- g_2)^T over both signs is g_1 g_1^T + g_2 g_2^T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantize.gradients.differentiable import DifferentiableBlock
from quantize.gradients.sensitivity import BlockSensitivity, tries_of_tokens
from quantize.gradients.statistics import BlockGradients
from quantize.job.gradient_plan import segments
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import block_prefix
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.block_loading import check_finite_tensors, read_blocks
from runtime.execution.hidden_states import HiddenStates
from runtime.execution.nonfinite import check_finite_hidden_states
from runtime.modeling.linear import Tensors
from runtime.modeling.packed_batch import PackedBatch, pack_batches
from runtime.modeling.precision import Precision
from runtime.modeling.qwen2 import Block, RotaryEmbedding
from runtime.modeling.score_head import ScoreHead


class BackwardSweep:
    """One backward sweep over the calibration rows.

    Attributes:
        segments: consecutive ranges of blocks. There are two passes per segment: forward, first to last, then backward.
        finished_passes: number of passes done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        head: ScoreHead,
        precision: Precision,
        rows: Sequence[RenderedConversation],
        *,
        token_budget: int,
        device: torch.device | str = "cpu",
        directory: Path,
        finished_passes: int = 0,
        prefetch: bool = True,
        options: Sequence[QuantizationConfig] = (),
        variant: Checkpoint | None = None,
    ):
        """
        Args:
            directory: where inputs, gradients and statistics are kept.
            options: ways to store the linears, whose errors are then measured as well.
            variant: the model stored with the first option; None measures rounding to nearest.
            finished_passes: passes that a resumed job has finished.

        Raises:
            UnresumableJobError: `finished_passes` is above 0 and a buffer file is missing or too short.
            OSError: the disk has no room for the buffers.
        """
        self.checkpoint, self.head, self.precision, self.device = checkpoint, head, precision, device
        self.directory, self.finished_passes, self.prefetch = directory, finished_passes, prefetch
        self._options, self._variant = options, variant
        model_config = checkpoint.model_config
        self.batches = [batch.to(device) for batch in pack_batches(rows, token_budget)]
        self._tries = [tries_of_tokens(batch) if options else None for batch in self.batches]
        self._tokens = sum(batch.tokens for batch in self.batches)
        self.segments = segments(model_config, self._tokens, precision.matmul_dtype.itemsize)
        self._rotary = RotaryEmbedding(model_config, max(len(row.token_ids) for row in rows), device)
        generator = torch.Generator().manual_seed(0)
        self._signs = torch.randint(0, 2, (len(rows),), generator=generator).mul_(2).sub_(1).float()

        def buffer(name: str, dtype: torch.dtype, **options: Any) -> HiddenStates:
            return HiddenStates(
                self.batches, model_config.hidden_size, dtype, device=device, directory=directory, name=name, **options
            )

        inputs = precision.matmul_dtype
        self._first = [buffer(f"segment-{each.start:05d}", inputs, in_place=True) for each in self.segments]
        longest = max(map(len, self.segments))
        self._inside = [buffer(f"inside-{offset:05d}", inputs, in_place=True) for offset in range(1, longest)]
        self._inside_of: int | None = None  # the segment whose inputs are in `_inside`
        backward_passes = max(finished_passes - len(self.segments), 0)
        self._gradient = buffer("gradient", torch.float32, finished_blocks=backward_passes)

    @property
    def steps(self) -> int:
        """Blocks of all passes."""
        return 2 * sum(map(len, self.segments))

    @property
    def finished_steps(self) -> int:
        """Blocks of the finished passes."""
        return sum(map(len, (self.segments + self.segments[::-1])[: self.finished_passes]))

    def remove_buffers(self) -> None:
        """Delete the files of inputs and gradients; the statistics stay."""
        for pattern in ("segment-*.bin", "inside-*.bin", "gradient.*.bin"):
            for file in self.directory.glob(pattern):
                file.unlink()

    def run(self, on_pass: Callable[[], None], on_block: Callable[[], None] = lambda: None) -> None:
        """Run the passes that are left.

        Args:
            on_pass: called when a pass is finished and its results are on disk.
            on_block: called after each block of a pass.
        """
        count = len(self.segments)
        if not self.finished_passes:
            embedding = self.checkpoint.read("model.embed_tokens.weight")
            check_finite_tensors(
                {"model.embed_tokens.weight": embedding, "model.norm.weight": self.checkpoint.read("model.norm.weight")}
            )
            self._first[0].embed(embedding)
            del embedding
        while self.finished_passes < 2 * count:
            if self.finished_passes < count:
                self._forward(self.finished_passes, on_block)
            else:
                self._backward(2 * count - 1 - self.finished_passes, on_block)
            self.finished_passes += 1
            on_pass()

    def _forward(self, segment: int, on_block: Callable[[], None]) -> None:
        """Run a segment and keep the input of the next one, or the gradient of the model's output."""
        self._fill_inside(segment, on_block)
        index = self.segments[segment][-1]
        ((_, tensors),) = read_blocks(self.checkpoint, [index], prefetch=False)
        block = self._block(index, tensors)
        last = segment + 1 == len(self.segments)
        for number, batch in enumerate(self.batches):
            hidden = block(self._input(segment, index, number), batch)
            check_finite_hidden_states(hidden, batch, index, "reference")
            if last:
                self._gradient.current_buffer[self._gradient.rows(number)] = self._output_gradient(hidden, batch)
            else:
                self._first[segment + 1].write(number, hidden)
        on_block()
        (self._gradient if last else self._first[segment + 1]).sync()

    def _backward(self, segment: int, on_block: Callable[[], None]) -> None:
        """Backpropagate through a segment and save the statistics of its blocks."""
        blocks = self.segments[segment]
        if self._inside_of != segment:
            self._fill_inside(segment, lambda: None)
        for index, tensors in read_blocks(self.checkpoint, blocks[::-1], prefetch=self.prefetch):
            block = self._block(index, tensors)
            sensitivity = self._sensitivity(block, index)
            statistics = BlockGradients(self.checkpoint.model_config, self._tokens, self.device, sensitivity)
            for number, batch in enumerate(self.batches):
                gradient = self._gradient.read(number, next_buffer=index != blocks[-1])
                hidden = self._input(segment, index, number)
                add = partial(statistics.add, self._gradient.rows(number), self._tries[number])
                self._gradient.write(number, block.gradient(hidden, batch, gradient, add))
                if sensitivity:
                    sensitivity.finish_batch()
            statistics.check_finite(index)
            statistics.save(statistics_file(self.directory, index))
            on_block()
            del block, tensors
        self._gradient.sync()
        self._gradient.swap_buffers()

    def _fill_inside(self, segment: int, on_block: Callable[[], None]) -> None:
        """Compute the inputs of all blocks of a segment but the first."""
        blocks = self.segments[segment]
        for index, tensors in read_blocks(self.checkpoint, blocks[:-1], prefetch=self.prefetch):
            block = self._block(index, tensors)
            for number, batch in enumerate(self.batches):
                hidden = block(self._input(segment, index, number), batch)
                check_finite_hidden_states(hidden, batch, index, "reference")
                self._inside[index - blocks.start].write(number, hidden)
            on_block()
        self._inside_of = segment

    def _block(self, index: int, tensors: Tensors) -> DifferentiableBlock:
        check_finite_tensors(tensors, block_prefix(index))
        on_device = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        block = DifferentiableBlock.from_tensors(self.checkpoint.model_config, on_device, self._rotary, self.precision)
        assert isinstance(block, DifferentiableBlock)
        return block

    def _sensitivity(self, block: Block, index: int) -> BlockSensitivity | None:
        if not self._options:
            return None
        variant = None
        if self._variant:
            stored = {name: tensor.to(self.device) for name, tensor in self._variant.read_block(index).items()}
            quantizations = self._variant.block_quantization(index)
            variant = Block.from_tensors(block.model_config, stored, self._rotary, self.precision, quantizations)
        return BlockSensitivity(block, self._options, self.precision.matmul_dtype, variant)

    def _input(self, segment: int, index: int, batch: int) -> torch.Tensor:
        """The input of block `index`, [T, H] in the residual dtype."""
        offset = index - self.segments[segment].start
        states = self._inside[offset - 1] if offset else self._first[segment]
        return states.read(batch).to(self.precision.residual_dtype)

    def _output_gradient(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The gradient [T, H] of the signed sum of scores by the output of the last block."""
        with torch.enable_grad():
            scored = hidden[batch.scored].detach().requires_grad_()
            signs = self._signs[list(batch.rows)].to(scored.device)
            (gradient,) = torch.autograd.grad((self.head(scored) * signs).sum(), scored)
        return torch.zeros_like(hidden).index_add_(0, batch.scored, gradient)


def statistics_file(directory: Path, index: int) -> Path:
    """The file with the gradient statistics of block `index`."""
    return directory / f"gradients-{index:05d}.safetensors"
