"""The GPU benchmark runs without a GPU, and a failing figure does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_figures_at_toy_size(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--toy", "--work", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = [json.loads(line) for line in run.stdout.splitlines()]
    assert not any("failed" in figure for figure in figures)
    assert {figure["figure"] for figure in figures} == {
        *("matmul_peak", "dequantize", "float8", "attention", "block_forward", "quantize_block"),
        *("write_model", "load", "model_forward", "streamed_against_resident"),
    }
    assert not any(tmp_path.iterdir())


@torch.inference_mode()
def test_a_figure_that_fails_leaves_the_others(monkeypatch, capsys):
    bench = Bench("cpu", divide=32, work=None)
    bench.seconds, bench.__dict__["rate"] = 0.01, 1e12
    real = bench.random_block.linear

    def linear(name, kind):
        if kind == "gptq-4":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(name, kind)

    monkeypatch.setattr(bench.random_block, "linear", linear)
    bench.attempt("forward", bench.forward)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [figure.get("kind") for figure in said] == ["16-bit", None, "gptq-4 fp8", "nf4"]
    assert said[1] == {"figure": "block gptq-4", "failed": "OutOfMemoryError: CUDA out of memory"}
    assert bench.failed
