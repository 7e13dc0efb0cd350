"""Repositories on the Hugging Face hub: ids such as `owner/name` or `owner/name@revision`, and their download."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./+-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubId:
    """A repository on the hub.

    Attributes:
        name: `owner/name`.
        revision: a branch, a tag, or a commit; None for the newest commit of the main branch.
    """

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, source: str | Path) -> HubId | None:
        """Parse `owner/name` or `owner/name@revision`; None for everything else, and for a path that exists."""
        found = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
        return None if found is None or Path(source).exists() else cls(found[1], found[2])

    @staticmethod
    def is_repository(name: str) -> bool:
        """Whether the hub accepts `name` as `owner/name`."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError:
            return False
        return "/" in name

    @property
    def label(self) -> str:
        """A short name that may be part of a file's name: `name` or `name@revision`."""
        name = self.name.partition("/")[2]
        return f"{name}@{self.revision.replace('/', '-')}" if self.revision else name

    def download(self, files: Iterable[str], ignore: Iterable[str], repo_type: str = "model") -> Path:
        """Download files into the hub's cache, or find them there, and return the directory of this commit.

        An interrupted download is continued.

        Args:
            files, ignore: patterns of names to download, and of names to leave out.
        """
        import huggingface_hub  # here because the import is slow

        return Path(
            huggingface_hub.snapshot_download(
                self.name,
                repo_type=repo_type,
                revision=self.revision,
                allow_patterns=list(files),
                ignore_patterns=list(ignore),
            )
        )


def short_name(source: str | Path) -> str:
    """The label of a hub id, or the last part of a path."""
    hub_id = HubId.parse(source)
    return hub_id.label if hub_id else Path(source).name


def downloaded_commit(directory: Path) -> str | None:
    """The commit that a directory of the hub's cache holds; None for any other directory."""
    *_, kind, name = ("", "", *directory.absolute().parts)
    return name if kind == "snapshots" and _COMMIT.fullmatch(name) else None
