"""The correction towards the reference stream, against least squares written out in float64."""

from __future__ import annotations

import pytest
import torch

from quantize.solver.correction import TargetCorrection
from quantize.solver.hessian import Hessian
from runtime.modeling.linear import DenseLinear

TOKENS, INPUTS, OUTPUTS = 200, 48, 24


def drawn(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs, the reference's inputs near them, and weights of tokens."""
    draw = torch.Generator().manual_seed(0)
    wanted = torch.randn(TOKENS, INPUTS, generator=draw) * torch.linspace(0.2, 3, INPUTS)
    x = wanted + 0.1 * torch.randn(TOKENS, INPUTS, generator=draw)
    weights = torch.ones(TOKENS)
    weights[::50] = 9.0
    return {"x": x.to(dtype), "wanted": wanted.to(dtype), "weights": weights}


def corrected(data: dict[str, torch.Tensor], linears: list[DenseLinear]) -> list[torch.Tensor]:
    hessian = Hessian(INPUTS, "cpu")
    correction = TargetCorrection(linears, "cpu")
    for rows in torch.arange(TOKENS).split(64):
        part = {name: tensor[rows] for name, tensor in data.items()}
        hessian.add(part["x"], part["weights"])
        correction.add(part["x"], part["wanted"], part["weights"])
    matrix = hessian.matrix()
    before = matrix.clone()
    targets = correction.targets(matrix, hessian.weight)
    assert torch.equal(matrix, before)
    return targets


def by_least_squares(data: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Halfway to the W* of least weighted |W* x - W x~|^2 + damp |W* - W|^2, with damp the mean of H's diagonal."""
    x, wanted, weights = (data[name].double() for name in ("x", "wanted", "weights"))
    weight = weight.double()
    target = wanted @ weight.T
    moment = x.T @ (weights[:, None] * x) / weights.sum()
    damp = moment.diagonal().mean()
    right = x.T @ (weights[:, None] * target) / weights.sum() + damp * weight.T
    return (torch.linalg.solve(moment + damp * torch.eye(INPUTS), right).T + weight) / 2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_the_target_is_the_least_squares_one(count, dtype, tolerance):
    data = drawn(dtype)
    weights = [torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]
    for weight, target in zip(weights, corrected(data, [DenseLinear(w) for w in weights]), strict=True):
        expected = by_least_squares(data, weight)
        moved = (expected - weight.double()).norm()
        assert (target - expected).norm() < tolerance * expected.norm() + 0.02 * tolerance * moved
        assert moved > 1e-3 * expected.norm()


def test_streams_that_agree_need_no_correction():
    data = drawn(torch.float32)
    data["wanted"] = data["x"]
    weight = torch.randn(OUTPUTS, INPUTS)
    (target,) = corrected(data, [DenseLinear(weight.clone())])
    assert torch.equal(target, weight)


def test_the_original_weight_is_left_as_it_was():
    data, weight = drawn(torch.float32), torch.randn(OUTPUTS, INPUTS)
    before = weight.clone()
    corrected(data, [DenseLinear(weight)])
    assert torch.equal(weight, before)
