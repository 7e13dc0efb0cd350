"""A row of a file as scoring sees it: what it asks to have scored, or the fault that stands in the way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.chat import Rendered, Renderer
from runtime.conversation import (
    MESSAGES_SHAPE,
    PAIR_SHAPE,
    RESPONSES_SHAPE,
    UNCATEGORISED,
    Message,
    PreferencePair,
    parse_responses,
    parse_row,
    read_category,
    read_id,
)
from runtime.errors import ConversationError, printable

Kind = Literal["pair", "responses", "conversation"]
_KEYS = ("chosen", "rejected", "responses", "messages")


@dataclass
class Scorable:
    """One row.

    Attributes:
        where: the place it was read from, such as ``pairs.jsonl:12``.
        kind: `pair` (chosen, then rejected), `responses` (any number to one prompt) or `conversation`.
        conversations: what is to be scored, until it is rendered.
        rendered: the same as tokens.
        id: what the row calls itself, if it does.
        category: its `category` or `subset`, empty if it has none.
        error: why it cannot be scored, beginning with `where`; empty if it can.
    """

    where: str
    kind: Kind = "conversation"
    conversations: list[list[Message]] = field(default_factory=list)
    rendered: list[Rendered] = field(default_factory=list)
    id: str | int | float | None = None
    category: str = ""
    error: str = ""

    @classmethod
    def read(cls, row: Any, where: str) -> Scorable:
        """Take a row as `runtime.rows` yields it, its fault if it has one included."""
        scorable = cls(printable(where))
        try:
            if isinstance(row, ConversationError):
                raise row
            if isinstance(row, dict):
                category = read_category(row)
                scorable.category = "" if category == UNCATEGORISED else category
                scorable.id = read_id(row, where)
            scorable.kind, scorable.conversations = _read_conversations(row, where)
        except ConversationError as fault:
            scorable.fail(fault)
        return scorable

    @property
    def names(self) -> list[str]:
        """What the row calls each of its conversations."""
        if self.kind == "pair":
            return ["chosen", "rejected"]
        count = len(self.rendered or self.conversations)
        return [f"responses[{index}]" for index in range(count)] if self.kind == "responses" else ["messages"]

    @property
    def tokens(self) -> int:
        """Tokens of all its renderings; what they share is counted for each."""
        return sum(len(rendered.token_ids) for rendered in self.rendered)

    def render(self, renderer: Renderer, *, truncate: bool) -> None:
        """Turn the conversations into tokens, or find out why that cannot be."""
        if self.error:
            return
        try:
            self.rendered = [
                renderer.render(conversation, truncate=truncate, where=self._place(name))
                for name, conversation in zip(self.names, self.conversations, strict=True)
            ]
        except ConversationError as fault:
            self.fail(fault)
        self.conversations = []

    def fail(self, fault: Exception) -> None:
        """Give up this row for a fault."""
        text = printable(str(fault))
        self.error = text if text.startswith(self.where) else f"{self.where}: {text}"
        self.conversations, self.rendered = [], []

    def warnings(self) -> list[str]:
        """What the renderer remarked: once where it holds for all conversations, else with the one's name."""
        remarks = [rendered.warnings for rendered in self.rendered]
        common = [text for text in (remarks[0] if remarks else []) if all(text in each for each in remarks)]
        single = [
            f"{name}: {text}"
            for name, each in zip(self.names, remarks, strict=True)
            for text in each
            if text not in common
        ]
        return common + single

    def canonical(self) -> bytes:
        """Bytes that differ where two rows do, before they are rendered."""
        parts = [self.where, self.kind, self.id, self.category, self.error, self.conversations]
        return json.dumps(parts, separators=(",", ":")).encode() + b"\n"

    def _place(self, name: str) -> str:
        return self.where if self.kind == "conversation" else f"{self.where}: {name}"


def _read_conversations(row: Any, where: str) -> tuple[Kind, list[list[Message]]]:
    present = [key for key in _KEYS if row.get(key) is not None] if isinstance(row, dict) else []
    if present[:1] == ["responses"]:
        return "responses", parse_responses(row, where)
    if isinstance(row, dict) and not present:
        keys = f"the keys {', '.join(repr(key) for key in row)}"[:200] if row else "no keys"
        raise ConversationError(
            f"{where}: the row has {keys}; {PAIR_SHAPE}, {RESPONSES_SHAPE} or {MESSAGES_SHAPE} was expected."
        )
    parsed = parse_row(row, where)
    if isinstance(parsed, PreferencePair):
        return "pair", [parsed.chosen_conversation, parsed.rejected_conversation]
    return "conversation", [parsed]
