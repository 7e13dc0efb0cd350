"""Conversations for the speed benchmark: from a file, or generated ones that are the same on every machine."""

from __future__ import annotations

import random
from itertools import islice

from runtime.batch.reader import ScoreInput
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.rendering import RenderedConversation, Renderer

MAX_WORDS = 300  # per turn; fewer if the model has few positions
MIN_WORDS = 8
_MAX_WORD_TOKENS = 8  # upper bound of the tokens of a word and the space before it
_TEXT = (
    "a the of to and in that it is was for on are with as be at one have this from by hot but some what there we can "
    "out other were all your when up use word how said an each she which do their time if will way about many then "
    "them would write like so these her long make thing see him two has look more day could go come did my sound no "
    "most number who over know water than call first people may down side been now find any new work part take get"
)
_WORDS = _TEXT.split()


def load_rows_from_file(source: str, count: int, renderer: Renderer) -> tuple[list[RenderedConversation], int]:
    """Conversations of the first `count` rows of a file, and the number of these rows that cannot be scored.

    Raises:
        ConversationError: the file cannot be read, or none of the rows can be scored.
    """
    conversations: list[RenderedConversation] = []
    errors, first = 0, ""
    for row in islice(ScoreInput.open(source), count):
        row.render(renderer, truncate=False)
        conversations += row.rendered
        errors += bool(row.error)
        first = first or row.error
    if not conversations:
        raise ConversationError(first or f"{source} has no rows; at least one row is needed.")
    return conversations, errors


def generate_rows(count: int, renderer: Renderer) -> list[RenderedConversation]:
    """Both conversations of `count` generated pairs, whose turns have 8 to 300 words, log-uniformly distributed."""
    rng = random.Random(0)
    max_words = max(MIN_WORDS, min(MAX_WORDS, renderer.max_positions // (2 * _MAX_WORD_TOKENS + 4)))  # two turns fit
    return [renderer.render(conversation) for _ in range(count) for conversation in _pair(rng, max_words)]


def _pair(rng: random.Random, max_words: int) -> list[list[ChatMessage]]:
    prompt = {"role": "user", "content": _random_text(rng, max_words)}
    return [[prompt, {"role": "assistant", "content": _random_text(rng, max_words)}] for _ in range(2)]


def _random_text(rng: random.Random, max_words: int) -> str:
    words = round(MIN_WORDS * (max_words / MIN_WORDS) ** rng.random())
    return " ".join(rng.choice(_WORDS) for _ in range(words))
