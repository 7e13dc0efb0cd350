"""Chunk by chunk through blocks that stay: on one device, or from one device to the next with chunks in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from threading import Event

import torch

from runtime.batching import PackedBatch
from runtime.devices import at_work
from runtime.loading import ShareBlocks
from runtime.lookahead import Lookahead
from runtime.placement import IN_FLIGHT
from runtime.sweep import Halted, check_finite

Chunk = tuple[PackedBatch, torch.Tensor]
"""A batch and its hidden states [T, H], or after the last block [S, H] at the scored tokens."""


def run_pipeline(
    shares: Sequence[ShareBlocks], batches: Sequence[PackedBatch], embed: Callable[[PackedBatch], torch.Tensor]
) -> Iterator[Chunk]:
    """Each batch with its hidden states [S, H] at the scored tokens, in order.

    One share is computed by the calling thread, several by a thread each. Close the iterator, or take all there is, to
    be rid of them.

    Args:
        embed: hidden states before the first block.

    Raises:
        NonFiniteError: naming the block and the row that first showed a NaN or an infinity.
    """
    halt = Event()
    last = shares[-1].share.blocks[-1]
    chunks: Iterator[Chunk] = ((batch, embed(batch)) for batch in batches)
    stages = [_stage(share, last, halt) for share in shares]
    if len(stages) == 1:
        yield from map(stages[0], chunks)
        return
    with ExitStack() as threads:
        for stage in stages:
            chunks = threads.enter_context(Lookahead(stage, chunks, depth=IN_FLIGHT))
        threads.callback(halt.set)  # called first: a stage under way ends before its next block
        yield from chunks


def _stage(share: ShareBlocks, last: int, halt: Event) -> Callable[[Chunk], Chunk]:
    @torch.inference_mode()  # which belongs to a thread
    def advance(chunk: Chunk) -> Chunk:
        batch, hidden = chunk[0].to(share.device), chunk[1].to(share.device)
        with at_work(share.device):
            for index in share.share.blocks:
                if halt.is_set():
                    raise Halted
                block = share.resident[index]
                hidden = block.at_scored(hidden, batch) if index == last else block(hidden, batch)
                check_finite(hidden, batch, index, scored=index == last)
        return batch, hidden

    return advance
