"""The score head, and config against tensors, 16-bit and packed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load

from runtime.checkpoints.checkpoint import open_checkpoint, read_config
from runtime.checkpoints.model_config import BLOCK_LINEARS, block_prefix
from runtime.checkpoints.quantization_config import NF4_QUANT_STATE, QuantizationConfig
from runtime.common.errors import CheckpointError
from runtime.kernels.reference import pack_gptq
from tests.helpers.damage import change_json, change_tensors, refusal
from tests.helpers.tiny import write_shards, write_tiny_checkpoint


@pytest.mark.parametrize("name", ["score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias"])
def test_a_missing_head_tensor_is_named(damaged, name):
    change_tensors(damaged, lambda tensors: tensors.pop(name))
    assert f"{name} is missing" in refusal(damaged)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_head_that_is_not_finite_is_named(damaged, value):
    change_tensors(damaged, lambda tensors: tensors["score.2.weight"].view(-1)[5:6].fill_(float(value)))
    assert "score.2.weight holds a NaN or an infinity" in refusal(damaged)


def test_a_quantized_head_is_refused(damaged):
    change_tensors(damaged, lambda tensors: tensors.update({"score.0.weight": torch.ones(64, 64).to(torch.int8)}))
    assert "score head is quantized (score.0.weight)" in refusal(damaged)


def test_a_packed_head_is_refused(damaged):
    def pack(tensors):
        del tensors["score.0.weight"]
        tensors["score.0.qweight"] = torch.zeros(8, 64, dtype=torch.int32)

    change_tensors(damaged, pack)
    assert "score head is quantized (score.0.qweight)" in refusal(damaged)


def test_missing_and_unexpected_tensors_are_listed_separately(damaged):
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
        ({"torch_dtype": "int8"}, "dtype is 'int8'; one of"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, but the weights hold 2 blocks"),
        ({"num_hidden_layers": 4096}, "but the weights hold 2 blocks"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; a positive whole number"),
        ({"hidden_size": 10**30}, "a positive whole number was expected, at most 268,435,456"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; a positive number was expected"),
        ({"rope_scaling": [1]}, "rope_parameters is [1]; an object was expected"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"quantization_config": "gptq"}, "quantization_config is 'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"quantization_config": QuantizationConfig("int8", 8).to_config()}, "Missing (28): "),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(damaged, changes, named):
    change_json(damaged / "config.json", **changes)
    assert named in refusal(damaged)


def packed_linear(quantization, out_features, in_features):
    """Return arbitrary tensors with the expected dtypes and shapes."""
    if quantization.method == "gptq":
        num_groups = quantization.num_groups(in_features)
        codes = torch.full((in_features, out_features), 9, dtype=torch.uint8)
        zeros = torch.full((num_groups, out_features), 8, dtype=torch.uint8)
        g_idx = torch.arange(in_features) // quantization.group_size
        return pack_gptq(codes, zeros, torch.full((num_groups, out_features), 0.01), g_idx, quantization.bits)
    described = quantization.linear_tensors(out_features, in_features, bias=False)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in described.items() if shape is not None}
    if quantization.method == "nf4":
        state = {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [out_features, in_features],
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        tensors[NF4_QUANT_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def write_packed(directory, quantization, change=lambda tensors: None):
    write_tiny_checkpoint(directory)
    change_json(directory / "config.json", quantization_config=quantization.to_config())
    model_config = open_architecture(directory)
    tensors = load((directory / "model.safetensors").read_bytes())
    for index in range(model_config.num_hidden_layers):
        for name in BLOCK_LINEARS:
            linear = block_prefix(index) + name
            del tensors[f"{linear}.weight"]
            packed = packed_linear(quantization, *model_config.linear_shape(name))
            tensors |= {f"{linear}.{suffix}": tensor for suffix, tensor in packed.items()}
    change(tensors)
    write_shards(directory, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return directory


def open_architecture(directory):
    return read_config(directory)[1]


PACKED = [
    QuantizationConfig("gptq", 4, 32),
    QuantizationConfig("gptq", 8, 64),
    QuantizationConfig("nf4", 4),
    QuantizationConfig("int8", 8),
]


@pytest.mark.parametrize("quantization", PACKED)
def test_a_packed_checkpoint_opens(tmp_path, quantization):
    checkpoint = open_checkpoint(write_packed(tmp_path, quantization))
    assert checkpoint.quantization == quantization
    block = checkpoint.read_block(1)
    expected = quantization.linear_tensors(32, 64, bias=True)
    prefix = "self_attn.k_proj."
    assert {name.removeprefix(prefix) for name in block if name.startswith(prefix)} == expected.keys()


def test_a_group_size_that_differs_from_the_config_is_refused(tmp_path):
    write_packed(tmp_path, QuantizationConfig("gptq", 4, 32))
    change_json(tmp_path / "config.json", quantization_config=QuantizationConfig("gptq", 4, 64).to_config())
    assert "qzeros is int32 [2, 8], expected int32 [1, 8]" in refusal(tmp_path)


def test_packed_tensors_without_their_config_are_refused(tmp_path):
    write_packed(tmp_path, QuantizationConfig("nf4", 4))
    change_json(tmp_path / "config.json", quantization_config=None)
    message = refusal(tmp_path)
    assert "Unexpected (70)" in message and "expected bfloat16 [64, 64]" in message


@pytest.mark.parametrize("group", [-1, 2])
def test_a_group_index_out_of_range_is_named(tmp_path, group):
    name = "model.layers.1.mlp.up_proj.g_idx"
    write_packed(tmp_path, QuantizationConfig("gptq", 4, 32), lambda tensors: tensors[name][5:6].fill_(group))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read_block(0)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read_block(1)


def test_an_nf4_state_of_another_shape_is_named(tmp_path):
    def transpose(tensors):
        tensors[f"model.layers.0.mlp.up_proj.{NF4_QUANT_STATE}"] = tensors[
            f"model.layers.0.mlp.down_proj.{NF4_QUANT_STATE}"
        ].clone()

    checkpoint = open_checkpoint(write_packed(tmp_path, QuantizationConfig("nf4", 4), transpose))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight\.quant_state.*\[64, 128\]"):
        checkpoint.read_block(0)


def test_an_int8_weight_in_another_order_is_named(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight_format"
    checkpoint = open_checkpoint(write_packed(tmp_path, QuantizationConfig("int8", 8), lambda t: t[name].fill_(2)))
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read_block(0)
