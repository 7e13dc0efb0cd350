"""Compare what is uploaded with what the repository has already."""

from __future__ import annotations

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from quantize.publish.files import UploadPlan
from runtime.common.errors import ConfigurationError
from runtime.common.terminal import MIB

HASHED = 64 * MIB
"""Stored files of equal size are hashed up to here. A shard of another run comes with another card and report."""


def check_remote(api: HfApi, repository: str, plan: UploadPlan, *, overwrite: bool) -> None:
    """Check that the repository is empty or has a part of what is uploaded.

    Raises:
        ConfigurationError: it has other files, or other content in a file, and `overwrite` is false.
    """
    files = [each for each in api.list_repo_tree(repository, recursive=True) if isinstance(each, RepoFile)]
    foreign = [each.path for each in files if each.path not in plan.files and each.path != ".gitattributes"]
    changed = [each.path for each in files if each.path in plan.files and _differs(each, plan)]
    if overwrite or not (foreign or changed):
        return
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((changed, "with other content"), (foreign, "not of this checkpoint"))
        if names
    ]
    raise ConfigurationError(
        f"{repository} already has other files: {' and '.join(found)}; choose another name, or add --overwrite to "
        "replace what differs and leave the rest."
    )


def _differs(stored: RepoFile, plan: UploadPlan) -> bool:
    if stored.size != plan.nbytes(stored.path):
        return True
    if stored.size > HASHED:
        return False
    if stored.lfs is not None:
        return stored.lfs.sha256 != plan.sha256(stored.path)
    content = plan.files[stored.path]
    return stored.blob_id != git_hash(content if isinstance(content, bytes) else content.read_bytes())
