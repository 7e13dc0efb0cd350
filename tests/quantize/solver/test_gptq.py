"""The solver against column-by-column OBS with explicit inverse updates, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from quantize.solver.factor import factorise
from quantize.solver.gptq import solve
from quantize.solver.scale_search import group_scales
from quantize.solver.settings import GPTQSettings, usable_group_size
from quantize.solver.solved_linear import SolvedLinear, dequantize_codes
from runtime.common.errors import ConfigurationError, JobError, NonFiniteError
from runtime.kernels.reference import dequantize_gptq, pack_gptq

COLUMNS, ROWS = 75, 12


def layer(seed: int, columns: int = COLUMNS, rows: int = ROWS, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and the Hessian of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, ::17] *= 8
    return torch.randn(rows, columns, generator=generator) * 0.03, x.T @ x / tokens


def replay(weight: Tensor, hessian: Tensor, solved: SolvedLinear, settings: GPTQSettings) -> tuple[float, int]:
    """Redo GPTQ as published (Frantar et al., eq. 2 and 3), one column and one inverse update at a time.

    The solver's codes are taken over, so that a tie broken differently cannot spread.

    Returns:
        (the furthest any code is from what this column's updated weight asks for, in steps; groups entered)
    """
    dead = hessian.diagonal() == 0
    damped = hessian.double() + settings.damp_percent * hessian.diagonal().double().diag()
    damped[dead, dead] = 1
    inverse = torch.linalg.inv(damped)
    updated = weight.double().clone()
    updated[:, dead] = 0
    order = range(len(hessian))
    if settings.activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    worst, entered = 0.0, []
    for column in order:
        group = int(solved.g_idx[column])
        if group not in entered:
            entered.append(group)
        scale, zero = solved.scales[group].double(), solved.zeros[group].double()
        code = solved.codes[column].double()
        wanted = (updated[:, column] / scale + zero).clamp(0, 2**settings.bits - 1)
        worst = max(worst, (wanted - code).abs().max().item())
        error = (updated[:, column] - scale * (code - zero)) / inverse[column, column]
        updated -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1  # done with; its row and column are zero
    return worst, len(entered)


ORDERS = {
    "natural order": {"activation_order": False},
    "activation order": {},
    "desc_act": {"desc_act": True},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("group_size", "sym"), [(16, True), (24, False), (7, True)])
def test_every_code_is_the_one_obs_asks_for(order: str, group_size: int, sym: bool) -> None:
    settings = GPTQSettings(group_size=group_size, sym=sym, importance_scales=False, **ORDERS[order])
    weight, hessian = layer(seed=group_size)
    solved = solve(weight, factorise(hessian, settings), settings)
    distance, groups = replay(weight, hessian, solved, settings)
    assert distance < 0.5 + 1e-3
    assert groups == math.ceil(COLUMNS / group_size)


@pytest.mark.parametrize(("bits", "group_size"), list(itertools.product((4, 8), (-1, 25, 16))))
def test_dead_columns_and_a_rank_deficient_hessian(bits: int, group_size: int) -> None:
    settings = GPTQSettings(bits=bits, group_size=group_size)
    weight, hessian = layer(seed=bits, tokens=20)
    dead = [3, 4, 74]
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    solved = solve(weight, factorise(hessian, settings), settings)
    assert solved.dead_columns == 3
    assert not solved.weight[:, dead].any()
    assert replay(weight, hessian, solved, settings)[0] < 0.5 + 1e-2
    assert_losses_are_true(weight.index_fill(1, torch.tensor(dead), 0), hessian, solved)


def assert_losses_are_true(weight: Tensor, hessian: Tensor, solved: SolvedLinear) -> None:
    def output_power(rows: Tensor) -> float:
        return torch.einsum("nk,kl,nl->", rows.double(), hessian.double(), rows.double()).item()

    loss, signal = output_power(weight - solved.weight), output_power(weight)
    assert solved.loss == pytest.approx(loss, rel=1e-4, abs=1e-6 * signal)
    assert solved.relative_loss == pytest.approx(loss / signal, rel=1e-4, abs=1e-6)
    assert solved.sqnr_db == pytest.approx(-10 * math.log10(solved.relative_loss))


@pytest.mark.parametrize("order", ORDERS)
def test_figures_and_stored_tensors_describe_the_same_weight(order: str) -> None:
    settings = GPTQSettings(group_size=16, **ORDERS[order])
    weight, hessian = layer(seed=1, columns=96, rows=16)
    solved = solve(weight, factorise(hessian, settings), settings)
    assert_losses_are_true(weight, hessian, solved)
    packed = pack_gptq(solved.codes, solved.zeros, solved.scales, solved.g_idx, settings.bits)
    assert torch.equal(dequantize_gptq(packed, settings.bits), solved.weight)
    assert torch.equal(solved.g_idx, torch.arange(96, dtype=torch.int32) // 16) == (not settings.desc_act)
    assert torch.equal(solved.g_idx.sort().values, torch.arange(96, dtype=torch.int32) // 16)


def test_gptq_beats_rounding_and_each_default_helps() -> None:
    weight, hessian = layer(seed=3, columns=256, rows=64, tokens=2000)

    def loss(**changes: object) -> float:
        settings = GPTQSettings(group_size=64, **changes)  # type: ignore[arg-type]
        return solve(weight, factorise(hessian, settings), settings).relative_loss

    scales, zeros = group_scales(weight, hessian.diagonal(), 4, 64, sym=True)
    g_idx = torch.arange(256, dtype=torch.int32) // 64
    steps = (weight / scales.float()[g_idx.long()].T + 8).round().clamp(0, 15).to(torch.uint8)
    error = (weight - dequantize_codes(steps.T, zeros, scales, g_idx)).double()
    rounded = torch.einsum("nk,kl,nl->", error, hessian.double(), error)
    signal = torch.einsum("nk,kl,nl->", weight.double(), hessian.double(), weight.double())
    assert loss() < 0.5 * rounded / signal
    assert loss() < loss(activation_order=False)
    assert loss(bits=8) < loss() / 100


def test_a_hessian_that_rounding_made_indefinite_is_damped_harder_and_said_so() -> None:
    weight, hessian = layer(seed=4, tokens=5)
    hessian.diagonal().mul_(1 - 2e-3)
    settings = GPTQSettings(group_size=25, damp_percent=0.001)
    solved = solve(weight, factorise(hessian, settings, "model.layers.0.mlp.down_proj"), settings)
    assert solved.damp == pytest.approx(0.01 * hessian.diagonal().mean().item(), rel=1e-5)
    assert solved.notes == ("model.layers.0.mlp.down_proj: damp_percent raised from 0.001 to 0.01",)


def test_what_is_no_hessian_is_refused_by_name() -> None:
    with pytest.raises(JobError, match="down_proj"):
        factorise(torch.eye(8) - 100 * torch.ones(8, 8), GPTQSettings(), "down_proj")


def test_all_columns_dead() -> None:
    settings = GPTQSettings(group_size=16)
    solved = solve(torch.randn(4, 32), factorise(torch.zeros(32, 32), settings), settings)
    assert solved.relative_loss == 0
    assert not solved.weight.any()


def test_nan_weight_is_refused_by_name() -> None:
    weight, hessian = layer(seed=5)
    weight[3, 7] = math.nan
    with pytest.raises(NonFiniteError, match="q_proj"):
        solve(weight, factorise(hessian, GPTQSettings()), GPTQSettings(), "q_proj")


@pytest.mark.parametrize(
    "contradiction",
    [
        {"bits": 3},
        {"group_size": 0},
        {"damp_percent": -0.1},
        {"desc_act": True, "activation_order": False},
    ],
)
def test_settings_that_contradict_one_another_are_refused(contradiction: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        GPTQSettings(**contradiction)  # type: ignore[arg-type]


def test_usable_group_size() -> None:
    assert usable_group_size(128, [8192, 29568]) == (128, None)
    size, note = usable_group_size(128, [576, 1536])
    assert size == 64
    assert note is not None
    assert "576" in note
    assert usable_group_size(-1, [100]) == (-1, None)
    assert usable_group_size(128, [100])[0] == -1
