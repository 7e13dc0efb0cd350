from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import NF4_QUANT_STATE, Override, QuantizationConfig
from runtime.checkpoints.quantization_parsing import read_quantization_config
from runtime.common.errors import CheckpointError
from tests.helpers.tiny import tiny_config

GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "damp_percent": 0.01,
    "true_sequential": True,
    "static_groups": False,
    "lm_head": False,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "modules_in_block_to_quantize": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "dynamic": {"-:score": {}},
}
NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8_CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def test_the_gptq_config_excludes_the_head():
    assert QuantizationConfig("gptq", 4, group_size=128).to_config() == GPTQ_CONFIG


@pytest.mark.parametrize(
    "quantization",
    [
        QuantizationConfig("gptq", 4, group_size=128),
        QuantizationConfig("gptq", 8, group_size=-1, sym=False, desc_act=True, damp_percent=0.05, static_groups=True),
        QuantizationConfig("gptq", 4, group_size=64, checkpoint_format="gptq_v2", true_sequential=False),
        QuantizationConfig(
            "gptq",
            4,
            group_size=64,
            overrides=(
                Override(r"model\.layers\.(?:0|2)\.mlp\.down_proj$", QuantizationConfig("gptq", 8, group_size=64)),
                Override(r"model\.layers\.1\.", QuantizationConfig("gptq", 4, group_size=32)),
            ),
        ),
        QuantizationConfig("nf4", 4),
        QuantizationConfig("nf4", 4, double_quant=False, compute_dtype="float32"),
        QuantizationConfig("int8", 8),
    ],
)
def test_config_round_trip(quantization):
    assert read_quantization_config(quantization.to_config()) == quantization


@pytest.mark.parametrize("quantization", [QuantizationConfig("nf4", 4), QuantizationConfig("int8", 8)])
def test_transformers_reads_the_bitsandbytes_config(quantization):
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig.from_dict(quantization.to_config())
    assert config.quantization_method() == {"nf4": "nf4", "int8": "llm_int8"}[quantization.method]
    assert config.llm_int8_skip_modules == ["score"]


def test_missing_options_take_the_writers_defaults():
    minimal = read_quantization_config({"quant_method": "gptq", "bits": 4, "damp_percent": None})
    assert minimal == QuantizationConfig("gptq", 4, group_size=-1)
    newer = read_quantization_config({"quant_method": "gptq", "bits": 8, "format": "gptq_v2"})
    assert newer.checkpoint_format == "gptq_v2"
    assert not read_quantization_config(NF4_CONFIG).double_quant
    assert read_quantization_config({"load_in_8bit": True}).method == "int8"


@pytest.mark.parametrize(
    "config, named",
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
        ({"bits": 4}, "quant_method None"),
        (GPTQ_CONFIG | {"bits": 3}, "bits 3"),
        (GPTQ_CONFIG | {"bits": "4"}, "bits '4'"),
        (GPTQ_CONFIG | {"bits": True}, "bits True"),
        (GPTQ_CONFIG | {"group_size": 0}, "group_size 0"),
        (GPTQ_CONFIG | {"group_size": "128"}, "group_size '128'"),
        (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ_CONFIG | {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
        (GPTQ_CONFIG | {"is_marlin_format": True}, "is_marlin_format True"),
        (GPTQ_CONFIG | {"rotation": "hadamard"}, "rotation 'hadamard'"),
        (GPTQ_CONFIG | {"desc_act": 1}, "desc_act 1"),
        (GPTQ_CONFIG | {"damp_percent": "much"}, "damp_percent 'much'"),
        (GPTQ_CONFIG | {"dynamic": ["score"]}, "dynamic"),
        (GPTQ_CONFIG | {"dynamic": {"+:.*down_proj": ["bits"]}}, "down_proj.*an object"),
        (GPTQ_CONFIG | {"dynamic": {"+:.*down_proj": {"bits": 3}}}, "bits 3"),
        (GPTQ_CONFIG | {"dynamic": {".*down_proj": {"rotation": "hadamard"}}}, "down_proj.*rotation.*hadamard"),
        (GPTQ_CONFIG | {"dynamic": {"+:(model": {"bits": 8}}}, r"\(model.*a simple pattern"),
        (GPTQ_CONFIG | {"dynamic": {r"+:(\w+)+!": {"bits": 8}}}, "a simple pattern"),
        (GPTQ_CONFIG | {"dynamic": {"+:.*.*.*.*.*x": {"bits": 8}}}, "a simple pattern"),
        (GPTQ_CONFIG | {"dynamic": {"+:" + ".?" * 40 + "Z": {"bits": 8}}}, "a simple pattern"),
        (GPTQ_CONFIG | {"dynamic": {"+:" + r"(?:.|\w|\.)" * 30 + "Z": {"bits": 8}}}, "a simple pattern"),
        (GPTQ_CONFIG | {"dynamic": {r"+:(?x)(?:[\w.]+) *Z": {"bits": 8}}}, "a simple pattern"),
        (GPTQ_CONFIG | {"dynamic": {f"+:{'(' * 5000}": {"bits": 8}}}, "a simple pattern"),
        (GPTQ_CONFIG | {"dynamic": {f"+:{n}": {"bits": 8} for n in range(2000)}}, "2000 rules"),
        (NF4_CONFIG | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type 'fp4'"),
        (NF4_CONFIG | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        (INT8_CONFIG | {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight True"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
    ],
)
def test_unsupported_options_are_refused_by_name_and_value(config, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        read_quantization_config(config, "here/config.json")
    assert str(caught.value).startswith("here/config.json: ")


def test_linear_tensors_of_the_72b():
    down_proj = QuantizationConfig("gptq", 4, group_size=128).linear_tensors(8192, 29568, bias=False)
    assert down_proj == {
        "qweight": (torch.int32, (3696, 8192)),
        "qzeros": (torch.int32, (231, 1024)),
        "scales": (torch.float16, (231, 8192)),
        "g_idx": (torch.int32, (29568,)),
    }
    k_proj = QuantizationConfig("nf4", 4).linear_tensors(1024, 8192, bias=True)
    assert k_proj["bias"] == (None, (1024,)) and k_proj[NF4_QUANT_STATE] == (torch.uint8, None)
    assert k_proj["weight"] == (torch.uint8, (4194304, 1))
    assert k_proj["weight.absmax"] == (torch.uint8, (131072,))
    assert k_proj["weight.nested_absmax"] == (torch.float32, (512,))


def test_a_shorter_last_group_has_its_own_scale():
    assert QuantizationConfig("gptq", 4, group_size=24).linear_tensors(8, 64, bias=False)["scales"][1] == (3, 8)
    assert QuantizationConfig("gptq", 4).linear_tensors(8, 64, bias=False)["scales"][1] == (1, 8)


DYNAMIC = {
    "-:score": {},
    "+:model\\.layers\\.(?:0|12)\\.self_attn\\.(?:q_proj|k_proj|v_proj|qkv_proj)$": {"bits": 8, "group_size": -1},
    ".*\\.down_proj": {"group_size": 32, "desc_act": True},  # as GPTQModel writes rules without a prefix
    "+:model\\.layers\\.0\\.": {"bits": 8},
}


def test_the_first_rule_that_matches_a_linear_holds():
    quantization = read_quantization_config(GPTQ_CONFIG | {"dynamic": DYNAMIC})
    found = [
        {name.split(".")[-1]: (each.bits, each.group_size, each.desc_act) for name, each in block.items()}
        for block in map(quantization.of_block, (0, 1, 2, 12))
    ]
    attention, narrow, uniform = (8, -1, False), (4, 32, True), (4, 128, False)
    assert found[0] == dict.fromkeys(("q_proj", "k_proj", "v_proj"), attention) | {
        "o_proj": (8, 128, False),
        "gate_proj": (8, 128, False),
        "up_proj": (8, 128, False),
        "down_proj": narrow,
    }
    assert found[1] == found[2] == dict.fromkeys(found[0], uniform) | {"down_proj": narrow}
    assert found[3] == found[1] | dict.fromkeys(("q_proj", "k_proj", "v_proj"), attention)
    assert not any(each.overrides for each in quantization.of_block(0).values())


FUSED = re.compile(r"(q_proj|k_proj|v_proj)|(gate_proj|up_proj)")


def test_vllm_reads_the_rules_alike():
    """vLLM asks for the fused linears only (`get_dynamic_override`): the first rule that matches has the option."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    eight = QuantizationConfig("gptq", 8, group_size=64)
    rules = [Override.of_linears([0, 3], names[:3], eight), Override.of_linears([3], names[3:], eight)]
    quantization = QuantizationConfig("gptq", 4, group_size=64, overrides=tuple(rules))
    for index in range(5):
        for name, each in quantization.of_block(index).items():
            fused = FUSED.sub(lambda match: "qkv_proj" if match[1] else "gate_up_proj", name)
            bits = 4
            for rule, options in quantization.to_config()["dynamic"].items():
                if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), f"model.layers.{index}.{fused}"):
                    bits = options.get("bits", 4)
                    break
            assert bits == each.bits, (index, name)


def test_bits_of_a_mix():
    """A smaller group costs 20 stored bits more per group and row, an 8-bit linear 4 bits a weight and its zeros."""
    config = ModelConfig.from_config(
        tiny_config(layers=4, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=320, dtype=torch.bfloat16)
    )
    uniform = QuantizationConfig("gptq", 4, group_size=64)
    eight = replace(uniform, bits=8)
    everywhere = replace(uniform, overrides=(Override("model", eight),))
    assert everywhere.bits_per_weight(config) == eight.bits_per_weight(config)
    half = replace(uniform, overrides=(Override(r"model\.layers\.[02]\.", eight),))
    assert half.bits_per_weight(config) == (uniform.bits_per_weight(config) + eight.bits_per_weight(config)) / 2
    assert (uniform.nominal_bits(config), half.nominal_bits(config)) == (4, 6.03)
    narrow = replace(uniform, overrides=(Override("model", replace(uniform, group_size=32)),))
    assert narrow.nominal_bits(config) == 4.31


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.down_proj",
        r"model\.layers\.(" + "|".join(map(str, range(80))) + r")\..*",
        r".*\.layers\.(?:[0-9]|[1-7][0-9])\.mlp\.(?:up|gate)_proj.*",
    ],
)
def test_patterns_of_other_writers_are_taken(pattern):
    """gptqmodel's and AutoRound's; the whole model in well under a second."""
    quantization = read_quantization_config(GPTQ_CONFIG | {"dynamic": {f"+:{pattern}": {"bits": 8}}})
    assert any(each.bits == 8 for index in range(80) for each in quantization.of_block(index).values())
