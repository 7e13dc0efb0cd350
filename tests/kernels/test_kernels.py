"""Fast dequantization against the plain torch reference, and its chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.errors import CheckpointError
from runtime.kernels import workspace
from runtime.kernels.packed_weight import packed_weight
from tests.helpers.packed import packed_tensors, reference_weight

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
GROUP_SIZES = st.one_of(st.sampled_from([-1, 8, 16, 64]), st.integers(1, 100))


def check_written(tensors, quantization, shape, dtype, transposed):
    """Written into the middle of a larger buffer, the weight equals the reference, and the rest is unchanged."""
    buffer = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=dtype)
    buffer = buffer.t().contiguous().t() if transposed else buffer
    packed_weight(tensors, quantization, shape).dequantize_into(buffer[1:-2])
    assert torch.equal(buffer[1:-2], reference_weight(tensors, quantization, shape, dtype))
    assert torch.equal(buffer[1:-2], reference_weight(tensors, quantization, shape).to(dtype))
    assert bool((buffer[[0, -2, -1]] == 7).all())


@settings(max_examples=100, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    words=st.tuples(st.integers(1, 24), st.integers(1, 8)),
    group_size=GROUP_SIZES,
    sym=st.booleans(),
    permuted=st.booleans(),
    transposed=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    dtype=DTYPES,
    chunk_weights=st.sampled_from([1, 64, 640, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_gptq(bits, words, group_size, sym, permuted, transposed, checkpoint_format, dtype, chunk_weights, seed):
    in_features, out_features = (count * 32 // bits for count in words)
    quantization = QuantizationConfig("gptq", bits, group_size, sym=sym, checkpoint_format=checkpoint_format)
    shape = (out_features, in_features)
    tensors = packed_tensors(shape, quantization, permuted=permuted, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(workspace.CHUNK_WEIGHTS, "cpu", chunk_weights)
        check_written(tensors, quantization, shape, dtype, transposed)


@settings(max_examples=60, deadline=None)
@given(
    quantization=st.sampled_from(
        [QuantizationConfig("nf4", 4), QuantizationConfig("nf4", 4, double_quant=False), QuantizationConfig("int8", 8)]
    ),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    transposed=st.booleans(),
    dtype=DTYPES,
    chunk_weights=st.sampled_from([1, 200, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_bitsandbytes(quantization, shape, transposed, dtype, chunk_weights, seed):
    tensors = packed_tensors(shape, quantization, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(workspace.CHUNK_WEIGHTS, "cpu", chunk_weights)
        check_written(tensors, quantization, shape, dtype, transposed)


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_scales_stay_exact(bits):
    """Includes the largest fp16 value, its smallest subnormal and zero."""
    shape, quantization = (8, 16), QuantizationConfig("gptq", bits, 8, sym=False)
    tensors = packed_tensors(shape, quantization)
    tensors["scales"][0] = torch.tensor([65504, -65504, 2.0**-24, -(2.0**-24), 0, 1, 1 / 3, 2047 * 2.0**-24])
    check_written(tensors, quantization, shape, torch.float32, True)


def test_a_permuted_g_idx_is_detected():
    """The first entry of each word and group is in order; one pair in the middle is swapped."""
    shape, quantization = (8, 64), QuantizationConfig("gptq", 4, 16, sym=False)
    tensors = packed_tensors(shape, quantization)
    tensors["g_idx"][[13, 18]] = tensors["g_idx"][[18, 13]]
    check_written(tensors, quantization, shape, torch.float32, True)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 200), most=st.integers(1, 60), group=st.integers(1, 60))
def test_chunks_are_whole_groups_or_part_of_one(count, most, group):
    parts = list(workspace.chunks(count, most, group))
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(count))
    for part in parts:
        assert part.stop - part.start <= most
        within = part.start // group == (part.stop - 1) // group
        assert within or (part.start % group == 0 and part.stop % group == 0)


def test_int8_codes_not_in_row_order_are_refused():
    tensors = packed_tensors((4, 8), QuantizationConfig("int8", 8))
    tensors["weight_format"] = torch.tensor(1, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="weight_format is 1"):
        packed_weight(tensors, QuantizationConfig("int8", 8), (4, 8))
