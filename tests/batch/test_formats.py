from __future__ import annotations

import csv
import io
import json

import pyarrow.parquet
import pytest

from runtime.batch import formats as score_formats
from runtime.batch.formats import CSV_HEADER, encode_csv, encode_jsonl, write_parquet
from runtime.batch.row import COLUMNS

SCORE = 0.28805214166641235  # a float32
RECORDS = [
    {
        "where": "f:1",
        "id": 7,
        "scores": [SCORE, -1.5],
        "margin": SCORE + 1.5,
        "probability_chosen": 0.8,
        "tokens": [3, 4],
    },
    {"where": "f:2", "id": 'a "quoted",\nid', "category": "北", "score": 1.0, "scores": [1.0], "tokens": [2]},
    {"where": "f:3", "scores": [1.0, 2.0], "ranks": [2, 1], "best": 1, "tokens": [1, 1], "warnings": ["w, x", "y"]},
    {"where": "f:4", "labels": {"winner": "a, b", "é": [1, True], "x": -0.5}, "score": 1.0, "scores": [1.0]},
    {"where": "f:5", "error": "f:5: the row is a number 3"},
]


def test_jsonl_reads_back_unchanged():
    lines = encode_jsonl(RECORDS).decode().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    assert "北" in lines[1]


def test_csv_reads_back_by_column():
    text = (CSV_HEADER + encode_csv(RECORDS)).decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert all(list(row) == list(COLUMNS) for row in rows)
    for row, record in zip(rows, RECORDS, strict=True):
        for column in COLUMNS:
            value = record.get(column, "")
            assert row[column] == value if isinstance(value, str) else json.loads(row[column]) == value


def test_encoding_in_pieces_is_encoding_at_once():
    for encode in (encode_jsonl, encode_csv):
        assert b"".join(encode([record]) for record in RECORDS) == encode(RECORDS)


@pytest.mark.parametrize("group", [1, 3, 100])
def test_parquet_reads_back_typed(tmp_path, monkeypatch, group):
    monkeypatch.setattr(score_formats, "_GROUP_ROWS", group)
    (tmp_path / "rows").write_bytes(encode_jsonl(RECORDS))
    write_parquet(tmp_path / "rows", tmp_path / "out.parquet")
    file = pyarrow.parquet.ParquetFile(tmp_path / "out.parquet")
    assert file.num_row_groups == -(-len(RECORDS) // group)
    read = [{key: value for key, value in row.items() if value is not None} for row in file.read().to_pylist()]
    labels = json.dumps(RECORDS[3]["labels"])
    assert read == [RECORDS[0] | {"id": "7"}, *RECORDS[1:3], RECORDS[3] | {"labels": labels}, RECORDS[4]]
    assert file.schema_arrow.names == list(COLUMNS)


def test_no_rows_are_a_parquet_file_all_the_same(tmp_path):
    (tmp_path / "rows").write_bytes(b"")
    write_parquet(tmp_path / "rows", tmp_path / "out.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 0


def test_parquet_is_whole_or_absent(tmp_path):
    (tmp_path / "rows").write_bytes(encode_jsonl(RECORDS) + b"{torn")
    with pytest.raises(ValueError):
        write_parquet(tmp_path / "rows", tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", "\r", 'say "x"', "a,b", " a ", "\ud800", "é\u2028"])
def test_any_id_reads_back(tmp_path, text):
    """A bare carriage return ends a line for CSV readers; a lone surrogate is no UTF-8."""
    records = [{"where": "f:1", "id": text, "score": -0.5}, {"where": "f:2", "id": "b", "score": 1e-9}]
    lines = csv.reader(io.StringIO((CSV_HEADER + encode_csv(records)).decode(), newline=""))
    header, *rows = lines
    written = text.encode(errors="backslashreplace").decode()
    assert [dict(zip(header, row, strict=True))["id"] for row in rows] == [written, "b"]
    assert [dict(zip(header, row, strict=True))["score"] for row in rows] == ["-0.5", "1e-09"]
    assert [json.loads(line) for line in encode_jsonl(records).splitlines()] == records


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\tx", "\r=1", "\n=1", '=HYPERLINK("a","b")']
)
def test_formulas_are_escaped_on_request(text):
    records = [{"where": "=f.jsonl:1", "id": text, "category": text, "score": -0.5, "margin": -1e-9, "error": text}]
    for escape in (False, True):
        encoded = (CSV_HEADER + encode_csv(records, escape_formulas=escape)).decode()
        (row,) = csv.DictReader(io.StringIO(encoded, newline=""))
        assert row["id"] == row["category"] == row["error"] == ("'" + text if escape else text)
        assert row["where"] == ("'" if escape else "") + "=f.jsonl:1"
        assert (row["score"], row["margin"]) == ("-0.5", "-1e-09")


@pytest.mark.parametrize("text", ["-5", "+1.5", "-.5", "-1e-09", "plain", "a=b", "", "5", "-5.", "[1]"])
def test_numbers_and_other_texts_are_not_escaped(text):
    record = {"where": "f:1", "id": text}
    assert encode_csv([record], escape_formulas=True) == encode_csv([record])
