"""Load preference pairs and conversations from the bundled set, from files, or from the hub.

A malformed row is an error, because silently missing calibration data degrades the model. Rows without information
(blank, duplicate, equal responses) are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import (
    UNCATEGORISED,
    ChatMessage,
    EmptyConversationError,
    PreferencePair,
    digest_messages,
    top_category_of,
)
from runtime.conversations.row_files import read_rows
from runtime.conversations.row_shapes import read_category
from runtime.conversations.row_sources import find_rows, list_row_files
from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.recognise import read_row

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class ConversationRow:
    """One conversation, its category, and the location it was read from."""

    messages: list[ChatMessage]
    category: str = UNCATEGORISED
    where: str = ""

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 of the messages."""
        return digest_messages(self.messages)

    @property
    def top_category(self) -> str:
        """The category without its subcategory."""
        return top_category_of(self.category)


@dataclass
class LoadedRows:
    """The usable rows of `source`, without duplicates.

    Attributes:
        counts: `read` rows, and how many of them were skipped as `empty` (blank prompt or response), `duplicate`, or
            `tied` (chosen equals rejected, or the row prefers neither). A row with several pairs is counted once in
            `read`, and each of its pairs in the others.
        formats: the formats of the rows, each with the location of its first row.
    """

    source: str
    pairs: list[PreferencePair] = field(default_factory=list)
    conversations: list[ConversationRow] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("read", "empty", "duplicate", "tied"), 0))
    formats: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the terminal: usable and skipped rows."""
        kinds = {"pairs": len(self.pairs), "single conversations": len(self.conversations)}
        kept = " and ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count) or "nothing usable"
        left_out = [f"{self.counts[key]:,} {key}" for key in ("empty", "duplicate", "tied") if self.counts[key]]
        formats = f"; format {', '.join(self.formats)}" if self.formats else ""
        return f"{self.source}: {kept}" + (f" (left out: {', '.join(left_out)})" if left_out else "") + formats


def load_rows(source: str | Path | None = None, options: RowOptions | None = None) -> LoadedRows:
    """Read every row of `source`.

    Args:
        source: None for the bundled set; a file with one of the suffixes `INPUT_SUFFIXES`; a directory of such files,
            or a pattern of their names; or a hub data set, ``owner/name`` or ``owner/name@revision``. Of a data set
            only such files are downloaded, and no code of it runs.
        options: how rows are read.

    Raises:
        ConversationError: the source does not exist or cannot be downloaded, a row is malformed, or no row is usable.
    """
    files = list_files(source)
    located_rows = (row for file in files for row in read_rows(file))
    rows = collect_rows(located_rows, str(source or "bundled conversations"), options)
    if not rows.counts["read"]:
        raise ConversationError(f"{rows.source} is empty; at least one row of preference data was expected.")
    if not rows.pairs and not rows.conversations:
        raise ConversationError(f"{rows.source} has no usable row: {rows.summary()}.")
    return rows


def collect_rows(located_rows: Iterable[tuple[str, Any]], source: str, options: RowOptions | None = None) -> LoadedRows:
    """Parse (location, row) pairs, and skip and count the unusable ones.

    A row gives every pair that it states a preference for; without one, each of its conversations.

    Raises:
        ConversationError: a row is malformed.
    """
    rows, seen = LoadedRows(source), set()
    for where, raw in located_rows:
        rows.counts["read"] += 1
        try:
            reading = read_row(raw, where, options)
        except EmptyConversationError:
            rows.counts["empty"] += 1
            continue
        rows.formats.setdefault(reading.format, where)
        if reading.tied:
            rows.counts["tied"] += 1
            continue
        category = read_category(raw)
        found: Sequence[PreferencePair | ConversationRow] = reading.pairs(category, where) or [
            ConversationRow(conversation, category, where) for conversation in reading.conversations
        ]
        for row in found:
            if row.id in seen:
                rows.counts["duplicate"] += 1
            elif isinstance(row, ConversationRow):
                rows.conversations.append(row)
            elif row.chosen == row.rejected:
                rows.counts["tied"] += 1
            else:
                rows.pairs.append(row)
            seen.add(row.id)
    return rows


def list_files(source: str | Path | None) -> list[Path]:
    """The files of a source, sorted; a hub data set is downloaded.

    Raises:
        ConversationError: the source does not exist, cannot be downloaded, or has no suitable file.
    """
    return sorted(BUNDLED.glob("*.jsonl")) if source is None else list_row_files(find_rows(source))
