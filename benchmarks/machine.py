"""The machine that a result was measured on, in one line."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def describe_machine() -> str:
    """Processor, the instruction sets that decide its speed, threads, GPU and torch version."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    found = [name for name in INSTRUCTIONS if name in flags]
    parts = [f"{processor or platform.processor()} ({', '.join(found)})", f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}"])
