"""Find the files of a source of rows: one file, a directory of them, or a pattern such as `data/*.jsonl`."""

from __future__ import annotations

import glob
from pathlib import Path

from runtime.common.errors import ConversationError

INPUT_SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
    *(".json", ".json.gz", ".json.zst"),
    *(".csv", ".parquet"),
)
METADATA_FILES = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
"""Files that the `datasets` library writes beside the rows."""


def is_row_file(path: Path) -> bool:
    """Whether the name ends in one of `INPUT_SUFFIXES`."""
    return path.name.endswith(INPUT_SUFFIXES)


def local_path(source: str | Path) -> Path:
    """The path of a source, with `~` expanded if there is such a user."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # ~name of no user
        return Path(source)


def list_row_files(source: str | Path) -> list[Path]:
    """The row files of a source that is on this machine, in order of their names.

    Raises:
        ConversationError: the directory has no row file, or nothing fits the pattern.
    """
    path = local_path(source)
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if _has_rows(each))
        if not found:
            raise ConversationError(f"{path} has no file that ends in {', '.join(INPUT_SUFFIXES)}.")
        return found
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = [each for each in sorted(map(Path, glob.glob(str(path), recursive=True))) if _has_rows(each)]
    if not found:
        raise ConversationError(f"{path}: no file that ends in {', '.join(INPUT_SUFFIXES)} fits this pattern.")
    return found


def _has_rows(path: Path) -> bool:
    return is_row_file(path) and path.is_file() and path.name not in METADATA_FILES and not path.name.startswith(".")
