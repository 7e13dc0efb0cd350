"""The methods that look at no data: round to nearest, NF4, LLM.int8."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from quantize.solver.data_free import quantize_int8, quantize_nf4, round_to_nearest
from quantize.solver.settings import GPTQSettings
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.kernels.reference import dequantize_gptq, dequantize_int8, dequantize_nf4, pack_gptq


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_each_code_is_the_nearest_on_its_grid(weight, bits, sym):
    solved = round_to_nearest(weight, GPTQSettings(bits=bits, group_size=32, sym=sym))
    scale = solved.scales.float()[solved.g_idx.long()]
    grid = (torch.arange(1 << bits)[:, None, None] - solved.zeros.float()[solved.g_idx.long()]) * scale
    nearest = (grid - weight.float().T).abs().amin(0)
    assert torch.allclose((solved.weight - weight.float()).abs().T, nearest, atol=1e-6)
    packed = pack_gptq(solved.codes, solved.zeros, solved.scales, solved.g_idx, bits)
    assert torch.equal(dequantize_gptq(packed, bits), solved.weight)


def test_searched_scales_beat_min_max(weight):
    searched = round_to_nearest(weight, GPTQSettings(group_size=32))
    plain = round_to_nearest(weight, GPTQSettings(group_size=32, importance_scales=False))
    assert searched.relative_loss < 0.9 * plain.relative_loss


def test_nf4_is_what_bitsandbytes_makes_and_dequantizes(weight):
    stored = quantize_nf4(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    expected = QuantizationConfig("nf4", 4).linear_tensors(96, 128, bias=False)
    assert stored.keys() == expected.keys()
    assert torch.equal(dequantize_nf4(stored, (96, 128), torch.bfloat16), bnb.dequantize_4bit(packed, state))


def test_int8_is_bitsandbytes_row_quantization(weight):
    stored = quantize_int8(weight)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(stored["SCB"], scales)
    assert (stored["weight"].int() - codes.int()).abs().max() <= 1  # theirs rounds the weight to fp16 first
    assert (dequantize_int8(stored) - weight.float()).abs().max() <= scales.max() / 127 / 2 + 1e-6


def test_a_row_of_zeros_stays_zero():
    weight = torch.zeros(64, 128, dtype=torch.bfloat16)
    assert not dequantize_int8(quantize_int8(weight)).any()
    assert not dequantize_nf4(quantize_nf4(weight), (64, 128)).any()
    assert not round_to_nearest(weight, GPTQSettings(group_size=64)).weight.any()
