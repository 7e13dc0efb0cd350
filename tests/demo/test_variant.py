"""The demo's 4-bit variant, with a small program in place of the quantizing command."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from runtime.common.errors import JobError
from runtime.demo import variant as demo_variant
from runtime.demo.variant import DemoVariant

PROGRESS = """
import sys, time
assert sys.argv[1:4] == ["--bits", "4", "--output"] and sys.argv[5] == "--resume"
assert sys.stderr.isatty()
print("\\x1b[1mPlan\\x1b[0m", file=sys.stderr)
for block in range(3):
    print(f"\\rquantizing \\x1b[32m━━━\\x1b[0m {block}/3 mlp.down_proj loss 1.0e-03", end="", file=sys.stderr)
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


def test_progress_is_reported_line_by_line(command):
    told: list[str] = []
    command(PROGRESS + "print('\\ntook 3 s', file=sys.stderr)").make(told.append)
    assert told == [
        "quantizing the demo: Plan",
        *(f"quantizing the demo: block {block} of 3" for block in range(3)),
        "quantizing the demo: took 3 s",
    ]


def test_a_failure_has_its_last_line(command):
    with pytest.raises(JobError, match="ended with status 2: error: the disk is full"):
        command("import sys; print('error: the disk is full', file=sys.stderr); sys.exit(2)").make(lambda _: None)


def test_it_can_be_stopped(command):
    demo = command("import time; print('begun', flush=True); time.sleep(60)")
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
    assert time.monotonic() - start < 30 and "ended with status -15" in outcome[0]


@pytest.mark.parametrize("state", [None, "", "{}", "[]", json.dumps({"finished": False})])
def test_what_is_not_finished_is_not_taken(tmp_path: Path, state: str | None):
    (tmp_path / "job").mkdir()
    if state is not None:
        (tmp_path / "job" / "job.json").write_text(state)
    assert not DemoVariant(tmp_path).finished
    (tmp_path / "job" / "job.json").write_text(json.dumps({"finished": True}))
    assert DemoVariant(tmp_path).finished
