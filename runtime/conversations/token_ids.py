"""Take token ids that a client rendered, in place of messages."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import location_prefix
from runtime.conversations.rendering import RenderedConversation, Renderer


def take_token_ids(
    token_ids: Sequence[int], renderer: Renderer, vocab_size: int, where: str = ""
) -> RenderedConversation:
    """A rendering of token ids as they are given. They must end as a rendered conversation ends, which is scored there.

    Raises:
        ConversationError: an id is not in the vocabulary, there are too many, or they do not end with the scored token.
    """
    prefix = location_prefix(where)
    wrong = next((index for index, token in enumerate(token_ids) if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ConversationError(f"{prefix}token {wrong} is {token_ids[wrong]}; ids are from 0 to {vocab_size - 1:,}.")
    if len(token_ids) > renderer.max_positions:
        raise ConversationError(
            f"{prefix}{len(token_ids)} tokens, but the model has {renderer.max_positions} positions; shorten it."
        )
    end = renderer.ending
    if len(token_ids) <= len(end) or list(token_ids[-len(end) :]) != end:
        found = f"end with {token_ids[-1]}" if token_ids else "are empty"
        raise ConversationError(
            f"{prefix}the token ids {found}; they must end with {', '.join(map(str, end))}, the token that is scored. "
            "Render the whole conversation with the model's chat template, without a generation prompt."
        )
    return RenderedConversation(list(token_ids), len(token_ids) - len(end))
