"""The sweep of a quantizing job: each block read once, both streams through it, its shard written."""

from __future__ import annotations

import time
from typing import Any

import torch

from quantize.block import PackedBlock, quantize_block
from quantize.job import Job
from quantize.progress import BlockProgress
from quantize.recipe import Recipe
from quantize.streams import Streams
from quantize.writer import Writer
from runtime.architecture import block_prefix
from runtime.checkpoint import Checkpoint
from runtime.errors import NonFiniteError
from runtime.linear import Tensors
from runtime.memory import peak_memory
from runtime.sweep import read_blocks


def sweep(
    job: Job,
    checkpoint: Checkpoint,
    recipe: Recipe,
    streams: Streams,
    writer: Writer,
    progress: BlockProgress,
    *,
    prefetch: bool,
) -> None:
    """Quantize every block that the job has not finished.

    Raises:
        CheckpointError: the source cannot be read.
        NonFiniteError: a weight or an activation is not finite.
        OSError: the disk is full.
    """
    if not job.blocks:
        outer = {name: checkpoint.read(name) for name in ("model.embed_tokens.weight", "model.norm.weight")}
        refuse_non_finite(outer)
        streams.embed(outer.pop("model.embed_tokens.weight"))
        job.record_shard(*writer.write_embedding())
    for index, tensors in read_blocks(checkpoint, len(job.blocks), prefetch=prefetch):
        start = time.perf_counter()
        prefix = block_prefix(index)
        refuse_non_finite(tensors, prefix)
        block = {name: tensor.to(streams.device) for name, tensor in tensors.items()}
        tensors.clear()
        packed = _pass_block(streams, block, index, recipe, progress)
        written = writer.write_shard(index + 1, {prefix + name: each.cpu() for name, each in packed.tensors.items()})
        streams.sync()
        job.finish_block(*written, _figures(streams, packed, index, time.perf_counter() - start))
        streams.turn_over()
        progress.block_done()
        del block, packed  # else they would stand beside the next block


def _pass_block(streams: Streams, tensors: Tensors, index: int, recipe: Recipe, progress: BlockProgress) -> PackedBlock:
    """Push all streams through the block, the quantized one through what comes of it."""
    packed = quantize_block(streams.block(tensors), streams.block(tensors), streams, index, recipe, progress.watch)
    start = time.perf_counter()
    streams.advance_noise_floor(tensors, index)
    packed.seconds["noise floor"] = time.perf_counter() - start
    return packed


def _figures(streams: Streams, packed: PackedBlock, index: int, seconds: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"block": index, **packed.figures()}
    errors = streams.hidden_errors()
    if len(errors):
        figures |= {"hidden_error_mean": float(errors.mean()), "hidden_error_max": float(errors.max())}
    figures["seconds"]["all"] = seconds
    figures["peak_memory"] = peak_memory()
    if torch.cuda.is_available():
        figures["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return figures


def refuse_non_finite(tensors: Tensors, prefix: str = "") -> None:
    """Raise NonFiniteError naming the first tensor with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # a NaN is both least and greatest
            count = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(f"{prefix}{name} has {count} non-finite values; download that shard again.")
