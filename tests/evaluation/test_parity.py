"""The parity command end to end on a tiny model: references, golden scores, output files, messages, exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import options as model_options
from runtime.conversations.row_shapes import parse_row
from runtime.evaluation.golden import GOLDEN_CONVERSATIONS, PUBLISHED_SCORES
from runtime.evaluation.report import read_report
from runtime.parity import main, parse
from runtime.scorer import Scorer
from tests.helpers.tiny_job import PAIRS, ROWS, digests, quantize, write_job_model, write_pairs

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = PUBLISHED_SCORES["Qwen/WorldPM-72B"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, 40 pairs, and the model quantized to 4 and to 8 bits."""
    place = tmp_path_factory.mktemp("parity")
    write_job_model(place / "model")
    write_pairs(place / "pairs.jsonl")
    for bits in ("4", "8"):
        assert quantize(place / "model", place / "pairs.jsonl", place / f"q{bits}", "--bits", bits) == 0
    return place


def compare(place: Path, *more: str | Path, pairs: bool = True) -> int:
    """Run the command in fp32 on the CPU and return its exit status."""
    given = ["--pairs", place / "pairs.jsonl"] if pairs else []
    return main(["--devices", "cpu", "--dtype", "float32", *map(str, more), *map(str, given)])


def figures(capfd) -> list[dict]:
    """The entry of each model that `--json` printed."""
    return json.loads(capfd.readouterr().out.splitlines()[-1])["models"]


# ---- reference scores -----------------------------------------------------------------------------------


def test_stored_scores_give_the_report_that_quantizing_gave(place, capfd, tmp_path):
    assert compare(place, place / "q4", "--json", "--output", tmp_path) == 0
    (found,) = figures(capfd)
    then, now = read_report(place / "q4" / "parity.json"), read_report(tmp_path / "parity.json")
    assert {pair.id: pair.reference for pair in now.scores} == {pair.id: pair.reference for pair in then.scores}
    assert {pair.id: pair.noise_floor for pair in now.scores} == {pair.id: pair.noise_floor for pair in then.scores}
    before = {pair.id: pair.quantized for pair in then.scores}
    for pair in now.scores:
        assert pair.quantized == pytest.approx(before[pair.id], abs=1e-4)
    assert found["figures"]["agreement"] == then.figures.agreement.model_dump()
    assert now.figures.mean_shift.value == pytest.approx(then.figures.mean_shift.value, abs=1e-4)
    assert (now.subject.model, now.subject.reference) == ("q4", "model")
    assert now.subject.reference_dtype == then.subject.reference_dtype
    assert now.subject.settings["damp_percent"] == then.subject.settings["damp_percent"]
    assert now.subject.settings["here"] == {"devices": "cpu", "arithmetic": "float32", "token_budget": 1024}
    notes = " ".join(now.notes)
    assert f"{40 - PAIRS - ROWS // 2} of 40 pairs are left out: no reference scores are stored" in notes
    within = float(re.search(r"within (\S+) sd of those in its own parity.json, on 10 pairs", notes)[1])
    assert within < 1e-4


def test_without_pairs_those_stored_beside_the_models_are_used(place, tmp_path, capfd):
    assert compare(place, place / "q4", place / "q8", "--json", pairs=False) == 0
    alone = figures(capfd)
    assert compare(place, place / "q4", place / "q8", "--json") == 0
    for found, expected in zip(alone, figures(capfd), strict=True):
        for name in ("agreement", "mean_shift", "max_shift", "spearman"):
            assert found["figures"][name]["value"] == pytest.approx(expected["figures"][name]["value"], abs=1e-5)
    assert not any("left out" in note for each in alone for note in each["notes"])
    bare = shutil.copytree(place / "q8", tmp_path / "bare")
    (bare / "parity_pairs.jsonl").unlink()
    assert compare(place, bare, place / "q4", pairs=False) == 0  # the other model's pairs are used
    assert compare(place, bare, pairs=False) == 2


def test_a_model_that_changed_since_it_was_quantized_is_detected(place, tmp_path, capfd):
    changed = shutil.copytree(place / "q4", tmp_path / "q4")
    head = next(path for path in changed.glob("*.safetensors") if "score.2.weight" in load_file(path))
    tensors = load_file(head)
    tensors["score.2.weight"] = tensors["score.2.weight"] * 2
    save_file(tensors, head, metadata={"format": "pt"})
    assert compare(place, changed, "--max-shift", "0.4", "--json") == 1
    (found,) = figures(capfd)
    assert float(re.search(r"within (\S+) sd", " ".join(found["notes"]))[1]) > 0.5


def test_a_given_reference_is_scored(place, capfd):
    assert compare(place, place / "q4", place / "model", "--reference", place / "model", "--json") == 0
    packed, itself = figures(capfd)
    pairs = [parse_row(json.loads(line)) for line in (place / "pairs.jsonl").read_text().splitlines()]
    assert packed["figures"]["pairs"] == itself["figures"]["pairs"] == len(pairs) - ROWS // 2
    assert itself["figures"]["max_shift"]["value"] == 0 and itself["figures"]["agreement"]["value"] == 1
    assert itself["subject"]["method"] == "unquantized" and itself["subject"]["bits"] == 16
    assert packed["subject"]["reference_dtype"] == "bfloat16 weights, float32 arithmetic"
    assert 0 < packed["figures"]["mean_shift"]["value"] < 1


def test_a_reference_other_than_the_original_is_noted(place, tmp_path, capfd):
    write_job_model(tmp_path / "stranger", seed=1)
    assert compare(place, place / "q4", "--reference", tmp_path / "stranger", "--json") == 0
    (found,) = figures(capfd)
    assert "it was quantized from model, but the reference here is another checkpoint" in found["notes"]
    assert found["figures"]["pearson"]["value"] < 0.9


def test_without_its_own_report_a_model_is_described_by_its_config(place, tmp_path, capfd):
    bare = shutil.copytree(place / "q8", tmp_path / "bare")
    own = read_report(bare / "parity.json").subject
    (bare / "parity.json").unlink()
    assert compare(place, bare, "--json") == 0
    (found,) = figures(capfd)
    assert found["figures"]["pairs"] == PAIRS + ROWS // 2  # without parity.json calibration pairs cannot be told apart
    shown = found["subject"]
    assert (shown["method"], shown["bits"], shown["group_size"]) == (own.method, own.bits, own.group_size)
    assert shown["bits_per_weight"] == own.bits_per_weight


# ---- golden scores --------------------------------------------------------------------------------------


@pytest.fixture
def named(place, tmp_path) -> Path:
    """The tiny model in a directory with the 72B's name."""
    return shutil.copytree(place / "model", tmp_path / "WorldPM-72B")


def publish(monkeypatch: pytest.MonkeyPatch, model: Path, off: float) -> None:
    """Publish the tiny model's own scores as golden scores, the first one changed by `off`."""
    good, bad = Scorer.from_pretrained(model, devices="cpu", dtype="float32").score(GOLDEN_CONVERSATIONS).tolist()
    monkeypatch.setitem(PUBLISHED_SCORES, "Qwen/WorldPM-72B", (good + off, bad))


@pytest.mark.parametrize(
    ("off", "more", "status"), [(9e-4, (), 0), (2e-3, (), 1), (2e-3, ("--tolerance", "0.01"), 0), (-2e-3, (), 1)]
)
def test_golden_scores_pass_or_fail(place, named, monkeypatch, capfd, off, more, status):
    publish(monkeypatch, named, off)
    assert compare(place, named, "--golden", *more, "--json", pairs=False) == status
    said = capfd.readouterr()
    (found,) = json.loads(said.out)["models"]
    assert found["golden"]["met"] == found["passed"] == (status == 0) and found["figures"] is None
    assert found["golden"]["difference"] == pytest.approx(abs(off), abs=1e-5)
    assert f"golden scores of Qwen/WorldPM-72B: {'FAIL' if status else 'pass'}" in said.err


def test_a_random_model_misses_the_published_scores(place, named):
    assert compare(place, named, "--golden", pairs=False) == 1


@pytest.mark.slow
def test_a_quantized_model_is_checked_against_its_original_s_golden_scores(place, named, tmp_path, monkeypatch, capfd):
    publish(monkeypatch, named, 0)
    assert quantize(named, place / "pairs.jsonl", tmp_path / "small", "--bits", "8") == 0
    capfd.readouterr()
    assert compare(place, tmp_path / "small", "--golden", "--json", "--output", tmp_path / "report") == 0
    (found,) = figures(capfd)
    assert found["golden"]["name"] == "Qwen/WorldPM-72B" and found["golden"]["tolerance"] == 0.15
    assert 0 < found["golden"]["difference"] < 0.15
    assert found["figures"]["pairs"] == PAIRS  # the golden conversations are not counted as a pair
    assert "golden scores of Qwen/WorldPM-72B: pass" in read_report(tmp_path / "report" / "parity.json").notes[-1]


def test_no_golden_scores_are_published_for_other_models(place, named, tmp_path, monkeypatch, capfd):
    publish(monkeypatch, named, 0)
    tuned = shutil.copytree(place / "model", tmp_path / "WorldPM-72B-HelpSteer2")
    assert compare(place, tuned, named, "--golden", pairs=False) == 0
    said = capfd.readouterr().err
    assert "WorldPM-72B-HelpSteer2: golden scores: none are published for WorldPM-72B-HelpSteer2" in said
    assert "WorldPM-72B-HelpSteer2: scoring" not in said
    assert compare(place, tuned, "--golden", pairs=False) == 2
    assert "none are published for WorldPM-72B-HelpSteer2, only for Qwen/WorldPM-72B" in capfd.readouterr().err


# ---- several models and output files ---------------------------------------------------------------------


def test_several_models_are_reported_side_by_side(place, tmp_path, capfd):
    assert compare(place, place / "q4", place / "q8", place / "q4", "--output", tmp_path / "reports") == 0
    table = capfd.readouterr().err
    assert re.search(r"metric\s+┃ q4\s+┃ q8\s+┃ q4-2", table)
    assert re.search(r"Reference\s+│ model\s+│ model\s+│ model", table)
    summary = json.loads((tmp_path / "reports" / "side_by_side.json").read_text())
    assert [each["model"] for each in summary["models"]] == ["q4", "q8", "q4-2"] and summary["passed"]
    for each in summary["models"]:
        directory = tmp_path / "reports" / each["model"]
        assert {path.name for path in directory.iterdir()} == {"parity.html", "parity.json", "parity.junit.xml"}
        assert read_report(directory / "parity.json").figures.model_dump() == each["figures"]
    four, eight, again = (each["figures"]["mean_shift"]["value"] for each in summary["models"])
    assert eight < four == again


@pytest.mark.parametrize(
    ("more", "status", "met"),
    [
        (("--min-agreement", "0", "--max-shift", "99"), 0, [True, True]),
        (("--max-shift", "0.05"), 1, [False, True]),
        (("--min-agreement", "1.01"), 1, [False, False]),
    ],
)
def test_thresholds_set_the_exit_status_of_all(place, capfd, more, status, met):
    assert compare(place, place / "q4", place / "q8", *more, "--json") == status
    summary = json.loads(capfd.readouterr().out)
    assert [each["passed"] for each in summary["models"]] == met and summary["passed"] == (status == 0)


def test_nothing_is_written_without_output_and_never_into_a_checkpoint(place, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = digests(place / "q4")
    assert compare(place, place / "q4") == 0
    assert list(tmp_path.iterdir()) == [] and digests(place / "q4") == before
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for models, output in ((["q4"], place / "q4"), (["q4", "q8"], place), (["q4", "q8"], place / "q4")):
        assert compare(place, *(place / model for model in models), "--output", output) == 2
        assert "holds a checkpoint, whose parity.json would be overwritten" in capfd.readouterr().err
    assert compare(place, place / "q4", "--output", place / "pairs.jsonl") == 2
    assert "pairs.jsonl is a file; pass a directory" in capfd.readouterr().err
    assert digests(place / "q4") == before


# ---- errors and exit status ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "pairs", "message"),
    [
        (("model",), False, "no model has a parity_pairs.jsonl beside it; pass --pairs"),
        (("model",), True, "has no reference_scores.json, which quantization writes; pass --reference"),
        (("nowhere",), True, "nowhere does not exist"),
        (("q4", "--reference", "nowhere"), True, "nowhere does not exist"),
        (("model", "--reference", "model", "--golden"), False, "no model has a parity_pairs.jsonl"),
        (("q4", "--tolerance", "1"), True, "--tolerance applies to golden scores only"),
        (("q4", "--token-budget", "0"), True, "--token-budget is 0"),
        (("q4", "--pairs", "nothing.jsonl"), False, "nothing.jsonl cannot be read: No such file"),
    ],
)
def test_invalid_input_is_an_error_before_a_model_is_loaded(place, monkeypatch, capfd, more, pairs, message):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Scorer, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert compare(place, *more, pairs=pairs) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and message in said


def test_damaged_reference_scores_are_an_error(place, tmp_path, capfd):
    damaged = shutil.copytree(place / "q4", tmp_path / "damaged")
    content = json.loads((damaged / "reference_scores.json").read_text())
    for broken in ('{"schema": 1', json.dumps(content | {"scores": dict.fromkeys(content["scores"], "much")})):
        (damaged / "reference_scores.json").write_text(broken)
        assert compare(place, damaged) == 2
        assert "reference_scores.json cannot be read" in capfd.readouterr().err


def test_a_model_that_overflows_is_named(place, tmp_path, capfd):
    damaged = shutil.copytree(place / "model", tmp_path / "damaged")
    shard = next(
        path for path in damaged.glob("*.safetensors") if "model.layers.1.mlp.down_proj.weight" in load_file(path)
    )
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    assert compare(place, damaged, "--reference", place / "model") == 2
    assert re.search(r"error: damaged: conversation \d+: block 1.*counted from 0, two per pair", capfd.readouterr().err)


def test_model_options_reach_the_planner(place, monkeypatch):
    asked = []
    real = model_options.plan_placement
    monkeypatch.setattr(
        model_options,
        "plan_placement",
        lambda checkpoint, **more: (asked.append((checkpoint.directory, more)), real(checkpoint, **more))[1],
    )
    memory = ["--memory", "cpu=1GiB"]
    assert compare(place, place / "q4", "--reference", place / "model", "--token-budget", "99", *memory) == 0
    settings = {"devices": "cpu", "memory": "cpu=1GiB", "dtype": "float32", "token_budget": 99, "stream": False}
    # The compared model is planned before the reference is scored, and again when it is loaded.
    assert asked == [(place / "q4", settings), (place / "model", settings), (place / "q4", settings)]


def test_fp8_applies_to_the_compared_models_only(place, capfd):
    """Not to the reference; and a model that cannot use fp8 is an error before any other is scored."""
    assert compare(place, place / "q4", "--reference", place / "model", "--dtype", "fp8", "--json") == 0
    captured = capfd.readouterr()
    assert "conversations, as the reference" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["models"]
    assert compare(place, place / "q4", place / "q8", "--dtype", "fp8") == 2
    said = capfd.readouterr().err
    assert re.search(r"q8 is gptq, 8 bits", said) and "scoring" not in said


def test_all_conversations_of_a_model_are_scored_in_one_call(place, named, monkeypatch):
    publish(monkeypatch, named, 0)
    calls = []
    monkeypatch.setattr(Scorer, "score_rendered", lambda self, all: (calls.append(len(all)), torch.randn(len(all)))[1])
    compare(place, named, "--reference", place / "model", "--golden")
    assert calls == [80, 82]


@pytest.mark.slow
def test_a_stopped_run_says_so(place):
    os.mkfifo(place / "endless.jsonl")
    command = [sys.executable, "-m", "runtime.parity", place / "q4", "--pairs", place / "endless.jsonl"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with open(place / "endless.jsonl", "w"):  # opening blocks until the command reads; nothing is written
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
    assert process.stderr.read() == "stopped; the same command starts again.\n"


def test_help_names_inputs_exit_status_and_valid_examples(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for word in ("reference_scores.json", "--reference", "golden", "exit status: 0", "130", "examples:", "--max-shift"):
        assert word in text
    examples = re.findall(r"-m runtime\.parity (.*)$", text.partition("examples:")[2], re.MULTILINE)
    assert len(examples) == 4
    for example in examples:
        parse(example.split())
