"""Encode records as JSONL, CSV or Parquet, with the same columns in all three."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from runtime.batch.row import COLUMNS, OutputRecord
from runtime.common.files import atomic_file

OUTPUT_SUFFIXES = (".jsonl", ".csv", ".parquet")
CSV_HEADER = (",".join(COLUMNS) + "\n").encode()
_GROUP_ROWS = 16_384
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


def is_scores_file(path: Path) -> bool:
    """Whether a file begins like an output of the scoring command."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # here because the import is slow and only Parquet needs it

        try:
            return bool(pyarrow.parquet.read_schema(path).names == list(COLUMNS))
        except (OSError, pyarrow.ArrowInvalid):
            return False
    with open(path, "rb") as file:
        first = file.readline(1 << 20)
    return first == CSV_HEADER if path.suffix == ".csv" else first.startswith(b'{"where": ')


def encode_jsonl(records: Iterable[OutputRecord]) -> bytes:
    """One object per line; keys that do not apply to a row are absent."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode(errors="backslashreplace")  # a lone surrogate becomes its JSON escape


def encode_csv(records: Iterable[OutputRecord], *, escape_formulas: bool = False) -> bytes:
    """One line per record, in the columns of `CSV_HEADER`. Lists and labels are JSON; other cells may be empty.

    Args:
        escape_formulas: put an apostrophe before texts that a spreadsheet takes for formulas.
    """
    lines = (
        ",".join(_cell(record.get(column, ""), escape_formulas) for column in COLUMNS) + "\n" for record in records
    )
    return "".join(lines).encode(errors="backslashreplace")


ENCODERS: dict[str, Callable[[Iterable[OutputRecord]], bytes]] = {".jsonl": encode_jsonl, ".csv": encode_csv}


def write_parquet(lines: Path, output: Path) -> None:
    """Convert JSONL written by `encode_jsonl` to Parquet, atomically and in bounded memory.

    Values that do not apply are null. Scores are float32; `id` is converted to text, and `labels` to JSON.
    """
    import pyarrow  # here because the import is slow and only Parquet needs it
    import pyarrow.parquet

    texts, scores = pyarrow.string(), pyarrow.float32()
    types = dict.fromkeys(COLUMNS, texts) | {
        "score": scores,
        "scores": pyarrow.list_(scores),
        "margin": pyarrow.float64(),
        "probability_chosen": pyarrow.float64(),
        "ranks": pyarrow.list_(pyarrow.int32()),
        "best": pyarrow.int32(),
        "tokens": pyarrow.list_(pyarrow.int32()),
        "warnings": pyarrow.list_(texts),
    }
    schema = pyarrow.schema(list(types.items()))
    with (
        atomic_file(output) as temporary,
        open(temporary, "wb") as file,
        pyarrow.parquet.ParquetWriter(file, schema) as writer,
    ):
        for group in _groups(lines):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def _groups(lines: Path) -> Iterator[Sequence[OutputRecord]]:
    with open(lines, encoding="utf-8") as file:
        records = (_with_texts(json.loads(line)) for line in file)
        while group := list(islice(records, _GROUP_ROWS)):
            yield group


def _with_texts(record: OutputRecord) -> OutputRecord:
    """A record whose id is text and whose labels are JSON."""
    texts: dict[str, Callable[[Any], str]] = {"id": str, "labels": json.dumps}
    return record | {key: convert(record[key]) for key, convert in texts.items() if key in record}


def _cell(value: Any, escape_formulas: bool) -> str:
    """A CSV cell, quoted where it must be. The csv module does not quote a carriage return, which ends a line."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)
    if escape_formulas and text.startswith(_FORMULA_STARTS) and not _NUMBER.fullmatch(text):
        text = "'" + text
    return '"' + text.replace('"', '""') + '"' if any(character in text for character in ',"\r\n') else text
