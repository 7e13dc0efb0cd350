from __future__ import annotations

import pytest
import torch

from runtime.checkpoints.quantization_config import NF4_QUANT_STATE, QuantizationConfig
from runtime.common.errors import CheckpointError

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
    "dynamic": {"-:score\\..*": {}},
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
        QuantizationConfig("nf4", 4),
        QuantizationConfig("nf4", 4, double_quant=False, compute_dtype="float32"),
        QuantizationConfig("int8", 8),
    ],
)
def test_config_round_trip(quantization):
    assert QuantizationConfig.from_config(quantization.to_config()) == quantization


@pytest.mark.parametrize("quantization", [QuantizationConfig("nf4", 4), QuantizationConfig("int8", 8)])
def test_transformers_reads_the_bitsandbytes_config(quantization):
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig.from_dict(quantization.to_config())
    assert config.quantization_method() == {"nf4": "nf4", "int8": "llm_int8"}[quantization.method]
    assert config.llm_int8_skip_modules == ["score"]


def test_missing_options_take_the_writers_defaults():
    minimal = QuantizationConfig.from_config({"quant_method": "gptq", "bits": 4, "damp_percent": None})
    assert minimal == QuantizationConfig("gptq", 4, group_size=-1)
    newer = QuantizationConfig.from_config({"quant_method": "gptq", "bits": 8, "format": "gptq_v2"})
    assert newer.checkpoint_format == "gptq_v2"
    assert not QuantizationConfig.from_config(NF4_CONFIG).double_quant
    assert QuantizationConfig.from_config({"load_in_8bit": True}).method == "int8"


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
        (GPTQ_CONFIG | {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "down_proj.*bits.*8"),
        (NF4_CONFIG | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type 'fp4'"),
        (NF4_CONFIG | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        (INT8_CONFIG | {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight True"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
    ],
)
def test_unsupported_options_are_refused_by_name_and_value(config, named):
    with pytest.raises(CheckpointError, match=named) as caught:
        QuantizationConfig.from_config(config, "here/config.json")
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
