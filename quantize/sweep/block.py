"""Quantize one block.

Linears are quantized in the order in which data reaches them, and the input of a later linear is computed with the
earlier ones already packed ("true sequential"). q, k and v share one Hessian and one factorisation, as do gate and up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from quantize.gradients.statistics import GradientStatistics
from quantize.job.recipe import Recipe
from quantize.solver.correction import TargetCorrection
from quantize.solver.hessian import Hessian
from quantize.sweep.hidden_states import SweepStates
from quantize.sweep.linear_quantizer import BlockQuantizer, PackedBlock, ProgressCallback
from runtime.checkpoints.model_config import BLOCK_LINEARS
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, QuantizationConfig
from runtime.execution.hidden_states import HiddenStates
from runtime.execution.nonfinite import check_finite_hidden_states
from runtime.modeling.qwen2 import Block


class BlockForward:
    """Computes the inputs of a block's four linear groups, one batch per call.

    Call the steps in order, each for all batches. The linears of a group may be replaced before the next step.
    `hidden_states.next_buffer` holds the attention context, then the residual after attention, then the block's output,
    so that only gate and up are computed twice.
    """

    def __init__(self, block: Block, hidden_states: HiddenStates, index: int):
        """
        Args:
            hidden_states: the block's input in `current_buffer`.
            index: the block's number, for error messages.
        """
        self.block = block
        self.hidden_states = hidden_states
        self.index = index

    def attention_input(self, batch: int) -> torch.Tensor:
        """Input of q, k and v: [T, H]."""
        return self.block.attention_input(self.hidden_states.read(batch))

    def attention_context(self, batch: int) -> torch.Tensor:
        """Input of o_proj: [T, heads * head_dim]. It is stored for `mlp_input`."""
        x = self.block.attention_input(self.hidden_states.read(batch))
        context = self.block.attention_context(x, self.hidden_states.batches[batch])
        self.hidden_states.write(batch, context)
        return context

    def mlp_input(self, batch: int) -> torch.Tensor:
        """Input of gate and up: [T, H]. The residual after attention is stored for the next steps."""
        context = self.hidden_states.read(batch, next_buffer=True).to(self.block.precision.matmul_dtype)
        hidden = self.block.after_attention(self.hidden_states.read(batch), context)
        self.hidden_states.write(batch, hidden)
        return self.block.mlp_input(hidden)

    def mlp_activation(self, batch: int) -> torch.Tensor:
        """Input of down_proj: [T, intermediate]."""
        return self.block.mlp_activation(self.block.mlp_input(self.hidden_states.read(batch, next_buffer=True)))

    def write_output(self, batch: int, activation: torch.Tensor) -> None:
        """Compute the block's output from the input of down_proj and store it.

        Raises:
            NonFiniteError: naming the block and the first row with a NaN or infinity.
        """
        hidden = self.block.after_mlp(self.hidden_states.read(batch, next_buffer=True), activation)
        check_finite_hidden_states(hidden, self.hidden_states.batches[batch], self.index, self.hidden_states.name)
        self.hidden_states.write(batch, hidden)


Step = Callable[[BlockForward, int], torch.Tensor]
"""A method of `BlockForward` that returns the input of one group of linears for one batch."""

STEPS: tuple[Step, ...] = (
    BlockForward.attention_input,
    BlockForward.attention_context,
    BlockForward.mlp_input,
    BlockForward.mlp_activation,
)


def quantize_block(
    block: Block,
    original: Block,
    states: SweepStates,
    index: int,
    recipe: Recipe,
    quantizations: Mapping[str, QuantizationConfig],
    on_linear: ProgressCallback,
    gradients: GradientStatistics | None = None,
) -> PackedBlock:
    """Replace the linears of `block` by packed ones and compute the block's output for all rows.

    The outputs of the unquantized and of the packed block are written to `next_buffer` of `states.reference` and
    `states.quantized`.

    Args:
        block, original: two unquantized blocks over the same tensors; only `block` is changed.
        states: hidden states before the block.
        index: the block's number, for messages.
        quantizations: how each linear is stored, by name.
        gradients: of the scores, by the block's linears; None without calibration.

    Raises:
        NonFiniteError: an activation or a weight is not finite.
        UnresumableJobError: a Hessian cannot be factorised.
    """
    quantizer = BlockQuantizer(block, recipe, quantizations, index, states.quantized.device, on_linear)
    # The unquantized block runs first, so that an error names the checkpoint's weights and not the packed ones.
    if gradients is None:
        states.reference.advance(original, index)
        for name in BLOCK_LINEARS:
            quantizer.quantize_without_data(name)
        states.quantized.advance(block, index)
        return quantizer.result()

    states.reference.advance(original, index, states.parity_batches)
    reference = BlockForward(original, states.reference, index)
    quantized, batches = BlockForward(block, states.quantized, index), states.calibration_batches
    for group, step in zip(BLOCK_LINEAR_GROUPS, STEPS, strict=True):
        hessian, correction = quantizer.start_group(group)
        weights = gradients.token_weights(group, hessian.in_features)
        for batch in batches:
            of_tokens = weights[quantized.hidden_states.rows(batch)]
            _add_inputs(hessian, correction, of_tokens, step, quantized, reference, batch, quantizer.seconds)
        quantizer.quantize_group(group, hessian, correction, gradients)
    for batch in batches:  # gate and up run a second time: down_proj was not packed the first time
        quantized.write_output(batch, quantized.mlp_activation(batch))
    states.quantized.advance(block, index, states.parity_batches)
    return quantizer.result()


def _add_inputs(
    hessian: Hessian,
    correction: TargetCorrection,
    weights: torch.Tensor,
    step: Step,
    quantized: BlockForward,
    reference: BlockForward,
    batch: int,
    seconds: dict[str, float],
) -> None:
    """Add a batch's inputs of one group, with the weights [T] of its tokens. When this returns, they are freed."""
    start = time.perf_counter()
    x, reference_x = step(quantized, batch), step(reference, batch)
    middle = time.perf_counter()
    hessian.add(x, weights)
    correction.add(x, reference_x, weights)
    end = time.perf_counter()
    if step is BlockForward.mlp_activation:  # the last step: only down_proj remains of the unquantized block
        reference.write_output(batch, reference_x)
    seconds["inputs"] += middle - start + time.perf_counter() - end
    seconds["hessian"] += end - middle
