"""Killed at any moment and resumed, a job ends with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantize.gradients.backward_sweep import BackwardSweep
from quantize.gradients.statistics import BlockGradients
from quantize.job.state import Job
from quantize.sweep.checkpoint_writer import CheckpointWriter
from quantize.sweep.hidden_states import SweepStates
from runtime.evaluation.reference_scores import ReferenceScores
from tests.helpers.interruption import raise_at_call
from tests.helpers.processes import start_process
from tests.helpers.tiny_job import arguments, digests, quantize, write_job_model, write_pairs

pytestmark = pytest.mark.slow  # each test runs a quantization two or three times

LAYERS = 4
SMALL = ("--rows", "8", "--parity-pairs", "6")
ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process, so that sums round alike


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    monkeypatch.setattr("quantize.job.plan_table.matmul_rate", lambda *_: 1e10)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with `model` and `pairs.jsonl`."""
    place = tmp_path_factory.mktemp("resume")
    write_job_model(place / "model", layers=LAYERS)
    write_pairs(place / "pairs.jsonl", words=12)
    return place


def run(place: Path, output: Path, *more: str) -> int:
    return quantize(place / "model", place / "pairs.jsonl", output, *SMALL, *more)


@pytest.fixture(scope="module")
def undisturbed(place) -> dict[str, str]:
    """What a run that nobody stops writes."""
    assert run(place, place / "undisturbed") == 0
    return digests(place / "undisturbed")


def finished_blocks(output: Path) -> int:
    """How many blocks the state on disk counts; -1 before there is one."""
    try:
        return len(json.loads((output / "job" / "job.json").read_text())["blocks"])
    except OSError:
        return -1


def leftovers(output: Path) -> list[str]:
    """Files of the job's making that no finished job has."""
    return [path.name for path in output.rglob("*") if path.suffix in (".partial", ".bin")]


class Pulled(BaseException):
    """The plug."""


RUN, QUANTIZER, WRITER = (
    sys.modules[f"quantize.{name}"] for name in ("run", "sweep.linear_quantizer", "sweep.checkpoint_writer")
)
MOMENTS = {
    "as the streams are opened": (RUN, "SweepStates", 1),
    "in the forward half of the backward sweep": (BackwardSweep, "_forward", 3),
    "in its backward half": (BackwardSweep, "_backward", 4),
    "as statistics are written": (BlockGradients, "save", 2),
    "before a pass counts": (Job, "finish_gradient_pass", LAYERS + 2),
    "as its buffers are removed": (BackwardSweep, "remove_buffers", 1),
    "before the first embedding": (SweepStates, "embed", 1),
    "as the embedding is written": (CheckpointWriter, "write_embedding", 1),
    "between two linears": (QUANTIZER, "solve", 3 * 7 + 5),
    "in a factorisation": (QUANTIZER, "factorise", 2),
    "as a shard is written": (WRITER, "write_safetensors", 4),
    "as the streams are synced": (SweepStates, "sync", 2),
    "before a block counts": (Job, "finish_block", 3),
    "as a block is recorded": (Job, "_save", 4 * LAYERS + 3 + 3),
    "before the streams turn over": (SweepStates, "swap_buffers", 3),
    "after the last block": (SweepStates, "swap_buffers", LAYERS),
    "before the scores": (RUN, "compute_final_scores", 1),
    "in the comparison": (RUN, "build_parity_report", 1),
    "as the head is written": (CheckpointWriter, "write_head", 1),
    "before the index": (CheckpointWriter, "write_index", 1),
    "before the configuration": (CheckpointWriter, "write_config", 1),
    "before the tokenizer": (CheckpointWriter, "copy_tokenizer", 1),
    "before the reference scores": (ReferenceScores, "save", 1),
    "before the report": (RUN, "write_report", 1),
    "before the card": (RUN, "render_card", 1),
    "as it is read back": (RUN, "open_checkpoint", 1),
    "before it is finished": (Job, "finish", 1),
    "as the streams are dropped": (Job, "_remove_states", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_a_chosen_moment(place, undisturbed, tmp_path, moment):
    owner, name, call = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, owner, name, call, Pulled)
        with pytest.raises(Pulled):
            run(place, tmp_path / "out")
    assert run(place, tmp_path / "out", "--resume") == 0
    assert digests(tmp_path / "out") == undisturbed
    assert leftovers(tmp_path / "out") == []


def test_a_resume_takes_the_threads_that_the_job_was_started_with(place, undisturbed, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, Job, "finish_block", 2, Pulled)
        with pytest.raises(Pulled):
            run(place, tmp_path / "out")
    before, used = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    assert run(place, tmp_path / "out", "--resume") == 0
    assert used == [before]
    assert digests(tmp_path / "out") == undisturbed


def test_stopped_again_and_again(place, undisturbed, tmp_path):
    """Each time a block further."""
    for call, more in ((1, []), (1, ["--resume"]), (1, ["--resume"])):
        with pytest.MonkeyPatch.context() as patch:
            raise_at_call(patch, Job, "finish_block", call, Pulled, after=True)
            with pytest.raises(Pulled):
                run(place, tmp_path / "out", *more)
    assert finished_blocks(tmp_path / "out") == 3
    assert run(place, tmp_path / "out", "--resume") == 0
    assert digests(tmp_path / "out") == undisturbed


def test_finished_blocks_are_not_read_again(place, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, Job, "finish_block", 2, Pulled)
        with pytest.raises(Pulled):
            run(place, tmp_path / "out")
    read = []
    real = RUN.open_checkpoint.__globals__["Checkpoint"].read_block
    monkeypatch.setattr(
        "runtime.checkpoints.checkpoint.Checkpoint.read_block",
        lambda self, index: (read.append((self.quantization is None, index)), real(self, index))[1],
    )
    assert run(place, tmp_path / "out", "--resume") == 0
    assert read == [(True, 1), (True, 2), (True, 3)]


OTHERS = [("--parity-pairs", "0"), ("--bits", "4.5"), ("--method", "nf4"), ("--method", "int8", "--rows", "0")]


@pytest.mark.parametrize("more", OTHERS)
def test_other_jobs_resume_too(place, tmp_path, more):
    """Without parity pairs there is no noise floor, without rows nothing to calibrate on."""
    assert run(place, tmp_path / "whole", *more) == 0
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, SweepStates, "swap_buffers", 2, Pulled)
        with pytest.raises(Pulled):
            run(place, tmp_path / "out", *more)
    assert run(place, tmp_path / "out", *more, "--resume") == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_streams_that_were_lost_are_named(place, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, SweepStates, "swap_buffers", 2, Pulled)
        with pytest.raises(Pulled):
            run(place, tmp_path / "out")
    (tmp_path / "out" / "job" / "streams" / "quantized.0.bin").unlink()
    assert run(place, tmp_path / "out", "--resume") == 2
    assert "quantized.0.bin is missing or not" in capfd.readouterr().err


# ---- real kills -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes that start in no time, from a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.tiny_job"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", ONE_THREAD["OMP_NUM_THREADS"])
        patch.setenv("PYTHONPATH", str(ROOT))
        yield context


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_a_random_moment(place, undisturbed, processes, tmp_path, seed):
    draw, output = random.Random(seed), tmp_path / "out"
    process = processes.Process(target=run_quietly, args=(place, output))
    process.start()
    wait_for(lambda: finished_blocks(output) >= draw.randrange(-1, LAYERS), process)
    time.sleep(draw.uniform(0, 0.3))
    process.kill()
    process.join()
    assert run(place, output, "--resume") == 0
    assert digests(output) == undisturbed
    assert leftovers(output) == []


def run_quietly(place: Path, output: Path) -> None:
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - as long as the process lives
    run(place, output)


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process | subprocess.Popen) -> None:
    """Until it holds or the process is gone."""
    alive = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    while alive() and not condition():
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_and_ctrl_c_say_how_to_go_on(place, undisturbed, tmp_path):
    """The command itself, stopped once by each."""
    output = tmp_path / "out"
    command = [sys.executable, "quantize/run.py", *arguments(place / "model", place / "pairs.jsonl", output, *SMALL)]
    for number, more in ((signal.SIGTERM, []), (signal.SIGINT, ["--resume"])):
        before = finished_blocks(output)
        process = start_process([*command, *more], cwd=ROOT, stderr=subprocess.PIPE, env=ONE_THREAD)
        wait_for(lambda before=before: finished_blocks(output) > max(0, before), process)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == 130, said
        assert said.splitlines()[-1].startswith("stopped; finished blocks are kept") and "Traceback" not in said
    assert run(place, output, "--resume") == 0
    assert digests(output) == undisturbed
