"""Calibrated NF4: read back as bitsandbytes reads it, and better than bitsandbytes' own rounding."""

from __future__ import annotations

import pytest
import torch

from quantize.solver.data_free import quantize_nf4
from quantize.solver.factor import factorise
from quantize.solver.gptq import solve
from quantize.solver.nf4_grid import choose_absmax, nf4_levels, pack_nf4, search_absmax
from quantize.solver.output_factor import OutputFactor
from quantize.solver.settings import GPTQSettings
from runtime.kernels.reference import dequantize_nf4

bnb = pytest.importorskip("bitsandbytes.functional")
SETTINGS = GPTQSettings(nf4=True, group_size=-1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(rows: int = 40, columns: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = normal(900, columns, seed=1) @ normal(columns, columns, seed=2)
    return normal(rows, columns) * 0.02, inputs.T @ inputs / 900


@pytest.mark.parametrize("outputs", [None, OutputFactor.from_low_rank(normal(40, 2, seed=3), torch.ones(40) * 3)])
def test_the_packed_tensors_are_what_was_solved(outputs):
    weight, hessian = problem()
    solved = solve(weight, factorise(hessian, SETTINGS), SETTINGS, outputs=outputs)
    packed = pack_nf4(solved.codes, solved.quant_state, torch.bfloat16)
    torch.testing.assert_close(dequantize_nf4(packed, (40, 192)), solved.weight, rtol=1e-6, atol=0)
    stored = {name.removeprefix("weight."): each for name, each in packed.items() if name != "weight"}
    state = bnb.QuantState.from_dict(stored, device=torch.device("cpu"))
    theirs = bnb.dequantize_4bit(packed["weight"], state).float()
    torch.testing.assert_close(theirs, solved.weight, rtol=2**-8, atol=0)
    assert packed.keys() == quantize_nf4(weight.bfloat16()).keys()


def test_it_loses_less_than_plain_nf4():
    weight, hessian = problem()
    solved = solve(weight, factorise(hessian, SETTINGS), SETTINGS)
    plain = dequantize_nf4(quantize_nf4(weight), (40, 192)) - weight
    assert solved.loss < float((plain @ hessian * plain).sum()) / 2


def test_the_searched_absmax_is_the_best_of_a_fine_grid():
    weight, importance, levels = normal(6, 128), normal(128, seed=5).square(), nf4_levels("cpu")

    def error(absmax: torch.Tensor) -> torch.Tensor:
        scaled = weight.view(6, 2, 64) / absmax[..., None]
        rounded = levels[(scaled[..., None] - levels).abs().argmin(-1)] * absmax[..., None]
        return ((rounded - weight.view(6, 2, 64)).square() * importance.view(2, 64)).sum(-1)

    largest = weight.view(6, 2, 64).abs().amax(-1)
    fine = torch.stack([error(largest * shrink) for shrink in torch.linspace(0.5, 1.1, 400)]).amin(0)
    assert (error(search_absmax(weight, importance, levels)) < 1.1 * fine).all()
    assert (error(search_absmax(weight, importance, levels)) < error(largest)).all()


def test_a_block_of_zeros_stays_zero():
    weight, hessian = problem()
    weight[3, 64:128] = 0
    solved = solve(weight, factorise(hessian, SETTINGS), SETTINGS)
    assert torch.isfinite(solved.weight).all()
    absmax, _ = choose_absmax(torch.zeros(8, 64), None)
    assert torch.isfinite(absmax).all()
