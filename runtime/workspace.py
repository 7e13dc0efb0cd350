"""Buffers that the linears of a device take turns in, so that a product allocates no weight."""

from __future__ import annotations

import threading
from math import prod

import torch

_OF_THREAD = threading.local()


class Workspace:
    """Named buffers on one device, each as large as the largest tensor that was ever taken from it.

    What is taken is valid until the next taking under the same name: a dequantized weight lasts for one product.
    A workspace belongs to one thread, and on CUDA to the one stream in which that thread computes.
    """

    def __init__(self, device: torch.device | str):
        """An empty workspace: buffers come with the first taking, and grow."""
        self.device = torch.device(device)
        self._buffers: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, device: torch.device) -> Workspace:
        """The calling thread's workspace on `device`."""
        spaces: dict[torch.device, Workspace] = _OF_THREAD.__dict__.setdefault("spaces", {})
        if device not in spaces:
            spaces[device] = cls(device)
        return spaces[device]

    @property
    def nbytes(self) -> int:
        """What the buffers hold, in bytes."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with arbitrary values, at the start of buffer `name`."""
        nbytes = prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < nbytes:
            self._buffers.pop(name, None)
            del buffer  # the old one goes before the new one comes
            with torch.inference_mode(False):  # else it could not be written to outside of inference mode
                buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self._buffers[name] = buffer
        return buffer[:nbytes].view(dtype).view(shape)

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
