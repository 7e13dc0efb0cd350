"""The backward sweep against autograd through transformers' whole model; its passes; stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantize.job.gradient_plan as gradient_plan
from quantize.gradients.backward_sweep import BackwardSweep, statistics_file
from quantize.gradients.statistics import GradientStatistics
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.model_config import BLOCK_LINEARS
from runtime.checkpoints.quantization_config import BLOCK_LINEAR_GROUPS
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel
from runtime.conversations.rendering import RenderedConversation
from runtime.execution.block_loading import read_head
from runtime.modeling.packed_batch import pack_batches
from runtime.modeling.precision import BFLOAT16, FLOAT32, Precision
from tests.helpers.tiny import write_tiny_checkpoint

LAYERS, TOKEN_BUDGET = 5, 128


def make_rows(count: int) -> list[RenderedConversation]:
    """Rows without common prefixes, so that each token belongs to one row."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (count,), generator=draw).tolist()
    rows = [[index, *torch.randint(0, 300, (length,), generator=draw).tolist()] for index, length in enumerate(lengths)]
    return [RenderedConversation(row, len(row) - 1) for row in rows]


ROWS = make_rows(9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("gradients") / "m", layers=LAYERS, heads=4, kv_heads=2)
    return open_checkpoint(directory)


def make_sweep(
    checkpoint: Checkpoint, directory: Path, precision: Precision = FLOAT32, finished_passes: int = 0, rows=ROWS
) -> BackwardSweep:
    directory.mkdir(exist_ok=True)
    return BackwardSweep(
        checkpoint, read_head(checkpoint), precision, rows,
        token_budget=TOKEN_BUDGET, directory=directory, finished_passes=finished_passes,
    )  # fmt: skip


def run(checkpoint: Checkpoint, directory: Path, **options) -> list[dict[str, torch.Tensor]]:
    """The statistics of all blocks."""
    make_sweep(checkpoint, directory, **options).run(lambda: None)
    return [load_file(statistics_file(directory, index)) for index in range(LAYERS)]


def gradients_of_transformers(checkpoint: Checkpoint) -> dict[tuple[int, str], list[torch.Tensor]]:
    """By (block, linear), the gradient [T, N] of each row's score by the linear's output."""
    model = Qwen2ForRewardModel.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for name in BLOCK_LINEARS:
            key = (index, name)
            layer.get_submodule(name).register_full_backward_hook(
                lambda _, __, out, key=key: found.setdefault(key, []).append(out[0][0])
            )
    for row in ROWS:
        model(torch.tensor([row.token_ids])).sum().backward()
    return found


def test_statistics_equal_autograd_through_the_whole_model(checkpoint, tmp_path):
    ours, theirs = run(checkpoint, tmp_path / "s"), gradients_of_transformers(checkpoint)
    order = [row for batch in pack_batches(ROWS, TOKEN_BUDGET) for row in batch.rows]  # tokens are in batch order
    for index in range(LAYERS):
        for group in BLOCK_LINEAR_GROUPS:
            expected = sum(torch.cat([theirs[index, name][row].square().sum(1) for row in order]) for name in group)
            got = ours[index][f"{group[0]}.squares"]
            assert (got - expected).norm() < 1e-4 * expected.norm()
        for name in BLOCK_LINEARS:
            every = torch.cat(theirs[index, name])
            moment = every.T @ every
            vectors, diagonal = ours[index][f"{name}.vectors"], ours[index][f"{name}.diagonal"]
            assert (diagonal - moment.diagonal()).norm() < 1e-4 * moment.diagonal().norm()
            assert (vectors @ vectors.T - moment).norm() < 1e-3 * moment.norm()  # N <= RANK, so nothing is left out


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_segments_change_nothing(checkpoint, tmp_path, monkeypatch, precision):
    whole = run(checkpoint, tmp_path / "whole", precision=precision)
    monkeypatch.setattr(gradient_plan, "KEEP_ALL_INPUTS_BYTES", 0)
    assert [len(each) for each in gradient_plan.segments(checkpoint.model_config, 1, 4)] == [3, 2]
    for one, other in zip(whole, run(checkpoint, tmp_path / "cut", precision=precision), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_stopped_in_any_pass_and_resumed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_plan, "KEEP_ALL_INPUTS_BYTES", 0)
    undisturbed = run(checkpoint, tmp_path / "undisturbed")
    blocks_of_a_run = 2 * LAYERS
    for stop in range(1, blocks_of_a_run + 1):
        directory, done, passes = tmp_path / f"stop-{stop}", [], []

        def stop_here(done=done, stop=stop):
            done.append(1)
            if len(done) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make_sweep(checkpoint, directory).run(lambda passes=passes: passes.append(1), stop_here)
        resumed = run(checkpoint, directory, finished_passes=len(passes))
        for one, other in zip(undisturbed, resumed, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one), stop


def test_signs_keep_the_rows_of_a_shared_prefix_apart(checkpoint, tmp_path):
    """Over many draws, the squares of a shared token are the sum of both rows' squares."""
    prefix = torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    pair = [RenderedConversation([*prefix, token, 7], 21) for token in (5, 200)]
    alone = [run(checkpoint, tmp_path / f"alone-{index}", rows=[row])[0] for index, row in enumerate(pair)]
    sums = []
    for signs in ((1.0, 1.0), (1.0, -1.0)):
        directory = tmp_path / f"signs-{signs[1]}"
        sweep = make_sweep(checkpoint, directory, rows=pair)
        sweep._signs = torch.tensor(signs)
        sweep.run(lambda: None)
        sums.append(load_file(statistics_file(directory, 0))["mlp.down_proj.squares"][:20])
    expected = sum(each["mlp.down_proj.squares"][:20] for each in alone)
    torch.testing.assert_close((sums[0] + sums[1]) / 2, expected, rtol=1e-3, atol=1e-9)


def test_buffers_are_removed_and_statistics_stay(checkpoint, tmp_path):
    sweep = make_sweep(checkpoint, tmp_path / "s")
    sweep.run(lambda: None)
    sweep.remove_buffers()
    assert {path.suffix for path in (tmp_path / "s").iterdir()} == {".safetensors"}


def test_weights_are_of_all_tokens_in_the_order_of_the_batches(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "s")
    statistics = GradientStatistics(statistics_file(tmp_path / "s", 2), "cpu")
    weights = statistics.token_weights(BLOCK_LINEAR_GROUPS[0], in_features=32)
    assert len(weights) == sum(batch.tokens for batch in pack_batches(ROWS, TOKEN_BUDGET))
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
