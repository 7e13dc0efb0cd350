"""Any number of responses to one prompt, scored and put in order."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.api.service import ServedModel
from runtime.charts import Axis
from runtime.conversation import RESPONSES_SHAPE, Message, parse_row
from runtime.errors import ConversationError
from runtime.page.rendering import render
from runtime.preference import probability_preferred
from runtime.rows import read_rows
from runtime.scored_row import ranks_of

SEPARATOR = "==="
MOST_RESPONSES = 256
_BETWEEN = re.compile(rf"^[ \t]*{SEPARATOR}[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Ranked:
    """One response.

    Attributes:
        rank: 1 for the highest score; equals share one.
        number: its place among those that were given, from 1.
        tie: whether the best response's lead over it is within the model's parity error.
    """

    rank: int
    number: int
    text: str
    score: float
    tokens: int
    warnings: list[str]
    tie: bool
    probability_over_best: float


def split_responses(text: str) -> list[str]:
    """The blocks between lines of `===`, blank ones left out."""
    return [block.strip("\n") for block in _BETWEEN.split(text.replace("\r\n", "\n")) if block.strip()]


def join_responses(responses: Sequence[str]) -> str:
    """The same backwards.

    Raises:
        ConversationError: a response has a line of `===` of its own, or is blank.
    """
    for number, response in enumerate(responses, 1):
        if len(split_responses(response)) != 1 or _BETWEEN.search(response):
            raise ConversationError(
                f"Response {number} is blank or has a line {SEPARATOR} of its own, which separates responses here; "
                "score the file as a batch."
            )
    return f"\n\n{SEPARATOR}\n\n".join(response.strip("\n") for response in responses)


def read_responses(path: Path) -> tuple[str, list[str]]:
    """The prompt and the responses of an uploaded file: its first row with `responses`, or its rows' `response`.

    Raises:
        ConversationError: it is no such file, or its prompts differ.
    """
    prompt, responses = "", []
    for where, row in read_rows(path):
        if not isinstance(row, dict):
            raise ConversationError(f"{where}: the row is no object; {RESPONSES_SHAPE} was expected.")
        if row.get("messages") is not None:  # as CSV's columns of prompt and response are read
            row = _read_exchange(row["messages"], where)
        asked = _text(row.get("prompt", ""), f"{where}: prompt", "user")
        if prompt and asked and asked != prompt:
            raise ConversationError(
                f"{where}: the prompt is not that of the rows before it, and responses to different prompts are not "
                "ranked among each other; score the file in the Batch tab."
            )
        prompt = prompt or asked
        if isinstance(row.get("responses"), list):
            responses = [_text(each, f"{where}: responses[{index}]") for index, each in enumerate(row["responses"])]
            break
        if "response" in row:
            responses.append(_text(row["response"], f"{where}: response"))
        if len(responses) > MOST_RESPONSES:
            break
    if not responses:
        raise ConversationError(f"{path.name} has no response; such a row is {RESPONSES_SHAPE}.")
    return prompt, responses


async def rank(model: ServedModel, turns: Sequence[Message], responses: Sequence[str]) -> list[Ranked]:
    """Score the responses in one request, best first.

    Raises:
        ConversationError: there is none, there are more than `MOST_RESPONSES`, or they are too long.
        Busy: the queue is full.
    """
    if not responses:
        raise ConversationError(f"There is no response; paste some, with a line {SEPARATOR} between them.")
    if len(responses) > MOST_RESPONSES:
        raise ConversationError(
            f"{len(responses):,} responses are more than the {MOST_RESPONSES} that fit here; score them as a batch."
        )
    rendered = await render(model, turns, responses, range(1, len(responses) + 1))
    scores = await asyncio.wrap_future(model.submit(rendered))
    best, error = max(scores), model.error_margin
    ranked = [
        Ranked(
            place,
            number,
            text,
            score,
            len(each.token_ids),
            each.warnings,
            place > 1 and error is not None and best - score <= error,
            probability_preferred(score - best),
        )
        for number, (place, text, score, each) in enumerate(
            zip(ranks_of(scores), responses, scores, rendered, strict=True), 1
        )
    ]
    return sorted(ranked, key=lambda each: (each.rank, each.number))


def bar_axis(ranked: Sequence[Ranked]) -> Axis:
    """Scores in percent of a bar's room, from a little below the lowest: they have no zero, only differences."""
    scores = [each.score for each in ranked]
    low, high = min(scores), max(scores)
    return Axis(low - 0.08 * (high - low), high, 0.0, 100.0) if high > low else Axis(low - 1.0, low, 0.0, 100.0)


def _read_exchange(messages: Any, where: str) -> dict[str, str]:
    """The prompt and the response of messages that are nothing more."""
    turns = parse_row({"messages": messages}, where)
    if not isinstance(turns, list) or [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise ConversationError(
            f"{where}: messages are other turns than one of the user and one of the assistant; score the file in the "
            "Batch tab."
        )
    return {"prompt": turns[0]["content"], "response": turns[1]["content"]}


def _text(value: Any, where: str, role: str = "assistant") -> str:
    """Text, or the one turn of messages, which is the role's."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == role:
        value = value[0].get("content")
    if not isinstance(value, str):
        raise ConversationError(f"{where} is no text; score the file as a batch, which takes messages too.")
    return value
