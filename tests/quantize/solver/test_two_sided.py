"""The two-sided solver against plain loops, against the one-sided solver, and on what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.solver.factor import factorise
from quantize.solver.gptq import solve
from quantize.solver.output_factor import OutputFactor
from quantize.solver.output_moment import RANK, OutputMoment
from quantize.solver.rounding import Grid
from quantize.solver.settings import GPTQSettings
from quantize.solver.two_sided import solve_two_sided


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_loops(weight: Tensor, upper: Tensor, lower: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, E and R of the module's docstring, one element after the other."""
    weight, upper, lower = weight.double(), upper.double(), lower.double()
    codes, error, residual = (torch.zeros_like(weight) for _ in range(3))
    for j in range(len(weight) - 1, -1, -1):
        scale, zero = (each[grid.group_index[j]].double() for each in (grid.scales, grid.zeros))
        for i in range(weight.shape[1]):
            other_columns = upper[j, j + 1 :] @ error[j + 1 :, i]
            target = weight[j, i] + other_columns + lower[i, :i] @ residual[j, :i]
            if grid.levels is None:
                codes[j, i] = (target / scale[i] + zero[i]).round().clamp(0, grid.max_code)
                value = (codes[j, i] - zero[i]) * scale[i]
            else:
                codes[j, i] = (target / scale[i] - grid.levels.double()).abs().argmin()
                value = grid.levels[int(codes[j, i])].double() * scale[i]
            error[j, i] = weight[j, i] - value
            residual[j, i] = error[j, i] + other_columns
    return codes, error, residual


@pytest.mark.parametrize("shape", [(96, 64), (32, 32), (70, 45), (33, 128), (5, 3)])
@pytest.mark.parametrize("levels", [None, torch.tensor([-1.0, -0.4, -0.1, 0.0, 0.2, 0.5, 1.0])])
def test_equals_plain_loops(shape, levels):
    columns, rows = shape
    upper = normal(columns, columns, seed=1) / columns**0.5 + torch.ones(columns, columns).tril()  # below: ignored
    lower = (normal(rows, rows, seed=2) / rows**0.5).tril(-1)
    groups = -(-columns // 16)
    scales = normal(groups, rows, seed=3).abs() + 0.1
    zeros = torch.full((groups, rows), 8.0) if levels is None else torch.zeros(groups, rows)
    grid = Grid(scales, zeros, torch.arange(columns).flip(0) // 16, 15, levels)
    weight = normal(columns, rows)
    expected = plain_loops(weight, upper, lower, grid)
    codes, error, residual = solve_two_sided(weight, upper, lower, grid)
    assert codes.dtype == torch.uint8 and torch.equal(codes.double(), expected[0])
    torch.testing.assert_close(error.double(), expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(residual.double(), expected[2], rtol=0, atol=1e-5)


def problem(columns: int = 96, rows: int = 64) -> tuple[Tensor, Tensor, GPTQSettings]:
    """Weight [N, K], Hessian and settings."""
    inputs = normal(400, columns, seed=4) @ normal(columns, columns, seed=5)
    return normal(rows, columns), inputs.T @ inputs / 400, GPTQSettings(group_size=32)


def test_with_equal_outputs_it_is_gptq():
    weight, hessian, settings = problem()
    equal = OutputFactor(torch.zeros(64, 64))
    one = solve(weight, factorise(hessian, settings), settings)
    both = solve(weight, factorise(hessian, settings), settings, outputs=equal)
    assert (one.codes != both.codes).float().mean() < 0.005  # sums in another order, so a tie may fall either way
    assert both.loss == pytest.approx(one.loss, rel=0.02)


def test_the_loss_is_that_of_the_weights():
    weight, hessian, settings = problem()
    outputs = OutputFactor.from_low_rank(normal(64, 3, seed=6), torch.ones(64) * 4)
    solved = solve(weight, factorise(hessian, settings), settings, outputs=outputs)
    error = (solved.weight - weight).double()
    assert solved.loss == pytest.approx(float((error @ hessian.double() * error).sum()), rel=1e-3)


def test_the_error_is_moved_away_from_the_directions_that_count():
    weight, hessian, settings = problem()
    direction = normal(64, 1, seed=7)
    outputs = OutputFactor.from_low_rank(direction, direction.square().flatten())
    one = solve(weight, factorise(hessian, settings), settings)
    both = solve(weight, factorise(hessian, settings), settings, outputs=outputs)

    def along(solved) -> float:
        error = direction.T @ (solved.weight - weight)
        return float((error @ hessian * error).sum())

    assert along(both) < along(one) / 10
    assert one.loss < both.loss < 1.5 * one.loss


def test_the_factor_rebuilds_the_moment():
    vectors, extra = normal(20, 4, seed=8), normal(20, seed=9).abs()
    diagonal = vectors.square().sum(1) + extra
    lower = OutputFactor.from_low_rank(vectors, diagonal, share=0.25).lower
    matrix = vectors @ vectors.T + extra.diag()
    wanted = 0.75 * matrix / diagonal.mean() + 0.25 * torch.eye(20)
    unit = lower + torch.eye(20)
    pivots = torch.linalg.inv(unit.T) @ wanted @ torch.linalg.inv(unit)  # diagonal if L^T diag(d) L is the moment
    assert torch.equal(lower, lower.tril(-1))
    torch.testing.assert_close(pivots, pivots.diagonal().diag(), rtol=0, atol=1e-5)


def test_a_moment_of_low_rank_is_exact_and_a_larger_one_keeps_its_diagonal():
    few, many = normal(500, 9, seed=10) @ normal(9, 300, seed=11), normal(500, 300, seed=12)
    for gradients, exact in ((few, True), (many, False)):
        moment = OutputMoment(300, "cpu")
        squares = torch.cat([moment.add(part) for part in gradients.split(170)])
        torch.testing.assert_close(squares, gradients.square().sum(1))
        vectors, diagonal = moment.low_rank()
        wanted = gradients.T @ gradients
        torch.testing.assert_close(diagonal, wanted.diagonal())
        assert vectors.shape[1] <= RANK + 8
        distance = (vectors @ vectors.T - wanted).norm() / wanted.norm()
        assert distance < 1e-3 if exact else distance < 0.6


def test_no_gradient_at_all_weights_outputs_equally():
    moment = OutputMoment(300, "cpu")
    moment.add(torch.zeros(10, 300))
    vectors, diagonal = moment.low_rank()
    assert torch.equal(OutputFactor.from_low_rank(vectors, diagonal).lower, torch.zeros(300, 300))
