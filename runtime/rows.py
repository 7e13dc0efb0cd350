"""Rows of JSONL, JSON, CSV and Parquet files, one at a time, each with the place it was found at.

What a row means is `runtime.conversation`'s business; here a file either yields rows or says in one
sentence where and why it does not.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.conversation import PAIR_SHAPE
from runtime.errors import ConversationError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
_BATCH_ROWS = 64
_LONGEST_CELL = 1 << 24  # characters; a quotation mark that is never closed makes one cell of the rest of a file


def is_row_file(path: Path) -> bool:
    """Whether the name ends in one of `SUFFIXES`."""
    return path.name.endswith(SUFFIXES)


def read_rows(path: Path, *, keep_faults: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for every row of a file; a place is ``pairs.jsonl:12`` or ``pairs.parquet row 12``.

    JSONL, CSV and Parquet are streamed; a JSON array, or an object of columns, is held whole. JSONL under a
    `.json` name is recognised. Blank lines are passed over. CSV has a header, and its `response` column is one
    response to `prompt`. With `keep_faults` a line of JSONL that cannot be read, or one of CSV that has not the
    header's cells, comes as the ConversationError it would have raised, in the row's place, and the next follows.

    Raises:
        ConversationError: the file cannot be opened, or is not what its name says, with line and column.
    """
    if not is_row_file(path):
        raise ConversationError(f"{path} is no file of rows; one that ends in {', '.join(SUFFIXES)} was expected.")
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.name.endswith(".csv"):
            yield from _csv_rows(path, keep_faults)
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl_rows(_lines(path), keep_faults)
        else:
            yield from _json_rows(path, keep_faults)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConversationError(f"{path} is not a whole gzip file ({error}); fetch or compress it again.") from error
    except OSError as error:
        raise ConversationError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_lines(file: BinaryIO, name: str, *, keep_faults: bool = False) -> Iterator[tuple[str, Any]]:
    """As `read_rows`, from an open file of JSONL such as standard input; places are ``name:12``."""
    return _jsonl_rows(_numbered(file, name), keep_faults)


def count_rows(path: Path) -> int | None:
    """About how many rows a file has, where that is cheap to know: by Parquet's footer, or JSONL's line ends."""
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    if not path.name.endswith(".jsonl"):
        return None
    with open(path, "rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Places and bytes of all lines, line ends included."""
    with _open(path) as file:
        yield from _numbered(file, path.name)


def _numbered(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(file, start=1):
        yield f"{name}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _jsonl_rows(lines: Iterable[tuple[str, bytes]], keep_faults: bool) -> Iterator[tuple[str, Any]]:
    for place, line in lines:
        row: Any
        try:
            text = _decode(line, place)
            if not text.strip():
                continue
            row = _parse(text, place)
        except ConversationError as fault:
            if not keep_faults:
                raise
            row = fault
        yield place, row


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConversationError(
            f"{place}: byte {error.start + 1} of the line, 0x{data[error.start]:02x}, is not UTF-8; "
            "save the file as UTF-8."
        ) from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = text[max(error.pos - 20, 0) : error.pos + 20].strip()
        hint = " If this is one JSON array, name the file .json." if text.lstrip().startswith("[") else ""
        raise ConversationError(
            f"{place}: not JSON at column {error.colno}, near {found!r} ({error.msg}); "
            f"each line must be one object such as {PAIR_SHAPE}.{hint}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise ConversationError(f"{place}: JSON that cannot be read ({error}); mend or remove the line.") from None


def _json_rows(path: Path, keep_faults: bool) -> Iterator[tuple[str, Any]]:
    lines = _lines(path)
    texts = ((place, _decode(line, place)) for place, line in lines)
    place, first = next((line for line in texts if line[1].strip()), ("", ""))
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None  # not whole in its first line
    if isinstance(row, dict) and not _is_columns(row):
        yield place, row
        yield from _jsonl_rows(lines, keep_faults)
    elif first:
        for number, row in enumerate(_whole_json(path), start=1):
            yield f"{path.name} row {number}", row


def _whole_json(path: Path) -> list[Any]:
    """The rows of a JSON array or of an object of columns."""
    try:
        value = json.loads("".join(_decode(line, place) for place, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise ConversationError(
            f"{path.name}:{error.lineno}: not JSON at column {error.colno} ({error.msg}); "
            f"an array of objects such as {PAIR_SHAPE} was expected."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{path.name}: JSON that cannot be read ({error}); mend the file.") from None
    if isinstance(value, dict):
        return _rows_of_columns(value, path.name) if _is_columns(value) else [value]
    if not isinstance(value, list):
        raise ConversationError(
            f"{path.name} holds one {type(value).__name__}; an array of objects such as {PAIR_SHAPE} was expected."
        )
    return value


def _is_columns(value: dict[str, Any]) -> bool:
    """A row holds text or lists of objects under these keys; columns hold lists of texts or of lists."""
    columns = (value.get(key) for key in ("prompt", "chosen", "rejected", "messages"))
    return any(isinstance(column, list) and column and isinstance(column[0], (str, list)) for column in columns)


def _rows_of_columns(columns: dict[str, Any], name: str) -> list[dict[str, Any]]:
    lengths = {key: len(column) for key, column in columns.items() if isinstance(column, list)}
    if len(lengths) < len(columns) or len(set(lengths.values())) != 1:
        raise ConversationError(
            f"{name}: its columns differ in length ({lengths}); every column needs one entry a row."
        )
    return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]


def _csv_rows(path: Path, keep_faults: bool) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader((_decode(line, place) for place, line in _lines(path)), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        if "prompt" not in header or not {"chosen", "response"} & set(header):
            raise ConversationError(
                f"{path.name}:1: the columns are {', '.join(header)[:200] or 'none'}; prompt, chosen and rejected, or "
                "prompt and response, were expected in the first line."
            )
        for cells in lines:
            place = f"{path.name}:{lines.line_num}"
            if len(cells) == len(header):
                yield place, _csv_row(dict(zip(header, cells, strict=True)))
            elif cells:
                fault = ConversationError(
                    f"{place}: the row has {len(cells)} cells under {len(header)} columns; put cells with commas, line "
                    "breaks or quotation marks in quotation marks."
                )
                if not keep_faults:
                    raise fault
                yield place, fault
    except csv.Error as error:
        raise ConversationError(
            f"{path.name}:{lines.line_num}: not CSV ({error}); mend the quotation marks there or before it."
        ) from None


def _csv_row(cells: dict[str, str]) -> dict[str, Any]:
    """Cells are text. An empty one is a blank prompt or response, but no id and no category."""
    texts = ("prompt", "chosen", "rejected", "response")
    row: dict[str, Any] = {name: cell for name, cell in cells.items() if cell and name not in texts}
    if "response" in cells and not cells.get("chosen"):
        turns = {"user": cells["prompt"], "assistant": cells["response"]}
        return row | {"messages": [{"role": role, "content": text} for role, text in turns.items()]}
    return row | {name: cells[name] for name in texts[:3] if name in cells}


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # here, since few read Parquet and the import is slow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise ConversationError(f"{path} is no readable Parquet file after row {number}: {error}") from error
