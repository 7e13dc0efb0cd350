"""Targets: rows in every file format."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.fuzz.mutation import mutate_bytes, mutate_fragments, mutate_gzip, mutate_json, mutate_lines, mutate_tree
from benchmarks.fuzz.target import Target, Violation
from runtime.batch.row import InputRow
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import PreferencePair
from runtime.conversations.row_files import count_rows, read_rows
from runtime.conversations.row_shapes import pair_to_row, parse_row

Q, A, B = "What is it?", 'It, the "thing".', "naïve\n日本 🙂"
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", Q), ("assistant", A), ("assistant", B)))
ROWS: list[dict[str, Any]] = [
    {"id": "r1", "category": "long/er", "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"id": 2, "subset": "x", "prompt": Q, "chosen": A, "rejected": B},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": Q, "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    {"prompt": [USER], "responses": [A, [BAD]], "id": 0.5},
    {"messages": [{"role": "system", "content": ""}, USER, GOOD]},
]
COLUMNS = {"prompt": [Q, Q], "chosen": [A, B], "rejected": [B, A], "id": [1, None]}
MODULES = tuple(f"runtime.conversations.{name}" for name in ("row_files", "row_shapes", "text_lines", "conversation"))


def _check(name: str) -> Callable[[bytes, Path], None]:
    def check(data: bytes, scratch: Path) -> None:
        """Strict reading stops where lenient reading has its first error; rows survive being written."""
        path = scratch / name
        path.write_bytes(data)
        count_rows(path)
        lenient: list[tuple[str, Any]] = []
        error: ConversationError | None = None
        try:
            lenient.extend(islice(read_rows(path, keep_errors=True), 10_000))
        except ConversationError as found:
            error = found
        for where, row in lenient:
            _check_row(where, row)
        first = next((row for _, row in lenient if isinstance(row, ConversationError)), error)
        try:
            strict = list(islice(read_rows(path), 10_000))
        except ConversationError as found:
            if first is None or str(found) != str(first):
                raise Violation(f"strict reading says {found}, lenient {first}") from found
            raise
        if first is not None or len(strict) != len(lenient):
            raise Violation(f"strict reading passes over {first}")

    return check


def _check_row(where: str, row: Any) -> None:
    read = InputRow.read(row, where)
    read.canonical().decode()
    if read.error:
        from benchmarks.fuzz.target import check_message

        check_message(read.error)
    elif read.kind == "pair":
        pair = parse_row(row, where)
        assert isinstance(pair, PreferencePair)
        again = parse_row(json.loads(json.dumps(pair_to_row(pair))))
        if again.id != pair.id or again.category != pair.category:
            raise Violation("a pair is read back as another")


def _jsonl() -> list[bytes]:
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    return [whole, *((json.dumps(row) + "\n").encode() for row in ROWS)]


def _json() -> list[bytes]:
    return [json.dumps(ROWS, indent=1).encode(), json.dumps(COLUMNS).encode(), *_jsonl()]


def _csv() -> list[bytes]:
    tables = (
        [["id", "prompt", "chosen", "rejected", "category"], ["1", Q, A, B, ""], ["", Q, B, A, "x/y"]],
        [["prompt", "response"], [Q, A], [Q, B]],
    )
    files = []
    for table in tables:
        text = io.StringIO()
        csv.writer(text).writerows(table)
        files.append(text.getvalue().encode())
    return files


CELLS = (
    ",",
    '"',
    '""',
    "\n",
    "\r\n",
    "\r",
    "prompt",
    "chosen",
    "response",
    "rejected",
    '"a\nb"',
    "\0",
    ";",
    "\t",
    "''",
    " ",
)


def _parquet() -> list[bytes]:
    other = {"when": [1, 2], "score": [0.5, float("nan")], "flag": [True, None]}
    return [_write_parquet(rows) for rows in (ROWS[:1], ROWS[1:2] * 3, ROWS[2:3], ROWS[5:6])] + [
        _write(pyarrow.table(COLUMNS | other)),
        _write(pyarrow.table({"prompt": pyarrow.array([Q, Q]).dictionary_encode(), "chosen": [A, B]})),
    ]


def _write_parquet(rows: list[Any]) -> bytes:
    return _write(pyarrow.Table.from_pylist(rows))


def _write(table: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def mutate_parquet(data: bytes, random: Random) -> bytes:
    """Change the rows and write them again, change the types of columns, or change bytes of the file."""
    kind = random.randrange(4)
    try:
        if kind == 0:
            rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()[:20]
            return _write_parquet(mutate_tree(rows, random))
        if kind == 1:
            table = pyarrow.parquet.read_table(io.BytesIO(data))
            types = (
                pyarrow.large_string(),
                pyarrow.binary(),
                pyarrow.int64(),
                pyarrow.timestamp("us"),
                pyarrow.float16(),
            )
            column = random.randrange(table.num_columns)
            changed = table.column(column).cast(random.choice(types), safe=False)
            return _write(table.set_column(column, table.schema.names[column], changed))
    except Exception:  # not every table can be read, changed or written
        pass
    if kind == 2 and len(data) > 8:  # the footer and its length
        length = int.from_bytes(data[-8:-4], "little")
        start = max(len(data) - 8 - length, 0)
        return data[:start] + mutate_bytes(data[start:], random)
    return mutate_bytes(data, random)


def _compressed_lines() -> list[bytes]:
    whole, *_ = files = _jsonl()
    compressed = [gzip.compress(data, mtime=0) for data in (*files, b" " * 100_000)]
    return [*compressed, gzip.compress(whole, mtime=0) * 2]


TARGETS = [
    Target("jsonl", MODULES, _jsonl, mutate_lines, _check("rows.jsonl")),
    Target("json", MODULES, _json, mutate_json, _check("rows.json")),
    Target("csv", MODULES, _csv, mutate_fragments(CELLS), _check("rows.csv")),
    Target("parquet", MODULES, _parquet, mutate_parquet, _check("rows.parquet")),
    Target("gzip", MODULES, _compressed_lines, mutate_gzip(mutate_lines), _check("rows.jsonl.gz")),
]
