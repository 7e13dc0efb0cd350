from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.solver.factor import factorise
from quantize.solver.settings import GPTQSettings

SIZE = 600  # several blocks of the factorisation, the last one short


@pytest.fixture(scope="module")
def hessian() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, SIZE, generator=generator) * torch.logspace(-2, 1, SIZE)
    x += torch.randn(900, 5, generator=generator) @ torch.randn(5, SIZE, generator=generator)
    return x.T @ x / 900


@pytest.mark.parametrize("activation_order", [True, False])
def test_factor_times_itself_is_the_damped_hessian(hessian: Tensor, activation_order: bool) -> None:
    before = hessian.clone()
    factor = factorise(hessian, GPTQSettings(activation_order=activation_order))
    assert torch.equal(hessian, before)
    upper = factor.upper.double().triu(1) + torch.eye(SIZE)
    damped = hessian.double() + 0.05 * hessian.diagonal().double().diag()
    product = upper.T @ (factor.pivots.double()[:, None] * upper)
    torch.testing.assert_close(product, damped[factor.columns][:, factor.columns], rtol=1e-4, atol=1e-4)


def test_first_to_be_quantized_comes_last(hessian: Tensor) -> None:
    active = factorise(hessian, GPTQSettings()).columns.flip(0)
    assert (hessian.diagonal()[active].diff() <= 0).all()
    stored = factorise(hessian, GPTQSettings(activation_order=False)).columns.flip(0)
    assert torch.equal(stored, torch.arange(SIZE))


def test_energy_is_the_mean_squared_output(hessian: Tensor) -> None:
    columns = torch.randn(SIZE, 7, generator=torch.Generator().manual_seed(1))
    factor = factorise(hessian, GPTQSettings())
    expected = torch.einsum("kn,kl,ln->", columns.double(), hessian.double(), columns.double())
    assert factor.output_power(columns[factor.columns]) == pytest.approx(expected.item(), rel=1e-5)


def test_importance_is_what_the_remaining_columns_cannot_explain(hessian: Tensor) -> None:
    factor = factorise(hessian, GPTQSettings())
    damped = hessian.double() + 0.05 * hessian.diagonal().double().diag()
    first, last = factor.columns[-1], factor.columns[0]
    assert factor.importance[last] == pytest.approx(damped[last, last].item(), rel=1e-5)
    assert factor.importance[first] == pytest.approx(1 / torch.linalg.inv(damped)[first, first].item(), rel=1e-4)


def test_damping_follows_the_scale_of_each_input(hessian: Tensor) -> None:
    """An input with massive activations does not drown the statistics of the others."""
    scale = torch.ones(SIZE)
    scale[7] = 2.0**10
    in_order = GPTQSettings(activation_order=False)
    factor, scaled = (factorise(each, in_order) for each in (hessian, hessian * scale * scale[:, None]))
    torch.testing.assert_close(scaled.importance, factor.importance * scale.square(), rtol=1e-3, atol=0)


def test_dead_inputs_need_no_damping(hessian: Tensor) -> None:
    dead = hessian.clone()
    dead[[5, 300]] = 0
    dead[:, [5, 300]] = 0
    factor = factorise(dead, GPTQSettings(damp_percent=0.0))
    assert factor.dead.tolist() == [5, 300]
    assert factor.notes == ()
    assert factor.pivots.isfinite().all()
