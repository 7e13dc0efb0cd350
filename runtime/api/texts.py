"""Texts that are whole conversations in some template, as other servers' clients send them."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.api.faults import Fault
from runtime.api.schema import Message
from runtime.api.scoring import Conversation
from runtime.errors import ConversationError
from runtime.policy_text import read_policy_text


def read_texts(
    texts: Sequence[str], field: str, prompts: Sequence[str | None] | None = None, *, keep_system: bool = True
) -> list[Conversation]:
    """Each as a conversation called `field[index]`; a prompt, where it is given, is what the text begins with.

    Raises:
        Fault: 422, no turns can be told apart.
    """
    conversations = []
    for row, text in enumerate(texts):
        where = f"{field}[{row}]"
        try:
            turns = read_policy_text(text, prompts[row] if prompts else None, where)
        except ConversationError as error:
            raise Fault(422, str(error), where) from error
        kept = turns if keep_system else [turn for turn in turns if turn["role"] != "system"]
        conversations.append(Conversation(where, kept))
    return conversations


def read_input(texts: str | list[str] | None, messages: list[Message] | None) -> tuple[list[Conversation], str]:
    """`input` or `messages`, of which a validator saw that there is one, and the name of that field.

    Raises:
        Fault: as `read_texts`.
    """
    if messages is not None:
        return [Conversation("messages", [message.turn() for message in messages])], "messages"
    assert texts is not None
    return read_texts([texts] if isinstance(texts, str) else texts, "input"), "input"
