"""Read, score and rank any number of responses to one prompt."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.api.service import ServedModel
from runtime.batch.row import ranks_of
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.row_files import read_rows
from runtime.conversations.row_shapes import RESPONSES_EXAMPLE, parse_row
from runtime.evaluation.charts import Axis
from runtime.page.tokenizing import render_responses
from runtime.scorer import probability_preferred

SEPARATOR = "==="
MAX_RESPONSES = 256
_SEPARATOR_LINE = re.compile(rf"^[ \t]*{SEPARATOR}[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class RankedResponse:
    """A response with its score.

    Attributes:
        rank: 1 for the highest score; equal scores share a rank.
        number: position in the input, from 1.
        tie: whether it ranks below the best by no more than the model's parity error.
        probability_over_best: probability that people prefer it to the best response.
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
    """Split the text at lines of `===`, dropping blank blocks."""
    return [block.strip("\n") for block in _SEPARATOR_LINE.split(text.replace("\r\n", "\n")) if block.strip()]


def join_responses(responses: Sequence[str]) -> str:
    """Join responses so that `split_responses` gives them back.

    Raises:
        ConversationError: a response contains a line of `===`, or is blank.
    """
    for number, response in enumerate(responses, 1):
        if len(split_responses(response)) != 1 or _SEPARATOR_LINE.search(response):
            raise ConversationError(
                f"Response {number} is blank or contains a line {SEPARATOR}, which separates responses; "
                "score the file in the Batch tab."
            )
    return f"\n\n{SEPARATOR}\n\n".join(response.strip("\n") for response in responses)


def read_responses(path: Path) -> tuple[str, list[str]]:
    """Read the prompt and the responses of an uploaded file: the first row's `responses`, or every row's `response`.

    Raises:
        ConversationError: the file has no responses, or its rows have different prompts.
    """
    prompt, responses = "", []
    for where, row in read_rows(path):
        if not isinstance(row, dict):
            raise ConversationError(f"{where}: the row is not an object; expected {RESPONSES_EXAMPLE}.")
        if row.get("messages") is not None:  # CSV rows of a prompt and a response are read as messages
            row = _read_exchange(row["messages"], where)
        row_prompt = _text(row.get("prompt", ""), f"{where}: prompt", "user")
        if prompt and row_prompt and row_prompt != prompt:
            raise ConversationError(
                f"{where}: the prompt differs from that of earlier rows, but only responses to the same prompt can be "
                "ranked; score the file in the Batch tab."
            )
        prompt = prompt or row_prompt
        if isinstance(row.get("responses"), list):
            responses = [_text(each, f"{where}: responses[{index}]") for index, each in enumerate(row["responses"])]
            break
        if "response" in row:
            responses.append(_text(row["response"], f"{where}: response"))
        if len(responses) > MAX_RESPONSES:
            break
    if not responses:
        raise ConversationError(f"{path.name} has no response; a row looks like {RESPONSES_EXAMPLE}.")
    return prompt, responses


async def rank_responses(
    model: ServedModel, turns: Sequence[ChatMessage], responses: Sequence[str]
) -> list[RankedResponse]:
    """Score the responses in one request and sort them, best first.

    Raises:
        ConversationError: there are no responses, more than `MAX_RESPONSES`, or too many tokens.
        ServerBusyError: the queue is full.
    """
    if not responses:
        raise ConversationError(f"There is no response; paste responses with a line {SEPARATOR} between them.")
    if len(responses) > MAX_RESPONSES:
        raise ConversationError(
            f"There are {len(responses):,} responses; the limit is {MAX_RESPONSES}. Score them in the Batch tab."
        )
    rendered = await render_responses(model, turns, responses, range(1, len(responses) + 1))
    scores = await asyncio.wrap_future(model.submit(rendered))
    best, error = max(scores), model.error_margin
    ranked = [
        RankedResponse(
            rank=rank,
            number=number,
            text=text,
            score=score,
            tokens=len(each.token_ids),
            warnings=each.warnings,
            tie=rank > 1 and error is not None and best - score <= error,
            probability_over_best=probability_preferred(score - best),
        )
        for number, (rank, text, score, each) in enumerate(
            zip(ranks_of(scores), responses, scores, rendered, strict=True), 1
        )
    ]
    return sorted(ranked, key=lambda each: (each.rank, each.number))


def bar_axis(ranked: Sequence[RankedResponse]) -> Axis:
    """The axis from scores to bar widths in percent, starting slightly below the lowest score."""
    scores = [each.score for each in ranked]
    low, high = min(scores), max(scores)
    return Axis(low - 0.08 * (high - low), high, 0.0, 100.0) if high > low else Axis(low - 1.0, low, 0.0, 100.0)


def _read_exchange(messages: Any, where: str) -> dict[str, str]:
    """Split messages that are exactly one user turn and one assistant turn."""
    turns = parse_row({"messages": messages}, where)
    if not isinstance(turns, list) or [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise ConversationError(
            f"{where}: messages must be one user turn and one assistant turn; score the file in the Batch tab."
        )
    return {"prompt": turns[0]["content"], "response": turns[1]["content"]}


def _text(value: Any, where: str, role: str = "assistant") -> str:
    """Return a text, or the text of a list that holds one message of that role."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == role:
        value = value[0].get("content")
    if not isinstance(value, str):
        raise ConversationError(f"{where} is not text; score the file in the Batch tab, which also accepts messages.")
    return value
