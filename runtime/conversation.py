"""Conversations and preference pairs as data, before any template touches them.

Rows come in the shapes that preference data already has (TRL's explicit and implicit prompts,
`messages` alone, RewardBench's local JSON with plain strings) and leave in one: a list of
messages, or a `PreferencePair`. Keys that the kit does not know are ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any

from runtime.errors import ConversationError

Message = dict[str, str]
"""`{"role": one of ROLES, "content": text}`."""

ROLES = ("system", "user", "assistant")
UNCATEGORISED = "uncategorised"
PAIR_SHAPE = (
    '{"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}], '
    '"rejected": [{"role": "assistant", "content": "..."}]}'
)
RESPONSES_SHAPE = '{"prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."]}'
MESSAGES_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class EmptyConversationError(ConversationError):
    """A blank prompt or response; a class of its own, since loaders skip and count such rows."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt and two responses to it, of which the first was preferred.

    `chosen` and `rejected` continue `prompt` and end in an assistant turn; `where` is the place the
    pair was read from, such as ``pairs.jsonl:12``. A category may be divided, as in ``languages/fr``.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    category: str = UNCATEGORISED
    where: str = ""

    @property
    def id(self) -> str:
        """Sixteen hex digits of the sha256 of the messages; equal text has equal ids wherever it was read."""
        return digest_messages(self.prompt, self.chosen, self.rejected)

    @property
    def area(self) -> str:
        """The category without its division; what reports break down by."""
        return area_of(self.category)

    @property
    def chosen_conversation(self) -> list[Message]:
        return [*self.prompt, *self.chosen]

    @property
    def rejected_conversation(self) -> list[Message]:
        return [*self.prompt, *self.rejected]

    def to_row(self) -> dict[str, Any]:
        """A row that `parse_row` reads as this pair; with whole conversations where it would take them for such."""
        if any(_is_whole(self.prompt, response) for response in (self.chosen, self.rejected)):
            row: dict[str, Any] = {"chosen": self.chosen_conversation, "rejected": self.rejected_conversation}
        else:
            row = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return row | {"category": self.category}


def digest_messages(*parts: list[Message]) -> str:
    """Sixteen hex digits that depend on the parts' roles and contents alone."""
    turns = [[(message["role"], message["content"]) for message in part] for part in parts]
    return hashlib.sha256(json.dumps(turns, separators=(",", ":")).encode()).hexdigest()[:16]


def parse_row(row: Any, where: str = "") -> PreferencePair | list[Message]:
    """Read one row: a pair, or the messages of a single conversation.

    `chosen` and `rejected` are text or messages. With a `prompt` (text or messages) they continue it;
    without one, or where they open with a user or system turn although the prompt still awaits its
    answer (as UltraFeedback's rows do), each holds the whole conversation and the turns they have in
    common are the prompt. `category`, or RewardBench's `subset`, names the area.

    Raises:
        EmptyConversationError: the prompt or a response is blank.
        ConversationError: it is no row; the message has `where`, what was found and what was expected.
    """
    if not isinstance(row, dict):
        raise ConversationError(f"{_at(where)}the row is {_found(row)}; an object such as {PAIR_SHAPE} was expected.")
    row = {key: value for key, value in row.items() if value is not None}  # a null column is an absent one
    if "chosen" in row or "rejected" in row:
        return _parse_pair(row, where)
    if "messages" in row:
        messages = _read_messages(row["messages"], "messages", "", where)
        check_conversation(messages, where)
        return messages
    raise ConversationError(
        f"{_at(where)}the row has {_keys(row)}; {PAIR_SHAPE}, or {MESSAGES_SHAPE} for calibration alone, was expected."
    )


def parse_responses(row: dict[str, Any], where: str = "") -> list[list[Message]]:
    """Read a prompt and any number of responses to it, as best-of-N data has them: one conversation each.

    A response is text or messages that continue `prompt` (text or messages), or, as in `parse_row`, the
    messages of the whole conversation.

    Raises:
        EmptyConversationError: the prompt or a response is blank, or there is no response.
        ConversationError: any other fault, by the response's index.
    """
    responses = row.get("responses")
    if not isinstance(responses, list):
        raise ConversationError(f"{_at(where)}responses is {_found(responses)}; such a row is {RESPONSES_SHAPE}.")
    if not responses:
        raise EmptyConversationError(f"{_at(where)}responses is empty; give one or more, or leave the row out.")
    prompt = _read_messages(row["prompt"], "prompt", "user", where) if row.get("prompt") not in (None, []) else []
    conversations = []
    for index, value in enumerate(responses):
        response = _read_messages(value, f"responses[{index}]", "assistant", where)
        conversation = response if prompt and _is_whole(prompt, response) else [*prompt, *response]
        check_conversation(conversation, f"{_at(where)}responses[{index}]")
        if not any(message["content"].strip() for message in conversation[:-1]):
            raise EmptyConversationError(f"{_at(where)}the prompt is blank; give it text or leave the row out.")
        conversations.append(conversation)
    return conversations


def read_id(row: dict[str, Any], where: str = "") -> str | int | float | None:
    """What the row calls itself under `id`; None where that is absent, null or NaN.

    Raises:
        ConversationError: it is neither text nor a number.
    """
    value = row.get("id")
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    raise ConversationError(f"{_at(where)}id is {_found(value)}; text or a number was expected.")


def read_category(row: dict[str, Any]) -> str:
    """The area a row belongs to: its `category`, else its `subset`, else `UNCATEGORISED`."""
    for key in ("category", "subset"):
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip().encode(errors="backslashreplace").decode()
    return UNCATEGORISED


def area_of(category: str) -> str:
    """``languages`` of ``languages/fr``."""
    return category.partition("/")[0]


def check_conversation(messages: Any, where: str = "") -> None:
    """Accept messages that can be rendered and scored.

    Args:
        messages: a list of `{"role", "content"}`; at most one system turn and that first, the last
            turn the assistant's and not blank, at least one user turn before it.
        where: the conversation's place, for the message of an error.

    Raises:
        EmptyConversationError: the response (the last turn) is blank.
        ConversationError: any other fault, by the message's index.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConversationError(f"{_at(where)}messages is {_found(messages)}; a list of messages was expected.")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", where)
        if message["role"] == "system" and index > 0:
            raise ConversationError(f"{_at(where)}messages[{index}] is a system turn; only the first turn may be one.")
    if messages[-1]["role"] != "assistant":
        raise ConversationError(
            f"{_at(where)}the last turn is the {messages[-1]['role']}'s; the response to score, "
            "an assistant turn, was expected there."
        )
    if all(message["role"] != "user" for message in messages):
        raise ConversationError(f"{_at(where)}no turn is the user's; the response needs something it responds to.")
    if not messages[-1]["content"].strip():
        raise EmptyConversationError(f"{_at(where)}the response is blank; give it text or leave the row out.")


def _parse_pair(row: dict[str, Any], where: str) -> PreferencePair:
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ConversationError(f"{_at(where)}the row has {_keys(row)} but no {key!r}; a pair is {PAIR_SHAPE}.")
    chosen = _read_messages(row["chosen"], "chosen", "assistant", where)
    rejected = _read_messages(row["rejected"], "rejected", "assistant", where)
    prompt = _read_messages(row["prompt"], "prompt", "user", where) if row.get("prompt", []) != [] else []
    if not prompt or any(_is_whole(prompt, response) for response in (chosen, rejected)):
        prompt, chosen, rejected = _split_common_prompt(chosen, rejected, where)
    pair = PreferencePair(prompt, chosen, rejected, read_category(row), where)
    check_conversation(pair.chosen_conversation, f"{_at(where)}chosen")
    check_conversation(pair.rejected_conversation, f"{_at(where)}rejected")
    if not any(message["content"].strip() for message in prompt):
        raise EmptyConversationError(f"{_at(where)}the prompt is blank; give it text or leave the row out.")
    return pair


def _is_whole(prompt: list[Message], response: list[Message]) -> bool:
    return response[0]["role"] != "assistant" and prompt[-1]["role"] != "assistant"


def _split_common_prompt(
    chosen: list[Message], rejected: list[Message], where: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Common leading turns, and what remains of each; the last turn always remains."""
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if length == 0:
        raise ConversationError(
            f"{_at(where)}the row has no 'prompt', and 'chosen' and 'rejected' share no first turn to take "
            f"for one; give it a prompt: {PAIR_SHAPE}."
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _read_messages(value: Any, name: str, role_of_text: str, where: str) -> list[Message]:
    """Checked copies with role and content alone; text becomes one turn of `role_of_text`, if given."""
    if isinstance(value, str) and role_of_text:
        message = {"role": role_of_text, "content": value}
        _check_message(message, name, where)
        return [message]
    if not isinstance(value, list):
        expected = "text or a list of messages" if role_of_text else "a list of messages"
        raise ConversationError(
            f"{_at(where)}{name} is {_found(value)}; {expected}, "
            f'[{{"role": "{role_of_text or "user"}", "content": "..."}}], was expected.'
        )
    if not value:
        raise EmptyConversationError(f"{_at(where)}{name} holds no message; fill it or leave the row out.")
    for index, message in enumerate(value):
        _check_message(message, f"{name}[{index}]", where)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_message(message: Any, name: str, where: str) -> None:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ConversationError(
            f'{_at(where)}{name} is {_found(message)}; a message is {{"role": "user", "content": "..."}}.'
        )
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ConversationError(f"{_at(where)}{name} has role {_found(role)}; one of {', '.join(ROLES)} was expected.")
    if not isinstance(content, str):
        raise ConversationError(f"{_at(where)}the content of {name} is {_found(content)}; text was expected.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"{_at(where)}the content of {name} has half a surrogate pair, {content[error.start]!a}, "
            f"at character {error.start}; write the character itself or both of its \\u escapes."
        ) from None


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _keys(row: dict[str, Any]) -> str:
    return f"the keys {', '.join(repr(key) for key in row)}"[:200] if row else "no keys"


def _found(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)) and not value:
        return "an empty list"
    kinds = {
        str: "text",
        dict: "an object",
        list: "a list",
        bool: "the truth value",
        int: "a number",
        float: "a number",
    }
    return f"{kinds.get(type(value), type(value).__name__)} {_brief.repr(value)}"


_brief = reprlib.Repr()  # bounded in length and depth, whatever a row holds
_brief.maxlevel = 3
_brief.maxstring = _brief.maxother = 60
