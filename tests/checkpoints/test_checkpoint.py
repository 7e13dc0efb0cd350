from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from runtime.checkpoints.checkpoint import open_checkpoint, read_config
from runtime.common.errors import CheckpointError
from tests.helpers.damage import change_json, change_tensors, refusal
from tests.helpers.tiny import tiny_tensors, write_tiny_checkpoint


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_written(tmp_path, shards):
    directory = write_tiny_checkpoint(tmp_path / "model", seed=3, shards=shards)
    checkpoint = open_checkpoint(directory)
    expected = tiny_tensors(checkpoint.model_config, seed=3)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.name == "model" and checkpoint.quantization is None
    assert checkpoint.nbytes() == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.nbytes("score.") == (64 * 64 + 64 + 64 + 1) * 2


def test_a_block_is_named_without_its_prefix(tmp_path):
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, layers=11))  # 1 and 10 share a beginning
    block = checkpoint.read_block(1)
    assert block.keys() == checkpoint.model_config.block_shapes().keys()
    assert torch.equal(block["mlp.up_proj.weight"], checkpoint.read("model.layers.1.mlp.up_proj.weight"))


def test_reading_from_threads(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(checkpoint.read_block, [0, 1] * 8))
    for index, block in enumerate(blocks):
        assert all(torch.equal(tensor, checkpoint.read_block(index % 2)[name]) for name, tensor in block.items())


def test_tokenizer_files_are_the_existing_ones(damaged):
    (damaged / "modeling_evil.py").write_text("raise SystemExit")
    files = {path.name for path in open_checkpoint(damaged).tokenizer_files()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_fingerprint_follows_config_and_headers(damaged, tiny_checkpoint):
    first = open_checkpoint(tiny_checkpoint).fingerprint()
    assert open_checkpoint(damaged).fingerprint() == first
    change_json(damaged / "config.json", rope_theta=5e5)
    second = open_checkpoint(damaged).fingerprint()
    change_tensors(damaged, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(320, 64)}))
    assert len({first, second, open_checkpoint(damaged).fingerprint()}) == 3


def test_fingerprint_differs_between_fine_tuned_heads(damaged, tiny_checkpoint):
    change_tensors(damaged, lambda tensors: tensors.update({"score.2.bias": tensors["score.2.bias"] + 1}))
    assert open_checkpoint(damaged).fingerprint() != open_checkpoint(tiny_checkpoint).fingerprint()


def test_a_language_model_head_and_rotary_tables_are_ignored(damaged):
    strays = {
        "lm_head.weight": torch.full((320, 64), float("nan")),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    change_tensors(damaged, lambda tensors: tensors.update(strays))
    assert not strays.keys() & open_checkpoint(damaged).tensors.keys()


def test_norms_and_head_may_be_float32(damaged):
    def widen(tensors):
        for name in tensors:
            if "norm" in name or name.startswith("score."):
                tensors[name] = tensors[name].float()

    change_tensors(damaged, widen)
    assert open_checkpoint(damaged).read("score.0.weight").dtype == torch.float32


@pytest.mark.parametrize("content, named", [(b"{", "is not JSON"), (b"[]", "holds a list"), (b"\xff", "is not JSON")])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_named(tmp_path, file, content, named):
    directory = write_tiny_checkpoint(tmp_path / "model", shards=2)
    (directory / file).write_bytes(content)
    message = refusal(directory)
    assert message.startswith(str(directory / file)) and named in message


@pytest.fixture
def sharded(tmp_path):
    return write_tiny_checkpoint(tmp_path / "sharded", shards=3)


def change_weight_map(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_truncated_shard_is_named(sharded):
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is cut short" in refusal(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 1 of the 3 shards in its index, the first being model-00002" in refusal(sharded)


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd.safetensors",
        "../other.safetensors",
        "sub/x.safetensors",
        "..",
        "x.bin",
        7,
        "a\0.safetensors",
    ],
)
def test_an_index_cannot_escape_its_directory(sharded, file):
    change_weight_map(sharded, lambda weight_map: weight_map.update({"model.norm.weight": file}))
    message = refusal(sharded)
    assert "puts model.norm.weight in" in message and "beside the index was expected" in message


def test_a_tensor_that_the_index_does_not_list_is_named(sharded):
    change_weight_map(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    assert "holds model.norm.weight, but" in refusal(sharded)


def test_a_tensor_listed_in_another_shard_is_named(sharded):
    def mislead(weight_map):
        weight_map["model.norm.weight"] = next(f for f in weight_map.values() if f != weight_map["model.norm.weight"])

    change_weight_map(sharded, mislead)
    assert "lists it in" in refusal(sharded)


def test_a_listed_tensor_that_no_shard_holds_is_named(sharded):
    change_weight_map(sharded, lambda weight_map: weight_map.update({"ghost": weight_map["score.0.bias"]}))
    assert "lists ghost in" in refusal(sharded)


def test_an_empty_index_is_refused(sharded):
    change_weight_map(sharded, lambda weight_map: weight_map.clear())
    assert "has no weight_map" in refusal(sharded)


def test_pickles_are_never_read(damaged):
    (damaged / "model.safetensors").unlink()
    assert "copy the weights there" in refusal(damaged)
    (damaged / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickles are never read" in refusal(damaged)


def test_a_missing_path_is_named(tmp_path, damaged):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(damaged / "config.json")
    (damaged / "config.json").unlink()
    assert f"{damaged / 'config.json'} is missing" in refusal(damaged)


def test_demo_opens_the_demo_model(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("runtime.demo.model.demo_directory", lambda: tiny_checkpoint)
    checkpoint = open_checkpoint("demo")
    assert checkpoint.name == "demo" and checkpoint.directory == tiny_checkpoint


def test_the_config_is_read_without_weights(tmp_path, tiny_checkpoint):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    expected = open_checkpoint(tiny_checkpoint)
    for source in (tmp_path, str(tmp_path / "config.json")):
        config, model_config, quantization = read_config(source)
        assert (config, model_config, quantization) == (expected.config, expected.model_config, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": float("inf")}, "hidden_size is inf; a positive whole number was expected"),
        ({"rope_theta": 10**400}, "config.json"),
        ({"num_hidden_layers": [2]}, "config.json"),
    ],
)
def test_numbers_that_are_none_are_named(damaged, changes, named):
    change_json(damaged / "config.json", **changes)
    assert named in refusal(damaged)


def test_a_file_name_that_no_disk_takes_is_named(damaged):
    index = {"weight_map": {"model.norm.weight": "x" * 5000 + ".safetensors"}}
    (damaged / "model.safetensors").unlink()
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(damaged)
    assert "a .safetensors file beside the index was expected" in message and len(message) < 500


def test_a_deeply_nested_value_is_an_error_of_its_key(tmp_path, tiny_checkpoint):
    """Near the limit of the parser, where repr would exceed Python's recursion limit."""
    text = (tiny_checkpoint / "config.json").read_text()
    path = tmp_path / "config.json"
    for depth in range(700, 1000, 3):
        path.write_text(text.replace('"vocab_size": 320', f'"vocab_size": {"[" * depth + "]" * depth}'))
        with pytest.raises(CheckpointError, match="vocab_size is|not JSON"):
            read_config(path)
