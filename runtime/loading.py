"""Blocks as a plan wants them: in place before the first score, or brought in for every sweep."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn

from runtime.checkpoint import Checkpoint
from runtime.linear import Tensors
from runtime.lookahead import Lookahead
from runtime.placement import Plan, Share
from runtime.progress_line import progress_line
from runtime.qwen2 import Block, Rotary

READERS = 2  # one reads while another unpacks; more would hold more blocks that are not in place yet


class ShareBlocks:
    """The blocks that one device computes.

    Attributes:
        resident: those that stay there, by index.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, share: Share, held: dict[int, Tensors]):
        """`held` are blocks in host memory, by index; any other that is streamed is read from disk."""
        self.share = share
        self.device = share.device.torch
        self.resident: dict[int, Block] = {}
        self._checkpoint = checkpoint
        self._plan = plan
        self._held = held
        self._last = checkpoint.architecture.num_hidden_layers - 1
        self._rotary = Rotary(checkpoint.architecture, checkpoint.architecture.max_position_embeddings, self.device)
        self._bus = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def bring(self, index: int) -> Block:
        """Block `index` from host memory or disk, whole and on the device."""
        held = self._held.get(index)
        return self._build(index, self._checkpoint.read_block(index) if held is None else held)

    def in_order(self) -> Generator[tuple[int, Block], None, None]:
        """All blocks, streamed ones as they are brought in. Whoever lets one go before asking for the next sees no more
        than the plan's buffers beside the resident ones."""
        streamed = [index for index in self.share.blocks if index not in self.resident]
        with Lookahead(self.bring, streamed, depth=self._plan.buffers - 1) as coming:
            for index in self.share.blocks:
                yield index, self.resident[index] if index in self.resident else next(coming)

    def _build(self, index: int, tensors: Tensors) -> Block:
        # Copies have a CUDA stream of their own, so that they pass beside products. It is waited for here, and products
        # with a block are over before the block is let go (`check_finite` looks at their outcome).
        with torch.cuda.stream(self._bus) if self._bus else nullcontext():
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            block = Block.from_tensors(
                self._checkpoint.architecture, moved, self._rotary, self._plan.numerics, self._checkpoint.quantization
            )
            if self._plan.keep:
                block.densify()
            if self._plan.stacked and index != self._last:
                block.stack()
            if self._plan.numerics.float8:
                block.to_float8()
        if self._bus:
            self._bus.synchronize()
        return block


def load_blocks(checkpoint: Checkpoint, plan: Plan, console: Console) -> list[ShareBlocks]:
    """Bring in what stays, on each device of the plan, with a progress line where `console` is a terminal.

    Raises:
        CheckpointError: a file no longer holds what its header said, or a packed linear contradicts itself.
    """
    held: dict[int, Tensors] = {}
    shares = [ShareBlocks(checkpoint, plan, share, held) for share in plan.shares]
    on_host = [] if plan.source == "disk" else sorted({*plan.shares[0].blocks} - _everywhere(plan.shares))
    pinned = shares[0].device.type == "cuda"

    def hold(index: int) -> None:
        tensors = checkpoint.read_block(index)
        held[index] = {name: tensor.pin_memory() for name, tensor in tensors.items()} if pinned else tensors

    def place(blocks: ShareBlocks, index: int) -> None:
        blocks.resident[index] = blocks.bring(index)

    work: list[Callable[[], None]] = [partial(hold, index) for index in on_host]
    work += [partial(place, blocks, index) for blocks in shares for index in sorted(blocks.share.resident)]
    with (
        progress_line(console, "loading", MofNCompleteColumn()) as progress,
        Lookahead(lambda task: task(), work, depth=READERS, threads=READERS) as done,
    ):
        for _ in progress.track(done, total=len(work), description="loading"):
            pass
    return shares


def _everywhere(shares: Sequence[Share]) -> frozenset[int]:
    """Blocks that stay on every device of a sweep."""
    return frozenset.intersection(*(share.resident for share in shares))
