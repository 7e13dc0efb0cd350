"""Wider MLPs: every weight as it was, beside exact zeros, and the stored words of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.padding import pad_block, pad_inputs, pad_outputs, padded_size
from runtime.checkpoints.quantization_config import QuantizationConfig
from tests.helpers.packed import gptq_tensors, reference_weight

ROOT = Path(__file__).resolve().parents[2]
BITS, FORMATS = st.sampled_from([4, 8]), st.sampled_from(["gptq", "gptq_v2"])
SIZES = st.integers(1, 12).map(lambda words: 8 * words)


@st.composite
def linears(draw):
    """A packed linear, symmetric or not, its last group perhaps short, and how many codes to add."""
    quantization = QuantizationConfig(
        method="gptq",
        bits=draw(BITS),
        group_size=draw(st.sampled_from([-1, 8, 24, 32, 40])),
        sym=draw(st.booleans()),
        checkpoint_format=draw(FORMATS),
    )
    shape, more = (draw(SIZES), draw(SIZES)), draw(SIZES)
    permuted = draw(st.booleans())
    return (
        gptq_tensors(shape, quantization, permuted=permuted, seed=draw(st.integers(0, 99))),
        quantization,
        shape,
        more,
    )


def check_layout(tensors, quantization, shape) -> None:
    expected = quantization.linear_tensors(*shape, bias=False)
    assert {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()} == expected


@settings(max_examples=60, deadline=None)
@given(linears())
def test_new_outputs_are_exact_zeros_beside_the_weights_that_were(linear):
    tensors, quantization, (outputs, inputs), more = linear
    before = reference_weight(tensors, quantization, (outputs, inputs))
    padded = pad_outputs(tensors, quantization, outputs + more)
    check_layout(padded, quantization, (outputs + more, inputs))
    after = reference_weight(padded, quantization, (outputs + more, inputs))
    assert torch.equal(after[:outputs], before)
    assert not after[outputs:].any()
    assert torch.equal(padded["qweight"][:, :outputs], tensors["qweight"])
    assert padded["g_idx"] is tensors["g_idx"]


@settings(max_examples=60, deadline=None)
@given(linears())
def test_new_inputs_are_exact_zeros_beside_the_weights_that_were(linear):
    tensors, quantization, (outputs, inputs), more = linear
    before = reference_weight(tensors, quantization, (outputs, inputs))
    padded = pad_inputs(tensors, quantization, inputs + more)
    check_layout(padded, quantization, (outputs, inputs + more))
    after = reference_weight(padded, quantization, (outputs, inputs + more))
    assert torch.equal(after[:, :inputs], before)
    assert not after[:, inputs:].any()
    for name, stored in tensors.items():
        assert torch.equal(padded[name][: len(stored)], stored)
    size = inputs + more if quantization.group_size == -1 else quantization.group_size
    assert padded["g_idx"][inputs:].tolist() == [k // size for k in range(inputs, inputs + more)]


@pytest.mark.parametrize(("bits", "code", "zero"), [(4, 0x88888888, 0x77777777), (8, 0x80808080, 0x7F7F7F7F)])
def test_golden_words_of_a_zero(bits, code, zero):
    """In v1, whether symmetric or not: what readers that ignore `qzeros`, and those that add 1 to them, take for 0."""
    for sym in (True, False):
        quantization = QuantizationConfig(method="gptq", bits=bits, group_size=32, sym=sym)
        tensors = gptq_tensors((32, 64), quantization)
        wide, deep = pad_outputs(tensors, quantization, 64), pad_inputs(tensors, quantization, 128)
        assert {word & 0xFFFFFFFF for word in wide["qweight"][:, 32:].flatten().tolist()} == {code}
        assert {word & 0xFFFFFFFF for word in wide["qzeros"][:, 32 * bits // 32 :].flatten().tolist()} == {zero}
        assert {word & 0xFFFFFFFF for word in deep["qweight"][64 * bits // 32 :].flatten().tolist()} == {code}
        assert {word & 0xFFFFFFFF for word in deep["qzeros"][2:].flatten().tolist()} == {zero}
        assert deep["g_idx"].tolist() == [k // 32 for k in range(128)]


def test_a_block_keeps_everything_else():
    quantization = QuantizationConfig(method="gptq", bits=4, group_size=32)
    shapes = {"mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
    shapes["self_attn.q_proj"] = (32, 32)
    block = {
        f"{linear}.{suffix}": tensor
        for linear, shape in shapes.items()
        for suffix, tensor in gptq_tensors(shape, quantization).items()
    }
    block["input_layernorm.weight"] = torch.ones(32)
    padded = pad_block(block, quantization.of_block(0), 128)
    assert padded.keys() == block.keys()
    changed = {name for name in block if padded[name] is not block[name]}
    assert changed == {name for name in block if name.startswith("mlp.")} - {
        "mlp.gate_proj.g_idx",
        "mlp.up_proj.g_idx",
    }


@pytest.mark.parametrize("tensor_parallel", [2, 4, 8])
def test_a_72b_gets_qwen_s_own_size(tensor_parallel):
    config = json.loads((ROOT / "tests" / "shapes_72b.json").read_text())
    assert padded_size(config["intermediate_size"], 128, tensor_parallel) == 29696


@given(st.integers(1, 40000), st.sampled_from([-1, 32, 48, 64, 128, 256]), st.integers(1, 16))
def test_each_gpu_gets_whole_groups_and_tiles_and_no_more_than_it_must(size, group_size, tensor_parallel):
    padded = padded_size(size, group_size, tensor_parallel)
    share, rest = divmod(padded, tensor_parallel)
    assert rest == 0 and share % 128 == 0 and share % max(group_size, 1) == 0
    fits = [each for each in range(size, padded) if not each % (128 * tensor_parallel)]
    assert size <= padded and not [each for each in fits if not each // tensor_parallel % max(group_size, 1)]
