"""What this machine's devices can do, measured."""

from __future__ import annotations

import time

import torch

from runtime.devices import cuda_devices


def matmul_rate(dtype: torch.dtype, device: str, seconds: float = 0.2) -> float:
    """Floating-point operations a second of a device's matrix product, measured now."""
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        b = a @ a
        b[0, 0].item()
        done += 1
    return 2.0 * size**3 * done / (time.perf_counter() - start)


def used_devices() -> list[str]:
    """The CUDA devices on which this process has held tensors, or else the CPU."""
    return [f"cuda:{index}" for index in range(cuda_devices()) if torch.cuda.max_memory_allocated(index)] or ["cpu"]
