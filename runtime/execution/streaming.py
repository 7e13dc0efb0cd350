"""Compute all batches of a call block by block, where not all blocks are resident.

A reward model generates nothing, so a score takes one pass through the blocks. A sweep loads a block, computes it on
every batch and drops it, while the next block is prefetched. So each block is loaded once per sweep, however many
conversations are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import gettempdir
from threading import Event

import torch

from runtime.execution.block_loading import DeviceBlocks
from runtime.execution.devices import device_context
from runtime.execution.hidden_states import HiddenStates
from runtime.execution.nonfinite import FiniteRecord
from runtime.execution.pipeline import Cancelled, Chunk
from runtime.execution.placement_plan import MIN_SWEEP_TOKENS, PlacementPlan
from runtime.modeling.packed_batch import PackedBatch
from runtime.modeling.qwen2 import Block


def run_sweeps(
    devices: Sequence[DeviceBlocks], plan: PlacementPlan, batches: Sequence[PackedBatch], embedding: torch.Tensor
) -> Iterator[Chunk]:
    """Yield each batch with its hidden states [S, H] at the scored tokens after the last block, and its record.

    Batches are assigned to the devices in turn. One device is run by the calling thread, several by one thread each;
    the threads end with the iterator.

    Args:
        embedding: [vocab, H].

    Raises:
        OSError: the disk has no room for hidden states that do not fit in memory.
    """
    cancelled = Event()
    assigned = [(each, batches[turn :: len(devices)]) for turn, each in enumerate(devices)]
    sweeps = [partial(_sweep_in_parts, each, plan, own, embedding, cancelled) for each, own in assigned if own]
    if len(sweeps) == 1:
        yield from sweeps[0]()
        return
    with ThreadPoolExecutor(len(devices)) as threads:
        try:
            for done in as_completed([threads.submit(each) for each in sweeps]):
                yield from done.result()
        finally:
            cancelled.set()


@torch.inference_mode()  # set here, since the mode is per thread
def _sweep_in_parts(
    device_blocks: DeviceBlocks,
    plan: PlacementPlan,
    batches: Sequence[PackedBatch],
    embedding: torch.Tensor,
    cancelled: Event,
) -> list[Chunk]:
    """One sweep, or several if the device has room for the hidden states of some of the batches only."""
    max_tokens = device_blocks.share.spare_bytes // (embedding.shape[1] * plan.precision.residual_dtype.itemsize)
    return [
        result
        for part in split_batches(batches, max_tokens)
        for result in _sweep_part(device_blocks, plan, part, embedding, cancelled)
    ]


def _sweep_part(
    device_blocks: DeviceBlocks,
    plan: PlacementPlan,
    batches: Sequence[PackedBatch],
    embedding: torch.Tensor,
    cancelled: Event,
) -> list[Chunk]:
    """One sweep. A function of its own, so that its hidden states are freed before the next part's are allocated."""
    hidden_states = _make_hidden_states(device_blocks, plan, batches, embedding.shape[1])
    hidden_states.embed(embedding)
    with device_context(device_blocks.device), closing(device_blocks.iterate_blocks()) as blocks:
        outputs, records = sweep(hidden_states, blocks, device_blocks.share.blocks[-1], cancelled)
    return list(zip(batches, outputs, records, strict=True))


def split_batches(batches: Sequence[PackedBatch], max_tokens: int) -> list[Sequence[PackedBatch]]:
    """Split into parts of similar size, each at most `max_tokens`; no split if `max_tokens` is too few for a sweep.

    Loading all blocks once more costs less than copying hidden states to and from the device at every block.
    """
    sizes = [batch.tokens for batch in batches]
    total, longest = sum(sizes), max(sizes)
    if total <= max_tokens or max_tokens < MIN_SWEEP_TOKENS + longest:
        return [batches]
    parts = -(-total // (max_tokens - longest))
    ends = [0]
    for number, tokens in enumerate(accumulate(sizes), 1):
        if tokens * parts >= len(ends) * total:
            ends.append(number)
    return [batches[start:end] for start, end in pairwise(ends)]


def _make_hidden_states(
    device_blocks: DeviceBlocks, plan: PlacementPlan, batches: Sequence[PackedBatch], hidden_size: int
) -> HiddenStates:
    """Allocate hidden states on the device if they fit, else in host memory, else in temporary files."""
    dtype = plan.precision.residual_dtype
    nbytes = sum(batch.tokens for batch in batches) * hidden_size * dtype.itemsize
    fits_device = nbytes <= device_blocks.share.spare_bytes
    fits_host = nbytes <= plan.spare_host_bytes // len(plan.shares)
    make = partial(HiddenStates, batches, hidden_size, dtype, device=device_blocks.device, in_place=True)
    if fits_device or fits_host:
        return make(buffer_device=device_blocks.device if fits_device else torch.device("cpu"))
    return make(directory=Path(gettempdir()), unnamed=True)


@torch.inference_mode()
def sweep(
    hidden_states: HiddenStates, blocks: Iterator[tuple[int, Block]], last: int, cancelled: Event
) -> tuple[list[torch.Tensor], list[FiniteRecord]]:
    """Compute block after block on all batches of `hidden_states`.

    Args:
        blocks: (index, block) of all blocks in order; each block is dropped before the next one is taken.
        last: index of the last block.
        cancelled: once set, the sweep raises `Cancelled` before the next batch.

    Returns:
        For each batch, the hidden states [S, H] at the scored tokens after the last block, and its record.
    """
    outputs: list[torch.Tensor] = []
    records = [FiniteRecord(batch.tokens, hidden_states.device) for batch in hidden_states.batches]
    for index, block in blocks:
        for number, batch in enumerate(hidden_states.batches):
            if cancelled.is_set():
                raise Cancelled
            hidden = hidden_states.read(number)
            if index == last:
                outputs.append(block.at_scored_tokens(hidden, batch))
            else:
                hidden = block(hidden, batch, in_place=True)
                records[number].add(hidden, index)
                hidden_states.write(number, hidden)
        hidden_states.swap_buffers()
        if hidden_states.device.type == "cuda":  # products may still read the block, whose memory is used again
            torch.cuda.current_stream(hidden_states.device).synchronize()
        del block  # before the iterator loads the next one
    return outputs, records
