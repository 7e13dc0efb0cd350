from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pytest

from runtime.batch.options import ScoreOptions
from runtime.batch.reader import WINDOW_ROWS, ScoreInput
from runtime.common.errors import ConfigurationError, ConversationError, JobError
from runtime.conversations.rendering import Renderer
from tests.helpers.tiny_score import assistant, mixed_rows, user, write_jsonl

LENGTH = 17  # tokens of a row of `talk`


@pytest.fixture(scope="module")
def renderer(tiny_checkpoint) -> Renderer:
    return Renderer.from_directory(tiny_checkpoint, 1024)


def talk(number: int) -> tuple[str, dict]:
    return f"f:{number}", {"id": number, "messages": [user("Q"), assistant("A")]}


def windows(rows: ScoreInput, renderer: Renderer, tokens: int, **options: bool) -> Iterator:
    return rows.windows(renderer, tokens=tokens, **({"truncate": False, "strict": False} | options))


def ids(found: Iterator) -> list[list]:
    return [[row.id for row in window] for window in found]


def test_a_window_ends_with_the_row_that_fills_it(renderer):
    full = 3 * LENGTH
    for tokens, sizes in ((full, [3, 3, 1]), (full - 1, [3, 3, 1]), (full + 1, [4, 3]), (1, [1] * 7)):
        found = ids(windows(ScoreInput(map(talk, range(7))), renderer, tokens))
        assert [len(window) for window in found] == sizes
        assert sum(found, []) == list(range(7))


def test_nothing_is_read_beyond_the_window(renderer):
    taken: list[int] = []

    def endless() -> Iterator:
        while True:
            taken.append(len(taken))
            yield talk(taken[-1])

    found = windows(ScoreInput(endless()), renderer, 3 * LENGTH)
    for count in (3, 6, 9):
        next(found)
        assert len(taken) == count


def test_rows_without_tokens_fill_a_window_too(renderer):
    rows = ScoreInput((f"f:{number}", 3) for number in range(WINDOW_ROWS + 1))
    assert [len(window) for window in windows(rows, renderer, 100)] == [WINDOW_ROWS, 1]


def test_what_follows_a_window_is_grouped_as_without_a_stop(renderer):
    placed = [(f"f:{number}", row) for number, row in enumerate(mixed_rows(60))]
    rows = ScoreInput(placed)
    whole, digests = [], []
    for window in windows(rows, renderer, 200):
        whole.append([row.id for row in window])
        digests.append(rows.digest)
    assert len(whole) > 5
    for done in (1, 3, len(whole)):
        again = ScoreInput(placed)
        again.skip(sum(map(len, whole[:done])), digests[done - 1])
        assert ids(windows(again, renderer, 200)) == whole[done:]


def test_other_rows_than_before_are_refused():
    first = ScoreInput(map(talk, range(5)))
    list(first)
    ScoreInput(map(talk, range(6))).skip(5, first.digest)  # an input may have grown
    with pytest.raises(JobError, match="the first 5 rows of the input differ from the rows"):
        ScoreInput(map(talk, range(1, 6))).skip(5, first.digest)
    with pytest.raises(JobError, match="ends after 4 rows, but 5 were scored"):
        ScoreInput(map(talk, range(4))).skip(5, first.digest)


def test_strict_stops_at_the_first_fault(renderer):
    placed = [talk(0), ("f:1", 3), talk(2)]
    with pytest.raises(ConversationError, match="f:1: the row is a number"):
        list(windows(ScoreInput(placed), renderer, 100, strict=True))
    assert ids(windows(ScoreInput(placed), renderer, 100)) == [[0, None, 2]]


def test_a_line_that_is_no_json_is_a_row_with_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ["{broken", talk(1)[1], "[1, 2]"])
    path.write_bytes(path.read_bytes() + b'"caf\xe9"\n')
    rows = list(ScoreInput.open(str(path)))
    assert [bool(row.error) for row in rows] == [True, False, True, True]
    assert rows[0].error.startswith("rows.jsonl:1: not JSON")
    assert rows[3].error.startswith("rows.jsonl:4: byte 5 of the line, 0xe9")


def test_standard_input(monkeypatch):
    lines = b'\xef\xbb\xbf{"messages": []}\n\nnull\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    rows = ScoreInput.open("-")
    assert [row.where for row in rows] == ["stdin:1", "stdin:3"]
    assert rows.count() is None


@pytest.mark.parametrize("name", ["none.jsonl", "rows.txt", "."])
def test_a_file_that_cannot_be_read_shows_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversationError, match="cannot be read|has no supported suffix|has no file"):
        ScoreInput.open(name)


def test_a_directory_is_read_as_one_input(tmp_path, renderer):
    for name, numbers in (("b.jsonl", (2, 3)), ("a.jsonl", (0, 1))):
        lines = (json.dumps(talk(number)[1]) + "\n" for number in numbers)
        (tmp_path / name).write_text("".join(lines))
    for source in (tmp_path, f"{tmp_path}/*.jsonl"):
        rows = ScoreInput.open(str(source))
        assert rows.count() == 4
        found = [row for window in windows(rows, renderer, 1) for row in window]
        assert [(row.id, row.where) for row in found] == [
            (0, "a.jsonl:1"), (1, "a.jsonl:2"), (2, "b.jsonl:1"), (3, "b.jsonl:2"),
        ]  # fmt: skip
        notes = ["a.jsonl:1: the format is messages", "b.jsonl:1: the format is messages"]
        assert rows.take_notes() == notes and not rows.take_notes()
        assert rows.formats == {"messages": "a.jsonl:1"}
    (tmp_path / "c.json").write_text("[]")
    assert ScoreInput.open(str(tmp_path)).count() is None


def test_an_output_inside_the_input_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="inside the directory of the input"):
        ScoreOptions(str(tmp_path), output=tmp_path / "deep" / "scores.jsonl")
    ScoreOptions(str(tmp_path), output=tmp_path.parent / "scores.jsonl")
