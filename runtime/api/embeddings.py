"""`/v1/embeddings`: the score as an embedding of one number, as verl reads it and the `openai` client asks for it."""

from __future__ import annotations

import base64
import struct
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from runtime.api.faults import FAULTS
from runtime.api.schema import POLICY_TEXTS, ForeignBody, ModelName, OneOrMore, Usage, example
from runtime.api.scoring import Asked
from runtime.api.texts import read_input

router = APIRouter(tags=["OpenAI"], responses=FAULTS)


class EmbeddingsRequest(ForeignBody):
    """Conversations in some template."""

    model_config = example({"input": POLICY_TEXTS, "encoding_format": "float"})

    input: Annotated[OneOrMore, Field(description="Conversations in ChatML or Llama-3's template.")]
    model: ModelName = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Literal[1] | None = None


class Embedding(BaseModel):
    """One conversation's score."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[
        list[float] | str, Field(description="The score alone; as base64, the four bytes of a little-endian float32.")
    ]


class EmbeddingsAnswer(BaseModel):
    """One entry a conversation, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


@router.post("/v1/embeddings", summary="Scores as embeddings of one number")
async def embed(body: EmbeddingsRequest, asked: Asked) -> EmbeddingsAnswer:
    """A score is a float32, so that base64 loses nothing."""
    conversations, field = read_input(body.input, None)
    scored = await asked.score(body.model, conversations, field)
    as_text = body.encoding_format == "base64"
    return EmbeddingsAnswer(
        data=[
            Embedding(index=index, embedding=_base64(score) if as_text else [score])
            for index, score in enumerate(scored.scores)
        ],
        model=scored.model.name,
        usage=Usage.of(sum(scored.tokens)),
    )


def _base64(score: float) -> str:
    return base64.b64encode(struct.pack("<f", score)).decode()
