"""transformers gives our scores, with gptqmodel for GPTQ and bitsandbytes for NF4 and int8.

`benchmarks/readers.py` runs in a child process, since gptqmodel patches transformers on import.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.tiny_job import quantize, write_job_model, write_pairs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BITSANDBYTES = {"nf4": ("--method", "nf4"), "int8": ("--method", "int8")}
GPTQ = {
    "gptq-4": ("--bits", "4"),
    "gptq-8": ("--bits", "8"),
    "gptq-4-small-groups": ("--group-size", "32"),
    "gptq-8-one-group": ("--bits", "8", "--group-size", "-1"),
    "gptq-4-desc-act": ("--desc-act", "--group-size", "32"),
    "gptq-4-asymmetric": ("--asymmetric",),
    "gptq-8-asymmetric": ("--bits", "8", "--asymmetric"),
    "rtn": ("--method", "rtn"),
}
WORST = {"widened": 1e-4, "float32": 0.02, "stored": 0.5}  # differences in standard deviations of a score

Readings = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` and `pairs.jsonl`."""
    place = tmp_path_factory.mktemp("readers")
    write_job_model(place / "model", layers=2)
    write_pairs(place / "pairs.jsonl")
    return place


def read_all(place: Path, variants: dict[str, tuple[str, ...]], *more: Path) -> Readings:
    """Quantize every variant and let the others read it: variant -> reading -> largest difference and so on."""
    for name, options in variants.items():
        assert quantize(place / "model", place / "pairs.jsonl", place / name, *options) == 0
    command = [sys.executable, str(ROOT / "benchmarks" / "readers.py"), "--count", "8"]
    command += ["--calibration", str(place / "pairs.jsonl"), *map(str, more), *(str(place / name) for name in variants)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    lines = map(json.loads, run.stdout.splitlines())
    return {Path(line["model"]).name: line for line in lines}


@pytest.fixture(scope="module")
def through_bitsandbytes(place: Path) -> Readings:
    return read_all(place, BITSANDBYTES, place / "model")


@pytest.fixture(scope="module")
def through_gptqmodel(place: Path) -> Readings:
    if not (find_spec("gptqmodel") and find_spec("optimum")):
        pytest.skip("needs the interop extra")
    return read_all(place, GPTQ)


@pytest.mark.parametrize("name", ["model", *BITSANDBYTES])
def test_transformers_with_bitsandbytes_gives_our_scores(through_bitsandbytes: Readings, name: str):
    check(through_bitsandbytes[name])


@pytest.mark.parametrize("name", GPTQ)
def test_transformers_with_gptqmodel_gives_our_scores(through_gptqmodel: Readings, name: str):
    check(through_gptqmodel[name])


def check(readings: dict[str, dict[str, float]]) -> None:
    """Equal where nothing is rounded; in the reader's own arithmetic as near as that is."""
    assert readings["score_std"] > 0.01
    assert readings["widened"]["max"] < WORST["widened"]
    for reading in ("float32", "stored"):
        assert readings[reading]["max"] < WORST["stored"]
    if readings["layout"].startswith("gptq"):
        assert readings["float32"]["max"] < WORST["float32"]
