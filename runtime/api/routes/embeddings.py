"""`/v1/embeddings` of OpenAI's API: the score is an embedding of one number. verl and the `openai` client use it."""

from __future__ import annotations

import base64
import struct
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from runtime.api.errors import ERROR_RESPONSES
from runtime.api.schema import POLICY_TEXTS, CompatRequest, ModelName, TextsOrTokenIds, Usage, example
from runtime.api.scoring import RequestScorerDep, read_input

router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)


class EmbeddingsRequest(CompatRequest):
    """Conversations as text in a chat template, or as token ids."""

    model_config = example({"input": POLICY_TEXTS, "encoding_format": "float"})

    input: TextsOrTokenIds
    model: ModelName = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Literal[1] | None = None


class Embedding(BaseModel):
    """One conversation's score."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[
        list[float] | str, Field(description="The score; as base64, the four bytes of a little-endian float32.")
    ]


class EmbeddingsAnswer(BaseModel):
    """One entry per conversation, in the request's order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


@router.post("/v1/embeddings", summary="Scores as embeddings of one number")
async def embed(body: EmbeddingsRequest, scorer: RequestScorerDep) -> EmbeddingsAnswer:
    """Each score as an embedding of one number. Scores are float32, so base64 is exact."""
    conversations, field = read_input(body.input, None)
    scored = await scorer.score(body.model, conversations, field)
    as_base64 = body.encoding_format == "base64"
    return EmbeddingsAnswer(
        data=[
            Embedding(index=index, embedding=_base64(score) if as_base64 else [score])
            for index, score in enumerate(scored.scores)
        ],
        model=scored.model.name,
        usage=Usage.of(sum(scored.tokens)),
    )


def _base64(score: float) -> str:
    return base64.b64encode(struct.pack("<f", score)).decode()
