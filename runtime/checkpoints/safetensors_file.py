"""Read safetensors files: parse and check the header, then read single tensors.

The safetensors library is not used because errors must name the file, the tensor and the remedy, and because plain file
reads work from any thread and give each tensor its own memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from runtime.common.errors import CheckpointError, brief

MAX_HEADER_BYTES = 100_000_000
_DAMAGED = "the file is damaged; download or write it again"

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
MAX_DIMENSIONS = 8  # of a tensor; those of these models have two at most


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor: `nbytes` bytes at `offset` from the start of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header has been checked."""

    file: Path
    size: int
    header_sha256: str
    tensors: dict[str, TensorInfo]


def open_safetensors_file(file: Path) -> SafetensorsFile:
    """Read and check the header. Reads no tensor, and allocates nothing based on sizes that the header claims.

    Raises:
        CheckpointError: the file is missing or truncated, or its header contradicts itself or the file size.
    """
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, 2)
            header = _read_header(stream, size, file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    entries = _parse_header(header, file)
    start = 8 + len(header)
    tensors = {name: _tensor_info(name, entry, start, file) for name, entry in entries.items()}
    _check_coverage(tensors, start, size, file)
    return SafetensorsFile(file, size, hashlib.sha256(header).hexdigest(), tensors)


def read_tensor(name: str, stored: TensorInfo) -> torch.Tensor:
    """Read one tensor to newly allocated CPU memory. Thread-safe.

    Raises:
        CheckpointError: the file was truncated since it was opened, or cannot be read.
    """
    flat = torch.empty(stored.nbytes, dtype=torch.uint8)
    try:
        with open(stored.file, "rb") as stream:
            stream.seek(stored.offset)
            read = stream.readinto(flat.numpy().data)
    except OSError as error:
        raise CheckpointError(f"{stored.file}: {name} cannot be read: {error.strerror}.") from error
    if read != stored.nbytes:
        raise CheckpointError(f"{stored.file}: {name} ends after {read} of {stored.nbytes} bytes; {_DAMAGED}.")
    return flat.view(stored.dtype).view(stored.shape)


def _read_header(stream: BinaryIO, size: int, file: Path) -> bytes:
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise CheckpointError(f"{file} has {size} bytes but claims a header of {length}; {_DAMAGED}.")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file} claims a header of {length} bytes, above the limit of {MAX_HEADER_BYTES}.")
    return stream.read(length)


def _parse_header(header: bytes, file: Path) -> dict[str, Any]:
    try:
        if not header.startswith(b"{"):  # the format has no byte order mark and no space before it
            raise ValueError("it does not begin with a brace")
        text = header.decode()  # the json module would take UTF-16 and UTF-32 too
        entries = json.loads(text, object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant)
        "".join(entries).encode()  # refuses lone surrogates
        if not all(isinstance(text, str) for text in entries.get("__metadata__", {}).values()):
            raise ValueError("__metadata__ holds other values than texts")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not a safetensors header ({error}); {_DAMAGED}.") from error
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _tensor_info(name: str, entry: Any, start: int, file: Path) -> TensorInfo:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {name} is described by {brief(entry)}; {_DAMAGED}.") from error
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{file}: {name} has {len(shape)} dimensions; {_DAMAGED}.")
    if any(type(number) is not int or not 0 <= number < 1 << 64 for number in (*shape, begin, end)):
        raise CheckpointError(f"{file}: {name} has shape {list(shape)} at bytes {begin!r} to {end!r}; {_DAMAGED}.")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {brief(kind)}; one of {', '.join(_DTYPES)} was expected.")
    dtype = _DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise CheckpointError(
            f"{file}: {name} with dtype {kind} and shape {list(shape)} takes {nbytes} bytes, but its range "
            f"is {begin} to {end}; {_DAMAGED}."
        )
    return TensorInfo(file, dtype, shape, start + begin, end - begin)


def _check_coverage(tensors: dict[str, TensorInfo], start: int, size: int, file: Path) -> None:
    """Check that the tensors fill the file from the header to its end, without gaps or overlaps."""
    position = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != position:
            problem = "overlaps the tensor before it" if stored.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{file}: {name} {problem} (offset {stored.offset}, not {position}); {_DAMAGED}.")
        position += stored.nbytes
    if position > size:
        raise CheckpointError(f"{file} is cut short: {size} of {position} bytes are there; download it again.")
    if position < size:
        raise CheckpointError(f"{file} has {size - position} bytes after its last tensor; {_DAMAGED}.")
