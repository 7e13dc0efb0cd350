"""`/pooling`: what clients of vLLM's pooling server ask."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from runtime.api.faults import FAULTS
from runtime.api.schema import POLICY_TEXTS, ForeignBody, Messages, ModelName, OneOrMore, RawScores, Usage, example
from runtime.api.scoring import Asked
from runtime.api.texts import read_input

router = APIRouter(tags=["vLLM"], responses=FAULTS)


class PoolingRequest(ForeignBody):
    """Texts in some template, or one conversation."""

    model_config = example({"input": POLICY_TEXTS, "task": "token_classify", "use_activation": False})

    model: ModelName = None
    input: Annotated[OneOrMore | None, Field(description="Conversations in ChatML or Llama-3's template.")] = None
    messages: Messages | None = None
    task: Literal["token_classify", "classify"] = "token_classify"
    encoding_format: Literal["float"] = "float"
    use_activation: RawScores = None

    @model_validator(mode="after")
    def _one(self) -> PoolingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("either input or messages was expected")
        return self


class Pooled(BaseModel):
    """One conversation's rows."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: Annotated[
        list[list[float]] | list[float],
        Field(description="One row, that of the scored token; for `classify` the score itself."),
    ]


class PoolingAnswer(BaseModel):
    """One entry a conversation, in their order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: Usage


@router.post("/pooling", summary="Scores as vLLM pools them")
async def pool(body: PoolingRequest, asked: Asked) -> PoolingAnswer:
    """Of the rows that vLLM gives, one a token, the last alone, which is the reward."""
    conversations, field = read_input(body.input, body.messages)
    scored = await asked.score(body.model, conversations, field)
    rows: list[list[list[float]] | list[float]] = [
        [[score]] if body.task == "token_classify" else [score] for score in scored.scores
    ]
    return PoolingAnswer(
        id=f"pool-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=scored.model.name,
        data=[Pooled(index=index, data=row) for index, row in enumerate(rows)],
        usage=Usage.of(sum(scored.tokens)),
    )
