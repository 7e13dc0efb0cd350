"""Render and tokenize a visitor's responses in a worker thread, up to the token limit of one request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastapi.concurrency import run_in_threadpool

from runtime.api.batcher import count_tokens
from runtime.api.options import Limits
from runtime.api.service import ServedModel
from runtime.common.errors import ConversationError
from runtime.conversations.conversation import ChatMessage
from runtime.conversations.rendering import RenderedConversation

MAX_TOKENS = Limits().tokens


async def render_responses(
    model: ServedModel, turns: Sequence[ChatMessage], responses: Sequence[str], names: Iterable[object]
) -> list[RenderedConversation]:
    """Render each response after the turns, dropping the oldest turns of conversations that are too long.

    Args:
        names: identify the responses in error messages, such as `A`.

    Raises:
        ConversationError: a response cannot be rendered, or the conversations exceed `MAX_TOKENS` tokens in total.
    """
    rendered = await run_in_threadpool(_render, model, turns, responses, names)
    tokens = count_tokens(rendered)
    if tokens > MAX_TOKENS:
        raise ConversationError(
            f"The responses, each with the conversation before it, have {tokens:,} tokens; the limit is "
            f"{MAX_TOKENS:,}. Shorten them, or score them in the Batch tab."
        )
    return rendered


def _render(
    model: ServedModel, turns: Sequence[ChatMessage], responses: Sequence[str], names: Iterable[object]
) -> list[RenderedConversation]:
    return [
        model.scorer.renderer.render(
            [*turns, {"role": "assistant", "content": text}], truncate=True, where=f"Response {name}"
        )
        for name, text in zip(names, responses, strict=True)
    ]
