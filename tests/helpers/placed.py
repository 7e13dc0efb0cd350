"""Checkpoints and memory budgets that lead to every placement, all on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.model_config import BLOCK_LINEARS, ModelConfig, block_prefix
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.execution.memory_estimate import MemoryEstimate
from runtime.execution.placement_plan import QUEUED_CHUNKS_PER_DEVICE
from runtime.modeling.linear import MIN_ROWS
from runtime.modeling.precision import FLOAT32
from tests.helpers.packed import packed_tensors

TOKENS = 64
GPTQ4 = QuantizationConfig(method="gptq", bits=4, group_size=32)


def room(
    checkpoint: Checkpoint,
    blocks: int,
    *,
    tokens: int = TOKENS,
    keep_dequantized: bool = False,
    device: str = "cpu",
    split=False,
) -> int:
    """Memory budget in bytes that fits `blocks` blocks on a device and nothing more."""
    memory_estimate = MemoryEstimate(checkpoint, FLOAT32)
    others = (
        memory_estimate.non_block_bytes
        + memory_estimate.product_buffer_bytes(keep_dequantized=keep_dequantized)
        + memory_estimate.activation_bytes(tokens)
    )
    others += memory_estimate.embedding_bytes if device == "cpu" else 0
    queued = max(QUEUED_CHUNKS_PER_DEVICE * tokens, checkpoint.model_config.max_position_embeddings)
    others += memory_estimate.hidden_state_bytes(queued) if split else 0
    return others + blocks * memory_estimate.block_bytes(keep_dequantized=keep_dequantized)


def rounds_rows_alike(dtype: torch.dtype) -> bool:
    """Whether matmuls on this machine are bitwise independent of the number of rows, from `MIN_ROWS` up."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (300, 128))
    whole = F.linear(x, weight)
    return all(torch.equal(F.linear(x[:rows], weight), whole[:rows]) for rows in range(MIN_ROWS, 300))


def placements(checkpoint: Checkpoint) -> dict[str, tuple[dict[str, Any], str]]:
    """By name: arguments of `plan_placement` for a model of six blocks, and the expected placement."""

    def device_room(blocks: int, **more: Any) -> int:
        return room(checkpoint, blocks, device="cpu:0", **more)

    plenty, one, third = 1 << 30, device_room(1, keep_dequantized=True, split=True), device_room(2, split=True)
    return {
        "kept": ({"devices": "cpu"}, "resident"),
        "as stored": ({"devices": "cpu", "memory": {"cpu": room(checkpoint, 6)}}, "resident"),
        "a device": ({"devices": "cpu:0", "memory": {"cpu:0": plenty}}, "resident"),
        "halves": ({"devices": "cpu:0,cpu:1", "memory": f"cpu:0={plenty},cpu:1={plenty}"}, "split"),
        "1 and 5": ({"devices": ["cpu:0", "cpu:1"], "memory": {"cpu:0": one, "cpu:1": plenty}}, "split"),
        "thirds": ({"devices": "cpu:0,cpu:1,cpu:2", "memory": f"cpu:0={third},cpu:1={third},cpu:2={third}"}, "split"),
        "streamed": ({"devices": "cpu", "stream": True}, "streamed"),
        "some stay": ({"devices": "cpu", "memory": {"cpu": room(checkpoint, 6) - 1}}, "streamed"),
        "one buffer": ({"devices": "cpu", "memory": {"cpu": room(checkpoint, 1)}}, "streamed"),
        "from host": ({"devices": "cpu:0", "memory": {"cpu:0": device_room(5), "cpu": plenty}}, "streamed"),
        "from disk": (
            {"devices": "cpu:0", "memory": {"cpu:0": device_room(2), "cpu": room(checkpoint, 2)}},
            "streamed",
        ),
        "dealt": (
            {"devices": "cpu:0,cpu:1", "memory": f"cpu:0={device_room(4)},cpu:1={device_room(1)},cpu={plenty}"},
            "streamed",
        ),
    }


def pack_checkpoint(directory: Path, quantization: QuantizationConfig) -> Path:
    """Replace the linears of a tiny checkpoint's blocks by packed ones of similar magnitude."""
    config = json.loads((directory / "config.json").read_text())
    model_config = ModelConfig.from_config(config)
    tensors = load_file(directory / "model.safetensors")
    for index in range(model_config.num_hidden_layers):
        for number, name in enumerate(BLOCK_LINEARS):
            shape = model_config.linear_shape(name)
            del tensors[f"{block_prefix(index)}{name}.weight"]
            packed = packed_tensors(shape, quantization, seed=10 * index + number)
            if "scales" in packed:
                packed["scales"] = packed["scales"] * 0.2 * shape[1] ** -0.5
            tensors |= {f"{block_prefix(index)}{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization.to_config()}))
    return directory
