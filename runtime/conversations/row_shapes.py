"""Row shapes: read a preference pair, N responses or a single conversation from a row of any known layout.

Supported layouts are TRL's explicit and implicit prompts, `messages` alone, RewardBench's plain strings,
UltraFeedback's full conversations, and `responses` for best-of-N. Unknown keys are ignored.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import (
    UNCATEGORISED,
    ChatMessage,
    EmptyConversationError,
    PreferencePair,
    check_conversation,
    check_message,
    describe_value,
    location_prefix,
)

RowKind = Literal["pair", "responses", "conversation"]
PAIR_EXAMPLE = (
    '{"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}], '
    '"rejected": [{"role": "assistant", "content": "..."}]}'
)
RESPONSES_EXAMPLE = '{"prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."]}'
MESSAGES_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_SHAPE_KEYS = ("chosen", "rejected", "responses", "messages")  # the first one present decides how a row is read


def parse_scorable_row(row: Any, where: str = "") -> tuple[RowKind, list[list[ChatMessage]]]:
    """Read a row of any shape: its kind and the conversations to score.

    Returns:
        A pair gives its chosen, then its rejected conversation; N responses give one conversation each, in order.

    Raises:
        EmptyConversationError: a prompt or response is blank, or `responses` is empty.
        ConversationError: the row has no known shape.
    """
    present = [key for key in _SHAPE_KEYS if row.get(key) is not None] if isinstance(row, dict) else []
    if present[:1] == ["responses"]:
        return "responses", parse_responses(row, where)
    if isinstance(row, dict) and not present:
        raise ConversationError(
            f"{location_prefix(where)}the row has {_list_keys(row)}; {PAIR_EXAMPLE}, {RESPONSES_EXAMPLE} or "
            f"{MESSAGES_EXAMPLE} was expected."
        )
    parsed = parse_row(row, where)
    if isinstance(parsed, PreferencePair):
        return "pair", [parsed.chosen_conversation, parsed.rejected_conversation]
    return "conversation", [parsed]


def parse_row(row: Any, where: str = "") -> PreferencePair | list[ChatMessage]:
    """Read a pair, or the messages of a single conversation.

    `chosen` and `rejected` are text or messages. They continue `prompt` (text or messages), except in two layouts in
    which each holds the whole conversation and their common leading turns are the prompt: without `prompt`, and where
    one of them starts with a user or system turn although `prompt` does not end in an assistant turn (UltraFeedback).

    Args:
        row: the decoded row. The category is read from `category`, or else `subset` (RewardBench).
        where: names the row in errors.

    Raises:
        EmptyConversationError: the prompt or a response is blank.
        ConversationError: the row has neither shape; the message has the location, the value and what was expected.
    """
    prefix = location_prefix(where)
    if not isinstance(row, dict):
        raise ConversationError(
            f"{prefix}the row is {describe_value(row)}; an object such as {PAIR_EXAMPLE} was expected."
        )
    row = {key: value for key, value in row.items() if value is not None}  # Parquet has null for an absent column
    if "chosen" in row or "rejected" in row:
        return _parse_pair(row, where)
    if "messages" in row:
        messages = _read_messages(row["messages"], "messages", "", where)
        check_conversation(messages, where)
        return messages
    raise ConversationError(
        f"{prefix}the row has {_list_keys(row)}; {PAIR_EXAMPLE}, or {MESSAGES_EXAMPLE} for "
        "calibration only, was expected."
    )


def parse_responses(row: dict[str, Any], where: str = "") -> list[list[ChatMessage]]:
    """Read N responses to one prompt (best-of-N): one conversation per response.

    A response is text or messages that continue `prompt`, or the messages of the whole conversation, as in `parse_row`.

    Raises:
        EmptyConversationError: the prompt or a response is blank, or `responses` is empty.
        ConversationError: any other violation; the message names the index of the response.
    """
    prefix = location_prefix(where)
    responses = row.get("responses")
    if not isinstance(responses, list):
        raise ConversationError(f"{prefix}responses is {describe_value(responses)}; such a row is {RESPONSES_EXAMPLE}.")
    if not responses:
        raise EmptyConversationError(f"{prefix}responses is empty; give at least one or remove the row.")
    prompt = _read_messages(row["prompt"], "prompt", "user", where) if row.get("prompt") not in (None, []) else []
    conversations = []
    for index, value in enumerate(responses):
        response = _read_messages(value, f"responses[{index}]", "assistant", where)
        conversation = response if prompt and _is_full_conversation(prompt, response) else [*prompt, *response]
        check_conversation(conversation, f"{prefix}responses[{index}]")
        _check_prompt(conversation[:-1], where)
        conversations.append(conversation)
    return conversations


def pair_to_row(pair: PreferencePair) -> dict[str, Any]:
    """The row that `parse_row` reads back as `pair`, apart from `where`."""
    if any(_is_full_conversation(pair.prompt, response) for response in (pair.chosen, pair.rejected)):
        row: dict[str, Any] = {"chosen": pair.chosen_conversation, "rejected": pair.rejected_conversation}
    else:
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return row | {"category": pair.category}


def read_id(row: dict[str, Any], where: str = "") -> str | int | float | None:
    """The `id` of a row; None if it is absent, null or NaN.

    Raises:
        ConversationError: it is neither text nor a finite number.
    """
    value = row.get("id")
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    raise ConversationError(f"{location_prefix(where)}id is {describe_value(value)}; text or a number was expected.")


def read_category(row: dict[str, Any]) -> str:
    """The `category` of a row, else its `subset`, else `UNCATEGORISED`."""
    for key in ("category", "subset"):
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip().encode(errors="backslashreplace").decode()
    return UNCATEGORISED


def _parse_pair(row: dict[str, Any], where: str) -> PreferencePair:
    prefix = location_prefix(where)
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ConversationError(f"{prefix}the row has {_list_keys(row)} but no {key!r}; a pair is {PAIR_EXAMPLE}.")
    chosen = _read_messages(row["chosen"], "chosen", "assistant", where)
    rejected = _read_messages(row["rejected"], "rejected", "assistant", where)
    prompt = _read_messages(row["prompt"], "prompt", "user", where) if row.get("prompt", []) != [] else []
    if not prompt or any(_is_full_conversation(prompt, response) for response in (chosen, rejected)):
        prompt, chosen, rejected = _split_common_prompt(chosen, rejected, where)
    pair = PreferencePair(prompt, chosen, rejected, read_category(row), where)
    check_conversation(pair.chosen_conversation, f"{prefix}chosen")
    check_conversation(pair.rejected_conversation, f"{prefix}rejected")
    _check_prompt(prompt, where)
    return pair


def _is_full_conversation(prompt: list[ChatMessage], response: list[ChatMessage]) -> bool:
    """Whether `response` repeats the prompt instead of continuing it."""
    return response[0]["role"] != "assistant" and prompt[-1]["role"] != "assistant"


def _split_common_prompt(
    chosen: list[ChatMessage], rejected: list[ChatMessage], where: str
) -> tuple[list[ChatMessage], list[ChatMessage], list[ChatMessage]]:
    """Common leading turns, and the remaining turns of each; at least the last turn remains."""
    length = 0
    while length < min(len(chosen), len(rejected)) - 1 and chosen[length] == rejected[length]:
        length += 1
    if length == 0:
        raise ConversationError(
            f"{location_prefix(where)}the row has no 'prompt', and 'chosen' and 'rejected' share no first turn that "
            f"could be the prompt; add a prompt: {PAIR_EXAMPLE}."
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _read_messages(value: Any, name: str, text_role: str, where: str) -> list[ChatMessage]:
    """Checked copies with role and content only. Text becomes one turn of `text_role`; an empty role allows no text."""
    prefix = location_prefix(where)
    if isinstance(value, str) and text_role:
        message = {"role": text_role, "content": value}
        check_message(message, name, where)
        return [message]
    if not isinstance(value, list):
        expected = "text or a list of messages" if text_role else "a list of messages"
        raise ConversationError(
            f"{prefix}{name} is {describe_value(value)}; {expected}, "
            f'[{{"role": "{text_role or "user"}", "content": "..."}}], was expected.'
        )
    if not value:
        raise EmptyConversationError(f"{prefix}{name} is an empty list; add messages or remove the row.")
    for index, message in enumerate(value):
        check_message(message, f"{name}[{index}]", where)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_prompt(prompt: list[ChatMessage], where: str) -> None:
    if not any(message["content"].strip() for message in prompt):
        raise EmptyConversationError(f"{location_prefix(where)}the prompt is blank; fill it in or remove the row.")


def _list_keys(row: dict[str, Any]) -> str:
    return f"the keys {', '.join(repr(key) for key in row)}"[:200] if row else "no keys"
