"""Checkpoints and budgets for every way in which blocks can be placed, all of them on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from runtime.architecture import BLOCK_LINEARS, Architecture, block_prefix
from runtime.checkpoint import Checkpoint
from runtime.footprint import Footprint
from runtime.linear import FEWEST_ROWS
from runtime.numerics import FLOAT32
from runtime.placement import IN_FLIGHT
from runtime.quantization import Quantization
from tests.packed import packed_tensors

TOKENS = 64
GPTQ4 = Quantization(method="gptq", bits=4, group_size=32)


def room(
    checkpoint: Checkpoint, blocks: int, *, tokens: int = TOKENS, keep: bool = False, device: str = "cpu", split=False
) -> int:
    """Bytes of a device with room for so many blocks and nothing else."""
    footprint = Footprint(checkpoint, FLOAT32)
    others = footprint.outer + footprint.products(keep=keep) + footprint.activations(tokens)
    others += footprint.embedding if device == "cpu" else 0
    others += footprint.hidden(IN_FLIGHT * tokens) if split else 0
    return others + blocks * footprint.block(keep=keep)


def rounds_rows_alike(dtype: torch.dtype) -> bool:
    """Whether this machine's products give a row the same bits among any number of others, from `FEWEST_ROWS` up."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (300, 128))
    whole = F.linear(x, weight)
    return all(torch.equal(F.linear(x[:rows], weight), whole[:rows]) for rows in range(FEWEST_ROWS, 300))


def placements(checkpoint: Checkpoint) -> dict[str, tuple[dict[str, Any], str]]:
    """By name, how a model of six blocks is asked for with `TOKENS` at once, and the placement that gives."""

    def some(blocks: int, **more: Any) -> int:
        return room(checkpoint, blocks, device="cpu:0", **more)

    plenty, one, third = 1 << 30, some(1, keep=True, split=True), some(2, split=True)
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
        "from host": ({"devices": "cpu:0", "memory": {"cpu:0": some(5), "cpu": plenty}}, "streamed"),
        "from disk": ({"devices": "cpu:0", "memory": {"cpu:0": some(2), "cpu": room(checkpoint, 2)}}, "streamed"),
        "dealt": ({"devices": "cpu:0,cpu:1", "memory": f"cpu:0={some(4)},cpu:1={some(1)},cpu={plenty}"}, "streamed"),
    }


def pack_checkpoint(directory: Path, quantization: Quantization) -> Path:
    """Replace the linears of a tiny checkpoint's blocks by packed ones of about the same size."""
    config = json.loads((directory / "config.json").read_text())
    architecture = Architecture.from_config(config)
    tensors = load_file(directory / "model.safetensors")
    for index in range(architecture.num_hidden_layers):
        for number, name in enumerate(BLOCK_LINEARS):
            shape = architecture.linear_shape(name)
            del tensors[f"{block_prefix(index)}{name}.weight"]
            packed = packed_tensors(shape, quantization, seed=10 * index + number)
            if "scales" in packed:
                packed["scales"] = packed["scales"] * 0.2 * shape[1] ** -0.5
            tensors |= {f"{block_prefix(index)}{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization.to_config()}))
    return directory
