"""Stopped at any moment and resumed, an output ends with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.batch.output_file import OutputFile
from runtime.batch.output_state import OutputState
from runtime.batch.reader import ScoreInput
from runtime.score import main
from runtime.scorer import Scorer
from tests.helpers.interruption import raise_at_call
from tests.helpers.processes import start_process
from tests.helpers.tiny_score import mixed_rows, score, write_jsonl

pytestmark = pytest.mark.slow  # each test kills and resumes a process

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process, so that sums round alike
COUNT = 60
SUFFIXES = ("jsonl", "csv", "parquet")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("resume") / "rows.jsonl", [*mixed_rows(COUNT - 1), "{broken"])


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, rows) -> dict[str, bytes]:
    """What runs that nobody stops write."""
    for suffix in SUFFIXES:
        assert score(tiny_checkpoint, rows, "--output", rows.with_name(f"whole.{suffix}")) == 0
    return {suffix: rows.with_name(f"whole.{suffix}").read_bytes() for suffix in SUFFIXES}


def rows_written(output: Path) -> int:
    """How many rows the progress on disk counts; -1 where there is none."""
    state = OutputState.load(output)
    return -1 if state is None else state.rows


MOMENTS = {
    "as a window is scored": (Scorer, "score_each", 3, False),
    "before a window is written": (OutputFile, "write", 4, False),
    "after a window was written": (OutputFile, "write", 2, True),
    "between bytes and progress": (OutputState, "save", 4, False),
    "as the first window counts": (OutputState, "save", 2, True),
    "after the last window": (OutputFile, "finish", 1, False),
}


def test_another_machine_does_not_go_on_in_another_dtype(tiny_checkpoint, rows, tmp_path, monkeypatch, capfd):
    """Where nothing was asked for: what `auto` came to counts."""
    command = [
        str(rows),
        "--model",
        str(tiny_checkpoint),
        "--output",
        str(tmp_path / "out.jsonl"),
        "--token-budget",
        "16",
    ]
    for fast, status in ((True, 130), (False, 2)):
        monkeypatch.setattr("runtime.execution.precision_choice._cpu_is_faster_in_bfloat16", lambda fast=fast: fast)
        with pytest.MonkeyPatch.context() as patch:
            raise_at_call(patch, OutputFile, "write", 2, KeyboardInterrupt, True)
            assert main([*command, *([] if fast else ["--resume"])]) == status
    assert "dtype was 'bfloat16' and is now 'float32'" in capfd.readouterr().err
    monkeypatch.undo()
    assert main([*command, "--resume", "--devices", "cpu", "--dtype", "bfloat16"]) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_a_chosen_moment(tiny_checkpoint, rows, undisturbed, tmp_path, capfd, moment, suffix):
    output = tmp_path / f"out.{suffix}"
    owner, name, call, after = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, owner, name, call, KeyboardInterrupt, after)
        assert score(tiny_checkpoint, rows, "--output", output) == 130
    done = rows_written(output)
    assert done > 0
    assert f"stopped; {done} rows are in {output}" in capfd.readouterr().err
    assert score(tiny_checkpoint, rows, "--output", output, "--resume") == 0
    assert f"resuming after row {done}" in capfd.readouterr().err
    assert output.read_bytes() == undisturbed[suffix]
    assert [each.name for each in tmp_path.iterdir()] == [output.name]


def test_stopped_before_the_first_window_leaves_nothing(tiny_checkpoint, rows, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, OutputFile, "write", 1, KeyboardInterrupt)
        assert score(tiny_checkpoint, rows, "--output", tmp_path / "out.csv") == 130
    assert "stopped; no row was written yet" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_stopped_after_the_end_is_not_taken_for_nothing(tiny_checkpoint, rows, undisturbed, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, OutputFile, "finish", 1, KeyboardInterrupt, after=True)
        assert score(tiny_checkpoint, rows, "--output", tmp_path / "out.csv") == 130
    assert "out.csv is finished" in capfd.readouterr().err
    assert (tmp_path / "out.csv").read_bytes() == undisturbed["csv"]


def test_scored_rows_are_not_scored_again(tiny_checkpoint, rows, tmp_path, monkeypatch):
    output, calls = tmp_path / "out.jsonl", []
    real = Scorer.score_each
    monkeypatch.setattr(Scorer, "score_each", lambda self, them: (calls.append(len(them)), real(self, them))[1])
    assert score(tiny_checkpoint, rows, "--output", tmp_path / "whole.jsonl") == 0
    whole = list(calls)
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, OutputFile, "write", 4, KeyboardInterrupt)
        assert score(tiny_checkpoint, rows, "--output", output) == 130
    calls.clear()
    assert score(tiny_checkpoint, rows, "--output", output, "--resume") == 0
    assert calls == whole[3:]


def test_standard_input_is_resumed_with_the_same_rows(tiny_checkpoint, rows, tmp_path, monkeypatch, capfd):
    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    content, output = rows.read_bytes(), tmp_path / "out.jsonl"
    pipe(content)
    assert score(tiny_checkpoint, "-", "--output", tmp_path / "whole.jsonl") == 0
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, OutputFile, "write", 4, KeyboardInterrupt)
        pipe(content)
        assert score(tiny_checkpoint, "-", "--output", output) == 130
    assert "the same command with the same rows on standard input and --resume" in capfd.readouterr().err
    pipe(content[content.index(b"\n") + 1 :])
    assert score(tiny_checkpoint, "-", "--output", output, "--resume") == 2
    assert "differ from the rows that were scored before" in capfd.readouterr().err
    pipe(content)
    assert score(tiny_checkpoint, "-", "--output", output, "--resume") == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_model_or_input_is_refused(tiny_checkpoint, damaged, rows, tmp_path, capfd):
    output = tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        raise_at_call(patch, OutputFile, "write", 4, KeyboardInterrupt)
        assert score(tiny_checkpoint, rows, "--output", output) == 130
    before = output.read_bytes()
    (damaged / "config.json").write_text((damaged / "config.json").read_text() + "\n")
    (tmp_path / "other").mkdir()
    other = write_jsonl(tmp_path / "other" / "rows.jsonl", mixed_rows(COUNT, seed=1))
    for model, source, message in (
        (damaged, rows, "the model differs (--model)"),
        (tiny_checkpoint, other, "differ from the rows that were scored before"),
    ):
        capfd.readouterr()
        assert score(model, source, "--output", output, "--resume") == 2
        assert message in capfd.readouterr().err
        assert output.read_bytes() == before


def test_a_resumed_run_groups_rows_as_before_whatever_the_plan_would_be_now(tiny_checkpoint, rows, tmp_path, capfd):
    command = [str(rows), "--model", str(tiny_checkpoint), "--devices", "cpu", "--dtype", "float32", "--output"]
    output = tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.execution.placement.CPU_CHUNK_TOKENS", 24)
        patch.setattr("runtime.execution.placement.MIN_CPU_CHUNK_TOKENS", 24)
        assert main([*command, str(tmp_path / "whole.jsonl")]) == 0
        raise_at_call(patch, OutputFile, "write", 4, KeyboardInterrupt)
        assert main([*command, str(output)]) == 130
    assert OutputState.load(output).recipe["token_budget"] == 24
    for more, message in (
        (["--token-budget", "25"], "token_budget was 24 and is now 25"),
        (["--stream"], "products was"),
    ):
        assert main([*command, str(output), "--resume", *more]) == 2
        assert message in capfd.readouterr().err
    calls = []
    real = Scorer.score_each
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score_each", lambda self, them: (calls.append(self.plan), real(self, them))[1])
        assert main([*command, str(output), "--resume", "--memory", "cpu=1GiB"]) == 0
    assert len(calls) > 2 and calls[0].token_budget == 24
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- real kills -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes that start in no time, from a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.tiny_score"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", ONE_THREAD["OMP_NUM_THREADS"])
        patch.setenv("PYTHONPATH", str(ROOT))
        yield context


def score_slowly(model: Path, rows: Path, output: Path) -> None:
    """In a process of its own, with time to be killed in."""
    sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - as long as the process lives
    real = ScoreInput.__next__
    ScoreInput.__next__ = lambda self: (time.sleep(0.003), real(self))[1]  # type: ignore[method-assign]
    score(model, rows, "--output", output)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_a_random_moment(tiny_checkpoint, rows, undisturbed, processes, tmp_path, suffix, seed):
    draw, output = random.Random(f"{suffix}{seed}"), tmp_path / f"out.{suffix}"
    process = processes.Process(target=score_slowly, args=(tiny_checkpoint, rows, output))
    process.start()
    after = draw.randrange(-1, COUNT)
    while process.is_alive() and rows_written(output) <= after:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02))
    process.kill()
    process.join()
    finished = [each.name for each in tmp_path.iterdir()] == [output.name]  # its progress file went last
    if process.exitcode == 0 or (finished and output.stat().st_size):  # it was quicker, if only by its output
        assert output.read_bytes() == undisturbed[suffix]
        output.unlink()
    assert score(tiny_checkpoint, rows, "--output", output, "--resume") == 0
    assert output.read_bytes() == undisturbed[suffix]
    assert [each.name for each in tmp_path.iterdir()] == [output.name]


@pytest.mark.slow
def test_sigterm_and_ctrl_c_say_how_to_go_on(tiny_checkpoint, tmp_path):
    """The command itself, stopped once by each."""
    rows, output = write_jsonl(tmp_path / "rows.jsonl", mixed_rows(600)), tmp_path / "out.jsonl"
    assert score(tiny_checkpoint, rows, "--output", tmp_path / "whole.jsonl") == 0
    command = [sys.executable, "-m", "runtime.score", rows, "--model", tiny_checkpoint, "--devices", "cpu"]
    command += ["--dtype", "float32", "--token-budget", "16", "--output", output]
    for number, more in ((signal.SIGTERM, []), (signal.SIGINT, ["--resume"])):
        before = rows_written(output)
        process = start_process([*command, *more], cwd=ROOT, stderr=subprocess.PIPE, env=ONE_THREAD)
        while process.poll() is None and rows_written(output) <= max(0, before):
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == 130, said
        assert said.splitlines()[-1].startswith(f"stopped; {rows_written(output):,} rows are in")
        assert "Traceback" not in said
    assert score(tiny_checkpoint, rows, "--output", output, "--resume") == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_resuming_what_is_finished_succeeds_and_says_so(tiny_checkpoint, rows, tmp_path, capfd, suffix):
    """A queue that starts a job again must not see an error because the job had ended."""
    output, rows = tmp_path / f"out.{suffix}", Path(shutil.copy(rows, tmp_path / "rows.jsonl"))
    assert score(tiny_checkpoint, rows, "--output", output) == 0
    before = output.read_bytes()
    if suffix == "parquet":  # killed before it removed the rows that it was made of
        score(tiny_checkpoint, rows, "--output", tmp_path / "out.parquet.partial.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.batch.run.open_checkpoint", lambda _: pytest.fail("nothing needs the model"))
        assert score(tiny_checkpoint, rows, "--output", output, "--resume") == 0
    assert "is finished; there is nothing left to score" in capfd.readouterr().err
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {output.name, rows.name}
    os.utime(rows, (time.time() + 60,) * 2)  # rows were added since
    assert score(tiny_checkpoint, rows, "--output", output, "--resume") == 2
    assert "or its input has changed since; remove it" in capfd.readouterr().err
