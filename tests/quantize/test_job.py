"""The job's state on disk: taken up, locked, refused, and never ahead of what is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quantize.job.recipe import Recipe
from quantize.job.state import Job, check_output_directory
from runtime.common.errors import ConfigurationError, JobError, NonFiniteError, UnresumableJobError

RECIPE = Recipe(
    model="a" * 64, conversations="b" * 64, method="gptq", calibrated=True, bits=4, errors_of="", group_size=128,
    sym=True, desc_act=False, damp_percent=0.01,
    activation_order=True, importance_scales=True, token_budget=2048, dtype="float32", device="cpu",
    repair=True,
)  # fmt: skip


def start(output: Path) -> None:
    with Job.open(output, RECIPE, resume=False) as job:
        job.finish_block("model-00002-of-00004.safetensors", "c" * 64, {"block": 0, "seconds": 1.5})


def test_a_new_job_has_nothing_done_and_room_for_its_streams(tmp_path):
    with Job.open(tmp_path / "deep" / "out", RECIPE, resume=False) as job:
        assert (job.blocks, job.shards, job.finished) == ([], {}, False)
        assert job.states_directory.is_dir()


def test_a_job_is_taken_up_where_it_stood(tmp_path):
    start(tmp_path)
    with Job.open(tmp_path, RECIPE, resume=True) as job:
        assert job.blocks == [{"block": 0, "seconds": 1.5}]
        assert job.shards == {"model-00002-of-00004.safetensors": "c" * 64}
        job.record_shard("model-00001-of-00004.safetensors", "d" * 64)
        assert not job.finished
    state = json.loads((tmp_path / "job" / "job.json").read_text())
    assert list(state["shards"].values()) == ["c" * 64, "d" * 64]


def test_other_programs_read_how_far_it_is(tmp_path):
    def progress() -> tuple:
        return tuple(json.loads((tmp_path / "job" / "job.json").read_text())["progress"].values())

    with Job.open(tmp_path, RECIPE, resume=False) as job:
        job.start_stage("gradients", 6, 2)
        assert progress() == ("gradients", 2, 6)
        job.advance()
        assert progress() == ("gradients", 3, 6)
        job.finish_gradient_pass()
        job.start_stage("blocks", 2)
        job.finish_block("shard", "c" * 64, {"block": 0})
        assert progress() == ("blocks", 1, 2)
    with Job.open(tmp_path, RECIPE, resume=True):
        assert progress() == ("blocks", 1, 2)


def test_the_log_has_a_line_for_every_block_that_counts(tmp_path, monkeypatch):
    """Killed between the two files, the log may be one line ahead, never behind."""
    with Job.open(tmp_path, RECIPE, resume=False) as job:
        monkeypatch.setattr(job, "_save", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.finish_block("shard", "c" * 64, {"block": 0})
    log = (tmp_path / "job" / "blocks.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == [{"block": 0}]
    with Job.open(tmp_path, RECIPE, resume=True) as job:
        assert job.blocks == []


def test_a_second_start_is_refused_and_told_how_to_go_on(tmp_path):
    start(tmp_path)
    with pytest.raises(JobError, match="already contains a started job; add --resume"):
        Job.open(tmp_path, RECIPE, resume=False)


def test_what_stopped_before_its_first_shard_may_begin_with_other_arguments(tmp_path):
    with Job.open(tmp_path, RECIPE, resume=False) as job:
        job.start_stage("gradients", 6)
        job.advance()
        (job.states_directory / "reference.0.bin").write_bytes(b"of another size")
    with Job.open(tmp_path, replace(RECIPE, bits=8), resume=False) as job:
        assert list(job.states_directory.iterdir()) == []


@pytest.mark.parametrize(
    "error", [ConfigurationError("too large; take fewer."), UnresumableJobError("lost; start afresh.")]
)
def test_what_resuming_does_not_mend_does_not_advise_it(tmp_path, error):
    with pytest.raises(type(error), match=f"^{error}$"), Job.open(tmp_path, RECIPE, resume=False):
        raise error


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("bits", 8, "bits was 4 and is now 8"),
        ("group_size", 64, "group_size was 128 and is now 64"),
        ("sym", False, "sym was True and is now False"),
        ("damp_percent", 0.05, "damp_percent was 0.01 and is now 0.05"),
        ("activation_order", False, "activation_order was True and is now False"),
        ("method", "nf4", "method was 'gptq' and is now 'nf4'"),
        ("token_budget", 4096, "token_budget was 2048 and is now 4096"),
        ("dtype", "bfloat16", "dtype was 'float32' and is now 'bfloat16'"),
        ("repair", False, "recalibration was True and is now False"),
        ("model", "e" * 64, r"the model differs \(--model\)"),
        ("conversations", "e" * 64, r"the conversations differ \(--calibration, --rows, --parity-pairs"),
    ],
)
def test_a_change_that_matters_is_refused_by_name(tmp_path, field, value, named):
    start(tmp_path)
    before = (tmp_path / "job" / "job.json").read_bytes()
    with pytest.raises(JobError, match=f"started with other arguments: {named}"):
        Job.open(tmp_path, replace(RECIPE, **{field: value}), resume=True)
    assert (tmp_path / "job" / "job.json").read_bytes() == before


def test_a_job_of_another_version_is_told_apart_from_a_changed_one(tmp_path):
    start(tmp_path)
    file = tmp_path / "job" / "job.json"
    state = json.loads(file.read_text())
    del state["recipe"]["importance_scales"]
    file.write_text(json.dumps(state))
    match = r"a version of the kit with other arguments \(importance_scales\); finish it with"
    with pytest.raises(JobError, match=match):
        Job.open(tmp_path, RECIPE, resume=True)


def test_all_changes_are_named_at_once(tmp_path):
    start(tmp_path)
    with pytest.raises(JobError, match=r"bits was 4 and is now 8; .*desc_act was False and is now True"):
        Job.open(tmp_path, replace(RECIPE, bits=8, desc_act=True), resume=True)


def test_finishing_lets_the_streams_go(tmp_path):
    with Job.open(tmp_path, RECIPE, resume=False) as job:
        (job.states_directory / "reference.0.bin").write_bytes(b"\0" * 64)
        job.finish()
        assert job.finished and not job.states_directory.exists()


def test_streams_that_a_kill_left_to_a_finished_job_go_on_the_next_look(tmp_path, monkeypatch):
    with Job.open(tmp_path, RECIPE, resume=False) as job:
        (job.states_directory / "reference.0.bin").write_bytes(b"\0" * 64)
        monkeypatch.setattr(job, "_remove_states", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.finish()
    with Job.open(tmp_path, RECIPE, resume=True) as job:
        assert job.finished and not job.states_directory.exists()


@pytest.mark.parametrize("file", ["notes.txt", "job/accounts.xlsx", ".hidden"])
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(JobError, match="is not empty and contains no job of this kit; choose another --output"):
        Job.open(tmp_path, RECIPE, resume=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / file]


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(JobError, match="out is a file"):
        check_output_directory(tmp_path / "out")


def test_where_nothing_can_be_written_another_output_is_asked_for(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"file/out cannot be written to: Not a directory; choose another --output"):
        Job.open(tmp_path / "file" / "out", RECIPE, resume=False)


def test_killed_before_its_first_file_a_directory_is_still_ours(tmp_path):
    (tmp_path / "job").mkdir()
    start(tmp_path)


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_directory_in_use_is_refused_until_it_is_not(tmp_path):
    start(tmp_path)
    lock = tmp_path / "job" / "lock"
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(JobError, match="is in use by another run"):
            Job.open(tmp_path, RECIPE, resume=True)
    finally:
        other.communicate("")
    with Job.open(tmp_path, RECIPE, resume=True) as job:
        assert len(job.blocks) == 1


def test_its_end_lets_another_run_in(tmp_path):
    start(tmp_path)
    with Job.open(tmp_path, RECIPE, resume=True):
        pass
    with Job.open(tmp_path, RECIPE, resume=True), pytest.raises(JobError, match="in use"):
        Job.open(tmp_path, RECIPE, resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "job.json is damaged"),
        ("[]", "job.json is damaged"),
        ('{"schema": 99}', "has schema 99, but this version writes 1"),
        ("{}", "job.json is damaged"),
    ],
)
def test_a_state_that_cannot_be_read_is_named(tmp_path, content, message):
    start(tmp_path)
    (tmp_path / "job" / "job.json").write_text(content)
    with pytest.raises(JobError, match=message):
        Job.open(tmp_path, RECIPE, resume=True)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (NonFiniteError("block 3 overflowed."), "block 3 overflowed"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"/out: no space left on device; free some space on /.*, or use another disk",
        ),
        (
            OSError(errno.EIO, "Input/output error", "/a/b.bin"),
            r"/a/b.bin: input/output error; check the disk on /, or use another one",
        ),
    ],
)
def test_what_a_user_can_mend_says_how_to_go_on(tmp_path, error, fault):
    with (
        pytest.raises(JobError, match=fault + r"\. Finished blocks are kept; run the same command with --resume"),
        Job.open(tmp_path / "out", RECIPE, resume=False),
    ):
        raise error


def test_a_buffer_that_cannot_be_removed_at_the_end_is_an_error(tmp_path, monkeypatch):
    """It may take hundreds of gigabytes, so it must not stay behind unsaid."""
    job = Job.open(tmp_path / "out", RECIPE, resume=False)
    (job.states_directory / "reference.0.bin").write_bytes(b"states")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(JobError, match="input/output error.*--resume"), job:
        patch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        job.finish()
    Job.open(tmp_path / "out", RECIPE, resume=True)
    assert not job.states_directory.exists()


def test_our_own_bugs_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), Job.open(tmp_path, RECIPE, resume=False):
        raise ZeroDivisionError
