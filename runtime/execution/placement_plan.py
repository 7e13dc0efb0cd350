"""The placement plan: which device holds which blocks, and how many tokens are computed at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.execution.devices import Device
from runtime.modeling.precision import Precision

# Tokens per chunk. On a CPU the activations of a chunk should stay in cache. On a GPU a chunk should be so long that
# dequantizing the weights costs little: 1.5 % at 16,384 tokens of a 72B. Halved down to the minimum if memory is short.
CPU_CHUNK_TOKENS, MIN_CPU_CHUNK_TOKENS = 1024, 128
CUDA_CHUNK_TOKENS, MIN_CUDA_CHUNK_TOKENS = 16384, 1024
MIN_CHUNKS = 4  # chunks per call: enough for sorting rows by prefix to pay, and for every device of a split to work
CHUNKS_PER_DEVICE = 8  # of a split: keeps all devices busy except while the pipeline fills and drains
MIN_SWEEP_TOKENS = 16384  # computing a block on that many tokens takes longer than reading it
QUEUED_CHUNKS_PER_DEVICE = 2  # chunks that wait before each device of a split


@dataclass(frozen=True)
class DeviceShare:
    """The blocks and memory of one device.

    Attributes:
        blocks: indices of the blocks that it computes.
        resident: indices of those that stay in its memory.
        nbytes: planned peak memory, without the hidden states of a sweep.
        spare_bytes: what remains of the budget, for the hidden states of a sweep.
    """

    device: Device
    blocks: range
    resident: frozenset[int]
    nbytes: int
    spare_bytes: int


@dataclass(frozen=True)
class PlacementPlan:
    """How a checkpoint is placed and computed.

    Attributes:
        shares: one per device; for a split, in block order.
        token_budget: tokens per chunk, the batch that passes through a block at once.
        keep_dequantized: whether dequantized weights are kept in place of the stored ones.
        stacked: whether q, k and v are computed as one product, and gate and up as another.
        block_buffers: streamed blocks in memory at once; with 2, the next block is prefetched.
        source: where streamed blocks are copied from.
        spare_host_bytes: host memory for hidden states that do not fit on a device; those beyond it go to files.
    """

    placement: Literal["resident", "split", "streamed"]
    shares: tuple[DeviceShare, ...]
    precision: Precision
    token_budget: int
    keep_dequantized: bool
    stacked: bool
    block_buffers: int = 2
    source: Literal["host", "disk"] = "disk"
    spare_host_bytes: int = 0

    @property
    def window_tokens(self) -> int:
        """Tokens that a caller with many rows should pass per call, for full speed."""
        if self.placement == "split":
            return CHUNKS_PER_DEVICE * len(self.shares) * self.token_budget
        minimum = MIN_SWEEP_TOKENS if self.placement == "streamed" else 0
        return max(MIN_CHUNKS * self.token_budget, minimum)

    def chunk_tokens(self, tokens: int) -> int:
        """Chunk size for a call with `tokens` tokens: below `token_budget` if devices of a split would idle."""
        if self.placement != "split":
            return self.token_budget
        minimum = MIN_CPU_CHUNK_TOKENS if self.shares[0].device.kind == "cpu" else MIN_CUDA_CHUNK_TOKENS
        return min(self.token_budget, max(minimum, tokens // (MIN_CHUNKS * len(self.shares))))
