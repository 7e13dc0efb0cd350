"""Atomic writes and locked files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.common.errors import JobError
from runtime.common.files import atomic_file, open_locked, write_file_atomically

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
