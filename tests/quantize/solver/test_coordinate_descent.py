"""Refinement against plain coordinate descent in float64, and against what it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantize.solver.coordinate_descent import coordinate_descent
from quantize.solver.factor import CholeskyFactor, factorise
from quantize.solver.gptq import solve
from quantize.solver.scale_search import LARGEST_SCALE, SMALLEST_SCALE
from quantize.solver.settings import GPTQSettings
from quantize.solver.solved_linear import SolvedLinear
from tests.quantize.solver.test_gptq import ORDERS, assert_losses_are_true, layer


def refined(
    weight: Tensor, hessian: Tensor, settings: GPTQSettings
) -> tuple[SolvedLinear, SolvedLinear, CholeskyFactor]:
    """Before, after, and the factor that was used up."""
    factor = factorise(hessian, settings)
    solved = solve(weight, factor, settings)
    return solved, coordinate_descent(weight, solved, factor.into_hessian(), factor, settings), factor


def plain_descent(
    weight: Tensor, hessian: Tensor, solved: SolvedLinear, factor: CholeskyFactor, settings: GPTQSettings
) -> Tensor:
    """The same visits in float64, each from the whole Hessian: the damped loss [N] that the rows end with."""
    order = factor.columns
    h = hessian.double() + settings.damp_percent * hessian.diagonal().double().diag()
    wanted, codes, zeros = weight.double(), solved.codes.T.double(), solved.zeros.double()
    scales, group_of = solved.scales.double(), solved.g_idx.long()
    for _ in range(settings.descent_passes):
        for group in range(len(scales)):
            members = [column for column in order.tolist() if group_of[column] == group]
            steps = torch.zeros_like(wanted)
            steps[:, members] = codes[:, members] - zeros[group][:, None]
            error = wanted - (codes - zeros[group_of].T) * scales[group_of].T
            along, power = ((steps @ h) * error).sum(1), ((steps @ h) * steps).sum(1)
            scales[group] = (scales[group] + along / power).half().double()
            for column in members:
                error = wanted - (codes - zeros[group_of].T) * scales[group_of].T
                asked = codes[:, column] + (error @ h[column]) / h[column, column] / scales[group]
                codes[:, column] = asked.round().clamp(0, 2**settings.bits - 1)
    error = wanted - (codes - zeros[group_of].T) * scales[group_of].T
    return ((error @ h) * error).sum(1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(4, 16, True), (4, 25, False), (8, -1, True)])
def test_it_is_coordinate_descent(order: str, bits: int, group_size: int, sym: bool) -> None:
    settings = GPTQSettings(bits=bits, group_size=group_size, sym=sym, descent_passes=2, **ORDERS[order])
    weight, hessian = layer(seed=bits + group_size)
    solved, after, factor = refined(weight, hessian, settings)
    plain = plain_descent(weight, hessian, solved, factor, settings)
    error = (weight - after.weight).double()
    damped = hessian.double() + settings.damp_percent * hessian.diagonal().double().diag()
    ours = ((error @ damped) * error).sum(1)
    assert (ours / plain - 1).abs().median() < 1e-4  # a tie broken otherwise sends a row another way
    assert ours.sum() == pytest.approx(plain.sum().item(), rel=0.02)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False])
def test_the_error_falls_with_every_pass_and_is_told_truly(order: str, sym: bool) -> None:
    settings = GPTQSettings(group_size=16, sym=sym, **ORDERS[order])
    weight, hessian = layer(seed=3, columns=96, rows=40)
    losses = []
    for passes in (0, 1, 2, 6):
        solved, after, _ = refined(weight, hessian, replace(settings, descent_passes=passes))
        assert_losses_are_true(weight, hessian, after)
        losses.append(after.loss)
        if passes == 0:
            assert after.loss == pytest.approx(solved.loss) and torch.equal(after.weight, solved.weight)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]


def test_no_single_code_could_be_better() -> None:
    settings = GPTQSettings(group_size=16, descent_passes=60)
    weight, hessian = layer(seed=4, columns=48, rows=6)
    _, after, factor = refined(weight, hessian, settings)
    damped = hessian.double() + settings.damp_percent * hessian.diagonal().double().diag()

    def loss(codes: Tensor) -> Tensor:
        error = weight.double() - replace(after, codes=codes).weight.double()
        return ((error @ damped) * error).sum(1)

    least = loss(after.codes)
    for column in range(48):
        for step in (-1, 1):
            codes = after.codes.int()
            codes[column] += step
            assert (loss(codes.clamp(0, 15).to(torch.uint8)) >= least * (1 - 1e-6)).all(), column


@pytest.mark.parametrize("group_size", [-1, 32])
def test_wide_groups_are_visited_in_parts_and_keep_their_scale(
    group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of their part of the Hessian is all that a visit takes beside it."""
    monkeypatch.setattr("quantize.solver.coordinate_descent.MAX_COLUMNS_AT_ONCE", 24)
    weight, hessian = layer(seed=7)
    solved, after, _ = refined(weight, hessian, GPTQSettings(group_size=group_size))
    assert_losses_are_true(weight, hessian, after)
    assert after.loss < solved.loss and torch.equal(after.scales[:1], solved.scales[:1])


def test_dead_inputs_stay_out_of_it() -> None:
    settings = GPTQSettings(group_size=16)
    weight, hessian = layer(seed=5, tokens=20)
    dead = [3, 4, 74]
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    _, after, _ = refined(weight, hessian, settings)
    assert not after.weight[:, dead].any()
    assert_losses_are_true(weight.index_fill(1, torch.tensor(dead), 0), hessian, after)


def test_a_scale_stays_one_that_readers_take() -> None:
    """Weights of 0 give steps of 0 and nothing to fit; tiny ones give scales at fp16's end."""
    weight, hessian = layer(seed=6, columns=64, rows=9)
    weight[0], weight[1], weight[2] = 0, weight[1] * 1e-9, weight[2] * 1e6
    _, after, _ = refined(weight, hessian, GPTQSettings(group_size=16))
    assert after.scales.dtype == torch.float16 and after.scales.isfinite().all()
    assert (after.scales.float().abs() >= SMALLEST_SCALE).all() and (after.scales.float().abs() <= LARGEST_SCALE).all()
