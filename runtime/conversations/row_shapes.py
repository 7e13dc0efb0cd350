"""The id, the category and the labels of a row, and the row that a pair is written as.

`runtime.conversations.rows.recognise` reads the conversations.
"""

from __future__ import annotations

import math
from typing import Any

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import (
    UNCATEGORISED,
    ChatMessage,
    PreferencePair,
    describe_value,
    location_prefix,
)
from runtime.conversations.rows.context import RowOptions
from runtime.conversations.rows.recognise import read_row

_LABELS_OF_TEXT = ("label", "labels", "winner", "source", "domain", "language")
_LONGEST_LABEL = 200  # characters
_LONGEST_LIST = 64  # numbers; a longer list is data, such as an embedding
RESPONSES_EXAMPLE = '{"prompt": [{"role": "user", "content": "..."}], "responses": ["...", "..."]}'


def parse_row(row: Any, where: str = "", options: RowOptions | None = None) -> PreferencePair | list[ChatMessage]:
    """Read a row that holds one preference pair or one conversation.

    Raises:
        EmptyConversationError: the prompt or a response is blank.
        ConversationError: the row has no known format, or holds several pairs or responses.
    """
    reading = read_row(row, where, options)
    if reading.kind == "pair":
        return reading.pairs(read_category(row), where)[0]
    if reading.kind == "conversation":
        return reading.conversations[0]
    raise ConversationError(f"{location_prefix(where)}the row has {len(reading.responses)} responses, not a pair.")


def pair_to_row(pair: PreferencePair) -> dict[str, Any]:
    """The row that `parse_row` reads back as `pair`, apart from `where`."""
    if pair.prompt[-1]["role"] != "assistant" and any(
        response[0]["role"] != "assistant" for response in (pair.chosen, pair.rejected)
    ):
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


def read_labels(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says about its responses: its other numbers, truth values and lists of them, and some short texts.

    Examples are `helpfulness` of HelpSteer 2, `overall_preference` of HelpSteer 3, `label` of KTO, `score_ratio` of SHP
    and `winner` of Chatbot Arena.
    """
    return {
        key: value for key, value in row.items() if key not in ("id", "category", "subset") and _is_label(key, value)
    }


def _is_label(key: str, value: Any) -> bool:
    if isinstance(value, str):
        return key in _LABELS_OF_TEXT and len(value) <= _LONGEST_LABEL
    numbers = value if isinstance(value, list) else [value]
    return 0 < len(numbers) <= _LONGEST_LIST and all(
        isinstance(each, int) or (isinstance(each, float) and math.isfinite(each)) for each in numbers
    )
