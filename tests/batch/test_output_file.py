from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from runtime.batch.formats import CSV_HEADER, encode_csv, encode_jsonl
from runtime.batch.output_file import OutputFile, is_finished, remove_converted_rows
from runtime.batch.output_state import OutputState, progress_path
from runtime.common.errors import JobError, KitError
from runtime.common.files import open_locked

RECIPE = {"model": "f00d", "dtype": "auto", "truncate": False}
RECORDS = [{"where": f"f:{row}", "score": row / 3, "tokens": [10]} for row in range(1, 7)]
WINDOWS = [RECORDS[:3], RECORDS[3:4], RECORDS[4:]]


def begin(path: Path, *, resume: bool = False, **changes) -> OutputFile:
    return OutputFile(path, RECIPE | changes, resume=resume)


def fill(path: Path, windows=WINDOWS, *, resume: bool = False, finish: bool = True) -> None:
    """Write `windows`; without `finish`, as a process leaves it that was killed after them."""
    file = begin(path, resume=resume)
    for number, window in enumerate(windows):
        file.write(window, input_digest=f"digest {number}", formats={"pair": "f:1"})
    if finish:
        with file:
            file.finish()
    file.close()


def test_the_progress_record_names_the_formats_of_the_rows(tmp_path):
    fill(tmp_path / "out.jsonl", finish=False)
    assert json.loads((tmp_path / "out.jsonl.progress.json").read_text())["formats"] == {"pair": "f:1"}


def kill_before_first_window(path: Path, **changes) -> None:
    """Leave what a process leaves that was killed in its first window."""
    begin(path, **changes).close()
    with open(grown(path), "ab") as file:
        file.write(b"torn")


@pytest.fixture(params=["out.jsonl", "out.csv", "out.parquet"])
def path(request, tmp_path) -> Path:
    return tmp_path / "made" / request.param


@pytest.fixture
def whole(path) -> bytes:
    """What an undisturbed run writes to `path`, which is left free."""
    fill(path)
    content = path.read_bytes()
    path.unlink()
    return content


def grown(path: Path) -> Path:
    """The file that grows while `path` is written."""
    return path.with_name(f"{path.name}.partial.jsonl") if path.suffix == ".parquet" else path


def test_what_is_written(tmp_path):
    fill(tmp_path / "out.jsonl")
    fill(tmp_path / "out.csv")
    assert (tmp_path / "out.jsonl").read_bytes() == encode_jsonl(RECORDS)
    assert (tmp_path / "out.csv").read_bytes() == CSV_HEADER + encode_csv(RECORDS)


def test_a_finished_output_stands_alone(path, whole):
    fill(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("torn", [b"", b'{"where": "f:9", "sc', b'{"where": "f:9"}\n{"whe', b"f:9,,"])
def test_a_torn_window_is_dropped_and_the_rest_follows(path, whole, done, torn):
    fill(path, WINDOWS[:done], finish=False)
    with open(grown(path), "ab") as file:
        file.write(torn)
    fill(path, WINDOWS[done:], resume=True)
    assert path.read_bytes() == whole
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_counts_is_what_is_on_disk(path):
    fill(path, WINDOWS[:2], finish=False)
    state = OutputState.load(path)
    assert (state.rows, state.errors, state.tokens, state.input) == (
        4,
        0,
        40,
        "digest 1",
    )
    assert state.bytes == grown(path).stat().st_size
    assert not (path.suffix == ".parquet" and path.exists())


def test_a_run_that_was_killed_before_its_first_window_is_begun_anew(path, whole):
    """Even by another model: nothing of the first is left."""
    kill_before_first_window(path)
    fill(path, resume=False)
    assert path.read_bytes() == whole
    path.unlink()
    kill_before_first_window(path, model="another")
    fill(path, resume=True)
    assert path.read_bytes() == whole


def test_resuming_where_nothing_is_begins(path, whole):
    fill(path, resume=True)
    assert path.read_bytes() == whole


def test_an_unfinished_output_wants_resume(path):
    fill(path, WINDOWS[:1], finish=False)
    with pytest.raises(JobError, match="stopped after 3 rows; add --resume"):
        begin(path)


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_or_foreign_output_is_left_alone(path, resume):
    path.parent.mkdir()
    path.write_bytes(b"somebody's")
    with pytest.raises(JobError, match="it was not written by this command" if resume else "exists; remove it"):
        begin(path, resume=resume)
    assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [(path.name, b"somebody's")]


def test_what_is_finished_is_known_by_its_content(path):
    assert not is_finished(path, "-")
    fill(path, WINDOWS[:1], finish=False)
    assert not is_finished(path, "-")
    shutil.rmtree(path.parent)
    fill(path)
    assert is_finished(path, "-")
    path.write_bytes(b"somebody's")
    assert not is_finished(path, "-")


def test_an_empty_file_is_taken(path, whole):
    path.write_bytes(b"")
    fill(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pair"}, r"format was None and is now 'pair'"),
        ({"model": "beef"}, r"the model differs \(--model\)"),
        ({"dtype": "float32", "truncate": True}, "dtype was 'auto' and is now 'float32'; truncate was False"),
    ],
)
def test_another_recipe_is_refused(path, changes, message):
    fill(path, WINDOWS[:1], finish=False)
    before = grown(path).read_bytes()
    with pytest.raises(JobError, match=message):
        begin(path, resume=True, **changes)
    assert grown(path).read_bytes() == before


@pytest.mark.parametrize("change", [lambda old: old[:-1], lambda old: b"x" + old[1:], lambda old: b""])
def test_an_output_that_was_changed_meanwhile_is_refused(path, change):
    fill(path, WINDOWS[:2], finish=False)
    changed = change(grown(path).read_bytes())
    grown(path).write_bytes(changed)
    with pytest.raises(JobError, match="has changed since its 4 rows were written"):
        begin(path, resume=True)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"schema": 1}', '{"schema": 2}', '{"schema": 1, "rows": 1, "x": 2}']
)
def test_a_damaged_progress_is_named(path, content):
    fill(path, WINDOWS[:1], finish=False)
    progress_path(path).write_text(content)
    with pytest.raises(JobError, match=r"progress.json (is damaged|has schema 2)"):
        begin(path, resume=True)


def test_two_runs_do_not_mix(path):
    with begin(path) as first:
        with pytest.raises(JobError, match="in use by another run"):
            begin(path, resume=True)
        first.write(WINDOWS[0], "digest", {})
        with pytest.raises(JobError, match="in use by another run"):
            begin(path)


def test_a_resumed_run_takes_the_threads_it_was_begun_with(path, monkeypatch):
    fill(path, WINDOWS[:1], finish=False)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    begin(path, resume=True)
    assert used == [OutputState.load(path).threads] != [99]


# ---- ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KitError("no such device."), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_run_that_writes_nothing_leaves_nothing(path, error):
    with pytest.raises(type(error)), begin(path):
        raise error
    assert list(path.parent.iterdir()) == []


def test_a_run_killed_as_it_removes_its_first_rows_can_start_again(path, whole):
    """Rows without their record would be taken for the file of another program."""
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        begin(path) as file,
    ):
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        file._append(b"rows of the first window")
        raise KitError("stopped")
    fill(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("content", "kept"), [(encode_jsonl(RECORDS), False), (b'{"theirs": 1}\n', True)])
def test_rows_beside_the_parquet_file_made_of_them_are_removed_if_they_are_ours(tmp_path, content, kept):
    path = tmp_path / "out.parquet"
    fill(path)
    grown(path).write_bytes(content)
    remove_converted_rows(path)
    assert grown(path).exists() == kept and path.exists()


@pytest.mark.parametrize("call", ["fsync", "ftruncate"])
def test_a_disk_that_fails_is_told_with_the_file(path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(os, call, fail)
        with begin(path) as file:
            file.write(WINDOWS[0], "digest", {})
    assert str(path.parent / path.name.split(".")[0]) in caught.value.filename


class Disk:
    """A file whose disk gets full when `free` is set to False: writes are cut short, then fail."""

    free = True

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if Disk.free:
            return self.file.write(data)
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[: len(data) // 2])


def test_a_full_disk_keeps_what_counts_and_says_how_to_go_on(path, whole, monkeypatch):
    monkeypatch.setattr("runtime.batch.output_file.open_locked", lambda *given: Disk(open_locked(*given)))
    file = begin(path)
    with (
        pytest.raises(
            JobError, match=r"out.*: no space left on device; free some.* The 3 rows in .* are kept; .*--resume"
        ),
        file,
    ):
        file.write(WINDOWS[0], "digest", {})
        monkeypatch.setattr(Disk, "free", False)
        file.write(WINDOWS[1], "digest", {})
    monkeypatch.undo()
    fill(path, WINDOWS[1:], resume=True)
    assert path.read_bytes() == whole


def test_a_disk_too_full_for_the_progress_keeps_the_window_before(path, whole, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = begin(path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(JobError, match="The 3 rows"), file:
        file.write(WINDOWS[0], "digest", {})
        patch.setattr("runtime.batch.output_state.write_file_atomically", fail)
        file.write(WINDOWS[1], "digest", {})
    assert json.loads(progress_path(path).read_text())["rows"] == 3
    fill(path, WINDOWS[1:], resume=True)
    assert path.read_bytes() == whole


def test_parquet_that_could_not_be_put_together_is_tried_again(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(JobError, match="The 3 rows in .*partial.jsonl are kept"):
        patch.setattr("runtime.batch.output_file.write_parquet", fail)
        with begin(path) as file:
            file.write(WINDOWS[0], "digest", {})
            file.finish()
    assert not path.exists()
    fill(path, [], resume=True)
    assert path.exists() and not grown(path).exists()


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.jsonl").mkdir()
    for path in (tmp_path / "file" / "out.jsonl", tmp_path / "directory.jsonl"):
        with pytest.raises(JobError, match=f"{path} cannot be written to: .*; choose another --output"):
            begin(path)
