"""What is settled before the work begins: devices, dtypes, group sizes, batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize.arguments import parse
from quantize.job.inputs import JobInputs, read_inputs
from runtime.common.errors import ConfigurationError
from tests.helpers.tiny_job import PAIRS, ROWS, arguments, write_job_model, write_pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `pairs.jsonl`."""
    place = tmp_path_factory.mktemp("inputs")
    write_job_model(place / "model", layers=1, intermediate=192)
    write_pairs(place / "pairs.jsonl")
    return place


def read(place: Path, *more: str) -> JobInputs:
    given = arguments(place / "model", place / "pairs.jsonl", Path("unused"), *more)
    return read_inputs(parse(given))


def test_the_same_arguments_settle_the_same_recipe(place):
    assert read(place).recipe == read(place).recipe
    assert read(place, "--seed", "1").recipe.conversations != read(place).recipe.conversations


def test_rows_and_pairs_are_as_many_as_asked_for_and_share_no_prompt(place):
    sample = read(place).sample
    assert (len(sample.calibration), len(sample.parity)) == (ROWS, PAIRS)
    calibrated = {row.conversation.messages[0]["content"] for row in sample.calibration}
    assert not calibrated & {pair.pair.prompt[0]["content"] for pair in sample.parity}


def test_a_group_size_that_does_not_divide_falls_back_and_says_so(place):
    inputs = read(place)
    assert inputs.recipe.group_size == 64
    assert inputs.notes == ["group size 128 does not divide a width of 192; 64 was used."]
    assert read(place, "--group-size", "32").notes == []
    assert read(place, "--method", "nf4").notes == [] and read(place, "--method", "nf4").recipe.group_size == -1


def test_the_longest_batch_of_the_plan_is_the_longest_there_is(place):
    inputs = read(place)
    lengths = [len(row.rendered.token_ids) for row in inputs.sample.calibration]
    assert max(lengths) <= inputs.plan.token_counts.longest_batch <= 256
    assert inputs.plan.token_counts.calibration_tokens < sum(lengths)  # what rows begin with alike is there once
    assert read(place, "--token-budget", "1").plan.token_counts.longest_batch == max(
        len(rendered.token_ids)
        for rendered in [row.rendered for row in inputs.sample.calibration]
        + [each for pair in inputs.sample.parity for each in (pair.chosen, pair.rejected)]
    )


def test_max_tokens_leaves_longer_conversations_out(place):
    sample = read(place, "--max-tokens", "120", "--rows", "4", "--parity-pairs", "2").sample
    assert sample.too_long > 0
    assert all(len(row.rendered.token_ids) <= 120 for row in sample.calibration)


@pytest.mark.parametrize(
    ("instructions", "given", "dtype"),
    [
        ({}, "auto", "float32"),
        ({"avx512_bf16": True, "sse4a": True}, "auto", "bfloat16"),
        ({"avx512_bf16": True, "sse4a": False}, "auto", "float32"),
        ({"amx_bf16": True}, "auto", "bfloat16"),
        ({}, "bfloat16", "bfloat16"),
        ({"amx_bf16": True}, "float32", "float32"),
    ],
)
def test_products_on_a_cpu_are_bfloat16_where_that_is_faster(place, monkeypatch, instructions, given, dtype):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: instructions)
    inputs = read(place, "--dtype", given)
    assert inputs.recipe.dtype == dtype and inputs.recipe.device == "cpu"
    assert inputs.plan.matmul_bytes == {"float32": 4, "bfloat16": 2}[dtype]


def test_a_gpu_is_taken_where_there_is_one(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9 - 2 * index, 0))
    recipe = read(place, "--device", "auto", "--dtype", "auto").recipe
    assert (recipe.device, recipe.dtype) == ("cuda:0", "bfloat16")
    older = read(place, "--device", "cuda:1").recipe
    assert (older.device, older.dtype) == ("cuda:1", "float32")
    with pytest.raises(ConfigurationError, match="compute capability 8.0 .Ampere.*cuda:1 has 7.0, so use float32"):
        read(place, "--device", "cuda:1", "--dtype", "bfloat16")
    assert read(place, "--device", "cuda").recipe.device == "cuda:0"
    with pytest.raises(ConfigurationError, match="cuda:2: this machine has 2 CUDA devices"):
        read(place, "--device", "cuda:2")


def test_without_one_it_is_the_cpu(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert read(place, "--device", "auto").recipe.device == "cpu"
    with pytest.raises(
        ConfigurationError, match="cuda:0: this machine has 0 CUDA devices that torch can use; try --device cpu"
    ):
        read(place, "--device", "cuda:0")
