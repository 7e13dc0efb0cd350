"""Mixed precision: spend a budget of bits on the groups of linears that move the scores most.

A group of linears that share an input (q, k, v; o; gate, up; down) is stored with one of a few options: 4 bits, 4 bits
in smaller groups, or 8 bits. Choosing them under a budget is a knapsack. Each step to a finer option is taken in the
order of error saved per byte, which is optimal up to the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quantize.gradients.statistics import GradientStatistics
from runtime.checkpoints.model_config import ModelConfig
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, Override, QuantizationConfig

ReadStatistics = Callable[[int], GradientStatistics]
"""Reads the gradient statistics of a block."""

FINER_GROUP_SIZE = 32  # the smallest that vLLM's Marlin kernel has


def storage_options(base: QuantizationConfig) -> list[QuantizationConfig]:
    """The ways to store a linear of a mix: `base` first, then finer ones."""
    divides = base.group_size > FINER_GROUP_SIZE and base.group_size % FINER_GROUP_SIZE == 0
    narrow = [replace(base, group_size=FINER_GROUP_SIZE)] if divides else []
    return [base, *narrow, replace(base, bits=8)]


def mixed_quantization(
    base: QuantizationConfig, bits: float, model_config: ModelConfig, statistics: ReadStatistics
) -> QuantizationConfig:
    """Return `base` with overrides that add `bits - base.bits` stored bits per weight, scales and zeros included.

    Args:
        statistics: reads those of a block; its `errors` belong to `storage_options(base)`.
    """
    options, blocks = storage_options(base), range(model_config.num_hidden_layers)
    costs = [_stored_bytes(names, options, model_config) for names in BLOCK_LINEAR_GROUPS]
    units = [(index, group) for index in blocks for group in range(len(BLOCK_LINEAR_GROUPS))]
    errors = [row for index in blocks for row in statistics(index).errors.tolist()]
    weights = base.block_bytes(model_config, 0) * 8 / base.bits_per_weight(model_config)
    budget = (bits - base.bits) / 8 * weights * len(blocks)
    chosen = allocate(errors, [costs[group] for _, group in units], budget)
    blocks_of: dict[tuple[int, int], list[int]] = {}  # by group and option
    for (index, group), number in zip(units, chosen, strict=True):
        blocks_of.setdefault((group, number), []).append(index)
    overrides = (
        Override.of_linears(where, BLOCK_LINEAR_GROUPS[group], options[number])
        for (group, number), where in sorted(blocks_of.items())
        if number
    )
    return replace(base, overrides=tuple(overrides))


def describe_mix(quantization: QuantizationConfig, model_config: ModelConfig) -> str:
    """One line on the weights of each option, such as `8 bits in groups of 128: 9 %`."""
    sizes: dict[str, int] = {}
    for index in range(model_config.num_hidden_layers):
        for name, each in quantization.of_block(index).items():
            groups = f" in groups of {each.group_size}" if each.group_size > 0 else ""
            label = f"{each.bits} bits{groups}"
            sizes[label] = sizes.get(label, 0) + math.prod(model_config.linear_shape(name))
    shares = (f"{label}: {100 * size / sum(sizes.values()):.1f} %" for label, size in sorted(sizes.items()))
    return f"weights with {', '.join(shares)}"


def allocate(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: float) -> list[int]:
    """Choose an option for each unit so that the extra cost over option 0 is at most `budget`.

    Args:
        errors, costs: by unit and option.
    """
    chosen = [0] * len(errors)
    steps = [step for unit in range(len(errors)) for step in _steps(unit, errors[unit], costs[unit])]
    for step in sorted(steps, key=lambda step: -step.gain):  # stable: equal gains in the order of the units
        if step.cost <= budget and step.previous == chosen[step.unit]:
            chosen[step.unit] = step.option
            budget -= step.cost
    return chosen


@dataclass(frozen=True)
class _Step:
    """From one option of a unit to a finer one: error saved per byte, and bytes."""

    unit: int
    previous: int
    option: int
    gain: float
    cost: int


def _steps(unit: int, errors: Sequence[float], costs: Sequence[int]) -> list[_Step]:
    """The steps along the convex hull of (cost, error), whose gains decrease."""
    hull: list[_Step] = []
    for option in sorted(range(1, len(errors)), key=lambda each: costs[each]):
        while True:
            previous = hull[-1].option if hull else 0
            cost = costs[option] - costs[previous]
            if cost <= 0:
                break
            step = _Step(unit, previous, option, (errors[previous] - errors[option]) / cost, cost)
            if hull and hull[-1].gain <= step.gain:
                hull.pop()
                continue
            if step.gain > 0:
                hull.append(step)
            break
    return hull


def _stored_bytes(names: Sequence[str], options: Sequence[QuantizationConfig], model_config: ModelConfig) -> list[int]:
    return [sum(option.linear_bytes(*model_config.linear_shape(name)) for name in names) for option in options]
