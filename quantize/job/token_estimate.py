"""Estimate the tokens of conversations without a tokenizer, for a plan from a config.json alone."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.rendering import RenderedConversation

CHARACTERS_PER_TOKEN = 4  # for English text and a Qwen tokenizer
TEMPLATE_TOKENS = 10  # the chat template's tokens per conversation, with an empty system turn
TURN_TOKENS = 5  # the chat template's tokens per turn


class TokenEstimator:
    """Renders a conversation to as many tokens as its tokenizer would give, about.

    Every fourth character stands for a token, so that conversations with a common beginning share a prefix.
    """

    def __init__(self, max_positions: int):
        self.max_positions = max_positions

    def render(self, messages: Sequence[ChatMessage], *, where: str = "") -> RenderedConversation:
        """Raise ConversationError if the estimate is above `max_positions`."""
        token_ids = [0] * TEMPLATE_TOKENS
        for message in messages:
            token_ids += [0] * TURN_TOKENS + [ord(letter) for letter in message["content"][::CHARACTERS_PER_TOKEN]]
        if len(token_ids) > self.max_positions:
            raise ConversationError(f"{where}: about {len(token_ids)} tokens, of at most {self.max_positions}.")
        return RenderedConversation(token_ids, len(token_ids) - 1)
