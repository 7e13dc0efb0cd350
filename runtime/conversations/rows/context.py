"""What reading a row needs to know besides the row, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage, PreferencePair, location_prefix

RowKind = Literal["pair", "responses", "conversation"]


@dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    Attributes:
        format: name of the format; None recognises it from the keys of each row.
        columns: name that the format uses, and the row's own name for it.
        lenient: render tool calls and images as text, with a warning, instead of refusing them.
        allow_blank: read blank prompts and responses, which benchmarks score, instead of refusing them.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    lenient: bool = False
    allow_blank: bool = False


@dataclass
class RowContext:
    """State of reading one row: its location, how it is read, and the warnings so far.

    Attributes:
        lenient, allow_blank: as in `RowOptions`.
        rendered: the prompt was rendered by a chat template, so that no token of one in it was typed.
    """

    where: str = ""
    lenient: bool = False
    allow_blank: bool = False
    rendered: bool = False
    warnings: list[str] = field(default_factory=list)

    def error(self, text: str) -> ConversationError:
        """An error that starts with the location."""
        return ConversationError(location_prefix(self.where) + text)

    def refuse(self, what: str, as_text: str) -> None:
        """Refuse content that the reward model was not trained on, or warn that it is rendered `as_text`."""
        if not self.lenient:
            raise self.error(f"{what}; the reward model was not trained on it. --lenient renders it as text.")
        self.warn(f"{what}; {as_text}")

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True)
class RowReading:
    """The conversations of a row.

    Attributes:
        format: name of the format that it was read as.
        kind: `pair` (the preferred one first), `responses` (N to a prompt) or `conversation`.
        prompt: the turns that all conversations share; empty if there are none.
        responses: the turns that continue `prompt`, one list for each conversation.
        names: of the conversations in messages, such as ``chosen`` or ``responses[2]``.
        preferences: (preferred, other) as indices of `responses`, as far as the row states them.
        tied: the row says that neither of two responses is better.
        warnings: on how it was read.
    """

    kind: RowKind
    prompt: list[ChatMessage]
    responses: list[list[ChatMessage]]
    names: list[str]
    preferences: list[tuple[int, int]] = field(default_factory=list)
    tied: bool = False
    format: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def conversations(self) -> list[list[ChatMessage]]:
        """The conversations to score."""
        return [[*self.prompt, *response] for response in self.responses]

    def pairs(self, category: str, where: str) -> list[PreferencePair]:
        """The preference pairs that the row states."""
        return [
            PreferencePair(self.prompt, self.responses[better], self.responses[worse], category, where)
            for better, worse in self.preferences
        ]
