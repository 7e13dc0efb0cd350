"""Pieces of a weight that are small enough for the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# A piece passes through some five elementwise operations in fp32. In 4 MiB it stays in a shared cache, and what an
# operation costs to start, and to end in all threads, is still small beside it. A GPU wants launches that fill it.
WEIGHTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}


def at_once(weights_each: int, device: torch.device) -> int:
    """How many things of `weights_each` weights make a piece, at least one."""
    return max(1, WEIGHTS_AT_ONCE.get(device.type, 1 << 20) // weights_each)


def pieces(count: int, most: int, group: int = 1) -> Iterator[slice]:
    """Slices of `count` things, `most` at once: some whole groups, or where one is too large, parts of it.

    A last group that is shorter than the others is a piece by itself.
    """
    whole, step = count // group * group, most // group * group
    if step:
        for start in range(0, whole, step):
            yield slice(start, min(start + step, whole))
        if whole < count:
            yield slice(whole, count)
        return
    for first in range(0, count, group):
        end = min(first + group, count)
        for start in range(first, end, most):
            yield slice(start, min(start + most, end))
