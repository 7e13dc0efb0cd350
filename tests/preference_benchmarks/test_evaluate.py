"""The command from end to end on tiny models: what it writes and prints, and how it is resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

from runtime.batch.output_file import OutputFile
from runtime.common.errors import ConfigurationError
from runtime.evaluate import main, parse
from runtime.evaluation.comparison import measure_parity
from runtime.evaluation.report import read_report
from runtime.evaluation.report_files import write_report
from runtime.preference_benchmarks.published import published_accuracy
from runtime.scorer import Scorer
from tests.helpers.benchmark_rows import ROWS
from tests.helpers.interruption import raise_at_call
from tests.helpers.processes import start_process
from tests.helpers.scored import SUBJECT, pair
from tests.helpers.tiny import write_tiny_checkpoint
from tests.helpers.tiny_score import read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
COMMON = ("--devices", "cpu", "--dtype", "float32", "--token-budget", "16")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for name, make in ROWS.items():
        write_jsonl(directory / f"{name}.jsonl", make(12))
    return directory


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A tiny model with other weights."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "other", seed=1)


def arguments(models: list[Path], data: Path, output: Path, *names: str) -> list[str]:
    benchmarks = [each for name in names for each in ("--benchmark", f"{name}={data / name}.jsonl")]
    return [*map(str, models), *benchmarks, "--output", str(output), *COMMON]


@pytest.fixture(scope="module")
def evaluated(tiny_checkpoint, other, data, tmp_path_factory) -> Path:
    """The results of two models on all benchmarks."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    assert main([*arguments([other], data, output, *ROWS), "--reference", str(tiny_checkpoint)]) == 0
    return output


def result(directory: Path, name: str, model: Path) -> dict:
    return json.loads((directory / name / f"{model.name}.json").read_text())


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_json_has_the_published_keys(evaluated, other, data):
    found = result(evaluated, "rewardbench", other)
    published = ["accuracy", "num_prompts", "model", "ref_model", "tokenizer", "chat_template", "extra_results"]
    assert list(found)[:7] == published
    outputs = read_jsonl(evaluated / "rewardbench" / f"{other.name}_outputs.jsonl")
    assert found["accuracy"] == pytest.approx(sum(row["results"] for row in outputs) / len(outputs))
    assert [row["id"] for row in outputs] == list(range(12))
    assert set(found["extra_results"]) == {row["subset"] for row in outputs}
    assert all(row["results"] == (row["scores_chosen"] > row["scores_rejected"]) for row in outputs)


def test_the_scores_are_those_of_the_scorer(evaluated, other, data):
    scorer = Scorer.from_pretrained(other, devices="cpu", dtype="float32")
    rows = read_jsonl(data / "rm-bench.jsonl")
    for row, found in zip(rows, read_jsonl(evaluated / "rm-bench" / f"{other.name}_outputs.jsonl"), strict=True):
        turns = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            for text in (*row["chosen"], *row["rejected"])
        ]
        assert [*found["scores_chosen"], *found["scores_rejected"]] == pytest.approx(
            scorer.score(turns).tolist(), abs=1e-5
        )
        assert found["subset"] == row["domain"]


@pytest.mark.parametrize("name", ROWS)
def test_changes_are_counted_against_the_reference(evaluated, tiny_checkpoint, other, name):
    assert result(evaluated, name, tiny_checkpoint)["reference"] is None
    found = result(evaluated, name, other)
    assert found["reference"] == tiny_checkpoint.name and set(found["changes"]) == set(found["sections"])
    outputs = [read_jsonl(evaluated / name / f"{each.name}_outputs.jsonl") for each in (tiny_checkpoint, other)]
    pairs = zip(*outputs, strict=True)
    counted = [(before["results"], after["results"]) for before, after in pairs if after["results"] is not None]
    better, worse = sum(after > before for before, after in counted), sum(after < before for before, after in counted)
    overall = list(found["changes"].values())[-1]
    assert (overall["better"], overall["worse"], overall["flips"]) == (better, worse, better + worse)
    p_value = stats.binomtest(min(better, worse), better + worse).pvalue if better + worse else 1
    assert overall["p_value"] == pytest.approx(p_value, rel=1e-5)


def test_a_model_compared_with_itself_changes_nothing(tiny_checkpoint, data, tmp_path, capfd):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    command = [*arguments([copy], data, tmp_path / "out", "judgebench"), "--reference", str(tiny_checkpoint), "--json"]
    assert main(command) == 0
    captured = capfd.readouterr()
    first, second = json.loads(captured.out)
    assert first["sections"] == second["sections"]
    assert {(each["flips"], each["p_value"]) for each in second["changes"].values()} == {(0, 1.0)}
    assert "0 (0 better, 0 worse), p = 1" in captured.err


def test_the_paper_s_numbers_stand_beside_those_of_its_models(tiny_checkpoint, data, tmp_path, capfd, wide_terminal):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "WorldPM-72B-HelpSteer2")
    assert main(arguments([model], data, tmp_path / "out", "rewardbench", "rewardbench-2")) == 0
    printed = capfd.readouterr().err
    assert "paper, Qwen/WorldPM-72B-HelpSteer2" in printed and "98.88" in printed
    sections = result(tmp_path / "out", "rewardbench", model)["sections"]
    assert sections["Reasoning"]["published"] == 0.9822 and sections["all rows"]["published"] is None
    assert published_accuracy("Qwen/WorldPM-72B", "rewardbench") == published_accuracy(None, "rmb") == {}


def test_results_are_added_to_the_parity_report(tiny_checkpoint, data, tmp_path, capfd):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "packed")
    pairs = [pair((1.0, 0.0), (0.5, 0.25), id=str(number)) for number in range(3)]
    write_report(measure_parity(pairs, SUBJECT), model)
    command = arguments([model], data, tmp_path / "out", "judgebench", "rmb")
    command += ["--reference", str(tiny_checkpoint), "--add-to-report"]
    for resume in ([], ["--resume"]):
        assert main([*command, *resume]) == 0
        report = read_report(model / "parity.json")
        assert [each.title for each in report.benchmarks] == ["JudgeBench", "RMB"]
    overall = report.benchmarks[0].sections[-1]
    assert (overall.name, overall.rows, overall.flips, overall.p_value) == ("overall", 12, 0, 1.0)
    assert overall.accuracy.value == overall.reference_accuracy
    assert "Public benchmarks" in (model / "parity.html").read_text()
    assert len(report.scores) == 3
    (model / "parity.json").unlink()
    assert main([*command, "--resume"]) == 2
    assert "--add-to-report: no model is a local directory with a parity.json" in capfd.readouterr().err


def test_a_row_that_is_too_long_is_lost_and_told(tiny_checkpoint, tmp_path, capfd):
    rows = ROWS["rewardbench"](5)
    rows[1]["chosen"] = "long " * 2000
    write_jsonl(tmp_path / "rewardbench.jsonl", rows)
    assert main(arguments([tiny_checkpoint], tmp_path, tmp_path / "out", "rewardbench")) == 0
    assert "1 rows have no scores and count as lost" in capfd.readouterr().err
    found = result(tmp_path / "out", "rewardbench", tiny_checkpoint)
    assert found["rows_without_scores"] == 1
    lost = read_jsonl(tmp_path / "out" / "rewardbench" / f"{tiny_checkpoint.name}_outputs.jsonl")[1]
    assert lost["results"] == 0 and lost["scores_chosen"] is None and "1024" in lost["error"]


def test_a_bad_row_ends_the_run_before_a_model_is_loaded(tiny_checkpoint, tmp_path, capfd, monkeypatch):
    rows = ROWS["rewardbench"](5)
    del rows[3]["subset"]
    write_jsonl(tmp_path / "rewardbench.jsonl", rows)
    monkeypatch.setattr(Scorer, "__init__", lambda *_: pytest.fail("a model was loaded"))
    assert main(arguments([tiny_checkpoint], tmp_path, tmp_path / "out", "rewardbench")) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: rewardbench.jsonl:4: the row has no 'subset', which every row of RewardBench has; give a copy of it."
    )
    assert not (tmp_path / "out").exists()


def test_results_of_another_model_or_other_rows_are_not_taken(tiny_checkpoint, other, data, tmp_path, capfd):
    command = arguments([tiny_checkpoint], data, tmp_path / "out", "ppe-human")
    assert main(command) == 0
    before = contents(tmp_path / "out")
    assert main(command) == 2
    assert "has results of an earlier run; add --resume" in capfd.readouterr().err
    assert main([*command, "--resume"]) == 0 and contents(tmp_path / "out") == before
    namesake = shutil.copytree(other, tmp_path / tiny_checkpoint.name)
    assert main([*arguments([namesake], data, tmp_path / "out", "ppe-human"), "--resume"]) == 2
    assert "is of an earlier run with another model" in capfd.readouterr().err
    write_jsonl(tmp_path / "ppe-human.jsonl", ROWS["ppe-human"](12, seed=1))
    assert main([*arguments([tiny_checkpoint], tmp_path, tmp_path / "out", "ppe-human"), "--resume"]) == 2
    assert "is of an earlier run with another rows" in capfd.readouterr().err
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_stopped_run_is_resumed_to_the_same_bytes(tiny_checkpoint, other, data, tmp_path, evaluated, call, capfd):
    command = arguments([other], data, tmp_path / "out", "rewardbench", "rmb")
    command += ["--reference", str(tiny_checkpoint)]
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, OutputFile, "write", call, KeyboardInterrupt, True)
        assert main(command) == 130
    assert "the same command with --resume continues" in capfd.readouterr().err
    assert main([*command, "--resume"]) == 0
    expected = {path: each for path, each in contents(evaluated).items() if path.startswith(("rewardbench/", "rmb/"))}
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_bytes(tiny_checkpoint, other, data, tmp_path, evaluated):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "runtime.evaluate", *arguments([other], data, output, *ROWS)]
    command += ["--reference", str(tiny_checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process, so that sums round alike
    process = start_process(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(output.glob("rm-bench/*_scores.jsonl.progress.json")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(output.glob("*/other.json"))
    subprocess.run([*command, "--resume"], cwd=ROOT, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert contents(output) == contents(evaluated)


def test_options(tmp_path):
    assert parse(["a", "b", "--benchmark", "rmb=x", "--benchmark", "ppe-math"]).models == ["a", "b"]
    with pytest.raises(ConfigurationError, match="--benchmark names one twice: rmb, rmb"):
        parse(["a", "--benchmark", "rmb=x", "--benchmark", "rmb=y"])
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigurationError, match="a file or a checkpoint"):
        parse(["a", "--benchmark", "ppe-math", "--output", str(tmp_path)])
