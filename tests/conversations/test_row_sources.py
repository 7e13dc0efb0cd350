"""The files of a directory or a pattern."""

from __future__ import annotations

import pytest

from runtime.common.errors import ConversationError
from runtime.conversations.row_sources import find_rows, list_row_files


@pytest.fixture
def data(tmp_path):
    for name in ("b.jsonl", "a.parquet", "deep/c.jsonl.gz", "notes.txt", ".hidden.jsonl", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(found, directory):
    return [str(each.relative_to(directory)) for each in found]


def test_a_directory_gives_its_row_files_in_the_order_of_their_names(data):
    assert names(list_row_files(data), data) == ["a.parquet", "b.jsonl", "deep/c.jsonl.gz"]


def test_a_pattern_gives_what_fits_it(data):
    assert names(list_row_files(f"{data}/*"), data) == ["a.parquet", "b.jsonl"]
    assert names(list_row_files(f"{data}/**/*.jsonl*"), data) == ["b.jsonl", "deep/c.jsonl.gz"]


def test_a_file_is_itself_even_if_its_name_is_a_pattern_or_it_is_missing(data):
    for name in ("rows[1].jsonl", "b.jsonl", "notes.txt"):
        (data / name).touch()
        assert names(list_row_files(data / name), data) == [name]
    assert names(list_row_files(data / "missing.jsonl"), data) == ["missing.jsonl"]


def test_nothing_to_read_is_named(data):
    with pytest.raises(ConversationError, match=r"\*\.csv: no file that ends in .jsonl, .* fits this pattern"):
        list_row_files(f"{data}/*.csv")
    (data / "empty").mkdir()
    with pytest.raises(ConversationError, match="empty has no file that ends in .jsonl"):
        list_row_files(data / "empty")


def test_of_a_directory_only_the_named_files_count_if_it_has_them(data):
    assert names(list_row_files(find_rows(data, "c.*")), data) == ["deep/c.jsonl.gz"]
    assert find_rows(data, "test-*.parquet") == str(data)
    assert find_rows(str(data / "b.jsonl"), "c.*") == str(data / "b.jsonl")
    odd = data / "[set] 1"
    odd.mkdir()
    (odd / "test-0.jsonl").touch()
    assert names(list_row_files(find_rows(odd, "test-*")), odd) == ["test-0.jsonl"]


def test_of_a_data_set_only_the_named_files_are_downloaded(data, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **arguments: asked.update(arguments) or str(data)
    )
    assert names(list_row_files(find_rows("owner/name@v1", "b.*")), data) == ["b.jsonl"]
    assert (asked["allow_patterns"], asked["revision"]) == (["*b.*"], "v1")
