"""Files that are whole or absent: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Literal

from runtime.errors import JobError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success sync it and rename it to `path`, else remove it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # some writers make theirs private
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read once."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def open_locked(path: Path, mode: Literal["wb", "ab+"], output: Path) -> FileIO:
    """Open a file, unbuffered, that no other process may hold meanwhile; closing it lets go.

    Raises:
        JobError: another process holds it, or it cannot be made; the message names `output`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, mode, buffering=0)  # noqa: SIM115 - held as long as the run is
    except OSError as error:
        raise JobError(f"{output} cannot be written to: {error.strerror}; choose another --output.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise JobError(f"{output} is in use by another run; wait for it, or choose another --output.") from error
    return file
