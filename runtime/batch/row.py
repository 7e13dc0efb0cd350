"""A row from input to output: read it, render its conversations, and make its output record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.common.errors import ConversationError, printable
from runtime.conversations.conversation import UNCATEGORISED, ChatMessage
from runtime.conversations.rendering import RenderedConversation, Renderer
from runtime.conversations.row_shapes import read_category, read_id, read_labels
from runtime.conversations.rows.context import RowKind, RowOptions
from runtime.conversations.rows.recognise import read_row
from runtime.scorer import probability_preferred


@dataclass
class InputRow:
    """One row of the input.

    Attributes:
        where: its location, such as ``pairs.jsonl:12``.
        kind: `pair` (chosen, then rejected), `responses` (N responses to one prompt) or `conversation`.
        conversations: the conversations to score; emptied once they are rendered.
        rendered: their renderings.
        id: its `id`, if any.
        category: its `category` or `subset`, empty if it has none.
        labels: what it says about its responses, such as `helpfulness`.
        error: why it cannot be scored, starting with `where`; empty if it can.
        names: of the conversations, as messages use them: ``chosen``, ``responses[2]``.
        format: the format that it was read as; empty if it could not be read.
        notes: warnings on how it was read.
        allow_blank: a response may be blank.
    """

    where: str
    kind: RowKind = "conversation"
    conversations: list[list[ChatMessage]] = field(default_factory=list)
    rendered: list[RenderedConversation] = field(default_factory=list)
    id: str | int | float | None = None
    category: str = ""
    error: str = ""
    names: list[str] = field(default_factory=list)
    format: str = ""
    notes: list[str] = field(default_factory=list)
    allow_blank: bool = False
    labels: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, row: Any, where: str, options: RowOptions | None = None) -> InputRow:
        """Interpret a decoded row, or the ConversationError that `read_rows` yields in place of one."""
        input_row = cls(printable(where), allow_blank=options is not None and options.allow_blank)
        try:
            if isinstance(row, ConversationError):
                raise row
            if isinstance(row, dict):
                category = read_category(row)
                input_row.category = "" if category == UNCATEGORISED else category
                input_row.id = read_id(row, where)
                input_row.labels = read_labels(row)
            reading = read_row(row, where, options)
            input_row.kind, input_row.conversations = reading.kind, reading.conversations
            input_row.names, input_row.format = reading.names, reading.format
            input_row.notes = [printable(text) for text in reading.warnings]
        except ConversationError as error:
            input_row.mark_failed(error)
        return input_row

    @property
    def tokens(self) -> int:
        """Total tokens of all renderings; shared prefixes count once per conversation."""
        return sum(len(rendered.token_ids) for rendered in self.rendered)

    def render(self, renderer: Renderer, *, truncate: bool) -> None:
        """Render the conversations, or set `error`."""
        if self.error:
            return
        try:
            self.rendered = [
                renderer.render(
                    conversation, truncate=truncate, where=self._location(name), allow_blank=self.allow_blank
                )
                for name, conversation in zip(self.names, self.conversations, strict=True)
            ]
        except ConversationError as error:
            self.mark_failed(error)
        self.conversations = []

    def mark_failed(self, error: Exception) -> None:
        """Set `error` and drop the conversations."""
        text = printable(str(error))
        self.error = text if text.startswith(self.where) else f"{self.where}: {text}"
        self.conversations, self.rendered = [], []

    def warnings(self) -> list[str]:
        """Warnings of the reader and the renderer. Those of some conversations start with the conversation's name."""
        warnings = [rendered.warnings for rendered in self.rendered]
        common = [text for text in (warnings[0] if warnings else []) if all(text in each for each in warnings)]
        single = [
            f"{name}: {text}"
            for name, each in zip(self.names, warnings, strict=True)
            for text in each
            if text not in common
        ]
        return [*self.notes, *common, *single]

    def canonical(self) -> bytes:
        """Bytes for a digest of the row before rendering; they differ if the rows do."""
        parts = [self.where, self.kind, self.id, self.category, self.labels, self.error, self.conversations]
        return json.dumps(parts, separators=(",", ":")).encode() + b"\n"

    def _location(self, name: str) -> str:
        return self.where if self.kind == "conversation" else f"{self.where}: {name}"


OutputRecord = dict[str, Any]
COLUMNS = (
    "where",
    "id",
    "category",
    "labels",
    "score",
    "scores",
    "margin",
    "probability_chosen",
    "ranks",
    "best",
    "tokens",
    "warnings",
    "error",
)
"""All keys of a record, in order. A record has only the keys that apply to its row."""


def make_output_record(row: InputRow, scores: Sequence[float]) -> OutputRecord:
    """Make the record of a row from one score per conversation.

    Every record has `where`, and `id`, `category` and `labels` if the row has them. The other keys depend on the row:

    * scored rows: `scores` and `tokens`, one per conversation in the row's order, and `warnings` if any;
    * pairs: `margin` (chosen score - rejected score) and `probability_chosen` (the sigmoid of the margin);
    * N responses: `ranks` (1 is the highest score; equal scores share a rank) and `best` (index of the first rank 1);
    * single conversations: `score`;
    * rows that could not be scored: `error`.
    """
    record: OutputRecord = {"where": row.where}
    if row.id is not None:
        record["id"] = row.id
    if row.category:
        record["category"] = row.category
    if row.labels:
        record["labels"] = row.labels
    if row.error:
        return record | {"error": row.error}
    if row.kind == "conversation":
        record["score"] = scores[0]
    record["scores"] = list(scores)
    if row.kind == "pair":
        record["margin"] = scores[0] - scores[1]
        record["probability_chosen"] = probability_preferred(record["margin"])
    elif row.kind == "responses":
        record["ranks"] = ranks_of(scores)
        record["best"] = record["ranks"].index(1)
    record["tokens"] = [len(rendered.token_ids) for rendered in row.rendered]
    if warnings := row.warnings():
        record["warnings"] = warnings
    return record


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Rank of each score; 1 is the highest, and equal scores share the better rank."""
    first: dict[float, int] = {}
    for rank, score in enumerate(sorted(scores, reverse=True), start=1):
        first.setdefault(score, rank)
    return [first[score] for score in scores]
