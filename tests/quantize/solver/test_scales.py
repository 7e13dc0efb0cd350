from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.solver.scale_search import SMALLEST_SCALE, group_scales
from quantize.solver.solved_linear import dequantize_codes

LAYOUTS = [(bits, sym) for bits in (4, 8) for sym in (True, False)]


def rounded(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int) -> Tensor:
    """weight [N, K] at the nearest points of its grids, in float64."""
    groups = torch.arange(weight.shape[1]) // group_size
    scale, zero = scales.double()[groups].T, zeros.double()[groups].T
    return ((weight.double() / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


def cost(weight: Tensor, importance: Tensor, grids: tuple[Tensor, Tensor], bits: int, group_size: int) -> Tensor:
    """Weighted squared error [N, G]."""
    error = (weight.double() - rounded(weight, *grids, bits, group_size)).square() * importance.double()
    groups = torch.arange(weight.shape[1]) // group_size
    return torch.zeros(len(weight), len(grids[0]), dtype=torch.float64).index_add_(1, groups, error)


@pytest.mark.parametrize(("bits", "sym"), LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    magnitude=st.integers(-45, 38),
    columns=st.integers(1, 40),
    spread=st.integers(0, 15),
)
def test_every_grid_can_be_stored_and_read(
    bits: int, sym: bool, seed: int, magnitude: int, columns: int, spread: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, columns, generator=generator) * 10.0**magnitude
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2] = weight[2, 0]
    importance = torch.exp(torch.randn(columns, generator=generator) * spread)
    importance[torch.rand(columns, generator=generator) < 0.3] = 0
    for chosen in (None, importance):
        scales, zeros = group_scales(weight.clamp(-3e38, 3e38), chosen, bits, 16, sym)
        assert scales.dtype == torch.float16
        assert scales.isfinite().all()
        assert (scales.abs() >= SMALLEST_SCALE).all()
        assert sym or (scales > 0).all()
        assert (zeros >= 1).all()
        assert int(zeros.max()) < 2**bits


@pytest.mark.parametrize(("bits", "sym"), LAYOUTS)
def test_search_is_near_the_best_of_all_scales(bits: int, sym: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, 64, generator=generator) * 0.02
    importance = torch.exp(2 * torch.randn(64, generator=generator))
    found = group_scales(weight, importance, bits, 64, sym)
    plain = group_scales(weight, None, bits, 64, sym)
    least = torch.full((40, 1), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.3, 1.4, 600):
        for sign in (1, -1) if sym else (1,):
            grids = (plain[0].double() * share * sign, plain[1])
            least = torch.minimum(least, cost(weight, importance, grids, bits, 64))
    costs = cost(weight, importance, found, bits, 64)
    assert costs.sum() < 1.05 * least.sum()
    assert costs.sum() < 0.97 * cost(weight, importance, plain, bits, 64).sum()
    assert (costs <= cost(weight, importance, plain, bits, 64) * 1.01).all()


def test_the_long_side_of_the_grid_goes_where_the_extreme_is() -> None:
    weight = torch.tensor([[0.8, *[0.1, -0.1] * 7, 0.1], [-0.8, *[0.1, -0.1] * 7, 0.1]])
    scales, zeros = group_scales(weight, torch.ones(16), 4, 16, sym=True)
    assert scales[0, 0] < 0 < scales[0, 1]
    torch.testing.assert_close(rounded(weight, scales, zeros, 4, 16).float(), weight, rtol=1e-3, atol=1e-4)


def test_weights_on_a_grid_are_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (32, 64), generator=generator)
    codes[:, 0] = -8
    weight = codes * 0.03125
    scales, zeros = group_scales(weight, torch.rand(64, generator=generator), 4, 32, sym=True)
    assert torch.equal(rounded(weight, scales, zeros, 4, 32).float(), weight)


def test_an_important_column_is_served_first() -> None:
    weight = torch.full((1, 16), 0.01)
    weight[0, 3], weight[0, 5] = 1.0, 0.0437
    importance = torch.full((16,), 1e-6)
    importance[5] = 1.0
    grids = group_scales(weight, importance, 4, 16, sym=True)
    assert (rounded(weight, *grids, 4, 16)[0, 5] - 0.0437).abs() < 1e-4


@pytest.mark.parametrize("sym", [True, False])
def test_rows_and_groups_do_not_see_one_another(sym: bool) -> None:
    weight, importance = torch.randn(3000, 50), torch.rand(50)  # several chunks, and a short last group
    scales, zeros = group_scales(weight, importance, 4, 16, sym)
    row = group_scales(weight[2500:2501], importance, 4, 16, sym)
    last = group_scales(weight[:, 48:], importance[48:], 4, -1, sym)
    torch.testing.assert_close(scales[:, 2500:2501], row[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(scales[3:], last[0], rtol=1e-3, atol=0)
    assert torch.equal(zeros[3:], last[1])


def test_dequantize_takes_each_columns_own_group() -> None:
    generator = torch.Generator().manual_seed(1)
    g_idx = torch.randint(0, 5, (300,), generator=generator, dtype=torch.int32)
    codes = torch.randint(0, 16, (300, 7), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 16, (5, 7), generator=generator, dtype=torch.uint8)
    scales = torch.randn(5, 7, generator=generator).half()
    weight = dequantize_codes(codes, zeros, scales, g_idx)
    for column in (0, 255, 256, 299):
        group = int(g_idx[column])
        expected = (codes[column].float() - zeros[group].float()) * scales[group].float()
        assert torch.equal(weight[:, column], expected)
