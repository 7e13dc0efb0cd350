"""The knapsack against all choices, and the rules that come of it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from quantize.gradients.bit_allocation import allocate, describe_mix, mixed_quantization, storage_options
from quantize.gradients.statistics import GradientStatistics
from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import QuantizationConfig
from runtime.checkpoints.quantization_parsing import read_quantization_config
from tests.helpers.tiny import tiny_config

GPTQ = QuantizationConfig("gptq", 4, group_size=128)
CONFIG = ModelConfig.from_config(
    tiny_config(layers=4, hidden=128, intermediate=256, heads=4, kv_heads=2, vocab=320, dtype=torch.bfloat16)
)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_of_the_same_cost_errs_less(seed):
    draw = random.Random(seed)
    errors = [sorted((draw.random() ** 4 for _ in range(3)), reverse=True) for _ in range(6)]
    costs = [[0, size, 4 * size] for size in (draw.randint(1, 9) for _ in range(6))]
    for budget in range(0, sum(cost[2] for cost in costs) + 1, 3):
        chosen = allocate(errors, costs, budget)
        spent = sum(cost[option] for cost, option in zip(costs, chosen, strict=True))
        left = sum(error[option] for error, option in zip(errors, chosen, strict=True))
        assert spent <= budget
        everything = itertools.product(range(3), repeat=6)
        affordable = (
            sum(error[option] for error, option in zip(errors, options, strict=True))
            for options in everything
            if sum(cost[option] for cost, option in zip(costs, options, strict=True)) <= budget
        )
        # The greedy choice is optimal up to one step of one unit.
        largest = max(error[0] for error in errors)
        assert left <= min(affordable) + largest
    assert allocate(errors, costs, 10**6) == [2] * 6 and allocate(errors, costs, 0) == [0] * 6


def test_breakpoints_of_the_hull_are_optimal():
    errors, costs = [[9.0, 4.0, 0.0], [5.0, 4.5, 0.0], [1.0, 0.2, 0.1]], [[0, 1, 4], [0, 1, 4], [0, 1, 4]]
    assert allocate(errors, costs, 1) == [1, 0, 0]
    assert allocate(errors, costs, 4) == [2, 0, 0]
    assert allocate(errors, costs, 8) == [2, 2, 0]  # unit 1 skips the option above its hull
    assert allocate(errors, costs, 9) == [2, 2, 1]


def test_an_option_that_saves_nothing_is_not_taken():
    assert allocate([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[0, 1, 4]] * 2, 100) == [0, 0]


def statistics(errors: torch.Tensor):
    def read(index: int) -> GradientStatistics:
        made = GradientStatistics.__new__(GradientStatistics)
        made.tensors = {"errors": errors[index]}
        return made

    return read


@pytest.mark.parametrize("bits", [4.01, 4.25, 4.5, 5, 6.5, 7.9])
def test_the_stored_size_stays_within_the_budget(bits):
    errors = torch.rand(4, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).pow(3)
    errors = errors * torch.tensor([1.0, 0.6, 0.004])
    mix = mixed_quantization(GPTQ, bits, CONFIG, statistics(errors))
    assert bits - 0.3 < mix.nominal_bits(CONFIG) <= bits + 0.005
    assert read_quantization_config(mix.to_config()) == mix
    assert all(mix.of_block(3)[name] == mix.of_block(3)["self_attn.q_proj"] for name in ("self_attn.k_proj",))


def test_bits_go_where_the_errors_are():
    errors = torch.full((4, 4, 3), 1e-6, dtype=torch.float64) * torch.tensor([1.0, 0.6, 0.004])
    errors[2, 3] = torch.tensor([5.0, 3.0, 0.02])
    mix = mixed_quantization(GPTQ, 4.75, CONFIG, statistics(errors))
    eight = {(index, name) for index in range(4) for name, each in mix.of_block(index).items() if each.bits == 8}
    assert eight == {(2, "mlp.down_proj")}
    assert "8 bits in groups of 128: 5.6 %" in describe_mix(mix, CONFIG)


def test_options_of_other_group_sizes():
    assert [each.group_size for each in storage_options(replace(GPTQ, group_size=32))] == [32, 32]
    assert [each.group_size for each in storage_options(replace(GPTQ, group_size=-1))] == [-1, -1]
    assert [(each.bits, each.group_size) for each in storage_options(GPTQ)] == [(4, 128), (4, 32), (8, 128)]
