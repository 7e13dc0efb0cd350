from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoints.quantization_config import NF4_QUANT_STATE, QuantizationConfig
from runtime.common.errors import CheckpointError
from runtime.kernels.reference import (
    dequantize_gptq,
    dequantize_int8,
    dequantize_nf4,
    nf4_absmax,
    pack_gptq,
    unpack_gptq,
)


def random_gptq(in_features, out_features, bits, group_size, seed=0, permuted=False):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator).to(torch.uint8)
    zeros = torch.randint(1, 1 << bits, (groups, out_features), generator=generator).to(torch.uint8)
    scales = (torch.rand(groups, out_features, generator=generator) + 0.01).half()
    g_idx = torch.arange(in_features) // group_size
    if permuted:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    return codes, zeros, scales, g_idx


def slow_weight(codes, zeros, scales, g_idx):
    """Compute the GPTQ formula one weight at a time, in Python floats."""
    weight = torch.empty(codes.shape[1], codes.shape[0], dtype=torch.float64)
    for k in range(codes.shape[0]):
        for n in range(codes.shape[1]):
            group = int(g_idx[k])
            weight[n, k] = float(scales[group, n]) * (int(codes[k, n]) - int(zeros[group, n]))
    return weight.float()


def slow_code(words, position, bits):
    """Code `position` of a row of 32-bit words, with Python integers."""
    per_word = 32 // bits
    word = int(words[position // per_word]) & 0xFFFFFFFF
    return (word >> (bits * (position % per_word))) & ((1 << bits) - 1)


def test_golden_words_4_bits():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0xF], dtype=torch.uint8).view(8, 1).repeat(1, 8)
    tensors = pack_gptq(codes, torch.full((1, 8), 8, dtype=torch.uint8), torch.ones(1, 8), torch.zeros(8), 4)
    assert [word & 0xFFFFFFFF for word in tensors["qweight"].flatten().tolist()] == [0xF7654321] * 8
    assert tensors["qzeros"].tolist() == [[0x77777777]]  # symmetric: 8 - 1 in every nibble
    assert tensors["g_idx"].tolist() == [0] * 8 and tensors["g_idx"].dtype == torch.int32
    assert tensors["scales"].dtype == torch.float16


def test_golden_words_8_bits():
    codes = torch.tensor([0x01, 0x23, 0x45, 0xE7], dtype=torch.uint8).view(4, 1).repeat(1, 4)
    zeros = torch.full((1, 4), 128, dtype=torch.uint8)
    tensors = pack_gptq(codes, zeros, torch.ones(1, 4), torch.zeros(4), 8)
    assert [word & 0xFFFFFFFF for word in tensors["qweight"].flatten().tolist()] == [0xE7452301] * 4
    assert tensors["qzeros"].tolist() == [[0x7F7F7F7F]]


def test_zeros_differ_by_one_between_the_formats():
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    zeros = torch.arange(1, 9, dtype=torch.uint8).view(1, 8)
    arguments = (codes, zeros, torch.ones(1, 8), torch.zeros(8), 4)
    assert pack_gptq(*arguments)["qzeros"].item() == 0x76543210
    assert pack_gptq(*arguments, checkpoint_format="gptq_v2")["qzeros"].item() & 0xFFFFFFFF == 0x87654321


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    words=st.tuples(st.integers(1, 6), st.integers(1, 4)),
    group_size=st.integers(1, 50),
    permuted=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    seed=st.integers(0, 1000),
)
def test_round_trip(bits, words, group_size, permuted, checkpoint_format, seed):
    in_features, out_features = (count * 32 // bits for count in words)
    parts = random_gptq(in_features, out_features, bits, group_size, seed, permuted)
    codes, zeros, scales, g_idx = parts
    before = [part.clone() for part in parts]
    tensors = pack_gptq(*parts, bits, checkpoint_format)
    assert all(torch.equal(part, copy) for part, copy in zip(parts, before, strict=True))

    described = QuantizationConfig("gptq", bits, group_size).linear_tensors(out_features, in_features, bias=False)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == described
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    unpacked_codes, unpacked_zeros = unpack_gptq(tensors, bits, checkpoint_format)
    assert torch.equal(unpacked_codes, codes) and torch.equal(unpacked_zeros, zeros)
    assert slow_code(tensors["qweight"][:, -1], in_features - 1, bits) == int(codes[-1, -1])
    offset = 1 if checkpoint_format == "gptq" else 0
    assert slow_code(tensors["qzeros"][-1], out_features - 1, bits) == int(zeros[-1, -1]) - offset
    weight = dequantize_gptq(tensors, bits, checkpoint_format=checkpoint_format)
    assert torch.equal(weight, slow_weight(codes, zeros, scales, g_idx))


def test_lower_precision_rounds_once():
    tensors = pack_gptq(*random_gptq(64, 32, 8, 24), bits=8)
    exact = dequantize_gptq(tensors, 8)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize_gptq(tensors, 8, dtype), exact.to(dtype))


def test_a_borrow_in_stored_zeros_is_undone():
    """GPTQModel subtracts on the whole word to get v1, so a zero of 0 borrows from its neighbour."""
    codes, _, scales, g_idx = random_gptq(16, 8, 4, 16)
    tensors = pack_gptq(codes, torch.full((1, 8), 8, dtype=torch.uint8), scales, g_idx, 4)
    true_zeros = 0x76543210
    tensors["qzeros"] = torch.tensor([[true_zeros]], dtype=torch.int32) - 0x11111111
    assert unpack_gptq(tensors, 4)[1].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("shape, named", [((12, 16), "in_features 12"), ((16, 12), "out_features 12")])
def test_partly_filled_words_are_refused(shape, named):
    with pytest.raises(CheckpointError, match=named):
        pack_gptq(*random_gptq(*shape, 4, 8), bits=4)


def test_a_zero_of_zero_is_refused_in_v1():
    codes, zeros, scales, g_idx = random_gptq(16, 16, 4, 8)
    zeros[1, 3] = 0
    with pytest.raises(ValueError, match="zero of 0"):
        pack_gptq(codes, zeros, scales, g_idx, 4)
    tensors = pack_gptq(codes, zeros, scales, g_idx, 4, "gptq_v2")
    assert torch.equal(unpack_gptq(tensors, 4, "gptq_v2")[1], zeros)


def test_a_scale_beyond_fp16_is_refused():
    codes, zeros, scales, g_idx = random_gptq(16, 16, 4, 8)
    with pytest.raises(ValueError, match="1e\\+06"):
        pack_gptq(codes, zeros, scales.float().clamp(min=1e6), g_idx, 4)


def bitsandbytes_nf4(weight, double_quant):
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    return {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (96, 200), (7, 9), (300, 128)])
def test_nf4_equals_bitsandbytes(shape, double_quant):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    tensors = bitsandbytes_nf4(weight, double_quant)
    functional = pytest.importorskip("bitsandbytes").functional

    described = QuantizationConfig("nf4", 4, double_quant=double_quant).linear_tensors(*shape, bias=False)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found | {NF4_QUANT_STATE: (torch.uint8, None)} == described
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
        quant_state = functional.QuantState.from_dict(state, torch.device("cpu"))
        quant_state.dtype = dtype
        expected = functional.dequantize_4bit(tensors["weight"], quant_state)
        assert torch.equal(dequantize_nf4(tensors, shape, dtype), expected)


def test_nf4_absmax_is_close_to_the_true_one():
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(2))
    absmax = nf4_absmax(bitsandbytes_nf4(weight, True), (128, 192))
    true = weight.view(-1, 64).abs().amax(dim=1)
    assert (absmax - true).abs().max() < 0.02 * true.max()


@pytest.mark.parametrize(
    "change, named",
    [
        ({"blocksize": 128}, "'blocksize': 128"),
        ({"shape": [64, 32]}, "32"),
        ({"quant_type": "fp4"}, "fp4"),
        ({"nested_offset": float("nan")}, "nan"),
        ({"nested_blocksize": 64}, "64"),
    ],
)
def test_an_unsupported_nf4_state_is_refused(change, named):
    tensors = bitsandbytes_nf4(torch.ones(32, 64), True)
    text = json.dumps(json.loads(tensors[NF4_QUANT_STATE].numpy().tobytes()) | change).encode()
    tensors[NF4_QUANT_STATE] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=named):
        dequantize_nf4(tensors, (32, 64))


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"[1]"])
def test_a_damaged_nf4_state_is_refused(text):
    tensors = bitsandbytes_nf4(torch.ones(32, 64), True)
    tensors[NF4_QUANT_STATE] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="not the JSON text"):
        dequantize_nf4(tensors, (32, 64))


def test_int8_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    codes, row_scales, _ = functional.int8_vectorwise_quant(torch.randn(48, 40).half())
    tensors = {"weight": codes, "SCB": row_scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    described = QuantizationConfig("int8", 8).linear_tensors(48, 40, bias=False)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == described
    assert torch.equal(dequantize_int8(tensors), functional.int8_vectorwise_dequant(codes, row_scales))
    tensors["weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="weight_format is 2"):
        dequantize_int8(tensors)


def test_chunked_dequantization_gives_the_same_weight(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (64, 40), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(1, 16, (4, 40), dtype=torch.uint8, generator=generator)
    scales = torch.rand(4, 40, generator=generator).half()
    packed = pack_gptq(codes, zeros, scales, torch.arange(64) // 16, 4)
    whole = dequantize_gptq(packed, 4)
    monkeypatch.setattr("runtime.kernels.reference.DEQUANTIZE_CHUNK_WEIGHTS", 3 * 64)
    assert torch.equal(dequantize_gptq(packed, 4), whole)
