"""Triton kernels against the torch reference: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.kernels.packed_weight import packed_weight
from runtime.kernels.reference import nf4_nested_offset
from tests.helpers.packed import packed_tensors, reference_weight

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 where a GPU rounds to nearest; it is slow, so examples are few.
DTYPES = st.sampled_from([torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []))
EXAMPLES = settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined
    dequantize_gptq_triton = importlib.import_module("runtime.kernels.triton_gptq").dequantize_gptq_triton
    dequantize_gptq_rows_triton = importlib.import_module("runtime.kernels.triton_gptq").dequantize_gptq_rows_triton
    dequantize_nf4_triton = importlib.import_module("runtime.kernels.triton_nf4").dequantize_nf4_triton


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
    quantization = QuantizationConfig("gptq", bits, group_size, sym=sym, checkpoint_format=checkpoint_format)
    shape = (out_features, in_features)
    tensors = packed_tensors(shape, quantization, permuted=permuted, seed=seed)
    around = torch.full((out_features + 3, in_features), 7.0, dtype=dtype, device=DEVICE)
    around = around.t().contiguous().t() if transposed else around
    moved = on_device(tensors)
    words_per_group = packed_weight(moved, quantization, shape).words_per_group
    dequantize_gptq_triton(moved, bits, checkpoint_format, words_per_group, around[1:-2])
    assert torch.equal(around[1:-2].cpu(), reference_weight(tensors, quantization, shape, dtype))
    assert bool((around[[0, -2, -1]] == 7).all())


@EXAMPLES
@given(
    bits=st.sampled_from([4, 8]),
    words=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    permuted=st.booleans(),
    # The interpreter flushes fp8 subnormals.
    dtype=st.one_of(DTYPES, st.just(torch.float8_e4m3fn)) if DEVICE == "cuda" else DTYPES,
    seed=st.integers(0, 1000),
)
def test_gptq_along_rows(bits, words, permuted, dtype, seed):
    in_features, out_features = (count * 32 // bits for count in words)
    quantization, shape = QuantizationConfig("gptq", bits, 32), (out_features, in_features)
    tensors = packed_tensors(shape, quantization, permuted=permuted, seed=seed)
    around = torch.full((out_features + 3, in_features), 7.0, device=DEVICE).to(dtype)
    dequantize_gptq_rows_triton(on_device(tensors), bits, quantization.checkpoint_format, around[1:-2])
    assert torch.equal(around[1:-2].cpu().float(), reference_weight(tensors, quantization, shape, dtype).float())
    assert bool((around[[0, -2, -1]].float() == 7).all())


@EXAMPLES
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 300)),
    double_quant=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 1000),
)
def test_nf4(shape, double_quant, dtype, seed):
    quantization = QuantizationConfig("nf4", 4, double_quant=double_quant)
    tensors = packed_tensors(shape, quantization, seed=seed)
    around = torch.full((shape[0] + 3, shape[1]), 7.0, dtype=dtype, device=DEVICE)
    offset = nf4_nested_offset(tensors, shape)
    dequantize_nf4_triton(on_device(tensors), offset, around[1:-2].view(-1))
    assert torch.equal(around[1:-2].cpu(), reference_weight(tensors, quantization, shape, dtype))
    assert bool((around[[0, -2, -1]] == 7).all())


COMPILE = """
from itertools import product
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime.kernels.triton_gptq import gptq_kernel, gptq_rows_kernel
from runtime.kernels.triton_nf4 import nf4_kernel

def ptx(kernel, types, constants, **options):
    signature = dict(zip(kernel.arg_names, types.split())) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name] != "constexpr"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

gptq = "*i32 *i32 *fp16 *i32 *bf16 i32 i32 i32 constexpr i32"
for bits, ordered in product((4, 8), (True, False)):
    constants = dict(stride_n=1, BITS=bits, ZERO_OFFSET=1, IN_ORDER=ordered, WORDS=16, COLUMNS=128)
    code = ptx(gptq_kernel, gptq, constants)
    assert "ld.global.v4" in code and "st.global.v4" in code
rows = "*i32 *i32 *fp16 *i32 *fp8e4nv i32 i32 i32"
code = ptx(gptq_rows_kernel, rows, dict(BITS=4, ZERO_OFFSET=1, ROWS=32, INNER=128))
assert "st.global.v4" in code
nf4 = "*u8 *fp32 *u8 *fp32 *fp32 fp32 *bf16 i32"
code = ptx(nf4_kernel, nf4, dict(DOUBLE=True, BLOCKS=64, BLOCKSIZE=64, NESTED=256), enable_fp_fusion=False)
assert "st.global.v4" in code and "fma." not in code
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile them")
def test_kernels_compile_for_h100():
    """The compiler accepts the kernels, vectorizes loads and stores to 16 bytes, and fuses no multiply-add in NF4."""
    found = subprocess.run([sys.executable, "-c", COMPILE.lstrip()], capture_output=True, text=True, cwd=ROOT)
    message = found.stdout + found.stderr
    assert found.returncode == 0, message


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize(
    "quantization",
    [QuantizationConfig("gptq", 4, 128), QuantizationConfig("gptq", 8, 128), QuantizationConfig("nf4", 4)],
)
def test_widest_linear_of_the_72b(quantization):
    shape = (29568, 8192)
    tensors = on_device(packed_tensors(shape, quantization))
    out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    packed_weight(tensors, quantization, shape).dequantize_into(out)
    assert torch.equal(out, reference_weight(tensors, quantization, shape, torch.bfloat16))


def on_device(tensors):
    return {suffix: tensor.to(DEVICE) for suffix, tensor in tensors.items()}
