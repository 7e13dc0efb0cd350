from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.architecture import BLOCK_LINEARS, block_prefix
from runtime.checkpoint import open_checkpoint, read_architecture
from runtime.errors import CheckpointError
from runtime.packing import pack_gptq
from runtime.quantization import NF4_STATE, Quantization
from tests.tiny import tiny_tensors, write_shards, write_tiny_checkpoint


@pytest.fixture
def damaged(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "damaged")


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(source) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    return str(caught.value)


# ---------------------------------------------------------------- what is whole


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_written(tmp_path, shards):
    directory = write_tiny_checkpoint(tmp_path / "model", seed=3, shards=shards)
    checkpoint = open_checkpoint(directory)
    expected = tiny_tensors(checkpoint.architecture, seed=3)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.name == "model" and checkpoint.quantization is None
    assert checkpoint.nbytes() == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.nbytes("score.") == (64 * 64 + 64 + 64 + 1) * 2


def test_a_block_is_named_without_its_prefix(tmp_path):
    checkpoint = open_checkpoint(write_tiny_checkpoint(tmp_path, layers=11))  # 1 and 10 share a beginning
    block = checkpoint.read_block(1)
    assert block.keys() == checkpoint.architecture.block_shapes().keys()
    assert torch.equal(block["mlp.up_proj.weight"], checkpoint.read("model.layers.1.mlp.up_proj.weight"))


def test_threads_read_the_same_as_one(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint)
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(checkpoint.read_block, [0, 1] * 8))
    for index, block in enumerate(blocks):
        assert all(
            torch.equal(tensor, checkpoint.read_block(index % 2)[name]) for name, tensor in block.items()
        )


def test_tokenizer_files_are_those_that_are_there(damaged):
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


# ---------------------------------------------------------------- the score head


@pytest.mark.parametrize("name", ["score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"])
def test_a_missing_head_tensor_is_named(damaged, name):
    change_tensors(damaged, lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(damaged)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_head_that_is_not_finite_is_named(damaged, value):
    change_tensors(damaged, lambda tensors: tensors["score.2.weight"].view(-1)[5:6].fill_(float(value)))
    assert "score.2.weight holds a NaN or an infinity" in refusal(damaged)


def test_a_quantized_head_is_refused(damaged):
    change_tensors(
        damaged, lambda tensors: tensors.update({"score.0.weight": torch.ones(64, 64).to(torch.int8)})
    )
    assert "score head is quantized (score.0.weight)" in refusal(damaged)


def test_a_head_packed_by_a_careless_quantizer_is_refused(damaged):
    def pack(tensors):
        del tensors["score.0.weight"]
        tensors["score.0.qweight"] = torch.zeros(8, 64, dtype=torch.int32)

    change_tensors(damaged, pack)
    assert "score head is quantized (score.0.qweight)" in refusal(damaged)


# ---------------------------------------------------------------- config against tensors


def test_missing_and_unexpected_tensors_are_listed_apart(damaged):
    def swap(tensors):
        tensors["model.layers.1.mlp.up_proj.extra"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.norm.weight"] = torch.ones(65).bfloat16()

    change_tensors(damaged, swap)
    message = refusal(damaged)
    assert "Missing (1): model.layers.1.mlp.up_proj.weight." in message
    assert "Unexpected (1): model.layers.1.mlp.up_proj.extra." in message
    assert "Different (1): model.norm.weight is bfloat16 [65], expected floating [64]." in message


@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {"intermediate_size": 256},
            "mlp.gate_proj.weight is bfloat16 [128, 64], expected bfloat16 [256, 64]",
        ),
        ({"vocab_size": 300}, "embed_tokens.weight is bfloat16 [320, 64], expected bfloat16 [300, 64]"),
        ({"num_key_value_heads": 4}, "k_proj.weight is bfloat16 [32, 64], expected bfloat16 [64, 64]"),
        ({"torch_dtype": "float16"}, "embed_tokens.weight is bfloat16 [320, 64], expected float16 [320, 64]"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but the weights hold 2 blocks"),
        ({"num_hidden_layers": 10**12}, "but the weights hold 2 blocks"),
        ({"rms_norm_eps": "small"}, "value of the wrong kind"),
        ({"rope_scaling": [1]}, "value of the wrong kind"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"quantization_config": Quantization("int8", 8).to_config()}, "Missing (28): "),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(damaged, changes, named):
    change_json(damaged / "config.json", **changes)
    assert named in refusal(damaged)


@pytest.mark.parametrize(
    "content, named", [(b"{", "is not JSON"), (b"[]", "holds a list"), (b"\xff", "is not JSON")]
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_is_named(tmp_path, file, content, named):
    directory = write_tiny_checkpoint(tmp_path / "model", shards=2)
    (directory / file).write_bytes(content)
    message = refusal(directory)
    assert message.startswith(str(directory / file)) and named in message


# ---------------------------------------------------------------- shards and their index


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
        weight_map["model.norm.weight"] = next(
            f for f in weight_map.values() if f != weight_map["model.norm.weight"]
        )

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


# ---------------------------------------------------------------- packed checkpoints


def packed_linear(quantization, out_features, in_features):
    """Any tensors that the layout allows."""
    if quantization.method == "gptq":
        groups = quantization.groups(in_features)
        codes = torch.full((in_features, out_features), 9, dtype=torch.uint8)
        zeros = torch.full((groups, out_features), 8, dtype=torch.uint8)
        g_idx = torch.arange(in_features) // quantization.group_size
        return pack_gptq(codes, zeros, torch.full((groups, out_features), 0.01), g_idx, quantization.bits)
    described = quantization.linear_tensors(out_features, in_features, bias=False)
    tensors = {
        name: torch.zeros(shape, dtype=dtype)
        for name, (dtype, shape) in described.items()
        if shape is not None
    }
    if quantization.method == "nf4":
        state = {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [out_features, in_features],
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        tensors[NF4_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def write_packed(directory, quantization, change=lambda tensors: None):
    write_tiny_checkpoint(directory)
    change_json(directory / "config.json", quantization_config=quantization.to_config())
    architecture = open_architecture(directory)
    tensors = load_file(directory / "model.safetensors")
    for index in range(architecture.num_hidden_layers):
        for name in BLOCK_LINEARS:
            linear = block_prefix(index) + name
            del tensors[f"{linear}.weight"]
            packed = packed_linear(quantization, *architecture.linear_shape(name))
            tensors |= {f"{linear}.{suffix}": tensor for suffix, tensor in packed.items()}
    change(tensors)
    write_shards(directory, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return directory


def open_architecture(directory):
    return read_architecture(directory)[1]


PACKED = [
    Quantization("gptq", 4, 32),
    Quantization("gptq", 8, 64),
    Quantization("nf4", 4),
    Quantization("int8", 8),
]


@pytest.mark.parametrize("quantization", PACKED)
def test_a_packed_checkpoint_opens(tmp_path, quantization):
    checkpoint = open_checkpoint(write_packed(tmp_path, quantization))
    assert checkpoint.quantization == quantization
    block = checkpoint.read_block(1)
    expected = quantization.linear_tensors(32, 64, bias=True)
    prefix = "self_attn.k_proj."
    assert {name.removeprefix(prefix) for name in block if name.startswith(prefix)} == expected.keys()


def test_another_group_size_than_the_config_says_is_refused(tmp_path):
    write_packed(tmp_path, Quantization("gptq", 4, 32))
    change_json(tmp_path / "config.json", quantization_config=Quantization("gptq", 4, 64).to_config())
    assert "qzeros is int32 [2, 8], expected int32 [1, 8]" in refusal(tmp_path)


def test_packed_tensors_without_their_config_are_refused(tmp_path):
    write_packed(tmp_path, Quantization("nf4", 4))
    change_json(tmp_path / "config.json", quantization_config=None)
    message = refusal(tmp_path)
    assert "Unexpected (70)" in message and "expected bfloat16 [64, 64]" in message


@pytest.mark.parametrize("group", [-1, 2])
def test_a_group_index_that_points_nowhere_is_named(tmp_path, group):
    name = "model.layers.1.mlp.up_proj.g_idx"
    write_packed(tmp_path, Quantization("gptq", 4, 32), lambda tensors: tensors[name][5:6].fill_(group))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read_block(0)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read_block(1)


def test_an_nf4_state_of_another_shape_is_named(tmp_path):
    def transpose(tensors):
        tensors[f"model.layers.0.mlp.up_proj.{NF4_STATE}"] = tensors[
            f"model.layers.0.mlp.down_proj.{NF4_STATE}"
        ].clone()

    checkpoint = open_checkpoint(write_packed(tmp_path, Quantization("nf4", 4), transpose))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight\.quant_state.*\[64, 128\]"
    ):
        checkpoint.read_block(0)


def test_an_int8_weight_in_another_order_is_named(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight_format"
    checkpoint = open_checkpoint(write_packed(tmp_path, Quantization("int8", 8), lambda t: t[name].fill_(2)))
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read_block(0)


# ---------------------------------------------------------------- where checkpoints come from


def test_what_does_not_exist_is_named(tmp_path, damaged):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(damaged / "config.json")
    (damaged / "config.json").unlink()
    assert f"{damaged / 'config.json'} is missing" in refusal(damaged)


def test_the_demo_is_asked_for_by_name(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("runtime.demo.demo_directory", lambda: tiny_checkpoint)
    checkpoint = open_checkpoint("demo")
    assert checkpoint.name == "demo" and checkpoint.directory == tiny_checkpoint


def test_a_hub_id_downloads_weights_and_json_only(tiny_checkpoint, monkeypatch):
    asked = {}

    def snapshot_download(model_id, *, allow_patterns, ignore_patterns):
        asked.update(model_id=model_id, allow=allow_patterns, ignore=ignore_patterns)
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("Qwen/WorldPM-72B")
    assert checkpoint.name == asked["model_id"] == "Qwen/WorldPM-72B"
    assert asked["allow"] == ["*.safetensors", "*.json", "merges.txt", "*.jinja"] and asked["ignore"] == [
        "*/*"
    ]
    read_architecture("Qwen/WorldPM-72B")
    assert asked["allow"] == ["config.json"]


def hub_error(name):
    kind = getattr(huggingface_hub.errors, name)
    return kind.__new__(kind)  # its constructor wants a response of whichever network library is in use


@pytest.mark.parametrize(
    "error, named",
    [
        (lambda: hub_error("RepositoryNotFoundError"), "neither a directory here nor a model on the hub"),
        (lambda: hub_error("GatedRepoError"), "accept terms"),
        (
            lambda: ConnectionError("no route"),
            r"could not be downloaded \(ConnectionError\).*name their directory",
        ),
        (lambda: TimeoutError(), r"could not be downloaded \(TimeoutError\)"),
    ],
)
def test_a_hub_id_that_cannot_be_fetched_says_the_way_out(monkeypatch, error, named):
    def snapshot_download(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=f"^Qwen/WorldPM-72B .*{named}"):
        open_checkpoint("Qwen/WorldPM-72B")


def test_a_path_is_never_sent_to_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for source in ("./out/model", "/no/such", "out", "a/b/c", "../up", tmp_path / "gone" / "model"):
        assert "does not exist" in refusal(source)


def test_the_architecture_is_read_from_a_config_alone(tmp_path, tiny_checkpoint):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    expected = open_checkpoint(tiny_checkpoint)
    for source in (tmp_path, str(tmp_path / "config.json")):
        config, architecture, quantization = read_architecture(source)
        assert (config, architecture, quantization) == (expected.config, expected.architecture, None)
