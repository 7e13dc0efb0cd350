"""`/classify`, which two servers speak in two ways: SGLang's has `text`, vLLM's has `input` or `messages`."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from runtime.api.faults import FAULTS
from runtime.api.schema import (
    POLICY_TEXTS,
    ForeignBody,
    Messages,
    ModelName,
    OneOrMore,
    RawScores,
    Usage,
    as_list,
    example,
)
from runtime.api.scoring import Asked
from runtime.api.texts import read_input, read_texts

router = APIRouter(tags=["SGLang", "vLLM"], responses=FAULTS)


class ClassifyRequest(ForeignBody):
    """One of `text`, `input` and `messages`."""

    model_config = example({"text": POLICY_TEXTS})

    text: Annotated[OneOrMore | None, Field(description="SGLang's: conversations in some template.")] = None
    input: Annotated[OneOrMore | None, Field(description="vLLM's: conversations in some template.")] = None
    messages: Messages | None = None
    model: ModelName = None
    use_activation: RawScores = None

    @model_validator(mode="after")
    def _one(self) -> ClassifyRequest:
        if sum(each is not None for each in (self.text, self.input, self.messages)) != 1:
            raise ValueError("one of text, input and messages was expected")
        return self


class TokenCount(BaseModel):
    """What SGLang says beside a score."""

    prompt_tokens: int


class Embedded(BaseModel):
    """One conversation's answer in SGLang's shape."""

    embedding: Annotated[list[float], Field(description="The score alone.", min_length=1, max_length=1)]
    meta_info: TokenCount


class Classified(BaseModel):
    """One conversation's answer in vLLM's shape."""

    index: int
    label: str | None = None
    probs: Annotated[list[float], Field(description="The score as it is.", min_length=1, max_length=1)]
    num_classes: Literal[1] = 1


class ClassifyAnswer(BaseModel):
    """One entry a conversation, in their order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


@router.post("/classify", summary="Scores as SGLang and vLLM classify")
async def classify(body: ClassifyRequest, asked: Asked) -> list[Embedded] | Embedded | ClassifyAnswer:
    """With `text`, a list as SGLang answers, or one object for one text; with `input` or `messages`, what vLLM does."""
    if body.text is not None:
        conversations = read_texts(as_list(body.text), "text")
        scored = await asked.score(body.model, conversations, "text")
        answers = [
            Embedded(embedding=[score], meta_info=TokenCount(prompt_tokens=tokens))
            for score, tokens in zip(scored.scores, scored.tokens, strict=True)
        ]
        return answers[0] if isinstance(body.text, str) else answers
    conversations, field = read_input(body.input, body.messages)
    scored = await asked.score(body.model, conversations, field)
    return ClassifyAnswer(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=scored.model.name,
        data=[Classified(index=index, probs=[score]) for index, score in enumerate(scored.scores)],
        usage=Usage.of(sum(scored.tokens)),
    )
