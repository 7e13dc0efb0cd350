from __future__ import annotations

import math

import pytest
import torch

from quantize.solver.hessian import TOKENS_AT_ONCE, Hessian
from runtime.common.errors import NonFiniteError


def exact(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (x.double() * weights.double()[:, None]).T @ x.double() / weights.double().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("features", [1, 130, 300])
def test_matches_float64(dtype: torch.dtype, weighted: bool, features: int) -> None:
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(500, features, generator=generator).mul_(torch.logspace(-2, 2, features)).to(dtype)
    weights = torch.rand(500, generator=generator) * 30 if weighted else torch.ones(500)
    hessian = Hessian(features, "cpu")
    for start, stop in ((0, 1), (1, 200), (200, 500)):
        hessian.add(x[start:stop], weights[start:stop] if weighted else None)
    found, expected = hessian.matrix(), exact(x, weights)
    scale = expected.diagonal().sqrt()
    rounded = weighted and dtype == torch.bfloat16  # x sqrt(w) is then rounded to bf16
    assert ((found - expected) / torch.outer(scale, scale)).abs().max() < (2e-3 if rounded else 2e-6)
    assert torch.equal(found, found.T)
    assert hessian.tokens == 500


def test_long_input_is_taken_in_pieces() -> None:
    x = torch.randn(TOKENS_AT_ONCE + 3, 8)
    hessian = Hessian(8, "cpu")
    hessian.add(x)
    torch.testing.assert_close(hessian.matrix().double(), exact(x, torch.ones(len(x))), rtol=1e-5, atol=1e-5)


def test_weight_counts_a_token_that_many_times() -> None:
    x = torch.randn(4, 6)
    once, thrice = Hessian(6, "cpu"), Hessian(6, "cpu")
    once.add(torch.cat([x, x[:1], x[:1]]))
    thrice.add(x, torch.tensor([3.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(once.matrix(), thrice.matrix())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_is_named(bad: float) -> None:
    x = torch.randn(10, 200)
    x[4, 150] = bad
    hessian = Hessian(200, "cpu", "model.layers.3.mlp.down_proj")
    hessian.add(x)
    with pytest.raises(NonFiniteError, match=r"layers\.3\.mlp\.down_proj.*150"):
        hessian.matrix()


def test_the_setting_borrowed_for_bf16_is_given_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    Hessian(8, "cpu").add(torch.randn(4, 8).bfloat16())
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_matches_float64(dtype: torch.dtype) -> None:
    x, weights = torch.randn(700, 600).to(dtype), torch.rand(700)
    hessian = Hessian(600, "cuda")
    hessian.add(x.cuda(), weights.cuda())
    torch.testing.assert_close(hessian.matrix().cpu().double(), exact(x, weights), rtol=1e-5, atol=1e-5)
