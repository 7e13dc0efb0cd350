"""Model files from the Hugging Face hub: weights, configuration and tokenizer, never code or pickles."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.errors import MENDABLE, CheckpointError

ALLOWED_FILES = ("*.safetensors", "*.json", "merges.txt", "*.jinja", "parity_pairs.jsonl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name."""
    return _HUB_ID.fullmatch(source) is not None


def download(model_id: str, files: tuple[str, ...] = ALLOWED_FILES) -> Path:
    """Fetch a model's files into the hub's cache, going on where an earlier attempt stopped.

    Args:
        model_id: owner/name.
        files: patterns of file names at the top of the repository.

    Raises:
        CheckpointError: there is no such model, it is not open to this user, or there is no network.
        OSError: the disk is full.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        reason = "its owner asks users to accept terms; do so on its page, then log in with `hf auth login`"
        raise CheckpointError(f"{model_id} cannot be downloaded: {reason}.") from error
    except RepositoryNotFoundError as error:
        reason = "check the spelling, or log in with `hf auth login` if it is private"
        raise CheckpointError(f"{model_id} is neither a directory here nor a model on the hub; {reason}.") from error
    except Exception as error:  # every network library under the hub client raises its own kinds
        if isinstance(error, OSError) and error.errno in MENDABLE:
            raise  # a full disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise CheckpointError(
            f"{model_id} is no directory here and could not be downloaded ({reason}); run the "
            "same command again once there is a connection, or copy the files here and name their directory."
        ) from error
