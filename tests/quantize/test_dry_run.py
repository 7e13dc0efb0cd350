"""The plan alone: what a dry run says, and what is refused before a model is fetched."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from quantize.run import main
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs

SHAPES_72B = Path(__file__).parents[1] / "shapes_72b.json"


pytestmark = pytest.mark.usefixtures("wide_terminal")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `pairs.jsonl`."""
    place = tmp_path_factory.mktemp("plan")
    write_job_model(place / "model")
    write_pairs(place / "pairs.jsonl")
    return place


def test_dry_run_writes_nothing_and_needs_no_weights(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(SHAPES_72B, tmp_path / "config.json")
    assert main(["--model", "config.json", "--dry-run", "--device", "cpu", "--output", "out"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    said = capfd.readouterr().err
    assert "80 blocks, hidden 8192, 70.21 G weights" in said
    assert "gptq, 4 bits in groups of 128, 4.16 bits a weight" in said
    assert "reads 133.2 GiB 4 times, writes 36.4 GiB" in said


def test_dry_run_of_a_directory_with_weights_reads_its_config_alone(place, tmp_path, capfd):
    output = tmp_path / "out"
    assert quantize(place / "model", place / "pairs.jsonl", output, "--dry-run") == 0
    assert "3 blocks, hidden 128" in capfd.readouterr().err and not output.exists()


def test_dry_run_counts_single_conversations(place, tmp_path, capfd):
    row = {"messages": [{"role": "user", "content": "x" * 400}, {"role": "assistant", "content": "y" * 380}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n")
    assert quantize(place / "model", tmp_path / "chats.jsonl", tmp_path / "out", "--dry-run", "--rows", "1") == 0
    assert "about 215 for calibration (0.8 per input of the widest linear), about 0 for" in capfd.readouterr().err


def test_dry_run_promises_no_more_than_the_data_has(tmp_path, capfd):
    command = ["--model", str(SHAPES_72B), "--dry-run", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*command, "--rows", "2000"]) == 2
    assert "332 of the 2000 requested calibration rows are available in 166 pairs" in capfd.readouterr().err
    assert main(command) == 0
    said = capfd.readouterr().err
    assert "calibration tokens are 0.8 for each of the 29,568 inputs of the widest linear, so its Hessian is" in said
    assert "rewritten for every block, 384.2 GiB in total" in said


def test_the_default_is_a_number_of_tokens_for_each_input(place, tmp_path, capfd):
    write_pairs(tmp_path / "many.jsonl", 100, words=300)
    command = ["--model", str(place / "model"), "--calibration", str(tmp_path / "many.jsonl"), "--dry-run"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().err
    assert "warning" not in said
    (per_input,) = re.findall(r"\(([0-9.]+) per input", said)
    assert 7.2 < float(per_input) < 10


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--ram-budget", "10MiB"), "On this machine the job would be refused now: peak memory would be"),
        (("--device", "cuda:64"), "not estimated: this machine has no such device"),
    ],
)
def test_dry_run_says_what_this_machine_lacks(place, tmp_path, capfd, more, said):
    assert quantize(place / "model", place / "pairs.jsonl", tmp_path / "out", "--dry-run", *more) == 0
    assert said in capfd.readouterr().err


def test_a_hub_model_is_fetched_only_when_it_fits(tmp_path, capfd, monkeypatch):
    asked = []

    def snapshot_download(model_id, *, allow_patterns, **_):
        asked.append(allow_patterns)
        shutil.copyfile(SHAPES_72B, tmp_path / "config.json")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    command = ["--model", "Qwen/WorldPM-72B", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--ram-budget", "8GiB"]) == 2
    assert "error: peak memory would be" in capfd.readouterr().err and asked == [["config.json"]]


def test_with_no_model_the_first_line_says_which_one_it_is(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("quantize.run.print_dry_run", lambda *_: 0)
    assert main(["--dry-run"]) == 0
    assert capfd.readouterr().err.startswith(
        "No --model given, so this is the embedded demo. The real one: --model Qwen"
    )
