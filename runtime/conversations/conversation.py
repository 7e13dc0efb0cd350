"""Conversations and preference pairs as data, and the checks on their messages.

`runtime.conversations.rows` reads them from rows; `runtime.conversations.rendering` turns them into tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from runtime.common.errors import ConversationError, brief

ChatMessage = dict[str, str]
"""`{"role": one of ROLES, "content": text}`."""

ROLES = ("system", "user", "assistant")
UNCATEGORISED = "uncategorised"


class EmptyConversationError(ConversationError):
    """A blank prompt or response. Loaders skip and count such rows."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a preferred and a rejected response.

    Attributes:
        prompt: the turns that both conversations share.
        chosen: the turns that continue `prompt`; the last one is the assistant's.
        rejected: likewise.
        category: may have a subcategory, as in ``languages/fr``.
        where: file and row that the pair was read from, such as ``pairs.jsonl:12``.
    """

    prompt: list[ChatMessage]
    chosen: list[ChatMessage]
    rejected: list[ChatMessage]
    category: str = UNCATEGORISED
    where: str = ""

    @property
    def id(self) -> str:
        """16 hex digits of the sha256 of the messages; independent of `category` and `where`."""
        return digest_messages(self.prompt, self.chosen, self.rejected)

    @property
    def top_category(self) -> str:
        """The category without its subcategory."""
        return top_category_of(self.category)

    @property
    def chosen_conversation(self) -> list[ChatMessage]:
        """`prompt` and `chosen`."""
        return [*self.prompt, *self.chosen]

    @property
    def rejected_conversation(self) -> list[ChatMessage]:
        """`prompt` and `rejected`."""
        return [*self.prompt, *self.rejected]


def digest_messages(*parts: list[ChatMessage]) -> str:
    """16 hex digits of the sha256 of roles and contents, part by part."""
    turns = [[(message["role"], message["content"]) for message in part] for part in parts]
    return hashlib.sha256(json.dumps(turns, separators=(",", ":")).encode()).hexdigest()[:16]


def top_category_of(category: str) -> str:
    """``languages`` of ``languages/fr``."""
    return category.partition("/")[0]


def check_conversation(messages: Any, where: str = "", *, allow_blank: bool = False) -> None:
    """Check that messages can be rendered and scored.

    Args:
        messages: a list of `{"role", "content"}`. A system turn is allowed in first position only. The last turn must
            be a non-blank assistant turn, after at least one user turn.
        where: names the conversation in errors.
        allow_blank: accept a blank response.

    Raises:
        EmptyConversationError: the response (the last turn) is blank.
        ConversationError: any other violation; the message names the index of the turn.
    """
    prefix = location_prefix(where)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError(f"{prefix}messages is {describe_value(messages)}; a list of messages was expected.")
    for index, message in enumerate(messages):
        check_message(message, f"messages[{index}]", where)
        if message["role"] == "system" and index > 0:
            raise ConversationError(f"{prefix}messages[{index}] is a system turn; only the first turn may be one.")
    if messages[-1]["role"] != "assistant":
        raise ConversationError(
            f"{prefix}the last turn is the {messages[-1]['role']}'s; it must be the assistant turn to score."
        )
    if all(message["role"] != "user" for message in messages):
        raise ConversationError(f"{prefix}no turn is the user's; add the user turn that the response answers.")
    if not allow_blank and not messages[-1]["content"].strip():
        raise EmptyConversationError(f"{prefix}the response is blank; fill it in or remove the row.")


def check_message(message: Any, name: str, where: str) -> None:
    """Check role and content of one message.

    Args:
        message: the value found.
        name: what an error calls it, such as ``messages[2]``.
        where: names the row in errors.

    Raises:
        ConversationError: a key is missing, the role is unknown, or the content is not valid Unicode text.
    """
    prefix = location_prefix(where)
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ConversationError(
            f'{prefix}{name} is {describe_value(message)}; a message is {{"role": "user", "content": "..."}}.'
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ConversationError(
            f"{prefix}{name} has role {describe_value(role)}; one of {', '.join(ROLES)} was expected."
        )
    if not isinstance(content, str):
        raise ConversationError(f"{prefix}the content of {name} is {describe_value(content)}; text was expected.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"{prefix}the content of {name} has an unpaired surrogate, {content[error.start]!a}, at character "
            f"{error.start}; write the character itself or both of its \\u escapes."
        ) from None


def location_prefix(where: str) -> str:
    """``pairs.jsonl:12: `` for an error message; empty if `where` is."""
    return f"{where}: " if where else ""


def describe_value(value: Any) -> str:
    """Type and abbreviated content of a value, for error messages: ``a number 3``."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)) and not value:
        return "an empty list"
    kinds = {
        str: "text",
        dict: "an object",
        list: "a list",
        bool: "the boolean",
        int: "a number",
        float: "a number",
    }
    return f"{kinds.get(type(value), type(value).__name__)} {brief(value)}"
