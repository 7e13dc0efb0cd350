"""Files are synced to disk before they are renamed or counted.

`tests/conftest.py` disables `os.fsync` for speed. Here its calls are recorded, in order with the renames.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from quantize.sweep.checkpoint_writer import CheckpointWriter
from runtime.batch.formats import encode_jsonl, write_parquet
from runtime.batch.output_file import OutputFile
from runtime.batch.output_state import progress_path
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.files import write_file_atomically
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs


class Event(NamedTuple):
    kind: str  # "fsync" or "rename"
    path: Path  # what is synced, or the new name
    content: bytes  # at that time; empty for a directory
    source: Path | None = None  # the old name


class Recorder:
    def __init__(self, patch: pytest.MonkeyPatch):
        self.events: list[Event] = []
        self._replace = os.replace
        patch.setattr(os, "fsync", self._record_fsync)
        patch.setattr(os, "replace", self._record_rename)

    def _record_fsync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self.events.append(Event("fsync", path, b"" if path.is_dir() else path.read_bytes()))

    def _record_rename(self, source: Any, target: Any) -> None:
        self.events.append(Event("rename", Path(target), Path(source).read_bytes(), Path(source)))
        self._replace(source, target)

    def rename_index(self, path: Path) -> int:
        """Index of the last rename to `path`; checks that the file was synced before it and the directory after it."""
        index = max(i for i, event in enumerate(self.events) if (event.kind, event.path) == ("rename", path))
        rename = self.events[index]
        assert Event("fsync", rename.source, rename.content) in self.events[:index], (
            f"{path} is renamed before it is synced"
        )
        assert Event("fsync", path.parent, b"") in self.events[index:], f"{path.parent} is not synced after the rename"
        return index


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def test_an_atomically_written_file(recorder, tmp_path):
    write_file_atomically(tmp_path / "file", "content")
    assert [event.kind for event in recorder.events] == ["fsync", "rename", "fsync"]
    assert recorder.events[recorder.rename_index(tmp_path / "file")].content == b"content"


def test_a_shard(recorder, tiny_checkpoint, tmp_path):
    writer = CheckpointWriter(tmp_path, open_checkpoint(tiny_checkpoint), QuantizationConfig(method="gptq", bits=4))
    name, _ = writer.write_shard(0, {"weight": torch.ones(3, 4)})
    index = recorder.rename_index(tmp_path / name)
    assert recorder.events[index].content == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_a_window_of_an_output(recorder, tmp_path, name):
    path = tmp_path / name
    rows = path.with_name(f"{name}.partial.jsonl") if name == "out.parquet" else path
    with OutputFile(path, {"model": "f00d"}, resume=False) as file:
        for number in range(2):
            recorder.events.clear()
            file.write([{"where": f"f:{number}", "score": 0.5}], "digest", {})
            counted = recorder.rename_index(progress_path(path))
            assert Event("fsync", rows, rows.read_bytes()) in recorder.events[:counted]


def test_a_parquet_output(recorder, tmp_path):
    (tmp_path / "rows").write_bytes(encode_jsonl([{"where": "f:1", "score": 0.5}]))
    write_parquet(tmp_path / "rows", tmp_path / "out.parquet")
    recorder.rename_index(tmp_path / "out.parquet")


def test_a_block_of_a_quantization_job(recorder, tmp_path):
    """Its shard and the hidden states after it are synced before the job counts it."""
    model, pairs = write_job_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl")
    output, layers = tmp_path / "out", 3
    assert quantize(model, pairs, output) == 0
    events = recorder.events
    counted = [i for i, event in enumerate(events) if event[:2] == ("rename", output / "job" / "blocks.jsonl")]
    assert len(counted) == layers
    for block, (start, end) in enumerate(zip([0, *counted], counted, strict=False)):
        synced = {event.path for event in events[start:end] if event.kind == "fsync"}
        renamed = {event.path.name for event in events[start:end] if event.kind == "rename"}
        assert f"model-{block + 2:05d}-of-{layers + 2:05d}.safetensors" in renamed
        streams = {path.name for path in synced if "streams" in path.parts}
        streams -= {"streams"} | {name for name in streams if name.endswith(".partial")}
        gradients = {name for name in streams if "gradient" in name or name.startswith("segment")}
        assert bool(gradients) == (block == 0)  # the backward sweep is over before the first block
        if gradients:
            assert {f"gradients-{index:05d}.safetensors" for index in range(layers)} <= gradients
        buffers = streams - gradients
        assert buffers and all(name.endswith(f".{(block + 1) % 2}.bin") for name in buffers)
    for shard in output.glob("*.safetensors"):
        recorder.rename_index(shard)
