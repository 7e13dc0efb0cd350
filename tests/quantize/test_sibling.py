"""Quantize, score and export models with the other rule and the other head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from quantize.export import main as export
from runtime import Scorer
from runtime.checkpoints.checkpoint import Checkpoint, open_checkpoint
from runtime.checkpoints.heads import LINEAR_HEAD, MLP_HEAD
from runtime.checkpoints.model_config import BLOCK_LINEARS, block_prefix
from runtime.checkpoints.transformers_model import Qwen2ForRewardModel
from runtime.evaluation.report import read_report
from runtime.modeling.linear import make_linear
from tests.helpers.tiny import MATH_TEMPLATE
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs
from tests.helpers.tiny_score import assistant, user

CLASSES = {MLP_HEAD: Qwen2ForRewardModel, LINEAR_HEAD: Qwen2ForSequenceClassification}
CONVERSATIONS = [[user("What counts?"), assistant("the seven stories " * size)] for size in range(1, 7)]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("wide_terminal")]


def dequantized(checkpoint: Checkpoint) -> torch.nn.Module:
    """The packed model as transformers' own class, with the weights that its linears stand for."""
    model_config = checkpoint.model_config
    state = {name: checkpoint.read(name).float() for name in model_config.non_block_shapes()}
    for index in range(model_config.num_hidden_layers):
        block, quantizations = checkpoint.read_block(index), checkpoint.block_quantization(index)
        assert quantizations is not None
        for name in BLOCK_LINEARS:
            stored = {key.removeprefix(f"{name}."): block[key] for key in block if key.startswith(f"{name}.")}
            linear = make_linear(stored, quantizations[name], model_config.linear_shape(name))
            state[f"{block_prefix(index)}{name}.weight"] = linear.weight(torch.float32)
        state |= {block_prefix(index) + key: block[key].float() for key in model_config.block_shapes() if key in block}
    config = json.loads((checkpoint.directory / "config.json").read_text())
    del config["quantization_config"]
    model = CLASSES[model_config.head_tensors](Qwen2Config.from_dict(config)).float().eval()
    model.load_state_dict(state)
    return model


def theirs(checkpoint: Checkpoint) -> torch.Tensor:
    """Scores at the last token."""
    model, renderer = dequantized(checkpoint), checkpoint.renderer()
    with torch.no_grad():
        results = [model(torch.tensor([renderer.render(each).token_ids])) for each in CONVERSATIONS]
    return torch.cat([each if isinstance(each, torch.Tensor) else each.logits[0] for each in results])


@pytest.mark.parametrize("head", [MLP_HEAD, LINEAR_HEAD], ids=["two linears", "one linear"])
def test_a_sibling_is_quantized_scored_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str], head):
    model, packed, padded = (tmp_path / name for name in ("model", "packed", "padded"))
    write_job_model(model, layers=2, intermediate=320, head=head, template=MATH_TEMPLATE)
    options = ("--bits", "4", "--group-size", "64")
    assert quantize(model, write_pairs(tmp_path / "pairs.jsonl"), packed, *options) == 0
    shown = capsys.readouterr()
    assert r"the last token, `\n` after `<|im_end|>`" in shown.out + shown.err

    config = json.loads((packed / "config.json").read_text())
    assert config["scored_token"] == "last" and config["architectures"] == [CLASSES[head].__name__]
    checkpoint = open_checkpoint(packed)
    assert checkpoint.renderer().rule == open_checkpoint(model).renderer().rule
    assert r"read at the last token, `\n` after `<|im_end|>`" in (packed / "README.md").read_text()
    assert read_report(packed / "parity.json").figures.spearman.value > 0.5

    ours = Scorer(checkpoint).score(CONVERSATIONS)
    expected = theirs(checkpoint)
    assert (ours - expected).abs().max() < 1e-5 * expected.std()

    assert export([str(packed), "--tensor-parallel", "2", "--output", str(padded)]) == 0
    assert json.loads((padded / "config.json").read_text())["scored_token"] == "last"
    torch.testing.assert_close(Scorer(open_checkpoint(padded)).score(CONVERSATIONS), ours, rtol=1e-6, atol=1e-6)
