"""Errors by group and option: against autograd through transformers' whole model, and against pytorch's rounding."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from quantize.gradients.backward_sweep import BackwardSweep, statistics_file
from quantize.gradients.sensitivity import rounding_error, tries_of_tokens
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS, QuantizationConfig
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.block_loading import read_head
from runtime.modeling.packed_batch import pack_batches
from runtime.modeling.precision import FLOAT32
from tests.helpers.tiny import write_tiny_checkpoint
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs

OPTIONS = [
    QuantizationConfig("gptq", 4, group_size=64),
    QuantizationConfig("gptq", 4, group_size=32),
    QuantizationConfig("gptq", 8, group_size=64),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("sensitivity") / "m", layers=3, heads=4, kv_heads=2)
    return open_checkpoint(directory)


def make_rows(count: int) -> list[RenderedConversation]:
    draw = torch.Generator().manual_seed(0)
    rows = [[index, *torch.randint(0, 300, (20 + 3 * index,), generator=draw).tolist()] for index in range(count)]
    return [RenderedConversation(row, len(row) - 1) for row in rows]


def measured(checkpoint: Checkpoint, directory, variant: Checkpoint | None = None) -> list[torch.Tensor]:
    """The errors [4, options] of all blocks."""
    directory.mkdir()
    BackwardSweep(
        checkpoint, read_head(checkpoint), FLOAT32, make_rows(7), token_budget=100, directory=directory,
        options=OPTIONS, variant=variant,
    ).run(lambda: None)  # fmt: skip
    blocks = range(checkpoint.model_config.num_hidden_layers)
    return [load_file(statistics_file(directory, index))["errors"] for index in blocks]


def gradients_by_weight(checkpoint: Checkpoint) -> list[dict[str, torch.Tensor]]:
    """By row: the gradient of its score by every parameter, from transformers."""
    model = Qwen2ForRewardModel.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    found = []
    for row in make_rows(7):
        model.zero_grad()
        model(torch.tensor([row.token_ids])).sum().backward()
        found.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    return found


def test_errors_are_those_of_autograd_for_rounding_to_nearest(checkpoint, tmp_path):
    gradients = gradients_by_weight(checkpoint)
    for index, errors in enumerate(measured(checkpoint, tmp_path / "s")):
        for group, names in enumerate(BLOCK_LINEAR_GROUPS):
            moved, power = torch.zeros(7), torch.zeros(len(OPTIONS))
            for name in names:
                key = f"model.layers.{index}.{name}.weight"
                changes = [rounding_error(checkpoint.read(key).float(), option) for option in OPTIONS]
                power += torch.stack([change.square().sum() for change in changes])
                moved += torch.stack([(row[key] * changes[0]).sum() for row in gradients])
            expected = moved.square().sum() * power / power[0]
            torch.testing.assert_close(errors[group].float(), expected, rtol=1e-3, atol=0)


def test_errors_of_a_variant_are_those_of_its_weights(tmp_path):
    model, output = write_job_model(tmp_path / "m"), tmp_path / "out"
    assert quantize(model, write_pairs(tmp_path / "pairs.jsonl"), output, "--group-size", "64") == 0
    source, variant = open_checkpoint(model), open_checkpoint(output)
    gradients = gradients_by_weight(source)
    for index, errors in enumerate(measured(source, tmp_path / "s", variant)):
        packed = variant.read_block(index)
        key = f"model.layers.{index}.mlp.down_proj.weight"
        codes = packed["mlp.down_proj.qweight"][:, None] >> torch.arange(0, 32, 4)[None, :, None] & 15
        scales = packed["mlp.down_proj.scales"].float()[packed["mlp.down_proj.g_idx"].long()]
        change = ((codes.flatten(0, 1) - 8) * scales).T - source.read(key).float()
        expected = sum(float((row[key] * change).sum()) ** 2 for row in gradients)
        assert math.isclose(float(errors[3, 0]), expected, rel_tol=1e-3)


def test_rounding_errors_shrink_with_the_grid():
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    four, narrow, eight = (rounding_error(weight, option).square().mean() for option in OPTIONS)
    assert 0.5 * four < narrow < 0.9 * four and eight < four / 200
    assert rounding_error(weight, OPTIONS[0]).abs().max() <= weight.abs().max() / 7.5  # half a step, or the cut end


def test_conversations_with_a_common_prefix_are_one_trie():
    prefix = list(range(30))
    rows = [[*prefix, 100, 101], [9, 8, 7], [*prefix, 200], [*prefix, 200, 201, 202]]
    (batch,) = pack_batches([RenderedConversation(row, len(row) - 1) for row in rows], 1000)
    tries = tries_of_tokens(batch)
    of_row = {
        row: {int(tries[token]) for start, end in ranges for token in range(start, end)}
        for row, ranges in zip(batch.rows, batch.token_ranges, strict=True)
    }
    assert of_row[0] == of_row[2] == of_row[3] != of_row[1] and all(len(each) == 1 for each in of_row.values())
