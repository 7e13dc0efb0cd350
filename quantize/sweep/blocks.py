"""The loop over the blocks of a job: read a block, quantize it, write its shard and record it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from quantize.gradients.statistics import GradientStatistics
from quantize.job.progress import BlockProgress
from quantize.job.recipe import Recipe
from quantize.job.state import Job
from quantize.sweep.block import PackedBlock, quantize_block
from quantize.sweep.checkpoint_writer import CheckpointWriter
from quantize.sweep.hidden_states import SweepStates
from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import block_prefix
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.process_memory import peak_memory
from runtime.execution.block_loading import check_finite_tensors, read_blocks
from runtime.modeling.linear import Tensors


def quantize_blocks(
    job: Job,
    checkpoint: Checkpoint,
    recipe: Recipe,
    states: SweepStates,
    writer: CheckpointWriter,
    progress: BlockProgress,
    *,
    prefetch: bool,
    gradients: Callable[[int], GradientStatistics] | None = None,
) -> None:
    """Quantize every block that the job has not finished, and write one shard per block.

    Args:
        writer: writes the shards; its `quantization` is how the linears are stored.
        states: hidden states before the first unfinished block; not yet filled if no block is finished.
        prefetch: read the next block while the current one is quantized.
        gradients: reads the gradient statistics of a block.

    Raises:
        CheckpointError: the source checkpoint cannot be read.
        NonFiniteError: a weight or an activation is not finite.
        OSError: the disk is full.
    """
    if not job.blocks:
        outer = {name: checkpoint.read(name) for name in ("model.embed_tokens.weight", "model.norm.weight")}
        check_finite_tensors(outer)
        states.embed(outer.pop("model.embed_tokens.weight"))
        job.record_shard(*writer.write_embedding())
    unfinished = range(len(job.blocks), checkpoint.model_config.num_hidden_layers)
    for index, tensors in read_blocks(checkpoint, unfinished, prefetch=prefetch):
        start = time.perf_counter()
        prefix = block_prefix(index)
        check_finite_tensors(tensors, prefix)
        block = {name: tensor.to(states.device) for name, tensor in tensors.items()}
        tensors.clear()
        quantizations = writer.quantization.of_block(index)
        packed = _quantize_and_advance(
            states, block, index, recipe, quantizations, progress, gradients and gradients(index)
        )
        written = writer.write_shard(index + 1, {prefix + name: each.cpu() for name, each in packed.tensors.items()})
        states.sync()
        job.finish_block(*written, _block_metrics(states, packed, index, time.perf_counter() - start))
        states.swap_buffers()
        progress.block_done()
        del block, packed  # free the memory before the next block is loaded


def _quantize_and_advance(
    states: SweepStates,
    tensors: Tensors,
    index: int,
    recipe: Recipe,
    quantizations: Mapping[str, QuantizationConfig],
    progress: BlockProgress,
    gradients: GradientStatistics | None,
) -> PackedBlock:
    """Quantize the block and compute its output in all three sets of hidden states."""
    packed = quantize_block(
        states.block(tensors),
        states.block(tensors),
        states,
        index,
        recipe,
        quantizations,
        progress.linear_started,
        gradients,
    )
    start = time.perf_counter()
    states.advance_noise_floor(tensors, index)
    packed.seconds["noise floor"] = time.perf_counter() - start
    return packed


def _block_metrics(states: SweepStates, packed: PackedBlock, index: int, seconds: float) -> dict[str, Any]:
    """The block's entry in the job's log."""
    metrics: dict[str, Any] = {"block": index, **packed.metrics()}
    errors = states.hidden_errors()
    if len(errors):
        metrics |= {"hidden_error_mean": float(errors.mean()), "hidden_error_max": float(errors.max())}
    metrics["seconds"]["all"] = seconds
    metrics["peak_memory"] = peak_memory()
    if torch.cuda.is_available():
        metrics["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return metrics
