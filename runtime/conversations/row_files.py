"""Read JSONL, JSON, CSV and Parquet files row by row, each row with its location.

Rows are decoded but not interpreted; see `runtime.conversations.rows`.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.common.errors import ConversationError
from runtime.conversations.row_sources import INPUT_SUFFIXES, is_row_file
from runtime.conversations.rows.recognise import EXAMPLE as PAIR_EXAMPLE
from runtime.conversations.text_lines import decode_line, number_lines, read_lines, read_text

_BATCH_ROWS = 64
_LONGEST_CELL = 1 << 24  # characters; after an unclosed quotation mark the rest of the file is one cell


def read_rows(path: Path, *, keep_errors: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) for every row of a file; a location is ``pairs.jsonl:12`` or ``pairs.parquet row 12``.

    JSONL, CSV and Parquet are streamed. A JSON array, or an object of columns, is read into memory. JSONL in a `.json`
    file is recognised. Blank lines are skipped. CSV needs a header; its cells are text.

    Args:
        path: ends in one of `INPUT_SUFFIXES`.
        keep_errors: yield the ConversationError in place of a row that is no JSON or has the wrong number of CSV cells,
            and go on. By default it is raised.

    Raises:
        ConversationError: the file cannot be opened or is not in the format of its suffix, with line and column.
    """
    if not is_row_file(path):
        raise ConversationError(
            f"{path} has no supported suffix; a file that ends in {', '.join(INPUT_SUFFIXES)} was expected."
        )
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.name.endswith(".csv"):
            yield from _csv_rows(path, keep_errors)
        elif ".jsonl" in path.suffixes[-2:]:
            yield from _jsonl_rows(read_lines(path), keep_errors)
        else:
            yield from _json_rows(path, keep_errors)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConversationError(
            f"{path} is not a complete gzip file ({error}); download or compress it again."
        ) from error
    except OSError as error:
        damaged = path.suffix == ".zst" and error.errno is None  # an error of the decompression
        hint = "; download or compress it again" if damaged else ""
        raise ConversationError(f"{path} cannot be read: {error.strerror or error}{hint}.") from error


def read_jsonl_file(file: BinaryIO, name: str, *, keep_errors: bool = False) -> Iterator[tuple[str, Any]]:
    """Like `read_rows` for an open JSONL file such as standard input; locations are ``name:12``."""
    return _jsonl_rows(number_lines(file, name), keep_errors)


def count_rows(path: Path) -> int | None:
    """Approximate number of rows: from the Parquet footer or the line ends of JSONL; None for other formats.

    None for a damaged file too: reading its rows raises the error.
    """
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError):
            return None
    if not path.name.endswith(".jsonl"):
        return None
    with open(path, "rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


def _jsonl_rows(lines: Iterable[tuple[str, bytes]], keep_errors: bool) -> Iterator[tuple[str, Any]]:
    for where, line in lines:
        row: Any
        try:
            text = decode_line(line, where)
            if not text.strip():
                continue
            row = _parse(text, where)
        except ConversationError as row_error:
            if not keep_errors:
                raise
            row = row_error
        yield where, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = text[max(error.pos - 20, 0) : error.pos + 20].strip()
        hint = " If the file is one JSON array, rename it to .json." if text.lstrip().startswith("[") else ""
        raise ConversationError(
            f"{where}: not JSON at column {error.colno}, near {found!r} ({error.msg}); "
            f"each line must be one object such as {PAIR_EXAMPLE}.{hint}"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ConversationError(f"{where}: this JSON cannot be parsed ({error}); fix or remove the line.") from None


def _json_rows(path: Path, keep_errors: bool) -> Iterator[tuple[str, Any]]:
    lines = read_lines(path)
    where, first = next((line for line in lines if line[1].strip()), ("", b""))
    try:
        row = json.loads(decode_line(first, where))
    except (ValueError, RecursionError, ConversationError):
        row = None  # the first line alone is no JSON
    if isinstance(row, dict) and not _is_columns(row):
        yield where, row
        yield from _jsonl_rows(lines, keep_errors)
    elif first:
        for number, row in enumerate(_whole_json(path), start=1):
            yield f"{path.name} row {number}", row


def _whole_json(path: Path) -> list[Any]:
    """The rows of a JSON array or of an object of columns."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConversationError(
            f"{path.name}:{error.lineno}: not JSON at column {error.colno} ({error.msg}); "
            f"an array of objects such as {PAIR_EXAMPLE} was expected."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{path.name}: this JSON cannot be parsed ({error}); fix the file.") from None
    if isinstance(value, dict):
        return _rows_of_columns(value, path.name) if _is_columns(value) else [value]
    if not isinstance(value, list):
        raise ConversationError(
            f"{path.name} holds one {type(value).__name__}; an array of objects such as {PAIR_EXAMPLE} was expected."
        )
    return value


def _is_columns(value: dict[str, Any]) -> bool:
    """Whether an object is a table of columns, which hold lists of texts or of lists.

    A row may have such lists too (RewardBench 2), but not as its prompt.
    """
    prompts = [value[key] for key in ("prompt", "question", "instruction", "query") if value.get(key) is not None]
    columns = prompts or [value.get(key) for key in ("chosen", "rejected", "messages")]
    return any(isinstance(column, list) and column and isinstance(column[0], (str, list)) for column in columns)


def _rows_of_columns(columns: dict[str, Any], name: str) -> list[dict[str, Any]]:
    lengths = {key: len(column) for key, column in columns.items() if isinstance(column, list)}
    if len(lengths) < len(columns) or len(set(lengths.values())) != 1:
        raise ConversationError(
            f"{name}: the columns differ in length ({lengths}); every column needs one entry per row."
        )
    return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]


def _csv_rows(path: Path, keep_errors: bool) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader((decode_line(line, where) for where, line in read_lines(path)), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        if not any(header) or len(set(header)) < len(header):
            raise ConversationError(
                f"{path.name}:1: the columns are {', '.join(header)[:200] or 'none'}; the first line must name each "
                "column once, such as prompt,chosen,rejected."
            )
        while True:
            where = f"{path.name}:{lines.line_num + 1}"  # a row may span lines; it is placed at its first
            if (cells := next(lines, None)) is None:
                break
            if len(cells) == len(header):
                row = dict(zip(header, cells, strict=True))
                yield where, row if row.get("id") else {name: cell for name, cell in row.items() if name != "id"}
            elif cells:
                row_error = ConversationError(
                    f"{where}: the row has {len(cells)} cells but {len(header)} columns; quote cells that contain "
                    "commas, line breaks or quotation marks."
                )
                if not keep_errors:
                    raise row_error
                yield where, row_error
    except csv.Error as error:
        raise ConversationError(
            f"{path.name}:{lines.line_num}: not CSV ({error}); fix the quotation marks there or before it."
        ) from None


def _parquet_values(column: Any) -> list[Any]:
    """The values of a column; None where Python cannot hold them, such as a date in the year 30,000.

    Texts always can be held, so that at most a column that no score depends on is lost.
    """
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, ArithmeticError, LookupError, TypeError):
        values = [None] * len(column)
    return values


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # here because the import is slow and only Parquet needs it
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                columns = [_parquet_values(column) for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    number += 1
                    yield f"{path.name} row {number}", dict(zip(batch.schema.names, cells, strict=True))
    except (pyarrow.ArrowException, ValueError) as error:
        raise ConversationError(f"{path} cannot be read as Parquet after row {number}: {error}") from error
