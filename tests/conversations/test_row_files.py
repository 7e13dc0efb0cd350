from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.common.errors import ConversationError
from runtime.conversations import text_lines
from runtime.conversations.row_files import count_rows, read_jsonl_file, read_rows
from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.recognise import read_row

ROWS = [
    {"prompt": "Why?", "chosen": "Because…", "rejected": "\u2028no", "category": "a"},
    {"prompt": "为什么?", "chosen": "x", "rejected": "y", "category": None},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path, content: bytes):
    if path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl.gz", LINES),
        ("rows.jsonl.zst", LINES),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n").rstrip()),
        ("rows.jsonl", b"\n \n" + LINES.replace(b"\n", b"\n\n")),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode()),
        ("rows.json.gz", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode()),
        ("rows.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}, indent=1).encode()),
        ("rows.json", LINES),
    ],
    ids=[
        "jsonl",
        "gz",
        "zst",
        "bom",
        "blank",
        "array",
        "indented",
        "json-gz",
        "columns",
        "indented-columns",
        "lines",
    ],
)
def test_every_container_gives_the_same_rows(tmp_path, name, content):
    assert [row for _, row in read_rows(write(tmp_path / name, content))] == ROWS


def test_parquet_gives_the_same_rows_over_many_batches(tmp_path):
    many = [{**ROWS[index % 2], "prompt": f"question {index}"} for index in range(200)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), tmp_path / "rows.parquet", row_group_size=50)
    read = list(read_rows(tmp_path / "rows.parquet"))
    assert [row for _, row in read] == many
    assert read[150][0] == "rows.parquet row 151"


def test_places_count_every_line_of_the_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", b"\n" + LINES.replace(b"\n", b"\n\n"))
    assert [place for place, _ in read_rows(path)] == ["rows.jsonl:2", "rows.jsonl:4"]


def test_one_object_on_several_lines_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    path = write(tmp_path / "rows.json", json.dumps(row, indent=2).encode())
    assert [row for _, row in read_rows(path)] == [row]


def test_lines_are_read_one_at_a_time(tmp_path):
    path = write(tmp_path / "rows.jsonl", LINES + b"{broken\n")
    rows = read_rows(path)
    assert next(rows)[1] == ROWS[0]
    assert next(rows)[1] == ROWS[1]
    with pytest.raises(ConversationError, match="rows.jsonl:3: not JSON at column 2, near '{broken'"):
        next(rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_faults_can_be_kept_in_their_places(tmp_path, name):
    first, second = LINES.splitlines(keepends=True)
    path = write(tmp_path / name, first + b'{broken\n"caf\xe9"\n\n' + second)
    read = list(read_rows(path, keep_errors=True))
    assert [place for place, _ in read] == [f"{name}:{number}" for number in (1, 2, 3, 5)]
    assert [read[0][1], read[3][1]] == ROWS
    with pytest.raises(ConversationError, match=f"{name}:2: not JSON"):
        raise read[1][1]
    with pytest.raises(ConversationError, match=f"{name}:3: byte 5"):
        raise read[2][1]


def test_a_file_that_is_broken_as_a_whole_is_an_error_all_the_same(tmp_path):
    for name, content in (("rows.json", b"[{},"), ("rows.parquet", LINES)):
        with pytest.raises(ConversationError):
            list(read_rows(write(tmp_path / name, content), keep_errors=True))


def test_an_open_file_is_read_as_a_named_one(tmp_path):
    content = b"\xef\xbb\xbf" + LINES
    assert list(read_jsonl_file(io.BytesIO(content), "rows.jsonl")) == list(
        read_rows(write(tmp_path / "rows.jsonl", content))
    )


def test_rows_are_counted_where_that_is_cheap(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert count_rows(tmp_path / "rows.parquet") == count_rows(write(tmp_path / "rows.jsonl", LINES)) == len(ROWS)
    assert count_rows(write(tmp_path / "rows.jsonl.gz", LINES)) is None
    assert count_rows(write(tmp_path / "rows.json", LINES)) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            LINES + b'{"prompt": "a" "b"}',
            r'rows.jsonl:3: not JSON at column 16, near .*"prompt": "',
        ),
        (
            "rows.jsonl",
            LINES + b'{"prompt": "caf\xe9"}',
            r"rows.jsonl:3: byte 16 of the line, 0xe9, is not UTF-8",
        ),
        ("rows.jsonl", '{"prompt": 1}'.encode("utf-16"), r"rows.jsonl:1: byte 1 of the line, 0xff"),
        ("rows.jsonl", b"[\n{}\n]", r"rows.jsonl:1: not JSON .* rename it to \.json"),
        ("rows.jsonl", b"[" * 100_000, r"rows.jsonl:1: "),
        ("rows.jsonl", b'{"id": ' + b"9" * 5000 + b"}", r"rows.jsonl:1: this JSON cannot be parsed"),
        ("rows.json", b'[\n{"prompt": "a"},\n{"prompt"}]', r"rows.json:3: not JSON at column 10"),
        ("rows.json", b'[\n{"prompt": "a"},\n"caf\xe9"]', r"rows.json:3: byte 5 of the line, 0xe9"),
        ("rows.json", b"[" * 100_000, r"rows.json: this JSON cannot be parsed"),
        ("rows.json", b'"text"', r"rows.json holds one str; an array of objects"),
        ("rows.json", b'{"prompt": ["a", "b"], "chosen": ["c"]}', r"differ in length"),
        ("rows.json", b'{"prompt": ["a", "b"], "version": 1}', r"differ in length"),
        ("rows.parquet", LINES, r"rows.parquet cannot be read as Parquet after row 0"),
        ("rows.txt", LINES, r"rows.txt has no supported suffix; .*\.jsonl"),
    ],
)
def test_faults_name_file_line_and_remedy(tmp_path, name, content, message):
    with pytest.raises(ConversationError, match=message):
        list(read_rows(write(tmp_path / name, content)))


@pytest.mark.parametrize("cut", [5, 40, -9, -3])
def test_a_cut_gzip_is_named(tmp_path, cut):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 50)[:cut])
    with pytest.raises(ConversationError, match="not a complete gzip file"):
        list(read_rows(path))


def test_a_damaged_zstandard_file_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl.zst", random.Random(0).randbytes(1 << 16).hex().encode())
    for content in (path.read_bytes()[:1000], LINES):
        path.write_bytes(content)
        with pytest.raises(
            ConversationError, match=r"rows.jsonl.zst cannot be read: .*; download or compress it again"
        ):
            list(read_rows(path))


def test_text_under_a_gzip_name_is_named(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(LINES)
    with pytest.raises(ConversationError, match="not a complete gzip file"):
        list(read_rows(tmp_path / "rows.jsonl.gz"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConversationError, match=r"none.jsonl cannot be read: No such file"):
        list(read_rows(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    assert list(read_rows(write(tmp_path / name, b"\n \n"))) == []


@settings(deadline=None)
@given(st.binary(max_size=60) | st.sampled_from([LINES[:50], b"[{}", b'{"prompt": [""]', b"[1,2]"]))
def test_whatever_the_bytes_only_conversation_errors_come_out(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("bytes")
    for suffix in (".jsonl", ".json", ".jsonl.gz", ".parquet"):
        path = directory / f"rows{suffix}"
        path.write_bytes(content)
        try:
            list(read_rows(path))
        except ConversationError as error:
            str(error).encode()


# ---- CSV --------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1)] * 3), min_size=1))
def test_csv_gives_the_cells_that_were_written(tmp_path_factory, rows):
    """As Python's own writer writes them; a carriage return alone ends a line there as here."""
    rows = [tuple(cell.replace("\r", "").replace("\0", "") or "x" for cell in row) for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([("prompt", "chosen", "rejected"), *rows])
    path = write(tmp_path_factory.mktemp("csv") / "rows.csv", text.getvalue().encode())
    assert [tuple(row.values()) for _, row in read_rows(path)] == rows


def test_csv_cells_are_texts_of_any_columns(tmp_path):
    path = write(tmp_path / "rows.csv", b"\xef\xbb\xbfid, query,response\r\n1,Q,A\r\n\r\n,Q,\r\n")
    (first, one), (second, two) = read_rows(path)
    assert (first, second) == ("rows.csv:2", "rows.csv:4")
    assert one == {"id": "1", "query": "Q", "response": "A"}
    assert two == {"query": "Q", "response": ""}  # without an id


def test_csv_with_both_kinds_of_columns_goes_by_the_row(tmp_path):
    path = write(tmp_path / "rows.csv", b"prompt,chosen,rejected,response\nQ,a,b,\nQ,,,c\n")
    pair, single = (read_row(row) for _, row in read_rows(path))
    assert pair.format == "pair" and single.format == "prompt-response"
    assert [turn["content"] for turn in single.conversations[0]] == ["Q", "c"]


def test_csv_columns_are_renamed_and_numbers_in_cells_are_verdicts(tmp_path):
    path = write(tmp_path / "rows.csv", b"frage,gut,schlecht\nQ,a,b\n")
    columns = RowOptions(columns={"prompt": "frage", "chosen": "gut", "rejected": "schlecht"})
    (reading,) = (read_row(row, options=columns) for _, row in read_rows(path))
    assert [each[-1]["content"] for each in reading.conversations] == ["a", "b"]
    safe = write(tmp_path / "safe.csv", b"prompt,response_0,response_1,better_response_id\nQ,a,b,1\n")
    steer = write(tmp_path / "steer.csv", b"prompt,response_1,response_2,preference_strength\nQ,a,b,2\n")
    for file in (safe, steer):
        (reading,) = (read_row(row) for _, row in read_rows(file))
        assert [each[-1]["content"] for each in reading.conversations] == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "rows.csv:1: the columns are none"),
        (b"a,b,a\n1,2,3\n", "the columns are a, b, a; the first line must name each column once"),
        (b"prompt,response\nQ,A,more\n", "rows.csv:2: the row has 3 cells but 2 columns"),
        (b'prompt,response\nQ,"A\n', "rows.csv:2: not CSV"),
        (b"prompt,response\nQ,\xff\n", "rows.csv:2: byte 3 of the line, 0xff"),
    ],
)
def test_csv_faults_name_their_line(tmp_path, content, fault):
    with pytest.raises(ConversationError, match=fault):
        list(read_rows(write(tmp_path / "rows.csv", content)))


def test_a_csv_row_with_too_many_cells_can_be_kept_as_a_fault(tmp_path):
    path = write(tmp_path / "rows.csv", b"prompt,response\nQ,A,more\nQ,A\n")
    fault, row = (row for _, row in read_rows(path, keep_errors=True))
    assert isinstance(fault, ConversationError) and row["response"] == "A"


def test_a_csv_cell_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.conversations.row_files._LONGEST_CELL", 1000)
    with pytest.raises(ConversationError, match="field larger than field limit"):
        list(read_rows(write(tmp_path / "rows.csv", b'prompt,response\nQ,"' + b"x" * 2000 + b'"\n')))


# ---- what fuzzing found ---------------------------------------------------------------------------------


def test_a_csv_row_that_spans_lines_is_placed_at_its_first(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response\n"a\nb\nc","d\ne"\n\nq,r\nq,r,s\n')
    places = [where for where, _ in read_rows(path, keep_errors=True)]
    assert places == ["rows.csv:2", "rows.csv:7", "rows.csv:8"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_an_endless_line_is_that_row_s_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_lines, "LONGEST_LINE", 1000)
    write(tmp_path / f"first-{name}", b"\xef\xbb\xbf" + b"x" * 2000)
    assert "the line has more than" in str(next(read_rows(tmp_path / f"first-{name}", keep_errors=True))[1])
    lines = [b'{"a": 1}', b'{"a": "' + b"x" * 5000 + b'"}', b'{"a": "' + b"y" * 900 + b'"}', b"z" * 3000]
    data = b"\n".join(lines)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = list(read_rows(tmp_path / name, keep_errors=True))
    assert [where for where, _ in rows] == [f"{name}:{number}" for number in (1, 2, 3, 4)]
    assert rows[0][1] == {"a": 1} and rows[2][1] == {"a": "y" * 900}
    for where, error in (rows[1], rows[3]):
        assert str(error).startswith(f"{where}: the line has more than")


def test_a_compressed_file_of_a_gigabyte_takes_little_memory(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(256):
            file.write(b" " * (1 << 20))
    tracemalloc.start()
    (row,) = read_rows(path, keep_errors=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "the line has more than 32 MiB" in str(row[1]) and peak < 160 << 20


def test_a_whole_json_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lines, "LONGEST_FILE", 100)
    path = tmp_path / "rows.json"
    path.write_text("[\n" + '{"messages": []},\n' * 50 + "{}]")
    with pytest.raises(ConversationError, match=r"rows.json has more than 0 GiB; write it as JSONL"):
        list(read_rows(path))


def test_parquet_values_that_python_cannot_hold_are_left_out(tmp_path):
    far, zone = [2**62, 1], [0, 1]
    table = pyarrow.table(
        {
            "prompt": ["a", "b"],
            "chosen": ["c", "d"],
            "when": pyarrow.array(far, pyarrow.timestamp("us")),
            "zone": pyarrow.array(zone, pyarrow.timestamp("us", tz="Nowhere/Land")),
            "took": pyarrow.array(far, pyarrow.duration("s")),
            "cost": pyarrow.array([1, 2], pyarrow.decimal128(38, 0)),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = [row for _, row in read_rows(tmp_path / "rows.parquet")]
    assert [(row["prompt"], row["chosen"]) for row in rows] == [("a", "c"), ("b", "d")]
    assert rows[0]["when"] is None and rows[0]["zone"] is None and rows[0]["cost"] == 1


def test_a_damaged_parquet_file_has_no_count(tmp_path):
    assert count_rows(write(tmp_path / "rows.parquet", b"PAR1")) is None
    assert count_rows(write(tmp_path / "rows.parquet", b"PAR1" + b"\xff" * 40 + b"\x20\0\0\0PAR1")) is None
