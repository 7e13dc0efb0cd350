"""The files of a packed checkpoint, read back by the safetensors library and held against the manifest."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from quantize.sweep.checkpoint_writer import CheckpointWriter
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.files import sha256_of


@pytest.fixture
def source(damaged: Path) -> Checkpoint:
    config = json.loads((damaged / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "code.Model"}, "note": "Größe 数", "architectures": ["Other"]}
    (damaged / "config.json").write_text(json.dumps(config))
    return open_checkpoint(damaged)


@pytest.fixture
def writer(source: Checkpoint, tmp_path: Path) -> CheckpointWriter:
    (tmp_path / "out").mkdir()
    return CheckpointWriter(tmp_path / "out", source, QuantizationConfig(method="gptq", bits=4, group_size=64))


def test_a_shard_is_what_was_given_under_the_digest_that_is_returned(writer):
    tensors = {
        "model.layers.0.a": torch.arange(6, dtype=torch.int32).view(2, 3),
        "model.layers.0.b": torch.arange(6, dtype=torch.float16).view(2, 3).T,  # not contiguous
    }
    name, digest = writer.write_shard(1, tensors)
    assert name == "model-00002-of-00004.safetensors" and digest == sha256_of(writer.output / name)
    with safe_open(writer.output / name, "pt") as shard:
        assert shard.metadata() == {"format": "pt"}  # without it transformers refuses the file
        assert {key: shard.get_tensor(key).tolist() for key in shard.keys()} == {  # noqa: SIM118 - no mapping
            name: tensor.tolist() for name, tensor in tensors.items()
        }


def test_the_same_tensors_give_the_same_bytes_in_any_order(writer):
    tensors = {f"t{number}": torch.full((number + 1,), number, dtype=torch.float16) for number in range(9)}
    first = writer.write_shard(1, tensors)
    assert writer.write_shard(1, dict(reversed(tensors.items()))) == first


def test_a_shard_that_cannot_be_written_is_named_and_leaves_nothing(writer, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("runtime.common.safetensors_writer.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/model-00001-of-00004\.safetensors'") as caught:
        writer.write_embedding()
    assert caught.value.errno == errno.ENOSPC
    assert list(writer.output.iterdir()) == []


def test_the_index_finds_every_tensor_and_counts_the_bytes(writer, source):
    shards = dict([writer.write_embedding(), writer.write_shard(1, source.read_block(0)), writer.write_head()])
    writer.write_index(shards)
    index = json.loads((writer.output / "model.safetensors.index.json").read_text())
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(writer.output / file, "pt") as shard:
            total += shard.get_tensor(name).nbytes
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == 1 + len(source.read_block(0)) + 5
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_the_head_is_the_source_s_but_for_what_was_repaired(writer, source):
    replacements = {"score.2.bias": torch.tensor([1.5])}
    name, _ = writer.write_head(replacements)
    with safe_open(writer.output / name, "pt") as shard:
        assert shard.get_tensor("score.2.bias").tolist() == [1.5]
        for kept in ("model.norm.weight", "score.0.weight", "score.0.bias", "score.2.weight"):
            assert torch.equal(shard.get_tensor(kept), source.read(kept))


def test_the_config_keeps_what_it_does_not_know_and_drops_what_would_run_code(writer, source):
    writer.write_config()
    text = (writer.output / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert "Größe 数" in text and "auto_map" not in config
    assert config["architectures"] == ["Qwen2ForRewardModel"]
    assert config["quantization_config"] == json.loads((writer.output / "quantize_config.json").read_text())
    assert config["hidden_size"] == source.config["hidden_size"]


def test_the_config_has_the_names_of_older_and_newer_readers(writer, source):
    newer = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "rope_theta")}
    newer |= {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    (source.directory / "config.json").write_text(json.dumps(newer))
    CheckpointWriter(writer.output, open_checkpoint(source.directory), writer.quantization).write_config()
    config = json.loads((writer.output / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"], config["rope_theta"]) == ("bfloat16", "bfloat16", 10000.0)
    assert config["rope_parameters"] == newer["rope_parameters"]
    read = AutoConfig.from_pretrained(writer.output)
    assert (read.dtype, read.rope_parameters["rope_theta"]) == (torch.bfloat16, 10000.0)


def test_the_tokenizer_is_copied_without_truncation_and_padding(writer, source):
    file = source.directory / "tokenizer.json"
    writer.copy_tokenizer()
    assert (writer.output / "tokenizer.json").read_bytes() == file.read_bytes()
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"truncation": {"max_length": 4}, "padding": {"strategy": "BatchLongest"}}))
    writer.copy_tokenizer()
    assert json.loads((writer.output / "tokenizer.json").read_text()) == plain
