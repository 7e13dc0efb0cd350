from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.kernels.workspace import Workspace
from runtime.modeling.linear import DenseLinear, dequantize, make_linear, stack
from tests.helpers.packed import packed_tensors, reference_weight

FORMATS = {
    "gptq-4": QuantizationConfig("gptq", 4, 16, sym=False),
    "gptq-8": QuantizationConfig("gptq", 8, -1),
    "nf4": QuantizationConfig("nf4", 4),
    "int8": QuantizationConfig("int8", 8),
    "dense": None,
}
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def linear_and_weight(kind, out_features, in_features=40, bias=True, seed=0):
    """Return a linear in one format, and its fp32 reference weight."""
    generator = torch.Generator().manual_seed(seed)
    quantization, shape = FORMATS[kind], (out_features, in_features)
    biases = {"bias": torch.randn(out_features, generator=generator).to(BFLOAT16)} if bias else {}
    if quantization is None:
        weight = torch.randn(shape, generator=generator).to(BFLOAT16)
        return make_linear({"weight": weight} | biases, None, shape), weight.float()
    tensors = packed_tensors(shape, quantization, seed=seed)
    return make_linear(tensors | biases, quantization, shape), reference_weight(tensors, quantization, shape)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_a_linear_multiplies_by_its_weight(kind, dtype):
    linear, weight = linear_and_weight(kind, 24)
    x = torch.randn(5, 40).to(dtype)
    assert linear.shape == (24, 40) and linear.device == x.device
    assert torch.equal(linear.weight(dtype), weight.to(dtype))
    out = torch.empty(24, 40, dtype=dtype)
    assert linear.weight(dtype, out) is out and torch.equal(out, weight.to(dtype))
    close(linear(x), F.linear(x.float(), weight.to(dtype).float(), linear.bias.float()))


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(sorted(FORMATS)), st.integers(1, 3), st.booleans()), min_size=1, max_size=4
    ),
    dtype=st.sampled_from([BFLOAT16, FLOAT32]),
    keep_dequantized=st.booleans(),
)
def test_a_stack_concatenates_its_parts(parts, dtype, keep_dequantized):
    made = [linear_and_weight(kind, 8 * n, bias=bias, seed=seed) for seed, (kind, n, bias) in enumerate(parts)]
    linears = [linear for linear, _ in made]
    stacked = stack(linears, dtype, keep_dequantized=keep_dequantized)
    weight = torch.cat([weight for _, weight in made]).to(dtype)
    assert stacked.widths == tuple(8 * n for _, n, _ in parts) and stacked.shape == tuple(weight.shape)
    assert torch.equal(stacked.weight(dtype), weight)
    assert torch.equal(stacked.weight(dtype, torch.empty_like(weight)), weight)
    x = torch.randn(3, 40).to(dtype)
    found = stacked(x)
    for linear, output in zip(linears, found.split(stacked.widths, dim=-1), strict=True):
        close(output, linear(x).float())
    assert (stacked.bias is None) == (not any(bias for _, _, bias in parts))


def close(found, expected):
    """Assert equality up to the order of summation."""
    step = torch.finfo(found.dtype).eps
    assert bool(((found.float() - expected).abs() <= 4 * step * expected.abs().clamp(min=expected.abs().max())).all())


def test_dense_parts_become_one_contiguous_weight():
    stacked = stack([linear_and_weight("dense", 8, seed=seed)[0] for seed in range(3)], BFLOAT16)
    (part,) = stacked.parts
    assert isinstance(part, DenseLinear) and part.stored.is_contiguous()
    assert stacked.weight(BFLOAT16) is part.stored  # not copied
    alone = linear_and_weight("dense", 8)[0]
    assert stack([alone], BFLOAT16).weight(BFLOAT16) is alone.stored


def test_packed_parts_stay_packed_unless_kept():
    linears = [linear_and_weight("gptq-4", 8, seed=seed)[0] for seed in range(2)]
    assert stack(linears, BFLOAT16).parts == tuple(linears)
    (kept,) = stack(linears, BFLOAT16, keep_dequantized=True).parts
    assert isinstance(kept, DenseLinear) and kept.stored.dtype == BFLOAT16


@pytest.mark.parametrize("kind", FORMATS)
def test_a_dense_copy_gives_the_same_product(kind):
    linear, weight = linear_and_weight(kind, 24)
    dense, x = dequantize(linear, BFLOAT16), torch.randn(5, 40).to(BFLOAT16)
    assert torch.equal(dense.stored, weight.to(BFLOAT16)) and dense.bias.dtype == BFLOAT16
    assert torch.equal(dense(x), linear(x))


@pytest.mark.parametrize("kind", FORMATS)
def test_products_use_one_buffer_and_it_does_not_grow(kind):
    linears = [linear_and_weight(kind, width)[0] for width in (32, 8, 16)]
    x, workspace = torch.randn(5, 40), Workspace.of(torch.device("cpu"))
    workspace.clear()
    before = [linear(x) for linear in linears]
    held = workspace.nbytes
    assert held >= 32 * 40 * 4
    assert all(torch.equal(linear(x), y) for linear, y in zip(linears, before, strict=True))
    assert workspace.nbytes == held


def test_weight_does_not_return_the_shared_buffer():
    first, second = (linear_and_weight("nf4", 8, seed=seed)[0] for seed in range(2))
    weight = first.weight(BFLOAT16)
    copy = weight.clone()
    second(torch.randn(2, 40).to(BFLOAT16))
    assert torch.equal(weight, copy)


def test_a_workspace_grows_and_can_be_cleared():
    workspace = Workspace("cpu")
    small = workspace.get_buffer("weight", (2, 3), FLOAT32)
    assert small.shape == (2, 3) and workspace.nbytes == 24
    large = workspace.get_buffer("weight", (4, 3), FLOAT32)
    assert workspace.get_buffer("weight", (8, 3), BFLOAT16).data_ptr() == large.data_ptr() and workspace.nbytes == 48
    assert workspace.get_buffer("other", (1,), FLOAT32).data_ptr() != large.data_ptr()
    workspace.clear()
    assert workspace.nbytes == 0


def test_each_thread_has_a_workspace_of_its_own():
    here, there = Workspace.of(torch.device("cpu")), []
    thread = threading.Thread(target=lambda: there.append(Workspace.of(torch.device("cpu"))))
    thread.start()
    thread.join()
    assert Workspace.of(torch.device("cpu")) is here and there[0] is not here


def test_a_workspace_outlives_inference_mode():
    """Buffers made in inference mode could not be written to outside of it."""
    linear, x = linear_and_weight("gptq-4", 8)[0], torch.randn(2, 40)
    Workspace.of(torch.device("cpu")).clear()
    with torch.inference_mode():
        inside = linear(x)
    assert torch.equal(linear(x), inside)
