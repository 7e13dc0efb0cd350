"""The executor: visit the blocks one after another, each with every token there is.

A reward model never generates, so a score is one pass through the blocks. Whoever cannot or need not hold
the whole model makes this sweep: bring a block in, push every batch through it, let it go, while the next
block's weights are already being read. Weights move once however many conversations there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

import torch

from runtime.architecture import HEAD_TENSORS
from runtime.batching import PackedBatch
from runtime.checkpoint import Checkpoint
from runtime.errors import LostJobError, NonFiniteError
from runtime.linear import Tensors
from runtime.lookahead import Lookahead
from runtime.qwen2 import Block, ScoreHead


class Stream:
    """Hidden states of packed batches between two blocks.

    There are two buffers [tokens, H]: a block reads `current` and writes `following`, then they change
    places. `current` is therefore intact until the whole block is done, which is what lets a killed job go
    on. With a `directory` the buffers are memory-mapped files, `NAME.0.bin` and `NAME.1.bin`; else memory.
    A stream that need not outlive a kill is `in_place`: both are one buffer.
    """

    def __init__(
        self,
        batches: Sequence[PackedBatch],
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
        directory: Path | None = None,
        name: str = "stream",
        finished_blocks: int = 0,
        in_place: bool = False,
        home: torch.device | str = "cpu",
    ):
        """`device` is where blocks compute; `finished_blocks` says which buffer is current on resuming; `home` is where
        buffers live that are no files.

        Raises:
            LostJobError: blocks are finished and the files that hold what came of them are not there.
            OSError: the disk has no room for the buffers.
        """
        self.name = name
        self.device = torch.device(device)
        self.batches = [batch.to(self.device) for batch in batches]
        self._starts = [0]
        for batch in batches:
            self._starts.append(self._starts[-1] + batch.tokens)
        shape = (self._starts[-1], hidden_size)
        self._files = [None if directory is None else directory / f"{name}.{turn}.bin" for turn in (0, 1)]
        if directory is not None and finished_blocks:
            _refuse_lost(self._files[finished_blocks % 2], shape, dtype)
        self._buffers = [_buffer(shape, dtype, file, home) for file in self._files[: 1 if in_place else 2]]
        self.finished_blocks = finished_blocks

    @property
    def current(self) -> torch.Tensor:
        """[tokens, H], what the next block reads."""
        return self._buffers[self.finished_blocks % len(self._buffers)]

    @property
    def following(self) -> torch.Tensor:
        """[tokens, H], what the next block writes."""
        return self._buffers[(self.finished_blocks + 1) % len(self._buffers)]

    def rows(self, index: int) -> slice:
        """Where batch `index` lies in the buffers."""
        return slice(self._starts[index], self._starts[index + 1])

    def read(self, index: int, *, following: bool = False) -> torch.Tensor:
        """Hidden states [T, H] of batch `index`, on the device."""
        return (self.following if following else self.current)[self.rows(index)].to(self.device)

    def write(self, index: int, hidden: torch.Tensor) -> None:
        """Set what batch `index` is after the block."""
        self.following[self.rows(index)] = hidden

    def embed(self, embedding: torch.Tensor) -> None:
        """Start before the first block: look every token up in `embedding` [vocab, H]."""
        self.finished_blocks = 0
        for index, batch in enumerate(self.batches):
            rows = embedding[batch.token_ids.cpu()]
            self.current[self.rows(index)] = rows.to(self.current.device).to(self.current.dtype)

    def advance(self, block: Block, block_index: int, batches: Sequence[int] | None = None) -> None:
        """Push batches (all, or those named) through `block` into `following`.

        Raises:
            NonFiniteError: naming the block and the row that first showed a NaN or an infinity.
        """
        for index in range(len(self.batches)) if batches is None else batches:
            hidden = block(self.read(index), self.batches[index])
            check_finite(hidden, self.batches[index], block_index, self.name)
            self.write(index, hidden)

    def turn_over(self) -> None:
        """The block is done: what it wrote becomes current."""
        self.finished_blocks += 1

    def sync(self) -> None:
        """Bring `following` to disk, if it lives in a file."""
        file = self._files[(self.finished_blocks + 1) % 2]
        if file is not None:
            handle = os.open(file, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def at_scored(self, *, following: bool = False) -> torch.Tensor:
        """Hidden states [rows, H] at the scored tokens, in the caller's order, on the CPU."""
        source = self.following if following else self.current
        places = [
            (row, start + token)
            for start, batch in zip(self._starts, self.batches, strict=False)
            for row, token in zip(batch.rows, batch.scored.tolist(), strict=True)
        ]
        return source[[token for _, token in sorted(places)]]


class Halted(Exception):
    """Raised in a thread whose work nobody waits for any more; no user sees it."""


@torch.inference_mode()
def sweep(stream: Stream, blocks: Iterator[tuple[int, Block]], last: int, halt: Event) -> list[torch.Tensor]:
    """Push all of `stream` through block after block.

    Args:
        blocks: all of them in order; each is let go before the next is asked for.
        last: index of the last one.
        halt: once it is set, the sweep ends with `Halted` before its next batch.

    Returns:
        Of each of the stream's batches, the hidden states [S, H] at the scored tokens after the last block.

    Raises:
        NonFiniteError: naming the block and the row that first showed a NaN or an infinity.
    """
    outputs: list[torch.Tensor] = []
    for index, block in blocks:
        for number, batch in enumerate(stream.batches):
            if halt.is_set():
                raise Halted
            hidden = stream.read(number)
            hidden = block.at_scored(hidden, batch) if index == last else block(hidden, batch)
            check_finite(hidden, batch, index, scored=index == last)
            if index == last:
                outputs.append(hidden)
            else:
                stream.write(number, hidden)
        stream.turn_over()
        del block
    return outputs


def _refuse_lost(file: Path | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size = shape[0] * shape[1] * dtype.itemsize
    if file is None or not file.is_file() or file.stat().st_size != size:
        raise LostJobError(
            f"{file} is missing or not {size} bytes long, so the job cannot go on; remove its output and start again."
        )


def _buffer(shape: tuple[int, int], dtype: torch.dtype, file: Path | None, home: torch.device | str) -> torch.Tensor:
    if file is None:
        return torch.empty(shape, dtype=dtype, device=home)
    count = shape[0] * shape[1]
    file.touch()
    with open(file, "r+b") as handle:
        # Reserved now: a full disk is an error here, where it would be a bus error in a mapped page later. Not opened
        # to append, since glibc reads and writes where a disk cannot reserve, as NFS 3.
        os.posix_fallocate(handle.fileno(), 0, max(1, count * dtype.itemsize))
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)


def check_finite(
    hidden: torch.Tensor, batch: PackedBatch, block: int, stream: str = "", *, scored: bool = False
) -> None:
    """Raise NonFiniteError naming the first row of `batch` whose hidden states [T, H] after `block` are not all finite.

    With `scored`, hidden is [S, H] at the scored tokens.
    """
    if torch.isfinite(hidden.sum(dtype=torch.float64)):  # finite only if every term is
        return
    first = int((~torch.isfinite(hidden)).any(-1).nonzero()[0])
    row = batch.rows[first] if scored else batch.row_at(first)
    where = f"block {block}, {stream}" if stream else f"block {block}"
    fault = NonFiniteError(
        f"{where}: a non-finite activation in conversation {row}; look for damaged weights in this block, "
        "or compute in float32 if the checkpoint is float16."
    )
    fault.block = block
    raise fault


def read_blocks(checkpoint: Checkpoint, start: int = 0, *, prefetch: bool = True) -> Iterator[tuple[int, Tensors]]:
    """Tensors of block `start` and on, one at a time; the next is read while the current one is in use."""
    indices = range(start, checkpoint.architecture.num_hidden_layers)
    with Lookahead(checkpoint.read_block, indices, depth=int(prefetch)) as blocks:
        for index in indices:
            yield index, next(blocks)


def read_head(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> ScoreHead:
    """The final norm and the score head."""
    norm, *score = (checkpoint.read(name).to(device) for name in ("model.norm.weight", *HEAD_TENSORS))
    return ScoreHead(norm, score[0], score[1], score[2], score[3], checkpoint.architecture.rms_norm_eps)
