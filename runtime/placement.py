"""Which block lives where, decided from a checkpoint's headers and free memory before anything is loaded.

In order of preference: *resident*, all blocks on one device; *split*, consecutive blocks on each of several devices
with chunks of tokens in flight between them; *streamed*, as many blocks as fit staying and the others brought in for
every sweep, each device with its share of the conversations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from runtime.architecture import BLOCK_LINEARS
from runtime.checkpoint import Checkpoint
from runtime.devices import Device, Devices, Memory, Names, find_devices
from runtime.errors import PlanError
from runtime.float8 import WIDTHS
from runtime.footprint import Footprint
from runtime.numerics import FLOAT32, NUMERICS, Numerics, matmul_dtype

# Tokens at once. On a CPU a chunk's activations should stay in cache; on a GPU it should be long enough for unpacking
# the weights to cost little (1.5 % at 16,384 tokens of a 72B). Halved where memory is short, down to the least.
CPU_TOKENS, LEAST_CPU_TOKENS = 1024, 128
CUDA_TOKENS, LEAST_CUDA_TOKENS = 16384, 1024
# Chunks in a call that is read from a file: enough to sort by prefix; and to keep all devices of a split busy but for
# the beginning and the end; and tokens enough in a sweep for reading a block to take less time than computing it.
CHUNKS, CHUNKS_A_DEVICE, SWEEP_TOKENS = 4, 8, 16384
IN_FLIGHT = 2  # chunks that wait before each device of a split


@dataclass(frozen=True)
class Share:
    """What one device holds and computes.

    Attributes:
        blocks: that it computes.
        resident: those of them that stay there.
        nbytes: the most that is planned to be used, hidden states of a sweep apart.
        spare: bytes that are left for those.
    """

    device: Device
    blocks: range
    resident: frozenset[int]
    nbytes: int
    spare: int


@dataclass(frozen=True)
class Plan:
    """How a checkpoint will be held and computed.

    Attributes:
        shares: by device; a split's in the order of its blocks.
        token_budget: tokens in a chunk, the unit that passes through a block.
        keep: whether dequantized copies of the weights are held in place of the stored ones.
        stacked: whether q, k and v are one product, and gate and up another.
        buffers: blocks of a sweep in memory at once: 2 where the next is brought in meanwhile.
        source: where streamed blocks are brought in from.
        host_spare: bytes of host memory for hidden states that a device has no room for; more go to files.
    """

    placement: Literal["resident", "split", "streamed"]
    shares: tuple[Share, ...]
    numerics: Numerics
    token_budget: int
    keep: bool
    stacked: bool
    buffers: int = 2
    source: Literal["host", "disk"] = "disk"
    host_spare: int = 0

    @property
    def window_tokens(self) -> int:
        """Tokens that a call should bring where many are to be scored."""
        if self.placement == "split":
            return CHUNKS_A_DEVICE * len(self.shares) * self.token_budget
        least = SWEEP_TOKENS if self.placement == "streamed" else 0
        return max(CHUNKS * self.token_budget, least)

    def chunk_tokens(self, tokens: int) -> int:
        """Tokens in a chunk of a call that brings `tokens`: fewer than the budget if some device would idle."""
        if self.placement != "split":
            return self.token_budget
        least = LEAST_CPU_TOKENS if self.shares[0].device.kind == "cpu" else LEAST_CUDA_TOKENS
        return min(self.token_budget, max(least, tokens // (CHUNKS * len(self.shares))))


def make_plan(
    checkpoint: Checkpoint,
    *,
    devices: Names = "auto",
    memory: Memory | None = None,
    dtype: str | Numerics = "auto",
    token_budget: int | None = None,
    stream: bool = False,
) -> Plan:
    """Decide where the blocks of a checkpoint live.

    Args:
        devices: as `find_devices` takes them; those named are all used.
        memory: bytes that may be used by device, where it is not to be what is free.
        dtype: of matmul inputs, `auto`, `float32`, `bfloat16` or `fp8`; or the whole numerics.
        token_budget: tokens in a chunk, in place of the plan's choice.
        stream: let no block stay, and read each from disk for every sweep: the least memory.

    Raises:
        PlanError: a device is not there, or has no room for one block; or the weights cannot be multiplied so.
    """
    found = find_devices(devices, memory)
    numerics = dtype if isinstance(dtype, Numerics) else _numerics(dtype, found)
    _check_numerics(checkpoint, numerics)
    footprint = Footprint(checkpoint, numerics)
    _check_host(footprint, found)
    chunks = [token_budget] if token_budget is not None else list(_chunks(found.kind))
    fewest = len(found.wanted) if found.all_needed else 1
    for count in [] if stream else range(fewest, len(found.wanted) + 1):
        if plan := _all_stay(footprint, found.wanted[:count], chunks):
            return plan
    while True:
        try:
            return _streamed(footprint, found, chunks, stream)
        except PlanError:
            if found.all_needed or len(found.wanted) == 1:
                raise
            found = replace(found, wanted=found.wanted[:-1])  # the smallest, which nobody asked for


def _chunks(kind: str) -> Iterator[int]:
    tokens, least = (CPU_TOKENS, LEAST_CPU_TOKENS) if kind == "cpu" else (CUDA_TOKENS, LEAST_CUDA_TOKENS)
    while tokens >= least:
        yield tokens
        tokens //= 2


def _all_stay(footprint: Footprint, devices: Sequence[Device], chunks: Sequence[int]) -> Plan | None:
    """Resident or split, if all blocks fit: with long chunks rather than short ones, dequantized rather than not."""
    may_keep = devices[0].kind == "cpu" and not footprint.is_ready and not footprint.numerics.float8
    for tokens in chunks:
        for keep in (True, False) if may_keep else (False,):
            others = [_fixed(footprint, device, tokens, keep) for device in devices]
            if len(devices) > 1:
                others = [each + footprint.hidden(IN_FLIGHT * tokens) for each in others]
            block = footprint.block(keep=keep)
            room = [max(0, (device.budget - each) // block) for device, each in zip(devices, others, strict=True)]
            counts = deal(footprint.blocks, room)
            if counts is None:
                continue
            shares, first = [], 0
            for device, count, other in zip(devices, counts, others, strict=True):
                own = range(first, first + count)
                nbytes = other + count * block
                if own:
                    shares.append(Share(device, own, frozenset(own), nbytes, device.budget - nbytes))
                first += count
            placement: Literal["resident", "split"] = "split" if len(shares) > 1 else "resident"
            stacked = keep or footprint.is_ready or footprint.checkpoint.quantization is not None
            return Plan(placement, tuple(shares), footprint.numerics, tokens, keep, stacked)
    return None


def deal(blocks: int, room: Sequence[int]) -> list[int] | None:
    """How many of `blocks` each device takes: alike, but none more than it has room for; None if they do not fit."""
    counts, left = [0] * len(room), blocks
    for turn, device in enumerate(sorted(range(len(room)), key=room.__getitem__)):
        counts[device] = min(room[device], left // (len(room) - turn))
        left -= counts[device]
    return None if left else counts


def _streamed(footprint: Footprint, found: Devices, chunks: Sequence[int], forced: bool) -> Plan:
    """With two buffers rather than one, and long chunks rather than short ones.

    Raises:
        PlanError: there is no room for one block.
    """
    block = footprint.block(keep=False)
    for buffers in (2, 1):
        for tokens in chunks:
            shares, hidden = [], footprint.hidden(max(CHUNKS * tokens, SWEEP_TOKENS))
            for device in found.wanted:
                nbytes = _fixed(footprint, device, tokens, False) + buffers * block
                if nbytes > device.budget:
                    break
                left = device.budget - nbytes
                stay = 0 if forced else (left - min(hidden, left // 2)) // block
                resident = spread(footprint.blocks, min(stay, footprint.blocks))
                nbytes += len(resident) * block
                shares.append(Share(device, range(footprint.blocks), resident, nbytes, device.budget - nbytes))
            else:
                return _from_host_or_disk(footprint, found, tuple(shares), tokens, buffers, forced)
    needs = {device: _fixed(footprint, device, chunks[-1], False) + block for device in found.wanted}
    device = next(device for device, needed in needs.items() if needed > device.budget)
    raise PlanError(
        f"{device.name}: {device.budget:,} bytes may be used, but one block with {chunks[-1]:,} tokens at once needs "
        f"{needs[device]:,}; allow it more memory, take a smaller token budget, or choose another device."
    )


def spread(blocks: int, stay: int) -> frozenset[int]:
    """`stay` of the blocks, evenly among them, so that there is time to bring in the others between."""
    return frozenset(index for index in range(blocks) if (index + 1) * stay // blocks > index * stay // blocks)


def _from_host_or_disk(
    footprint: Footprint, found: Devices, shares: tuple[Share, ...], tokens: int, buffers: int, forced: bool
) -> Plan:
    streamed = footprint.blocks - len(frozenset.intersection(*(share.resident for share in shares)))
    on_host = shares[0].device.is_host
    spare = shares[0].spare if on_host else found.host.budget - _on_host(footprint, found)
    held = streamed * (footprint.pinned_block if found.kind == "cuda" else footprint.stored_block)
    from_host = not (forced or on_host) and held + footprint.hidden(SWEEP_TOKENS) <= spare
    return Plan(
        "streamed",
        shares,
        footprint.numerics,
        tokens,
        keep=False,
        stacked=footprint.checkpoint.quantization is not None,
        buffers=buffers,
        source="host" if from_host else "disk",
        host_spare=spare - held if from_host else spare,
    )


def _fixed(footprint: Footprint, device: Device, tokens: int, keep: bool) -> int:
    """What a device needs beside blocks."""
    embedding = footprint.embedding if device.is_host else 0
    return embedding + footprint.outer + footprint.products(keep=keep) + footprint.activations(tokens)


def _on_host(footprint: Footprint, found: Devices) -> int:
    """What the host needs for devices with memory of their own: the embedding, and blocks on their way."""
    return footprint.embedding + 2 * len(found.wanted) * footprint.stored_block


def _numerics(dtype: str, found: Devices) -> Numerics:
    """As `dtype` says; for `auto` what is fast on all devices."""
    dtypes = [matmul_dtype(dtype, device.name) for device in found.wanted]
    return FLOAT32 if "float32" in dtypes else NUMERICS[dtypes[0]]


def _check_numerics(checkpoint: Checkpoint, numerics: Numerics) -> None:
    if not numerics.float8:
        return
    quantization, shapes = checkpoint.quantization, map(checkpoint.architecture.linear_shape, BLOCK_LINEARS)
    if quantization is None or (quantization.method, quantization.bits) != ("gptq", 4):
        stored = "not quantized" if quantization is None else f"{quantization.method}, {quantization.bits} bits"
        raise PlanError(
            f"dtype is 'fp8', which is for GPTQ weights of 4 bits; {checkpoint.directory} is {stored}, and would lose "
            "by it what it has more than those, so take auto."
        )
    if odd := [width for shape in shapes for width in shape if width % WIDTHS]:
        raise PlanError(
            f"dtype is 'fp8', whose products want widths that {WIDTHS} divides; {checkpoint.directory} has one of "
            f"{odd[0]}, so take auto."
        )


def _check_host(footprint: Footprint, found: Devices) -> None:
    needed = 0 if found.wanted[0].is_host else _on_host(footprint, found)
    if needed > found.host.budget:
        raise PlanError(
            f"{found.host.name}: {found.host.budget:,} bytes may be used, but the embedding and blocks on their way to "
            f"{found.wanted[0].name} need {needed:,}; allow it more memory."
        )
