"""Compute chunks with resident blocks: on one device, or pipelined over the devices of a split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from threading import Event

import torch

from runtime.common.errors import NonFiniteError
from runtime.execution.block_loading import DeviceBlocks
from runtime.execution.devices import device_context
from runtime.execution.placement_plan import QUEUED_CHUNKS_PER_DEVICE
from runtime.execution.prefetcher import Prefetcher
from runtime.modeling.packed_batch import PackedBatch

Chunk = tuple[PackedBatch, torch.Tensor]
"""A batch and its hidden states [T, H]; after the last block [S, H], at the scored tokens."""


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

    Raises:
        NonFiniteError: naming the first block and row with a NaN or infinity.
    """
    cancelled = Event()
    last = devices[-1].share.blocks[-1]
    chunks: Iterator[Chunk] = ((batch, embed(batch)) for batch in batches)
    stages = [_make_stage(device_blocks, last, cancelled) for device_blocks in devices]
    if len(stages) == 1:
        yield from map(stages[0], chunks)
        return
    with ExitStack() as threads:
        for stage in stages:
            chunks = threads.enter_context(Prefetcher(stage, chunks, depth=QUEUED_CHUNKS_PER_DEVICE))
        threads.callback(cancelled.set)  # runs first on exit, so that busy stages stop before their next block
        yield from chunks


def _make_stage(device_blocks: DeviceBlocks, last: int, cancelled: Event) -> Callable[[Chunk], Chunk]:
    """A function that pushes a chunk through the blocks of one device."""

    @torch.inference_mode()  # set here, since the mode is per thread
    def advance(chunk: Chunk) -> Chunk:
        batch, hidden = chunk[0].to(device_blocks.device), chunk[1].to(device_blocks.device)
        with device_context(device_blocks.device):
            for index in device_blocks.share.blocks:
                if cancelled.is_set():
                    raise Cancelled
                block = device_blocks.resident[index]
                hidden = block.at_scored_tokens(hidden, batch) if index == last else block(hidden, batch)
                check_finite_hidden_states(hidden, batch, index, scored=index == last)
        return batch, hidden

    return advance


def check_finite_hidden_states(
    hidden: torch.Tensor, batch: PackedBatch, block: int, states_name: str = "", *, scored: bool = False
) -> None:
    """Check that the hidden states of `batch` after `block` are finite.

    Args:
        hidden: [T, H], or with `scored` [S, H] at the scored tokens.
        states_name: named in the error, where several sets of hidden states are computed.

    Raises:
        NonFiniteError: naming the block and the first row with a NaN or infinity.
    """
    if torch.isfinite(hidden.sum(dtype=torch.float64)):  # finite only if every term is
        return
    first = int((~torch.isfinite(hidden)).any(-1).nonzero()[0])
    row = batch.rows[first] if scored else batch.row_of_token(first)
    where = f"block {block}, {states_name}" if states_name else f"block {block}"
    error = NonFiniteError(
        f"{where}: a non-finite activation in conversation {row}; check the weights of this block for damage, "
        "or compute in float32 if the checkpoint is float16."
    )
    error.block = block
    raise error
