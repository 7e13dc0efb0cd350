"""A packed model written again with wider MLPs: the same scores, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantize.export import main, parse
from quantize.sweep.checkpoint_writer import CheckpointWriter
from runtime import Scorer
from runtime.checkpoints.checkpoint import open_checkpoint
from runtime.common.files import sha256_of
from runtime.modeling.linear import make_linear
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs
from tests.helpers.tiny_score import assistant, user

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "4-bits": ("--bits", "4", "--group-size", "64"),
    "8-bits": ("--bits", "8", "--group-size", "64"),
    "asymmetric": ("--asymmetric", "--group-size", "32"),
    "asymmetric-8": ("--asymmetric", "--bits", "8", "--group-size", "-1"),
    "permuted": ("--desc-act", "--group-size", "32"),
}
CONVERSATIONS = [[user("What counts?"), assistant("the seven stories " * number)] for number in range(1, 9)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Packed checkpoints by name, each made once."""
    place = tmp_path_factory.mktemp("export")
    write_job_model(place / "model", layers=2, intermediate=320)
    write_pairs(place / "pairs.jsonl")

    def make(name: str, *options: str) -> Path:
        if not (place / name).exists():
            assert quantize(place / "model", place / "pairs.jsonl", place / name, *options) == 0
        return place / name

    return lambda name: place / "model" if name == "model" else make(name, *VARIANTS.get(name, ("--method", name)))


def export(model: Path, output: Path, tensor_parallel: int = 2) -> int:
    return main([str(model), "--tensor-parallel", str(tensor_parallel), "--output", str(output)])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_scores_and_weights_stay(packed, tmp_path, name):
    """Weights bit for bit; fp32 scores to 1e-6, as sums with more zeros in them may be taken in another order."""
    model, output = packed(name), tmp_path / "out"
    assert export(model, output) == 0
    before, after = open_checkpoint(model), open_checkpoint(output)
    assert (before.model_config.intermediate_size, after.model_config.intermediate_size) == (320, 512)
    assert after.quantization == before.quantization and after.quantization.checkpoint_format == "gptq"
    for index in range(before.model_config.num_hidden_layers):
        old, new = before.read_block(index), after.read_block(index)
        assert torch.equal(weight(new, after, "mlp.down_proj")[:, :320], weight(old, before, "mlp.down_proj"))
        assert not weight(new, after, "mlp.down_proj")[:, 320:].any()
        for linear in ("mlp.gate_proj", "mlp.up_proj"):
            assert torch.equal(weight(new, after, linear)[:320], weight(old, before, linear))
            assert not weight(new, after, linear)[320:].any()
        for same in (name for name in old if not name.startswith("mlp.")):
            assert torch.equal(new[same], old[same])
    scores = [Scorer(each).score(CONVERSATIONS) for each in (before, after)]
    assert scores[0].std() > 1e-3
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-6, atol=1e-6)


def weight(block, checkpoint, linear):
    tensors = {name.removeprefix(f"{linear}."): each for name, each in block.items() if name.startswith(f"{linear}.")}
    made = make_linear(tensors, checkpoint.quantization, checkpoint.model_config.linear_shape(linear))
    return made.weight(torch.float32)


def test_what_stands_beside_the_weights(packed, tmp_path):
    model, output = packed("4-bits"), tmp_path / "deep" / "out"
    assert export(model, output) == 0
    assert [each.name for each in output.parent.iterdir()] == ["out"]
    manifest = json.loads((output / "export.json").read_text())
    assert manifest["shards"] == {each.name: sha256_of(each) for each in sorted(output.glob("*.safetensors"))}
    assert {key: manifest[key] for key in ("tensor_parallel", "before", "after")} == {
        "tensor_parallel": 2,
        "before": 320,
        "after": 512,
    }
    assert "`intermediate_size` was raised from 320 to 512" in (output / "README.md").read_text()
    for name in (
        "reference_scores.json",
        "parity.json",
        "parity_pairs.jsonl",
        "tokenizer.json",
        "quantize_config.json",
    ):
        assert (output / name).read_bytes() == (model / name).read_bytes()
    assert not (output / "job").exists()


def test_a_run_that_is_stopped_leaves_nothing_and_one_that_was_killed_is_no_hindrance(
    packed, tmp_path, monkeypatch, capfd
):
    output, leftover = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_head", interrupt)
        assert export(packed("4-bits"), output) == 130
    assert "stopped; nothing was written" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    leftover.mkdir()
    (leftover / "model-00001-of-00004.safetensors").write_bytes(b"torn")
    assert export(packed("4-bits"), output) == 0
    assert list(tmp_path.iterdir()) == [output]


def test_a_run_killed_after_its_end_leaves_a_whole_checkpoint_and_a_lock_that_the_next_one_removes(
    packed, tmp_path, capfd
):
    output, lock = tmp_path / "out", tmp_path / ".out.lock"
    assert export(packed("4-bits"), output) == 0
    lock.touch()
    assert export(packed("4-bits"), output) == 2
    assert f"{output} exists; remove it" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == [output]


def test_a_run_that_is_stopped_after_its_end_says_so(packed, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("quantize.tensor_parallel.sync_directory", interrupt)
    assert export(packed("4-bits"), tmp_path / "out") == 130
    assert f"stopped; {tmp_path / 'out'} is finished." in capfd.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "message"),
    [
        ("model", 2, "model is not quantized, and 16-bit weights need no padding; serve it as it is."),
        ("nf4", 2, "nf4 has bitsandbytes nf4 weights, which engines do not split over GPUs; quantize with"),
        ("int8", 2, "int8 has bitsandbytes int8 weights"),
        ("4-bits", 1, "--tensor-parallel is 1; it must be at least 2."),
        ("4-bits", 3, "4-bits: 4 attention heads and 2 key-value heads do not split over 3 GPUs for any"),
        ("4-bits", 4, "4-bits: o_proj's 128 inputs in groups of 64 do not split over 4 GPUs"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(packed, tmp_path, capfd, name, tensor_parallel, message):
    model = packed(name)
    capfd.readouterr()
    assert export(model, tmp_path / "out", tensor_parallel) == 2
    assert f"error: {message}" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_pad_no_place_and_no_room(packed, tmp_path, capfd, monkeypatch):
    model, output = packed("4-bits"), tmp_path / "out"
    assert export(model, output) == 0
    assert export(output, tmp_path / "again") == 2
    assert "out: intermediate_size 512 already splits over 2 GPUs; serve this checkpoint." in capfd.readouterr().err
    assert export(model, output) == 2
    assert f"{output} exists; remove it or choose another --output." in capfd.readouterr().err
    shutil.rmtree(output)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, 1 << 10))
    assert export(model, output) == 2
    assert re.search(r"has 1\.0 KiB free, but \d+\.\d [KM]iB will be written; free some", capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_docs_and_help_show_commands_that_are_understood(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    texts = [
        capsys.readouterr().out,
        *(path.read_text() for path in (ROOT / "docs" / "quantizing.md", ROOT / "docs" / "engines.md")),
    ]
    for text in texts:
        commands = re.findall(r"-m quantize\.export (\w.*--output \S+)", text)
        assert commands
        for command in commands:
            parse(command.split())
