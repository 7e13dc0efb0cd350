"""`/v1/scores`: conversations in, scores out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from runtime.api.faults import FAULTS
from runtime.api.schema import CONVERSATION, Messages, ModelName, OwnBody, example
from runtime.api.scoring import Asked, Conversation

router = APIRouter(tags=["worldpm-kit"], responses=FAULTS)


class ScoresRequest(OwnBody):
    """Conversations to score."""

    model_config = example({"conversations": [CONVERSATION]})

    conversations: Annotated[list[Messages], Field(min_length=1)]
    model: ModelName = None
    truncate: Annotated[
        bool, Field(description="Drop whole oldest turns of a conversation that is too long, and say so.")
    ] = False


class ScoresAnswer(BaseModel):
    """One entry a conversation, in their order."""

    model: str
    scores: list[float]
    tokens: list[int]
    warnings: Annotated[list[list[str]], Field(description="A system prompt that is not empty; turns dropped.")]


@router.post("/v1/scores", summary="Score conversations")
async def score_conversations(body: ScoresRequest, asked: Asked) -> ScoresAnswer:
    """The score of each conversation's last turn. A score does not depend on what else is scored."""
    conversations = [
        Conversation(f"conversations[{row}]", [message.turn() for message in messages])
        for row, messages in enumerate(body.conversations)
    ]
    scored = await asked.score(body.model, conversations, "conversations", truncate=body.truncate)
    return ScoresAnswer(model=scored.model.name, scores=scored.scores, tokens=scored.tokens, warnings=scored.warnings)
