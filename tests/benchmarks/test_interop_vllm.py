"""The vLLM benchmark, with a stand-in for vLLM.

`VLLM_PYTHON=path/to/vllm/bin/python` also runs the last test, with vLLM from its own environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.export import main as export
from runtime.scorer import Scorer
from tests.helpers.tiny_job import quantize, write_job_model, write_pairs

pytestmark = pytest.mark.slow  # scores bundled rows in a process

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "interop_vllm.py"

# A vLLM whose scores are 0.5 above ours, in the last row, and only if they are asked for as they should be.
STANDIN = """
import json
__version__ = "0"
class PoolingParams:
    def __init__(self, use_activation): assert use_activation is False
class Tensor(list):
    def flatten(self): return self
class LLM:
    def __init__(self, directory, runner, dtype, **options):
        prepared = json.load(open("prepared.json"))
        (self.ours,) = [each["float32"] for each in prepared["models"].values() if each["directory"] == directory]
        assert runner == "pooling" and options["max_model_len"] >= max(map(len, prepared["token_ids"]))
    def encode(self, prompts, pooling_task, pooling_params, use_tqdm):
        assert pooling_task == "token_classify"
        make = lambda data: type("Output", (), {"outputs": type("Data", (), {"data": Tensor(data)})})
        return [make([99.0, our + 0.5]) for prompt, our in zip(prompts, self.ours, strict=True)]
"""


def interop(python: str | Path, *arguments: str | Path, cwd: Path) -> list[dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    run = subprocess.run([python, SCRIPT, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A directory with `prepared.json` of a tiny model, packed and padded."""
    place = tmp_path_factory.mktemp("interop")
    write_job_model(place / "model", layers=2, intermediate=320)
    write_pairs(place / "pairs.jsonl")
    assert quantize(place / "model", place / "pairs.jsonl", place / "packed", "--group-size", "64") == 0
    assert export([str(place / "packed"), "--tensor-parallel", "2", "--output", str(place / "padded")]) == 0
    models = [place / "model", place / "packed", place / "padded"]
    interop(sys.executable, "prepare", *models, "--output", "prepared.json", "--count", "6", cwd=place)
    return place


def test_what_is_prepared_is_ours(prepared):
    content = json.loads((prepared / "prepared.json").read_text())
    assert [each["layout"] for each in content["models"].values()] == ["16-bit", "gptq-4", "gptq-4"]
    assert [each["intermediate_size"] for each in content["models"].values()] == [320, 320, 512]
    assert len(content["token_ids"]) == 6
    end = Scorer.from_pretrained(prepared / "model", devices="cpu").renderer.render(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert {ids[-1] for ids in content["token_ids"]} == {end.token_ids[-1]}
    unpadded, padded = (content["models"][str(prepared / name)]["float32"] for name in ("packed", "padded"))
    assert padded == pytest.approx(unpadded, abs=1e-6)


def test_differences_are_in_standard_deviations(prepared):
    (prepared / "vllm.py").write_text(STANDIN)
    lines = interop(sys.executable, "run", "prepared.json", cwd=prepared)
    (prepared / "vllm.py").unlink()
    asked = [(line["model"], line["dtype"]) for line in lines]
    assert asked == [
        ("model", "float32"),
        ("model", "float16"),
        ("model", "bfloat16"),
        ("packed", "float16"),
        ("packed", "bfloat16"),
        ("padded", "float16"),
        ("padded", "bfloat16"),
    ]
    for line in lines:
        assert line["difference"]["max"] == pytest.approx(0.5 / line["score_std"], rel=0.01)
        assert line["difference"]["mean"] == pytest.approx(line["difference"]["max"], rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs vLLM, in an environment that VLLM_PYTHON names")
def test_vllm_gives_our_scores(prepared):
    lines = interop(os.environ["VLLM_PYTHON"], "run", "prepared.json", cwd=prepared)
    worst = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}
    assert len(lines) == 7
    for line in lines:
        assert line["difference"]["max"] < worst[line["dtype"]], line


@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs vLLM, in an environment that VLLM_PYTHON names")
def test_vllm_reads_the_rules_of_mixed_bits(prepared, tmp_path):
    mixed = tmp_path / "mixed"
    assert quantize(prepared / "model", prepared / "pairs.jsonl", mixed, "--group-size", "64", "--bits", "5") == 0
    interop(sys.executable, "prepare", mixed, "--output", "mixed.json", "--count", "2", cwd=prepared)
    (line,) = interop(os.environ["VLLM_PYTHON"], "rules", "mixed.json", cwd=prepared)
    assert line == {"model": "mixed", "linears": 8, "read_alike": 8}
