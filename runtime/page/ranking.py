"""Read, score and rank any number of responses to one prompt."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from runtime.api.service import ServedModel
from runtime.batch.row import ranks_of
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.row_files import read_jsonl_file, read_rows
from runtime.conversations.row_shapes import RESPONSES_EXAMPLE
from runtime.conversations.rows.prompts import PROMPT_KEYS
from runtime.conversations.rows.recognise import matching_shapes, read_row
from runtime.evaluation.charts import Axis
from runtime.page.tokenizing import render_responses
from runtime.scorer import probability_preferred

SEPARATOR = "==="
MAX_RESPONSES = 256
_NO_PROMPT = "(none)"  # of a row with responses alone, whose prompt the visitor writes
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


@dataclass(frozen=True)
class ReadResponses:
    """The prompt and the responses of a file or of pasted rows.

    Attributes:
        prompt: empty if the rows have none.
        note: the format of the rows and the warnings on reading them.
    """

    prompt: str
    responses: list[str]
    note: str


def read_responses(path: Path) -> ReadResponses:
    """Read an uploaded file: the first row's responses, or the one response of every row.

    Raises:
        ConversationError: a row cannot be read, there are no rows, or they have different prompts.
    """
    found = _collect(read_rows(path))
    if found is None:
        raise ConversationError(f"{path.name} has no response; a row looks like {RESPONSES_EXAMPLE}.")
    return found


def read_pasted(text: str) -> ReadResponses | None:
    """Read a pasted row, rows as JSON lines, or a JSON list of texts; None if the text is none of these.

    Raises:
        ConversationError: as `read_responses`.
    """
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) for each in value):
        return ReadResponses("", value, "")
    rows = [(f"row {number}", row) for number, row in enumerate(value if isinstance(value, list) else [value], 1)]
    if value is None:
        try:
            rows = list(islice(read_jsonl_file(io.BytesIO(text.encode(errors="replace")), "line"), MAX_RESPONSES + 1))
        except ConversationError:
            return None
    if not all(isinstance(row, dict) and matching_shapes(row) for _, row in rows):
        return None  # responses may be JSON themselves
    return _collect(rows)


def _collect(located_rows: Iterable[tuple[str, Any]]) -> ReadResponses | None:
    prompt = ""
    responses: list[str] = []
    notes: list[str] = []
    for where, row in located_rows:
        row_prompt, added, note, several = _read_candidates(where, row)
        if prompt and row_prompt and row_prompt != prompt:
            raise ConversationError(
                f"{where}: the prompt differs from that of earlier rows, but only responses to the same prompt can be "
                "ranked; score the file in the Batch tab."
            )
        prompt, responses = prompt or row_prompt, [*responses, *added]
        notes += [] if notes else note
        if several or len(responses) > MAX_RESPONSES:
            break
    return ReadResponses(prompt, responses, "; ".join(notes)) if responses else None


def _read_candidates(where: str, row: Any) -> tuple[str, list[str], list[str], bool]:
    """The prompt of a row, its responses, notes on it, and whether it has several responses."""
    lacks_prompt = isinstance(row, dict) and not {"messages", *PROMPT_KEYS} & row.keys()
    if lacks_prompt and {"response", "responses"} & row.keys():
        row = {"prompt": _NO_PROMPT, **row}
    reading = read_row(row, where)
    prompt, responses = reading.prompt, reading.responses
    if reading.kind == "conversation":
        prompt, responses = reading.conversations[0][:-1], [reading.conversations[0][-1:]]
    if [turn["role"] for turn in prompt] != ["user"] or any(len(turns) != 1 for turns in responses):
        raise ConversationError(
            f"{where}: the prompt is a conversation, but here it is one turn of the user; score the file in the Batch "
            "tab."
        )
    text = prompt[0]["content"]
    notes = [f"{where}: the format is {reading.format}", *reading.warnings]
    return (
        "" if text == _NO_PROMPT else text,
        [turns[0]["content"] for turns in responses],
        notes,
        reading.kind != "conversation",
    )


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
