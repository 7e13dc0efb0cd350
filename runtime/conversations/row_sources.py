"""Find the files of a source of rows: one file, a directory, a pattern such as `data/*.jsonl`, or a hub data set."""

from __future__ import annotations

import glob
from pathlib import Path

from runtime.common.errors import ConversationError
from runtime.common.hub import HubId

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


def find_rows(source: str | Path, names: str = "") -> str:
    """The file, directory or pattern on this machine that `list_row_files` reads for a source.

    Args:
        source: a path or pattern, or a hub data set, ``owner/name`` or ``owner/name@revision``, which is downloaded.
            Of a data set only row files are downloaded, and no code of it runs.
        names: pattern of the names of the files that count, such as ``test-*.parquet``. A directory without such files
            counts as a whole.

    Raises:
        ConversationError: the source does not exist or cannot be downloaded.
    """
    path = local_path(source)
    if not path.exists() and not glob.has_magic(str(path)):
        data_set = None if is_row_file(path) else HubId.parse(source)
        if data_set is None:
            raise ConversationError(
                f"{source} does not exist; a file ({', '.join(INPUT_SUFFIXES)}), a directory of them, or a hub "
                "data set such as owner/name or owner/name@revision was expected."
            )
        path = _fetch(data_set, names)
    if names and path.is_dir() and any(path.rglob(names)):
        return f"{glob.escape(str(path))}/**/{names}"
    return str(path)


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


def _fetch(data_set: HubId, names: str) -> Path:
    """Download the row files of a hub data set, without its loading script, and return the local directory."""
    patterns = [f"*{names}"] if names else [f"*{suffix}" for suffix in INPUT_SUFFIXES]
    try:
        return data_set.download(patterns, METADATA_FILES, repo_type="dataset")
    except Exception as error:  # of the client, its HTTP library, or the OS
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConversationError(
            f"the data set {data_set.name} is no local path and could not be downloaded from the hub ({reason}); on a "
            f"machine with network access, run `hf download --repo-type dataset {data_set.name} --local-dir DIR`, and "
            "give DIR instead."
        ) from error
