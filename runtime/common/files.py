"""Atomic writes, temporary directories, checksums and locked files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Literal

from filelock import lock_descriptor

from runtime.common.errors import JobError, remedy


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`, else delete it."""
    path = Path(path)
    temporary = partial_path(path)
    try:
        with naming(path):
            yield temporary
            publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch_directory(path: Path) -> Iterator[None]:
    """Make `path` an empty directory, and remove it at the end. What a killed run left there is removed first."""
    remove_tree(path)
    path.mkdir()
    try:
        yield
    finally:
        remove_tree(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give `path` to an OSError that names no file, as those of writing and syncing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is renamed. The name is fixed, so that a later run finds what a kill left."""
    return path.with_name(f".{path.name}.partial")


def publish_file(temporary: Path, path: Path) -> None:
    """Sync a file and rename it to `path`."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o666 & ~_umask())  # some writers create their files as 0600
    os.replace(temporary, path)
    sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory and all that it contains, or a file, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`; after a crash `path` has either its old or its new content."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_directory(directory: Path) -> None:
    """fsync `directory`, so that a rename in it survives a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with naming(directory):
            os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's umask. Setting it to read it would change it for other threads; Linux shows it in a file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("Umask:")), 8)
    except (OSError, StopIteration):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def open_locked(path: Path, mode: Literal["wb", "ab+"], output: Path) -> FileIO:
    """Open `path` unbuffered and lock it against other processes until it is closed or this process ends.

    The file itself is locked, so no lock file is left beside it.

    Args:
        output: the --output that the error messages name.

    Raises:
        JobError: another process holds the lock, or the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, mode, buffering=0)  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise JobError(
            f"{output} cannot be written to: {error.strerror}; {remedy(error, 'choose another --output')}."
        ) from error
    if not lock_descriptor(file.fileno(), blocking=False):
        file.close()
        raise JobError(f"{output} is in use by another run; wait for it, or choose another --output.")
    return file
