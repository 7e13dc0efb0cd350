"""Atomic writes and locked files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.common.command import run_command
from runtime.common.errors import JobError
from runtime.common.files import atomic_file, open_locked, scratch_directory, write_file_atomically
from runtime.common.safetensors_writer import write_safetensors

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from runtime.common.files import open_locked
file = open_locked(Path(sys.argv[1]), "ab+", Path("out"))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_failed_write_keeps_the_old_content(tmp_path):
    write_file_atomically(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_full_disk_is_told_with_the_file_the_disk_and_the_remedy(tmp_path, monkeypatch, capfd, call):
    """The system's error names no file."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert run_command(lambda _: None, lambda *_: write_file_atomically(tmp_path / "file", "text"), str, []) == 2
    disk = next(str(parent) for parent in tmp_path.parents if parent.is_mount())
    said = f"error: {tmp_path / 'file'}: no space left on device; free some space on {disk}, or use another disk.\n"
    assert capfd.readouterr().err == said
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_command_began_has_no_traceback(capfd):
    def interrupt(_):
        raise KeyboardInterrupt

    assert run_command(interrupt, lambda *_: 0, str, []) == 130
    assert capfd.readouterr().err == "stopped.\n"


def test_a_scratch_directory_is_empty_and_goes(tmp_path):
    path = tmp_path / "scratch"
    (path / "of a killed run").mkdir(parents=True)
    with scratch_directory(path):
        assert path.is_dir() and not any(path.iterdir())
        (path / "file").touch()
    assert not path.exists()
    path.write_text("a file of an earlier version")
    with scratch_directory(path):
        assert path.is_dir()


def test_a_killed_safetensors_write_leaves_nothing_that_the_next_one_does_not_find(tmp_path):
    """The library writes to a file with a random name beside its target."""
    program = """
import os, sys
from pathlib import Path
import torch
from runtime.common import safetensors_writer
safetensors_writer.publish_file = lambda file, path: (file.parent.joinpath(".tmpRANDOM").touch(), os._exit(9))
safetensors_writer.write_safetensors(Path(sys.argv[1]), {"t": torch.ones(3)})
"""
    path = tmp_path / "model.safetensors"
    assert subprocess.run([sys.executable, "-c", program, path], cwd=ROOT).returncode == 9
    assert [file.name for file in tmp_path.iterdir()] == [".model.safetensors.partial"]
    write_safetensors(path, {"t": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [path]


def test_a_locked_file_is_refused_until_its_holder_is_killed(tmp_path):
    path = tmp_path / "file"
    path.write_text("rows")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(JobError, match="out is in use by another run"):
            open_locked(path, "ab+", Path("out"))
    finally:
        holder.kill()
        holder.communicate()
    with open_locked(path, "ab+", Path("out")):
        assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "rows")]


def test_the_umask_is_read_without_changing_it(tmp_path, monkeypatch):
    """Another thread may create a file at any moment."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was set"))
        write_file_atomically(tmp_path / "a", "text")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        monkeypatch.undo()
        os.umask(before)
