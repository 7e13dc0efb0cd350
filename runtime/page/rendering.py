"""A visitor's responses as tokens, made away from the event loop and no more than a request may have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastapi.concurrency import run_in_threadpool

from runtime.api.batcher import count_tokens
from runtime.api.limits import Limits
from runtime.api.service import ServedModel
from runtime.chat import Rendered
from runtime.conversation import Message
from runtime.errors import ConversationError

MOST_TOKENS = Limits().tokens


async def render(
    model: ServedModel, turns: Sequence[Message], responses: Sequence[str], names: Iterable[object]
) -> list[Rendered]:
    """Each response after the turns, whose oldest are dropped where it would be too long.

    Args:
        names: of the responses in errors, such as `A`.

    Raises:
        ConversationError: a response cannot be rendered, or all of them have more than `MOST_TOKENS` tokens together.
    """
    rendered = await run_in_threadpool(_render, model, turns, responses, names)
    tokens = count_tokens(rendered)
    if tokens > MOST_TOKENS:
        raise ConversationError(
            f"The responses, each with the conversation before it, have {tokens:,} tokens, and {MOST_TOKENS:,} fit "
            "here; shorten them, or score them in the Batch tab."
        )
    return rendered


def _render(
    model: ServedModel, turns: Sequence[Message], responses: Sequence[str], names: Iterable[object]
) -> list[Rendered]:
    return [
        model.scorer.renderer.render(
            [*turns, {"role": "assistant", "content": text}], truncate=True, where=f"Response {name}"
        )
        for name, text in zip(names, responses, strict=True)
    ]
