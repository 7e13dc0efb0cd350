"""Products in fp8: the packed weights they start from, the plain product they equal, and what may not be asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.chat import Rendered
from runtime.checkpoint import open_checkpoint
from runtime.errors import NonFiniteError, PlanError
from runtime.float8 import E4M3, LARGEST, in_float8, multiply_plainly, multiply_scaled, round_rows
from runtime.linear import DenseLinear, make_linear, stack
from runtime.numerics import matmul_dtype
from runtime.quantization import Quantization
from runtime.scorer import Scorer
from tests.damage import change_tensors
from tests.packed import packed_tensors
from tests.placed import GPTQ4, pack_checkpoint, placements, rounds_rows_alike
from tests.tiny import write_tiny_checkpoint


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
    return [Rendered(row, len(row) - 1) for row in rows]


# ---- the numbers ----------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([1e-4, 0.02, 3.0]), st.sampled_from(["gptq", "gptq_v2"]))
def test_the_weight_is_rounded_once(seed, scale, checkpoint_format):
    quantization = Quantization("gptq", 4, 32, checkpoint_format=checkpoint_format)
    linear = packed((48, 64), quantization, seed, scale)
    low = in_float8(linear)
    plain = linear.weight(torch.float32)
    codes = low.scaled.weight(E4M3)
    assert torch.equal(torch.frexp(low.units)[0], torch.full((48,), 0.5))  # powers of two
    assert torch.equal(codes.float(), (plain / low.units[:, None]).to(E4M3).float())
    assert torch.equal(low.weight(torch.float32), plain)
    assert codes.float().abs().max() <= LARGEST


def test_a_row_of_zeros_stays_one():
    linear = packed((32, 64))
    linear.tensors["scales"][:, 5] = 0
    low = in_float8(linear)
    assert not low.scaled.weight(E4M3).float()[5].any()
    assert low(torch.randn(3, 64).bfloat16())[:, 5].eq(0).all()


@given(st.integers(1, 40), st.sampled_from([1e-30, 1e-3, 1.0, 3e4]), st.integers(0, 1000))
def test_rows_reach_the_end_of_the_format(tokens, size, seed):
    x = (torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    codes, units = round_rows(x)
    assert units.shape == (tokens, 1)
    assert torch.equal(codes.float().abs().amax(1), torch.full((tokens,), LARGEST))
    # 3 bits of mantissa: half a step is a 16th of a number, or of the smallest normal one.
    error = (codes.double() * units.double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs(), units.double() * 2.0**-6) / 16 * 1.0001).all()


def test_a_token_of_zeros_and_one_that_overflows():
    x = torch.zeros(3, 64).bfloat16()
    x[1, 3], x[2, 4] = torch.inf, torch.nan
    codes, units = round_rows(x)
    assert not (codes.float() * units)[0].any()
    assert (codes.float() * units).isnan().any(1).tolist() == [False, True, True]


def test_the_product_equals_a_slow_one():
    linear, x = packed((40, 96)), torch.randn(21, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    object.__setattr__(linear, "bias", torch.randn(40).bfloat16())
    low = in_float8(linear)
    codes, units = round_rows(x)
    weight = (linear.weight(torch.float32) / low.units[:, None]).to(E4M3).double() * low.units.double()[:, None]
    exact = (codes.double() * units.double()) @ weight.T
    torch.testing.assert_close(low(x).double(), exact + linear.bias.double(), rtol=2**-7, atol=2**-7)
    product = multiply_plainly(codes, units, low.scaled.weight(E4M3), low.units)
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_stack_gives_what_its_parts_give():
    linears = [packed((32, 64), seed=1), packed((16, 64), seed=2)]
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = in_float8(stack(linears, torch.bfloat16))(x)
    torch.testing.assert_close(together, torch.cat([in_float8(linear)(x) for linear in linears], dim=1))


def test_only_packed_weights_are_taken():
    with pytest.raises(TypeError, match="this one is a DenseLinear"):
        in_float8(DenseLinear(torch.randn(16, 16)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_multiplies_what_the_plain_product_does():
    linear = packed((256, 512))
    low = in_float8(make_linear({name: each.cuda() for name, each in linear.tensors.items()}, GPTQ4, (256, 512)))
    for tokens in (1, 20, 257):
        codes, units = round_rows(torch.randn(tokens, 512, device="cuda").bfloat16())
        weight = low.scaled.weight(E4M3, torch.empty(256, 512, dtype=E4M3, device="cuda"))
        assert torch.equal(weight.cpu().float(), in_float8(linear).scaled.weight(E4M3).float())
        plain = multiply_plainly(codes, units, weight, low.units)
        there = multiply_scaled(codes, units, weight, low.units).float()
        torch.testing.assert_close(there, plain, rtol=0.01, atol=0.01)


# ---- the scores -----------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_the_placement(model):
    """Where a bit is another, a rounding to fp8 makes more of it."""
    rows, alike = draw_rows(), rounds_rows_alike(torch.float32) and rounds_rows_alike(torch.bfloat16)
    checkpoint = open_checkpoint(model)
    want = Scorer.from_pretrained(model, devices="cpu", dtype="fp8", token_budget=64).score_rendered(rows)
    for name, (options, _) in placements(checkpoint).items():
        scorer = Scorer.from_pretrained(model, dtype="fp8", token_budget=64, **options)
        assert not scorer.plan.keep
        for scores in (scorer.score_rendered(rows), torch.cat([scorer.score_rendered([row]) for row in rows])):
            assert torch.equal(scores, want) if alike else (scores - want).abs().max() < 0.2 * want.std(), name


def test_scores_move_by_the_rounding_and_no_more(model):
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


# ---- what may not be asked for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "stored"),
    [(None, "not quantized"), (Quantization("gptq", 8, 32), "gptq, 8 bits"), (Quantization("nf4", 4), "nf4, 4 bits")],
)
def test_other_weights_are_refused(tmp_path, quantization, stored):
    directory = write_tiny_checkpoint(tmp_path / "model")
    if quantization:
        pack_checkpoint(directory, quantization)
    with pytest.raises(PlanError, match=f"is for GPTQ weights of 4 bits; .* is {stored}"):
        Scorer.from_pretrained(directory, devices="cpu", dtype="fp8")


def test_a_gpu_without_the_units_is_refused(monkeypatch):
    monkeypatch.setattr("runtime.numerics.cuda_devices", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 6))
    with pytest.raises(PlanError, match="'fp8', .* 8.9 .Ada.; cuda:0 has 8.6, so take bfloat16"):
        matmul_dtype("fp8", "cuda:0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    assert matmul_dtype("fp8", "cuda:0") == "fp8"
    assert matmul_dtype("auto", "cuda:0") == "bfloat16"
