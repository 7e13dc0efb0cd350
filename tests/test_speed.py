"""Speed figures computed from measured times."""

from __future__ import annotations

import pytest
import torch

from runtime.bench.figures import Timing
from runtime.checkpoints.model_config import ModelConfig
from runtime.common.terminal import GIB

ARCHITECTURE = ModelConfig(64, 128, 3, 4, 2, 16, 320, 1024, 1e-6, 1e4, torch.bfloat16)
TIMING = Timing(4, 1000, 800, [4.0, 1.0, 2.0], 1e9, 5.0, 5.5, 3 * GIB, {"cuda:0": 2 * GIB})


def test_flops_are_those_of_each_computed_product():
    """Block by block, linear by linear, token by token."""
    hidden, keys, inner, blocks, tokens, scored = 64, 32, 128, 3, 10, 2
    work = 0
    for block in range(blocks):
        rows = tokens if block < blocks - 1 else scored
        work += rows * 2 * hidden * hidden  # q
        work += tokens * 2 * hidden * keys * 2  # k, v
        work += rows * 2 * hidden * hidden  # o
        work += rows * 2 * hidden * inner * 3  # gate, up, down
    assert ARCHITECTURE.linear_flops(tokens, scored) == work


def test_rates_are_of_the_median_round():
    metrics = TIMING.metrics(ARCHITECTURE)
    work = ARCHITECTURE.linear_flops(800, 4)
    assert metrics["tokens_per_second"] == 400 and metrics["rendered_tokens_per_second"] == 500
    assert metrics["conversations_per_second"] == 2
    assert metrics["flops"] == work / 2 and metrics["matmul_share"] == pytest.approx(work / 2 / 1e9, abs=1e-4)
    assert metrics["seconds"] == [4.0, 1.0, 2.0]


def test_the_table_says_the_same():
    table = dict(TIMING.table(ARCHITECTURE, "bfloat16 on cuda:0"))
    assert table["tokens"] == "800 computed, 400 tokens/s" and table["as rendered"] == "1,000, 500 tokens/s"
    assert table["share of peak"].endswith("% of 0.001 TFLOP/s, bfloat16 on cuda:0")
    assert table["a round"] == "2.00 s, the median of 3 from 1.00 to 4.00 s"
    assert table["peak memory"] == "3.0 GiB; 2.0 GiB on cuda:0"
