"""Preference pairs and conversations from wherever they are: the bundled set, files, the hub.

Data is taken as it is or refused: a broken row stops the reading with its file and line, since a silent
hole in calibration data shows up months later as a worse model. Rows that carry nothing (blank, read
before, two equal responses) are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.conversation import (
    UNCATEGORISED,
    EmptyConversationError,
    Message,
    PreferencePair,
    area_of,
    digest_messages,
    parse_row,
    read_category,
)
from runtime.errors import ConversationError
from runtime.rows import SUFFIXES, is_row_file, read_rows

BUNDLED = Path(__file__).parent / "bundled"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_NOT_ROWS = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")


@dataclass(frozen=True)
class Conversation:
    """One conversation that ends in the response, the area it belongs to, and the place it was read from."""

    messages: list[Message]
    category: str = UNCATEGORISED
    where: str = ""

    @property
    def id(self) -> str:
        """Sixteen hex digits that depend on the messages alone."""
        return digest_messages(self.messages)

    @property
    def area(self) -> str:
        """The category without its division."""
        return area_of(self.category)


@dataclass
class Rows:
    """What was read from `source`, each row once.

    `counts` has `read`, and of those `empty` (a blank prompt or response), `duplicate` (read before) and
    `tied` (chosen equals rejected), which were left out.
    """

    source: str
    pairs: list[PreferencePair] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("read", "empty", "duplicate", "tied"), 0))

    def summary(self) -> str:
        """One line for people."""
        kinds = {"pairs": len(self.pairs), "single conversations": len(self.conversations)}
        kept = " and ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count) or "nothing usable"
        left_out = [f"{self.counts[key]:,} {key}" for key in ("empty", "duplicate", "tied") if self.counts[key]]
        return f"{self.source}: {kept}" + (f" (left out: {', '.join(left_out)})" if left_out else "")


def load_rows(source: str | Path | None = None) -> Rows:
    """Read every row of `source`.

    Args:
        source: None for the bundled set; a file that ends in one of `runtime.rows.SUFFIXES`; a directory of
            such files; or a hub data set, ``owner/name`` or ``owner/name@revision``, of which only such
            files are fetched and no code is run.

    Raises:
        ConversationError: the source does not exist or cannot be fetched, a row is broken, or none is usable.
    """
    files = list_files(source)
    rows = collect_rows((row for file in files for row in read_rows(file)), str(source or "bundled conversations"))
    if not rows.counts["read"]:
        raise ConversationError(f"{rows.source} is empty; at least one row of preference data was expected.")
    if not rows.pairs and not rows.conversations:
        raise ConversationError(f"{rows.source} has no usable row: {rows.summary()}.")
    return rows


def collect_rows(placed_rows: Iterable[tuple[str, Any]], source: str) -> Rows:
    """Parse, count and sort out (place, row) pairs; see `load_rows`."""
    rows, seen = Rows(source), set()
    for where, raw in placed_rows:
        rows.counts["read"] += 1
        try:
            parsed = parse_row(raw, where)
        except EmptyConversationError:
            rows.counts["empty"] += 1
            continue
        row = parsed if isinstance(parsed, PreferencePair) else Conversation(parsed, read_category(raw), where)
        if row.id in seen:
            rows.counts["duplicate"] += 1
        elif isinstance(row, Conversation):
            rows.conversations.append(row)
        elif row.chosen == row.rejected:
            rows.counts["tied"] += 1
        else:
            rows.pairs.append(row)
        seen.add(row.id)
    return rows


def list_files(source: str | Path | None) -> list[Path]:
    """The files behind a source in a fixed order; a hub data set is fetched."""
    if source is None:
        return sorted(BUNDLED.glob("*.jsonl"))
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_below(path)
    if is_row_file(path) or isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise ConversationError(
            f"{source} does not exist; a file ({', '.join(SUFFIXES)}), a directory of them, or a hub "
            "data set such as owner/name was expected."
        )
    return _files_below(_fetch(source))


def _files_below(directory: Path) -> list[Path]:
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if is_row_file(path) and path.is_file() and path.name not in _NOT_ROWS and not path.name.startswith(".")
    ]
    if not files:
        raise ConversationError(f"{directory} holds no file that ends in {', '.join(SUFFIXES)}.")
    return files


def _fetch(source: str) -> Path:
    """The local snapshot of a hub data set: its row files alone, never a loading script."""
    from huggingface_hub import snapshot_download  # slow to import, and needed here only

    name, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                repo_type="dataset",
                revision=revision or None,
                allow_patterns=[f"*{suffix}" for suffix in SUFFIXES],
                ignore_patterns=list(_NOT_ROWS),
            )
        )
    except Exception as error:  # the client's own, its HTTP library's and the system's: all mean "not here"
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConversationError(
            f"the data set {source} is neither a local path nor could it be fetched from the hub ({reason}); "
            f"where there is network, fetch it with `hf download --repo-type dataset {name} --local-dir DIR` "
            "and give DIR instead."
        ) from error
