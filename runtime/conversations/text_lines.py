"""Lines of text files, plain or compressed, with their locations and a limit on their length."""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.common.errors import ConversationError

LONGEST_LINE = 32 << 20  # bytes; 3 MB of gzip can hold a line of 3 GB
LONGEST_FILE = 1 << 30  # bytes of a file that is read as a whole


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading bytes; one that ends in `.gz` or `.zst` is decompressed."""
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    file = open(path, "rb")  # noqa: SIM115  # the caller closes it
    if path.suffix != ".zst":
        return file
    import pyarrow  # here because the import is slow and only .zst needs it

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"), 1 << 20)


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Location and bytes of every line, including its line end; see `number_lines`."""
    with open_file(path) as file:
        yield from number_lines(file, path.name)


def number_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    """Location and bytes of every line. Of one above `LONGEST_LINE` one byte more is kept: `decode_line` refuses it."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        if not number and len(line) <= LONGEST_LINE:
            line = line.removeprefix(codecs.BOM_UTF8)
        rest = line if len(line) > LONGEST_LINE else b""
        while rest and not rest.endswith(b"\n"):  # skip to the end of the line
            rest = file.readline(1 << 20)
        number += 1
        yield f"{name}:{number}", line


def decode_line(data: bytes, where: str) -> str:
    """The text of a line. Raise ConversationError, with its location, if it is too long or not UTF-8."""
    if len(data) > LONGEST_LINE:
        raise ConversationError(f"{where}: the line has more than {LONGEST_LINE >> 20} MiB; split it into rows.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConversationError(
            f"{where}: byte {error.start + 1} of the line, 0x{data[error.start]:02x}, is not UTF-8; "
            "save the file as UTF-8."
        ) from None


def read_text(path: Path) -> str:
    """Read a whole file.

    Raises:
        ConversationError: the file is longer than `LONGEST_FILE`, or a byte is not UTF-8.
    """
    with open_file(path) as file:
        data = file.read(LONGEST_FILE + 1).removeprefix(codecs.BOM_UTF8)
    if len(data) > LONGEST_FILE:
        raise ConversationError(f"{path.name} has more than {LONGEST_FILE >> 30} GiB; write it as JSONL.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        start = data.rfind(b"\n", 0, error.start) + 1
        return decode_line(data[start : error.start + 1], f"{path.name}:{line + 1}")  # names the byte
