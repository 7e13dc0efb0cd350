"""The demo's 4-bit variant, with a small program in place of the quantizing command."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from quantize.job.recipe import Recipe
from quantize.job.state import Job
from runtime.common.errors import JobError
from runtime.demo import variant as demo_variant
from runtime.demo.variant import DemoVariant, JobProgress

PROGRESS = """
import json, os, sys, time
from pathlib import Path
assert sys.argv[1:4] == ["--bits", "4", "--output"] and sys.argv[5] == "--resume"
job = Path(sys.argv[4]) / "job"
job.mkdir(parents=True)
seen = Path(sys.argv[4]).with_name("seen")
for stage, total in ("gradients", 2), ("blocks", 4):
    for done in range(total + 1):
        state = {"finished": False, "progress": {"stage": stage, "done": done, "total": total}}
        (job / "new").write_text(json.dumps(state))
        os.replace(job / "new", job / "job.json")
        while not seen.exists():
            time.sleep(0.005)
        seen.unlink()
"""


STATE = """
import json, sys
from pathlib import Path
(Path(sys.argv[4]) / "job").mkdir(parents=True)
state = {"progress": {"stage": "blocks", "done": 0, "total": 4}}
(Path(sys.argv[4]) / "job" / "job.json").write_text(json.dumps(state))
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces the quantizing command by a program."""

    def put(program: str) -> DemoVariant:
        path = tmp_path / "run.py"
        path.write_text(program)
        monkeypatch.setattr(demo_variant, "_COMMAND", path)
        return DemoVariant(tmp_path / "output")

    return put


def test_progress_rises_with_the_time_that_is_left(command, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_variant, "POLL_SECONDS", 0.01)
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        (tmp_path / "seen").touch()  # the program goes on

    command(PROGRESS).make(tell)
    steps = [("gradients", 0, 2), ("gradients", 1, 2), ("gradients", 2, 2), *(("blocks", done, 4) for done in range(5))]
    begun = [f"quantizing the demo: {stage}, {done} of {of} ({100 * done // of} %)" for stage, done, of in steps]
    assert [line.partition(", about")[0] for line in told] == begun
    assert all(line.endswith(" s left") for line in told[5:7])  # from the second step, and not after the last
    assert told[3] == begun[3] and told[4] == begun[4] and told[7] == begun[7]


def test_a_job_s_own_file_is_understood(tmp_path):
    """What the quantizing command writes, from its first stage to its end."""
    solver = (True, 4, "", 128, True, False, 0.01, True, True)
    recipe = Recipe("a" * 64, "b" * 64, "gptq", *solver, 2048, "float32", "cpu", repair=True)
    demo, seen = DemoVariant(tmp_path / "demo"), []
    for resume in (False, True):
        with Job.open(demo.output, recipe, resume=resume) as job:
            if not resume:
                job.start_stage("gradients", 6)
                job.advance()
                seen.append(demo.progress)
                job.finish_gradient_pass()
            job.start_stage("blocks", 2, len(job.blocks))
            seen.append(demo.progress)
            job.finish_block(f"shard-{resume}", "c" * 64, {})
            seen.append(demo.progress)
            assert not demo.finished
            if resume:
                job.finish()
    assert seen == [("gradients", 1, 6), ("blocks", 0, 2), ("blocks", 1, 2), ("blocks", 1, 2), ("blocks", 2, 2)]
    assert demo.finished


def test_a_failure_has_its_last_lines(command, tmp_path):
    printed = "'Plan\\n\\n' + 'x' * 5000 + '\\nnote\\nerror: the disk is full'"
    program = f"import sys; print({printed}, file=sys.stderr); sys.exit(2)"
    with pytest.raises(
        JobError, match=r"ended with status 2: x{300} / note / error: the disk is full \(all of it: .*log"
    ):
        command(program).make(lambda _: None)
    assert (tmp_path / "output.log").read_text().startswith("Plan")


def test_a_killed_job_is_said_to_be_killed(command):
    program = "import os, signal; print('taking it all', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(JobError, match="was ended by SIGKILL: taking it all"):
        command(program).make(lambda _: None)


def test_it_can_be_stopped(command):
    demo = command(STATE + "import time; time.sleep(60)")
    begun, outcome = threading.Event(), []

    def make() -> None:
        try:
            demo.make(lambda _: begun.set())
        except JobError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    assert begun.wait(30)
    start = time.monotonic()
    demo.stop()
    thread.join(30)
    assert time.monotonic() - start < 30 and "was ended by SIGTERM" in outcome[0]


@pytest.mark.parametrize(
    "state", [None, "", "{}", "[]", "[" * 100_000, '{"finished": false, "progress": {"done": "1"}}']
)
def test_what_is_not_finished_is_not_taken(tmp_path: Path, state: str | None):
    (tmp_path / "job").mkdir()
    if state is not None:
        (tmp_path / "job" / "job.json").write_text(state)
    assert not DemoVariant(tmp_path).finished and DemoVariant(tmp_path).progress == JobProgress()
    (tmp_path / "job" / "job.json").write_text(json.dumps({"finished": True}))
    assert DemoVariant(tmp_path).finished
