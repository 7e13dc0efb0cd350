"""`/score` and `/rerank` of vLLM's server: a query is a user's message, a document is a response to it."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from runtime.api.errors import ERROR_RESPONSES, ApiError
from runtime.api.schema import (
    PROMPT,
    RESPONSES,
    CompatRequest,
    ModelName,
    OneOrMore,
    Usage,
    as_list,
    example,
)
from runtime.api.scoring import RequestConversation, RequestScorerDep

router = APIRouter(tags=["vLLM"], responses=ERROR_RESPONSES)


class ScoreRequest(CompatRequest):
    """Queries and documents: the same number of both, or one query for all documents."""

    model_config = example({"queries": PROMPT, "documents": RESPONSES})

    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    text_1: Annotated[OneOrMore | None, Field(description="Alias of `queries`.")] = None
    text_2: Annotated[OneOrMore | None, Field(description="Alias of `documents`.")] = None
    model: ModelName = None

    @model_validator(mode="after")
    def _both(self) -> ScoreRequest:
        for names in (("queries", "text_1"), ("documents", "text_2")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                raise ValueError(f"send exactly one of {names[0]} and {names[1]}")
        return self


class ScoredDocument(BaseModel):
    """One document's score."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(BaseModel):
    """One entry per document, in the request's order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoredDocument]
    usage: Usage


@router.post("/score", summary="Score documents as responses to queries")
@router.post("/v1/score", summary="Score documents as responses to queries")
async def score_documents(body: ScoreRequest, scorer: RequestScorerDep) -> ScoreAnswer:
    """Each query is a user turn and each document the assistant's response to it."""
    queries = as_list(body.queries or body.text_1 or "")
    documents = as_list(body.documents or body.text_2 or "")
    field = "documents" if body.documents is not None else "text_2"
    if len(queries) not in (1, len(documents)):
        counts = f"{len(queries)} queries and {len(documents)} documents"
        raise ApiError(422, f"{field}: the request has {counts}; send one query, or one per document.", field)
    if len(queries) == 1:
        queries *= len(documents)
    scored = await scorer.score(body.model, _responses(queries, documents, field), field)
    return ScoreAnswer(
        id=f"score-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=scored.model.name,
        data=[ScoredDocument(index=index, score=score) for index, score in enumerate(scored.scores)],
        usage=Usage.of(sum(scored.tokens)),
    )


class RerankRequest(CompatRequest):
    """A query and the documents to rank as responses to it."""

    model_config = example({"query": PROMPT, "documents": RESPONSES, "top_n": 1})

    query: str
    documents: Annotated[list[str], Field(min_length=1)]
    top_n: Annotated[
        Annotated[int, Field(ge=0)] | None, Field(description="Number of documents to return, best first; 0 for all.")
    ] = None
    model: ModelName = None


class RankedText(BaseModel):
    """A document."""

    text: str


class RerankResult(BaseModel):
    """A document, its index in the request, and its score."""

    index: int
    document: RankedText
    relevance_score: float


class RerankAnswer(BaseModel):
    """Documents by falling score."""

    id: str
    model: str
    usage: Usage
    results: list[RerankResult]


@router.post("/rerank", summary="Rank documents as responses to a query")
@router.post("/v1/rerank", summary="Rank documents as responses to a query")
@router.post("/v2/rerank", summary="Rank documents as responses to a query")
async def rerank(body: RerankRequest, scorer: RequestScorerDep) -> RerankAnswer:
    """Best-of-N: the query is a user turn and each document a candidate response."""
    conversations = _responses([body.query] * len(body.documents), body.documents, "documents")
    scored = await scorer.score(body.model, conversations, "documents")
    order = sorted(range(len(body.documents)), key=lambda row: -scored.scores[row])
    return RerankAnswer(
        id=f"rerank-{uuid.uuid4().hex}",
        model=scored.model.name,
        usage=Usage.of(sum(scored.tokens)),
        results=[
            RerankResult(index=row, document=RankedText(text=body.documents[row]), relevance_score=scored.scores[row])
            for row in order[: body.top_n or None]
        ],
    )


def _responses(queries: list[str], documents: list[str], field: str) -> list[RequestConversation]:
    return [
        RequestConversation(
            f"{field}[{row}]", [{"role": "user", "content": query}, {"role": "assistant", "content": document}]
        )
        for row, (query, document) in enumerate(zip(queries, documents, strict=True))
    ]
