"""Costs of the backward sweep, and how it cuts the blocks into segments."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantize.solver.output_moment import OVERSAMPLING, RANK
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS

KEEP_ALL_INPUTS_BYTES = 8 << 30  # inputs of all blocks are kept, and none is computed twice, up to this size
# Bytes that autograd keeps per token of a batch, in units of an fp32 value. Gate, up, silu(gate), their product and its
# parts; q, k, v, context, both norms and the residual stream; attention scores, their exponentials and probabilities.
INNER_VALUES, HIDDEN_VALUES, ATTENTION_VALUES = 7, 16, 4
ROUNDING_BYTES_PER_WEIGHT = 24  # fp32 weight, scales, zeros, codes and two temporaries of one linear


@dataclass(frozen=True)
class GradientPlan:
    """Costs of one backward sweep, in bytes and floating-point operations.

    Attributes:
        tokens: calibration tokens.
        longest_batch: tokens of the longest batch.
        matmul_bytes: bytes per element of matmul inputs, 2 or 4.
        mixed: whether the error of rounding each linear is measured too, which takes the rounding errors of one block
            and one more product per linear.
    """

    model_config: ModelConfig
    tokens: int
    longest_batch: int
    matmul_bytes: int
    mixed: bool = False

    @property
    def segments(self) -> list[range]:
        """Consecutive ranges of blocks; the sweep keeps the input of each, and those of all blocks of one."""
        return segments(self.model_config, self.tokens, self.matmul_bytes)

    @property
    def passes(self) -> int:
        """How often the sweep reads each block: forward, backward, and again if a segment has several blocks."""
        return 2 if max(map(len, self.segments)) == 1 else 3

    @property
    def writes(self) -> int:
        """Bytes written over the whole sweep: per pass and block one buffer, of inputs or of gradients."""
        forward = (self.passes - 1) * self.matmul_bytes
        return self.tokens * self.model_config.hidden_size * (forward + 4) * self.model_config.num_hidden_layers

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the kept inputs and of both buffers of the gradient, deleted after the sweep."""
        inputs = len(self.segments) + max(map(len, self.segments)) - 1
        return self.tokens * self.model_config.hidden_size * (inputs * self.matmul_bytes + 2 * 4)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the statistics of all blocks, deleted when the job is finished."""
        outputs = sum(min(width, RANK + OVERSAMPLING) * width + width for width in self._outputs)
        return 4 * self.model_config.num_hidden_layers * (outputs + len(BLOCK_LINEAR_GROUPS) * self.tokens)

    @property
    def working_bytes(self) -> int:
        """Bytes that one block's backward pass needs beside the block's weights."""
        config, longest = self.model_config, self.longest_batch
        values = INNER_VALUES * config.intermediate_size + HIDDEN_VALUES * config.hidden_size
        attention = ATTENTION_VALUES * config.num_attention_heads * longest  # if the batch is one conversation
        sizes = [math.prod(config.linear_shape(name)) for name in BLOCK_LINEARS]
        rounding = sum(sizes) * self.matmul_bytes + max(sizes) * ROUNDING_BYTES_PER_WEIGHT if self.mixed else 0
        moments = sum(2 * 4 * width * min(width, RANK + OVERSAMPLING) for width in self._outputs)
        return 4 * longest * (values + attention) + moments + rounding + max(sizes) * self.matmul_bytes

    @property
    def flops(self) -> float:
        """Floating-point operations per block: forward, forward again, backward by the inputs, and the moments."""
        weights = sum(math.prod(self.model_config.linear_shape(name)) for name in BLOCK_LINEARS)
        moments = sum(4.0 * width * (RANK + OVERSAMPLING) for width in self._outputs)
        return self.tokens * (2.0 * weights * (self.passes + 1 + self.mixed) + moments)

    @property
    def _outputs(self) -> list[int]:
        return [self.model_config.linear_shape(name)[0] for name in BLOCK_LINEARS]


def segments(model_config: ModelConfig, tokens: int, matmul_bytes: int) -> list[range]:
    """Cut the blocks into segments: of one block if the inputs of all fit `KEEP_ALL_INPUTS_BYTES`, else of sqrt(L)."""
    blocks = model_config.num_hidden_layers
    everything = blocks * tokens * model_config.hidden_size * matmul_bytes
    length = 1 if everything <= KEEP_ALL_INPUTS_BYTES else math.ceil(blocks**0.5)
    return [range(start, min(start + length, blocks)) for start in range(0, blocks, length)]
