"""All chunks of a call through block after block, where not all blocks can stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import torch

from runtime.batching import PackedBatch
from runtime.devices import at_work
from runtime.loading import ShareBlocks
from runtime.placement import SWEEP_TOKENS, Plan
from runtime.sweep import Stream, sweep


def run_sweeps(
    shares: Sequence[ShareBlocks], plan: Plan, batches: Sequence[PackedBatch], embedding: torch.Tensor
) -> Iterator[tuple[PackedBatch, torch.Tensor]]:
    """Each batch with its hidden states [S, H] at the scored tokens; batches are dealt to the shares in turn.

    One share is computed by the calling thread, several by a thread each, gone when this ends.

    Args:
        embedding: [vocab, H].

    Raises:
        NonFiniteError: naming the block and the row that first showed a NaN or an infinity.
        OSError: the disk has no room for hidden states that the memory has no room for.
    """
    halt = Event()
    dealt = [(share, batches[turn :: len(shares)]) for turn, share in enumerate(shares)]
    sweeps = [partial(_sweep_all, share, plan, own, embedding, halt) for share, own in dealt if own]
    if len(sweeps) == 1:
        yield from sweeps[0]()
        return
    with ThreadPoolExecutor(len(shares)) as threads:
        try:
            for done in as_completed([threads.submit(each) for each in sweeps]):
                yield from done.result()
        finally:
            halt.set()


@torch.inference_mode()  # which belongs to a thread
def _sweep_all(
    share: ShareBlocks, plan: Plan, batches: Sequence[PackedBatch], embedding: torch.Tensor, halt: Event
) -> list[tuple[PackedBatch, torch.Tensor]]:
    """One sweep, or several where the device has room for the hidden states of a part alone."""
    room = share.share.spare // (embedding.shape[1] * plan.numerics.stream.itemsize)
    return [each for part in cut(batches, room) for each in _sweep(share, plan, part, embedding, halt)]


def _sweep(
    share: ShareBlocks, plan: Plan, batches: Sequence[PackedBatch], embedding: torch.Tensor, halt: Event
) -> list[tuple[PackedBatch, torch.Tensor]]:
    with ExitStack() as files:
        stream = _stream(share, plan, batches, embedding.shape[1], files)
        stream.embed(embedding)
        with at_work(share.device), closing(share.in_order()) as blocks:
            outputs = sweep(stream, blocks, share.share.blocks[-1], halt)
    return list(zip(batches, outputs, strict=True))


def cut(batches: Sequence[PackedBatch], room: int) -> list[Sequence[PackedBatch]]:
    """Into parts of about as many tokens, each of at most `room`; into one if `room` is too little for a sweep.

    Bringing all blocks in once more costs less than hidden states that cross the bus at every block.
    """
    sizes = [batch.tokens for batch in batches]
    total, longest = sum(sizes), max(sizes)
    if total <= room or room < SWEEP_TOKENS + longest:
        return [batches]
    parts = -(-total // (room - longest))
    ends = [0]
    for number, tokens in enumerate(accumulate(sizes), 1):
        if tokens * parts >= len(ends) * total:
            ends.append(number)
    return [batches[start:end] for start, end in pairwise(ends)]


def _stream(
    share: ShareBlocks, plan: Plan, batches: Sequence[PackedBatch], hidden_size: int, files: ExitStack
) -> Stream:
    """On the device where there is room, else in host memory, else in files."""
    dtype = plan.numerics.stream
    nbytes = sum(batch.tokens for batch in batches) * hidden_size * dtype.itemsize
    fits_device = nbytes <= share.share.spare
    fits_host = nbytes <= plan.host_spare // len(plan.shares)
    directory = None if fits_device or fits_host else Path(files.enter_context(TemporaryDirectory(prefix="worldpm-")))
    home = share.device if fits_device else torch.device("cpu")
    return Stream(batches, hidden_size, dtype, device=share.device, directory=directory, in_place=True, home=home)
