"""All chunks of a call through block after block, where not all blocks can stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import torch

from runtime.batching import PackedBatch
from runtime.devices import at_work
from runtime.loading import ShareBlocks
from runtime.placement import Plan
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
    with ExitStack() as files:
        sweeps: list[Callable[[], list[tuple[PackedBatch, torch.Tensor]]]] = []
        for share, own in dealt:
            if own:
                stream = _stream(share, plan, own, embedding.shape[1], files)
                sweeps.append(partial(_sweep, share, stream, embedding, halt))
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
def _sweep(
    share: ShareBlocks, stream: Stream, embedding: torch.Tensor, halt: Event
) -> list[tuple[PackedBatch, torch.Tensor]]:
    stream.embed(embedding)
    with at_work(share.device), closing(share.in_order()) as blocks:
        outputs = sweep(stream, blocks, share.share.blocks[-1], halt)
    return list(zip(stream.batches, outputs, strict=True))


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
