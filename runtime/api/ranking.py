"""`/score` and `/rerank`: documents as responses to a query, as vLLM's clients ask."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from runtime.api.faults import FAULTS, Fault
from runtime.api.schema import PROMPT, RESPONSES, ForeignBody, ModelName, OneOrMore, RawScores, Usage, as_list, example
from runtime.api.scoring import Asked, Conversation

router = APIRouter(tags=["vLLM"], responses=FAULTS)


class ScoreRequest(ForeignBody):
    """Queries and the documents that respond to them: as many, or one query for all."""

    model_config = example({"queries": PROMPT, "documents": RESPONSES})

    queries: OneOrMore | None = None
    documents: OneOrMore | None = None
    text_1: Annotated[OneOrMore | None, Field(description="Another name of `queries`.")] = None
    text_2: Annotated[OneOrMore | None, Field(description="Another name of `documents`.")] = None
    model: ModelName = None
    use_activation: RawScores = None

    @model_validator(mode="after")
    def _both(self) -> ScoreRequest:
        for names in (("queries", "text_1"), ("documents", "text_2")):
            if sum(getattr(self, name) is not None for name in names) != 1:
                raise ValueError(f"either {names[0]} or {names[1]} was expected")
        return self


class ScoredDocument(BaseModel):
    """One document's score."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreAnswer(BaseModel):
    """One entry a document, in their order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoredDocument]
    usage: Usage


@router.post("/score", summary="Score documents as responses to queries")
@router.post("/v1/score", summary="Score documents as responses to queries")
async def score_documents(body: ScoreRequest, asked: Asked) -> ScoreAnswer:
    """Each query is a user's turn, each document the response to it."""
    queries = as_list(body.queries or body.text_1 or "")
    documents = as_list(body.documents or body.text_2 or "")
    field = "documents" if body.documents is not None else "text_2"
    if len(queries) not in (1, len(documents)):
        counts = f"{len(queries)} queries and {len(documents)} documents"
        raise Fault(422, f"{field}: there are {counts}; one query, or as many, was expected.", field)
    if len(queries) == 1:
        queries *= len(documents)
    scored = await asked.score(body.model, _responses(queries, documents, field), field)
    return ScoreAnswer(
        id=f"score-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=scored.model.name,
        data=[ScoredDocument(index=index, score=score) for index, score in enumerate(scored.scores)],
        usage=Usage.of(sum(scored.tokens)),
    )


class RerankRequest(ForeignBody):
    """A query and the documents to rank as responses to it."""

    model_config = example({"query": PROMPT, "documents": RESPONSES, "top_n": 1})

    query: str
    documents: Annotated[list[str], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0, description="Give the best alone; 0 for all.")] = 0
    model: ModelName = None
    use_activation: RawScores = None


class RankedText(BaseModel):
    """A document."""

    text: str


class Ranked(BaseModel):
    """A document, where it stood in the request, and its score."""

    index: int
    document: RankedText
    relevance_score: float


class RerankAnswer(BaseModel):
    """The best first."""

    id: str
    model: str
    usage: Usage
    results: list[Ranked]


@router.post("/rerank", summary="Rank documents as responses to a query")
@router.post("/v1/rerank", summary="Rank documents as responses to a query")
async def rerank(body: RerankRequest, asked: Asked) -> RerankAnswer:
    """Best-of-N: the query is a user's turn, each document a response to it."""
    conversations = _responses([body.query] * len(body.documents), body.documents, "documents")
    scored = await asked.score(body.model, conversations, "documents")
    order = sorted(range(len(body.documents)), key=lambda row: -scored.scores[row])
    return RerankAnswer(
        id=f"rerank-{uuid.uuid4().hex}",
        model=scored.model.name,
        usage=Usage.of(sum(scored.tokens)),
        results=[
            Ranked(index=row, document=RankedText(text=body.documents[row]), relevance_score=scored.scores[row])
            for row in order[: body.top_n or None]
        ],
    )


def _responses(queries: list[str], documents: list[str], field: str) -> list[Conversation]:
    return [
        Conversation(
            f"{field}[{row}]", [{"role": "user", "content": query}, {"role": "assistant", "content": document}]
        )
        for row, (query, document) in enumerate(zip(queries, documents, strict=True))
    ]
