"""Find the directory of a model: a local directory, a Hugging Face hub id, or `demo`.

From the hub only weights, configuration and tokenizer files are downloaded, never code or pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

from runtime.common.errors import USER_FIXABLE_ERRNOS, CheckpointError

ALLOWED_FILES = ("*.safetensors", "*.json", "merges.txt", "*.jinja", "parity_pairs.jsonl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def must_download(source: str | Path) -> bool:
    """Return whether `source` is a hub id (owner/name) and not an existing path.

    True even if the model is already in the hub's cache.
    """
    return isinstance(source, str) and _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def find_directory(source: str | Path, files: tuple[str, ...] = ALLOWED_FILES) -> Path:
    """Return the directory of `source`. Downloads a hub id and builds the demo model if necessary.

    Args:
        files: name patterns of the files to download.

    Raises:
        CheckpointError: there is no such model, or it cannot be downloaded.
        OSError: the disk is full.
    """
    if source == "demo":
        from runtime.demo.model import demo_directory  # imported here because only the demo needs its builder

        return demo_directory()
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; name the directory of the checkpoint.")
    if must_download(source):
        return _download(str(source), files)
    raise CheckpointError(f"{path} does not exist; name a checkpoint's directory, a hub id (owner/name) or `demo`.")


def checkpoint_name(source: str | Path) -> str:
    """Return the name shown for `source`: the directory's name, or the hub id or `demo` as given."""
    path = Path(source)
    return path.resolve().name if path.is_dir() else str(source)


def _download(model_id: str, files: tuple[str, ...]) -> Path:
    """Download a model into the hub's cache; an interrupted download is continued."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        reason = "its owner asks users to accept terms; do so on its page, then log in with `hf auth login`"
        raise CheckpointError(f"{model_id} cannot be downloaded: {reason}.") from error
    except RepositoryNotFoundError as error:
        reason = "check the spelling, or log in with `hf auth login` if it is private"
        raise CheckpointError(f"{model_id} is neither a local directory nor a model on the hub; {reason}.") from error
    except Exception as error:  # each network library under the hub client raises its own exceptions
        if isinstance(error, OSError) and error.errno in USER_FIXABLE_ERRNOS:
            raise  # such as a full disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise CheckpointError(
            f"{model_id} is not a local directory and could not be downloaded ({reason}); run the same command again "
            "when the network is up, or copy the files to this machine and name their directory."
        ) from error
