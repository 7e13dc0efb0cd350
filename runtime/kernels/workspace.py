"""Memory for dequantization: reusable buffers per device, and chunk sizes that stay in cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

import torch

# Weights per chunk. A chunk passes through about five elementwise operations in fp32. On CPUs, 4 MiB stay in the shared
# cache and still amortize the start of each operation; on GPUs a launch must be large enough to fill the device.
CHUNK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 24}
_THREAD_LOCAL = threading.local()


class Workspace:
    """Named buffers on one device; each grows to the largest tensor requested from it.

    A tensor is valid until the next request with the same name, so a dequantized weight lasts for one product.
    A workspace belongs to one thread and, on CUDA, to the stream in which that thread computes.
    """

    def __init__(self, device: torch.device | str):
        """Create an empty workspace; buffers are allocated on first use."""
        self.device = torch.device(device)
        self._buffers: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, device: torch.device) -> Workspace:
        """Return the calling thread's workspace on `device`."""
        workspaces: dict[torch.device, Workspace] = _THREAD_LOCAL.__dict__.setdefault("workspaces", {})
        if device not in workspaces:
            workspaces[device] = cls(device)
        return workspaces[device]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all buffers."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def get_buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized contiguous tensor at the start of buffer `name`."""
        nbytes = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            self._buffers.pop(name, None)
            del buffer  # free the old buffer before the new one is allocated
            with torch.inference_mode(False):  # tensors made in inference mode cannot be written to outside of it
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self._buffers[name] = buffer
        return buffer[:nbytes].view(dtype).view(shape)

    def clear(self) -> None:
        """Free all buffers."""
        self._buffers.clear()


def items_per_chunk(weights_per_item: int, device: torch.device) -> int:
    """Return how many items (rows, blocks) of `weights_per_item` weights form a chunk; at least 1."""
    return max(1, CHUNK_WEIGHTS.get(device.type, 1 << 20) // weights_per_item)


def chunks(count: int, max_items: int, group: int = 1) -> Iterator[slice]:
    """Yield slices that cover `count` items, each of at most `max_items`.

    A slice holds whole groups of `group` items, or part of a single group if a group exceeds `max_items`. A shorter
    last group gets a slice of its own.
    """
    whole, step = count // group * group, max_items // group * group
    if step:
        for start in range(0, whole, step):
            yield slice(start, min(start + step, whole))
        if whole < count:
            yield slice(whole, count)
        return
    for first in range(0, count, group):
        end = min(first + group, count)
        for start in range(first, end, max_items):
            yield slice(start, min(start + max_items, end))
