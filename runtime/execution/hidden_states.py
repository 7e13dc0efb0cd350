"""Hold the hidden states of many batches between two blocks, in memory or in memory-mapped files."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch

from runtime.common.errors import UnresumableJobError
from runtime.common.files import naming
from runtime.execution.nonfinite import check_finite_hidden_states
from runtime.modeling.packed_batch import PackedBatch
from runtime.modeling.qwen2 import Block


class HiddenStates:
    """Hidden states of packed batches between two blocks.

    There are two swap buffers [tokens, H]: a block reads `current_buffer` and writes `next_buffer`, then they are
    swapped. `current_buffer` stays intact until the block is finished, so a killed job can be resumed. With `in_place`
    both are the same buffer, which takes half the memory but cannot be resumed.
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
        unnamed: bool = False,
        buffer_device: torch.device | str = "cpu",
    ):
        """Allocate the buffers, or map their files.

        Args:
            device: where blocks compute.
            directory: keep the buffers in files `NAME.0.bin` and `NAME.1.bin` here; None keeps them in memory.
            name: used in file names and error messages.
            finished_blocks: blocks that a resumed job has finished; its parity selects the current buffer.
            unnamed: the files in `directory` have no names, so that nothing is left of them even after a kill.
            buffer_device: where buffers in memory are allocated.

        Raises:
            UnresumableJobError: `finished_blocks` is above 0, and the current buffer's file is missing or too short.
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
            _check_buffer_file(self._files[finished_blocks % 2], shape, dtype)
        self._buffers = [
            torch.empty(shape, dtype=dtype, device=buffer_device)
            if file is None
            else _map_file(shape, dtype, file, unnamed)
            for file in self._files[: 1 if in_place else 2]
        ]
        self.finished_blocks = finished_blocks

    @property
    def current_buffer(self) -> torch.Tensor:
        """[tokens, H], the input of the next block."""
        return self._buffers[self.finished_blocks % len(self._buffers)]

    @property
    def next_buffer(self) -> torch.Tensor:
        """[tokens, H], the output of the next block."""
        return self._buffers[(self.finished_blocks + 1) % len(self._buffers)]

    def rows(self, index: int) -> slice:
        """The buffer rows of batch `index`."""
        return slice(self._starts[index], self._starts[index + 1])

    def read(self, index: int, *, next_buffer: bool = False) -> torch.Tensor:
        """Hidden states [T, H] of batch `index`, on the device."""
        return (self.next_buffer if next_buffer else self.current_buffer)[self.rows(index)].to(self.device)

    def write(self, index: int, hidden: torch.Tensor) -> None:
        """Store the hidden states [T, H] of batch `index` after the block."""
        self.next_buffer[self.rows(index)] = hidden

    def embed(self, embedding: torch.Tensor) -> None:
        """Fill the current buffer with the embeddings of all tokens.

        Args:
            embedding: [vocab, H].
        """
        self.finished_blocks = 0
        for index, batch in enumerate(self.batches):
            rows = embedding[batch.token_ids.cpu()]
            self.current_buffer[self.rows(index)] = rows.to(self.current_buffer.device).to(self.current_buffer.dtype)

    def advance(self, block: Block, block_index: int, batches: Sequence[int] | None = None) -> None:
        """Compute `block` on all batches, or on those with the given indices, into `next_buffer`.

        Raises:
            NonFiniteError: naming the block and the first row with a NaN or infinity.
        """
        for index in range(len(self.batches)) if batches is None else batches:
            hidden = block(self.read(index), self.batches[index])
            check_finite_hidden_states(hidden, self.batches[index], block_index, self.name)
            self.write(index, hidden)

    def swap_buffers(self) -> None:
        """Finish a block: `next_buffer` becomes `current_buffer`."""
        self.finished_blocks += 1

    def sync(self) -> None:
        """Flush `next_buffer` to disk, if it is a file."""
        file = self._files[(self.finished_blocks + 1) % len(self._buffers)]
        if file is not None:
            handle = os.open(file, os.O_RDWR)
            try:
                with naming(file):
                    os.fsync(handle)
            finally:
                os.close(handle)

    def at_scored_tokens(self, *, next_buffer: bool = False) -> torch.Tensor:
        """Hidden states [rows, H] at the scored tokens, in the caller's row order, on the buffer's device."""
        source = self.next_buffer if next_buffer else self.current_buffer
        token_indices = [
            (row, start + token)
            for start, batch in zip(self._starts, self.batches, strict=False)
            for row, token in zip(batch.rows, batch.scored.tolist(), strict=True)
        ]
        return source[[token for _, token in sorted(token_indices)]]


def _check_buffer_file(file: Path | None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size = shape[0] * shape[1] * dtype.itemsize
    if file is None or not file.is_file() or file.stat().st_size != size:
        raise UnresumableJobError(
            f"{file} is missing or not {size} bytes long, so the job cannot be resumed; "
            "remove its output and start again."
        )


def _map_file(shape: tuple[int, int], dtype: torch.dtype, file: Path, unnamed: bool) -> torch.Tensor:
    size = shape[0] * shape[1] * dtype.itemsize
    with (
        naming(file.parent if unnamed else file),
        TemporaryFile(dir=file.parent) if unnamed else open(file, "r+b", opener=_open_or_create) as handle,
    ):
        # Reserve the space now, so that a full disk raises an error here and not a bus error in a mapped page later.
        # Not append mode: where a file system cannot reserve, such as NFS 3, glibc emulates it by reading and writing.
        os.posix_fallocate(handle.fileno(), 0, max(1, size))
        mapped = mmap.mmap(handle.fileno(), max(1, size))
    return torch.frombuffer(mapped, dtype=torch.uint8)[:size].view(dtype).view(shape)


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)
