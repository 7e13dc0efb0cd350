"""Ways to damage a checkpoint, for tests of how it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.common.errors import CheckpointError


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load(path.read_bytes())  # not mapped: the file is about to change
    change(tensors)
    save_file(tensors, path)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(source: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    return str(caught.value)
