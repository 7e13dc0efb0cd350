"""Find the directory of a model: a local directory, a hub id (`owner/name` or `owner/name@revision`), or `demo`.

From the hub only weights, configuration and tokenizer files are downloaded, never code or pickles.
"""

from __future__ import annotations

from pathlib import Path

from runtime.common.errors import USER_FIXABLE_ERRNOS, CheckpointError, summarize_error
from runtime.common.hub import HubId

ALLOWED_FILES = ("*.safetensors", "*.json", "merges.txt", "*.jinja", "parity_pairs.jsonl", "README.md")


def must_download(source: str | Path) -> bool:
    """Return whether `source` is a hub id and not an existing path.

    True even if the model is already in the hub's cache.
    """
    return HubId.parse(source) is not None


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
    if hub_id := HubId.parse(source):
        return _download(hub_id, files)
    raise CheckpointError(
        f"{path} does not exist; name a checkpoint's directory, a hub id (owner/name or owner/name@revision) or `demo`."
    )


def checkpoint_name(source: str | Path) -> str:
    """Return the name shown for `source`: the directory's name, or the hub id or `demo` as given."""
    path = Path(source)
    return path.resolve().name if path.is_dir() else str(source)


def _download(model: HubId, files: tuple[str, ...]) -> Path:
    """Download a model into the hub's cache; an interrupted download is continued."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    model_id = model.name
    try:
        return model.download(files, ignore=["*/*"])
    except GatedRepoError as error:
        reason = "its owner asks users to accept terms; do so on its page, then log in with `hf auth login`"
        raise CheckpointError(f"{model_id} cannot be downloaded: {reason}.") from error
    except RepositoryNotFoundError as error:
        reason = "check the spelling, or log in with `hf auth login` if it is private"
        raise CheckpointError(f"{model_id} is neither a local directory nor a model on the hub; {reason}.") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{model_id} has no revision {model.revision}; name a branch, a tag or a whole commit hash of its history."
        ) from error
    except Exception as error:  # each network library under the hub client raises its own exceptions
        if isinstance(error, OSError) and error.errno in USER_FIXABLE_ERRNOS:
            raise  # such as a full disk
        reason = summarize_error(error)
        raise CheckpointError(
            f"{model_id} is not a local directory and could not be downloaded ({reason}); run the same command again "
            "when the network is up, or copy the files to this machine and name their directory."
        ) from error
