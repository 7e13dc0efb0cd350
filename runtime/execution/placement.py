"""Plan which device holds which block, from a checkpoint's headers and the memory budgets, before anything is loaded.

Placements, in order of preference:

- *resident*: all blocks on one device;
- *split*: consecutive blocks on each of several devices, with chunks of tokens in flight between them;
- *streamed*: as many blocks as fit stay on the device, the others are copied in for every sweep. With several devices,
  each one computes all blocks for a part of the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.common.errors import ConfigurationError
from runtime.execution.devices import Device, DeviceNames, DeviceSelection, MemoryLimits, find_devices
from runtime.execution.memory_estimate import MemoryEstimate
from runtime.execution.placement_plan import (
    CPU_CHUNK_TOKENS,
    CUDA_CHUNK_TOKENS,
    MIN_CHUNKS,
    MIN_CPU_CHUNK_TOKENS,
    MIN_CUDA_CHUNK_TOKENS,
    MIN_SWEEP_TOKENS,
    QUEUED_CHUNKS_PER_DEVICE,
    DeviceShare,
    PlacementPlan,
)
from runtime.execution.precision_choice import check_precision, choose_precision
from runtime.modeling.precision import Precision


def plan_placement(
    checkpoint: Checkpoint,
    *,
    devices: DeviceNames = "auto",
    memory: MemoryLimits | None = None,
    dtype: str | Precision = "auto",
    token_budget: int | None = None,
    stream: bool = False,
) -> PlacementPlan:
    """Plan the placement of a checkpoint's blocks.

    Args:
        devices: as in `find_devices`; devices that are named are all used.
        memory: memory budget per device, as in `find_devices`; 90 % of the free memory by default.
        dtype: of matmul inputs, `auto`, `float32`, `bfloat16` or `fp8`; or a `Precision`.
        token_budget: tokens per chunk; chosen from device and memory by default.
        stream: keep no block resident and read each from disk for every sweep, which takes the least memory.

    Raises:
        ConfigurationError: a device does not exist or has no room for one block, or the dtype is not supported.
    """
    selection = find_devices(devices, memory)
    precision = dtype if isinstance(dtype, Precision) else choose_precision(dtype, selection)
    check_precision(checkpoint, precision)
    memory_estimate = MemoryEstimate(checkpoint, precision)
    _check_host_memory(memory_estimate, selection)
    chunk_sizes = [token_budget] if token_budget is not None else list(_chunk_sizes(selection.kind))
    fewest = len(selection.selected) if selection.use_all else 1
    for count in [] if stream else range(fewest, len(selection.selected) + 1):
        if plan := _plan_all_resident(memory_estimate, selection.selected[:count], chunk_sizes):
            return plan
    while True:
        try:
            return _plan_streamed(memory_estimate, selection, chunk_sizes, stream)
        except ConfigurationError:
            if selection.use_all or len(selection.selected) == 1:
                raise
            selection = replace(selection, selected=selection.selected[:-1])  # drop the GPU with the least memory


def _chunk_sizes(kind: str) -> Iterator[int]:
    tokens, minimum = (
        (CPU_CHUNK_TOKENS, MIN_CPU_CHUNK_TOKENS) if kind == "cpu" else (CUDA_CHUNK_TOKENS, MIN_CUDA_CHUNK_TOKENS)
    )
    while tokens >= minimum:
        yield tokens
        tokens //= 2


def _plan_all_resident(
    memory_estimate: MemoryEstimate, devices: Sequence[Device], chunk_sizes: Sequence[int]
) -> PlacementPlan | None:
    """Plan a resident or split placement; None if the blocks do not fit.

    Longer chunks are preferred to shorter ones, then dequantized weights to stored ones.
    """
    may_keep = (
        devices[0].kind == "cpu" and not memory_estimate.stored_in_matmul_dtype and not memory_estimate.precision.float8
    )
    for tokens in chunk_sizes:
        for keep_dequantized in (True, False) if may_keep else (False,):
            if shares := _fit_resident(memory_estimate, devices, tokens, keep_dequantized):
                stacked = (
                    keep_dequantized
                    or memory_estimate.stored_in_matmul_dtype
                    or memory_estimate.checkpoint.quantization is not None
                )
                placement: Literal["resident", "split"] = "split" if len(shares) > 1 else "resident"
                return PlacementPlan(placement, shares, memory_estimate.precision, tokens, keep_dequantized, stacked)
    return None


def _fit_resident(
    memory_estimate: MemoryEstimate, devices: Sequence[Device], tokens: int, keep_dequantized: bool
) -> tuple[DeviceShare, ...]:
    """Shares of consecutive blocks that all fit; empty if the blocks do not fit."""
    fixed = [_fixed_bytes(memory_estimate, device, tokens, keep_dequantized) for device in devices]
    if len(devices) > 1:
        longest = memory_estimate.checkpoint.model_config.max_position_embeddings
        queued_bytes = memory_estimate.hidden_state_bytes(max(QUEUED_CHUNKS_PER_DEVICE * tokens, longest))
        fixed = [nbytes + queued_bytes for nbytes in fixed]
    block_bytes = memory_estimate.block_bytes(keep_dequantized=keep_dequantized)
    capacities = [
        max(0, (device.budget - nbytes) // block_bytes) for device, nbytes in zip(devices, fixed, strict=True)
    ]
    shares, first = [], 0
    for index, count in enumerate(distribute_blocks(memory_estimate.block_count, capacities) or []):
        if count:
            blocks, nbytes = range(first, first + count), fixed[index] + count * block_bytes
            device = devices[index]
            shares.append(DeviceShare(device, blocks, frozenset(blocks), nbytes, device.budget - nbytes))
        first += count
    return tuple(shares)


def distribute_blocks(blocks: int, capacities: Sequence[int]) -> list[int] | None:
    """Number of blocks per device: as equal as the capacities allow; None if `blocks` do not fit."""
    counts, left = [0] * len(capacities), blocks
    for turn, device in enumerate(sorted(range(len(capacities)), key=capacities.__getitem__)):
        counts[device] = min(capacities[device], left // (len(capacities) - turn))
        left -= counts[device]
    return None if left else counts


def _plan_streamed(
    memory_estimate: MemoryEstimate, selection: DeviceSelection, chunk_sizes: Sequence[int], forced: bool
) -> PlacementPlan:
    """Plan a streamed placement; two block buffers are preferred to one, then longer chunks to shorter ones.

    Args:
        forced: keep no block resident.

    Raises:
        ConfigurationError: a device has no room for one block.
    """
    for block_buffers in (2, 1):
        for tokens in chunk_sizes:
            shares = [
                _fit_streamed(memory_estimate, device, tokens, block_buffers, forced) for device in selection.selected
            ]
            fitting = tuple(share for share in shares if share is not None)
            if len(fitting) == len(shares):
                return _make_streamed_plan(memory_estimate, selection, fitting, tokens, block_buffers, forced)
    block_bytes = memory_estimate.block_bytes(keep_dequantized=False)
    needs = {
        device: _fixed_bytes(memory_estimate, device, chunk_sizes[-1], False) + block_bytes
        for device in selection.selected
    }
    device = next(device for device, needed in needs.items() if needed > device.budget)
    raise ConfigurationError(
        f"{device.name}: {device.budget:,} bytes may be used, but one block with {chunk_sizes[-1]:,} tokens at once "
        f"needs {needs[device]:,}; allow it more memory, take a smaller token budget, or choose another device."
    )


def _fit_streamed(
    memory_estimate: MemoryEstimate, device: Device, tokens: int, block_buffers: int, forced: bool
) -> DeviceShare | None:
    """A share of all blocks with as many resident as fit; None if not even the block buffers fit.

    Hidden states of a window get their room before resident blocks do, up to half of what is left.
    """
    block_bytes = memory_estimate.block_bytes(keep_dequantized=False)
    nbytes = _fixed_bytes(memory_estimate, device, tokens, False) + block_buffers * block_bytes
    if nbytes > device.budget:
        return None
    left = device.budget - nbytes
    hidden_bytes = memory_estimate.hidden_state_bytes(max(MIN_CHUNKS * tokens, MIN_SWEEP_TOKENS))
    count = 0 if forced else (left - min(hidden_bytes, left // 2)) // block_bytes
    resident = choose_resident_blocks(memory_estimate.block_count, min(count, memory_estimate.block_count))
    nbytes += len(resident) * block_bytes
    return DeviceShare(device, range(memory_estimate.block_count), resident, nbytes, device.budget - nbytes)


def choose_resident_blocks(blocks: int, resident: int) -> frozenset[int]:
    """Indices of `resident` of the blocks, evenly spaced, which leaves time to prefetch the streamed ones between."""
    return frozenset(index for index in range(blocks) if (index + 1) * resident // blocks > index * resident // blocks)


def _make_streamed_plan(
    memory_estimate: MemoryEstimate,
    selection: DeviceSelection,
    shares: tuple[DeviceShare, ...],
    tokens: int,
    block_buffers: int,
    forced: bool,
) -> PlacementPlan:
    """Stream from host memory if the streamed blocks fit there beside a sweep's hidden states, else from disk."""
    streamed = memory_estimate.block_count - len(frozenset.intersection(*(share.resident for share in shares)))
    on_host = shares[0].device.is_host
    spare_bytes = shares[0].spare_bytes if on_host else selection.host.budget - _host_bytes(memory_estimate, selection)
    host_block_bytes = streamed * (
        memory_estimate.pinned_block_bytes if selection.kind == "cuda" else memory_estimate.stored_block_bytes
    )
    needed_bytes = host_block_bytes + memory_estimate.hidden_state_bytes(MIN_SWEEP_TOKENS)
    from_host = not (forced or on_host) and needed_bytes <= spare_bytes
    return PlacementPlan(
        "streamed",
        shares,
        memory_estimate.precision,
        tokens,
        keep_dequantized=False,
        stacked=memory_estimate.checkpoint.quantization is not None,
        block_buffers=block_buffers,
        source="host" if from_host else "disk",
        spare_host_bytes=spare_bytes - host_block_bytes if from_host else spare_bytes,
    )


def _fixed_bytes(memory_estimate: MemoryEstimate, device: Device, tokens: int, keep_dequantized: bool) -> int:
    """Memory that a device needs besides blocks and the hidden states of a sweep."""
    embedding_bytes = memory_estimate.embedding_bytes if device.is_host else 0
    flash = device.kind == "cuda" and memory_estimate.precision.matmul_dtype != torch.float32
    return (
        embedding_bytes
        + memory_estimate.non_block_bytes
        + memory_estimate.product_buffer_bytes(keep_dequantized=keep_dequantized)
        + memory_estimate.activation_bytes(tokens, tiled_attention=not flash)
    )


def _host_bytes(memory_estimate: MemoryEstimate, selection: DeviceSelection) -> int:
    """Host memory that other devices need: the embedding, and the blocks being copied."""
    return memory_estimate.embedding_bytes + 2 * len(selection.selected) * memory_estimate.stored_block_bytes


def _check_host_memory(memory_estimate: MemoryEstimate, selection: DeviceSelection) -> None:
    needed = 0 if selection.selected[0].is_host else _host_bytes(memory_estimate, selection)
    if needed > selection.host.budget:
        raise ConfigurationError(
            f"{selection.host.name}: {selection.host.budget:,} bytes may be used, but the embedding and the blocks "
            f"being copied to {selection.selected[0].name} need {needed:,}; allow it more memory."
        )
