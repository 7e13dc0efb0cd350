"""The commands that write files, on tiny random models, for `kill_test.py`."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import quantize.export
import runtime.evaluate
import runtime.parity
from runtime.common.command import run_command
from runtime.common.files import sha256_of
from runtime.demo import model as demo
from runtime.execution import streaming
from runtime.execution.block_loading import DeviceBlocks
from runtime.execution.hidden_states import HiddenStates
from runtime.execution.placement_plan import PlacementPlan
from tests.helpers.benchmark_rows import judge_bench
from tests.helpers.tiny_job import quantize as run_quantize
from tests.helpers.tiny_job import write_job_model, write_pairs
from tests.helpers.tiny_score import mixed_rows, score, write_jsonl
from tests.helpers.toy_gguf import HIDDEN, write_toy_gguf

SMALL = ("--rows", "4", "--parity-pairs", "4", "--group-size", "64")


@dataclass(frozen=True)
class Writer:
    """A command that writes below a directory.

    Attributes:
        run: runs it in that directory, `again` if it was stopped there before; returns the exit status.
        complete: what exists only when everything is written, for a command that then refuses to run again.
        grows: a file that holds finished rows and perhaps the beginning of more, while `grows`.progress.json exists.
        scratch: a path below which nothing is left at the end.
    """

    run: Callable[[Path, bool], int]
    complete: str = ""
    grows: str = ""
    scratch: str = ""


def write_inputs(place: Path) -> None:
    """Models, pairs, rows and a stand-in for the demo's wheel."""
    write_job_model(place / "model", layers=2, shards=1, intermediate=192)
    write_pairs(place / "pairs.jsonl", words=8)
    write_jsonl(place / "rows.jsonl", mixed_rows(8))
    write_jsonl(place / "judgebench.jsonl", judge_bench(6))
    write_toy_gguf(place / "toy.gguf")
    with zipfile.ZipFile(place / "toy-0-py3-none-any.whl", "w") as archive:
        archive.write(place / "toy.gguf", "toy/toy.gguf")
    shapes = {"0.weight": (HIDDEN, HIDDEN), "0.bias": (HIDDEN,), "2.weight": (1, HIDDEN), "2.bias": (1,)}
    save_file({f"score.{name}": torch.ones(shape).bfloat16() for name, shape in shapes.items()}, place / "head")


def write_packed_models(place: Path) -> None:
    """Two packed models with reference scores."""
    assert run_quantize(place / "model", place / "pairs.jsonl", place / "packed", *SMALL) == 0
    shutil.copytree(place / "packed", place / "packed-too")


def writers(place: Path) -> dict[str, Writer]:
    """All commands, by name."""

    def compare(root: Path, again: bool) -> int:
        models = [str(place / name) for name in ("packed", "packed-too")]
        return runtime.parity.main([*models, "--devices", "cpu", "--dtype", "float32", "--output", str(root / "out")])

    def evaluate(root: Path, again: bool) -> int:
        flags = ["--benchmark", f"judgebench={place / 'judgebench.jsonl'}", "--output", str(root / "out")]
        flags += ["--devices", "cpu", "--dtype", "float32", "--token-budget", "16", *(["--resume"] if again else [])]
        return runtime.evaluate.main([str(place / "model"), *flags])

    def export(root: Path, again: bool) -> int:
        flags = ["--tensor-parallel", "2", "--output", str(root / "out")]
        return quantize.export.main([str(place / "packed"), *flags])

    return {
        "quantize": _quantizing(place),
        "quantize-mixed": _quantizing(place, "--bits", "5"),
        "score-jsonl": _scoring(place, "scores.jsonl"),
        "score-csv": _scoring(place, "scores.csv"),
        "score-parquet": _scoring(place, "scores.parquet", ".partial.jsonl"),
        "score-streamed": _scoring(place, "scores.jsonl", "", "--stream"),
        "parity": Writer(compare),
        "evaluate": Writer(evaluate, grows="out/judgebench/model_scores.jsonl"),
        "export": Writer(export, complete="out"),
        "demo": _building_the_demo(place / "toy-0-py3-none-any.whl", place / "head"),
    }


def _quantizing(place: Path, *more: str) -> Writer:
    def run(root: Path, again: bool) -> int:
        flags = [*SMALL, *more, *(["--resume"] if again else [])]
        return run_quantize(place / "model", place / "pairs.jsonl", root / "out", *flags)

    return Writer(run, scratch="out/job/streams")


def _scoring(place: Path, name: str, growing_suffix: str = "", *more: str) -> Writer:
    """Score to the file `name`; with --stream, hidden states are in files."""
    make = streaming._make_hidden_states

    def make_in_files(blocks: DeviceBlocks, plan: PlacementPlan, *rest: Any) -> HiddenStates:
        blocks.share = replace(blocks.share, spare_bytes=0)
        return make(blocks, replace(plan, spare_host_bytes=0), *rest)

    def run(root: Path, again: bool) -> int:
        streaming._make_hidden_states = make_in_files
        flags = [*more, *(["--resume"] if again else [])]
        return score(place / "model", place / "rows.jsonl", "--output", root / name, *flags)

    return Writer(run, grows=name + growing_suffix)


def _building_the_demo(wheel: Path, head: Path) -> Writer:
    def fetch(directory: Path) -> None:
        shutil.copyfile(wheel, directory / wheel.name)

    def build(*_: object) -> int:
        demo.demo_directory(fetch)
        return 0

    def run(root: Path, again: bool) -> int:
        demo.WHEEL_SHA256, demo.HEAD_FILE = sha256_of(wheel), head
        os.environ["XDG_CACHE_HOME"] = str(root)
        return run_command(lambda _: None, build, lambda _: "stopped", [])

    return Writer(run)


def prepare_process(root: Path) -> None:
    """Settings of every run: temporary files are below `root`, and nothing measures the machine."""
    import tempfile

    tempfile.tempdir = str(root / "tmp")
    torch.set_num_threads(1)
    sys.modules["quantize.job.plan_table"].matmul_rate = lambda *_: 1e10  # type: ignore[attr-defined]
