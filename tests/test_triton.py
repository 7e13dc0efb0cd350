"""The Triton kernels against their plain twins: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from runtime.kernels import packed_weight
from runtime.quantization import Quantization
from tests.packed import packed_tensors, twin

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bf16 where a GPU rounds to nearest, and takes long over small things.
DTYPES = st.sampled_from([torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []))
EXAMPLES = settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined
    write_gptq = importlib.import_module("runtime.kernels.triton_gptq").write_gptq
    write_gptq_rows = importlib.import_module("runtime.kernels.triton_gptq").write_gptq_rows
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
    bits=st.sampled_from([4, 8]),
    words=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    permuted=st.booleans(),
    # The interpreter loses what is subnormal in fp8.
    dtype=st.one_of(DTYPES, st.just(torch.float8_e4m3fn)) if DEVICE == "cuda" else DTYPES,
    seed=st.integers(0, 1000),
)
def test_gptq_along_rows(bits, words, permuted, dtype, seed):
    in_features, out_features = (count * 32 // bits for count in words)
    quantization, shape = Quantization("gptq", bits, 32), (out_features, in_features)
    tensors = packed_tensors(shape, quantization, permuted=permuted, seed=seed)
    around = torch.full((out_features + 3, in_features), 7.0, device=DEVICE).to(dtype)
    write_gptq_rows(packed_weight(on_device(tensors), quantization, shape), around[1:-2])
    assert torch.equal(around[1:-2].cpu().float(), twin(tensors, quantization, shape, dtype).float())
    assert bool((around[[0, -2, -1]].float() == 7).all())


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
    constants = dict(stride_n=1, BITS=bits, ONES=1, IN_ORDER=ordered, WORDS=16, COLUMNS=128)
    code = ptx(gptq_kernel, gptq, constants)
    assert "ld.global.v4" in code and "st.global.v4" in code
rows = "*i32 *i32 *fp16 *i32 *fp8e4nv i32 i32 i32"
code = ptx(gptq_rows_kernel, rows, dict(BITS=4, ONES=1, ROWS=32, INNER=128))
assert "st.global.v4" in code
nf4 = "*u8 *fp32 *u8 *fp32 *fp32 fp32 *bf16 i32"
code = ptx(nf4_kernel, nf4, dict(DOUBLE=True, BLOCKS=64, BLOCKSIZE=64, NESTED=256), enable_fp_fusion=False)
assert "st.global.v4" in code and "fma." not in code
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile them")
def test_they_compile_for_an_h100_without_one():
    """What the interpreter forgives, a compiler may not: words are read and written 16 bytes at once, nothing fused."""
    found = subprocess.run([sys.executable, "-c", COMPILE.lstrip()], capture_output=True, text=True, cwd=ROOT)
    message = found.stdout + found.stderr
    assert found.returncode == 0, message


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
