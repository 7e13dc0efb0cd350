"""`/v1/scores`: score conversations."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from runtime.api.errors import ERROR_RESPONSES
from runtime.api.schema import CONVERSATION, Messages, ModelName, NativeRequest, example
from runtime.api.scoring import RequestConversation, RequestScorerDep

router = APIRouter(tags=["worldpm-kit"], responses=ERROR_RESPONSES)


class ScoresRequest(NativeRequest):
    """Conversations to score."""

    model_config = example({"conversations": [CONVERSATION]})

    conversations: Annotated[list[Messages], Field(min_length=1)]
    model: ModelName = None
    truncate: Annotated[
        bool | None, Field(description="Drop the oldest turns of a conversation that is too long, with a warning.")
    ] = False


class ScoresAnswer(BaseModel):
    """One entry per conversation, in the request's order."""

    model: str
    scores: list[float]
    tokens: list[int]
    warnings: Annotated[list[list[str]], Field(description="Such as a non-empty system prompt, or dropped turns.")]


@router.post("/v1/scores", summary="Score conversations")
async def score_conversations(body: ScoresRequest, scorer: RequestScorerDep) -> ScoresAnswer:
    """The score of each conversation's last turn. It does not depend on the other conversations."""
    conversations = [
        RequestConversation(f"conversations[{row}]", [message.to_message() for message in messages])
        for row, messages in enumerate(body.conversations)
    ]
    scored = await scorer.score(body.model, conversations, "conversations", truncate=bool(body.truncate))
    return ScoresAnswer(model=scored.model.name, scores=scored.scores, tokens=scored.tokens, warnings=scored.warnings)
