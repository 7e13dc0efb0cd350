"""fp8 products: rescaled weights, reference product, scores, and unsupported weights or GPUs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.common.errors import ConfigurationError, NonFiniteError
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.precision_choice import resolve_dtype
from runtime.modeling.fp8 import E4M3, E4M3_MAX, make_float8_linear, quantize_rows, scaled_mm_cuda, scaled_mm_reference
from runtime.modeling.linear import DenseLinear, make_linear, stack
from runtime.scorer import Scorer
from tests.helpers.damage import change_tensors
from tests.helpers.packed import packed_tensors
from tests.helpers.placed import GPTQ4, pack_checkpoint, placements, rounds_rows_alike
from tests.helpers.tiny import write_tiny_checkpoint


def packed(shape, quantization=GPTQ4, seed=0, scale=0.02):
    tensors = packed_tensors(shape, quantization, seed=seed)
    sizes = tensors["scales"].float()
    tensors["scales"] = (sizes.abs().clamp_min(0.01) * scale).copysign(sizes).to(torch.float16)
    return make_linear(tensors, quantization, shape)


@pytest.fixture
def model(tmp_path):
    return pack_checkpoint(write_tiny_checkpoint(tmp_path / "model", layers=6), GPTQ4)


def draw_rows():
    draw = torch.Generator().manual_seed(3)
    lengths = [5, 40, 17, 90, 33, 64, 2, 71]
    rows = [torch.randint(3, 250, (length,), generator=draw).tolist() for length in lengths]
    rows += [[*rows[3][:30], *rows[1]], [*rows[3][:30], *rows[2]]]  # prefixes to share
    return [RenderedConversation(row, len(row) - 1) for row in rows]


# ---- numerics -------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([1e-4, 0.02, 3.0]), st.sampled_from(["gptq", "gptq_v2"]))
def test_the_weight_is_rounded_once(seed, scale, checkpoint_format):
    quantization = QuantizationConfig("gptq", 4, 32, checkpoint_format=checkpoint_format)
    linear = packed((48, 64), quantization, seed, scale)
    low = make_float8_linear(linear)
    plain = linear.weight(torch.float32)
    codes = low.scaled_linear.weight(E4M3)
    assert torch.equal(torch.frexp(low.row_scales)[0], torch.full((48,), 0.5))  # powers of two
    assert torch.equal(codes.float(), (plain / low.row_scales[:, None]).to(E4M3).float())
    assert torch.equal(low.weight(torch.float32), plain)
    assert codes.float().abs().max() <= E4M3_MAX


def test_a_row_of_zeros_stays_zero():
    linear = packed((32, 64))
    linear.tensors["scales"][:, 5] = 0
    low = make_float8_linear(linear)
    assert not low.scaled_linear.weight(E4M3).float()[5].any()
    assert low(torch.randn(3, 64).bfloat16())[:, 5].eq(0).all()


@given(st.integers(1, 40), st.sampled_from([1e-30, 1e-3, 1.0, 3e4]), st.integers(0, 1000))
def test_quantized_rows_reach_the_e4m3_maximum(tokens, size, seed):
    x = (torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    codes, row_scales = quantize_rows(x)
    assert row_scales.shape == (tokens, 1)
    assert torch.equal(codes.float().abs().amax(1), torch.full((tokens,), E4M3_MAX))
    # 3 bits of mantissa: half a step is a 16th of a number, or of the smallest normal one.
    error = (codes.double() * row_scales.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs(), row_scales.double() * 2.0**-6) / 16 * 1.0001).all()


def test_a_token_of_zeros_and_one_that_overflows():
    x = torch.zeros(3, 64).bfloat16()
    x[1, 3], x[2, 4] = torch.inf, torch.nan
    codes, row_scales = quantize_rows(x)
    assert not (codes.float() * row_scales)[0].any()
    assert (codes.float() * row_scales).isnan().any(1).tolist() == [False, True, True]


def test_the_product_equals_an_fp64_product():
    linear, x = packed((40, 96)), torch.randn(21, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    object.__setattr__(linear, "bias", torch.randn(40).bfloat16())
    low = make_float8_linear(linear)
    codes, row_scales = quantize_rows(x)
    weight = (linear.weight(torch.float32) / low.row_scales[:, None]).to(E4M3).double() * low.row_scales.double()[
        :, None
    ]
    exact = (codes.double() * row_scales.double()) @ weight.T
    torch.testing.assert_close(low(x).double(), exact + linear.bias.double(), rtol=2**-7, atol=2**-7)
    product = scaled_mm_reference(codes, row_scales, low.scaled_linear.weight(E4M3), low.row_scales)
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_stack_gives_what_its_parts_give():
    linears = [packed((32, 64), seed=1), packed((16, 64), seed=2)]
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = make_float8_linear(stack(linears, torch.bfloat16))(x)
    torch.testing.assert_close(together, torch.cat([make_float8_linear(linear)(x) for linear in linears], dim=1))


def test_only_packed_weights_are_accepted():
    with pytest.raises(TypeError, match="this one is a DenseLinear"):
        make_float8_linear(DenseLinear(torch.randn(16, 16)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_product_equals_the_reference():
    linear = packed((256, 512))
    low = make_float8_linear(
        make_linear({name: each.cuda() for name, each in linear.tensors.items()}, GPTQ4, (256, 512))
    )
    for tokens in (1, 20, 257):
        codes, row_scales = quantize_rows(torch.randn(tokens, 512, device="cuda").bfloat16())
        weight = low.scaled_linear.weight(E4M3, torch.empty(256, 512, dtype=E4M3, device="cuda"))
        assert torch.equal(weight.cpu().float(), make_float8_linear(linear).scaled_linear.weight(E4M3).float())
        plain = scaled_mm_reference(codes, row_scales, weight, low.row_scales)
        there = scaled_mm_cuda(codes, row_scales, weight, low.row_scales).float()
        torch.testing.assert_close(there, plain, rtol=0.01, atol=0.01)


# ---- scores ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_do_not_depend_on_the_placement(model):
    """If a product differs in one bit, rounding to fp8 amplifies it."""
    rows, alike = draw_rows(), rounds_rows_alike(torch.float32) and rounds_rows_alike(torch.bfloat16)
    checkpoint = open_checkpoint(model)
    want = Scorer.from_pretrained(model, devices="cpu", dtype="fp8", token_budget=64).score_rendered(rows)
    for name, (options, _) in placements(checkpoint).items():
        scorer = Scorer.from_pretrained(model, dtype="fp8", token_budget=64, **options)
        assert not scorer.plan.keep_dequantized
        for scores in (scorer.score_rendered(rows), torch.cat([scorer.score_rendered([row]) for row in rows])):
            assert torch.equal(scores, want) if alike else (scores - want).abs().max() < 0.2 * want.std(), name


def test_scores_change_only_by_the_rounding(model):
    rows = draw_rows()
    plain = Scorer.from_pretrained(model, devices="cpu", dtype="float32").score_rendered(rows)
    low = Scorer.from_pretrained(model, devices="cpu", dtype="fp8").score_rendered(rows)
    shift = (low - plain).abs() / plain.std()
    assert 0.001 < shift.mean() < 0.3


def test_a_damaged_weight_is_found(model):
    name = "model.layers.3.mlp.up_proj.scales"
    change_tensors(model, lambda tensors: tensors[name].view(-1).__setitem__(7, torch.nan))
    with pytest.raises(NonFiniteError, match="block 3"):
        Scorer.from_pretrained(model, devices="cpu", dtype="fp8").score_rendered(draw_rows())


# ---- unsupported weights and GPUs------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "stored"),
    [
        (None, "not quantized"),
        (QuantizationConfig("gptq", 8, 32), "gptq, 8 bits"),
        (QuantizationConfig("nf4", 4), "nf4, 4 bits"),
    ],
)
def test_other_weights_are_refused(tmp_path, quantization, stored):
    directory = write_tiny_checkpoint(tmp_path / "model")
    if quantization:
        pack_checkpoint(directory, quantization)
    with pytest.raises(ConfigurationError, match=f"needs 4-bit GPTQ weights; .* is {stored}"):
        Scorer.from_pretrained(directory, devices="cpu", dtype="fp8")


def test_a_gpu_without_fp8_units_is_refused(monkeypatch):
    monkeypatch.setattr("runtime.execution.precision_choice.cuda_device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 6))
    with pytest.raises(ConfigurationError, match="'fp8', .* 8.9 .Ada. or later; cuda:0 has 8.6, so use bfloat16"):
        resolve_dtype("fp8", "cuda:0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    assert resolve_dtype("fp8", "cuda:0") == "fp8"
    assert resolve_dtype("auto", "cuda:0") == "bfloat16"
