"""Conversations to measure speed on: a file's, or made-up ones that are the same everywhere."""

from __future__ import annotations

import random
from itertools import islice

from runtime.chat import Rendered, Renderer
from runtime.conversation import Message
from runtime.errors import ConversationError
from runtime.score_input import ScoreInput

LONGEST = 300  # words of a prompt or a response, unless the model has few positions
SHORTEST = 8
_LONGEST_WORD = 8
_TEXT = (
    "a the of to and in that it is was for on are with as be at one have this from by hot but some what there we can "
    "out other were all your when up use word how said an each she which do their time if will way about many then "
    "them would write like so these her long make thing see him two has look more day could go come did my sound no "
    "most number who over know water than call first people may down side been now find any new work part take get"
)
_WORDS = _TEXT.split()


def rows_of_file(source: str, count: int, renderer: Renderer) -> tuple[list[Rendered], int]:
    """Conversations of the first `count` rows of a file, and how many of these rows cannot be scored.

    Raises:
        ConversationError: the file cannot be read, or none of them can be scored.
    """
    conversations: list[Rendered] = []
    errors, first = 0, ""
    for row in islice(ScoreInput.open(source), count):
        row.render(renderer, truncate=False)
        conversations += row.rendered
        errors += bool(row.error)
        first = first or row.error
    if not conversations:
        raise ConversationError(first or f"{source} has no rows; at least one to score was expected.")
    return conversations, errors


def made_up_rows(count: int, renderer: Renderer) -> list[Rendered]:
    """Both conversations of `count` pairs, whose turns have 8 to 300 words, short ones as often as long ones."""
    draw = random.Random(0)
    longest = max(SHORTEST, min(LONGEST, renderer.max_positions // (2 * _LONGEST_WORD + 4)))  # so that two turns fit
    return [renderer.render(conversation) for _ in range(count) for conversation in _pair(draw, longest)]


def _pair(draw: random.Random, longest: int) -> list[list[Message]]:
    prompt = {"role": "user", "content": _text(draw, longest)}
    return [[prompt, {"role": "assistant", "content": _text(draw, longest)}] for _ in range(2)]


def _text(draw: random.Random, longest: int) -> str:
    words = round(SHORTEST * (longest / SHORTEST) ** draw.random())
    return " ".join(draw.choice(_WORDS) for _ in range(words))
