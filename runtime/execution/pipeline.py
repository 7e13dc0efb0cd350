"""Compute chunks with resident blocks: on one device, or pipelined over the devices of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from threading import Event

import torch

from runtime.execution.block_loading import DeviceBlocks
from runtime.execution.devices import device_context
from runtime.execution.nonfinite import FiniteRecord
from runtime.execution.placement_plan import QUEUED_CHUNKS_PER_DEVICE
from runtime.execution.prefetcher import Prefetcher
from runtime.modeling.packed_batch import PackedBatch

Chunk = tuple[PackedBatch, torch.Tensor, FiniteRecord]
"""A batch, its hidden states [T, H] (after the last block [S, H], at the scored tokens), and where they were finite."""


class Cancelled(Exception):
    """Ends a worker thread whose result is no longer needed; it never reaches the user."""


def run_pipeline(
    devices: Sequence[DeviceBlocks], batches: Sequence[PackedBatch], embed: Callable[[PackedBatch], torch.Tensor]
) -> Iterator[Chunk]:
    """Yield each batch with its hidden states [S, H] at the scored tokens after the last block, in order.

    One device is run by the calling thread, several by one thread each. Exhaust or close the iterator to end the
    threads.

    Args:
        embed: returns the hidden states [T, H] before the first block.
    """
    cancelled = Event()
    last = devices[-1].share.blocks[-1]
    chunks: Iterator[Chunk] = (_first_chunk(batch, embed(batch)) for batch in batches)
    stages = [_make_stage(device_blocks, last, cancelled) for device_blocks in devices]
    if len(stages) == 1:
        yield from map(stages[0], chunks)
        return
    with ExitStack() as threads:
        for stage in stages:
            chunks = threads.enter_context(Prefetcher(stage, chunks, depth=QUEUED_CHUNKS_PER_DEVICE))
        threads.callback(cancelled.set)  # runs first on exit, so that busy stages stop before their next block
        yield from chunks


def _first_chunk(batch: PackedBatch, hidden: torch.Tensor) -> Chunk:
    return batch, hidden, FiniteRecord(batch.tokens, hidden.device)


def _make_stage(device_blocks: DeviceBlocks, last: int, cancelled: Event) -> Callable[[Chunk], Chunk]:
    """A function that pushes a chunk through the blocks of one device."""

    @torch.inference_mode()  # set here, since the mode is per thread
    def advance(chunk: Chunk) -> Chunk:
        device = device_blocks.device
        batch, hidden, record = chunk[0].to(device), chunk[1].to(device), chunk[2].to(device)
        with device_context(device_blocks.device):
            for index in device_blocks.share.blocks:
                if cancelled.is_set():
                    raise Cancelled
                block = device_blocks.resident[index]
                if index == last:
                    hidden = block.at_scored_tokens(hidden, batch)
                else:
                    hidden = block(hidden, batch, in_place=True)
                    record.add(hidden, index)
        return batch, hidden, record

    return advance
