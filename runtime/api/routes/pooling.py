"""`/pooling` of vLLM's server."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from runtime.api.errors import ERROR_RESPONSES
from runtime.api.schema import (
    POLICY_TEXTS,
    CompatRequest,
    Messages,
    ModelName,
    TextsOrTokenIds,
    Usage,
    example,
)
from runtime.api.scoring import RequestScorerDep, read_input

router = APIRouter(tags=["vLLM"], responses=ERROR_RESPONSES)


class PoolingRequest(CompatRequest):
    """Either `input` or `messages`."""

    model_config = example({"input": POLICY_TEXTS, "task": "token_classify", "use_activation": False})

    model: ModelName = None
    input: TextsOrTokenIds | None = None
    messages: Messages | None = None
    task: Literal["token_classify", "classify"] | None = "token_classify"
    encoding_format: Literal["float"] | None = "float"

    @model_validator(mode="after")
    def _one(self) -> PoolingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("send exactly one of input and messages")
        return self


class PoolingResult(BaseModel):
    """One conversation's score."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: Annotated[
        list[list[float]] | list[float],
        Field(description="For `token_classify` one row, that of the scored token; for `classify` the score."),
    ]


class PoolingAnswer(BaseModel):
    """One entry per conversation, in the request's order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PoolingResult]
    usage: Usage


@router.post("/pooling", summary="Scores in the format of vLLM's /pooling")
async def pool(body: PoolingRequest, scorer: RequestScorerDep) -> PoolingAnswer:
    """Each score as pooled data. vLLM returns one row per token; here only the last row, the reward, is returned."""
    conversations, field = read_input(body.input, body.messages)
    scored = await scorer.score(body.model, conversations, field)
    rows: list[list[list[float]] | list[float]] = [
        [score] if body.task == "classify" else [[score]] for score in scored.scores
    ]
    return PoolingAnswer(
        id=f"pool-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=scored.model.name,
        data=[PoolingResult(index=index, data=row) for index, row in enumerate(rows)],
        usage=Usage.of(sum(scored.tokens)),
    )
