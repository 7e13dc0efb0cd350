"""Load blocks and the score head from a checkpoint onto devices."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.common.errors import NonFiniteError
from runtime.common.terminal import progress_line
from runtime.execution.placement_plan import DeviceShare, PlacementPlan
from runtime.execution.prefetcher import Prefetcher
from runtime.modeling.linear import Tensors
from runtime.modeling.qwen2 import Block, RotaryEmbedding
from runtime.modeling.score_head import ScoreHead

LOADER_THREADS = 2  # one reads while the other unpacks; more would hold more half-loaded blocks in memory


class DeviceBlocks:
    """The blocks that one device computes.

    Attributes:
        share: the device's part of the placement plan.
        device: the torch device.
        resident: blocks that stay on the device, by index.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: PlacementPlan, share: DeviceShare, host_blocks: dict[int, Tensors]
    ):
        """Create it without any block loaded.

        Args:
            host_blocks: tensors of streamed blocks in host memory, by index; other streamed blocks are read from disk.
        """
        self.share = share
        self.device = share.device.torch_device
        self.resident: dict[int, Block] = {}
        self._checkpoint = checkpoint
        self._plan = plan
        self._host_blocks = host_blocks
        self._last = checkpoint.model_config.num_hidden_layers - 1
        self._rotary = RotaryEmbedding(
            checkpoint.model_config, checkpoint.model_config.max_position_embeddings, self.device
        )
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def load_block(self, index: int) -> Block:
        """Load block `index` onto the device, from host memory if it is there, else from disk."""
        tensors = self._host_blocks.get(index)
        return self._build(index, self._checkpoint.read_block(index) if tensors is None else tensors)

    def iterate_blocks(self) -> Generator[tuple[int, Block], None, None]:
        """Yield (index, block) for all blocks in order, with streamed ones loaded on the way.

        The caller must drop each block before it takes the next one. Then no more streamed blocks are in memory than
        the plan's `block_buffers`.
        """
        streamed = [index for index in self.share.blocks if index not in self.resident]
        with Prefetcher(self.load_block, streamed, depth=self._plan.block_buffers - 1) as loaded:
            for index in self.share.blocks:
                yield index, self.resident[index] if index in self.resident else next(loaded)

    def _build(self, index: int, tensors: Tensors) -> Block:
        # Copies run on their own CUDA stream, so that they overlap with products. The block is safe to use, since that
        # stream is synchronized below, and safe to free later, since `sweep` waits for products.
        with torch.cuda.stream(self._copy_stream) if self._copy_stream else nullcontext():
            on_device = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            block = Block.from_tensors(
                self._checkpoint.model_config,
                on_device,
                self._rotary,
                self._plan.precision,
                self._checkpoint.block_quantization(index),
            )
            if self._plan.keep_dequantized:
                block.dequantize()
            if self._plan.stacked and index != self._last:
                block.stack()
            if self._plan.precision.float8:
                block.to_float8()
        if self._copy_stream:
            self._copy_stream.synchronize()
        return block


def load_blocks(checkpoint: Checkpoint, plan: PlacementPlan, console: Console) -> list[DeviceBlocks]:
    """Load the resident blocks of every device, and streamed blocks into host memory if the plan says so.

    A progress line is shown if `console` is a terminal.

    Raises:
        CheckpointError: a file is shorter than its header says, or the tensors of a packed linear are inconsistent.
    """
    host_blocks: dict[int, Tensors] = {}
    devices = [DeviceBlocks(checkpoint, plan, share, host_blocks) for share in plan.shares]
    on_host = [] if plan.source == "disk" else sorted({*plan.shares[0].blocks} - _resident_on_all_devices(plan.shares))
    pinned = devices[0].device.type == "cuda"

    def load_to_host(index: int) -> None:
        tensors = checkpoint.read_block(index)
        host_blocks[index] = {name: tensor.pin_memory() for name, tensor in tensors.items()} if pinned else tensors

    def load_to_device(device_blocks: DeviceBlocks, index: int) -> None:
        device_blocks.resident[index] = device_blocks.load_block(index)

    tasks: list[Callable[[], None]] = [partial(load_to_host, index) for index in on_host]
    tasks += [partial(load_to_device, each, index) for each in devices for index in sorted(each.share.resident)]
    with (
        progress_line(console, "loading", MofNCompleteColumn()) as progress,
        Prefetcher(lambda task: task(), tasks, depth=LOADER_THREADS, threads=LOADER_THREADS) as done,
    ):
        for _ in progress.track(done, total=len(tasks), description="loading"):
            pass
    return devices


def read_blocks(
    checkpoint: Checkpoint, indices: Sequence[int] | None = None, *, prefetch: bool = True
) -> Iterator[tuple[int, Tensors]]:
    """Yield (index, stored tensors) of the blocks `indices`, or of all.

    With `prefetch`, the next block is read while the caller uses the current one.
    """
    if indices is None:
        indices = range(checkpoint.model_config.num_hidden_layers)
    with Prefetcher(checkpoint.read_block, indices, depth=int(prefetch)) as blocks:
        for index in indices:
            yield index, next(blocks)


def check_finite_tensors(tensors: Tensors, prefix: str = "") -> None:
    """Raise NonFiniteError naming the first tensor with a NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():  # aminmax returns NaN if there is one
            count = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(f"{prefix}{name} has {count} non-finite values; download that shard again.")


def read_head(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> ScoreHead:
    """Read the final norm and the score head."""
    model_config = checkpoint.model_config
    norm = checkpoint.read("model.norm.weight").to(device)
    tensors = {name: checkpoint.read(name).to(device) for name in model_config.head_tensors}
    return ScoreHead(norm, tensors, model_config.rms_norm_eps)


def _resident_on_all_devices(shares: Sequence[DeviceShare]) -> frozenset[int]:
    return frozenset.intersection(*(share.resident for share in shares))
