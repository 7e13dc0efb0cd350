"""The Triton kernels against their plain twins: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from runtime.kernels import packed_weight
from runtime.quantization import Quantization
from tests.packed import packed_tensors, twin

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 where a GPU rounds to nearest, and takes long over small things.
DTYPES = st.sampled_from([torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []))
EXAMPLES = settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined
    write_gptq = importlib.import_module("runtime.kernels.triton_gptq").write_gptq
    write_nf4 = importlib.import_module("runtime.kernels.triton_nf4").write_nf4


@EXAMPLES
@given(
    bits=st.sampled_from([4, 8]),
    words=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    group_size=st.one_of(st.sampled_from([-1, 32, 64, 128]), st.integers(1, 100)),
    sym=st.booleans(),
    permuted=st.booleans(),
    transposed=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_gptq(bits, words, group_size, sym, permuted, transposed, checkpoint_format, dtype, seed):
    in_features, out_features = (count * 32 // bits for count in words)
    quantization = Quantization("gptq", bits, group_size, sym=sym, checkpoint_format=checkpoint_format)
    shape = (out_features, in_features)
    tensors = packed_tensors(shape, quantization, permuted=permuted, seed=seed)
    around = torch.full((out_features + 3, in_features), 7.0, dtype=dtype, device=DEVICE)
    around = around.t().contiguous().t() if transposed else around
    write_gptq(packed_weight(on_device(tensors), quantization, shape), around[1:-2])
    assert torch.equal(around[1:-2].cpu(), twin(tensors, quantization, shape, dtype))
    assert bool((around[[0, -2, -1]] == 7).all())


@EXAMPLES
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 300)),
    double_quant=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_nf4(shape, double_quant, dtype, seed):
    quantization = Quantization("nf4", 4, double_quant=double_quant)
    tensors = packed_tensors(shape, quantization, seed=seed)
    around = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=dtype, device=DEVICE)
    write_nf4(packed_weight(on_device(tensors), quantization, shape), around[1:-2].view(-1))
    assert torch.equal(around[1:-2].cpu(), twin(tensors, quantization, shape, dtype))
    assert bool((around[[0, -2, -1]] == 7).all())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    "quantization", [Quantization("gptq", 4, 128), Quantization("gptq", 8, 128), Quantization("nf4", 4)]
)
def test_the_72b_s_widest_linear(quantization):
    shape = (29568, 8192)
    tensors = on_device(packed_tensors(shape, quantization))
    out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    packed_weight(tensors, quantization, shape).write(out)
    assert torch.equal(out, twin(tensors, quantization, shape, torch.bfloat16))


def on_device(tensors):
    return {suffix: tensor.to(DEVICE) for suffix, tensor in tensors.items()}
