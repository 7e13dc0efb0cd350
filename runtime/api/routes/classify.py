"""`/classify`, in two dialects: SGLang sends `text`, vLLM sends `input` or `messages`."""

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
    OneOrMore,
    Usage,
    as_list,
    example,
)
from runtime.api.scoring import RequestScorerDep, read_input, read_texts

router = APIRouter(tags=["SGLang", "vLLM"], responses=ERROR_RESPONSES)


class ClassifyRequest(CompatRequest):
    """Exactly one of `text`, `input` and `messages`."""

    model_config = example({"text": POLICY_TEXTS})

    text: Annotated[OneOrMore | None, Field(description="SGLang: conversations as text in a known chat template.")] = (
        None
    )
    input: Annotated[OneOrMore | None, Field(description="vLLM: conversations as text in a known chat template.")] = (
        None
    )
    messages: Messages | None = None
    model: ModelName = None

    @model_validator(mode="after")
    def _one(self) -> ClassifyRequest:
        if sum(each is not None for each in (self.text, self.input, self.messages)) != 1:
            raise ValueError("send exactly one of text, input and messages")
        return self


class TokenCount(BaseModel):
    """SGLang's metadata of a score."""

    prompt_tokens: int


class SGLangResult(BaseModel):
    """One conversation's score in SGLang's format."""

    embedding: Annotated[list[float], Field(description="The score.", min_length=1, max_length=1)]
    meta_info: TokenCount


class ClassificationResult(BaseModel):
    """One conversation's score in vLLM's format."""

    index: int
    label: str | None = None
    probs: Annotated[list[float], Field(description="The raw score, not a probability.", min_length=1, max_length=1)]
    num_classes: Literal[1] = 1


class ClassifyAnswer(BaseModel):
    """One entry per conversation, in the request's order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassificationResult]
    usage: Usage


@router.post("/classify", summary="Scores in the format of SGLang's or vLLM's /classify")
async def classify(
    body: ClassifyRequest, scorer: RequestScorerDep
) -> list[SGLangResult] | SGLangResult | ClassifyAnswer:
    """For `text`, SGLang's response: a list, or one object for one text. For `input` or `messages`, vLLM's response."""
    if body.text is not None:
        conversations = read_texts(as_list(body.text), "text")
        scored = await scorer.score(body.model, conversations, "text")
        results = [
            SGLangResult(embedding=[score], meta_info=TokenCount(prompt_tokens=tokens))
            for score, tokens in zip(scored.scores, scored.tokens, strict=True)
        ]
        return results[0] if isinstance(body.text, str) else results
    conversations, field = read_input(body.input, body.messages)
    scored = await scorer.score(body.model, conversations, field)
    return ClassifyAnswer(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=scored.model.name,
        data=[ClassificationResult(index=index, probs=[score]) for index, score in enumerate(scored.scores)],
        usage=Usage.of(sum(scored.tokens)),
    )
